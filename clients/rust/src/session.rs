//! A session: it renews itself in the background, knows how it stands, and is
//! closed when its last handle goes. The decisions are those of
//! [`crate::session_state`]; here they meet the clock and the network.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use conclave_proto::v1::{
    CloseSessionRequest, OpenSessionRequest, RenewSessionRequest, RequestNumber,
    WatchSessionsRequest,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    client::{Client, PATIENCE, incomplete},
    clock,
    contention::Contended,
    credentials::{Credentials, Secret},
    election::Campaign,
    error::{Error, Failure},
    events::Events,
    grants::Grants,
    lock::LockRequest,
    requests::Requests,
    session_state::{Attempt, LossReason, SessionState, Status},
    transport::{Failed, Transport},
};

/// How to open a session.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// How long the session outlives its client: 500 ms to 24 h. Short means
    /// that others get its locks soon after a crash, long that it survives
    /// long outages of network or cluster.
    pub ttl: Duration,
    /// What people see in lists; at most 256 bytes.
    pub name: String,
    /// For people and tools; at most 16 entries, 4 KiB in all.
    pub metadata: BTreeMap<String, String>,
}

/// A live session. Cheap to clone; it is closed when the last clone and the
/// last [`crate::LockGuard`] are gone, or by [`Session::close`].
///
/// ```no_run
/// # async fn example(client: conclave_client::Client) -> Result<(), conclave_client::Error> {
/// use conclave_client::{SessionOptions, Status};
///
/// let session = client.session(SessionOptions::default()).await?;
/// let mut changes = session.changes();
/// while changes.changed().await.is_ok() {
///     match &*changes.borrow() {
///         Status::Active => println!("all is well"),
///         Status::Suspect { left } => println!("no contact, {left:?} left"),
///         Status::Lost(reason) => println!("lost: {reason}"),
///     }
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Session {
    handle: Arc<Handle>,
}

/// Counts the handles: when the last goes, the session is closed.
#[derive(Debug)]
struct Handle {
    core: Arc<Core>,
}

/// What the handles, the guards and the background tasks of a session share.
pub(crate) struct Core {
    id: i64,
    ttl: Duration,
    attachment: u64,
    credentials: Credentials,
    transport: Arc<Transport>,
    events: Arc<Events>,
    life: Mutex<Life>,
    status: watch::Sender<Status>,
    /// Wakes those who wait for the loss of the session or of a grant.
    losses: Notify,
    /// Wakes those who wait until a lock is given up.
    departures: Notify,
    /// Wakes the task that renews.
    changed: Notify,
}

#[derive(Debug)]
struct Life {
    state: SessionState,
    requests: Requests,
    grants: Grants,
    /// What is given up in the background, and how often.
    leaving: BTreeMap<Contended, usize>,
}

impl Life {
    fn end_request(&mut self, request: u64) {
        self.requests.end(request);
        if self.requests.is_idle() {
            self.grants.no_answer_outstanding();
        }
    }
}

impl Default for SessionOptions {
    /// A TTL of 10 s, no name, no metadata.
    fn default() -> SessionOptions {
        SessionOptions {
            ttl: Duration::from_secs(10),
            name: String::new(),
            metadata: BTreeMap::new(),
        }
    }
}

impl Session {
    /// Opens a session, once: attempts are repeated with the same secret. If there
    /// is no answer until such a session may be over again, the next attempt opens
    /// another one; the first is never renewed and expires.
    pub(crate) async fn open(client: &Client, options: SessionOptions) -> Result<Session, Error> {
        let give_up = Instant::now() + PATIENCE;
        loop {
            let left = give_up.saturating_duration_since(Instant::now());
            let patience = left.min(options.ttl / 2);
            let opened = Session::open_with(client, &options, Secret::random(), patience).await;
            let is_done = match &opened {
                Ok(session) => session.core().lost_now().is_none(),
                Err(Error::SessionLost(_)) => false,
                Err(error) => !error.is_retryable(),
            };
            if is_done || Instant::now() >= give_up {
                return opened;
            }
        }
    }

    async fn open_with(
        client: &Client,
        options: &SessionOptions,
        secret: Secret,
        patience: Duration,
    ) -> Result<Session, Error> {
        let request = OpenSessionRequest {
            // Zero would mean the default; let the server refuse it instead.
            ttl_ms: u64::try_from(options.ttl.as_millis())
                .unwrap_or(u64::MAX)
                .max(1),
            name: options.name.clone(),
            metadata: options.metadata.clone().into_iter().collect(),
            secret: secret.to_bytes(),
        };
        // Of the first attempt, since that may be the one that opened it.
        let sent = clock::now();
        let opening = client
            .transport
            .repeat_call(patience, || request.clone())
            .await;
        let opened = opening?;
        if opened.session_id == 0 || opened.ttl_ms == 0 {
            return Err(incomplete("session_id"));
        }
        let credentials = Credentials {
            session_id: opened.session_id,
            secret,
        };
        let state = SessionState::opened(sent, opened.ttl_ms.saturating_mul(1_000));
        let ttl = Duration::from_millis(opened.ttl_ms);
        Ok(Session::start(
            client,
            credentials,
            ttl,
            state,
            Requests::default(),
        ))
    }

    /// Keeps a session alive from now on.
    pub(crate) fn start(
        client: &Client,
        credentials: Credentials,
        ttl: Duration,
        state: SessionState,
        requests: Requests,
    ) -> Session {
        let core = Arc::new(Core {
            id: credentials.session_id,
            ttl,
            attachment: requests.attachment(),
            credentials,
            transport: Arc::clone(&client.transport),
            events: Arc::clone(&client.events),
            life: Mutex::new(Life {
                state,
                requests,
                grants: Grants::default(),
                leaving: BTreeMap::new(),
            }),
            status: watch::Sender::new(Status::Active),
            losses: Notify::new(),
            departures: Notify::new(),
            changed: Notify::new(),
        });
        // In this order: the task removes a session that is lost already.
        core.events.add(&core.transport, &core);
        core.transport.runtime().spawn(Arc::clone(&core).live());
        Session {
            handle: Arc::new(Handle { core }),
        }
    }

    /// The id, which is also an etcd lease id. People see it in hexadecimal.
    pub fn id(&self) -> i64 {
        self.core().id
    }

    /// What another start of this program needs to go on with the session; see
    /// [`Client::resume`]. Who has them can act for the session.
    pub fn credentials(&self) -> Credentials {
        self.core().credentials.clone()
    }

    /// The TTL that the cluster granted.
    pub fn ttl(&self) -> Duration {
        self.core().ttl
    }

    /// How the session stands now.
    pub fn status(&self) -> Status {
        self.core().life().state.status(clock::now())
    }

    /// Time until the client gives the session up unless a renewal succeeds
    /// before; zero once it is lost. Reckoned with the clock at the call, so
    /// that it is right even after the program was stopped for a while.
    pub fn remaining(&self) -> Duration {
        self.core().life().state.remaining(clock::now())
    }

    /// Follows the changes of [`Session::status`]: active, suspect, lost.
    pub fn changes(&self) -> watch::Receiver<Status> {
        let changes = self.core().status.subscribe();
        // From now on the clock is looked at more often.
        self.core().changed.notify_one();
        changes
    }

    /// Resolves when the session is lost, with the reason.
    pub async fn lost(&self) -> LossReason {
        self.core().lost().await
    }

    /// A request for the lock with this name (1 to 1,024 bytes). Nothing is
    /// sent until it is awaited.
    pub fn lock(&self, name: impl Into<String>) -> LockRequest {
        LockRequest::new(self.clone(), name.into())
    }

    /// A campaign in the election with this name (1 to 1,024 bytes). Nothing is sent
    /// until it is awaited.
    pub fn campaign(&self, name: impl Into<String>) -> Campaign {
        Campaign::new(self.clone(), name.into())
    }

    /// Ends the session; everything bound to it is given up at once, and its
    /// guards are lost.
    ///
    /// # Errors
    /// If no server answers, the session is over for this client all the same,
    /// and ends in the cluster when its TTL has passed.
    pub async fn close(self) -> Result<(), Error> {
        let core = Arc::clone(self.core());
        core.ended(LossReason::SessionClosed);
        core.close().await
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.handle.core
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let core = Arc::clone(&self.core);
        if core.lost_now().is_some() {
            return;
        }
        core.ended(LossReason::SessionClosed);
        let runtime = core.transport.runtime().clone();
        runtime.spawn(async move {
            if let Err(error) = core.close().await {
                tracing::debug!(%error, session = core.id, "not closed, will expire");
            }
        });
    }
}

impl Core {
    pub(crate) fn id(&self) -> i64 {
        self.id
    }

    pub(crate) fn attachment(&self) -> u64 {
        self.attachment
    }

    /// Asks for the events of this session.
    pub(crate) fn watch_request(&self) -> WatchSessionsRequest {
        WatchSessionsRequest {
            session_id: self.id,
            attachment: self.attachment,
        }
    }

    pub(crate) fn transport(&self) -> &Arc<Transport> {
        &self.transport
    }

    /// Takes a request number, unless the session is lost.
    pub(crate) fn begin_request(&self) -> Result<u64, Error> {
        let mut life = self.life();
        match life.state.lost_at(clock::now()) {
            Some(reason) => Err(Error::SessionLost(reason)),
            None => Ok(life.requests.begin()),
        }
    }

    /// What is sent with a request.
    pub(crate) fn number(&self, request: u64) -> RequestNumber {
        self.life().requests.number(request)
    }

    /// The request is over, without a grant.
    pub(crate) fn end_request(&self, request: u64) {
        self.life().end_request(request);
    }

    /// The request is over: granted, as was answered at `revision`.
    pub(crate) fn granted(&self, request: u64, token: u64, revision: u64) {
        let mut life = self.life();
        life.grants.granted(token, revision);
        life.end_request(request);
    }

    /// A grant that was there before this attachment, as of this revision.
    pub(crate) fn adopted(&self, token: u64, revision: u64) {
        self.life().grants.granted(token, revision);
    }

    pub(crate) fn grant_released(&self, token: u64) {
        self.life().grants.released(token);
    }

    /// A guard or request of this lock was dropped and is being given up, until
    /// [`Core::has_left`].
    pub(crate) fn leaves(&self, lock: &Contended) {
        *self.life().leaving.entry(lock.clone()).or_default() += 1;
    }

    /// The cluster has answered, or the session is over.
    pub(crate) fn has_left(&self, lock: &Contended) {
        let mut life = self.life();
        if let Some(times) = life.leaving.get_mut(lock) {
            *times -= 1;
            if *times == 0 {
                life.leaving.remove(lock);
            }
        }
        drop(life);
        self.departures.notify_waiters();
    }

    /// Resolves when nothing of this lock is being given up: until then, a new
    /// request would find this session and owner in its own way.
    pub(crate) async fn left(&self, lock: &Contended) {
        loop {
            let notified = self.departures.notified();
            if !self.life().leaving.contains_key(lock) {
                return;
            }
            notified.await;
        }
    }

    pub(crate) fn grant_lost(&self, token: u64, reason: LossReason) {
        let mut life = self.life();
        life.grants.lost(token, reason);
        if life.requests.is_idle() {
            life.grants.no_answer_outstanding();
        }
        drop(life);
        self.losses.notify_waiters();
    }

    pub(crate) fn attached(&self, revision: u64, tokens: BTreeSet<u64>) {
        self.life().grants.attached(revision, tokens);
        self.losses.notify_waiters();
    }

    /// The session is over, for this reason unless there was one before.
    pub(crate) fn ended(&self, reason: LossReason) {
        self.life().state.ended(clock::now(), reason);
        self.publish();
        self.changed.notify_one();
    }

    /// Notes what an error says about the session, and hands it on.
    pub(crate) fn heard(&self, error: Error) -> Error {
        if let Error::SessionLost(reason) = &error {
            self.ended(reason.clone());
        }
        error
    }

    /// Resolves when the session is lost.
    pub(crate) async fn lost(&self) -> LossReason {
        self.until(Core::lost_now).await
    }

    /// Resolves when the grant with this token is lost, alone or with the
    /// session.
    pub(crate) async fn lost_grant(&self, token: u64) -> LossReason {
        self.until(|core| core.loss_of(token)).await
    }

    /// Why the grant with this token is lost, if it is.
    pub(crate) fn loss_of(&self, token: u64) -> Option<LossReason> {
        let life = self.life();
        life.grants
            .loss(token)
            .cloned()
            .or_else(|| life.state.lost_at(clock::now()))
    }

    fn lost_now(&self) -> Option<LossReason> {
        self.life().state.lost_at(clock::now())
    }

    async fn until(&self, loss: impl Fn(&Core) -> Option<LossReason>) -> LossReason {
        loop {
            let notified = self.losses.notified();
            if let Some(reason) = loss(self) {
                return reason;
            }
            // Not told in time, if the machine was suspended.
            timeout(clock::LOOK, notified).await.ok();
        }
    }

    /// Renews the session until it is lost.
    async fn live(self: Arc<Self>) {
        let mut renewals = JoinSet::new();
        loop {
            let poll = self.life().state.poll(clock::now());
            self.publish();
            if let Some(attempt) = poll.renew {
                renewals.spawn(Arc::clone(&self).renew(attempt));
            }
            let Some(wake_at) = poll.wake_at else {
                break;
            };
            let mut pause = Duration::from_micros(wake_at.saturating_sub(clock::now()));
            if self.status.receiver_count() > 0 {
                pause = pause.min(clock::LOOK);
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.changed.notified() => {}
                Some(_) = renewals.join_next() => {}
            }
        }
        self.events.remove(&self);
    }

    async fn renew(self: Arc<Self>, attempt: Attempt) {
        // Twice the time after which another is sent: under load a late
        // acknowledgement is better than none.
        let limit = Duration::from_micros(2 * self.life().state.attempt_timeout());
        let request = RenewSessionRequest {
            session_id: self.id,
            attachment: self.attachment,
        };
        let result = self.transport.call(limit, request).await;
        let now = clock::now();
        let mut life = self.life();
        match result {
            Ok(_) => life.state.renewed(now, attempt),
            Err(Failed {
                failure: Failure::Refused(Error::SessionLost(reason)),
                ..
            }) => {
                life.state.ended(now, reason);
            }
            Err(failed) => {
                tracing::debug!(failure = ?failed.failure, session = self.id, "not renewed");
                life.state.renewal_failed(now, attempt);
            }
        }
    }

    /// Tells the cluster that the session is over.
    async fn close(&self) -> Result<(), Error> {
        let request = CloseSessionRequest {
            session_id: self.id,
            attachment: self.attachment,
        };
        match self.transport.repeat_call(PATIENCE, || request).await {
            // It goes on, for another process.
            Err(error @ Error::SessionLost(LossReason::Superseded)) => Err(error),
            Ok(_) | Err(Error::SessionLost(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Shows a changed status to those who follow it.
    fn publish(&self) {
        let mut is_lost = false;
        let is_changed = self.status.send_if_modified(|shown| {
            // Looked up in here, or an older status could overwrite a newer one.
            let status = self.life().state.status(clock::now());
            is_lost = matches!(status, Status::Lost(_));
            // The time left is not a change by itself.
            let is_changed = std::mem::discriminant(shown) != std::mem::discriminant(&status);
            *shown = status;
            is_changed
        });
        if is_lost && is_changed {
            self.losses.notify_waiters();
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life
            .lock()
            .expect("no panic while the session is locked")
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("id", &format_args!("{:x}", self.id))
            .field("ttl", &self.ttl)
            .field("life", &self.life)
            .finish_non_exhaustive()
    }
}
