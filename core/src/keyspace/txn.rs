//! Transactions of clients on plain keys, with etcd's meaning: compares, and the
//! operations they choose, transactions inside them included.
//!
//! [`check`] and its like refuse what is wrong whatever the state is. Whoever proposes a
//! transaction asks them first, and applying asks again.

use std::collections::BTreeSet;

use bytes::Bytes;
use conclave_proto::internal::{
    Compare, DeleteRange, Operation, Put, Range, Txn,
    compare::{Result as Relation, Target},
    operation::Operation as Kind,
};

use super::{
    Found, KeyRange, Keyspace, Overlay, Piece, RESERVED_PREFIX, Record, RevisionError, Selection,
    as_signed,
};
use crate::{ids::SessionId, limits, session::Sessions};

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

/// Runs a transaction. On `Err` the overlay must be dropped.
///
/// As in etcd, all compares are made against the state before it; what an operation
/// needs of that state is looked at before any of them runs; and operations see the
/// writes before them, except a range at a given revision, which sees that one. Compares
/// and operations over ranges may look at [`limits::TXN_VISITS_MAX`] records together, but
/// for an operation that is the only one of all these.
/// `answers` says whether anybody is to see what operations read: if not, ranges are
/// not walked.
pub fn execute(
    overlay: &mut Overlay<'_>,
    sessions: &Sessions,
    txn: Txn,
    answers: bool,
) -> Result<TxnReply, TxnError> {
    check(&txn, usize::MAX)?;
    let mut chosen = Chosen {
        keyspace: overlay.base(),
        sessions,
        visits: Visits::new(),
        is_alone: wide_parts(&txn) <= 1,
        branches: Vec::new(),
        ranges: Vec::new(),
        spans: Vec::new(),
    };
    chosen.choose(&txn)?;
    let branches = chosen.checked()?;
    let mut run = Run {
        overlay,
        answers,
        chosen: branches.into_iter(),
    };
    Ok(run.txn(txn))
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

/// Whether all compares hold, each as [`execute`] has it.
pub fn compare(keyspace: &Keyspace, compares: &[Compare]) -> Result<bool, TxnError> {
    all_hold(keyspace, compares, &mut Visits::new())
}

fn all_hold(
    keyspace: &Keyspace,
    compares: &[Compare],
    visits: &mut Visits,
) -> Result<bool, TxnError> {
    for compare in compares {
        if !holds(keyspace, compare, visits)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// How many compares and operations of a transaction, and of all inside it, are over
/// ranges.
pub(crate) fn wide_parts(txn: &Txn) -> usize {
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

fn is_wide(compare: &Compare) -> bool {
    !compare.end.is_empty()
}

/// How many records the ranges of a transaction may still look at. Every member counts
/// them, as it has to come to the same end, whether it walks all of the ranges or not:
/// so what counts is what there is before the transaction.
struct Visits {
    left: usize,
}

impl Visits {
    fn new() -> Self {
        Self {
            left: limits::TXN_VISITS_MAX,
        }
    }

    fn one(&mut self) -> Result<(), TxnError> {
        let left = self.left.checked_sub(1);
        self.left = left.ok_or(TxnError::TooManyOperations)?;
        Ok(())
    }
}

/// What of a transaction runs.
struct Chosen<'a> {
    keyspace: &'a Keyspace,
    sessions: &'a Sessions,
    visits: Visits,
    /// Nothing but one operation or compare is over a range: an operation is as long then
    /// as it may be outside of a transaction.
    is_alone: bool,
    /// Which branch, of each transaction that runs, in the order in which they do.
    branches: Vec<bool>,
    ranges: Vec<&'a Range>,
    /// What its operations look at.
    spans: Vec<KeyRange>,
}

impl<'a> Chosen<'a> {
    /// Notes what runs, and refuses puts that cannot run on this state. What is wrong
    /// with a range comes after that, as in etcd.
    fn choose(&mut self, txn: &'a Txn) -> Result<(), TxnError> {
        let succeeded = all_hold(self.keyspace, &txn.compares, &mut self.visits)?;
        self.branches.push(succeeded);
        let branch = if succeeded {
            &txn.success
        } else {
            &txn.failure
        };
        for operation in branch {
            match operation.operation.as_ref() {
                Some(Kind::Put(put)) => {
                    // As in etcd the other way round than for a put alone.
                    check_kept(self.keyspace, put)?;
                    check_session(self.sessions, put)?;
                }
                Some(Kind::Range(range)) => {
                    self.ranges.push(range);
                    self.will_walk(&range.key, &range.end);
                }
                Some(Kind::Txn(txn)) => self.choose(txn)?,
                Some(Kind::DeleteRange(delete)) => self.will_walk(&delete.key, &delete.end),
                None => {}
            }
        }
        Ok(())
    }

    fn will_walk(&mut self, key: &Bytes, end: &Bytes) {
        if !end.is_empty() {
            self.spans.push(KeyRange::new(key.clone(), end.clone()));
        }
    }

    /// The branches, if the rest can run on this state, too.
    fn checked(mut self) -> Result<Vec<bool>, TxnError> {
        for range in &self.ranges {
            check_state_for_range(self.keyspace, range)?;
        }
        // Most often there is no need to count.
        let at_most = self.spans.len().saturating_mul(self.keyspace.len());
        if !self.is_alone && at_most > self.visits.left {
            for span in &self.spans {
                for _ in self.keyspace.range(span, None) {
                    self.visits.one()?;
                }
            }
        }
        Ok(self.branches)
    }
}

fn check_session(sessions: &Sessions, put: &Put) -> Result<(), TxnError> {
    let session = SessionId(put.lease);
    if put.lease != 0 && sessions.get(session).is_none() {
        return Err(TxnError::SessionNotAlive(session));
    }
    Ok(())
}

/// Whether there is what a put is to keep.
fn check_kept(keyspace: &Keyspace, put: &Put) -> Result<(), TxnError> {
    if (put.ignore_value || put.ignore_lease) && keyspace.get(&put.key).is_none() {
        return Err(TxnError::KeyNotFound);
    }
    Ok(())
}

/// Whether a range of a transaction can be read at its revision.
pub fn check_state_for_range(keyspace: &Keyspace, range: &Range) -> Result<(), TxnError> {
    match u64::try_from(range.revision) {
        Ok(0) => Ok(()),
        Ok(revision) => Ok(keyspace.check_readable(revision)?),
        Err(_) if keyspace.compacted() == 0 => Ok(()),
        Err(_) => Err(TxnError::Revision(RevisionError::Compacted {
            asked: 0,
            compacted: keyspace.compacted(),
        })),
    }
}

/// Whether a compare holds for every key there is; if there is none, for a key that is
/// all zeros, except that no compare of values holds then.
fn holds(keyspace: &Keyspace, compare: &Compare, visits: &mut Visits) -> Result<bool, TxnError> {
    let relation =
        Relation::try_from(compare.result).map_err(|_unknown| TxnError::UnknownOperation)?;
    if !is_wide(compare) {
        #[cfg(conclave_plant)]
        if crate::plant::is("compare-against-stale-state")
            && let stale = keyspace.revision() - 1
            && keyspace.check_readable(stale).is_ok()
        {
            let range = KeyRange::single(compare.key.clone());
            let record = keyspace.range(&range, Some(stale)).next();
            return Ok(holds_for(record, relation, compare));
        }
        return Ok(holds_for(keyspace.get(&compare.key), relation, compare));
    }
    let range = KeyRange::new(compare.key.clone(), compare.end.clone());
    let mut is_empty = true;
    for record in keyspace.range(&range, None) {
        is_empty = false;
        visits.one()?;
        if !holds_for(Some(record), relation, compare) {
            return Ok(false);
        }
    }
    Ok(!is_empty || holds_for(None, relation, compare))
}

fn holds_for(record: Option<&Record>, relation: Relation, compare: &Compare) -> bool {
    let number = |of: fn(&Record) -> u64, wanted: i64| as_signed(record.map_or(0, of)).cmp(&wanted);
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
            None => return false,
        },
    };
    match relation {
        Relation::Equal => ordering.is_eq(),
        Relation::NotEqual => ordering.is_ne(),
        Relation::Greater => ordering.is_gt(),
        Relation::Less => ordering.is_lt(),
    }
}

/// A transaction that is under way: nothing of it can fail any more.
struct Run<'a, 'b> {
    overlay: &'a mut Overlay<'b>,
    answers: bool,
    /// See [`Chosen`].
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
        let mut all = txn.success.iter().chain(&txn.failure);
        let mut compares = txn.compares.iter();
        if all.any(|one| matches!(one.operation, Some(Kind::Txn(_))))
            || compares.any(|compare| !compare.end.is_empty())
        {
            return succeeded;
        }
        txn.compares.iter().all(|compare| {
            let relation = Relation::try_from(compare.result).unwrap_or(Relation::Equal);
            holds_for(self.overlay.get(&compare.key), relation, compare)
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

fn run_put(overlay: &mut Overlay<'_>, put: Put) -> Option<Record> {
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

fn run_delete(overlay: &mut Overlay<'_>, delete: DeleteRange, answers: bool) -> OperationReply {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keyspace::{Keyspace, Picture};

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
