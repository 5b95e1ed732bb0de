//! Locks: a request that becomes a guard, and the guard.

use std::{future::IntoFuture, pin::Pin, time::Duration};

use bytes::Bytes;

use crate::{
    contention::{Contended, Held, Terms, Wish, contend},
    error::Error,
    session::Session,
    session_state::LossReason,
};

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

/// A lock that is held. Dropped, it is released in the background, with no
/// word about success; better call [`LockGuard::release`].
#[derive(Debug)]
#[must_use = "dropped, it releases the lock"]
pub struct LockGuard(pub(crate) Held);

impl LockRequest {
    pub(crate) fn new(session: Session, name: String) -> LockRequest {
        LockRequest {
            session,
            lock: Contended::new(name, String::new()),
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

    /// Waits this long at most, by the cluster's clock: perhaps some seconds longer
    /// while the cluster has no leader, or a server hangs.
    pub fn wait(mut self, limit: Duration) -> LockRequest {
        self.wait = Some(limit);
        self
    }

    /// Does not wait for the lock. Fails with [`Error::Unreachable`] if no server answers
    /// in five seconds; the request is withdrawn then.
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
        let held = contend(session, lock, Wish::Lock(terms), wait).await?;
        Ok(LockGuard(held))
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
        &self.0.contended().name
    }

    /// The fencing token: higher than that of every earlier holder. Hand it to
    /// whatever the lock protects, and let that refuse lower ones.
    pub fn token(&self) -> u64 {
        self.0.token()
    }

    /// The key that the grant stands for, as etcd clients see it.
    pub fn key(&self) -> &Bytes {
        self.0.key()
    }

    /// The session that the grant is bound to.
    pub fn session(&self) -> &Session {
        self.0.session()
    }

    /// Time for which the lock is certainly held unless an operator takes it,
    /// as far as this client knows; zero once it is lost.
    pub fn remaining(&self) -> Duration {
        self.0.remaining()
    }

    /// Resolves when the lock is lost, with the reason: the session ended, an
    /// operator took it, its key was deleted. Work under the lock must stop
    /// then. Safe to drop and call again.
    pub async fn lost(&self) -> LossReason {
        self.0.lost().await
    }

    /// Gives the lock up and waits for the word of the cluster, as long as the session
    /// lives. Dropped half-way, it goes on in the background.
    ///
    /// # Errors
    /// [`Error::NotHolder`] or [`Error::SessionLost`] if it had been lost
    /// before.
    pub async fn release(self) -> Result<(), Error> {
        self.0.give_up().await
    }
}
