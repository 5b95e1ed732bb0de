//! Transactions on plain keys: compares, and the operations they choose.

use std::{cmp::Ordering, collections::BTreeSet};

use bytes::Bytes;
use conclave_proto::internal::{
    Compare, DeleteRange, Operation, Put, Range, Txn,
    compare::{Result as Relation, Target},
    operation::Operation as Kind,
};

use super::{KeyRange, Overlay, Record, RevisionError};
use crate::{ids::SessionId, session::Sessions};

/// The result of a transaction.
#[derive(Clone, Debug, PartialEq)]
pub struct TxnReply {
    /// Whether the compares held.
    pub succeeded: bool,
    /// One for each operation that ran.
    pub results: Vec<OperationReply>,
}

/// The result of one operation of a transaction.
#[derive(Clone, Debug, PartialEq)]
pub enum OperationReply {
    /// Of a put: the version before.
    Put(Option<Record>),
    /// Of a delete: how many keys were there.
    DeleteRange(usize),
    /// Of a range.
    Range(Vec<Record>),
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
    /// A put binds its key to a session that is not alive.
    #[error("session {0} is not alive")]
    SessionNotAlive(SessionId),
    /// A range asks for a revision that is compacted or yet to come.
    #[error(transparent)]
    Revision(#[from] RevisionError),
    /// An operation or compare of a kind that there is not.
    #[error("unknown operation")]
    UnknownOperation,
}

/// Runs a transaction. On `Err` the overlay must be dropped.
///
/// As in etcd, both branches are checked and one of them runs; a key that is not
/// there compares as all zeros, but no compare of values holds for it; a compare
/// without target compares the version with 0. Operations see the writes before
/// them, except a range at a given revision, which sees that one.
pub fn execute(
    overlay: &mut Overlay<'_>,
    sessions: &Sessions,
    txn: Txn,
) -> Result<TxnReply, TxnError> {
    check_branch(&txn.success)?;
    check_branch(&txn.failure)?;
    let mut succeeded = true;
    for compare in &txn.compares {
        succeeded &= holds(overlay, compare)?;
    }
    let branch = if succeeded { txn.success } else { txn.failure };
    let results = branch
        .into_iter()
        .map(|operation| run(overlay, sessions, operation))
        .collect::<Result<_, _>>()?;
    Ok(TxnReply { succeeded, results })
}

/// Refuses empty keys, and branches whose outcome would hang on the order of
/// their writes.
fn check_branch(operations: &[Operation]) -> Result<(), TxnError> {
    let mut puts = BTreeSet::new();
    let mut deletes = Vec::new();
    for operation in operations {
        let key = match operation
            .operation
            .as_ref()
            .ok_or(TxnError::UnknownOperation)?
        {
            Kind::Put(put) => {
                if !puts.insert(&put.key[..]) {
                    return Err(TxnError::DuplicateKey);
                }
                &put.key
            }
            Kind::DeleteRange(delete) => {
                deletes.push(KeyRange::new(delete.key.clone(), delete.end.clone()));
                &delete.key
            }
            Kind::Range(range) => &range.key,
        };
        non_empty(key)?;
    }
    if deletes
        .iter()
        .any(|range| puts.range::<[u8], _>(range.bounds()).next().is_some())
    {
        return Err(TxnError::DuplicateKey);
    }
    Ok(())
}

fn non_empty(key: &Bytes) -> Result<(), TxnError> {
    if key.is_empty() {
        Err(TxnError::EmptyKey)
    } else {
        Ok(())
    }
}

fn holds(overlay: &Overlay<'_>, compare: &Compare) -> Result<bool, TxnError> {
    non_empty(&compare.key)?;
    let relation =
        Relation::try_from(compare.result).map_err(|_unknown| TxnError::UnknownOperation)?;
    let record = overlay.get(&compare.key);
    let number = |of: fn(&Record) -> u64, wanted: u64| record.map_or(0, of).cmp(&wanted);
    let ordering = match &compare.target {
        None => number(|record| record.version, 0),
        Some(Target::Version(wanted)) => number(|record| record.version, *wanted),
        Some(Target::CreateRevision(wanted)) => number(|record| record.create_revision, *wanted),
        Some(Target::ModRevision(wanted)) => number(|record| record.mod_revision, *wanted),
        Some(Target::Lease(wanted)) => record
            .and_then(|record| record.lease)
            .map_or(0, |session| session.0)
            .cmp(wanted),
        Some(Target::Value(wanted)) => match record {
            Some(record) => record.value.cmp(wanted),
            None => return Ok(false),
        },
    };
    Ok(match relation {
        Relation::Equal => ordering == Ordering::Equal,
        Relation::NotEqual => ordering != Ordering::Equal,
        Relation::Greater => ordering == Ordering::Greater,
        Relation::Less => ordering == Ordering::Less,
    })
}

fn run(
    overlay: &mut Overlay<'_>,
    sessions: &Sessions,
    operation: Operation,
) -> Result<OperationReply, TxnError> {
    match operation.operation.ok_or(TxnError::UnknownOperation)? {
        Kind::Put(Put { key, value, lease }) => {
            let lease = (lease != 0).then_some(SessionId(lease));
            if let Some(session) = lease
                && sessions.get(session).is_none()
            {
                return Err(TxnError::SessionNotAlive(session));
            }
            let before = overlay.get(&key).cloned();
            // Copies: what was decoded is part of all that came with it, up to a whole
            // segment of the log, and would keep that in memory for as long as it lives.
            let [key, value] = [key, value].map(|bytes| Bytes::copy_from_slice(&bytes));
            overlay.put(key, value, lease);
            Ok(OperationReply::Put(before))
        }
        Kind::DeleteRange(DeleteRange { key, end }) => Ok(OperationReply::DeleteRange(
            overlay.delete_range(&KeyRange::new(key, end)),
        )),
        Kind::Range(range) => read(overlay, range).map(OperationReply::Range),
    }
}

fn read(overlay: &Overlay<'_>, read: Range) -> Result<Vec<Record>, TxnError> {
    if read.revision != 0 {
        overlay.base().check_readable(read.revision)?;
    }
    let limit = match read.limit {
        0 => usize::MAX,
        limit => usize::try_from(limit).unwrap_or(usize::MAX),
    };
    let range = KeyRange::new(read.key, read.end);
    Ok(match read.revision {
        0 => overlay.range(&range).take(limit).cloned().collect(),
        at => overlay
            .base()
            .range(&range, Some(at))
            .take(limit)
            .cloned()
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyspace::Keyspace;

    fn put(key: &'static str, value: &'static str) -> Operation {
        bound(key, value, 0)
    }

    fn bound(key: &'static str, value: &'static str, lease: i64) -> Operation {
        let put = Put {
            key: key.into(),
            value: value.into(),
            lease,
        };
        Operation {
            operation: Some(Kind::Put(put)),
        }
    }

    fn delete(key: &'static str, end: &'static str) -> Operation {
        let delete = DeleteRange {
            key: key.into(),
            end: end.into(),
        };
        Operation {
            operation: Some(Kind::DeleteRange(delete)),
        }
    }

    fn range(key: &'static str, end: &'static str, revision: u64, limit: u64) -> Operation {
        let range = Range {
            key: key.into(),
            end: end.into(),
            revision,
            limit,
        };
        Operation {
            operation: Some(Kind::Range(range)),
        }
    }

    fn compare(key: &'static str, relation: Relation, target: Option<Target>) -> Compare {
        Compare {
            key: key.into(),
            result: relation.into(),
            target,
        }
    }

    fn commit(keyspace: &mut Keyspace, txn: Txn) -> Result<TxnReply, TxnError> {
        let mut overlay = keyspace.overlay();
        let reply = execute(&mut overlay, &Sessions::default(), txn)?;
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
        assert_eq!(second.results, [OperationReply::Range(vec![there])]);
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
                OperationReply::Range(records) => {
                    Some(records.iter().map(|record| &record.key[..]).collect())
                }
                OperationReply::Put(_) | OperationReply::DeleteRange(_) => None,
            })
            .collect();
        assert_eq!(keys, [vec![&b"a"[..], b"b"], vec![b"c"], vec![b"a", b"b"]]);
        assert_eq!(reply.results[2], OperationReply::DeleteRange(2));
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
