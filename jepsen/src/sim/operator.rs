//! An operator: now and then lists locks, takes one from its holder, or gives up
//! old history.

use conclave_client::requests::Outcome;
use conclave_core::replica::{Answer, AnswerBody, Query};
use conclave_primitives::{Answer as LockAnswer, Query as LockQuery, Rejection};
use conclave_proto::internal::{Compact, LockForceRelease, NoSpace, command, primitive_command};

use super::{
    checks::lock_name,
    ground::{About, CallBody, Ground, Reply},
    link::{Pending, Refusal, outcome},
    pace::{Pace, Paced},
    tally::Operation,
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Operator {
    pace: Pace<()>,
    /// The newest revision it was told of.
    revision: u64,
    /// What it does next about the alarm.
    made_room: bool,
}

impl Operator {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        let settings = &ground.settings;
        let until_us = match settings.is_scarce() {
            // Without room, what others have begun never ends.
            true => settings.end_us.saturating_sub(2_000_000),
            false => settings.drain_us,
        };
        Self {
            pace: Pace::within(actor, 1_000_000, until_us, ground),
            revision: 0,
            made_room: false,
        }
    }
}

impl Paced for Operator {
    type Call = ();

    fn pace(&mut self) -> &mut Pace<Self::Call> {
        &mut self.pace
    }

    fn begin(&mut self, ground: &mut Ground) {
        let name = lock_name(ground.rng.index(ground.settings.locks));
        let body = if !self.made_room && !ground.draining && ground.rng.chance(300_000) {
            let reason = "taken by the operator".to_owned();
            let force = LockForceRelease {
                name,
                reason,
                token: 0,
                skip_delay: ground.rng.chance(500_000),
            };
            let force = primitive_command::Command::LockForceRelease(force);
            CallBody::Command(conclave_primitives::command(force))
        } else if ground.settings.is_scarce()
            && (self.made_room || ground.draining || ground.rng.chance(600_000))
        {
            // First room is made, then the alarm is cleared.
            let revision = self.revision;
            self.made_room = !self.made_room;
            CallBody::Command(match self.made_room {
                true => command::Body::Compact(Compact { revision }),
                false => command::Body::NoSpace(NoSpace {
                    raised: false,
                    member: 0,
                }),
            })
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
        self.pace
            .call_for(1_000_000, body, About::Other, (), ground);
    }

    fn ended(&mut self, (): (), _: Pending, reply: Reply, ground: &mut Ground) {
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
            (
                Outcome::Answered(Answer {
                    body: AnswerBody::Alarms(_),
                    ..
                }),
                _,
            ) => ground.did(Operation::Disarmed),
            (Outcome::Answered(_) | Outcome::Refused(Refusal::Rejected(Rejection::NotHeld)), _) => {
            }
            (_, hint) => self.pace.not_served(hint, ground),
        }
        self.pace.link.served(ground);
        let rest_us = match ground.settings.is_scarce() {
            true => ground.rng.between(50_000, 500_000),
            false => ground.rng.between(200_000, 1_500_000),
        };
        self.pace.rest(rest_us, ground);
    }
}
