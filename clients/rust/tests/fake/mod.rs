//! Servers that share one table of locks in memory and fail on command. They
//! keep the letter of the schemas, and none of the promises.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub(crate) mod election;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use conclave_proto::v1::{
    self,
    call::Request as Body,
    channel_server, cluster_server,
    election_server::{self, Election as _},
    lock_server::{self, Lock as _},
    reply::Outcome,
    session_event::Event,
    session_server::{self, Session as _},
};
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    time::{Duration, Instant, timeout_at},
};
use tokio_stream::{
    Stream,
    wrappers::{TcpListenerStream, UnboundedReceiverStream},
};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

/// What goes wrong with the next lock call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It has its effect, and the connection breaks.
    LoseAnswer,
}

#[derive(Clone, Debug)]
pub(crate) struct Holder {
    pub(crate) session: i64,
    pub(crate) owner: String,
    pub(crate) request: u64,
    pub(crate) token: u64,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    leader: usize,
    addresses: Vec<String>,
    hung: HashSet<usize>,
    calls: HashMap<usize, u64>,
    fault: Option<Fault>,
    last: u64,
    grants: u64,
    pub(crate) sessions:
        BTreeMap<i64, Option<mpsc::UnboundedSender<Result<v1::SessionEvent, Status>>>>,
    pub(crate) holders: BTreeMap<String, Holder>,
    pub(crate) cancelled: HashSet<(i64, u64)>,
    pub(crate) elections: election::Elections,
    /// By session and number: released, resigned, proclaimed.
    released: HashSet<(i64, u64)>,
}

/// All servers.
pub(crate) struct Servers {
    shared: Arc<Shared>,
}

#[derive(Default)]
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
        let shared = Arc::new(Shared::default());
        // Of an empty keyspace, as servers have it.
        shared.state().last = 1;
        for index in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            shared.state().addresses.push(address);
            let server = Server {
                index,
                shared: Arc::clone(&shared),
            };
            let router = tonic::transport::Server::builder()
                .add_service(session_server::SessionServer::new(server.clone()))
                .add_service(lock_server::LockServer::new(server.clone()))
                .add_service(election_server::ElectionServer::new(server.clone()))
                .add_service(channel_server::ChannelServer::new(server.clone()))
                .add_service(cluster_server::ClusterServer::new(server));
            tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        }
        Servers { shared }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.shared.state().addresses.clone()
    }

    pub(crate) fn lead(&self, index: usize) {
        self.shared.state().leader = index;
    }

    pub(crate) fn hang(&self, index: usize) {
        self.shared.state().hung.insert(index);
    }

    pub(crate) fn recover(&self, index: usize) {
        self.shared.state().hung.remove(&index);
        self.shared.changed.notify_waiters();
    }

    pub(crate) fn inject(&self, fault: Fault) {
        self.shared.state().fault = Some(fault);
    }

    pub(crate) fn holder(&self, lock: &str) -> Option<Holder> {
        self.shared.state().holders.get(lock).cloned()
    }

    pub(crate) fn steal(&self, lock: &str) {
        self.shared.state().holders.remove(lock);
        self.shared.changed.notify_waiters();
    }

    pub(crate) fn grants(&self) -> u64 {
        self.shared.state().grants
    }

    pub(crate) fn calls(&self, index: usize) -> u64 {
        self.shared.state().calls.get(&index).copied().unwrap_or(0)
    }

    pub(crate) fn open_sessions(&self) -> usize {
        self.shared.state().sessions.len()
    }

    /// Waits until the state is as wanted.
    pub(crate) async fn until(&self, wanted: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !wanted(&self.shared.state()) {
            assert!(Instant::now() < deadline, "{:?}", self.shared.state());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl Server {
    /// Hangs, refuses, or lets the call pass.
    async fn enter(&self) -> Result<(), Status> {
        loop {
            let notified = self.shared.changed.notified();
            {
                let mut state = self.shared.state();
                if !state.hung.contains(&self.index) {
                    *state.calls.entry(self.index).or_default() += 1;
                    if state.leader == self.index {
                        return Ok(());
                    }
                    let leader = state.addresses[state.leader].clone();
                    let metadata = HashMap::from([("leader".to_owned(), leader)]);
                    return Err(error(Code::Unavailable, "NOT_LEADER", metadata));
                }
            }
            notified.await;
        }
    }

    /// Hangs, or lets a call pass that any server can serve.
    async fn enter_anywhere(&self) {
        loop {
            let notified = self.shared.changed.notified();
            if !self.shared.state().hung.contains(&self.index) {
                return;
            }
            notified.await;
        }
    }

    fn leave<T>(&self, answer: T) -> Result<Response<T>, Status> {
        self.shared.changed.notify_waiters();
        match self.shared.state().fault.take() {
            Some(Fault::LoseAnswer) => Err(Status::unavailable("connection reset")),
            None => Ok(Response::new(answer)),
        }
    }

    fn header(&self) -> Option<v1::ResponseHeader> {
        let state = self.shared.state();
        Some(v1::ResponseHeader {
            cluster_id: 1,
            member_id: self.index as u64 + 1,
            revision: state.last,
            term: 1,
            leader_id: state.leader as u64 + 1,
        })
    }

    /// Tries until there is a grant, for as long as the request waits.
    async fn granted(
        &self,
        wait_ms: Option<u64>,
        mut attempt: impl FnMut(&mut State) -> Result<Option<u64>, Status>,
    ) -> Result<u64, Status> {
        let wait = Duration::from_millis(wait_ms.unwrap_or(3_600_000));
        let deadline = Instant::now() + wait;
        loop {
            let notified = self.shared.changed.notified();
            let granted = attempt(&mut self.shared.state())?;
            if let Some(token) = granted {
                return Ok(token);
            }
            if timeout_at(deadline, notified).await.is_err() {
                return Err(refusal("WAIT_TIMED_OUT"));
            }
        }
    }
}

/// Who has what a request wants.
enum Found {
    Nobody,
    /// The same request, by this token.
    Itself(u64),
    /// Another one, for which it waits.
    Another,
}

impl State {
    /// What a request of a session, by its number, finds there.
    fn find(
        &self,
        holder: Option<&Holder>,
        asking: (i64, u64),
        wait_ms: Option<u64>,
    ) -> Result<Found, Status> {
        if !self.sessions.contains_key(&asking.0) {
            return Err(refusal("SESSION_EXPIRED"));
        }
        if self.cancelled.contains(&asking) {
            return Err(refusal("CANCELLED"));
        }
        match holder {
            None => Ok(Found::Nobody),
            Some(holder) if (holder.session, holder.request) == asking => {
                Ok(Found::Itself(holder.token))
            }
            Some(_) if wait_ms == Some(0) => Err(refusal("LOCK_HELD")),
            Some(_) => Ok(Found::Another),
        }
    }
}

/// The grant, or `None` if the request must wait.
fn try_acquire(state: &mut State, request: &v1::AcquireRequest) -> Result<Option<u64>, Status> {
    let number = number(request.number.as_ref());
    let holder = state.holders.get(&request.name);
    match state.find(holder, (request.session_id, number), request.wait_ms)? {
        Found::Itself(token) => return Ok(Some(token)),
        Found::Another => return Ok(None),
        Found::Nobody => {}
    }
    state.last += 1;
    state.grants += 1;
    let holder = Holder {
        session: request.session_id,
        owner: request.owner.clone(),
        request: number,
        token: state.last,
    };
    state.holders.insert(request.name.clone(), holder);
    Ok(Some(state.last))
}

/// The client numbers everything.
fn number(number: Option<&v1::RequestNumber>) -> u64 {
    let number = number.map_or(0, |number| number.request);
    assert!(number > 0, "a request without a number");
    number
}

fn key(name: &str, session: i64) -> Bytes {
    format!("{name}/{session:x}").into()
}

fn error(code: Code, reason: &str, metadata: HashMap<String, String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, "conclave.dev", metadata);
    Status::with_error_details(code, reason.to_lowercase(), details)
}

fn refusal(reason: &str) -> Status {
    error(Code::FailedPrecondition, reason, HashMap::new())
}

#[tonic::async_trait]
impl session_server::Session for Server {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::SessionEvent, Status>> + Send>>;

    async fn open(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        self.enter().await?;
        let session_id = {
            let mut state = self.shared.state();
            let id = 0x1000 + state.sessions.len() as i64;
            state.sessions.insert(id, None);
            id
        };
        let ttl_ms = request.into_inner().ttl_ms;
        self.leave(v1::OpenSessionResponse {
            header: self.header(),
            session_id,
            ttl_ms,
        })
    }

    async fn renew(
        &self,
        _request: Request<v1::RenewSessionRequest>,
    ) -> Result<Response<v1::RenewSessionResponse>, Status> {
        self.enter().await?;
        Ok(Response::new(v1::RenewSessionResponse {
            header: self.header(),
            ttl_ms: 0,
        }))
    }

    async fn attach(
        &self,
        _request: Request<v1::AttachSessionRequest>,
    ) -> Result<Response<v1::AttachSessionResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn close(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        self.enter().await?;
        let id = request.into_inner().session_id;
        {
            let mut state = self.shared.state();
            state.sessions.remove(&id);
            state.holders.retain(|_, holder| holder.session != id);
            state.elections.end(id);
        }
        self.leave(v1::CloseSessionResponse {
            header: self.header(),
        })
    }

    async fn list(
        &self,
        _request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn watch(
        &self,
        request: Request<Streaming<v1::WatchSessionsRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut sessions = request.into_inner();
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move {
            while let Ok(Some(request)) = sessions.message().await {
                let mut state = shared.state();
                if let Some(watcher) = state.sessions.get_mut(&request.session_id) {
                    *watcher = Some(sender.clone());
                }
            }
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            receiver,
        ))))
    }
}

#[tonic::async_trait]
impl lock_server::Lock for Server {
    async fn acquire(
        &self,
        request: Request<v1::AcquireRequest>,
    ) -> Result<Response<v1::AcquireResponse>, Status> {
        self.enter().await?;
        let request = request.into_inner();
        let attempt = |state: &mut State| try_acquire(state, &request);
        let token = self.granted(request.wait_ms, attempt).await?;
        self.leave(v1::AcquireResponse {
            header: self.header(),
            key: key(&request.name, request.session_id),
            token,
        })
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.enter().await?;
        let request = request.into_inner();
        let once = (request.session_id, number(request.number.as_ref()));
        {
            let mut state = self.shared.state();
            match state.holders.get(&request.name) {
                _ if state.released.contains(&once) => {}
                Some(holder) if holder.token == request.token => {
                    assert_eq!(holder.owner, request.owner);
                    state.holders.remove(&request.name);
                    state.released.insert(once);
                }
                _ => return Err(refusal("NOT_HOLDER")),
            }
        }
        self.leave(v1::ReleaseResponse {
            header: self.header(),
        })
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        self.enter().await?;
        let request = request.into_inner();
        let withdrawn = (request.session_id, request.request);
        {
            let mut state = self.shared.state();
            state.cancelled.insert(withdrawn);
            state
                .holders
                .retain(|_, holder| (holder.session, holder.request) != withdrawn);
            let revision = state.last;
            state.elections.withdraw(revision, withdrawn.0, withdrawn.1);
        }
        self.leave(v1::CancelResponse {
            header: self.header(),
        })
    }

    async fn force_release(
        &self,
        request: Request<v1::ForceReleaseRequest>,
    ) -> Result<Response<v1::ForceReleaseResponse>, Status> {
        self.enter().await?;
        let request = request.into_inner();
        {
            let mut state = self.shared.state();
            let Some(holder) = state.holders.remove(&request.name) else {
                return Err(refusal("NOT_HELD"));
            };
            let grant = v1::Grant {
                token: holder.token,
                ..v1::Grant::default()
            };
            let lost = v1::GrantLost {
                grant: Some(grant),
                reason: v1::LossReason::Forced.into(),
                detail: request.reason,
            };
            let event = v1::SessionEvent {
                session_id: holder.session,
                revision: state.last,
                event: Some(Event::GrantLost(lost)),
            };
            if let Some(Some(watcher)) = state.sessions.get(&holder.session) {
                watcher.send(Ok(event)).unwrap();
            }
        }
        let released = Some(v1::Contender::default());
        self.leave(v1::ForceReleaseResponse {
            header: self.header(),
            released,
        })
    }

    async fn list(
        &self,
        _request: Request<v1::ListLocksRequest>,
    ) -> Result<Response<v1::ListLocksResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn check(
        &self,
        _request: Request<v1::CheckRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }
}

#[tonic::async_trait]
impl channel_server::Channel for Server {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<v1::ServerFrame, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<v1::ClientFrame>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut frames = request.into_inner();
        let server = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(frame)) = frames.message().await {
                for call in frame.calls {
                    let (server, sender) = (server.clone(), sender.clone());
                    tokio::spawn(async move { sender.send(server.answer(call).await) });
                }
            }
        });
        Ok(Response::new(Box::pin(UnboundedReceiverStream::new(
            receiver,
        ))))
    }
}

impl Server {
    /// An error without a reason ends the whole stream, as the loss of a connection
    /// would.
    async fn answer(&self, call: v1::Call) -> Result<v1::ServerFrame, Status> {
        macro_rules! answer {
            ($method:ident, $request:ident, $outcome:ident) => {
                self.$method(Request::new($request))
                    .await
                    .map(|response| Outcome::$outcome(response.into_inner()))
            };
        }
        let result = match call.request.unwrap() {
            Body::OpenSession(request) => answer!(open, request, OpenSession),
            Body::RenewSession(request) => answer!(renew, request, RenewSession),
            Body::CloseSession(request) => answer!(close, request, CloseSession),
            Body::AcquireLock(request) => answer!(acquire, request, AcquireLock),
            Body::ReleaseLock(request) => answer!(release, request, ReleaseLock),
            Body::CancelLock(request) => lock_server::Lock::cancel(self, Request::new(request))
                .await
                .map(|response| Outcome::CancelLock(response.into_inner())),
            Body::Campaign(request) => answer!(campaign, request, Campaign),
            Body::Proclaim(request) => answer!(proclaim, request, Proclaim),
            Body::Resign(request) => answer!(resign, request, Resign),
        };
        let outcome = match result {
            Err(status) if status.get_details_error_info().is_none() => return Err(status),
            Err(status) => Outcome::Error(v1::CallError {
                code: status.code() as u32,
                message: status.message().to_owned(),
                details: status.details().to_vec().into(),
            }),
            Ok(outcome) => outcome,
        };
        let reply = v1::Reply {
            tag: call.tag,
            outcome: Some(outcome),
        };
        Ok(v1::ServerFrame {
            replies: vec![reply],
        })
    }
}

#[tonic::async_trait]
impl cluster_server::Cluster for Server {
    async fn status(
        &self,
        _request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let header = self.header();
        let state = self.shared.state();
        let member = |(index, address): (usize, &String)| v1::Member {
            id: index as u64 + 1,
            client_urls: vec![format!("http://{address}")],
            ..v1::Member::default()
        };
        let members = state.addresses.iter().enumerate().map(member).collect();
        Ok(Response::new(v1::StatusResponse {
            header,
            members,
            ..v1::StatusResponse::default()
        }))
    }

    async fn compact(
        &self,
        _request: Request<v1::CompactRequest>,
    ) -> Result<Response<v1::CompactResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }

    async fn disarm(
        &self,
        _request: Request<v1::DisarmRequest>,
    ) -> Result<Response<v1::DisarmResponse>, Status> {
        Err(Status::unimplemented("not needed"))
    }
}
