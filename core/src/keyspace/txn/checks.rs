//! What is wrong with an operation or a transaction whatever the state is. Nothing in here
//! looks at the state, so it can be asked before anything is proposed.

use std::collections::BTreeSet;

use bytes::Bytes;
use conclave_proto::internal::{
    DeleteRange, Operation, Put, Range, Txn, operation::Operation as Kind,
};

use super::TxnError;
use crate::{
    keyspace::{KeyRange, RESERVED_PREFIX, Selection},
    limits,
};

/// Whether a transaction could ever run: keys, orders, and how many operations it has.
/// A list has `operations_max` at most; a transaction inside has what its surroundings
/// leave of that. As in etcd, both branches count, and no branch may have an outcome
/// that hangs on the order of its writes.
pub fn check(txn: &Txn, operations_max: usize) -> Result<(), TxnError> {
    let mut total = 0;
    check_operations(txn, operations_max, 1, &mut total)?;
    check_writes(&txn.success)?;
    check_writes(&txn.failure)?;
    Ok(())
}

/// Whether a put could ever run.
pub fn check_put(put: &Put) -> Result<(), TxnError> {
    non_empty(&put.key)?;
    if put.ignore_value && !put.value.is_empty() {
        return Err(TxnError::ValueGiven);
    }
    if put.ignore_lease && put.lease != 0 {
        return Err(TxnError::SessionGiven);
    }
    not_reserved(&put.key)
}

/// Whether a delete could ever run. One over several keys leaves those of the service
/// alone; one of a single key of theirs is refused.
pub fn check_delete(delete: &DeleteRange) -> Result<(), TxnError> {
    non_empty(&delete.key)?;
    if delete.end.is_empty() {
        return not_reserved(&delete.key);
    }
    Ok(())
}

/// Whether a range could ever run.
pub fn check_range(range: &Range) -> Result<(), TxnError> {
    non_empty(&range.key)?;
    match Selection::new(range) {
        Some(_) => Ok(()),
        None => Err(TxnError::UnknownOrder),
    }
}

fn check_operations(
    txn: &Txn,
    operations_max: usize,
    depth: usize,
    total: &mut usize,
) -> Result<(), TxnError> {
    let branches = [&txn.success, &txn.failure];
    let longest = branches.iter().map(|branch| branch.len()).max();
    let longest = longest.unwrap_or(0).max(txn.compares.len());
    *total += txn.compares.len() + txn.success.len() + txn.failure.len();
    if longest > operations_max
        || depth > limits::TXN_DEPTH_MAX
        || *total > limits::TXN_OPERATIONS_MAX
    {
        return Err(TxnError::TooManyOperations);
    }
    for compare in &txn.compares {
        non_empty(&compare.key)?;
    }
    for operation in branches.into_iter().flatten() {
        match operation.operation.as_ref() {
            Some(Kind::Range(range)) => check_range(range)?,
            Some(Kind::Put(put)) => check_put(put)?,
            Some(Kind::DeleteRange(delete)) => check_delete(delete)?,
            Some(Kind::Txn(txn)) => {
                check_operations(txn, operations_max - longest, depth + 1, total)?;
            }
            None => return Err(TxnError::UnknownOperation),
        }
    }
    Ok(())
}

/// The end of a range of all keys from one on.
const FROM_KEY: &[u8] = &[0];

/// What the branches of a list of operations write: the keys they put, and what they
/// delete.
type Written<'a> = (BTreeSet<&'a [u8]>, Vec<KeyRange>);

/// Refuses two puts of a key, and a put of a key that is deleted; between the two
/// branches of a transaction inside, of which only one runs, they are no conflict. As in
/// etcd, neither is a put inside a transaction with a delete inside a later one, nor any
/// put with a delete of all keys from one on: they run in their order.
fn check_writes(operations: &[Operation]) -> Result<Written<'_>, TxnError> {
    let mut puts = BTreeSet::new();
    let mut deletes = Vec::new();
    for operation in operations {
        if let Some(Kind::DeleteRange(delete)) = &operation.operation
            && delete.end != *FROM_KEY
        {
            deletes.push(KeyRange::new(delete.key.clone(), delete.end.clone()));
        }
    }
    for operation in operations {
        let Some(Kind::Txn(txn)) = &operation.operation else {
            continue;
        };
        let (then_puts, then_deletes) = check_writes(&txn.success)?;
        let (else_puts, else_deletes) = check_writes(&txn.failure)?;
        for of_branch in [&then_puts, &else_puts] {
            if !puts.is_disjoint(of_branch) || deletes.iter().any(|range| has_any(of_branch, range))
            {
                return Err(TxnError::DuplicateKey);
            }
        }
        puts.extend(then_puts);
        puts.extend(else_puts);
        deletes.extend(then_deletes);
        deletes.extend(else_deletes);
    }
    for operation in operations {
        if let Some(Kind::Put(put)) = &operation.operation
            && !puts.insert(&put.key[..])
        {
            return Err(TxnError::DuplicateKey);
        }
    }
    if deletes.iter().any(|range| own_puts(operations, range)) {
        return Err(TxnError::DuplicateKey);
    }
    Ok((puts, deletes))
}

fn has_any(puts: &BTreeSet<&[u8]>, range: &KeyRange) -> bool {
    puts.range::<[u8], _>(range.bounds()).next().is_some()
}

fn own_puts(operations: &[Operation], range: &KeyRange) -> bool {
    operations.iter().any(|operation| {
        matches!(&operation.operation, Some(Kind::Put(put)) if range.contains(&put.key))
    })
}

fn non_empty(key: &Bytes) -> Result<(), TxnError> {
    if key.is_empty() {
        Err(TxnError::EmptyKey)
    } else {
        Ok(())
    }
}

fn not_reserved(key: &[u8]) -> Result<(), TxnError> {
    if key.starts_with(RESERVED_PREFIX) {
        Err(TxnError::Reserved)
    } else {
        Ok(())
    }
}
