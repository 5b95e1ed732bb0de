//! Locks: a request that becomes a guard, and the guard.
//!
//! What is dropped half-way is cleaned up in the background: a request is
//! cancelled, a guard released, each until the cluster has answered or the
//! session is over.

use std::{
    future::IntoFuture,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use conclave_proto::v1::{AcquireRequest, AcquireResponse, CancelRequest, ReleaseRequest};
use tokio::time::{Instant, timeout};

use crate::{
    error::{Error, Failure},
    requests::{Acquire, Granted, Next, Outcome},
    session::{Core, Session},
    session_state::LossReason,
    transport::{ATTEMPT_TIMEOUT, Backoff, Failed},
};

/// How long a waiting call stays with a server that the rest of the client has left:
/// it may come back to it.
const STAYS_WITHIN: Duration = Duration::from_secs(1);

/// A request for a lock; await it. Made by [`Session::lock`].
///
/// Dropped before it is done, it is withdrawn: the place in the queue, or the
/// grant already on its way, is given up.
///
/// ```no_run
/// # async fn example(session: conclave_client::Session) -> Result<(), conclave_client::Error> {
/// use std::time::Duration;
///
/// // Waits as long as the session lives.
/// let patient = session.lock("a").await?;
/// // Waits for five seconds; fails with `Error::WaitTimedOut`.
/// let brief = session.lock("b").wait(Duration::from_secs(5)).await?;
/// // Does not wait; fails with `Error::LockHeld`.
/// let now = session.lock("c").try_now().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing is sent until it is awaited"]
pub struct LockRequest {
    session: Session,
    lock: Contended,
    wait: Option<Duration>,
    terms: Terms,
}

/// On which terms it is held.
#[derive(Clone, Copy, Debug, Default)]
struct Terms {
    lock_delay_ms: u64,
    is_reentrant: bool,
}

/// Which lock, for whom.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Contended {
    name: String,
    owner: String,
}

/// A lock that is held. Dropped, it is released in the background, with no
/// word about success; better call [`LockGuard::release`].
#[derive(Debug)]
#[must_use = "dropped, it releases the lock"]
pub struct LockGuard {
    session: Session,
    lock: Contended,
    granted: Granted,
    /// Which of the acquires that share the grant it stands for.
    entry: u64,
    is_given_up: bool,
    /// The number of its release, once that has begun.
    release: Option<u64>,
    is_released: bool,
}

impl Contended {
    pub(crate) fn new(name: String, owner: String) -> Contended {
        Contended { name, owner }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn owner(&self) -> &str {
        &self.owner
    }
}

/// An acquire that has a number. Dropped before its end, it is cancelled.
#[derive(Debug)]
pub(crate) struct Pending {
    core: Arc<Core>,
    lock: Contended,
    terms: Terms,
    acquire: Acquire,
    is_over: bool,
}

impl LockRequest {
    pub(crate) fn new(session: Session, name: String) -> LockRequest {
        let lock = Contended {
            name,
            owner: String::new(),
        };
        LockRequest {
            session,
            lock,
            wait: None,
            terms: Terms::default(),
        }
    }

    /// On behalf of this owner: owners exclude each other inside a session. At
    /// most 256 bytes.
    pub fn owner(mut self, owner: impl Into<String>) -> LockRequest {
        self.lock.owner = owner.into();
        self
    }

    /// Waits this long at most, by the cluster's clock: perhaps longer while
    /// the cluster has no leader.
    pub fn wait(mut self, limit: Duration) -> LockRequest {
        self.wait = Some(limit);
        self
    }

    /// Does not wait for the lock.
    pub fn try_now(self) -> LockRequest {
        self.wait(Duration::ZERO)
    }

    /// If the holder is lost (the session expires or is revoked, or an operator
    /// takes the lock), nobody else gets the lock for this long, by the cluster's
    /// clock: time for what the lost holder still does to come to an end, where
    /// tokens cannot be checked. At most a minute. A release, and the close of the
    /// session, end it at once.
    pub fn lock_delay(mut self, delay: Duration) -> LockRequest {
        self.terms.lock_delay_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// Shares the lock with the same session and owner: while it is held, each
    /// further request that is reentrant too is granted at once, with the same
    /// token, and the lock is free when every guard is released. At most 64 share a
    /// grant. A request that finds the first still waiting fails with
    /// [`Error::AlreadyContending`].
    pub fn reentrant(mut self) -> LockRequest {
        self.terms.is_reentrant = true;
        self
    }

    async fn acquire(self) -> Result<LockGuard, Error> {
        let LockRequest {
            session,
            lock,
            wait,
            terms,
        } = self;
        let core = session.core();
        let started = Instant::now();
        let left = core.left(&lock);
        match wait.filter(|wait| !wait.is_zero()) {
            Some(wait) => timeout(wait, left).await.map_err(|_| Error::WaitTimedOut)?,
            None => left.await,
        }
        let pending = Pending::begin(core, lock, terms)?;
        pending.granted_within(session, wait, started).await
    }
}

impl IntoFuture for LockRequest {
    type Output = Result<LockGuard, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.acquire())
    }
}

impl LockGuard {
    /// The name of the lock.
    pub fn name(&self) -> &str {
        &self.lock.name
    }

    /// The fencing token: higher than that of every earlier holder. Hand it to
    /// whatever the lock protects, and let that refuse lower ones.
    pub fn token(&self) -> u64 {
        self.granted.token
    }

    /// The key that the grant stands for, as etcd clients see it.
    pub fn key(&self) -> &Bytes {
        &self.granted.key
    }

    /// The session that the grant is bound to.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Time for which the lock is certainly held unless an operator takes it,
    /// as far as this client knows; zero once it is lost.
    pub fn remaining(&self) -> Duration {
        match self.session.core().loss_of(self.granted.token) {
            Some(_) => Duration::ZERO,
            None => self.session.remaining(),
        }
    }

    /// Resolves when the lock is lost, with the reason: the session ended, an
    /// operator took it, its key was deleted. Work under the lock must stop
    /// then. Safe to drop and call again.
    pub async fn lost(&self) -> LossReason {
        self.session.core().lost_grant(self.granted.token).await
    }

    /// For one of the acquires that share a grant which an earlier start of this
    /// program was given, and which was there at the revision.
    pub(crate) fn adopted(
        session: Session,
        lock: Contended,
        granted: Granted,
        entry: u64,
    ) -> LockGuard {
        session.core().adopted(granted.token, granted.revision);
        LockGuard {
            session,
            lock,
            granted,
            entry,
            is_given_up: false,
            release: None,
            is_released: false,
        }
    }

    /// Gives the lock up and waits for the word of the cluster.
    ///
    /// # Errors
    /// [`Error::NotHolder`] or [`Error::SessionLost`] if it had been lost
    /// before.
    pub async fn release(mut self) -> Result<(), Error> {
        self.give_up();
        let release = self.begin_release()?;
        let core = Arc::clone(self.session.core());
        let result = release.run(&core).await;
        self.is_released = true;
        result
    }

    /// The release of this guard; always the same one.
    fn begin_release(&mut self) -> Result<Release, Error> {
        let request = match self.release {
            Some(request) => request,
            None => self.session.core().begin_request()?,
        };
        self.release = Some(request);
        Ok(Release {
            lock: self.lock.clone(),
            token: self.granted.token,
            entry: self.entry,
            request,
        })
    }

    /// What becomes of the grant from now on is no loss for this guard.
    fn give_up(&mut self) {
        if !self.is_given_up {
            self.is_given_up = true;
            self.session.core().grant_released(self.granted.token);
        }
    }
}

impl Drop for LockGuard {
    fn drop(&mut self) {
        self.give_up();
        if self.is_released {
            return;
        }
        // If the session is lost, so is the lock.
        let Ok(release) = self.begin_release() else {
            return;
        };
        let core = Arc::clone(self.session.core());
        let session = self.session.clone();
        core.leaves(&release.lock);
        core.transport().runtime().spawn(async move {
            let core = session.core();
            if let Err(error) = release.run(core).await {
                tracing::debug!(%error, lock = release.lock.name, "a dropped lock was not released");
            }
            core.has_left(&release.lock);
        });
    }
}

impl Pending {
    fn begin(core: &Arc<Core>, lock: Contended, terms: Terms) -> Result<Pending, Error> {
        let request = core.begin_request()?;
        let mut pending = Pending::resumed(core, lock, request);
        pending.terms = terms;
        Ok(pending)
    }

    /// One with a number that is in flight already. Its terms are those with which it
    /// was first sent.
    pub(crate) fn resumed(core: &Arc<Core>, lock: Contended, request: u64) -> Pending {
        Pending {
            core: Arc::clone(core),
            lock,
            terms: Terms::default(),
            acquire: Acquire::new(request),
            is_over: false,
        }
    }

    pub(crate) fn lock(&self) -> &Contended {
        &self.lock
    }

    pub(crate) fn request_number(&self) -> u64 {
        self.acquire.request()
    }

    /// Repeats the acquire until it is answered or the wait is over.
    pub(crate) async fn granted_within(
        self,
        session: Session,
        wait: Option<Duration>,
        started: Instant,
    ) -> Result<LockGuard, Error> {
        let core = session.core();
        let mut backoff = Backoff::default();
        loop {
            let left = wait.map(|wait| wait.saturating_sub(started.elapsed()));
            let (outcome, moved) = tokio::select! {
                biased;
                attempted = self.attempt(wait, left) => split(attempted.map(granted)),
                reason = core.lost() => return Err(Error::SessionLost(reason)),
            };
            match self.acquire.acquire_ended(outcome) {
                Next::Done(Ok(granted)) => return Ok(self.granted(session, granted)),
                Next::Done(Err(error)) => return Err(self.refused(error)),
                Next::Repeat => {}
            }
            if wait.is_some_and(|wait| !wait.is_zero() && started.elapsed() >= wait) {
                return Err(Error::WaitTimedOut);
            }
            backoff.pause(moved).await;
        }
    }

    /// One call of Acquire. While it waits for the lock, it has no time limit
    /// of its own, but goes elsewhere when the rest of the client does.
    async fn attempt(
        &self,
        wait: Option<Duration>,
        left: Option<Duration>,
    ) -> Result<AcquireResponse, Failed> {
        let transport = self.core.transport();
        let request = self.request(wait, left);
        if wait == Some(Duration::ZERO) {
            return transport.call(ATTEMPT_TIMEOUT, request).await;
        }
        let (index, calls) = transport.calls();
        let mut call = pin!(calls.call(request));
        loop {
            tokio::select! {
                biased;
                result = &mut call => return transport.settle(index, result),
                () = transport.left(index) => {}
            }
            match timeout(STAYS_WITHIN, &mut call).await {
                Ok(result) => return transport.settle(index, result),
                Err(_) if transport.is_current(index) => {}
                Err(_) => {
                    return Err(Failed {
                        failure: left_behind(),
                        moved: true,
                    });
                }
            }
        }
    }

    fn request(&self, wait: Option<Duration>, left: Option<Duration>) -> AcquireRequest {
        let is_try = wait == Some(Duration::ZERO);
        let wait_ms = left.map(|left| match u64::try_from(left.as_millis()) {
            // Zero would turn the last attempt of a wait into a try.
            Ok(ms) if is_try => ms,
            Ok(ms) => ms.max(1),
            Err(_) => u64::MAX,
        });
        AcquireRequest {
            name: self.lock.name.clone(),
            session_id: self.core.id(),
            owner: self.lock.owner.clone(),
            number: Some(self.core.number(self.acquire.request())),
            wait_ms,
            lock_delay_ms: self.terms.lock_delay_ms,
            reentrant: self.terms.is_reentrant,
        }
    }

    fn granted(mut self, session: Session, granted: Granted) -> LockGuard {
        self.is_over = true;
        let Granted {
            token, revision, ..
        } = granted;
        self.core.granted(self.acquire.request(), token, revision);
        let lock = self.lock.clone();
        LockGuard {
            session,
            lock,
            granted,
            entry: self.acquire.request(),
            is_given_up: false,
            release: None,
            is_released: false,
        }
    }

    fn refused(mut self, error: Error) -> Error {
        self.is_over = true;
        self.core.end_request(self.acquire.request());
        self.core.heard(error)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.is_over {
            return;
        }
        let core = Arc::clone(&self.core);
        let lock = self.lock.clone();
        let mut acquire = self.acquire.clone();
        acquire.withdraw();
        let runtime = core.transport().runtime().clone();
        core.leaves(&lock);
        runtime.spawn(async move {
            cancel(&core, &lock, &acquire).await;
            core.end_request(acquire.request());
            core.has_left(&lock);
        });
    }
}

/// Cancels until there is an answer or the session is over.
async fn cancel(core: &Core, lock: &Contended, acquire: &Acquire) {
    let mut backoff = Backoff::default();
    loop {
        let request = CancelRequest {
            name: lock.name.clone(),
            session_id: core.id(),
            owner: lock.owner.clone(),
            request: acquire.request(),
            attachment: core.attachment(),
        };
        let call = core.transport().call(ATTEMPT_TIMEOUT, request);
        let (outcome, moved) = tokio::select! {
            biased;
            attempted = call => split(attempted.map(|_| ())),
            _ = core.lost() => return,
        };
        match acquire.cancel_ended(outcome) {
            Next::Done(Err(error)) => {
                core.heard(error);
                return;
            }
            Next::Done(Ok(())) => return,
            Next::Repeat => backoff.pause(moved).await,
        }
    }
}

/// One release, with its number.
struct Release {
    lock: Contended,
    token: u64,
    entry: u64,
    request: u64,
}

impl Release {
    /// Repeats it until there is an answer or the session is over.
    async fn run(&self, core: &Core) -> Result<(), Error> {
        let mut backoff = Backoff::default();
        loop {
            let request = ReleaseRequest {
                name: self.lock.name.clone(),
                session_id: core.id(),
                owner: self.lock.owner.clone(),
                token: self.token,
                entry: self.entry,
                number: Some(core.number(self.request)),
            };
            let call = core.transport().call(ATTEMPT_TIMEOUT, request);
            let (outcome, moved) = tokio::select! {
                biased;
                attempted = call => split(attempted.map(|_| ())),
                reason = core.lost() => return Err(Error::SessionLost(reason)),
            };
            match outcome.next() {
                Next::Done(result) => {
                    core.end_request(self.request);
                    return result.map_err(|error| core.heard(error));
                }
                Next::Repeat => backoff.pause(moved).await,
            }
        }
    }
}

/// The outcome of an attempt, and whether the next goes to another server.
fn split<T>(attempted: Result<T, Failed>) -> (Outcome<T, Error>, bool) {
    match attempted {
        Ok(answer) => (Outcome::Answered(answer), false),
        Err(Failed { failure, moved }) => {
            let outcome = match failure {
                Failure::Refused(error) => Outcome::Refused(error),
                Failure::NotApplied { .. } | Failure::Overloaded { .. } => Outcome::NotApplied,
                Failure::Unknown { .. } => Outcome::Unknown,
            };
            (outcome, moved)
        }
    }
}

fn granted(answer: AcquireResponse) -> Granted {
    // Without a revision nothing can be inferred about the grant.
    let revision = answer.header.map_or(u64::MAX, |header| header.revision);
    Granted {
        key: answer.key,
        token: answer.token,
        revision,
    }
}

/// The rest of the client talks to another server now.
fn left_behind() -> Failure {
    Failure::Unknown {
        message: "the server was left".to_owned(),
        is_reached: true,
    }
}
