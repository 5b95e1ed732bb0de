//! The operations of a transaction, on the overlay. All that could be refused was, so
//! nothing in here can fail.

use conclave_proto::internal::{DeleteRange, Put, Range, Txn, operation::Operation as Kind};

use super::{OperationReply, TxnReply};
use crate::{
    ids::SessionId,
    keyspace::{Found, KeyRange, Overlay, Piece, RESERVED_PREFIX, Record, Selection},
};

/// Runs the branches that [`branches`](super::chosen::branches) chose.
pub(super) fn run_txn(
    overlay: &mut Overlay<'_>,
    txn: Txn,
    branches: Vec<bool>,
    answers: bool,
) -> TxnReply {
    let mut run = Run {
        overlay,
        answers,
        chosen: branches.into_iter(),
    };
    run.txn(txn)
}

/// A transaction that is under way: nothing of it can fail any more.
struct Run<'a, 'b> {
    overlay: &'a mut Overlay<'b>,
    answers: bool,
    /// Those of the transactions that are left to run.
    chosen: std::vec::IntoIter<bool>,
}

impl Run<'_, '_> {
    fn txn(&mut self, txn: Txn) -> TxnReply {
        let succeeded = self.chosen.next().expect("every transaction was looked at");
        #[cfg(conclave_plant)]
        let succeeded = match crate::plant::is("compare-after-own-writes") {
            true => self.compare_late(&txn, succeeded),
            false => succeeded,
        };
        let branch = if succeeded { txn.success } else { txn.failure };
        let operations = branch
            .into_iter()
            .filter_map(|operation| operation.operation);
        let results = operations.map(|operation| self.operation(operation));
        let results = results.collect();
        TxnReply { succeeded, results }
    }

    /// A mistake: compares see what was written before them. Of transactions inside this
    /// one nobody knows then which branch runs, so one with some is left alone.
    #[cfg(conclave_plant)]
    fn compare_late(&self, txn: &Txn, succeeded: bool) -> bool {
        use conclave_proto::internal::compare::Result as Relation;
        let mut all = txn.success.iter().chain(&txn.failure);
        let mut compares = txn.compares.iter();
        if all.any(|one| matches!(one.operation, Some(Kind::Txn(_))))
            || compares.any(|compare| !compare.end.is_empty())
        {
            return succeeded;
        }
        txn.compares.iter().all(|compare| {
            let relation = Relation::try_from(compare.result).unwrap_or(Relation::Equal);
            super::compares::holds_for(self.overlay.get(&compare.key), relation, compare)
        })
    }

    fn operation(&mut self, operation: Kind) -> OperationReply {
        match operation {
            Kind::Put(put) => OperationReply::Put(run_put(self.overlay, put)),
            Kind::DeleteRange(delete) => run_delete(self.overlay, delete, self.answers),
            Kind::Range(range) if self.answers => OperationReply::Range(self.range(range)),
            Kind::Range(_) => OperationReply::Range(Found::default()),
            Kind::Txn(txn) => OperationReply::Txn(self.txn(txn)),
        }
    }

    fn range(&self, range: Range) -> Found {
        let mut selection = Selection::new(&range).expect("its order was looked at");
        let (filter, limit) = (selection.filter(), selection.wanted());
        let keys = KeyRange::new(range.key, range.end);
        let mut piece = Piece::default();
        let mut add = |record: &Record| piece.add(record, &filter, limit);
        match u64::try_from(range.revision) {
            Ok(0) | Err(_) => self.overlay.range(&keys).for_each(&mut add),
            Ok(at) => self
                .overlay
                .base()
                .range(&keys, Some(at))
                .for_each(&mut add),
        }
        selection.add(piece);
        selection.finish()
    }
}

pub(super) fn run_put(overlay: &mut Overlay<'_>, put: Put) -> Option<Record> {
    let before = overlay.get(&put.key);
    let lease = match before {
        Some(before) if put.ignore_lease => before.lease,
        _ => (put.lease != 0).then_some(SessionId(put.lease)),
    };
    let value = match before {
        Some(before) if put.ignore_value => before.value.clone(),
        _ => put.value,
    };
    let previous = put.previous.then(|| before.cloned()).flatten();
    overlay.put(put.key, value, lease);
    previous
}

pub(super) fn run_delete(
    overlay: &mut Overlay<'_>,
    delete: DeleteRange,
    answers: bool,
) -> OperationReply {
    let range = KeyRange::new(delete.key, delete.end);
    let there = overlay.range(&range);
    let deleted: Vec<Record> = there
        .filter(|record| !record.key.starts_with(RESERVED_PREFIX))
        .cloned()
        .collect();
    #[cfg(conclave_plant)]
    let deleted = match crate::plant::is("delete-range-misses-last") && deleted.len() > 1 {
        true => deleted[..deleted.len() - 1].to_vec(),
        false => deleted,
    };
    for record in &deleted {
        overlay.delete(&record.key);
    }
    OperationReply::DeleteRange {
        deleted: deleted.len() as u64,
        previous: if delete.previous && answers {
            deleted
        } else {
            Vec::new()
        },
    }
}
