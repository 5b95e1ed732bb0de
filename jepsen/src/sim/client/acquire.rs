//! Asking for a lock, and sometimes for one that it holds already.

use conclave_client::requests::{Acquire, Granted, Message, Next, Outcome};
use conclave_core::replica::{Answer, AnswerBody};
use conclave_primitives::{Rejection, Reply as LockReply};
use conclave_proto::internal::{LockAcquire, LockCancel, Request, primitive_command};

use super::{Holding, LockClient, Step, internal, is_copied, without_answer};
use crate::{
    checkers::shared,
    sim::{
        checks::{is_election, lock_name},
        ground::{About, CallBody, Ground},
        link::{CallOutcome, Refusal},
        tally::Operation,
    },
};

/// How often an acquire lets others share its grant, in a million.
const REENTRANT: u64 = 500_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Acquiring {
    pub(super) lock: usize,
    pub(super) acquire: Acquire,
    pub(super) wait_ms: Option<u64>,
    pub(super) delay_ms: u64,
    /// Whether it would share a grant; not known of a request from before.
    pub(super) is_reentrant: Option<bool>,
    pub(super) attempts: u32,
    pub(super) withdraw_us: u64,
    /// What it holds of this lock meanwhile.
    pub(super) holding: Option<Holding>,
}

impl Acquiring {
    pub(super) fn is_withdrawn(&self) -> bool {
        self.acquire.message() == Message::Cancel
    }

    /// Withdraws it.
    pub(super) fn withdraw(&mut self) {
        self.acquire.withdraw();
        self.attempts = 0;
    }
}

impl LockClient {
    /// Asks for a lock: any, or the one that it holds.
    pub(super) fn begin_acquire(&mut self, holding: Option<Holding>, ground: &mut Ground) {
        let Some(session) = &mut self.session else {
            return;
        };
        let wait_ms = match ground.rng.below(100) {
            0..25 => Some(0),
            25..60 => Some(ground.rng.between(20, 1_500)),
            _ => None,
        };
        let wants_delay = ground.rng.chance(200_000);
        let withdraw_us = match ground.rng.chance(80_000) {
            true => ground.now_us + ground.rng.between(1_000, 300_000),
            false => u64::MAX,
        };
        let lock = match &holding {
            Some(holding) => holding.lock,
            None => ground.rng.index(ground.settings.locks),
        };
        let delay_ms = match wants_delay && !is_election(lock) {
            true => ground.rng.between(50, 1_000),
            false => 0,
        };
        self.step = Step::Acquire(Acquiring {
            lock,
            acquire: Acquire::new(session.requests.begin()),
            wait_ms,
            delay_ms,
            is_reentrant: Some(ground.rng.chance(REENTRANT) && !is_election(lock)),
            attempts: 0,
            withdraw_us,
            holding,
        });
        self.acquire(ground);
    }

    /// Sends an acquire or its cancel.
    pub(super) fn acquire(&mut self, ground: &mut Ground) {
        let (Step::Acquire(acquiring), Some(session)) = (&mut self.step, &self.session) else {
            return;
        };
        acquiring.attempts += 1;
        let attachment = session.requests.attachment();
        // Nobody can tell which of two copies is the first to wait. And what an earlier
        // attachment sent in vain may have had the same number.
        let is_copied = is_copied(ground);
        let is_first = acquiring.attempts == 1 && !is_copied && attachment == 1;
        let (name, owner) = (lock_name(acquiring.lock), self.owner.clone());
        let (session_id, request) = (session.id, acquiring.acquire.request());
        let (lock, wait_ms, delay_ms) = (acquiring.lock, acquiring.wait_ms, acquiring.delay_ms);
        let reentrant = acquiring.is_reentrant.unwrap_or_default();
        let message = acquiring.acquire.message();
        let number = session.requests.number(request);
        let campaign = self.campaign_of(lock, wait_ms, request);
        let (command, about, patience_us) = match message {
            Message::Acquire => (
                campaign.unwrap_or_else(|| {
                    primitive_command::Command::LockAcquire(LockAcquire {
                        name,
                        session_id,
                        owner,
                        request: Some(internal(number)),
                        wait_ms,
                        delay_ms,
                        reentrant,
                        ..LockAcquire::default()
                    })
                }),
                About::Acquire {
                    lock,
                    session: session_id,
                    request,
                    first: is_first,
                },
                // A call that waits may break at any time; one that does not
                // should be answered soon.
                ground.rng.between(300_000, 3_000_000),
            ),
            Message::Cancel => (
                primitive_command::Command::LockCancel(LockCancel {
                    name,
                    session_id,
                    owner,
                    entry: request,
                    request: Some(Request {
                        attachment,
                        ..Request::default()
                    }),
                }),
                About::Other,
                ground.rng.between(200_000, 1_000_000),
            ),
        };
        let body = conclave_primitives::command(command);
        if is_copied {
            self.link.send_copy(body.clone(), about, ground);
        }
        let call = CallBody::Command(body);
        self.pending = Some(self.link.call(call, about, patience_us, ground));
    }

    pub(super) fn cancel_ended(&mut self, outcome: CallOutcome, ground: &mut Ground) {
        let Step::Acquire(acquiring) = &self.step else {
            return;
        };
        let outcome = without_answer(outcome);
        if let Next::Done(_) = acquiring.acquire.cancel_ended(outcome) {
            ground.did(match acquiring.holding {
                Some(_) => Operation::CancelledBesideGrant,
                None => Operation::Cancelled,
            });
            self.request_over(ground);
        }
    }

    pub(super) fn acquire_ended(&mut self, outcome: CallOutcome, ground: &mut Ground) {
        let Step::Acquire(acquiring) = &self.step else {
            return;
        };
        let outcome = match outcome {
            Outcome::Answered(Answer {
                body: AnswerBody::Machine(Ok(LockReply::Granted { key, token })),
                revision,
                ..
            }) => Outcome::Answered(Granted {
                key,
                token,
                revision,
            }),
            Outcome::Refused(rejection) => Outcome::Refused(rejection),
            Outcome::NotApplied => Outcome::NotApplied,
            Outcome::Answered(_) | Outcome::Unknown => Outcome::Unknown,
        };
        match acquiring.acquire.acquire_ended(outcome) {
            Next::Repeat | Next::Done(Err(Refusal::NotRun(_))) => {}
            Next::Done(Ok(granted)) => self.granted(granted.token, ground),
            Next::Done(Err(Refusal::Rejected(rejection))) => self.refused(&rejection, ground),
        }
    }

    fn refused(&mut self, rejection: &Rejection, ground: &mut Ground) {
        match rejection {
            Rejection::Held => ground.did(Operation::Held),
            Rejection::WaitTimedOut => ground.did(Operation::WaitTimedOut),
            Rejection::AlreadyContending { token } => {
                let verdict = ground.checks.acknowledged.stumbled(*token);
                ground.checks.note(verdict);
            }
            _ => {}
        }
        if let Step::Acquire(acquiring) = &self.step
            && let Some(holding) = &acquiring.holding
        {
            let token = holding.token;
            let may_share = [acquiring.is_reentrant, holding.is_reentrant];
            match rejection {
                Rejection::AlreadyContending { token: other } if *other == token => {
                    ground.did(Operation::NotShared);
                    if may_share == [Some(true); 2] {
                        self.denied(token, "it may not share its grant", ground);
                    }
                }
                Rejection::SessionEnded(_) | Rejection::Cancelled => {}
                _ => {
                    self.denied(token, "its next acquire does not find it", ground);
                    self.lose_grant(token, ground);
                }
            }
        }
        self.request_over(ground);
    }

    /// The request is over. It goes on with what it holds, if that is anything.
    pub(super) fn request_over(&mut self, ground: &mut Ground) {
        let (Step::Acquire(acquiring), Some(session)) = (&mut self.step, &mut self.session) else {
            return self.rest_a_little(ground);
        };
        session.requests.end(acquiring.acquire.request());
        let holding = acquiring.holding.take();
        self.link.served(ground);
        match holding {
            Some(holding) => self.hold(holding, ground),
            None => self.rest_a_little(ground),
        }
    }

    fn granted(&mut self, token: u64, ground: &mut Ground) {
        let Step::Acquire(acquiring) = &self.step else {
            return;
        };
        let (lock, wait_ms, delay_ms) = (acquiring.lock, acquiring.wait_ms, acquiring.delay_ms);
        let (is_reentrant, entry) = (acquiring.is_reentrant, acquiring.acquire.request());
        self.request_over(ground);
        if !self.trusts_session(ground) || self.lost == Some(token) {
            return;
        }
        if let Step::Hold(holding) = &mut self.step {
            if holding.token == token {
                ground.did(Operation::Shared);
                let may_share = ![is_reentrant, holding.is_reentrant].contains(&Some(false));
                holding.entries.push(entry);
                ground.checks.note(shared::joined(token, may_share));
                return;
            }
            let before = holding.token;
            self.denied(before, "its next acquire is granted another token", ground);
            self.lose_grant(before, ground);
        }
        ground.did(match wait_ms {
            Some(0) => Operation::GrantedByTry,
            Some(_) => Operation::GrantedInTime,
            None => Operation::GrantedWithoutLimit,
        });
        self.believe(lock, token, ground);
        let verdict = ground.checks.tokens_grow.believes(lock, token);
        ground.checks.note(verdict);
        self.hold(
            Holding {
                lock,
                token,
                is_reentrant,
                entries: vec![entry],
                undone: None,
                until_us: 0,
            },
            ground,
        );
        self.guard(lock, token, delay_ms, ground);
    }

    /// From now on it believes to hold a lock.
    pub(super) fn believe(&self, lock: usize, token: u64, ground: &mut Ground) {
        let Some(session) = &self.session else { return };
        let until_us = self.clock.true_at(session.state.deadline());
        let (now_us, actor) = (ground.now_us, self.actor());
        let verdict = ground
            .checks
            .one_holder
            .believes(now_us, lock, actor, token, until_us);
        ground.checks.note(verdict);
    }

    /// If it asked for a delay, nobody else may be granted within it.
    fn guard(&self, lock: usize, token: u64, delay_ms: u64, ground: &mut Ground) {
        let Some(session) = self.session.as_ref().filter(|_| delay_ms > 0) else {
            return;
        };
        let sent_us = self.clock.true_at(session.state.confirmed());
        let times = (self.ttl_ms * 1_000, delay_ms * 1_000);
        let guards = &mut ground.checks.lock_delay;
        guards.holds(lock, self.link.actor, token, sent_us, times);
    }
}
