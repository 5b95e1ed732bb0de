//! Holding a lock, looking whether that is so, and giving it up: as often as it was
//! acquired.

use conclave_client::requests::{Next, Outcome};
use conclave_core::replica::{Answer, AnswerBody, Query};
use conclave_primitives::{Answer as LockAnswer, Query as LockQuery, Rejection};
use conclave_proto::internal::{LockRelease, command, primitive_command};

use super::{LockClient, Step, internal, without_answer};
use crate::sim::{
    checks::{is_election, lock_name},
    ground::{About, CallBody, Ground, Reply},
    link::{CallOutcome, Refusal, outcome},
    tally::Operation,
};

/// How many acquires share a grant at most.
const SHARED_MAX: usize = 4;

/// A lock that it holds.
#[derive(Clone, Debug)]
pub(super) struct Holding {
    pub(super) lock: usize,
    pub(super) token: u64,
    /// Whether others may share the grant; not known of one from before.
    pub(super) is_reentrant: Option<bool>,
    /// The acquires that share it, in order.
    pub(super) entries: Vec<u64>,
    /// One that did until it was undone.
    pub(super) undone: Option<u64>,
    pub(super) until_us: u64,
}

/// A release of one of the acquires that share a grant.
#[derive(Debug)]
pub(super) struct Releasing {
    /// What it holds afterwards; nothing, if it has heard of a loss.
    holding: Holding,
    /// As the release names it.
    entry: u64,
    request: u64,
    /// How many share the grant afterwards.
    left: usize,
}

/// What a call beside the step is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Aside {
    Check {
        token: u64,
    },
    Proclaim {
        token: u64,
    },
    StaleRelease,
    /// Of an acquire that was undone before, while others share the grant.
    UndoneRelease,
    /// A renewal for the attachment before.
    OldRenewal {
        session: i64,
    },
}

impl LockClient {
    /// Holds a lock for a while.
    pub(super) fn hold(&mut self, mut holding: Holding, ground: &mut Ground) {
        let hold_us = match ground.rng.chance(50_000) {
            true => ground.rng.between(50_000, 600_000),
            false => ground.rng.skewed(6_000),
        };
        holding.until_us = ground.now_us + hold_us;
        self.retry_us = ground.now_us;
        self.ask_aside(&holding, ground);
        self.step = Step::Hold(holding);
    }

    /// The token of the grant that it believes in.
    fn held(&self) -> Option<u64> {
        let holding = match &self.step {
            Step::Hold(holding) => Some(holding),
            Step::Acquire(acquiring) => acquiring.holding.as_ref(),
            Step::Release(releasing) => {
                Some(&releasing.holding).filter(|holding| !holding.entries.is_empty())
            }
            _ => None,
        };
        holding.map(|holding| holding.token)
    }

    /// It believes in a grant no more. Whether it did.
    pub(super) fn lose_grant(&mut self, token: u64, ground: &mut Ground) -> bool {
        if self.held() != Some(token) {
            return false;
        }
        let lock = match &mut self.step {
            Step::Hold(holding) => {
                let lock = holding.lock;
                self.rest_a_little(ground);
                lock
            }
            Step::Acquire(acquiring) => {
                acquiring.holding = None;
                acquiring.lock
            }
            Step::Release(releasing) => {
                releasing.holding.entries.clear();
                releasing.holding.lock
            }
            _ => return false,
        };
        self.lost = Some(token);
        ground.checks.one_holder.gives_up(lock, token);
        true
    }

    /// It hears that it does not hold what it should.
    pub(super) fn denied(&self, token: u64, how: &str, ground: &mut Ground) {
        if self.trusts_session(ground) {
            let verdict = ground.checks.acknowledged.denied(token, how);
            ground.checks.note(verdict);
        }
    }

    pub(super) fn trusts_session(&self, ground: &Ground) -> bool {
        let now = self.clock.local(ground.now_us);
        self.session
            .as_ref()
            .is_some_and(|session| session.state.lost_at(now).is_none())
    }

    /// Sometimes, while it holds: is the token good, and is a stale release
    /// refused?
    fn ask_aside(&mut self, holding: &Holding, ground: &mut Ground) {
        if self.aside.is_some() {
            return;
        }
        let (lock, token) = (holding.lock, holding.token);
        if is_election(lock) && ground.rng.chance(400_000) {
            self.proclaim(lock, token, ground);
        } else if ground.rng.chance(50_000) {
            let query = LockQuery::Check {
                name: lock_name(lock),
                token,
            };
            let body = CallBody::Read(Query::Machine(query));
            let call = self.link.send(body, About::Other, ground);
            self.aside = Some((call, Aside::Check { token }));
        } else if let Some(undone) = holding.undone
            && ground.rng.chance(200_000)
        {
            let session = self.session.as_ref().map_or(0, |session| session.id);
            let about = About::UndoneRelease { token, session };
            let body = CallBody::Command(self.release_of(lock, token, undone, 0));
            let call = self.link.send(body, about, ground);
            self.aside = Some((call, Aside::UndoneRelease));
        } else if let Some((before, stale)) = self.released
            && before == lock
            && ground.rng.chance(50_000)
        {
            let about = About::Release {
                lock,
                token: stale,
                session: 0,
                request: 0,
                left: 0,
            };
            let body = CallBody::Command(self.release_of(lock, stale, 0, 0));
            let call = self.link.send(body, about, ground);
            self.aside = Some((call, Aside::StaleRelease));
        }
    }

    pub(super) fn aside_ended(&mut self, aside: Aside, reply: Reply, ground: &mut Ground) {
        match (aside, outcome(reply).0) {
            (
                Aside::Check { token },
                Outcome::Answered(Answer {
                    body: AnswerBody::Query(LockAnswer::Checked(held)),
                    ..
                }),
            ) => {
                ground.did(Operation::Checked);
                if !held && self.held() == Some(token) {
                    self.denied(token, "a check says no", ground);
                }
            }
            (Aside::OldRenewal { session }, Outcome::Answered(_)) => {
                let verdict = ground.checks.once.served(session, "a renewal");
                ground.checks.note(verdict);
            }
            (Aside::OldRenewal { .. }, Outcome::Refused(Refusal::NotRun(_))) => {
                ground.did(Operation::OldAttachmentRefused);
            }
            (Aside::Proclaim { .. }, Outcome::Answered(_)) => ground.did(Operation::Proclaimed),
            (aside, Outcome::Refused(Refusal::Rejected(Rejection::NotHolder { .. }))) => {
                match aside {
                    Aside::Proclaim { token } if self.held() == Some(token) => {
                        self.denied(token, "it may not proclaim", ground);
                    }
                    Aside::Proclaim { .. } => ground.did(Operation::StaleProclaimRefused),
                    Aside::StaleRelease => ground.did(Operation::StaleReleaseRefused),
                    Aside::UndoneRelease => ground.did(Operation::UndoneReleaseRefused),
                    Aside::Check { .. } | Aside::OldRenewal { .. } => {}
                }
            }
            _ => {}
        }
    }

    /// It has held long enough: it undoes one acquire, or begins another.
    pub(super) fn give_up(&mut self, ground: &mut Ground) {
        let (Step::Hold(holding), Some(session)) = (&self.step, &mut self.session) else {
            return;
        };
        if ground.troubled() && ground.rng.chance(10_000) {
            return self.die(ground);
        }
        let mut holding = holding.clone();
        self.link.begins(ground);
        let again = match holding.is_reentrant {
            Some(false) => 50_000,
            _ => 300_000,
        };
        if !ground.draining && holding.entries.len() < SHARED_MAX && ground.rng.chance(again) {
            return self.begin_acquire(Some(holding), ground);
        }
        // By its number, or the newest.
        let place = ground.rng.index(holding.entries.len());
        let entry = match ground.rng.chance(500_000) {
            true => holding.entries.remove(place),
            false => {
                holding.undone = holding.entries.pop();
                0
            }
        };
        if entry != 0 {
            holding.undone = Some(entry);
        }
        let left = holding.entries.len();
        if left == 0 {
            let (lock, token) = (holding.lock, holding.token);
            ground.checks.one_holder.gives_up(lock, token);
            ground.checks.lock_delay.gives_up(lock, token);
        }
        let request = session.requests.begin();
        self.step = Step::Release(Releasing {
            holding,
            entry,
            request,
            left,
        });
        self.release(ground);
    }

    /// With this number; 0 for none.
    fn release_of(&self, lock: usize, token: u64, entry: u64, request: u64) -> command::Body {
        if let Some(resignation) = self.resignation_of(lock, token, request) {
            return resignation;
        }
        let session = self.session.as_ref();
        let command = LockRelease {
            name: lock_name(lock),
            session_id: session.map_or(0, |session| session.id),
            owner: self.owner.clone(),
            token,
            entry,
            request: session.map(|session| internal(session.requests.number(request))),
        };
        conclave_primitives::command(primitive_command::Command::LockRelease(command))
    }

    pub(super) fn release(&mut self, ground: &mut Ground) {
        let (Step::Release(releasing), Some(session)) = (&self.step, &self.session) else {
            return;
        };
        let Holding { lock, token, .. } = releasing.holding;
        let (request, left) = (releasing.request, releasing.left);
        let about = About::Release {
            lock,
            token,
            session: session.id,
            request,
            left,
        };
        let body = self.release_of(lock, token, releasing.entry, request);
        let patience_us = ground.rng.between(200_000, 1_000_000);
        self.pending =
            Some(
                self.link
                    .call(CallBody::Command(body.clone()), about, patience_us, ground),
            );
        self.copy_sometimes(&body, about, ground);
    }

    pub(super) fn release_ended(&mut self, outcome: CallOutcome, ground: &mut Ground) {
        let Step::Release(releasing) = &self.step else {
            return;
        };
        let Holding { lock, token, .. } = releasing.holding;
        let (request, left) = (releasing.request, releasing.left);
        match without_answer(outcome).next() {
            Next::Repeat => return,
            Next::Done(Ok(())) if left == 0 => {
                ground.did(Operation::Released);
                self.released = Some((lock, token));
            }
            Next::Done(Ok(())) => ground.did(Operation::ReleasedOneOfSeveral),
            Next::Done(Err(refusal)) => {
                if let Refusal::Rejected(Rejection::NotHolder { .. }) = refusal {
                    self.denied(token, "its release is refused", ground);
                }
                self.lose_grant(token, ground);
            }
        }
        if let Some(session) = &mut self.session {
            session.requests.end(request);
        }
        self.link.served(ground);
        match &self.step {
            Step::Release(releasing) if !releasing.holding.entries.is_empty() => {
                let holding = releasing.holding.clone();
                self.hold(holding, ground);
            }
            _ => self.rest_a_little(ground),
        }
    }
}
