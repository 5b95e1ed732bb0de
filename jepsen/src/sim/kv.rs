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
    ground::{CallBody, Ground, Reply},
    link::{Due, Pace, Pending, outcome},
    tally::Operation as Counted,
};
use crate::checkers::{Verdict, serializable::Asked};

/// See the module.
#[derive(Debug)]
pub(crate) struct KvClient {
    pace: Pace,
    /// Values written so far; each is written once.
    values: u64,
    under_way: Option<UnderWay>,
}

/// What a call asks.
#[derive(Debug)]
enum UnderWay {
    Command(Counted),
    Range(Reading),
    Compare {
        compares: Vec<Compare>,
        is_local: bool,
    },
}

/// A read, which may take several calls.
#[derive(Debug)]
struct Reading {
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
        let begin_us = ground.rng.below(500_000);
        let until_us = ground.settings.drain_us;
        Self {
            pace: Pace::new(actor, begin_us, until_us, ground),
            values: 0,
            under_way: None,
        }
    }

    pub(crate) fn wake(&mut self, ground: &mut Ground) {
        match self.pace.wake(ground) {
            Some(Due::GiveUp(pending)) => self.ended(pending, Reply::Broken, ground),
            Some(Due::Begin) => self.begin(ground),
            None => {}
        }
    }

    pub(crate) fn hear(&mut self, id: u64, reply: Reply, ground: &mut Ground) {
        if let Some(pending) = self.pace.ended(id) {
            self.ended(pending, reply, ground);
        }
    }

    fn begin(&mut self, ground: &mut Ground) {
        if ground.rng.chance(50_000) {
            self.pace.link.move_on(None, ground);
        }
        self.values += 1;
        let value = (self.pace.link.actor as u64 + 1) << 32 | self.values;
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

    fn read(&mut self, reading: Reading, ground: &mut Ground) {
        let query = generate::query(&reading.asked);
        let body = query_of(query, reading.is_local);
        self.call(body, UnderWay::Range(reading), ground);
    }

    fn call(&mut self, body: CallBody, under_way: UnderWay, ground: &mut Ground) {
        let patience_us = ground.rng.between(200_000, 1_500_000);
        self.pace.begin(body, patience_us, ground);
        self.under_way = Some(under_way);
    }

    fn ended(&mut self, pending: Pending, reply: Reply, ground: &mut Ground) {
        let Some(under_way) = self.under_way.take() else {
            return;
        };
        let (outcome, hint) = outcome(reply);
        let Outcome::Answered(answer) = outcome else {
            return self.failed(hint, ground);
        };
        let verdict = judge(&under_way, pending, &answer, ground);
        ground.checks.note(verdict);
        ground.did(counted(&under_way, &answer));
        let actor = self.pace.link.actor;
        ground.checks.liveness.completes(actor, ground.now_us);
        if let UnderWay::Range(reading) = under_way
            && let AnswerBody::Range(Ok(piece)) = &answer.body
            && let Some(next) = next_piece(reading, piece, answer.revision)
        {
            return self.read(next, ground);
        }
        let rest_us = ground.rng.skewed(30_000);
        self.pace.rest(rest_us, ground);
    }

    fn failed(&mut self, hint: Option<usize>, ground: &mut Ground) {
        ground.did(Counted::Unknown);
        // Given up, not served: the next one counts as another.
        ground.checks.liveness.gone(self.pace.link.actor);
        self.pace.link.move_on(hint, ground);
        let rest_us = ground.rng.between(10_000, 100_000);
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
