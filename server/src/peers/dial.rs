//! Keeps a stream to one other member.

use std::{error::Error, sync::Arc, time::Duration};

use conclave_core::{ids::NodeId, node::Handle};
use conclave_primitives::Primitives;
use conclave_proto::internal::{PeerGreeting, peer_client::PeerClient};
use tokio::time::{self, Instant};
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::{Link, Peers};
use crate::options::Member;

/// How long a dial, and then a greeting, may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// Between two dials: short at first, since a member that restarts is back soon.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Between two dials of a member that is away for long.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// Link-level pings find a dead machine; elections do not wait for them.
const KEEPALIVE: Duration = Duration::from_secs(2);
/// Frames are large now and then.
const WINDOW_BYTES: u32 = 4 << 20;

/// Dials one member again and again, for ever.
pub(super) async fn keep_link(peers: Arc<Peers>, peer: NodeId, handle: Handle<Primitives>) {
    let Some(link) = peers.links.get(&peer) else {
        return;
    };
    let mut log = LinkLog {
        link,
        reported: Reported::Nothing,
    };
    let mut pause = PAUSE_MIN;
    loop {
        let began = Instant::now();
        match connect(link, &peers.greeting).await {
            Ok(greetings) => {
                log.connected();
                let end = lost(greetings).await;
                log.failed(&end);
            }
            Err(error) => log.failed(&error),
        }
        link.outbox.close();
        handle.peer_lost(peer);
        pause = if began.elapsed() > PAUSE_MAX {
            PAUSE_MIN
        } else {
            (pause * 2).min(PAUSE_MAX)
        };
        time::sleep(pause).await;
    }
}

/// A stream on which both sides have greeted.
async fn connect(
    link: &Link,
    greeting: &PeerGreeting,
) -> Result<Streaming<PeerGreeting>, LinkError> {
    let channel = endpoint(&link.member)?
        .connect()
        .await
        .map_err(LinkError::Unreachable)?;
    time::timeout(CONNECT_WITHIN, greet(link, channel, greeting))
        .await
        .unwrap_or(Err(LinkError::Silent))
}

/// How to connect to a member.
pub(super) fn endpoint(member: &Member) -> Result<Endpoint, LinkError> {
    let endpoint = Endpoint::from_shared(member.peer_url.to_string());
    Ok(endpoint
        .map_err(LinkError::Unreachable)?
        .connect_timeout(CONNECT_WITHIN)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(2 * WINDOW_BYTES))
}

async fn greet(
    link: &Link,
    channel: Channel,
    greeting: &PeerGreeting,
) -> Result<Streaming<PeerGreeting>, LinkError> {
    let frames = link.outbox.open(*greeting);
    let response = PeerClient::new(channel)
        .exchange(frames)
        .await
        .map_err(LinkError::from)?;
    let mut greetings = response.into_inner();
    let theirs = greetings.message().await?.ok_or(LinkError::Silent)?;
    if NodeId(theirs.node) != link.member.id || theirs.cluster_id != greeting.cluster_id {
        return Err(LinkError::Refused(format!(
            "member {:x} of cluster {:x} answers there",
            theirs.node, theirs.cluster_id
        )));
    }
    Ok(greetings)
}

/// Waits until a stream breaks, and says why it did.
async fn lost(mut greetings: Streaming<PeerGreeting>) -> LinkError {
    match greetings.message().await {
        Ok(_) => LinkError::Closed,
        Err(status) => status.into(),
    }
}

/// Why a link does not stand.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("it cannot be reached: {}", root(.0))]
    Unreachable(tonic::transport::Error),
    #[error("it did not answer in time")]
    Silent,
    #[error("it closed the stream")]
    Closed,
    #[error("the stream broke: {}", .0.message())]
    Broken(Status),
    /// Dialling again will not help until somebody changes something.
    #[error("{0}")]
    Refused(String),
}

/// What an error comes from in the end; the rest of its chain says nothing more.
fn root<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    root
}

impl From<Status> for LinkError {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::FailedPrecondition => Self::Refused(status.message().to_owned()),
            _ => Self::Broken(status),
        }
    }
}

/// Logs what becomes of a link: once for each change, not for each attempt.
struct LinkLog<'a> {
    link: &'a Link,
    reported: Reported,
}

#[derive(PartialEq)]
enum Reported {
    Nothing,
    Connected,
    Down,
    Refused(String),
}

impl LinkLog<'_> {
    fn connected(&mut self) {
        if self.reported != Reported::Connected {
            let Member { name, peer_url, .. } = &self.link.member;
            tracing::info!(peer = name, address = %peer_url, "connected to a peer");
            self.reported = Reported::Connected;
        }
    }

    fn failed(&mut self, error: &LinkError) {
        let now = match error {
            LinkError::Refused(reason) => Reported::Refused(reason.clone()),
            _ => Reported::Down,
        };
        if now == self.reported {
            return;
        }
        let Member {
            name: peer,
            peer_url: address,
            ..
        } = &self.link.member;
        match error {
            LinkError::Refused(reason) => tracing::error!(
                peer, %address, reason,
                "a peer refuses this member; it is dialled until that is put right"
            ),
            _ if self.reported == Reported::Nothing => {
                tracing::info!(peer, %address, %error, "a peer is not there yet");
            }
            _ => tracing::warn!(peer, %address, %error, "lost the link to a peer"),
        }
        self.reported = now;
    }
}
