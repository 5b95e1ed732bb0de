//! Transactions of clients on plain keys, with etcd's meaning: compares, and the
//! operations they choose, transactions inside them included.
//!
//! [`check`] and its like refuse what is wrong whatever the state is (`checks`). Whoever
//! proposes a transaction asks them first, and applying asks again. Then the state before
//! it says which branches run, and whether they can (`chosen`, `compares`, within the
//! bound of `visits`). What is left cannot fail (`run`).

mod checks;
mod chosen;
mod compares;
mod run;
mod visits;

use conclave_proto::internal::{DeleteRange, Put, Txn};

pub use self::{
    checks::{check, check_delete, check_put, check_range},
    chosen::check_state_for_range,
    compares::compare,
};
use self::{
    chosen::{branches, check_kept, check_session},
    run::{run_delete, run_put, run_txn},
};
use super::{Found, Overlay, Record, RevisionError};
use crate::{ids::SessionId, session::Sessions};

/// The result of a transaction.
#[derive(Clone, Debug, PartialEq)]
pub struct TxnReply {
    /// Whether the compares held.
    pub succeeded: bool,
    /// One for each operation that ran.
    pub results: Vec<OperationReply>,
}

/// The result of one operation. Where nobody asked, nothing is listed.
#[derive(Clone, Debug, PartialEq)]
pub enum OperationReply {
    /// Of a put: the version before.
    Put(Option<Record>),
    /// Of a delete.
    DeleteRange {
        /// How many keys were there.
        deleted: u64,
        /// What they were.
        previous: Vec<Record>,
    },
    /// Of a range.
    Range(Found),
    /// Of a transaction inside.
    Txn(TxnReply),
}

/// Why a transaction was refused. Nothing of it remains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TxnError {
    /// A compare or an operation names no key.
    #[error("key is empty")]
    EmptyKey,
    /// A branch puts a key twice, or puts one that it also deletes.
    #[error("duplicate key in one branch")]
    DuplicateKey,
    /// More operations than allowed, or transactions too deep inside others, or ranges
    /// that together are too long.
    #[error("too many operations")]
    TooManyOperations,
    /// A put that keeps the value gives one.
    #[error("a value is given, and another one to be kept")]
    ValueGiven,
    /// A put that keeps the session gives one.
    #[error("a session is given, and another one to be kept")]
    SessionGiven,
    /// A put that keeps something of a key that is not there.
    #[error("key is not there")]
    KeyNotFound,
    /// A put binds its key to a session that is not alive.
    #[error("session {0} is not alive")]
    SessionNotAlive(SessionId),
    /// A write to a key of the service.
    #[error("keys of the service are not for clients to write")]
    Reserved,
    /// A range asks for a revision that is compacted or yet to come.
    #[error(transparent)]
    Revision(#[from] RevisionError),
    /// A range asks for an order that there is not.
    #[error("unknown order")]
    UnknownOrder,
    /// An operation or compare of a kind that there is not.
    #[error("unknown operation")]
    UnknownOperation,
}

/// Runs a transaction. On `Err` the overlay must be dropped.
///
/// As in etcd, all compares are made against the state before it; what an operation
/// needs of that state is looked at before any of them runs; and operations see the
/// writes before them, except a range at a given revision, which sees that one. Compares
/// and operations over ranges may look at [`limits::TXN_VISITS_MAX`] records together, but
/// for an operation that is the only one of all these.
/// `answers` says whether anybody is to see what operations read: if not, ranges are
/// not walked.
///
/// [`limits::TXN_VISITS_MAX`]: crate::limits::TXN_VISITS_MAX
pub fn execute(
    overlay: &mut Overlay<'_>,
    sessions: &Sessions,
    txn: Txn,
    answers: bool,
) -> Result<TxnReply, TxnError> {
    check(&txn, usize::MAX)?;
    let chosen = branches(overlay.base(), sessions, &txn)?;
    Ok(run_txn(overlay, txn, chosen, answers))
}

/// Runs one put.
pub fn execute_put(
    overlay: &mut Overlay<'_>,
    sessions: &Sessions,
    put: Put,
) -> Result<OperationReply, TxnError> {
    check_put(&put)?;
    check_session(sessions, &put)?;
    check_kept(overlay.base(), &put)?;
    Ok(OperationReply::Put(run_put(overlay, put)))
}

/// Runs one delete; `answers` as for [`execute`].
pub fn execute_delete(
    overlay: &mut Overlay<'_>,
    delete: DeleteRange,
    answers: bool,
) -> Result<OperationReply, TxnError> {
    check_delete(&delete)?;
    Ok(run_delete(overlay, delete, answers))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use conclave_proto::internal::{
        Compare, Operation, Range,
        compare::{Result as Relation, Target},
        operation::Operation as Kind,
    };

    use super::*;
    use crate::{
        keyspace::{Keyspace, Picture},
        limits,
    };

    #[test]
    fn ranges_of_a_transaction_are_bounded_together() {
        let mut keyspace = Keyspace::new();
        let mut overlay = keyspace.overlay();
        let keys = limits::TXN_VISITS_MAX / 100;
        for number in 0..keys {
            overlay.put(format!("k{number}").into(), Bytes::new(), None);
        }
        let writes = overlay.into_writes();
        keyspace.keep(writes);
        let compare = Compare {
            key: "k".into(),
            end: "l".into(),
            target: Some(Target::Version(1)),
            ..Compare::default()
        };
        let run = |compares: usize, operations: Vec<Operation>, answers| {
            let txn = Txn {
                compares: vec![compare.clone(); compares],
                success: operations,
                ..Txn::default()
            };
            let sessions = Sessions::default();
            execute(&mut keyspace.overlay(), &sessions, txn, answers).map(|reply| reply.succeeded)
        };
        let too_many = Err(TxnError::TooManyOperations);
        assert_eq!(run(100, vec![], true), Ok(true));
        assert_eq!(run(101, vec![], true), too_many);
        assert_eq!(
            super::compare(&keyspace, &vec![compare.clone(); 100]),
            Ok(true)
        );
        assert_eq!(
            super::compare(&keyspace, &vec![compare.clone(); 101]),
            too_many
        );
        // Whether anybody is told makes no difference.
        for answers in [true, false] {
            let ranges = vec![range("k", "l", 0, 1); 50];
            assert_eq!(run(50, ranges.clone(), answers), Ok(true));
            assert_eq!(run(51, ranges, answers), too_many);
            let inside = Operation {
                operation: Some(Kind::Txn(Txn {
                    success: vec![delete("k", "l"); 60],
                    ..Txn::default()
                })),
            };
            assert_eq!(run(40, vec![inside.clone()], answers), Ok(true));
            assert_eq!(run(41, vec![inside], answers), too_many);
        }
        // Those of a branch that does not run do not count, nor do single keys.
        assert_eq!(run(100, vec![range("k1", "", 0, 0); 50], true), Ok(true));
        let failure = vec![delete("k", "l"); 101];
        let txn = Txn {
            failure,
            ..Txn::default()
        };
        let sessions = Sessions::default();
        let ran = execute(&mut keyspace.overlay(), &sessions, txn, true);
        assert!(ran.unwrap().succeeded);
    }

    #[test]
    fn one_range_is_bounded_in_a_compare_and_not_in_an_operation() {
        // Slices of the same bytes, in order.
        let names: String = (0..=limits::TXN_VISITS_MAX)
            .map(|number| format!("k{number:07}"))
            .collect();
        let names = Bytes::from(names);
        let record = |number: usize| Record {
            key: names.slice(8 * number..8 * (number + 1)),
            value: Bytes::new(),
            create_revision: 2,
            mod_revision: 2,
            version: 1,
            lease: None,
        };
        let keyspace = Keyspace::restore(Picture {
            revision: 2,
            live: (0..=limits::TXN_VISITS_MAX).map(record).collect(),
            ..Picture::default()
        });
        let versions = |end: &'static str| Compare {
            key: "k".into(),
            end: end.into(),
            target: Some(Target::Version(1)),
            ..Compare::default()
        };
        let run = |compares, success| {
            let txn = Txn {
                compares,
                success,
                failure: vec![],
            };
            execute(&mut keyspace.overlay(), &Sessions::default(), txn, true)
        };
        let too_many = TxnError::TooManyOperations;
        assert_eq!(run(vec![versions("l")], vec![]), Err(too_many));
        assert_eq!(super::compare(&keyspace, &[versions("l")]), Err(too_many));
        // All but the last.
        assert!(run(vec![versions("k1000000")], vec![]).unwrap().succeeded);
        assert_eq!(super::compare(&keyspace, &[versions("k1000000")]), Ok(true));
        let all = limits::TXN_VISITS_MAX as u64 + 1;
        let reply = run(vec![], vec![range("k", "l", 0, 1)]).unwrap();
        let [OperationReply::Range(found)] = &reply.results[..] else {
            panic!("{:?}", reply.results);
        };
        assert_eq!((found.count, found.more), (all, true));
    }

    fn put(key: &'static str, value: &'static str) -> Operation {
        bound(key, value, 0)
    }

    fn bound(key: &'static str, value: &'static str, lease: i64) -> Operation {
        let put = Put {
            key: key.into(),
            value: value.into(),
            lease,
            ..Put::default()
        };
        Operation {
            operation: Some(Kind::Put(put)),
        }
    }

    fn delete(key: &'static str, end: &'static str) -> Operation {
        let delete = DeleteRange {
            key: key.into(),
            end: end.into(),
            previous: false,
        };
        Operation {
            operation: Some(Kind::DeleteRange(delete)),
        }
    }

    fn range(key: &'static str, end: &'static str, revision: i64, limit: i64) -> Operation {
        let range = Range {
            key: key.into(),
            end: end.into(),
            revision,
            limit,
            ..Range::default()
        };
        Operation {
            operation: Some(Kind::Range(range)),
        }
    }

    fn found(records: Vec<Record>) -> Found {
        Found {
            count: records.len() as u64,
            records,
            more: false,
        }
    }

    fn deleted(deleted: u64) -> OperationReply {
        OperationReply::DeleteRange {
            deleted,
            previous: vec![],
        }
    }

    fn compare(key: &'static str, relation: Relation, target: Option<Target>) -> Compare {
        Compare {
            key: key.into(),
            result: relation.into(),
            target,
            end: Bytes::new(),
        }
    }

    fn commit(keyspace: &mut Keyspace, txn: Txn) -> Result<TxnReply, TxnError> {
        let mut overlay = keyspace.overlay();
        check(&txn, 128)?;
        let reply = execute(&mut overlay, &Sessions::default(), txn, true)?;
        let writes = overlay.into_writes();
        keyspace.keep(writes);
        Ok(reply)
    }

    fn run_all(keyspace: &mut Keyspace, success: Vec<Operation>) -> Result<TxnReply, TxnError> {
        commit(
            keyspace,
            Txn {
                success,
                ..Txn::default()
            },
        )
    }

    fn compares(keyspace: &mut Keyspace, compare: Compare) -> bool {
        commit(
            keyspace,
            Txn {
                compares: vec![compare],
                ..Txn::default()
            },
        )
        .unwrap()
        .succeeded
    }

    #[test]
    fn the_compares_choose_the_branch() {
        let mut keyspace = Keyspace::new();
        let create = || Txn {
            compares: vec![compare(
                "a",
                Relation::Equal,
                Some(Target::CreateRevision(0)),
            )],
            success: vec![put("a", "1")],
            failure: vec![range("a", "", 0, 0)],
        };
        let first = commit(&mut keyspace, create()).unwrap();
        assert_eq!(
            first,
            TxnReply {
                succeeded: true,
                results: vec![OperationReply::Put(None)]
            }
        );
        let second = commit(&mut keyspace, create()).unwrap();
        let there = keyspace.get(b"a").unwrap().clone();
        assert_eq!(second.results, [OperationReply::Range(found(vec![there]))]);
        assert!(!second.succeeded);
        assert_eq!(keyspace.revision(), 2);
    }

    #[test]
    fn every_target_compares_with_every_relation() {
        let mut keyspace = Keyspace::new();
        run_all(&mut keyspace, vec![put("a", "m")]).unwrap();
        run_all(&mut keyspace, vec![put("a", "m")]).unwrap();
        let value = |value: &'static str| Some(Target::Value(value.into()));
        for (relation, target) in [
            (Relation::Equal, Some(Target::Version(2))),
            (Relation::Equal, Some(Target::CreateRevision(2))),
            (Relation::Less, Some(Target::ModRevision(4))),
            (Relation::NotEqual, Some(Target::Lease(7))),
            (Relation::Greater, value("l")),
            (Relation::Less, value("n")),
            (Relation::Greater, None),
        ] {
            assert!(
                compares(&mut keyspace, compare("a", relation, target.clone())),
                "{target:?}"
            );
        }
        assert!(!compares(
            &mut keyspace,
            compare("a", Relation::Less, Some(Target::Version(2)))
        ));
    }

    #[test]
    fn a_missing_key_compares_as_zero_and_its_value_as_nothing() {
        let mut keyspace = Keyspace::new();
        assert!(compares(&mut keyspace, compare("a", Relation::Equal, None)));
        assert!(compares(
            &mut keyspace,
            compare("a", Relation::Equal, Some(Target::Lease(0)))
        ));
        for relation in [Relation::Equal, Relation::NotEqual] {
            let target = Some(Target::Value(Bytes::new()));
            assert!(!compares(&mut keyspace, compare("a", relation, target)));
        }
    }

    #[test]
    fn operations_see_the_writes_before_them() {
        let mut keyspace = Keyspace::new();
        run_all(&mut keyspace, vec![put("a", "1"), put("b", "1")]).unwrap();
        let reply = run_all(
            &mut keyspace,
            vec![
                put("c", "2"),
                range("a", "\0", 0, 2),
                delete("a", "b\0"),
                range("a", "\0", 0, 0),
                range("a", "\0", 2, 0),
            ],
        )
        .unwrap();
        let keys: Vec<Vec<&[u8]>> = reply
            .results
            .iter()
            .filter_map(|result| match result {
                OperationReply::Range(found) => {
                    Some(found.records.iter().map(|record| &record.key[..]).collect())
                }
                _ => None,
            })
            .collect();
        assert_eq!(keys, [vec![&b"a"[..], b"b"], vec![b"c"], vec![b"a", b"b"]]);
        assert_eq!(reply.results[2], deleted(2));
    }

    #[test]
    fn a_refused_transaction_leaves_nothing() {
        let mut keyspace = Keyspace::new();
        for (operations, error) in [
            (vec![put("", "1")], TxnError::EmptyKey),
            (vec![delete("", "\0")], TxnError::EmptyKey),
            (vec![put("a", "1"), put("a", "2")], TxnError::DuplicateKey),
            (
                vec![put("b", "1"), delete("a", "c")],
                TxnError::DuplicateKey,
            ),
            (
                vec![bound("a", "1", 9)],
                TxnError::SessionNotAlive(SessionId(9)),
            ),
            (
                vec![put("a", "1"), range("a", "", 2, 0)],
                TxnError::Revision(RevisionError::Future {
                    asked: 2,
                    newest: 1,
                }),
            ),
            (
                vec![range("a", "", 2, 0), bound("a", "1", 9)],
                TxnError::SessionNotAlive(SessionId(9)),
            ),
            (
                vec![Operation { operation: None }],
                TxnError::UnknownOperation,
            ),
        ] {
            assert_eq!(run_all(&mut keyspace, operations), Err(error));
        }
        assert_eq!(keyspace, Keyspace::new());
    }

    #[test]
    fn the_branch_that_does_not_run_is_checked_too() {
        let txn = Txn {
            failure: vec![put("a", "1"), put("a", "2")],
            ..Txn::default()
        };
        assert_eq!(
            commit(&mut Keyspace::new(), txn),
            Err(TxnError::DuplicateKey)
        );
    }

    #[test]
    fn an_unknown_relation_is_refused() {
        let mut unknown = compare("a", Relation::Equal, None);
        unknown.result = 9;
        let txn = Txn {
            compares: vec![unknown],
            ..Txn::default()
        };
        assert_eq!(
            commit(&mut Keyspace::new(), txn),
            Err(TxnError::UnknownOperation)
        );
    }
}
