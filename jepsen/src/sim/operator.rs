//! An operator: now and then lists locks, takes one from its holder, or gives up
//! old history.

use conclave_client::requests::Outcome;
use conclave_core::replica::{Answer, AnswerBody, Query};
use conclave_primitives::{Answer as LockAnswer, Query as LockQuery, Rejection};
use conclave_proto::internal::{Compact, LockForceRelease, command, primitive_command};

use super::{
    alarm::{Alarm, Owner},
    checks::lock_name,
    ground::{About, CallBody, Ground, Reply},
    link::{Link, Pending, Refusal, outcome},
    tally::Operation,
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Operator {
    link: Link,
    alarm: Alarm,
    pending: Option<Pending>,
    next_us: u64,
    /// The newest revision it was told of.
    revision: u64,
}

impl Operator {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        let mut operator = Self {
            link: Link::new(actor, ground),
            alarm: Alarm::new(Owner::Actor(actor)),
            pending: None,
            next_us: 1_000_000,
            revision: 0,
        };
        operator.alarm.set(operator.next_us, ground);
        operator
    }

    pub(crate) fn wake(&mut self, ground: &mut Ground) {
        if !self.alarm.rings(ground) {
            return;
        }
        match self.pending {
            Some(pending) if pending.until_us <= ground.now_us => {
                self.link.abandon(pending, ground);
                self.ended(Reply::Broken, ground);
            }
            None if self.next_us <= ground.now_us && !ground.draining => self.begin(ground),
            _ => {}
        }
        self.rearm(ground);
    }

    pub(crate) fn hear(&mut self, id: u64, reply: Reply, ground: &mut Ground) {
        if self.pending.is_some_and(|pending| pending.id == id) {
            self.ended(reply, ground);
            self.rearm(ground);
        }
    }

    fn rearm(&mut self, ground: &mut Ground) {
        let at_us = match self.pending {
            Some(pending) => pending.until_us,
            None if ground.draining => return,
            None => self.next_us,
        };
        self.alarm.set(at_us, ground);
    }

    fn begin(&mut self, ground: &mut Ground) {
        ground
            .checks
            .liveness
            .begins(self.link.actor, ground.now_us);
        let name = lock_name(ground.rng.index(ground.settings.locks));
        let body = if ground.rng.chance(300_000) {
            let reason = "taken by the operator".to_owned();
            let force = LockForceRelease {
                name,
                reason,
                token: 0,
                skip_delay: ground.rng.chance(500_000),
            };
            let force = primitive_command::Command::LockForceRelease(force);
            CallBody::Command(conclave_primitives::command(force))
        } else if ground.rng.chance(200_000) {
            // At times far too late, which is refused.
            let revision = self.revision.saturating_sub(ground.rng.below(300));
            CallBody::Command(command::Body::Compact(Compact { revision }))
        } else {
            let query = LockQuery::Locks {
                name: None,
                after: String::new(),
                limit: 0,
            };
            CallBody::Read(Query::Machine(query))
        };
        self.pending = Some(self.link.call(body, About::Other, 1_000_000, ground));
    }

    fn ended(&mut self, reply: Reply, ground: &mut Ground) {
        self.pending = None;
        let outcome = outcome(reply);
        if let Outcome::Answered(answer) = &outcome.0 {
            self.revision = answer.revision;
        }
        match outcome {
            (
                Outcome::Answered(Answer {
                    body: AnswerBody::Machine(_),
                    ..
                }),
                _,
            ) => ground.did(Operation::ForceReleased),
            (
                Outcome::Answered(Answer {
                    body: AnswerBody::Query(LockAnswer::Locks { .. }),
                    ..
                }),
                _,
            ) => {
                ground.did(Operation::Listed);
            }
            (
                Outcome::Answered(Answer {
                    body: AnswerBody::Compacted(Ok(())),
                    ..
                }),
                _,
            ) => ground.did(Operation::Compacted),
            (Outcome::Answered(_) | Outcome::Refused(Refusal::Rejected(Rejection::NotHeld)), _) => {
            }
            (_, hint) => {
                ground.checks.liveness.gone(self.link.actor);
                self.link.move_on(hint, ground);
            }
        }
        ground
            .checks
            .liveness
            .completes(self.link.actor, ground.now_us);
        self.next_us = ground.now_us + ground.rng.between(200_000, 1_500_000);
    }
}
