//! The client: connections to one cluster, the calls that need no session, and
//! the way to open one.

use std::{sync::Arc, time::Duration};

use conclave_proto::v1::{
    self, Contender, ElectionInfo, Leader, LockInfo, SessionInfo, StatusResponse,
    cluster_client::ClusterClient, election_client::ElectionClient, lock_client::LockClient,
    session_client::SessionClient,
};
use tokio::{task::JoinSet, time::timeout};

use crate::{
    credentials::Credentials,
    error::{Error, Failure},
    events::Events,
    kv::Kv,
    lease::{Lease, Leases},
    observe::Observer,
    resume::{Resumed, resume},
    session::{Session, SessionOptions},
    transport::{ANSWER_BYTES_MAX, ATTEMPT_TIMEOUT, Transport},
    watch::{Watch, Watching},
};

/// How long calls outside a session are repeated before they fail: longer than
/// the election of a new leader takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// Lists may take longer than other calls.
const LIST_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of one cluster. Cheap to clone; clones share their connections.
///
/// ```no_run
/// # async fn example() -> Result<(), conclave_client::Error> {
/// use conclave_client::{Client, SessionOptions};
///
/// let client = Client::connect(["10.0.0.1:2379", "10.0.0.2:2379", "10.0.0.3:2379"])?;
/// let session = client.session(SessionOptions::default()).await?;
/// let guard = session.lock("nightly-report").await?;
/// println!("fencing token {}", guard.token());
/// guard.release().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    pub(crate) transport: Arc<Transport>,
    pub(crate) events: Arc<Events>,
}

/// What one server says about itself and the cluster.
#[derive(Clone, Debug)]
pub struct ServerStatus {
    /// The address that was asked, as `host:port`.
    pub endpoint: String,
    /// Its answer.
    pub status: Result<StatusResponse, Error>,
}

impl Client {
    /// A client of the cluster whose servers are at these addresses
    /// (`host:port`, `http://` optional, port 2379 unless given). One is
    /// enough; with several the client survives the loss of some. Nothing is
    /// sent yet.
    ///
    /// # Errors
    /// [`Error::InvalidEndpoint`], also if there is none.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn connect<S: AsRef<str>>(endpoints: impl IntoIterator<Item = S>) -> Result<Client, Error> {
        let transport = Arc::new(Transport::new(endpoints)?);
        Ok(Client {
            transport,
            events: Arc::default(),
        })
    }

    /// Opens a session, which renews itself until it is closed or dropped.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for options out of range, and what
    /// [`Error::is_retryable`] tells apart.
    pub async fn session(&self, options: SessionOptions) -> Result<Session, Error> {
        Session::open(self, options).await
    }

    /// Goes on with a session that an earlier start of this program opened, by its
    /// [`Session::credentials`], within the TTL after that ended. What the session
    /// holds comes as guards. Of what it waits for, `keep` is asked with the lock and
    /// the owner; the rest is cancelled. If several requests of one lock and owner
    /// share a grant, there is a guard for each.
    ///
    /// The earlier start must be gone: whatever it still sends is refused from then
    /// on, but it may believe in its locks until it hears of this, for as long as its
    /// own [`Session::remaining`] says, and tokens cannot tell the two apart.
    ///
    /// # Errors
    /// [`Error::SessionLost`] if the session is over, or another start of the program
    /// attached to it meanwhile.
    pub async fn resume(
        &self,
        credentials: &Credentials,
        keep: impl FnMut(&str, &str) -> bool,
    ) -> Result<Resumed, Error> {
        resume(self, credentials, keep).await
    }

    /// Reads, writes and transactions of keys.
    pub fn kv(&self) -> Kv {
        Kv::new(Arc::clone(&self.transport))
    }

    /// Follows the changes of keys; done once it is live.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if no server begins it in five seconds, and what a
    /// server refuses. A revision that is compacted is told by [`Watching::next`].
    pub async fn watch(&self, watch: Watch) -> Result<Watching, Error> {
        Watching::open(Arc::clone(&self.transport), watch).await
    }

    /// Grants a lease that is kept alive in the background: [`Leases::grant`] with an
    /// id that the cluster chooses, and [`Leases::keep`].
    ///
    /// # Errors
    /// [`Error::OutcomeUnknown`] if nobody answered; such a lease expires unused.
    pub async fn lease(&self, ttl: Duration) -> Result<Lease, Error> {
        Lease::open(Arc::clone(&self.transport), ttl).await
    }

    /// What can be done with leases by their ids.
    pub fn leases(&self) -> Leases {
        Leases::new(Arc::clone(&self.transport))
    }

    /// Looks for the leader, so that the next call goes there. Whether it was
    /// found. Calls find it by themselves sooner or later; benchmarks do not
    /// want to wait.
    pub async fn find_leader(&self) -> bool {
        self.transport.find_leader().await
    }

    /// All locks that are held, in order of name, with holders and waiters.
    /// Linearizable for up to 1,000 locks; more come in several reads.
    pub async fn locks(&self) -> Result<Vec<LockInfo>, Error> {
        let mut locks: Vec<LockInfo> = Vec::new();
        loop {
            let after = locks
                .last()
                .map(|lock| lock.name.clone())
                .unwrap_or_default();
            let page = self.list_locks(String::new(), after).await?;
            let is_empty = page.locks.is_empty();
            locks.extend(page.locks);
            if !page.more || is_empty {
                return Ok(locks);
            }
        }
    }

    /// One lock with holder and waiters; `None` if nobody holds it and no
    /// lock-delay runs. Linearizable.
    pub async fn lock_info(&self, name: &str) -> Result<Option<LockInfo>, Error> {
        let page = self.list_locks(name.to_owned(), String::new()).await?;
        Ok(page.locks.into_iter().find(|lock| lock.holder.is_some()))
    }

    /// Who leads an election, if anybody does. Linearizable.
    pub async fn leader(&self, name: &str) -> Result<Option<Leader>, Error> {
        let name = name.to_owned();
        let call = |channel| {
            let request = v1::LeaderRequest { name: name.clone() };
            async move { ElectionClient::new(channel).leader(request).await }
        };
        let answer = self.transport.read(PATIENCE, ATTEMPT_TIMEOUT, call).await?;
        Ok(answer.leader)
    }

    /// Follows the election with this name: who leads, and what it proclaims. Nothing is
    /// sent before [`Observer::next`].
    pub fn observe(&self, name: impl Into<String>) -> Observer {
        Observer::new(&self.transport, name.into())
    }

    /// All elections that have candidates of this API, in order of name, with leaders
    /// and candidates. Each answer of a server is linearizable; many elections come in
    /// several.
    pub async fn elections(&self) -> Result<Vec<ElectionInfo>, Error> {
        let mut elections: Vec<ElectionInfo> = Vec::new();
        loop {
            let after = elections
                .last()
                .map(|election| election.name.clone())
                .unwrap_or_default();
            let page = self.list_elections(String::new(), after).await?;
            let is_empty = page.elections.is_empty();
            elections.extend(page.elections);
            if !page.more || is_empty {
                return Ok(elections);
            }
        }
    }

    /// One election with leader and candidates, whoever they are; `None` if there are
    /// none. Linearizable.
    pub async fn election_info(&self, name: &str) -> Result<Option<ElectionInfo>, Error> {
        let page = self.list_elections(name.to_owned(), String::new()).await?;
        Ok(page.elections.into_iter().next())
    }

    /// Takes a lock from its holder, or leadership from its leader, who is told the
    /// reason. With a token, only that grant; then the call may safely be repeated. If the
    /// holder asked for a lock-delay, it begins now.
    ///
    /// # Errors
    /// [`Error::NotHeld`], [`Error::NotHolder`] if another grant holds now, and
    /// [`Error::OutcomeUnknown`] if there was no token and no answer.
    pub async fn force_release(
        &self,
        name: &str,
        reason: &str,
        token: Option<u64>,
    ) -> Result<Contender, Error> {
        self.take(name, reason, token, false).await
    }

    /// As [`Client::force_release`], but the lock is free at once: no lock-delay
    /// follows, and one that runs already ends.
    ///
    /// # Errors
    /// As [`Client::force_release`].
    pub async fn force_release_at_once(
        &self,
        name: &str,
        reason: &str,
        token: Option<u64>,
    ) -> Result<Contender, Error> {
        self.take(name, reason, token, true).await
    }

    async fn take(
        &self,
        name: &str,
        reason: &str,
        token: Option<u64>,
        skip_delay: bool,
    ) -> Result<Contender, Error> {
        let request = v1::ForceReleaseRequest {
            name: name.to_owned(),
            reason: reason.to_owned(),
            token: token.unwrap_or(0),
            skip_delay,
        };
        let call = |channel| {
            let request = request.clone();
            async move { LockClient::new(channel).force_release(request).await }
        };
        let answer = if token.is_some() {
            self.transport
                .repeat(PATIENCE, ATTEMPT_TIMEOUT, call)
                .await?
        } else {
            self.transport.once(PATIENCE, call).await?
        };
        answer.released.ok_or_else(|| incomplete("released"))
    }

    /// Whether the grant with this token still holds the lock. Linearizable.
    pub async fn check(&self, name: &str, token: u64) -> Result<bool, Error> {
        let request = v1::CheckRequest {
            name: name.to_owned(),
            token,
        };
        let call = |channel| {
            let request = request.clone();
            async move { LockClient::new(channel).check(request).await }
        };
        let answer = self.transport.read(PATIENCE, ATTEMPT_TIMEOUT, call).await?;
        Ok(answer.held)
    }

    /// All live sessions, in order of id. Linearizable for up to 1,000; more come in
    /// several reads.
    pub async fn sessions(&self) -> Result<Vec<SessionInfo>, Error> {
        let mut sessions: Vec<SessionInfo> = Vec::new();
        loop {
            let request = v1::ListSessionsRequest {
                limit: 0,
                after: sessions.last().map_or(0, |session| session.session_id),
            };
            let call = |channel| async move {
                let mut client =
                    SessionClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
                client.list(request).await
            };
            let page = self.transport.read(PATIENCE, LIST_TIMEOUT, call).await?;
            let is_empty = page.sessions.is_empty();
            sessions.extend(page.sessions);
            if !page.more || is_empty {
                return Ok(sessions);
            }
        }
    }

    /// Gives up the history below a revision: reads of it are refused from then on.
    /// What is there now stays. Does nothing if that is given up already.
    ///
    /// # Errors
    /// [`Error::Server`] with the reason `REVISION_FUTURE` for one that was not
    /// reached yet.
    pub async fn compact(&self, revision: u64) -> Result<(), Error> {
        let call = |channel| async move {
            let request = v1::CompactRequest { revision };
            ClusterClient::new(channel).compact(request).await
        };
        let compacted = self.transport.repeat(PATIENCE, ATTEMPT_TIMEOUT, call).await;
        match compacted {
            Err(Error::Server { reason, .. }) if reason == "REVISION_COMPACTED" => Ok(()),
            compacted => compacted.map(drop),
        }
    }

    /// Clears all alarms. One whose cause lasts is raised again at once.
    pub async fn disarm(&self) -> Result<(), Error> {
        let call = |channel| async move {
            let request = v1::DisarmRequest {};
            ClusterClient::new(channel).disarm(request).await
        };
        let disarmed = self.transport.repeat(PATIENCE, ATTEMPT_TIMEOUT, call).await;
        disarmed.map(drop)
    }

    /// What each known server says about itself. Each is asked once, all at
    /// the same time.
    pub async fn status(&self) -> Vec<ServerStatus> {
        let servers = self.transport.all();
        let mut endpoints: Vec<ServerStatus> = Vec::new();
        let mut asked = JoinSet::new();
        for (position, (endpoint, channel)) in servers.into_iter().enumerate() {
            let silent = Error::Unreachable {
                message: "no answer".to_owned(),
            };
            endpoints.push(ServerStatus {
                endpoint,
                status: Err(silent),
            });
            asked.spawn(async move {
                let mut cluster = ClusterClient::new(channel);
                let call = cluster.status(v1::StatusRequest {});
                (position, timeout(ATTEMPT_TIMEOUT, call).await)
            });
        }
        while let Some(Ok((position, answer))) = asked.join_next().await {
            if let Ok(result) = answer {
                let result = result.map(tonic::Response::into_inner);
                endpoints[position].status =
                    result.map_err(|status| Failure::from(status).into_error(false));
            }
        }
        endpoints
    }

    async fn list_elections(
        &self,
        name: String,
        after: String,
    ) -> Result<v1::ListElectionsResponse, Error> {
        let request = v1::ListElectionsRequest {
            name,
            limit: 0,
            after,
        };
        let call = |channel| {
            let request = request.clone();
            async move {
                let mut client =
                    ElectionClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
                client.list(request).await
            }
        };
        self.transport.read(PATIENCE, LIST_TIMEOUT, call).await
    }

    async fn list_locks(
        &self,
        name: String,
        after: String,
    ) -> Result<v1::ListLocksResponse, Error> {
        let request = v1::ListLocksRequest {
            name,
            limit: 0,
            after,
        };
        let call = |channel| {
            let request = request.clone();
            async move {
                let mut client =
                    LockClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
                client.list(request).await
            }
        };
        self.transport.read(PATIENCE, LIST_TIMEOUT, call).await
    }
}

/// An answer lacks a field that every server fills.
pub(crate) fn incomplete(field: &str) -> Error {
    Error::Server {
        reason: "INCOMPLETE_ANSWER".to_owned(),
        message: format!("the answer lacks `{field}`"),
    }
}
