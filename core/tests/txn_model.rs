//! Transactions and ranges against a naive model, which keeps the whole keyspace of
//! every revision and computes each answer from that.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

use std::{cmp::Ordering, collections::BTreeMap};

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    keyspace::{
        Found, KeyRange, Keyspace, Record, RevisionError, Selection,
        txn::{self, OperationReply, TxnError, TxnReply},
    },
    session::Sessions,
};
use conclave_proto::internal::{
    Compare, DeleteRange, Operation, Put, Range, Txn,
    compare::{Result as Relation, Target},
    operation::Operation as Kind,
    range::{By, Order},
};
use proptest::{collection::vec, prelude::*};

const OPERATIONS_MAX: usize = 4;

type Keys = BTreeMap<Bytes, Record>;

/// What there was at each revision, from the compacted one on.
struct Model {
    compacted: Revision,
    past: BTreeMap<Revision, Keys>,
}

impl Model {
    fn new() -> Self {
        Self {
            compacted: 0,
            past: BTreeMap::from([(1, Keys::new())]),
        }
    }

    fn now(&self) -> (Revision, &Keys) {
        let (revision, keys) = self.past.last_key_value().unwrap();
        (*revision, keys)
    }

    fn txn(&mut self, txn: &Txn) -> Result<TxnReply, TxnError> {
        shape(txn, OPERATIONS_MAX)?;
        conflicts(&txn.success)?;
        conflicts(&txn.failure)?;
        self.possible(txn)?;
        let (revision, before) = self.now();
        let mut run = Run {
            before,
            keys: before.clone(),
            past: &self.past,
            revision: revision + 1,
            wrote: false,
        };
        let reply = run.txn(txn);
        let (keys, wrote) = (run.keys, run.wrote);
        if wrote {
            self.past.insert(revision + 1, keys);
        }
        Ok(reply)
    }

    /// Whether what runs can do so, judged by the state before: all puts, then all
    /// ranges.
    fn possible(&self, txn: &Txn) -> Result<(), TxnError> {
        let (newest, keys) = self.now();
        let mut running = Vec::new();
        leaves(keys, txn, &mut running);
        for kind in &running {
            if let Kind::Put(put) = kind {
                if (put.ignore_value || put.ignore_lease) && !keys.contains_key(&put.key) {
                    return Err(TxnError::KeyNotFound);
                }
                if put.lease != 0 {
                    return Err(TxnError::SessionNotAlive(SessionId(put.lease)));
                }
            }
        }
        for kind in &running {
            if let Kind::Range(range) = kind {
                self.readable(range.revision, newest)?;
            }
        }
        Ok(())
    }

    fn readable(&self, asked: i64, newest: Revision) -> Result<(), TxnError> {
        let compacted = self.compacted;
        match u64::try_from(asked) {
            Ok(0) => Ok(()),
            Ok(asked) if asked < compacted => {
                Err(RevisionError::Compacted { asked, compacted }.into())
            }
            Ok(asked) if asked > newest => Err(RevisionError::Future { asked, newest }.into()),
            Err(_) if compacted > 0 => Err(RevisionError::Compacted {
                asked: 0,
                compacted,
            }
            .into()),
            _ => Ok(()),
        }
    }
}

fn chosen<'a>(keys: &Keys, txn: &'a Txn) -> &'a [Operation] {
    if txn.compares.iter().all(|compare| holds(keys, compare)) {
        &txn.success
    } else {
        &txn.failure
    }
}

/// The operations that run, those of transactions inside in their places.
fn leaves<'a>(keys: &Keys, txn: &'a Txn, running: &mut Vec<&'a Kind>) {
    for operation in chosen(keys, txn) {
        match operation.operation.as_ref().unwrap() {
            Kind::Txn(txn) => leaves(keys, txn, running),
            kind => running.push(kind),
        }
    }
}

struct Run<'a> {
    before: &'a Keys,
    keys: Keys,
    past: &'a BTreeMap<Revision, Keys>,
    revision: Revision,
    wrote: bool,
}

impl Run<'_> {
    fn txn(&mut self, txn: &Txn) -> TxnReply {
        let succeeded = txn
            .compares
            .iter()
            .all(|compare| holds(self.before, compare));
        let results = chosen(self.before, txn)
            .iter()
            .map(|operation| self.operation(operation.operation.as_ref().unwrap()));
        TxnReply {
            succeeded,
            results: results.collect(),
        }
    }

    fn operation(&mut self, operation: &Kind) -> OperationReply {
        match operation {
            Kind::Put(put) => {
                let before = self.keys.get(&put.key).cloned();
                self.wrote = true;
                self.keys.insert(
                    put.key.clone(),
                    Record {
                        key: put.key.clone(),
                        value: match &before {
                            Some(before) if put.ignore_value => before.value.clone(),
                            _ => put.value.clone(),
                        },
                        create_revision: before
                            .as_ref()
                            .map_or(self.revision, |before| before.create_revision),
                        mod_revision: self.revision,
                        version: before.as_ref().map_or(0, |before| before.version) + 1,
                        lease: None,
                    },
                );
                OperationReply::Put(before.filter(|_| put.previous))
            }
            Kind::DeleteRange(delete) => {
                let gone: Vec<Record> = inside(&self.keys, &delete.key, &delete.end)
                    .filter(|record| !record.key.starts_with(b"_conclave/"))
                    .cloned()
                    .collect();
                for record in &gone {
                    self.keys.remove(&record.key);
                }
                self.wrote |= !gone.is_empty();
                OperationReply::DeleteRange {
                    deleted: gone.len() as u64,
                    previous: if delete.previous { gone } else { vec![] },
                }
            }
            Kind::Range(range) => OperationReply::Range(match range.revision {
                ..=0 => select(&self.keys, range),
                at => select(&self.past[&at.unsigned_abs()], range),
            }),
            Kind::Txn(txn) => OperationReply::Txn(self.txn(txn)),
        }
    }
}

/// The wire's rule, written out.
fn covers(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        [0] => key >= start,
        _ => key >= start && key < end,
    }
}

fn inside<'a>(keys: &'a Keys, start: &'a [u8], end: &'a [u8]) -> impl Iterator<Item = &'a Record> {
    keys.values()
        .filter(move |record| covers(&record.key, start, end))
}

fn select(keys: &Keys, range: &Range) -> Found {
    let all: Vec<&Record> = inside(keys, &range.key, &range.end).collect();
    let count = all.len() as u64;
    if range.count_only {
        return Found {
            count,
            ..Found::default()
        };
    }
    let mut records: Vec<Record> = all.into_iter().cloned().collect();
    let limit = usize::try_from(range.limit).unwrap_or(0);
    let bounds = [
        range.min_mod_revision,
        range.max_mod_revision,
        range.min_create_revision,
        range.max_create_revision,
    ];
    if limit > 0 && range.order() == Order::None && bounds == [0; 4] {
        // No more than these are sorted, whatever by.
        records.truncate(limit + 1);
    }
    let (min, max) = (range.min_mod_revision, range.max_mod_revision);
    records.retain(|record| {
        let at = record.mod_revision.cast_signed();
        (min == 0 || at >= min) && (max == 0 || at <= max)
    });
    let (min, max) = (range.min_create_revision, range.max_create_revision);
    records.retain(|record| {
        let at = record.create_revision.cast_signed();
        (min == 0 || at >= min) && (max == 0 || at <= max)
    });
    records.sort_by(|a, b| {
        let ordering = match By::try_from(range.by).unwrap() {
            By::Key => a.key.cmp(&b.key),
            By::Version => a.version.cmp(&b.version),
            By::Create => a.create_revision.cmp(&b.create_revision),
            By::Mod => a.mod_revision.cmp(&b.mod_revision),
            By::Value => a.value.cmp(&b.value),
        };
        let ordering = match Order::try_from(range.order).unwrap() {
            Order::Descend => ordering.reverse(),
            _ => ordering,
        };
        ordering.then_with(|| a.key.cmp(&b.key))
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

fn holds(keys: &Keys, compare: &Compare) -> bool {
    let found: Vec<&Record> = inside(keys, &compare.key, &compare.end).collect();
    if found.is_empty() {
        let is_value = matches!(compare.target, Some(Target::Value(_)));
        let nothing = Record {
            key: Bytes::new(),
            value: Bytes::new(),
            create_revision: 0,
            mod_revision: 0,
            version: 0,
            lease: None,
        };
        return !is_value && holds_for(&nothing, compare);
    }
    found.into_iter().all(|record| holds_for(record, compare))
}

fn holds_for(record: &Record, compare: &Compare) -> bool {
    let ordering = match compare.target.as_ref().unwrap() {
        Target::Version(wanted) => record.version.cast_signed().cmp(wanted),
        Target::CreateRevision(wanted) => record.create_revision.cast_signed().cmp(wanted),
        Target::ModRevision(wanted) => record.mod_revision.cast_signed().cmp(wanted),
        Target::Value(wanted) => record.value.cmp(wanted),
        Target::Lease(wanted) => 0.cmp(wanted),
    };
    match Relation::try_from(compare.result).unwrap() {
        Relation::Equal => ordering == Ordering::Equal,
        Relation::NotEqual => ordering != Ordering::Equal,
        Relation::Greater => ordering == Ordering::Greater,
        Relation::Less => ordering == Ordering::Less,
    }
}

/// How many operations there are, and what is wrong with one of them by itself.
fn shape(txn: &Txn, max: usize) -> Result<(), TxnError> {
    let longest = [txn.compares.len(), txn.success.len(), txn.failure.len()];
    let longest = longest.into_iter().max().unwrap();
    if longest > max {
        return Err(TxnError::TooManyOperations);
    }
    for operation in txn.success.iter().chain(&txn.failure) {
        match operation.operation.as_ref().unwrap() {
            Kind::Put(put) if put.ignore_value && !put.value.is_empty() => {
                return Err(TxnError::ValueGiven);
            }
            Kind::Put(put) if put.ignore_lease && put.lease != 0 => {
                return Err(TxnError::SessionGiven);
            }
            Kind::Put(Put { key, .. }) if key.starts_with(b"_conclave/") => {
                return Err(TxnError::Reserved);
            }
            Kind::DeleteRange(delete)
                if delete.end.is_empty() && delete.key.starts_with(b"_conclave/") =>
            {
                return Err(TxnError::Reserved);
            }
            Kind::Txn(txn) => shape(txn, max - longest)?,
            _ => {}
        }
    }
    Ok(())
}

/// A write anywhere below an operation of a list.
struct Write<'a> {
    /// Which operation of the list; and whether it is that operation itself.
    place: (usize, bool),
    kind: &'a Kind,
}

fn writes(list: &[Operation]) -> Vec<Write<'_>> {
    let mut all = Vec::new();
    for (index, operation) in list.iter().enumerate() {
        match operation.operation.as_ref().unwrap() {
            Kind::Txn(txn) => {
                for inner in [&txn.success, &txn.failure].map(|list| writes(list)) {
                    all.extend(inner.into_iter().map(|write| Write {
                        place: (index, false),
                        kind: write.kind,
                    }));
                }
            }
            Kind::Range(_) => {}
            kind => all.push(Write {
                place: (index, true),
                kind,
            }),
        }
    }
    all
}

/// Any two writes of different operations of a list, one by one. As in etcd, a put
/// inside a transaction does not conflict with a delete inside a later one, and none
/// with a delete of all keys from one on.
fn conflicts(list: &[Operation]) -> Result<(), TxnError> {
    for operation in list {
        if let Some(Kind::Txn(txn)) = &operation.operation {
            conflicts(&txn.success)?;
            conflicts(&txn.failure)?;
        }
    }
    let all = writes(list);
    for one in &all {
        for other in all.iter().filter(|other| other.place.0 != one.place.0) {
            let is_conflict = match (one.kind, other.kind) {
                (Kind::Put(one), Kind::Put(other)) => one.key == other.key,
                (Kind::Put(put), Kind::DeleteRange(delete)) => {
                    delete.end != "\0"
                        && covers(&put.key, &delete.key, &delete.end)
                        && (one.place.1 || other.place.1 || other.place.0 < one.place.0)
                }
                _ => false,
            };
            if is_conflict {
                return Err(TxnError::DuplicateKey);
            }
        }
    }
    Ok(())
}

fn key() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        9 => prop::sample::select(vec!["a", "b", "ba", "c", "d"]),
        1 => Just("_conclave/a"),
    ]
    .prop_map(Bytes::from)
}

fn end() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["", "", "\0", "b", "c", "zz"]).prop_map(Bytes::from)
}

fn value() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["", "1", "2"]).prop_map(Bytes::from)
}

fn revision() -> impl Strategy<Value = i64> {
    prop_oneof![4 => Just(0), 4 => 1..12_i64, 1 => Just(-1)]
}

fn bound() -> impl Strategy<Value = i64> {
    prop_oneof![3 => Just(0), 1 => -1..12_i64]
}

prop_compose! {
    fn range()(
        (key, end, revision) in (key(), end(), revision()),
        limit in -1..4_i64,
        (order, by) in (0..3, 0..5),
        (keys_only, count_only) in (any::<bool>(), prop::bool::weighted(0.2)),
        bounds in [bound(), bound(), bound(), bound()],
    ) -> Range {
        Range {
            key, end, revision, limit, order, by, keys_only, count_only,
            min_mod_revision: bounds[0],
            max_mod_revision: bounds[1],
            min_create_revision: bounds[2],
            max_create_revision: bounds[3],
        }
    }
}

prop_compose! {
    fn put()(
        (key, value) in (key(), value()),
        dead_lease in prop::bool::weighted(0.03),
        (ignore_value, ignore_lease) in
            (prop::bool::weighted(0.1), prop::bool::weighted(0.1)),
        previous in any::<bool>(),
    ) -> Put {
        Put { key, value, lease: i64::from(dead_lease) * 9, ignore_value, ignore_lease, previous }
    }
}

prop_compose! {
    fn delete()((key, end, previous) in (key(), end(), any::<bool>())) -> DeleteRange {
        DeleteRange { key, end, previous }
    }
}

fn compare() -> impl Strategy<Value = Compare> {
    let target = prop_oneof![
        (-1..3_i64).prop_map(Target::Version),
        (-1..9_i64).prop_map(Target::CreateRevision),
        (-1..9_i64).prop_map(Target::ModRevision),
        value().prop_map(Target::Value),
        (-1..2_i64).prop_map(Target::Lease),
    ];
    (key(), end(), 0..4, target).prop_map(|(key, end, result, target)| Compare {
        key,
        end,
        result,
        target: Some(target),
    })
}

fn operation() -> impl Strategy<Value = Operation> {
    let leaf = prop_oneof![
        4 => put().prop_map(Kind::Put),
        2 => delete().prop_map(Kind::DeleteRange),
        3 => range().prop_map(Kind::Range),
    ]
    .prop_map(|kind| Operation {
        operation: Some(kind),
    });
    leaf.prop_recursive(2, 8, 2, |inner| {
        txn(inner.boxed()).prop_map(|txn| Operation {
            operation: Some(Kind::Txn(txn)),
        })
    })
}

fn txn(operation: BoxedStrategy<Operation>) -> impl Strategy<Value = Txn> {
    let list = || vec(operation.clone(), 0..4);
    (vec(compare(), 0..2), list(), list()).prop_map(|(compares, success, failure)| Txn {
        compares,
        success,
        failure,
    })
}

#[derive(Clone, Debug)]
enum Step {
    Txn(Txn),
    Put(Put),
    Delete(DeleteRange),
    Compact(Revision),
    /// Read in pieces of so many keys, one after each step that follows.
    Read(Range, usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => txn(operation().boxed()).prop_map(Step::Txn),
        6 => put().prop_map(Step::Put),
        2 => delete().prop_map(Step::Delete),
        1 => (1..12_u64).prop_map(Step::Compact),
        4 => (range(), 1..4_usize).prop_map(|(range, steps)| Step::Read(range, steps)),
    ]
}

/// A read that takes its time.
struct Reading {
    selection: Selection,
    rest: Option<KeyRange>,
    at: Revision,
    steps: usize,
    expected: Found,
}

impl Reading {
    fn begin(range: &Range, steps: usize, model: &Model) -> Option<Self> {
        let (newest, keys) = model.now();
        model.readable(range.revision, newest).ok()?;
        let at = u64::try_from(range.revision).ok().filter(|at| *at > 0);
        let expected = at.map_or(keys, |at| &model.past[&at]);
        Some(Self {
            selection: Selection::new(range).unwrap(),
            rest: Some(KeyRange::new(range.key.clone(), range.end.clone())),
            at: at.unwrap_or(newest),
            steps,
            expected: select(expected, range),
        })
    }

    fn go_on(&mut self, keyspace: &Keyspace) {
        let Some(rest) = self.rest.take() else { return };
        let (filter, wanted) = (self.selection.filter(), self.selection.wanted());
        let mut piece = keyspace.piece(&rest, self.at, &filter, wanted, self.steps);
        assert!(piece.steps <= self.steps, "a piece is bounded");
        self.rest = piece.next.take().map(|key| rest.from(key));
        self.selection.add(piece);
    }
}

fn execute(keyspace: &mut Keyspace, txn: Txn, answers: bool) -> Result<TxnReply, TxnError> {
    txn::check(&txn, OPERATIONS_MAX)?;
    let mut overlay = keyspace.overlay();
    let reply = txn::execute(&mut overlay, &Sessions::default(), txn, answers)?;
    let writes = overlay.into_writes();
    keyspace.keep(writes);
    Ok(reply)
}

fn alone(kind: Kind) -> Txn {
    Txn {
        success: vec![Operation {
            operation: Some(kind),
        }],
        ..Txn::default()
    }
}

/// A put or a delete as a command of its own.
fn operate(keyspace: &mut Keyspace, kind: Kind) -> Result<OperationReply, TxnError> {
    let mut overlay = keyspace.overlay();
    let reply = match kind {
        Kind::Put(put) => txn::execute_put(&mut overlay, &Sessions::default(), put)?,
        Kind::DeleteRange(delete) => txn::execute_delete(&mut overlay, delete, true)?,
        kind => panic!("{kind:?} is no command"),
    };
    let writes = overlay.into_writes();
    keyspace.keep(writes);
    Ok(reply)
}

proptest! {
    #[test]
    fn transactions_and_ranges_are_those_of_the_model(steps in vec(step(), 1..24)) {
        let mut model = Model::new();
        let mut keyspace = Keyspace::new();
        let mut reading: Vec<Reading> = Vec::new();
        for step in steps {
            match step {
                Step::Txn(txn) => {
                    let expected = model.txn(&txn);
                    let mut unseen = keyspace.clone();
                    prop_assert_eq!(execute(&mut keyspace, txn.clone(), true), expected.clone());
                    // What nobody sees is left out, and nothing else differs.
                    let unseen_reply = execute(&mut unseen, txn, false);
                    prop_assert_eq!(unseen_reply.is_ok(), expected.is_ok());
                    prop_assert_eq!(&unseen, &keyspace);
                }
                Step::Put(put) => {
                    let expected = model.txn(&alone(Kind::Put(put.clone())));
                    // Alone, its session is looked at first.
                    let expected = match expected {
                        Err(TxnError::KeyNotFound) if put.lease != 0 => {
                            Err(TxnError::SessionNotAlive(SessionId(put.lease)))
                        }
                        expected => expected.map(|reply| reply.results[0].clone()),
                    };
                    prop_assert_eq!(operate(&mut keyspace, Kind::Put(put)), expected);
                }
                Step::Delete(delete) => {
                    let expected = model.txn(&alone(Kind::DeleteRange(delete.clone())));
                    let expected = expected.map(|reply| reply.results[0].clone());
                    prop_assert_eq!(operate(&mut keyspace, Kind::DeleteRange(delete)), expected);
                }
                Step::Compact(at) => {
                    if keyspace.compact(at).is_ok() {
                        model.compacted = at;
                        reading.retain(|reading| reading.at >= at);
                        keyspace.sweep(2);
                    }
                }
                Step::Read(range, steps) => {
                    reading.extend(Reading::begin(&range, steps, &model));
                }
            }
            prop_assert_eq!(keyspace.revision(), model.now().0);
            for reading in &mut reading {
                reading.go_on(&keyspace);
            }
        }
        for mut reading in reading {
            while reading.rest.is_some() {
                reading.go_on(&keyspace);
            }
            prop_assert_eq!(reading.selection.finish(), reading.expected);
        }
    }
}

#[test]
fn a_transaction_is_bounded_in_depth_and_in_all() {
    let mut deep = Txn::default();
    for _ in 1..conclave_core::limits::TXN_DEPTH_MAX {
        deep = alone(Kind::Txn(deep));
    }
    assert_eq!(txn::check(&deep, 128), Ok(()));
    let deeper = alone(Kind::Txn(deep));
    assert_eq!(txn::check(&deeper, 128), Err(TxnError::TooManyOperations));

    let range = || Operation {
        operation: Some(Kind::Range(Range {
            key: "a".into(),
            ..Range::default()
        })),
    };
    let inner = || {
        let failure = (0..64).map(|_| range()).collect();
        Operation {
            operation: Some(Kind::Txn(Txn {
                failure,
                ..Txn::default()
            })),
        }
    };
    let wide = |width: usize| Txn {
        success: (0..width).map(|_| inner()).collect(),
        ..Txn::default()
    };
    assert_eq!(txn::check(&wide(63), 128), Ok(()));
    assert_eq!(txn::check(&wide(64), 128), Err(TxnError::TooManyOperations));
}

#[test]
fn a_transaction_of_the_greatest_depth_comes_back_from_the_log() {
    use conclave_proto::internal::{
        Command, Entry, Forward, PeerMessage, command::Body, peer_message::Message,
    };
    use prost::Message as _;

    let put = Put {
        key: "a".into(),
        ..Put::default()
    };
    let mut txn = alone(Kind::Put(put));
    for _ in 1..conclave_core::limits::TXN_DEPTH_MAX {
        txn = alone(Kind::Txn(txn));
    }
    let command = Command {
        origin: None,
        body: Some(Body::Txn(txn)),
    };
    let entry = Entry {
        stamp: None,
        commands: vec![command.clone()],
    };
    assert_eq!(Entry::decode(&entry.encode_to_vec()[..]), Ok(entry));
    let forward = Forward {
        commands: vec![command],
        ..Forward::default()
    };
    let message = PeerMessage {
        message: Some(Message::Forward(forward)),
    };
    let bytes = message.encode_to_vec();
    assert_eq!(PeerMessage::decode(&bytes[..]), Ok(message));
}
