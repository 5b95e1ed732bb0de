//! A client that reads and writes plain keys, for the check of linearizability.
//!
//! A key is in use for a few seconds only, so that what has an unknown outcome
//! is a handful for each key.

use bytes::Bytes;
use conclave_client::requests::Outcome;
use conclave_core::{
    keyspace::{
        Filter, KeyRange,
        txn::{OperationReply, TxnReply},
    },
    replica::{Answer, AnswerBody, Query},
};
use conclave_proto::internal::{
    Compare, DeleteRange, Operation as TxnOperation, Put, Range, Txn, command,
    compare::{Result as Relation, Target},
    operation::Operation as Kind,
};

use super::{
    checks::{register_key, register_value},
    ground::{About, CallBody, Ground, Reply},
    link::{CallOutcome, Pending, outcome},
    pace::{Pace, Paced},
    tally::Operation as Counted,
};
use crate::checkers::linearizable::{ABSENT, Action, Operation};

/// How long a key is in use.
const KEY_US: u64 = 4_000_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct RegisterClient {
    pace: Pace<(u64, Action)>,
    /// The register, of which there are a few.
    register: u64,
    /// The key and value last seen.
    seen: (u64, u64),
}

impl RegisterClient {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        Self {
            pace: Pace::new(actor, ground),
            register: actor as u64 % ground.settings.registers,
            seen: (0, ABSENT),
        }
    }
}

impl Paced for RegisterClient {
    /// A key, and what is done to it.
    type Call = (u64, Action);

    fn pace(&mut self) -> &mut Pace<Self::Call> {
        &mut self.pace
    }

    fn begin(&mut self, ground: &mut Ground) {
        self.pace.wander(ground);
        let key = self.register * 1_000_000 + ground.now_us / KEY_US;
        if self.seen.0 != key {
            self.seen = (key, ABSENT);
        }
        let (body, action) = match ground.rng.below(100) {
            0..45 => (read(key), Action::Read(ABSENT)),
            45..65 => {
                let new = self.pace.fresh_value();
                (write(key, new), Action::Write(new))
            }
            65..70 => {
                let new = self.pace.fresh_value();
                let put = command::Body::Put(put_of(key, new));
                (CallBody::Command(put), Action::Write(new))
            }
            70..75 => {
                let alone = ground.rng.chance(500_000);
                (delete(key, alone), Action::Write(ABSENT))
            }
            _ => {
                let (old, new) = (self.seen.1, self.pace.fresh_value());
                (swap(key, old, new), Action::Swap { old, new })
            }
        };
        self.pace.call(body, About::Other, (key, action), ground);
    }

    fn ended(
        &mut self,
        (key, action): (u64, Action),
        pending: Pending,
        reply: Reply,
        ground: &mut Ground,
    ) {
        let (outcome, hint) = outcome(reply);
        judge(&outcome, pending, ground);
        let returned = |action| {
            Some(Operation {
                called_us: pending.sent_us,
                returned_us: Some(ground.now_us),
                action,
            })
        };
        let operation = match (action, outcome) {
            (
                Action::Read(_),
                Outcome::Answered(Answer {
                    body: AnswerBody::Range(Ok(piece)),
                    ..
                }),
            ) => {
                let value = piece
                    .records
                    .first()
                    .map_or(ABSENT, |record| register_value(&record.value));
                returned(Action::Read(value))
            }
            (
                Action::Write(_),
                Outcome::Answered(Answer {
                    body: AnswerBody::Txn(Ok(_)) | AnswerBody::Operation(Ok(_)),
                    ..
                }),
            ) => returned(action),
            (
                Action::Swap { .. },
                Outcome::Answered(Answer {
                    body: AnswerBody::Txn(Ok(reply)),
                    ..
                }),
            ) => returned(found_instead(&reply).map_or(action, Action::Read)),
            (Action::Write(_) | Action::Swap { .. }, Outcome::Unknown) => Some(Operation {
                called_us: pending.sent_us,
                returned_us: None,
                action,
            }),
            _ => None,
        };
        let Some(operation) = operation else {
            return self.pace.failed(hint, ground);
        };
        ground.checks.linearizable.record(key, operation);
        if operation.returned_us.is_none() {
            return self.pace.failed(hint, ground);
        }
        self.seen = match operation.action {
            Action::Read(value) | Action::Write(value) => (key, value),
            Action::Swap { new, .. } => (key, new),
        };
        ground.did(counted(action, operation.action));
        self.pace.link.served(ground);
        let rest_us = ground.rng.skewed(20_000);
        self.pace.rest(rest_us, ground);
    }
}

/// What was asked, and what came of it.
fn counted(asked: Action, done: Action) -> Counted {
    match (asked, done) {
        (Action::Swap { .. }, Action::Read(_)) => Counted::SwapMissed,
        (_, Action::Read(_)) => Counted::Get,
        (_, Action::Write(ABSENT)) => Counted::Delete,
        (_, Action::Write(_)) => Counted::Put,
        (_, Action::Swap { .. }) => Counted::Swapped,
    }
}

/// An answer is not of the time before its call.
fn judge(outcome: &CallOutcome, pending: Pending, ground: &mut Ground) {
    if let Outcome::Answered(answer) = outcome {
        let checker = &ground.checks.serializable;
        let verdict = checker.in_real_time(pending.newest, answer.revision);
        ground.checks.note(verdict);
    }
}

fn read(key: u64) -> CallBody {
    let range = KeyRange::single(register_key(key));
    CallBody::Read(Query::Range {
        range,
        revision: None,
        filter: Filter::default(),
        limit: 1,
    })
}

fn write(key: u64, value: u64) -> CallBody {
    let success = vec![put(key, value)];
    CallBody::Command(command::Body::Txn(Txn {
        success,
        ..Txn::default()
    }))
}

/// Puts `new` if the value is `old`; else says what it is.
fn swap(key: u64, old: u64, new: u64) -> CallBody {
    let target = match old {
        ABSENT => Target::Version(0),
        old => Target::Value(old.to_string().into()),
    };
    let compare = Compare {
        key: register_key(key),
        result: Relation::Equal.into(),
        target: Some(target),
        ..Compare::default()
    };
    let range = Range {
        key: register_key(key),
        ..Range::default()
    };
    CallBody::Command(command::Body::Txn(Txn {
        compares: vec![compare],
        success: vec![put(key, new)],
        failure: vec![TxnOperation {
            operation: Some(Kind::Range(range)),
        }],
    }))
}

fn put(key: u64, value: u64) -> TxnOperation {
    TxnOperation {
        operation: Some(Kind::Put(put_of(key, value))),
    }
}

fn put_of(key: u64, value: u64) -> Put {
    Put {
        key: register_key(key),
        value: value.to_string().into(),
        ..Put::default()
    }
}

/// Deletes a key, alone or as the one in a range.
fn delete(key: u64, alone: bool) -> CallBody {
    let key = register_key(key);
    let end = match alone {
        true => Bytes::new(),
        false => [&key[..], &[0]].concat().into(),
    };
    let previous = false;
    CallBody::Command(command::Body::DeleteRange(DeleteRange {
        key,
        end,
        previous,
    }))
}

/// What a swap found that did not fit.
fn found_instead(reply: &TxnReply) -> Option<u64> {
    if reply.succeeded {
        return None;
    }
    match reply.results.first() {
        Some(OperationReply::Range(found)) => Some(
            found
                .records
                .first()
                .map_or(ABSENT, |record| register_value(&record.value)),
        ),
        _ => Some(ABSENT),
    }
}
