//! A client of plain keys: writes, reads, transactions and compactions of all forms on a
//! few keys, each judged when it returns.

mod generate;

use bytes::Bytes;
use conclave_client::requests::Outcome;
use conclave_core::{
    ids::Revision,
    keyspace::{Piece, txn::TxnError},
    replica::{Answer, AnswerBody, Query},
};
use conclave_primitives::Primitives;
use conclave_proto::internal::Compare;

use self::generate::{Drawn, draw};
use super::{
    ground::{About, CallBody, Ground, Reply},
    link::{Pending, outcome},
    pace::{Pace, Paced},
    tally::Operation as Counted,
};
use crate::checkers::{Verdict, serializable::Asked};

/// See the module.
#[derive(Debug)]
pub(crate) struct KvClient {
    pace: Pace<UnderWay>,
}

/// What a call asks.
#[derive(Debug)]
pub(crate) enum UnderWay {
    Command(Counted),
    Range(Reading),
    Compare {
        compares: Vec<Compare>,
        is_local: bool,
    },
}

/// A read, which may take several calls.
#[derive(Debug)]
pub(crate) struct Reading {
    /// Of this call.
    asked: Asked,
    /// Of what one member has applied.
    is_local: bool,
    /// Goes on where a call has come to its limit, at the revision of the first.
    in_pieces: bool,
    pieces: u32,
}

impl KvClient {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        let pace = Pace::new(actor, ground);
        Self { pace }
    }

    fn read(&mut self, reading: Reading, ground: &mut Ground) {
        let query = generate::query(&reading.asked);
        let body = query_of(query, reading.is_local);
        self.call(body, UnderWay::Range(reading), ground);
    }

    fn call(&mut self, body: CallBody, under_way: UnderWay, ground: &mut Ground) {
        self.pace.call(body, About::Other, under_way, ground);
    }
}

impl Paced for KvClient {
    type Call = UnderWay;

    fn pace(&mut self) -> &mut Pace<Self::Call> {
        &mut self.pace
    }

    fn begin(&mut self, ground: &mut Ground) {
        self.pace.wander(ground);
        let value = self.pace.fresh_value();
        let newest = ground.checks.serializable.model.revision();
        match draw(&mut ground.rng, value, newest) {
            Drawn::Command(body, counted) => {
                self.call(CallBody::Command(body), UnderWay::Command(counted), ground);
            }
            Drawn::Range {
                asked,
                is_local,
                in_pieces,
            } => self.read(
                Reading {
                    asked,
                    is_local,
                    in_pieces,
                    pieces: 0,
                },
                ground,
            ),
            Drawn::Compare { compares, is_local } => {
                let query = Query::Compare(compares.clone());
                let under_way = UnderWay::Compare { compares, is_local };
                self.call(query_of(query, is_local), under_way, ground);
            }
        }
    }

    fn ended(&mut self, under_way: UnderWay, pending: Pending, reply: Reply, ground: &mut Ground) {
        let (outcome, hint) = outcome(reply);
        let Outcome::Answered(answer) = outcome else {
            return self.pace.failed(hint, ground);
        };
        let verdict = judge(&under_way, pending, &answer, ground);
        ground.checks.note(verdict);
        ground.did(counted(&under_way, &answer));
        self.pace.link.served(ground);
        if let UnderWay::Range(reading) = under_way
            && let AnswerBody::Range(Ok(piece)) = &answer.body
            && let Some(next) = next_piece(reading, piece, answer.revision)
        {
            return self.read(next, ground);
        }
        let rest_us = ground.rng.skewed(30_000);
        self.pace.rest(rest_us, ground);
    }
}

fn query_of(query: Query<Primitives>, is_local: bool) -> CallBody {
    match is_local {
        true => CallBody::LocalRead(query),
        false => CallBody::Read(query),
    }
}

/// A command was judged where it was answered, but for its time.
fn judge(
    under_way: &UnderWay,
    pending: Pending,
    answer: &Answer<Primitives>,
    ground: &Ground,
) -> Verdict {
    let checker = &ground.checks.serializable;
    let revision = answer.revision;
    let is_local = match under_way {
        UnderWay::Command(_) => false,
        UnderWay::Range(reading) => reading.is_local,
        UnderWay::Compare { is_local, .. } => *is_local,
    };
    let compacted = match is_local {
        true => {
            checker.exists(revision)?;
            0
        }
        false => {
            checker.in_real_time(pending.newest, revision)?;
            pending.compacted
        }
    };
    match (under_way, &answer.body) {
        (UnderWay::Range(reading), AnswerBody::Range(told)) => {
            checker.read(&reading.asked, revision, compacted, told)
        }
        (UnderWay::Compare { compares, .. }, AnswerBody::Compared(Ok(held))) => {
            checker.compared(compares, revision, *held)
        }
        _ => Ok(()),
    }
}

fn counted(under_way: &UnderWay, answer: &Answer<Primitives>) -> Counted {
    match (under_way, &answer.body) {
        (_, AnswerBody::Txn(Err(TxnError::Revision(_))) | AnswerBody::Range(Err(_))) => {
            Counted::RevisionRefused
        }
        (_, AnswerBody::Txn(Err(_)) | AnswerBody::Operation(Err(_))) => Counted::TxnRefused,
        (UnderWay::Command(counted), _) => *counted,
        (UnderWay::Range(reading), _) if reading.pieces > 0 => Counted::ReadInPieces,
        (UnderWay::Range(reading), _) if reading.is_local => Counted::ReadLocally,
        (UnderWay::Range(reading), _) if reading.asked.at.is_some() => Counted::ReadPast,
        (UnderWay::Range(_), _) => Counted::RangeRead,
        (UnderWay::Compare { .. }, _) => Counted::Compared,
    }
}

/// What is left, from what the same member has applied.
fn next_piece(reading: Reading, piece: &Piece, revision: Revision) -> Option<Reading> {
    let last = piece.records.last()?;
    if !reading.in_pieces || piece.records.len() < reading.asked.limit {
        return None;
    }
    let behind = Bytes::from([&last.key[..], &[0]].concat());
    Some(Reading {
        asked: Asked {
            start: behind,
            at: reading.asked.at.or(Some(revision)),
            ..reading.asked
        },
        is_local: true,
        pieces: reading.pieces + 1,
        ..reading
    })
}
