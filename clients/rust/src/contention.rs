//! What locks and elections have in common: a numbered request that becomes a grant,
//! and the grant until it is given up.
//!
//! What is dropped half-way is cleaned up in the background: a request is
//! cancelled, a grant given up, each until the cluster has answered or the
//! session is over.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use conclave_proto::v1::{
    AcquireRequest, AcquireResponse, CampaignRequest, CampaignResponse, CancelRequest,
    ReleaseRequest, ResignRequest, ResponseHeader,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::Status;

use crate::{
    calls::Call,
    client::PATIENCE,
    error::{Error, Failure},
    requests::{Acquire, Granted, Next, Outcome},
    session::{Core, Session},
    session_state::LossReason,
    transport::{ATTEMPT_TIMEOUT, Answer, Backoff, Failed},
};

/// How long a waiting call stays with a server that the rest of the client has left:
/// it may come back to it.
const STAYS_WITHIN: Duration = Duration::from_secs(1);
/// A wait that has a limit ends here so long after it should have ended there.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// Which lock or election, for whom.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Contended {
    pub(crate) name: String,
    pub(crate) owner: String,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) enum Wish {
    /// The lock, on these terms.
    Lock(Terms),
    /// To lead, with this to say.
    Lead(Bytes),
}

/// On which terms a lock is held.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terms {
    pub(crate) lock_delay_ms: u64,
    pub(crate) is_reentrant: bool,
}

/// A request that has a number. Dropped before its end, it is cancelled.
#[derive(Debug)]
pub(crate) struct Pending {
    core: Arc<Core>,
    contended: Contended,
    wish: Wish,
    acquire: Acquire,
    is_over: bool,
}

/// What was granted. Dropped, it is given up in the background.
#[derive(Debug)]
pub(crate) struct Held {
    session: Session,
    contended: Contended,
    granted: Granted,
    kind: Kind,
    is_given_up: bool,
    /// The number of the request that gives it up, once that has begun.
    give_up: Option<u64>,
    is_over: bool,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// `entry`: which of the acquires that share the grant it stands for.
    Lock {
        entry: u64,
    },
    Leader,
}

impl Contended {
    pub(crate) fn new(name: String, owner: String) -> Contended {
        Contended { name, owner }
    }
}

/// Asks, and waits until it is granted, for `wait` at most; zero is not at all.
pub(crate) async fn contend(
    session: Session,
    contended: Contended,
    wish: Wish,
    wait: Option<Duration>,
) -> Result<Held, Error> {
    let core = session.core();
    let started = Instant::now();
    let left = core.left(&contended);
    match wait.filter(|wait| !wait.is_zero()) {
        Some(wait) => timeout(wait, left).await.map_err(|_| Error::WaitTimedOut)?,
        None => left.await,
    }
    let request = core.begin_request()?;
    let pending = Pending::new(core, contended, wish, request);
    pending.granted_within(session, wait, started).await
}

impl Pending {
    fn new(core: &Arc<Core>, contended: Contended, wish: Wish, request: u64) -> Pending {
        Pending {
            core: Arc::clone(core),
            contended,
            wish,
            acquire: Acquire::new(request),
            is_over: false,
        }
    }

    /// One with a number that is in flight already. Its terms, and what it has to say,
    /// are those with which it was first sent.
    pub(crate) fn resumed(
        core: &Arc<Core>,
        contended: Contended,
        is_candidate: bool,
        request: u64,
    ) -> Pending {
        let wish = match is_candidate {
            true => Wish::Lead(Bytes::new()),
            false => Wish::Lock(Terms::default()),
        };
        Pending::new(core, contended, wish, request)
    }

    pub(crate) fn contended(&self) -> &Contended {
        &self.contended
    }

    /// Repeats the request until it is answered or the wait is over.
    pub(crate) async fn granted_within(
        self,
        session: Session,
        wait: Option<Duration>,
        started: Instant,
    ) -> Result<Held, Error> {
        let core = session.core();
        let mut backoff = Backoff::default();
        loop {
            let left = wait.map(|wait| wait.saturating_sub(started.elapsed()));
            let attempted = tokio::select! {
                biased;
                attempted = self.ask(wait, left) => attempted,
                reason = core.lost() => return Err(Error::SessionLost(reason)),
            };
            let cause = attempted.as_ref().err().map(|it| it.failure.message());
            let (outcome, moved) = split(attempted);
            match self.acquire.acquire_ended(outcome) {
                Next::Done(Ok(granted)) => return Ok(self.granted(session, granted)),
                Next::Done(Err(error)) => return Err(self.refused(error)),
                Next::Repeat => {}
            }
            match wait {
                Some(Duration::ZERO) if started.elapsed() >= PATIENCE => {
                    let message = cause.unwrap_or_default();
                    return Err(core.transport().unreachable(message));
                }
                Some(wait) if !wait.is_zero() && started.elapsed() >= wait => {
                    return Err(Error::WaitTimedOut);
                }
                _ => {}
            }
            backoff.pause(moved).await;
        }
    }

    /// One call for what is wished.
    async fn ask(&self, wait: Option<Duration>, left: Option<Duration>) -> Result<Granted, Failed> {
        let name = self.contended.name.clone();
        let owner = self.contended.owner.clone();
        let session_id = self.core.id();
        let number = Some(self.core.number(self.acquire.request()));
        let wait_ms = wait_ms(wait, left);
        match &self.wish {
            Wish::Lock(terms) => {
                let request = AcquireRequest {
                    name,
                    session_id,
                    owner,
                    number,
                    wait_ms,
                    lock_delay_ms: terms.lock_delay_ms,
                    reentrant: terms.is_reentrant,
                };
                let answer = self.attempt(wait, left, request).await?;
                let AcquireResponse { header, key, token } = answer;
                Ok(granted(header, key, token))
            }
            Wish::Lead(value) => {
                let request = CampaignRequest {
                    name,
                    session_id,
                    owner,
                    number,
                    wait_ms,
                    value: value.clone(),
                };
                let answer = self.attempt(wait, left, request).await?;
                let CampaignResponse { header, key, term } = answer;
                Ok(granted(header, key, term))
            }
        }
    }

    /// One call. While it waits for the grant, its limit is that of the wait, which the
    /// server keeps unless it hangs; and it goes elsewhere when the rest of the client
    /// does.
    async fn attempt<C: Call<Answer: Answer>>(
        &self,
        wait: Option<Duration>,
        left: Option<Duration>,
        request: C,
    ) -> Result<C::Answer, Failed> {
        let transport = self.core.transport();
        if wait == Some(Duration::ZERO) {
            return transport.call(ATTEMPT_TIMEOUT, request).await;
        }
        let (index, calls) = transport.calls();
        let mut call = pin!(calls.call(request));
        let limit = left.map(|left| left.saturating_add(ANSWERS_WITHIN));
        let mut late = pin!(sleep(limit.unwrap_or(Duration::MAX)));
        loop {
            tokio::select! {
                biased;
                result = &mut call => return transport.settle(index, result),
                () = transport.left(index) => {}
                () = &mut late, if limit.is_some() => {
                    let silent = Status::deadline_exceeded("no answer");
                    return transport.settle(index, Err(silent));
                }
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

    fn granted(mut self, session: Session, granted: Granted) -> Held {
        self.is_over = true;
        let Granted {
            token, revision, ..
        } = granted;
        self.core.granted(self.acquire.request(), token, revision);
        let kind = match &self.wish {
            Wish::Lead(_) => Kind::Leader,
            Wish::Lock(_) => Kind::Lock {
                entry: self.acquire.request(),
            },
        };
        Held::new(session, self.contended.clone(), granted, kind)
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
        let contended = self.contended.clone();
        let mut acquire = self.acquire.clone();
        acquire.withdraw();
        let runtime = core.transport().runtime().clone();
        core.leaves(&contended);
        runtime.spawn(async move {
            cancel(&core, &contended, &acquire).await;
            core.end_request(acquire.request());
            core.has_left(&contended);
        });
    }
}

/// Cancels until there is an answer or the session is over.
async fn cancel(core: &Core, contended: &Contended, acquire: &Acquire) {
    let mut backoff = Backoff::default();
    loop {
        let request = CancelRequest {
            name: contended.name.clone(),
            session_id: core.id(),
            owner: contended.owner.clone(),
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

impl Held {
    fn new(session: Session, contended: Contended, granted: Granted, kind: Kind) -> Held {
        Held {
            session,
            contended,
            granted,
            kind,
            is_given_up: false,
            give_up: None,
            is_over: false,
        }
    }

    /// For a grant that an earlier start of this program was given, and which was there
    /// at the revision: one of the acquires that share it, or leadership.
    pub(crate) fn adopted(
        session: Session,
        contended: Contended,
        granted: Granted,
        entry: Option<u64>,
    ) -> Held {
        session.core().adopted(granted.token, granted.revision);
        let kind = match entry {
            Some(entry) => Kind::Lock { entry },
            None => Kind::Leader,
        };
        Held::new(session, contended, granted, kind)
    }

    pub(crate) fn contended(&self) -> &Contended {
        &self.contended
    }

    pub(crate) fn token(&self) -> u64 {
        self.granted.token
    }

    pub(crate) fn key(&self) -> &Bytes {
        &self.granted.key
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Time for which it is certainly held unless an operator takes it, as far as this
    /// client knows; zero once it is lost.
    pub(crate) fn remaining(&self) -> Duration {
        match self.session.core().loss_of(self.granted.token) {
            Some(_) => Duration::ZERO,
            None => self.session.remaining(),
        }
    }

    /// Resolves when it is lost, with the reason.
    pub(crate) async fn lost(&self) -> LossReason {
        self.session.core().lost_grant(self.granted.token).await
    }

    /// Gives it up and waits for the word of the cluster.
    pub(crate) async fn give_up(mut self) -> Result<(), Error> {
        self.is_given_up();
        let give_up = self.begin_to_give_up()?;
        let core = Arc::clone(self.session.core());
        let result = give_up.run(&core).await;
        self.is_over = true;
        result
    }

    /// The request that gives it up; always the same one.
    fn begin_to_give_up(&mut self) -> Result<GiveUp, Error> {
        let request = match self.give_up {
            Some(request) => request,
            None => self.session.core().begin_request()?,
        };
        self.give_up = Some(request);
        Ok(GiveUp {
            contended: self.contended.clone(),
            token: self.granted.token,
            kind: self.kind,
            request,
        })
    }

    /// What becomes of the grant from now on is no loss for who held it.
    fn is_given_up(&mut self) {
        if !self.is_given_up {
            self.is_given_up = true;
            self.session.core().grant_released(self.granted.token);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.is_given_up();
        if self.is_over {
            return;
        }
        // If the session is lost, so is the grant.
        let Ok(give_up) = self.begin_to_give_up() else {
            return;
        };
        let core = Arc::clone(self.session.core());
        let session = self.session.clone();
        core.leaves(&give_up.contended);
        core.transport().runtime().spawn(async move {
            let core = session.core();
            if let Err(error) = give_up.run(core).await {
                let name = &give_up.contended.name;
                tracing::debug!(%error, name, "what was dropped was not given up");
            }
            core.has_left(&give_up.contended);
        });
    }
}

/// One release or resignation, with its number.
struct GiveUp {
    contended: Contended,
    token: u64,
    kind: Kind,
    request: u64,
}

impl GiveUp {
    async fn run(&self, core: &Core) -> Result<(), Error> {
        until_answered(core, self.request, || self.attempt(core)).await
    }

    async fn attempt(&self, core: &Core) -> Result<(), Failed> {
        let name = self.contended.name.clone();
        let owner = self.contended.owner.clone();
        let session_id = core.id();
        let number = Some(core.number(self.request));
        let transport = core.transport();
        match self.kind {
            Kind::Lock { entry } => {
                let request = ReleaseRequest {
                    name,
                    session_id,
                    owner,
                    token: self.token,
                    entry,
                    number,
                };
                transport.call(ATTEMPT_TIMEOUT, request).await.map(drop)
            }
            Kind::Leader => {
                let request = ResignRequest {
                    name,
                    session_id,
                    owner,
                    term: self.token,
                    number,
                };
                transport.call(ATTEMPT_TIMEOUT, request).await.map(drop)
            }
        }
    }
}

/// Repeats a numbered request until there is an answer or the session is over.
pub(crate) async fn until_answered<F>(
    core: &Core,
    request: u64,
    attempt: impl Fn() -> F,
) -> Result<(), Error>
where
    F: Future<Output = Result<(), Failed>>,
{
    let mut backoff = Backoff::default();
    loop {
        let (outcome, moved) = tokio::select! {
            biased;
            attempted = attempt() => split(attempted),
            reason = core.lost() => return Err(Error::SessionLost(reason)),
        };
        match outcome.next() {
            Next::Done(result) => {
                core.end_request(request);
                return result.map_err(|error| core.heard(error));
            }
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

fn granted(header: Option<ResponseHeader>, key: Bytes, token: u64) -> Granted {
    // Without a revision nothing can be inferred about the grant.
    let revision = header.map_or(u64::MAX, |header| header.revision);
    Granted {
        key,
        token,
        revision,
    }
}

/// As it is sent: of a wait that has a limit, what is left.
fn wait_ms(wait: Option<Duration>, left: Option<Duration>) -> Option<u64> {
    let is_try = wait == Some(Duration::ZERO);
    left.map(|left| match u64::try_from(left.as_millis()) {
        // Zero would turn the last attempt of a wait into a try.
        Ok(ms) if is_try => ms,
        Ok(ms) => ms.max(1),
        Err(_) => u64::MAX,
    })
}

/// The rest of the client talks to another server now.
fn left_behind() -> Failure {
    Failure::Unknown {
        message: "the server was left".to_owned(),
        is_reached: true,
    }
}
