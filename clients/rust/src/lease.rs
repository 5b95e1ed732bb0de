//! Leases: keys that are bound to one go when it ends. A lease is kept alive as a
//! session is, by the same decisions ([`crate::session_state`]).

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use conclave_proto::etcd::etcdserverpb::{
    LeaseGrantRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseRevokeRequest, LeaseTimeToLiveRequest, lease_client::LeaseClient,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::sleep,
};
use tokio_stream::StreamExt as _;
use tonic::{Response, transport::Channel};

use crate::{
    client::PATIENCE,
    clock,
    error::Error,
    session_state::{Attempt, LossReason, Micros, SessionState, Status},
    transport::{ANSWER_BYTES_MAX, READ_TIMEOUT, Transport},
};

/// A lease that is kept alive in the background until it is lost, or this value goes.
/// It is given up before the cluster can end it: after 0.85 of its TTL since the last
/// acknowledged renewal was *sent*.
///
/// Dropped, a lease that was granted here is revoked, so that its keys are gone at
/// once; one that was only kept ([`Leases::keep`]) stays for its TTL.
///
/// ```no_run
/// # async fn example(client: conclave_client::Client) -> Result<(), conclave_client::Error> {
/// use std::time::Duration;
///
/// use conclave_client::Put;
///
/// let lease = client.lease(Duration::from_secs(10)).await?;
/// client.kv().put(Put::new("online/a", "").lease(lease.id())).await?;
/// println!("lost: {}", lease.lost().await);
/// # Ok(()) }
/// ```
pub struct Lease {
    core: Arc<Core>,
    ends_with_this: bool,
}

/// What the handle and the background task share.
struct Core {
    id: i64,
    ttl: Duration,
    transport: Arc<Transport>,
    state: Mutex<SessionState>,
    status: watch::Sender<Status>,
    /// Wakes the task that renews.
    changed: Notify,
}

/// Leases by their ids. Made by [`crate::Client::leases`].
#[derive(Clone, Debug)]
pub struct Leases {
    transport: Arc<Transport>,
}

/// A lease as the cluster has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseInfo {
    /// Its id.
    pub id: i64,
    /// What is left of it, in whole seconds.
    pub left: Duration,
    /// What it was granted, and gets with each renewal.
    pub ttl: Duration,
    /// The keys that are bound to it, if they were asked for.
    pub keys: Vec<Bytes>,
}

impl Leases {
    pub(crate) fn new(transport: Arc<Transport>) -> Leases {
        Leases { transport }
    }

    /// Grants a lease, and does not keep it alive. `id`: 0 to have one chosen. Its id
    /// and TTL: in whole seconds, rounded up, and never less than the cluster's least.
    ///
    /// # Errors
    /// [`Error::Server`] if the id is taken; [`Error::OutcomeUnknown`] if nobody
    /// answered.
    pub async fn grant(&self, ttl: Duration, id: i64) -> Result<(i64, Duration), Error> {
        let (_, id, ttl) = self.granted(ttl, id).await?;
        Ok((id, ttl))
    }

    /// Also when the attempt that was answered was sent: those before it had no effect.
    async fn granted(&self, ttl: Duration, id: i64) -> Result<(Micros, i64, Duration), Error> {
        let request = LeaseGrantRequest {
            ttl: i64::try_from(ttl.as_secs_f64().ceil() as u64).unwrap_or(i64::MAX),
            id,
        };
        let sent = AtomicU64::new(0);
        let call = |channel| {
            sent.store(clock::now(), Ordering::Relaxed);
            async move { client(channel).lease_grant(request).await }
        };
        let granted = self.transport.once(PATIENCE, call).await?;
        let sent = sent.load(Ordering::Relaxed);
        Ok((sent, granted.id, seconds(granted.ttl)))
    }

    /// Keeps a lease alive that is there.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    pub async fn keep(&self, id: i64) -> Result<Lease, Error> {
        let (sent, ttl) = self.renewed(id).await?;
        let state = SessionState::opened(sent, micros(ttl));
        let transport = Arc::clone(&self.transport);
        Ok(Lease::start(transport, id, ttl, state, false))
    }

    /// Renews a lease once: its TTL.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`].
    pub async fn renew(&self, id: i64) -> Result<Duration, Error> {
        Ok(self.renewed(id).await?.1)
    }

    async fn renewed(&self, id: i64) -> Result<(Micros, Duration), Error> {
        // Of the attempt that was answered: it counts from when it arrived.
        let sent = AtomicU64::new(0);
        let call = |channel| {
            sent.store(clock::now(), Ordering::Relaxed);
            keep_alive(channel, id)
        };
        let renewed = self.transport.repeat(PATIENCE, READ_TIMEOUT, call).await?;
        match renewed.ttl {
            ..=0 => Err(Error::LeaseNotFound),
            ttl => Ok((sent.load(Ordering::Relaxed), seconds(ttl))),
        }
    }

    /// Ends a lease, and with it the keys that are bound to it.
    ///
    /// # Errors
    /// [`Error::LeaseNotFound`], unless an attempt of this call may have ended it.
    pub async fn revoke(&self, id: i64) -> Result<(), Error> {
        let call = |channel| async move {
            let request = LeaseRevokeRequest { id };
            client(channel).lease_revoke(request).await
        };
        let is_done = |error: &Error| matches!(error, Error::LeaseNotFound);
        self.transport
            .complete(PATIENCE, READ_TIMEOUT, is_done, call)
            .await
    }

    /// A lease as the cluster has it, with its keys if `with_keys`; `None` if there is
    /// none.
    pub async fn info(&self, id: i64, with_keys: bool) -> Result<Option<LeaseInfo>, Error> {
        let request = LeaseTimeToLiveRequest {
            id,
            keys: with_keys,
        };
        let call = |channel| async move { client(channel).lease_time_to_live(request).await };
        let answer = self.transport.read(PATIENCE, READ_TIMEOUT, call).await?;
        Ok((answer.ttl >= 0).then(|| LeaseInfo {
            id: answer.id,
            left: seconds(answer.ttl),
            ttl: seconds(answer.granted_ttl),
            keys: answer.keys,
        }))
    }

    /// The ids of all leases that the server that is asked knows.
    pub async fn list(&self) -> Result<Vec<i64>, Error> {
        let call = |channel| async move {
            let request = LeaseLeasesRequest {};
            client(channel).lease_leases(request).await
        };
        let answer = self.transport.read(PATIENCE, READ_TIMEOUT, call).await?;
        Ok(answer.leases.iter().map(|lease| lease.id).collect())
    }
}

impl Lease {
    pub(crate) async fn open(transport: Arc<Transport>, ttl: Duration) -> Result<Lease, Error> {
        let leases = Leases::new(Arc::clone(&transport));
        let (sent, id, ttl) = leases.granted(ttl, 0).await?;
        let state = SessionState::opened(sent, micros(ttl));
        Ok(Lease::start(transport, id, ttl, state, true))
    }

    fn start(
        transport: Arc<Transport>,
        id: i64,
        ttl: Duration,
        state: SessionState,
        ends_with_this: bool,
    ) -> Lease {
        let core = Arc::new(Core {
            id,
            ttl,
            transport,
            state: Mutex::new(state),
            status: watch::Sender::new(Status::Active),
            changed: Notify::new(),
        });
        core.transport.runtime().spawn(Arc::clone(&core).live());
        Lease {
            core,
            ends_with_this,
        }
    }

    /// The id. People see it in hexadecimal.
    pub fn id(&self) -> i64 {
        self.core.id
    }

    /// What each renewal gives it.
    pub fn ttl(&self) -> Duration {
        self.core.ttl
    }

    /// How it stands now.
    pub fn status(&self) -> Status {
        self.core.state().status(clock::now())
    }

    /// Time until it is given up here unless a renewal succeeds before; zero once it
    /// is lost.
    pub fn remaining(&self) -> Duration {
        self.core.state().remaining(clock::now())
    }

    /// Follows the changes of [`Lease::status`]: active, suspect, lost.
    pub fn changes(&self) -> watch::Receiver<Status> {
        let changes = self.core.status.subscribe();
        // From now on the clock is looked at more often.
        self.core.changed.notify_one();
        changes
    }

    /// Resolves when it is lost, with the reason.
    pub async fn lost(&self) -> LossReason {
        let mut changes = self.changes();
        loop {
            if let Some(reason) = self.core.lost_now() {
                return reason;
            }
            let changed = changes.changed().await;
            changed.expect("the sender is in `self`");
        }
    }

    /// Ends it, and with it the keys that are bound to it.
    ///
    /// # Errors
    /// [`Error::SessionLost`] if it was lost before. If no server answers, it ends
    /// when its TTL has passed.
    pub async fn revoke(mut self) -> Result<(), Error> {
        self.ends_with_this = false;
        if let Some(reason) = self.core.lost_now() {
            return Err(Error::SessionLost(reason));
        }
        self.core.ended(LossReason::Revoked);
        self.core.revoke().await
    }

    /// Lets it be: it ends when its TTL has passed, unless somebody renews it.
    pub fn leave(mut self) {
        self.ends_with_this = false;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.core.lost_now().is_some() {
            return;
        }
        self.core.ended(LossReason::SessionClosed);
        if !self.ends_with_this {
            return;
        }
        let core = Arc::clone(&self.core);
        let runtime = core.transport.runtime().clone();
        runtime.spawn(async move {
            if let Err(error) = core.revoke().await {
                tracing::debug!(%error, lease = core.id, "not revoked, will expire");
            }
        });
    }
}

impl Core {
    /// Renews until the lease is lost.
    async fn live(self: Arc<Self>) {
        let mut renewals = JoinSet::new();
        loop {
            let poll = self.state().poll(clock::now());
            self.publish();
            if let Some(attempt) = poll.renew {
                renewals.spawn(Arc::clone(&self).renew(attempt));
            }
            let Some(wake_at) = poll.wake_at else {
                return;
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
    }

    async fn renew(self: Arc<Self>, attempt: Attempt) {
        // As those of sessions: late is better than none.
        let limit = Duration::from_micros(2 * self.state().attempt_timeout());
        let call = |channel| keep_alive(channel, self.id);
        let result = self.transport.attempt(limit, call).await;
        let now = clock::now();
        let mut state = self.state();
        match result {
            Ok(renewed) if renewed.ttl > 0 => state.renewed(now, attempt),
            Ok(_) => state.ended(now, LossReason::LeaseGone),
            Err(failed) => {
                tracing::debug!(failure = ?failed.failure, lease = self.id, "not renewed");
                state.renewal_failed(now, attempt);
            }
        }
    }

    async fn revoke(&self) -> Result<(), Error> {
        let leases = Leases::new(Arc::clone(&self.transport));
        match leases.revoke(self.id).await {
            Err(Error::LeaseNotFound) => Ok(()),
            result => result,
        }
    }

    fn ended(&self, reason: LossReason) {
        self.state().ended(clock::now(), reason);
        self.publish();
        self.changed.notify_one();
    }

    fn lost_now(&self) -> Option<LossReason> {
        self.state().lost_at(clock::now())
    }

    fn publish(&self) {
        self.status.send_if_modified(|shown| {
            let status = self.state().status(clock::now());
            // The time left is not a change by itself.
            let is_changed = std::mem::discriminant(shown) != std::mem::discriminant(&status);
            *shown = status;
            is_changed
        });
    }

    fn state(&self) -> MutexGuard<'_, SessionState> {
        self.state
            .lock()
            .expect("no panic while the lease is locked")
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("id", &format_args!("{:x}", self.core.id))
            .field("ttl", &self.core.ttl)
            .field("state", &self.core.state)
            .finish_non_exhaustive()
    }
}

fn client(channel: Channel) -> LeaseClient<Channel> {
    LeaseClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX)
}

/// One renewal, on a stream of its own: it goes to whichever server is well, and
/// costs what a call does.
async fn keep_alive(
    channel: Channel,
    id: i64,
) -> Result<Response<LeaseKeepAliveResponse>, tonic::Status> {
    let once = tokio_stream::once(LeaseKeepAliveRequest { id });
    let answers = client(channel)
        .lease_keep_alive(once.chain(tokio_stream::pending()))
        .await?;
    let answer = answers.into_inner().message().await?;
    let ended = || tonic::Status::unavailable("the stream ended without an answer");
    answer.map(Response::new).ok_or_else(ended)
}

fn seconds(seconds: i64) -> Duration {
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn micros(ttl: Duration) -> Micros {
    u64::try_from(ttl.as_micros()).unwrap_or(u64::MAX)
}
