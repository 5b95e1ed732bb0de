//! Commands and reads of plain keys are strictly serializable.
//!
//! The commands that were committed, in their order, are one history, and a model
//! ([`Model`]) runs it. Every write has a revision and every answer has one, so that the
//! place of each in that history is known, and nothing has to be searched for:
//!
//! - a committed command does to the keys what it does to those of the model, and its
//!   answer is the model's, at the same revision. Who was told that it certainly was not
//!   applied is told the truth;
//! - what a read gives is what there was at the revision that its answer carries;
//! - that revision is not below the newest one that was committed, as far as any member
//!   knew, before the operation was called: so not below that of any that had completed.
//!   It is not above the newest when it returned. The first of these does not hold for
//!   reads of what one member has applied, and only for them;
//! - a past revision is read as it was, until it is compacted and refused.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    keyspace::{Event, Piece, RevisionError},
};
use conclave_proto::internal::{Compare, command};

use super::{
    Verdict, broken,
    model::{Model, Outcome, in_order},
};

const NAME: &str = "serializable";

/// Names a command: its node, the start of its process, and its number there.
pub(crate) type Origin = (u64, u64, u64);

/// What is asked of a range.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) start: Bytes,
    pub(crate) end: Bytes,
    /// `None`: of now.
    pub(crate) at: Option<Revision>,
    pub(crate) limit: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Serializable {
    pub(crate) model: Model,
    /// What committed commands came to that have not been answered, and maybe never are.
    outcomes: BTreeMap<Origin, (Revision, Outcome)>,
    refused: BTreeSet<Origin>,
}

impl Serializable {
    /// A command on plain keys was committed: the state it ran on has come to this
    /// revision with it, and `events` says what a revision did there.
    pub(crate) fn committed(
        &mut self,
        origin: Option<Origin>,
        body: &command::Body,
        revision: Revision,
        events: impl FnOnce(Revision) -> Vec<Event>,
    ) -> Verdict {
        let before = self.model.revision();
        let Some(outcome) = self.model.execute(body) else {
            return Ok(());
        };
        let expected = self.model.revision();
        if expected != revision {
            return broken(
                NAME,
                format!("{body:?} led from {before} to {revision}, and not to {expected}"),
            );
        }
        if expected > before {
            self.same_events(NAME, events(revision))?;
        }
        let Some(origin) = origin else { return Ok(()) };
        if self.refused.contains(&origin) {
            return broken(NAME, format!("{origin:?} was applied after it was refused"));
        }
        self.outcomes.insert(origin, (revision, outcome));
        Ok(())
    }

    /// The events of the newest revision are these.
    pub(crate) fn same_events(&self, checker: &'static str, mut events: Vec<Event>) -> Verdict {
        in_order(&mut events);
        let revision = self.model.revision();
        let expected = self.model.events_of(revision);
        if events == expected {
            return Ok(());
        }
        broken(
            checker,
            format!("revision {revision} did {events:?}, and not {expected:?}"),
        )
    }

    /// A command was answered with what it came to at this revision; `None` if that is
    /// nothing that commands on plain keys come to.
    pub(crate) fn answered(
        &mut self,
        origin: Origin,
        revision: Revision,
        told: Option<Outcome>,
    ) -> Verdict {
        let known = self.outcomes.remove(&origin);
        let told = told.map(|told| (revision, told));
        if known == told || (known.is_none() && matches!(told, Some((_, Outcome::NoSpace)))) {
            return Ok(());
        }
        broken(NAME, format!("{told:?} is told where it was {known:?}"))
    }

    /// A client is told that a command certainly has not been and will not be applied.
    pub(crate) fn refused(&mut self, origin: Origin) -> Verdict {
        if self.outcomes.contains_key(&origin) {
            return broken(NAME, format!("{origin:?} is refused, and was applied"));
        }
        self.refused.insert(origin);
        Ok(())
    }

    /// An operation that was called when `floor` was the newest revision returns with
    /// this one.
    pub(crate) fn in_real_time(&self, floor: Revision, revision: Revision) -> Verdict {
        if revision < floor {
            return broken(
                NAME,
                format!("answered at {revision}, and called when there was {floor}"),
            );
        }
        self.exists(revision)
    }

    /// The same of a read that needs not be of the newest.
    pub(crate) fn exists(&self, revision: Revision) -> Verdict {
        let newest = self.model.revision();
        if revision > newest {
            return broken(
                NAME,
                format!("answered at {revision}, and {newest} is newest"),
            );
        }
        Ok(())
    }

    /// A range was read at a revision, which is that of the answer. `compacted` is what
    /// was compacted when it was called, as far as it must be known.
    pub(crate) fn read(
        &self,
        asked: &Asked,
        revision: Revision,
        compacted: Revision,
        told: &Result<Piece, RevisionError>,
    ) -> Verdict {
        let at = asked.at.unwrap_or(revision);
        let error = match told {
            Ok(piece) if piece.next.is_some() || at < compacted || at > revision => {
                let what = format!("{asked:?} at {revision}, {compacted} compacted, is {told:?}");
                return broken(NAME, what);
            }
            Ok(piece) => {
                let seen = self.model.seen(&asked.start, &asked.end, at, asked.limit);
                if piece.records == seen.records && piece.count == seen.count {
                    return Ok(());
                }
                return broken(
                    NAME,
                    format!("{asked:?} at {revision} is {piece:?}, and was {seen:?}"),
                );
            }
            Err(error) => error,
        };
        let is_true = match *error {
            RevisionError::Compacted { asked, compacted } => {
                asked == at && asked < compacted && compacted <= self.model.compacted()
            }
            RevisionError::Future { asked, newest } => {
                asked == at && asked > newest && newest == revision
            }
        };
        match is_true {
            true => Ok(()),
            false => broken(NAME, format!("{asked:?} at {revision} is refused: {error}")),
        }
    }

    /// The keys that were bound to a session at a revision, in order.
    pub(crate) fn bound(&self, session: SessionId, revision: Revision, told: &[Bytes]) -> Verdict {
        let bound = self.model.bound(session, revision);
        if bound == told {
            return Ok(());
        }
        broken(
            NAME,
            format!("{session} has {told:?} at {revision}, and had {bound:?}"),
        )
    }

    /// Compares were made at a revision, which is that of the answer.
    pub(crate) fn compared(&self, compares: &[Compare], revision: Revision, held: bool) -> Verdict {
        if self.model.compare(compares, revision) == held {
            return Ok(());
        }
        broken(
            NAME,
            format!("{compares:?} at {revision} came to {held}, and should not"),
        )
    }
}

#[cfg(test)]
mod tests {
    use conclave_core::keyspace::{
        Record,
        txn::{OperationReply, TxnReply},
    };
    use conclave_proto::internal::{Compact, DeleteRange, Put, command::Body, compare::Target};

    use super::*;

    fn put(key: &'static str, value: &'static str) -> Body {
        Body::Put(Put {
            key: key.into(),
            value: value.into(),
            ..Put::default()
        })
    }

    fn record(
        key: &'static str,
        value: &'static str,
        created: u64,
        at: u64,
        version: u64,
    ) -> Record {
        Record {
            key: key.into(),
            value: value.into(),
            create_revision: created,
            mod_revision: at,
            version,
            lease: None,
        }
    }

    fn made(record: Record, before: Option<Record>) -> Vec<Event> {
        vec![Event {
            key: record.key.clone(),
            revision: record.mod_revision,
            before,
            after: Some(record),
        }]
    }

    /// `a` is 1 at revision 2 and 2 at revision 3, and `b` is 1 at revision 4.
    fn history() -> Serializable {
        let mut checker = Serializable::default();
        let first = record("a", "1", 2, 2, 1);
        let second = record("a", "2", 2, 3, 2);
        let other = record("b", "1", 4, 4, 1);
        let steps = [
            (put("a", "1"), 2, made(first.clone(), None)),
            (put("a", "2"), 3, made(second, Some(first))),
            (put("b", "1"), 4, made(other, None)),
        ];
        for (body, revision, events) in steps {
            let origin = Some((1, 1, revision));
            checker
                .committed(origin, &body, revision, |_| events)
                .unwrap();
        }
        checker
    }

    fn asked(at: Option<Revision>) -> Asked {
        Asked {
            start: "a".into(),
            end: Bytes::from_static(b"\0"),
            at,
            limit: 9,
        }
    }

    fn piece(records: Vec<Record>) -> Result<Piece, RevisionError> {
        Ok(Piece {
            count: records.len() as u64,
            records,
            ..Piece::default()
        })
    }

    #[test]
    fn finds_a_write_that_did_something_else_or_nothing() {
        let delete = Body::DeleteRange(DeleteRange {
            key: "a".into(),
            end: "c".into(),
            previous: false,
        });
        let gone = |key: &'static str, before| Event {
            key: key.into(),
            revision: 5,
            before: Some(before),
            after: None,
        };
        let one = gone("a", record("a", "2", 2, 3, 2));
        let all = vec![one.clone(), gone("b", record("b", "1", 4, 4, 1))];
        history().committed(None, &delete, 5, |_| all).unwrap();
        let verdict = history().committed(None, &delete, 5, |_| vec![one]);
        assert_eq!(verdict.unwrap_err().checker, "serializable");
        let verdict = history().committed(None, &delete, 4, |_| vec![]);
        assert!(verdict.is_err());
    }

    #[test]
    fn finds_an_answer_that_is_another() {
        let told = || Some(Outcome::Operation(Ok(OperationReply::Put(None))));
        history().answered((1, 1, 3), 3, told()).unwrap();
        assert!(history().answered((1, 1, 3), 4, told()).is_err());
        assert!(
            history().answered((1, 1, 9), 4, told()).is_err(),
            "never applied"
        );
        let mut twice = history();
        twice.answered((1, 1, 3), 3, told()).unwrap();
        assert!(twice.answered((1, 1, 3), 3, told()).is_err());
    }

    #[test]
    fn finds_a_refused_command_that_is_applied() {
        let mut checker = history();
        assert!(checker.refused((1, 1, 2)).is_err());
        checker.refused((1, 1, 9)).unwrap();
        let events = made(record("c", "1", 5, 5, 1), None);
        let verdict = checker.committed(Some((1, 1, 9)), &put("c", "1"), 5, |_| events);
        assert!(verdict.is_err());
    }

    #[test]
    fn finds_a_read_of_what_was_not_there() {
        let checker = history();
        let old = vec![record("a", "1", 2, 2, 1)];
        checker
            .read(&asked(Some(2)), 4, 0, &piece(old.clone()))
            .unwrap();
        checker
            .read(&asked(None), 2, 0, &piece(old.clone()))
            .unwrap();
        assert!(
            checker
                .read(&asked(None), 4, 0, &piece(old.clone()))
                .is_err()
        );
        assert!(checker.read(&asked(Some(2)), 4, 3, &piece(old)).is_err());
    }

    #[test]
    fn finds_a_read_that_is_older_than_its_call_or_newer_than_anything() {
        let checker = history();
        checker.in_real_time(3, 4).unwrap();
        assert!(checker.in_real_time(4, 3).is_err());
        assert!(checker.in_real_time(4, 5).is_err());
        checker.exists(1).unwrap();
    }

    #[test]
    fn finds_a_refusal_for_no_reason() {
        let mut checker = history();
        let gone = |asked, compacted| Err(RevisionError::Compacted { asked, compacted });
        assert!(checker.read(&asked(Some(2)), 4, 0, &gone(2, 3)).is_err());
        let compact = Body::Compact(Compact { revision: 3 });
        checker.committed(None, &compact, 4, |_| vec![]).unwrap();
        checker.read(&asked(Some(2)), 4, 0, &gone(2, 3)).unwrap();
        let future = |newest| Err(RevisionError::Future { asked: 9, newest });
        checker.read(&asked(Some(9)), 4, 0, &future(4)).unwrap();
        assert!(checker.read(&asked(Some(9)), 4, 0, &future(3)).is_err());
    }

    #[test]
    fn finds_a_compare_of_what_was_not_there() {
        let compare = Compare {
            key: "a".into(),
            target: Some(Target::Value("2".into())),
            ..Compare::default()
        };
        let compares = [compare];
        history().compared(&compares, 3, true).unwrap();
        assert!(history().compared(&compares, 2, true).is_err());
    }

    #[test]
    fn a_transaction_that_only_reads_has_no_revision_of_its_own() {
        let body = Body::Txn(conclave_proto::internal::Txn::default());
        let mut checker = history();
        checker
            .committed(Some((1, 1, 9)), &body, 4, |_| vec![])
            .unwrap();
        let reply = TxnReply {
            succeeded: true,
            results: vec![],
        };
        let told = Some(Outcome::Txn(Ok(reply)));
        checker.answered((1, 1, 9), 4, told).unwrap();
    }
}
