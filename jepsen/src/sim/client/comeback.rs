//! A client that vanished comes back: with the id and the secret of its session it
//! asks how that stands, attaches, and renews; then it goes on with what it has.

use bytes::Bytes;
use conclave_client::{
    requests::{Acquire, Outcome, Requests},
    session_state::SessionState,
};
use conclave_core::{
    ids::{Attachment, SessionId},
    replica::{Answer, AnswerBody},
};
use conclave_primitives::{Answer as LockAnswer, Held, Waiting};
use conclave_proto::internal::{AttachSession, command};

use super::{Acquiring, Aside, Holding, LockClient, Session, Step};
use crate::sim::{
    checks::lock_name,
    ground::{About, CallBody, Ground},
    link::{CallOutcome, Pending},
    tally::{Fault, Operation},
};

/// What a client knew that vanished.
#[derive(Debug)]
pub(super) struct Before {
    pub(super) id: i64,
    pub(super) secret: Bytes,
}

/// A client that is back, and how far it is.
#[derive(Debug)]
pub(super) struct Attaching {
    before: Before,
    stage: Stage,
}

#[derive(Clone, Debug)]
enum Stage {
    Ask,
    Attach {
        replaces: u64,
        nonce: u64,
        wanted: Vec<u64>,
    },
    Renew(Has),
}

/// What it has since it attached.
#[derive(Clone, Debug)]
struct Has {
    attachment: u64,
    last_request: u64,
    ttl_ms: u64,
    wanted: Vec<u64>,
    grants: Vec<Held>,
    waiting: Vec<Waiting>,
}

impl Attaching {
    pub(super) fn begin(before: Before) -> Self {
        Self {
            before,
            stage: Stage::Ask,
        }
    }
}

impl LockClient {
    /// Sends the call of this stage.
    pub(super) fn attach(&mut self, ground: &mut Ground) {
        let Step::Attach(attaching) = &self.step else {
            return;
        };
        let Before { id, secret } = &attaching.before;
        let (id, secret) = (*id, secret.clone());
        let command = |replaces, nonce, wanted| {
            command::Body::AttachSession(AttachSession {
                session_id: id,
                secret,
                replaces,
                nonce,
                wanted,
            })
        };
        let patience_us = ground.rng.between(200_000, 1_000_000);
        let (body, about) = match attaching.stage.clone() {
            Stage::Ask => {
                self.link.begins(ground);
                (CallBody::Command(command(0, 0, vec![])), About::Attach)
            }
            Stage::Attach {
                replaces,
                nonce,
                wanted,
            } => {
                let body = command(replaces, nonce, wanted);
                self.copy_sometimes(&body, About::Attach, ground);
                (CallBody::Command(body), About::Attach)
            }
            Stage::Renew(has) => {
                let of = Attachment {
                    session: SessionId(id),
                    number: has.attachment,
                };
                (CallBody::Renew(of), About::Renew { session: id })
            }
        };
        self.pending = Some(self.link.call(body, about, patience_us, ground));
    }

    /// The call of this stage has ended.
    pub(super) fn attach_ended(
        &mut self,
        pending: Pending,
        outcome: CallOutcome,
        ground: &mut Ground,
    ) {
        let body = match outcome {
            Outcome::Answered(Answer { body, .. }) => body,
            // It is over.
            Outcome::Refused(_) => {
                self.step = Step::Open;
                return;
            }
            Outcome::NotApplied | Outcome::Unknown => return,
        };
        let Step::Attach(attaching) = &mut self.step else {
            return;
        };
        match (attaching.stage.clone(), body) {
            (
                Stage::Ask,
                AnswerBody::SessionAttached {
                    attachment,
                    holdings: LockAnswer::Grants { waiting, .. },
                    ..
                },
            ) => {
                let wanted = waiting.iter().map(|waiting| waiting.request);
                let wanted = wanted.filter(|_| ground.rng.chance(700_000)).collect();
                attaching.stage = Stage::Attach {
                    replaces: attachment,
                    nonce: ground.rng.next(),
                    wanted,
                };
            }
            (
                Stage::Attach { wanted, .. },
                AnswerBody::SessionAttached {
                    attachment,
                    last_request,
                    ttl_ms,
                    holdings:
                        LockAnswer::Grants {
                            grants, waiting, ..
                        },
                },
            ) => {
                attaching.stage = Stage::Renew(Has {
                    attachment,
                    last_request,
                    ttl_ms,
                    wanted,
                    grants,
                    waiting,
                });
            }
            (Stage::Renew(has), AnswerBody::Renewed { .. }) => {
                let (id, secret) = (attaching.before.id, attaching.before.secret.clone());
                self.is_back(id, secret, pending, has, ground);
            }
            _ => {}
        }
    }

    fn is_back(&mut self, id: i64, secret: Bytes, pending: Pending, has: Has, ground: &mut Ground) {
        let sent = self.clock.local(pending.sent_us);
        let state = SessionState::opened(sent, has.ttl_ms * 1_000);
        if state.lost_at(self.clock.local(ground.now_us)).is_some() {
            // The answer took so long that it cannot be trusted any more.
            self.step = Step::Open;
            return;
        }
        ground.tally.fault(Fault::ClientReturn);
        ground.did(Operation::SessionAttached);
        let mut requests = Requests::attached(has.attachment, has.last_request);
        let kept = has.waiting.iter().map(|waiting| waiting.request);
        kept.for_each(|request| requests.resume(request));
        self.session = Some(Session {
            id,
            secret,
            state,
            requests,
            wake_at: None,
        });
        ground.attach(id, self.link.actor, self.link.node);
        for waiting in &has.waiting {
            if !has.wanted.contains(&waiting.request) {
                let what = format!("{} waits still", waiting.request);
                let verdict = ground.checks.once.served(id, &what);
                ground.checks.note(verdict);
            }
        }
        self.ask_for_before(id, has.attachment, ground);
        match (has.grants.first(), has.waiting.first()) {
            (Some(held), _) => self.hold_again(held, ground),
            (None, Some(waiting)) => self.wait_again(waiting, ground),
            (None, None) => {
                self.link.served(ground);
                self.rest_a_little(ground);
            }
        }
    }

    /// What the process before it would still send: a renewal.
    fn ask_for_before(&mut self, session: i64, attachment: u64, ground: &mut Ground) {
        if ground.rng.chance(500_000) {
            let of = Attachment {
                session: SessionId(session),
                number: attachment - 1,
            };
            let call = self.link.send(CallBody::Renew(of), About::Other, ground);
            self.aside = Some((call, Aside::OldRenewal { session }));
        }
    }

    fn hold_again(&mut self, held: &Held, ground: &mut Ground) {
        let Held { grant, entries } = held;
        ground.did(match entries.len() {
            1 => Operation::GrantResumed,
            _ => Operation::SharedGrantResumed,
        });
        let (lock, token) = (lock_of(&grant.lock, ground), grant.token);
        self.believe(lock, token, ground);
        self.link.served(ground);
        let holding = Holding {
            lock,
            token,
            is_reentrant: (entries.len() > 1).then_some(true),
            entries: entries.clone(),
            undone: None,
            until_us: 0,
        };
        self.hold(holding, ground);
    }

    fn wait_again(&mut self, waiting: &Waiting, ground: &mut Ground) {
        ground.did(Operation::WaitResumed);
        self.step = Step::Acquire(Acquiring {
            lock: lock_of(&waiting.contends.lock, ground),
            acquire: Acquire::new(waiting.request),
            wait_ms: None,
            delay_ms: 0,
            is_reentrant: None,
            // It was sent before.
            attempts: 1,
            withdraw_us: u64::MAX,
            holding: None,
        });
    }
}

/// The number of a lock by its name.
pub(super) fn lock_of(name: &str, ground: &Ground) -> usize {
    let mut locks = 0..ground.settings.locks;
    locks
        .find(|lock| lock_name(*lock) == name)
        .expect("clients contend only for these")
}
