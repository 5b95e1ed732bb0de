//! Servers of the etcd API that share one history in memory and fail on command.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use conclave_proto::etcd::{
    etcdserverpb::{
        self as pb, kv_server, lease_server, watch_request::RequestUnion, watch_server,
    },
    mvccpb,
};
use tokio::{net::TcpListener, sync::Notify, time::Instant};
use tokio_stream::{Stream, StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

/// What goes wrong with the next write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It has its effect, and the server says that it does not know.
    Unknown,
    /// It has none, for want of a leader.
    NoLeader,
    /// It has none, since the server stops; one of ours, which says so.
    Stopping,
}

#[derive(Debug)]
pub(crate) struct State {
    /// What happened at which revision.
    pub(crate) history: Vec<(i64, Vec<mvccpb::Event>)>,
    pub(crate) revision: i64,
    compacted: i64,
    faults: Vec<Fault>,
    hung: HashSet<usize>,
    /// Those that open streams and tell nothing.
    mute: HashSet<usize>,
    /// Whether there is a leader for leases to be granted.
    pub(crate) may_grant: bool,
    /// Streams break after so many answers.
    pub(crate) breaks_after: usize,
    /// How many streams of watches were begun at each server.
    pub(crate) watches: BTreeMap<usize, usize>,
    /// Leases with their TTL in seconds, and how often they were renewed.
    pub(crate) leases: BTreeMap<i64, (i64, u64)>,
}

pub(crate) struct Servers {
    shared: Arc<Shared>,
    pub(crate) addresses: Vec<String>,
}

struct Shared {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Clone)]
struct Server {
    index: usize,
    shared: Arc<Shared>,
}

impl Servers {
    pub(crate) async fn start(count: usize) -> Servers {
        let state = State {
            history: Vec::new(),
            revision: 1,
            compacted: 0,
            faults: Vec::new(),
            hung: HashSet::new(),
            mute: HashSet::new(),
            may_grant: true,
            breaks_after: usize::MAX,
            watches: BTreeMap::new(),
            leases: BTreeMap::new(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Notify::new(),
        });
        let mut addresses = Vec::new();
        for index in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(listener.local_addr().unwrap().to_string());
            let server = Server {
                index,
                shared: Arc::clone(&shared),
            };
            let router = tonic::transport::Server::builder()
                .add_service(kv_server::KvServer::new(server.clone()))
                .add_service(watch_server::WatchServer::new(server.clone()))
                .add_service(lease_server::LeaseServer::new(server));
            tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        }
        Servers { shared, addresses }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }

    pub(crate) fn inject(&self, faults: &[Fault]) {
        self.state().faults = faults.to_vec();
    }

    pub(crate) fn hang(&self, index: usize) {
        self.state().hung.insert(index);
    }

    /// From now on only these servers tell nothing on their streams.
    pub(crate) fn mute(&self, servers: &[usize]) {
        self.state().mute = servers.iter().copied().collect();
        self.shared.changed.notify_waiters();
    }

    pub(crate) fn compact(&self, revision: i64) {
        self.state().compacted = revision;
    }

    /// Something happens to `count` keys at once.
    pub(crate) fn change(&self, count: u8) {
        let keys = (0..count).map(|key| vec![b'k', key]).collect();
        self.shared.change(keys);
    }

    /// Waits until the state is as wanted.
    pub(crate) async fn until(&self, wanted: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !wanted(&self.state()) {
            assert!(Instant::now() < deadline, "{:?}", self.state());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Shared {
    fn change(&self, keys: Vec<Vec<u8>>) -> i64 {
        let mut state = self.state.lock().unwrap();
        state.revision += 1;
        let revision = state.revision;
        let events = keys.into_iter().map(|key| mvccpb::Event {
            kv: Some(mvccpb::KeyValue {
                key: key.into(),
                create_revision: revision,
                mod_revision: revision,
                ..mvccpb::KeyValue::default()
            }),
            ..mvccpb::Event::default()
        });
        state.history.push((revision, events.collect()));
        drop(state);
        self.changed.notify_waiters();
        revision
    }
}

impl Server {
    /// Never answers if this server hangs.
    async fn begin(&self) {
        while self.shared.state.lock().unwrap().hung.contains(&self.index) {
            self.shared.changed.notified().await;
        }
    }

    /// Waits while this server tells nothing.
    async fn may_tell(&self) {
        loop {
            let changed = self.shared.changed.notified();
            if !self.shared.state.lock().unwrap().mute.contains(&self.index) {
                return;
            }
            changed.await;
        }
    }

    fn header(&self) -> pb::ResponseHeader {
        pb::ResponseHeader {
            member_id: self.index as u64 + 1,
            revision: self.shared.state.lock().unwrap().revision,
            ..pb::ResponseHeader::default()
        }
    }

    fn fault(&self) -> Option<Fault> {
        let mut state = self.shared.state.lock().unwrap();
        (!state.faults.is_empty()).then(|| state.faults.remove(0))
    }
}

#[tonic::async_trait]
impl kv_server::Kv for Server {
    type RangeStreamStream =
        Pin<Box<dyn Stream<Item = Result<pb::RangeStreamResponse, Status>> + Send>>;

    async fn range(
        &self,
        request: Request<pb::RangeRequest>,
    ) -> Result<Response<pb::RangeResponse>, Status> {
        self.begin().await;
        if request.get_ref().revision > 0
            && request.get_ref().revision < self.shared.state.lock().unwrap().compacted
        {
            let text = "etcdserver: mvcc: required revision has been compacted";
            return Err(Status::out_of_range(text));
        }
        match self.fault() {
            None => Ok(Response::new(pb::RangeResponse {
                header: Some(self.header()),
                ..pb::RangeResponse::default()
            })),
            Some(_) => Err(Status::unavailable("etcdserver: request timed out")),
        }
    }

    async fn range_stream(
        &self,
        _: Request<pb::RangeRequest>,
    ) -> Result<Response<Self::RangeStreamStream>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn put(
        &self,
        request: Request<pb::PutRequest>,
    ) -> Result<Response<pb::PutResponse>, Status> {
        self.begin().await;
        let key = request.into_inner().key.to_vec();
        match self.fault() {
            Some(Fault::NoLeader) => return Err(Status::unavailable("etcdserver: no leader")),
            Some(Fault::Stopping) => return Err(stopping()),
            Some(Fault::Unknown) => {
                self.shared.change(vec![key]);
                return Err(Status::unavailable("etcdserver: request timed out"));
            }
            None => drop(self.shared.change(vec![key])),
        }
        Ok(Response::new(pb::PutResponse {
            header: Some(self.header()),
            prev_kv: None,
        }))
    }

    async fn delete_range(
        &self,
        _: Request<pb::DeleteRangeRequest>,
    ) -> Result<Response<pb::DeleteRangeResponse>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn txn(&self, _: Request<pb::TxnRequest>) -> Result<Response<pb::TxnResponse>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn compact(
        &self,
        request: Request<pb::CompactionRequest>,
    ) -> Result<Response<pb::CompactionResponse>, Status> {
        self.begin().await;
        let fault = self.fault();
        let mut state = self.shared.state.lock().unwrap();
        if request.get_ref().revision <= state.compacted {
            let text = "etcdserver: mvcc: required revision has been compacted";
            return Err(Status::out_of_range(text));
        }
        state.compacted = request.get_ref().revision;
        drop(state);
        match fault {
            None => Ok(Response::new(pb::CompactionResponse {
                header: Some(self.header()),
            })),
            Some(_) => Err(Status::unavailable("etcdserver: request timed out")),
        }
    }
}

fn stopping() -> Status {
    let details = ErrorDetails::with_error_info("SHUTTING_DOWN", "conclave.dev", HashMap::new());
    Status::with_error_details(Code::Unavailable, "etcdserver: server stopped", details)
}

/// Tells all events from `start` on, until nobody listens.
async fn tell(
    server: Server,
    requests: Streaming<pb::WatchRequest>,
    sender: tokio::sync::mpsc::Sender<pb::WatchResponse>,
    (created, start, compacted): (pb::WatchResponse, i64, i64),
) {
    let mut requests = requests;
    server.may_tell().await;
    if sender.send(created).await.is_err() {
        return;
    }
    if start < compacted {
        let canceled = pb::WatchResponse {
            canceled: true,
            compact_revision: compacted,
            ..pb::WatchResponse::default()
        };
        drop(sender.send(canceled).await);
        return;
    }
    let mut next = start;
    loop {
        server.may_tell().await;
        let changed = server.shared.changed.notified();
        let header = server.header();
        let batch: Vec<(i64, Vec<mvccpb::Event>)> = {
            let state = server.shared.state.lock().unwrap();
            let behind = state.history.iter().filter(|(at, _)| *at >= next);
            behind.take(2).cloned().collect()
        };
        let Some((last, _)) = batch.last() else {
            let asked = tokio::select! {
                () = changed => continue,
                () = sender.closed() => return,
                asked = requests.message() => asked,
            };
            let Ok(Some(_)) = asked else { return };
            server.may_tell().await;
            let sign_of_life = pb::WatchResponse {
                header: Some(server.header()),
                watch_id: -1,
                ..pb::WatchResponse::default()
            };
            if sender.send(sign_of_life).await.is_err() {
                return;
            }
            continue;
        };
        next = last + 1;
        let events: Vec<_> = batch.into_iter().flat_map(|(_, events)| events).collect();
        let count = events.len();
        for (n, event) in events.into_iter().enumerate() {
            let part = pb::WatchResponse {
                header: Some(header),
                events: vec![event],
                fragment: n + 1 < count,
                ..pb::WatchResponse::default()
            };
            if sender.send(part).await.is_err() {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl watch_server::Watch for Server {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<pb::WatchResponse, Status>> + Send>>;

    /// One watch a stream, of everything: two revisions an answer, one event a part.
    async fn watch(
        &self,
        request: Request<Streaming<pb::WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.begin().await;
        assert_eq!(request.metadata().get("hasleader").unwrap(), "true");
        let mut requests = request.into_inner();
        let Some(RequestUnion::CreateRequest(create)) =
            requests.message().await?.and_then(|r| r.request_union)
        else {
            return Err(Status::invalid_argument("not a create request"));
        };
        let (breaks_after, compacted) = {
            let mut state = self.shared.state.lock().unwrap();
            *state.watches.entry(self.index).or_default() += 1;
            (state.breaks_after, state.compacted)
        };
        let created = pb::WatchResponse {
            header: Some(self.header()),
            created: true,
            ..pb::WatchResponse::default()
        };
        let start = match create.start_revision {
            0 => self.header().revision + 1,
            start => start,
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        let server = self.clone();
        tokio::spawn(tell(server, requests, sender, (created, start, compacted)));
        let answers = tokio_stream::wrappers::ReceiverStream::new(receiver).map(Ok);
        let broken = tokio_stream::once(Err(Status::unavailable("broken")));
        Ok(Response::new(Box::pin(
            answers.take(breaks_after).chain(broken),
        )))
    }
}

#[tonic::async_trait]
impl lease_server::Lease for Server {
    type LeaseKeepAliveStream =
        Pin<Box<dyn Stream<Item = Result<pb::LeaseKeepAliveResponse, Status>> + Send>>;

    async fn lease_grant(
        &self,
        request: Request<pb::LeaseGrantRequest>,
    ) -> Result<Response<pb::LeaseGrantResponse>, Status> {
        self.begin().await;
        if !self.shared.state.lock().unwrap().may_grant {
            return Err(Status::unavailable("etcdserver: no leader"));
        }
        let ttl = request.into_inner().ttl;
        let id = {
            let mut state = self.shared.state.lock().unwrap();
            let id = 77 + state.leases.len() as i64;
            state.leases.insert(id, (ttl, 0));
            id
        };
        Ok(Response::new(pb::LeaseGrantResponse {
            header: Some(self.header()),
            id,
            ttl,
            error: String::new(),
        }))
    }

    async fn lease_revoke(
        &self,
        request: Request<pb::LeaseRevokeRequest>,
    ) -> Result<Response<pb::LeaseRevokeResponse>, Status> {
        self.begin().await;
        let id = request.into_inner().id;
        if self
            .shared
            .state
            .lock()
            .unwrap()
            .leases
            .remove(&id)
            .is_none()
        {
            return Err(Status::not_found("etcdserver: requested lease not found"));
        }
        if self.fault().is_some() {
            return Err(Status::unavailable("etcdserver: request timed out"));
        }
        Ok(Response::new(pb::LeaseRevokeResponse {
            header: Some(self.header()),
        }))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<pb::LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let server = self.clone();
        let answers = request.into_inner().then(move |request| {
            let server = server.clone();
            async move {
                server.begin().await;
                let id = request?.id;
                let mut state = server.shared.state.lock().unwrap();
                let ttl = state.leases.get_mut(&id).map_or(0, |(ttl, renewed)| {
                    *renewed += 1;
                    *ttl
                });
                drop(state);
                Ok(pb::LeaseKeepAliveResponse {
                    header: Some(server.header()),
                    id,
                    ttl,
                })
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn lease_time_to_live(
        &self,
        _: Request<pb::LeaseTimeToLiveRequest>,
    ) -> Result<Response<pb::LeaseTimeToLiveResponse>, Status> {
        Err(Status::unimplemented("no"))
    }

    async fn lease_leases(
        &self,
        _: Request<pb::LeaseLeasesRequest>,
    ) -> Result<Response<pb::LeaseLeasesResponse>, Status> {
        Err(Status::unimplemented("no"))
    }
}
