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
    requests::{Acquire, Granted, Next, Outcome, Release},
    session::{Core, Session},
    session_state::LossReason,
    transport::{ATTEMPT_TIMEOUT, Backoff, Failed},
};

/// How often a waiting call checks that its server is still the one to ask.
const LOOK_AROUND: Duration = Duration::from_secs(1);

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
    /// Which of the acquires that share the grant it stands for; 0 if none do.
    entry: u64,
    is_given_up: bool,
    is_released: bool,
}

/// An acquire that has a number. Dropped before its end, it is cancelled.
#[derive(Debug)]
struct Pending {
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
        let mut backoff = Backoff::default();
        loop {
            let left = wait.map(|wait| wait.saturating_sub(started.elapsed()));
            let (outcome, moved) = tokio::select! {
                biased;
                attempted = pending.attempt(wait, left) => split(attempted.map(granted)),
                reason = core.lost() => return Err(Error::SessionLost(reason)),
            };
            match pending.acquire.acquire_ended(outcome) {
                Next::Done(Ok(granted)) => return Ok(pending.granted(session, granted)),
                Next::Done(Err(error)) => {
                    return Err(explained(pending.refused(error), is_over(wait, started)));
                }
                Next::Repeat => {}
            }
            if is_over(wait, started) {
                return Err(Error::WaitTimedOut);
            }
            backoff.pause(moved).await;
        }
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

    /// Gives the lock up and waits for the word of the cluster.
    ///
    /// # Errors
    /// [`Error::NotHolder`] or [`Error::SessionLost`] if it had been lost
    /// before.
    pub async fn release(mut self) -> Result<(), Error> {
        self.give_up();
        let core = Arc::clone(self.session.core());
        let result = release(&core, &self.lock, self.granted.token, self.entry).await;
        self.is_released = true;
        result
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
        let core = Arc::clone(self.session.core());
        let (token, entry) = (self.granted.token, self.entry);
        let lock = self.lock.clone();
        let session = self.session.clone();
        core.leaves(&lock);
        core.transport().runtime().spawn(async move {
            if let Err(error) = release(session.core(), &lock, token, entry).await {
                tracing::debug!(%error, lock = lock.name, "a dropped lock was not released");
            }
            session.core().has_left(&lock);
        });
    }
}

impl Pending {
    fn begin(core: &Arc<Core>, lock: Contended, terms: Terms) -> Result<Pending, Error> {
        let acquire = Acquire::new(core.begin_request()?);
        Ok(Pending {
            core: Arc::clone(core),
            lock,
            terms,
            acquire,
            is_over: false,
        })
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
            match timeout(LOOK_AROUND, &mut call).await {
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
            request: self.acquire.request(),
            acknowledged: self.core.acknowledged(),
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
        let entry = match self.terms.is_reentrant {
            true => self.acquire.request(),
            false => 0,
        };
        LockGuard {
            session,
            lock,
            granted,
            entry,
            is_given_up: false,
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

/// Releases until there is an answer or the session is over.
async fn release(core: &Core, lock: &Contended, token: u64, entry: u64) -> Result<(), Error> {
    let mut release = Release::new();
    let mut backoff = Backoff::default();
    loop {
        let request = ReleaseRequest {
            name: lock.name.clone(),
            session_id: core.id(),
            owner: lock.owner.clone(),
            token,
            entry,
        };
        let call = core.transport().call(ATTEMPT_TIMEOUT, request);
        let (outcome, moved) = tokio::select! {
            biased;
            attempted = call => split(attempted.map(|_| ())),
            reason = core.lost() => return Err(Error::SessionLost(reason)),
        };
        match release.ended(outcome, |error| matches!(error, Error::NotHolder { .. })) {
            Next::Done(Ok(())) => return Ok(()),
            Next::Done(Err(error)) => return Err(core.heard(error)),
            Next::Repeat => backoff.pause(moved).await,
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

/// Whether a wait has ended; a try has none.
fn is_over(wait: Option<Duration>, started: Instant) -> bool {
    wait.is_some_and(|wait| !wait.is_zero() && started.elapsed() >= wait)
}

/// What the refusal of a repeated request means: that it is over says that the
/// answer to an earlier attempt was lost, and what it was must be inferred.
fn explained(error: Error, is_wait_over: bool) -> Error {
    match error {
        Error::Server { reason, message } if reason == "STALE_REQUEST" => {
            if is_wait_over {
                Error::WaitTimedOut
            } else {
                Error::PlaceLost { message }
            }
        }
        error => error,
    }
}

/// The rest of the client talks to another server now.
fn left_behind() -> Failure {
    Failure::Unknown {
        message: "the server was left".to_owned(),
        is_reached: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_is_over_when_repeated_has_timed_out_or_lost_its_place() {
        let stale = || Error::Server {
            reason: "STALE_REQUEST".to_owned(),
            message: "it is over".to_owned(),
        };
        assert!(matches!(explained(stale(), true), Error::WaitTimedOut));
        assert!(matches!(explained(stale(), false), Error::PlaceLost { .. }));
        assert!(matches!(explained(Error::LockHeld, true), Error::LockHeld));
    }
}
