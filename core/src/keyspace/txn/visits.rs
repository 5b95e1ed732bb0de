//! The bound on what the ranges of one transaction look at together.

use conclave_proto::internal::{Compare, Txn, operation::Operation as Kind};

use super::TxnError;
use crate::limits;

/// How many records the ranges of a transaction may still look at. Every member counts
/// them, as it has to come to the same end, whether it walks all of the ranges or not:
/// so what counts is what there is before the transaction.
pub(super) struct Visits {
    pub(super) left: usize,
}

impl Visits {
    pub(super) fn new() -> Self {
        Self {
            left: limits::TXN_VISITS_MAX,
        }
    }

    pub(super) fn one(&mut self) -> Result<(), TxnError> {
        let left = self.left.checked_sub(1);
        self.left = left.ok_or(TxnError::TooManyOperations)?;
        Ok(())
    }
}

/// How many compares and operations of a transaction, and of all inside it, are over
/// ranges.
pub(super) fn wide_parts(txn: &Txn) -> usize {
    let compares = txn.compares.iter().filter(|compare| is_wide(compare));
    let operations = txn.success.iter().chain(&txn.failure);
    let of_operations = operations.map(|operation| match &operation.operation {
        Some(Kind::Range(range)) => usize::from(!range.end.is_empty()),
        Some(Kind::DeleteRange(delete)) => usize::from(!delete.end.is_empty()),
        Some(Kind::Txn(txn)) => wide_parts(txn),
        Some(Kind::Put(_)) | None => 0,
    });
    compares.count() + of_operations.sum::<usize>()
}

pub(super) fn is_wide(compare: &Compare) -> bool {
    !compare.end.is_empty()
}
