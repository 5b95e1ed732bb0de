//! Streams that other members open.

use std::{
    collections::BTreeSet,
    net::TcpStream,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use async_trait::async_trait;
use conclave_core::{ids::NodeId, node::Handle};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    FetchRequest, PeerFrame, PeerGreeting,
    peer_server::{Peer, PeerServer},
};
use tokio::{sync::mpsc, time};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{
    FRAME_BYTES_MAX, PROTOCOL, Peers,
    fetch::{Chunks, Sender},
};
use crate::net;

/// A member sends its greeting at once.
const GREETING_WITHIN: Duration = Duration::from_secs(2);
/// Link-level pings find a dead machine; elections do not wait for them.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// One frame fits without a round trip.
const WINDOW_BYTES: u32 = 4 << 20;
/// Refusals are logged once each, up to this many different ones.
const REFUSALS_LOGGED_MAX: usize = 64;

/// Serves connections of other members, for ever.
pub(super) async fn serve(
    peers: Arc<Peers>,
    handle: Handle<Primitives>,
    sender: Arc<Sender>,
    connections: mpsc::Receiver<TcpStream>,
) {
    let service = PeerService {
        peers,
        handle,
        sender,
        refusals: Mutex::default(),
    };
    let service = PeerServer::new(service).max_decoding_message_size(FRAME_BYTES_MAX);
    let served = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES)
        .add_service(service)
        .serve_with_incoming(net::incoming(connections))
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "members can no longer connect to this one");
    }
}

#[derive(Debug)]
struct PeerService {
    peers: Arc<Peers>,
    handle: Handle<Primitives>,
    sender: Arc<Sender>,
    refusals: Mutex<BTreeSet<String>>,
}

#[async_trait]
impl Peer for PeerService {
    type ExchangeStream = ReceiverStream<Result<PeerGreeting, Status>>;

    async fn exchange(
        &self,
        request: Request<Streaming<PeerFrame>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let mut frames = request.into_inner();
        let first = time::timeout(GREETING_WITHIN, frames.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no greeting came"))??;
        let greeting = first.and_then(|frame| frame.greeting);
        let from = self
            .check(greeting)
            .inspect_err(|refusal| self.log_refusal(refusal))?;
        let (answers, stream) = mpsc::channel(2);
        // There is room, and if the member is gone already, reading fails next.
        answers.try_send(Ok(self.peers.greeting)).ok();
        let reader = Reader {
            peers: Arc::clone(&self.peers),
            handle: self.handle.clone(),
            from,
        };
        tokio::spawn(reader.run(frames, answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type FetchStream = Chunks;

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Chunks>, Status> {
        let FetchRequest { greeting, at_least } = request.into_inner();
        let from = self
            .check(greeting)
            .inspect_err(|refusal| self.log_refusal(refusal))?;
        let link = self.peers.links.get(&from);
        let name = link.map_or("", |link| link.member.name.as_str());
        Ok(Response::new(self.sender.send(at_least, name)?))
    }
}

impl PeerService {
    /// Who greets, if it is another member of this cluster.
    fn check(&self, greeting: Option<PeerGreeting>) -> Result<NodeId, Status> {
        let own = &self.peers.greeting;
        let Some(theirs) = greeting else {
            return Err(Status::invalid_argument("a stream begins with a greeting"));
        };
        let node = NodeId(theirs.node);
        let mismatch = if theirs.protocol != own.protocol {
            format!(
                "member {node} speaks version {} of the peer protocol, not {PROTOCOL}",
                theirs.protocol
            )
        } else if theirs.cluster_id != own.cluster_id {
            format!(
                "member {node} belongs to cluster {:x}, and this is a member of {:x}: \
                 --initial-cluster or --initial-cluster-token differ",
                theirs.cluster_id, own.cluster_id
            )
        } else if theirs.node == own.node {
            format!("member {node} dialled itself, or another process uses its id")
        } else if !self.peers.links.contains_key(&node) {
            format!("member {node} is not one of this cluster")
        } else {
            return Ok(node);
        };
        Err(Status::failed_precondition(mismatch))
    }

    fn log_refusal(&self, refusal: &Status) {
        let mut logged = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() < REFUSALS_LOGGED_MAX && logged.insert(refusal.message().to_owned()) {
            tracing::warn!(reason = refusal.message(), "refused a peer");
        }
    }
}

/// Passes on what one member sends.
struct Reader {
    peers: Arc<Peers>,
    handle: Handle<Primitives>,
    from: NodeId,
}

impl Reader {
    async fn run(
        self,
        mut frames: Streaming<PeerFrame>,
        answers: mpsc::Sender<Result<PeerGreeting, Status>>,
    ) {
        let end = loop {
            match frames.message().await {
                Ok(Some(frame)) => self.deliver(frame),
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        if let Some(error) = end {
            tracing::debug!(peer = %self.from, %error, "the stream of a peer broke");
            answers
                .send(Err(Status::invalid_argument("malformed frame")))
                .await
                .ok();
        }
        self.handle.peer_lost(self.from);
    }

    fn deliver(&self, frame: PeerFrame) {
        if let Some(link) = self.peers.links.get(&self.from) {
            let count = frame.messages.len() as u64;
            link.outbox
                .counters()
                .received
                .fetch_add(count, Ordering::Relaxed);
        }
        self.handle.peer(self.from, frame.messages);
    }
}
