//! How the model runs what clients write.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    keyspace::{
        Found, Record, RevisionError,
        txn::{OperationReply, TxnError, TxnReply},
    },
};
use conclave_proto::internal::{
    Compare, DeleteRange, Operation, Put, Range, Txn, command,
    compare::{Result as Relation, Target},
    operation::Operation as Kind,
    range::{By, Order},
};

use super::{Model, Outcome, covers};

impl Model {
    /// Runs a command on plain keys, or says that it is none.
    pub(crate) fn execute(&mut self, body: &command::Body) -> Option<Outcome> {
        let (kind, txn) = match body {
            command::Body::Txn(txn) => (None, txn.clone()),
            command::Body::Put(put) => (Some(()), alone(Kind::Put(put.clone()))),
            command::Body::DeleteRange(delete) => {
                (Some(()), alone(Kind::DeleteRange(delete.clone())))
            }
            command::Body::Compact(compact) => return Some(self.compact(compact.revision)),
            _ => return None,
        };
        let Some(reply) = self.run(&txn, kind.is_some()) else {
            return Some(Outcome::NoSpace);
        };
        Some(match kind {
            None => Outcome::Txn(reply),
            Some(()) => Outcome::Operation(reply.map(|mut reply| reply.results.remove(0))),
        })
    }

    /// Whether compares hold for what there was at a revision.
    pub(crate) fn compare(&self, compares: &[Compare], at: Revision) -> bool {
        compares.iter().all(|compare| self.holds(compare, at))
    }

    /// `None`: there is no room for it.
    fn run(&mut self, txn: &Txn, is_alone: bool) -> Option<Result<TxnReply, TxnError>> {
        if let Err(error) = self.possible(txn, is_alone) {
            return Some(Err(error));
        }
        let mut run = Run::new(self);
        let reply = run.txn(txn);
        if run.has_puts && self.is_out_of_space {
            return None;
        }
        let writes = run.into_writes();
        self.keep(writes);
        Some(Ok(reply))
    }

    /// Whether what runs can do so, judged by the state before: all puts, then all
    /// ranges. Of a put that is alone its session is looked at first, of others last.
    fn possible(&self, txn: &Txn, is_alone: bool) -> Result<(), TxnError> {
        let mut running = Vec::new();
        self.leaves(txn, &mut running);
        for kind in &running {
            let Kind::Put(put) = kind else { continue };
            let session = SessionId(put.lease);
            let is_dead = put.lease != 0 && !self.is_alive(session);
            let keeps = put.ignore_value || put.ignore_lease;
            let is_missing = keeps && self.get(&put.key, self.revision).is_none();
            match (is_dead, is_missing) {
                (true, false) => return Err(TxnError::SessionNotAlive(session)),
                (true, true) if is_alone => return Err(TxnError::SessionNotAlive(session)),
                (_, true) => return Err(TxnError::KeyNotFound),
                (false, false) => {}
            }
        }
        for kind in &running {
            let Kind::Range(range) = kind else { continue };
            match u64::try_from(range.revision) {
                Ok(0) => {}
                Ok(asked) => self.readable(asked)?,
                Err(_) if self.compacted == 0 => {}
                Err(_) => Err(RevisionError::Compacted {
                    asked: 0,
                    compacted: self.compacted,
                })?,
            }
        }
        Ok(())
    }

    /// The operations that run, those of transactions inside in their places.
    fn leaves<'a>(&self, txn: &'a Txn, running: &mut Vec<&'a Kind>) {
        for operation in self.chosen(txn).1 {
            match &operation.operation {
                Some(Kind::Txn(txn)) => self.leaves(txn, running),
                Some(kind) => running.push(kind),
                None => {}
            }
        }
    }

    fn chosen<'a>(&self, txn: &'a Txn) -> (bool, &'a [Operation]) {
        match self.compare(&txn.compares, self.revision) {
            true => (true, &txn.success),
            false => (false, &txn.failure),
        }
    }

    fn holds(&self, compare: &Compare, at: Revision) -> bool {
        let found = self.range(&compare.key, &compare.end, at);
        match found.is_empty() {
            true => holds_for(None, compare),
            false => found
                .into_iter()
                .all(|record| holds_for(Some(record), compare)),
        }
    }
}

/// A key that is not there has zeros, and no value at all.
fn holds_for(record: Option<&Record>, compare: &Compare) -> bool {
    let number = |of: fn(&Record) -> u64| record.map_or(0, of).cast_signed();
    let ordering = match &compare.target {
        None => number(|record| record.version).cmp(&0),
        Some(Target::Version(wanted)) => number(|record| record.version).cmp(wanted),
        Some(Target::CreateRevision(wanted)) => number(|record| record.create_revision).cmp(wanted),
        Some(Target::ModRevision(wanted)) => number(|record| record.mod_revision).cmp(wanted),
        Some(Target::Lease(wanted)) => {
            let lease = record.and_then(|record| record.lease);
            lease.map_or(0, |session| session.0).cmp(wanted)
        }
        Some(Target::Value(wanted)) => match record {
            Some(record) => record.value.cmp(wanted),
            None => return false,
        },
    };
    match compare.result() {
        Relation::Equal => ordering.is_eq(),
        Relation::NotEqual => ordering.is_ne(),
        Relation::Greater => ordering.is_gt(),
        Relation::Less => ordering.is_lt(),
    }
}

/// A command that is under way: what it has written so far, on top of the model.
pub(super) struct Run<'a> {
    model: &'a Model,
    written: BTreeMap<Bytes, Option<Record>>,
    has_puts: bool,
}

impl<'a> Run<'a> {
    pub(super) fn new(model: &'a Model) -> Self {
        Self {
            model,
            written: BTreeMap::new(),
            has_puts: false,
        }
    }

    pub(super) fn into_writes(self) -> BTreeMap<Bytes, Option<Record>> {
        self.written
    }

    pub(super) fn write(&mut self, key: Bytes, after: Option<Record>) {
        self.has_puts |= after.is_some();
        self.written.insert(key, after);
    }

    fn get(&self, key: &[u8]) -> Option<&Record> {
        match self.written.get(key) {
            Some(written) => written.as_ref(),
            None => self.model.get(key, self.model.revision),
        }
    }

    fn range(&self, start: &[u8], end: &[u8]) -> Vec<Record> {
        let there = self.model.range(start, end, self.model.revision);
        let there = there.into_iter().map(|record| &record.key);
        let written = self.written.keys();
        let written = written.filter(|key| covers(key, start, end));
        let keys: BTreeSet<&Bytes> = there.chain(written).collect();
        let records = keys.into_iter().filter_map(|key| self.get(key));
        records.cloned().collect()
    }

    fn txn(&mut self, txn: &Txn) -> TxnReply {
        let (succeeded, operations) = self.model.chosen(txn);
        let operations = operations.iter().filter_map(|one| one.operation.as_ref());
        let results = operations.map(|kind| self.operation(kind)).collect();
        TxnReply { succeeded, results }
    }

    fn operation(&mut self, kind: &Kind) -> OperationReply {
        match kind {
            Kind::Put(put) => OperationReply::Put(self.put(put)),
            Kind::DeleteRange(delete) => self.delete(delete),
            Kind::Range(range) => OperationReply::Range(match u64::try_from(range.revision) {
                Ok(0) | Err(_) => select(self.range(&range.key, &range.end), range),
                Ok(at) => {
                    let there = self.model.range(&range.key, &range.end, at);
                    select(there.into_iter().cloned().collect(), range)
                }
            }),
            Kind::Txn(txn) => OperationReply::Txn(self.txn(txn)),
        }
    }

    fn put(&mut self, put: &Put) -> Option<Record> {
        let before = self.get(&put.key).cloned();
        let old = before.as_ref();
        let now = self.model.revision + 1;
        let after = Record {
            key: put.key.clone(),
            value: match old {
                Some(old) if put.ignore_value => old.value.clone(),
                _ => put.value.clone(),
            },
            create_revision: old.map_or(now, |old| old.create_revision),
            mod_revision: now,
            version: old.map_or(0, |old| old.version) + 1,
            lease: match old {
                Some(old) if put.ignore_lease => old.lease,
                _ => (put.lease != 0).then_some(SessionId(put.lease)),
            },
        };
        self.write(put.key.clone(), Some(after));
        before.filter(|_| put.previous)
    }

    fn delete(&mut self, delete: &DeleteRange) -> OperationReply {
        let gone = self.range(&delete.key, &delete.end);
        for record in &gone {
            self.write(record.key.clone(), None);
        }
        OperationReply::DeleteRange {
            deleted: gone.len() as u64,
            previous: if delete.previous { gone } else { Vec::new() },
        }
    }
}

/// What a range gives of the keys that are in it.
fn select(mut records: Vec<Record>, range: &Range) -> Found {
    let count = records.len() as u64;
    if range.count_only {
        records.clear();
    }
    let limit = usize::try_from(range.limit).unwrap_or(0);
    if limit > 0 && range.order() == Order::None {
        // No more than these are sorted, whatever by.
        records.truncate(limit + 1);
    }
    records.sort_by(|a, b| {
        let ordering = match range.by() {
            By::Key => a.key.cmp(&b.key),
            By::Version => a.version.cmp(&b.version),
            By::Create => a.create_revision.cmp(&b.create_revision),
            By::Mod => a.mod_revision.cmp(&b.mod_revision),
            By::Value => a.value.cmp(&b.value),
        };
        match range.order() {
            Order::Descend => ordering.reverse(),
            Order::None | Order::Ascend => ordering,
        }
        .then_with(|| a.key.cmp(&b.key))
    });
    let more = limit > 0 && records.len() > limit;
    if more {
        records.truncate(limit);
    }
    if range.keys_only {
        for record in &mut records {
            record.value = Bytes::new();
        }
    }
    Found {
        records,
        count,
        more,
    }
}

fn alone(kind: Kind) -> Txn {
    Txn {
        success: vec![Operation {
            operation: Some(kind),
        }],
        ..Txn::default()
    }
}
