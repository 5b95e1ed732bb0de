//! Connections to the servers, and calls over them: one attempt, or attempts
//! until there is an answer. Connections are made when first used and remade
//! by tonic; which of them to use is decided by [`Routes`].

use std::{
    mem,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use conclave_proto::{
    etcd::etcdserverpb,
    v1::{self, cluster_client::ClusterClient},
};
use tokio::{
    runtime::Handle,
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    calls::{Call, Calls},
    clock,
    error::{Error, Failure},
    routes::{Routes, normalize},
};

/// A server that has not answered an ordinary call for this long is taken for
/// dead, and another is asked.
pub(crate) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);
/// The same for reads of keys and for leases, of which some take longer.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Finds connections that died silently under a waiting call.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Lists can be long.
pub(crate) const ANSWER_BYTES_MAX: usize = 256 << 20;
/// How long a search for the leader is not repeated.
const SEARCH_PAUSE: Duration = Duration::from_secs(1);

/// Attempts in a row that may follow each other without a pause, each at
/// another server.
const IMMEDIATE_MAX: u32 = 2;
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// While a new leader may be elected, pauses stay short: the first attempt
/// after the election ends the outage for this client.
const PAUSE_EARLY_MAX: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_millis(500);
const EARLY_PAUSES: u32 = 60;

/// The servers of one client. Shared by all that it has open.
#[derive(Debug)]
pub(crate) struct Transport {
    servers: Mutex<Servers>,
    /// The server to use now, for those who wait until it is another.
    current: watch::Sender<usize>,
    runtime: Handle,
}

#[derive(Debug)]
struct Servers {
    routes: Routes,
    /// One for each address of `routes`, in the same order.
    lines: Vec<Server>,
    searched: Option<Instant>,
}

/// The ways to one server.
#[derive(Clone, Debug)]
struct Server {
    /// For calls of their own.
    channel: Channel,
    /// For those of sessions, over the same connection.
    calls: Arc<Calls>,
}

/// An attempt that failed.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) failure: Failure,
    /// The next attempt will go to another server.
    pub(crate) moved: bool,
}

/// Answers that say something about the cluster.
pub(crate) trait Answer {
    fn sender(&self) -> Option<Sender>;
}

/// Who answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sender {
    member: u64,
    /// Whom it takes for the leader; 0: it does not say, or does not know.
    leader: u64,
}

impl From<&v1::ResponseHeader> for Sender {
    fn from(header: &v1::ResponseHeader) -> Sender {
        Sender {
            member: header.member_id,
            leader: header.leader_id,
        }
    }
}

impl From<&etcdserverpb::ResponseHeader> for Sender {
    fn from(header: &etcdserverpb::ResponseHeader) -> Sender {
        Sender {
            member: header.member_id,
            leader: 0,
        }
    }
}

macro_rules! answers {
    ($package:ident: $($answer:ident),*) => {
        $(impl Answer for $package::$answer {
            fn sender(&self) -> Option<Sender> {
                self.header.as_ref().map(Sender::from)
            }
        })*
    };
}

answers!(
    v1: OpenSessionResponse,
    AttachSessionResponse,
    RenewSessionResponse,
    CloseSessionResponse,
    ListSessionsResponse,
    AcquireResponse,
    ReleaseResponse,
    CancelResponse,
    ForceReleaseResponse,
    ListLocksResponse,
    CheckResponse,
    CampaignResponse,
    ProclaimResponse,
    ResignResponse,
    LeaderResponse,
    ListElectionsResponse,
    CompactResponse,
    DisarmResponse,
    StatusResponse
);

answers!(
    etcdserverpb: RangeResponse,
    PutResponse,
    DeleteRangeResponse,
    TxnResponse,
    CompactionResponse,
    LeaseGrantResponse,
    LeaseRevokeResponse,
    LeaseKeepAliveResponse,
    LeaseTimeToLiveResponse,
    LeaseLeasesResponse,
    WatchResponse
);

impl Transport {
    /// Connections to these addresses; nothing is sent yet. Needs a running
    /// tokio runtime.
    pub(crate) fn new<S: AsRef<str>>(
        endpoints: impl IntoIterator<Item = S>,
    ) -> Result<Transport, Error> {
        let addresses: Vec<String> = endpoints
            .into_iter()
            .map(|endpoint| normalize(endpoint.as_ref()))
            .collect::<Result<_, _>>()?;
        if addresses.is_empty() {
            return Err(Error::InvalidEndpoint {
                endpoint: String::new(),
                problem: "at least one is needed",
            });
        }
        let routes = Routes::new(addresses);
        let mut servers = Servers {
            routes,
            lines: Vec::new(),
            searched: None,
        };
        let runtime = Handle::current();
        servers.connect_new(&runtime);
        Ok(Transport {
            current: watch::Sender::new(servers.routes.current()),
            servers: Mutex::new(servers),
            runtime,
        })
    }

    /// Where background work of this client runs.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The server to use now.
    pub(crate) fn server(&self) -> (usize, Channel) {
        let servers = self.servers();
        let index = servers.routes.current();
        (index, servers.lines[index].channel.clone())
    }

    /// The server to use now, for calls of sessions.
    pub(crate) fn calls(&self) -> (usize, Arc<Calls>) {
        let servers = self.servers();
        let index = servers.routes.current();
        (index, Arc::clone(&servers.lines[index].calls))
    }

    /// Whether this is still the server to use.
    pub(crate) fn is_current(&self, index: usize) -> bool {
        self.servers().routes.current() == index
    }

    /// Resolves when this is not the server to use.
    pub(crate) async fn left(&self, index: usize) {
        let mut current = self.current.subscribe();
        let left = current.wait_for(|current| *current != index).await;
        left.expect("its sender is in `self`");
    }

    /// Every known server with its address.
    pub(crate) fn all(&self) -> Vec<(String, Channel)> {
        let servers = self.servers();
        let addresses = servers.routes.addresses().map(str::to_owned);
        let channels = servers.lines.iter().map(|server| server.channel.clone());
        addresses.zip(channels).collect()
    }

    /// One attempt of a session's call at the current server, for at most `limit`.
    pub(crate) async fn call<C: Call<Answer: Answer>>(
        self: &Arc<Self>,
        limit: Duration,
        request: C,
    ) -> Result<C::Answer, Failed> {
        let (index, calls) = self.calls();
        self.settle(index, answer_within(limit, calls.call(request)).await)
    }

    /// Attempts a session's call until there is an answer, or `patience` is over.
    /// For calls that may safely be repeated. The request is made anew for each
    /// attempt.
    pub(crate) async fn repeat_call<C: Call<Answer: Answer>>(
        self: &Arc<Self>,
        patience: Duration,
        mut request: impl FnMut() -> C,
    ) -> Result<C::Answer, Error> {
        self.until_answered(patience, || self.call(ATTEMPT_TIMEOUT, request()))
            .await
    }

    /// One attempt at the current server, for at most `limit`.
    pub(crate) async fn attempt<T: Answer, F>(
        self: &Arc<Self>,
        limit: Duration,
        call: impl FnOnce(Channel) -> F,
    ) -> Result<T, Failed>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let (index, channel) = self.server();
        let result = answer_within(limit, call(channel)).await;
        self.settle(index, result.map(Response::into_inner))
    }

    /// As [`Transport::repeat`], for calls that change nothing: no attempt had an effect.
    pub(crate) async fn read<T: Answer, F>(
        self: &Arc<Self>,
        patience: Duration,
        limit: Duration,
        call: impl Fn(Channel) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let read = self.repeat(patience, limit, call).await;
        read.map_err(|error| match error {
            Error::OutcomeUnknown { message } => self.unreachable(message),
            error => error,
        })
    }

    /// As [`Transport::repeat`], for what is refused once it is done: if the answer of an
    /// attempt was lost, such a refusal means that it was done.
    pub(crate) async fn complete<T: Answer, F>(
        self: &Arc<Self>,
        patience: Duration,
        limit: Duration,
        is_done: impl Fn(&Error) -> bool,
        call: impl Fn(Channel) -> F,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let may_be_done = AtomicBool::new(false);
        let attempt = || async {
            let attempted = self.attempt(limit, &call).await;
            if let Err(failed) = &attempted
                && matches!(failed.failure, Failure::Unknown { .. })
            {
                may_be_done.store(true, Ordering::Relaxed);
            }
            attempted
        };
        match self.until_answered(patience, attempt).await {
            Err(error) if may_be_done.load(Ordering::Relaxed) && is_done(&error) => Ok(()),
            completed => completed.map(drop),
        }
    }

    /// Attempts until there is an answer, or `patience` is over. For calls
    /// that may safely be repeated.
    pub(crate) async fn repeat<T: Answer, F>(
        self: &Arc<Self>,
        patience: Duration,
        limit: Duration,
        call: impl Fn(Channel) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.until_answered(patience, || self.attempt(limit, &call))
            .await
    }

    /// Attempts until one may have had an effect, or `patience` is over. For calls
    /// that must not be done twice.
    pub(crate) async fn once<T: Answer, F>(
        self: &Arc<Self>,
        patience: Duration,
        call: impl Fn(Channel) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let give_up = Instant::now() + patience;
        let mut backoff = Backoff::default();
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let failed = match self.attempt(left.max(ATTEMPT_TIMEOUT), &call).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            let is_final = matches!(
                failed.failure,
                Failure::Refused(_) | Failure::Unknown { .. }
            );
            if is_final || Instant::now() >= give_up {
                return Err(self.given_up(failed.failure, false));
            }
            backoff.pause(failed.moved).await;
        }
    }

    async fn until_answered<T, F>(
        &self,
        patience: Duration,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Failed>>,
    {
        let give_up = Instant::now() + patience;
        let mut backoff = Backoff::default();
        let mut may_have_applied = false;
        let mut is_first = true;
        loop {
            let failed = match attempt().await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            may_have_applied |= matches!(failed.failure, Failure::Unknown { .. });
            let is_final = matches!(failed.failure, Failure::Refused(_));
            // One server that hangs may take all the patience: another one is asked, too.
            let is_over = Instant::now() >= give_up && !(is_first && failed.moved);
            if is_final || is_over {
                return Err(self.given_up(failed.failure, may_have_applied));
            }
            is_first = false;
            backoff.pause(failed.moved).await;
        }
    }

    fn given_up(&self, last: Failure, may_have_applied: bool) -> Error {
        match last.into_error(may_have_applied) {
            Error::Unreachable { message } => self.unreachable(message),
            error => error,
        }
    }

    /// No server could be reached; `cause` is what became of the last attempt.
    pub(crate) fn unreachable(&self, cause: String) -> Error {
        let servers = self.servers();
        let tried: Vec<&str> = servers.routes.addresses().collect();
        let message = format!("{cause} (servers: {})", tried.join(", "));
        Error::Unreachable { message }
    }

    /// Draws the conclusions from what the server at `index` answered.
    pub(crate) fn settle<T: Answer>(
        self: &Arc<Self>,
        index: usize,
        result: Result<T, Status>,
    ) -> Result<T, Failed> {
        match result {
            Ok(answer) => {
                if let Some(sender) = answer.sender() {
                    self.note_sender(index, sender);
                }
                Ok(answer)
            }
            Err(status) => {
                let failure = Failure::from(status);
                let moved = self.note_failure(index, &failure);
                Err(Failed { failure, moved })
            }
        }
    }

    /// Asks servers for the leader until one knows it, and prefers it from now
    /// on. Whether it was found.
    pub(crate) async fn find_leader(self: &Arc<Self>) -> bool {
        for (index, (_, channel)) in self.all().into_iter().enumerate() {
            let mut cluster = ClusterClient::new(channel);
            let call = timeout(ATTEMPT_TIMEOUT, cluster.status(v1::StatusRequest {}));
            if let Ok(Ok(response)) = call.await
                && self.note_members(index, &response.into_inner())
            {
                return true;
            }
        }
        false
    }

    pub(crate) fn note_sender(self: &Arc<Self>, index: usize, sender: Sender) {
        let Sender { member, leader } = sender;
        self.change(|servers| {
            servers.routes.answered(index, member);
            if leader == member || leader == 0 || servers.routes.current() != index {
                return;
            }
            if servers.routes.prefer_member(leader, clock::now()).is_none() {
                servers.search(self);
            }
        });
    }

    /// Whether the leader was among the members and is preferred now.
    fn note_members(&self, index: usize, status: &v1::StatusResponse) -> bool {
        let Some(header) = status.header.as_ref() else {
            return false;
        };
        self.change(|servers| {
            servers.routes.answered(index, header.member_id);
            for member in &status.members {
                if member.id != header.member_id {
                    servers.routes.learn(member.id, &member.client_urls);
                }
            }
            servers.connect_new(&self.runtime);
            servers.routes.prefer_member(header.leader_id, clock::now()) == Some(true)
        })
    }

    /// Draws the conclusions from a failure of the server at `index`. Whether
    /// the next call goes to another.
    pub(crate) fn note_failure(&self, index: usize, failure: &Failure) -> bool {
        let now = clock::now();
        self.change(|servers| match failure {
            Failure::Refused(_) | Failure::Overloaded { .. } => false,
            Failure::NotApplied {
                leader: Some(leader),
                ..
            } => {
                let follows = servers.routes.prefer(leader, now);
                servers.connect_new(&self.runtime);
                let is_other = servers.routes.current() != index;
                (follows && is_other) || servers.routes.pass_over(index, now)
            }
            Failure::NotApplied {
                is_reached: true, ..
            }
            | Failure::Unknown {
                is_reached: true, ..
            } => servers.routes.pass_over(index, now),
            Failure::NotApplied { .. } | Failure::Unknown { .. } => {
                servers.routes.failed(index, now)
            }
        })
    }

    /// Changes what is known, and tells who waits for another server.
    fn change<T>(&self, change: impl FnOnce(&mut Servers) -> T) -> T {
        let mut servers = self.servers();
        let result = change(&mut servers);
        let newest = servers.routes.current();
        self.current.send_if_modified(|current| {
            let before = mem::replace(current, newest);
            before != newest
        });
        result
    }

    fn servers(&self) -> MutexGuard<'_, Servers> {
        self.servers
            .lock()
            .expect("no panic while the servers are locked")
    }
}

impl Servers {
    /// Makes connections for addresses that have none yet.
    fn connect_new(&mut self, runtime: &Handle) {
        let known = self.lines.len();
        let new = self.routes.addresses().skip(known).map(|address| {
            let channel = channel(address);
            let calls = Arc::new(Calls::new(channel.clone(), runtime.clone()));
            Server { channel, calls }
        });
        self.lines.extend(new);
    }

    /// Starts a search for the leader in the background, unless one has just
    /// been made.
    fn search(&mut self, transport: &Arc<Transport>) {
        let now = Instant::now();
        if self.searched.is_some_and(|at| now < at + SEARCH_PAUSE) {
            return;
        }
        self.searched = Some(now);
        let searching = Arc::clone(transport);
        transport
            .runtime
            .spawn(async move { searching.find_leader().await });
    }
}

/// What comes of a call within this time.
async fn answer_within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let result = timeout(limit, call).await;
    result.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")))
}

/// A connection to a normalized address, made when first used.
fn channel(address: &str) -> Channel {
    Endpoint::from_shared(format!("http://{address}"))
        .expect("a normalized address is a valid authority")
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .connect_lazy()
}

/// Pauses between attempts of one call.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    immediate: u32,
    pauses: u32,
}

impl Backoff {
    /// Waits before the next attempt; not at all if that goes to a server that
    /// has not been asked yet.
    pub(crate) async fn pause(&mut self, moved: bool) {
        if moved && self.immediate < IMMEDIATE_MAX {
            self.immediate += 1;
            return;
        }
        sleep(self.next_pause()).await;
    }

    fn next_pause(&mut self) -> Duration {
        let max = if self.pauses < EARLY_PAUSES {
            PAUSE_EARLY_MAX
        } else {
            PAUSE_MAX
        };
        let pause = PAUSE_MIN * 2_u32.pow(self.pauses.min(5));
        self.pauses += 1;
        pause.min(max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_short_while_a_leader_may_be_elected_and_then_grow() {
        let mut backoff = Backoff::default();
        let early: Vec<Duration> = (0..EARLY_PAUSES).map(|_| backoff.next_pause()).collect();
        assert_eq!(early[0], PAUSE_MIN);
        assert!(early.iter().all(|pause| *pause <= PAUSE_EARLY_MAX));
        assert_eq!(backoff.next_pause(), PAUSE_MAX);
    }
}
