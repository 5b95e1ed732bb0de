//! A client that uses locks and elections: it opens a session, then acquires, holds and
//! releases, with the session and request logic of the client library. It may
//! give up, ask twice, send what is stale, close its session, or vanish, and come
//! back to its session with the secret.

mod acquire;
mod comeback;
mod election;
mod hold;

use bytes::Bytes;
use conclave_client::{
    requests::{Outcome, Requests},
    session_state::{Attempt, LossReason, SessionState},
};
use conclave_core::{
    ids::{Attachment, SessionId},
    replica::{AnswerBody, EventBody},
    session::EndReason,
};
use conclave_primitives::{Event as LockEvent, LossReason as GrantLoss, Rejection};
use conclave_proto::internal::{CloseSession, OpenSession, Request, command};
use conclave_proto::v1::RequestNumber;

use super::{
    alarm::{Alarm, Owner},
    clock::{self, Clock},
    ground::{About, CallBody, Ground, Reply},
    link::{CallOutcome, Link, Pending, Refusal, outcome},
    tally::{Fault, Operation},
};
use crate::checkers::early_expiry::Moment;
use acquire::Acquiring;
use comeback::{Attaching, Before, lock_of};
use hold::{Aside, Holding, Releasing};

/// See the module.
#[derive(Debug)]
pub(crate) struct LockClient {
    link: Link,
    alarm: Alarm,
    clock: Clock,
    owner: String,
    ttl_ms: u64,
    session: Option<Session>,
    step: Step,
    /// The call of this step.
    pending: Option<Pending>,
    /// The step does nothing before this.
    retry_us: u64,
    /// Renewals without an answer.
    renewals: Vec<(u64, Attempt)>,
    /// A call beside the step.
    aside: Option<(u64, Aside)>,
    /// What it released last.
    released: Option<(usize, u64)>,
    /// Which grant it lost last: the answer to an acquire that shared it may be late.
    lost: Option<u64>,
    opening: Option<Opening>,
}

/// The session that is being opened.
#[derive(Clone, Debug)]
struct Opening {
    secret: Bytes,
    first_sent: Moment,
    /// The same by the client's clock.
    sent: u64,
}

#[derive(Debug)]
struct Session {
    id: i64,
    secret: Bytes,
    state: SessionState,
    requests: Requests,
    /// When its state wants to be asked again, by the client's clock.
    wake_at: Option<u64>,
}

#[derive(Debug)]
enum Step {
    Open,
    Idle {
        until_us: u64,
    },
    Acquire(Acquiring),
    Hold(Holding),
    Release(Releasing),
    Close,
    /// It vanished without a word. Later it comes back to its session, or opens
    /// another.
    Gone {
        until_us: u64,
        before: Option<Before>,
    },
    /// It is back.
    Attach(Attaching),
    /// Nothing more to do.
    Rest,
}

impl LockClient {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        let rate = clock::draw_rate(&mut ground.rng);
        let owners = ["", "", "worker", "a b/é:%"];
        let mut client = Self {
            link: Link::new(actor, ground),
            alarm: Alarm::new(Owner::Actor(actor)),
            clock: Clock::new(0, ground.rng.below(1 << 40), rate),
            owner: owners[ground.rng.index(owners.len())].to_owned(),
            ttl_ms: [500, 700, 1_000, 2_000, 4_000][ground.rng.index(5)],
            session: None,
            step: Step::Open,
            pending: None,
            retry_us: 0,
            renewals: Vec::new(),
            aside: None,
            released: None,
            lost: None,
            opening: None,
        };
        client.alarm.set(ground.rng.below(200_000), ground);
        client
    }

    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.step, Step::Gone { .. })
    }

    fn actor(&self) -> usize {
        self.link.actor
    }

    /// Its alarm may ring.
    pub(crate) fn wake(&mut self, ground: &mut Ground) {
        if !self.alarm.rings(ground) {
            return;
        }
        if let Some(pending) = self.pending
            && pending.until_us <= ground.now_us
        {
            self.link.abandon(pending, ground);
            self.step_ended(Reply::Broken, ground);
        }
        self.go_on(ground);
    }

    /// Something arrives from a server.
    pub(crate) fn hear(&mut self, id: u64, reply: Reply, ground: &mut Ground) {
        if self.is_gone() {
            return;
        }
        if let Reply::Event { session, body } = reply {
            self.told(session, body, ground);
        } else if self.pending.is_some_and(|pending| pending.id == id) {
            self.step_ended(reply, ground);
        } else if let Some(place) = self.renewals.iter().position(|(call, _)| *call == id) {
            let (_, attempt) = self.renewals.swap_remove(place);
            self.renewal_ended(attempt, reply, ground);
        } else if let Some((call, aside)) = self.aside
            && call == id
        {
            self.aside = None;
            self.aside_ended(aside, reply, ground);
        }
        self.go_on(ground);
    }

    fn go_on(&mut self, ground: &mut Ground) {
        self.renew(ground);
        self.act(ground);
        let step_us = match (&self.step, self.pending) {
            (Step::Rest, _) => u64::MAX,
            (
                Step::Gone { until_us, .. }
                | Step::Idle { until_us }
                | Step::Hold(Holding { until_us, .. }),
                _,
            ) => *until_us,
            (Step::Acquire(acquiring), Some(pending)) if !acquiring.is_withdrawn() => {
                pending.until_us.min(acquiring.withdraw_us)
            }
            (_, Some(pending)) => pending.until_us,
            (_, None) => self.retry_us,
        };
        let wake_at = self.session.as_ref().and_then(|session| session.wake_at);
        let renew_us = wake_at.map_or(u64::MAX, |local_us| self.clock.true_at(local_us));
        self.alarm.set(step_us.min(renew_us), ground);
    }

    // --- the session ------------------------------------------------------

    /// Keeps the session alive, or notices that it is not.
    fn renew(&mut self, ground: &mut Ground) {
        let now = self.clock.local(ground.now_us);
        let Some(session) = &mut self.session else {
            return;
        };
        let poll = session.state.poll(now);
        session.wake_at = poll.wake_at;
        let id = session.id;
        if let Some(attempt) = poll.renew {
            if !self.renewals.is_empty() && ground.rng.chance(500_000) {
                // The one before has no answer yet.
                self.link.move_on(None, ground);
                ground.attach(id, self.link.actor, self.link.node);
            }
            let body = CallBody::Renew(Attachment {
                session: SessionId(id),
                number: session.requests.attachment(),
            });
            let call = self.link.send(body, About::Renew { session: id }, ground);
            self.renewals.push((call, attempt));
            if self.renewals.len() > 8 {
                self.renewals.remove(0);
            }
        }
        if poll.wake_at.is_none() {
            self.lose_session(ground);
        }
    }

    fn renewal_ended(&mut self, attempt: Attempt, reply: Reply, ground: &mut Ground) {
        let now = self.clock.local(ground.now_us);
        let Some(session) = &mut self.session else {
            return;
        };
        match outcome(reply) {
            (Outcome::Answered(_), _) => {
                session.state.renewed(now, attempt);
                if session.state.lost_at(now).is_none() {
                    let until_us = self.clock.true_at(session.state.deadline());
                    ground.checks.one_holder.renewed(self.link.actor, until_us);
                    let sent_us = self.clock.true_at(session.state.confirmed());
                    ground.checks.lock_delay.renewed(self.link.actor, sent_us);
                    ground.did(Operation::Renewed);
                }
            }
            (Outcome::Refused(Refusal::Rejected(Rejection::SessionEnded(reason))), _) => {
                session.state.ended(now, loss(reason));
            }
            (_, hint) => {
                session.state.renewal_failed(now, attempt);
                self.link.move_on(hint, ground);
            }
        }
    }

    /// The servers tell the session something.
    fn told(&mut self, of: i64, body: EventBody<LockEvent>, ground: &mut Ground) {
        let now = self.clock.local(ground.now_us);
        match body {
            // What it hears is told to its newest attachment.
            EventBody::SessionAttached { .. } => {}
            EventBody::SessionEnded(reason) => {
                if let Some(session) = self.session.as_mut().filter(|session| session.id == of) {
                    session.state.ended(now, loss(reason));
                }
            }
            EventBody::Machine(LockEvent::GrantLost { grant, reason }) => {
                let (lock, token) = (lock_of(&grant.lock, ground), grant.token);
                if self.lose_grant(token, ground) && !matches!(reason, GrantLoss::SessionEnded(_)) {
                    ground.checks.lock_delay.gives_up(lock, token);
                }
            }
        }
    }

    /// The session is over. What it held and what it asked for is over too.
    fn lose_session(&mut self, ground: &mut Ground) {
        self.session = None;
        self.renewals.clear();
        self.aside = None;
        self.released = None;
        self.lost = None;
        ground.checks.one_holder.gone(self.actor());
        if ground.checks.lock_delay.lost(self.actor()) {
            ground.did(Operation::LostWithDelay);
        }
        self.link.served(ground);
        if let Some(pending) = self.pending.take() {
            self.link.abandon(pending, ground);
        }
        self.step = if ground.draining {
            Step::Rest
        } else {
            Step::Open
        };
        self.retry_us = ground.now_us;
    }

    /// The process dies; its session must expire.
    fn die(&mut self, ground: &mut Ground) {
        ground.tally.fault(Fault::ClientDeath);
        ground.tell(format_args!("client {} dies", self.actor()));
        let before = self.session.as_ref().map(|session| Before {
            id: session.id,
            secret: session.secret.clone(),
        });
        let comes_back = ground.rng.chance(600_000);
        self.lose_session(ground);
        self.link.gone(ground);
        let until_us = ground.now_us
            + match comes_back {
                true => ground.rng.between(1_000, 600_000),
                false => ground.rng.between(100_000, 3_000_000),
            };
        let before = before.filter(|_| comes_back);
        self.step = Step::Gone { until_us, before };
    }

    // --- the steps --------------------------------------------------------

    /// Does what is due, if anything is.
    fn act(&mut self, ground: &mut Ground) {
        match &mut self.step {
            Step::Gone { until_us, before } if *until_us <= ground.now_us => {
                let before = before.take();
                self.step = match before {
                    _ if ground.draining => Step::Rest,
                    Some(before) => Step::Attach(Attaching::begin(before)),
                    None => Step::Open,
                };
            }
            Step::Acquire(acquiring)
                if !acquiring.is_withdrawn() && acquiring.withdraw_us <= ground.now_us =>
            {
                if ground.troubled() && ground.rng.chance(200_000) {
                    return self.die(ground);
                }
                acquiring.withdraw();
                if let Some(pending) = self.pending.take() {
                    self.link.abandon(pending, ground);
                }
                self.retry_us = ground.now_us;
            }
            _ => {}
        }
        if self.pending.is_some() || self.retry_us > ground.now_us {
            return;
        }
        match &self.step {
            Step::Open => self.open(ground),
            Step::Idle { until_us } if *until_us <= ground.now_us => self.choose(ground),
            Step::Acquire(_) => self.acquire(ground),
            Step::Hold(holding) if holding.until_us <= ground.now_us => self.give_up(ground),
            Step::Release(_) => self.release(ground),
            Step::Attach(_) => self.attach(ground),
            Step::Close => self.close(ground),
            Step::Idle { .. } | Step::Hold(_) | Step::Gone { .. } | Step::Rest => {}
        }
    }

    /// The call of this step has ended.
    fn step_ended(&mut self, reply: Reply, ground: &mut Ground) {
        let Some(pending) = self.pending.take() else {
            return;
        };
        let has_space = !is_no_space(&reply);
        let (outcome, hint) = outcome(reply);
        if let Outcome::Refused(Refusal::Rejected(Rejection::SessionEnded(reason))) = &outcome
            && let Some(session) = &mut self.session
        {
            session
                .state
                .ended(self.clock.local(ground.now_us), loss(*reason));
        }
        if matches!(outcome, Outcome::NotApplied | Outcome::Unknown) {
            ground.did(Operation::Unknown);
            self.retry_us = ground.now_us + ground.rng.between(5_000, 60_000);
            self.link.move_on(hint, ground);
            if let Some(session) = &self.session {
                ground.attach(session.id, self.link.actor, self.link.node);
            }
        }
        if let (Outcome::Refused(Refusal::NotRun(why)), Some(session)) = (&outcome, &self.session) {
            let verdict = ground.checks.once.refused(session.id, &format!("{why:?}"));
            ground.checks.note(verdict);
        }
        match &self.step {
            Step::Open => self.opened(&outcome, ground),
            Step::Attach(_) => self.attach_ended(pending, outcome, ground),
            Step::Acquire(acquiring) if acquiring.is_withdrawn() => {
                self.cancel_ended(outcome, ground);
            }
            // That is the answer to this number, also later.
            Step::Acquire(_) if !has_space => self.request_over(ground),
            Step::Acquire(_) => self.acquire_ended(outcome, ground),
            Step::Release(_) => self.release_ended(outcome, ground),
            Step::Close => self.closed(&outcome, ground),
            Step::Idle { .. } | Step::Hold(_) | Step::Gone { .. } | Step::Rest => {}
        }
    }

    fn rest_a_little(&mut self, ground: &mut Ground) {
        // A long rest leaves room to what is still under way from before.
        let rest_us = match ground.rng.chance(20_000) {
            true => ground.rng.between(100_000, 2_000_000),
            false => ground.rng.skewed(10_000),
        };
        self.step = Step::Idle {
            until_us: ground.now_us + rest_us,
        };
        self.retry_us = ground.now_us;
    }

    fn open(&mut self, ground: &mut Ground) {
        self.link.begins(ground);
        // A session that may be over before it is heard of is of no use.
        let now = self.clock.local(ground.now_us);
        let is_old = |opening: &Opening| now > opening.sent + self.ttl_ms * 500;
        let opening = self.opening.take().filter(|opening| !is_old(opening));
        let opening = opening.unwrap_or_else(|| Opening {
            secret: secret(ground),
            first_sent: ground.moment(),
            sent: now,
        });
        let body = command::Body::OpenSession(OpenSession {
            ttl_ms: self.ttl_ms,
            name: format!("client-{}", self.actor()),
            metadata: [("seed".to_owned(), "simulated".to_owned())].into(),
            secret: opening.secret.clone(),
        });
        let about = About::Open {
            first_sent: opening.first_sent,
        };
        self.opening = Some(opening);
        let patience_us = ground.rng.between(200_000, 1_000_000);
        self.copy_sometimes(&body, about, ground);
        let call = CallBody::Command(body);
        self.pending = Some(self.link.call(call, about, patience_us, ground));
    }

    /// Sends a copy of a call that must not be done twice, now and then.
    fn copy_sometimes(&mut self, body: &command::Body, about: About, ground: &mut Ground) {
        if is_copied(ground) {
            self.link.send_copy(body.clone(), about, ground);
        }
    }

    fn opened(&mut self, outcome: &CallOutcome, ground: &mut Ground) {
        let answered = match outcome {
            Outcome::Answered(answer) => answer,
            // It was opened, and ended before it was heard of.
            Outcome::Refused(_) => {
                self.opening = None;
                return;
            }
            Outcome::NotApplied | Outcome::Unknown => return,
        };
        let (AnswerBody::SessionOpened { session, ttl_ms }, Some(opening)) =
            (&answered.body, self.opening.take())
        else {
            return;
        };
        self.session = Some(Session {
            id: session.0,
            secret: opening.secret,
            state: SessionState::opened(opening.sent, ttl_ms * 1_000),
            requests: Requests::default(),
            wake_at: None,
        });
        ground.did(Operation::SessionOpened);
        ground.attach(session.0, self.link.actor, self.link.node);
        self.link.served(ground);
        self.rest_a_little(ground);
    }

    /// Begins the next thing.
    fn choose(&mut self, ground: &mut Ground) {
        if ground.draining {
            self.step = Step::Rest;
            return;
        }
        self.link.begins(ground);
        if ground.rng.chance(10_000) {
            self.step = Step::Close;
            return self.close(ground);
        }
        self.begin_acquire(None, ground);
    }

    fn close(&mut self, ground: &mut Ground) {
        let Some(live) = &self.session else {
            return;
        };
        let session = live.id;
        let body = command::Body::CloseSession(CloseSession {
            session_id: session,
            attachment: live.requests.attachment(),
        });
        let patience_us = ground.rng.between(200_000, 1_000_000);
        let call = CallBody::Command(body);
        self.pending = Some(
            self.link
                .call(call, About::Close { session }, patience_us, ground),
        );
    }

    fn closed(&mut self, outcome: &CallOutcome, ground: &mut Ground) {
        if let Outcome::Answered(_) = outcome {
            ground.did(Operation::SessionClosed);
            self.lose_session(ground);
        }
    }
}

fn is_no_space(reply: &Reply) -> bool {
    matches!(reply, Reply::Answer(answer) if matches!(answer.body, AnswerBody::NoSpace))
}

/// Whether a call is sent twice.
fn is_copied(ground: &mut Ground) -> bool {
    ground.troubled() && ground.rng.chance(50_000)
}

/// A secret of 16 bytes.
fn secret(ground: &mut Ground) -> Bytes {
    let halves = [ground.rng.next(), ground.rng.next()];
    halves.map(u64::to_le_bytes).concat().into()
}

/// As a server passes it on.
fn internal(number: RequestNumber) -> Request {
    let RequestNumber {
        attachment,
        request: number,
        acknowledged,
        unfinished,
    } = number;
    Request {
        attachment,
        number,
        acknowledged,
        unfinished,
    }
}

fn without_answer(outcome: CallOutcome) -> Outcome<(), Refusal> {
    match outcome {
        Outcome::Answered(_) => Outcome::Answered(()),
        Outcome::Refused(rejection) => Outcome::Refused(rejection),
        Outcome::NotApplied => Outcome::NotApplied,
        Outcome::Unknown => Outcome::Unknown,
    }
}

/// The client library's word for the end of a session.
fn loss(reason: EndReason) -> LossReason {
    match reason {
        // No record of it: it ended long ago.
        EndReason::Expired | EndReason::Unknown => LossReason::SessionExpired,
        EndReason::Closed => LossReason::SessionClosed,
        EndReason::Revoked => LossReason::Revoked,
    }
}
