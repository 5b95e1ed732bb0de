//! The keyspace against a naive model: a list of all events, from which every
//! read is computed anew.

use std::collections::BTreeMap;

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    keyspace::{Change, Event as Told, Interest, KeyRange, Keyspace, Record, RevisionError},
};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Write {
    Put {
        key: Bytes,
        value: Bytes,
        lease: Option<SessionId>,
    },
    Delete {
        key: Bytes,
    },
    DeleteRange {
        key: Bytes,
        end: Bytes,
    },
}

/// The writes of one command, and whether they are kept.
#[derive(Clone, Debug)]
struct Command {
    writes: Vec<Write>,
    kept: bool,
}

/// One put or delete.
#[derive(Clone, Debug)]
struct Event {
    revision: Revision,
    key: Bytes,
    put: Option<(Bytes, Option<SessionId>)>,
}

/// Every event that was kept, in order.
#[derive(Clone, Debug, Default)]
struct Model {
    events: Vec<Event>,
}

impl Model {
    fn revision(&self) -> Revision {
        self.events.last().map_or(1, |event| event.revision)
    }

    fn state_at(&self, at: Revision) -> BTreeMap<Bytes, Record> {
        let mut state = BTreeMap::<Bytes, Record>::new();
        for Event { revision, key, put } in self.events.iter().filter(|e| e.revision <= at) {
            let Some((value, lease)) = put else {
                state.remove(key);
                continue;
            };
            let before = state.get(key);
            let record = Record {
                key: key.clone(),
                value: value.clone(),
                create_revision: before.map_or(*revision, |record| record.create_revision),
                mod_revision: *revision,
                version: before.map_or(0, |record| record.version) + 1,
                lease: *lease,
            };
            state.insert(key.clone(), record);
        }
        state
    }

    /// Applies one command; says for each write how many keys it touched.
    fn apply(&mut self, writes: &[Write]) -> Vec<usize> {
        let revision = self.revision() + 1;
        let mut touched = Vec::new();
        for write in writes {
            let before = self.events.len();
            match write.clone() {
                Write::Put { key, value, lease } => {
                    self.events.push(Event {
                        revision,
                        key,
                        put: Some((value, lease)),
                    });
                }
                Write::Delete { key } => self.delete_if(revision, |at| *at == key),
                Write::DeleteRange { key, end } => {
                    self.delete_if(revision, |at| in_range(at, &key, &end));
                }
            }
            touched.push(self.events.len() - before);
        }
        touched
    }

    /// The size of the versions that were there at some revision from `compacted`
    /// on, and are no more.
    fn history_bytes(&self, compacted: Revision) -> u64 {
        let newest = self.state_at(self.revision());
        let mut past = BTreeMap::new();
        for at in compacted..self.revision() {
            for (key, record) in self.state_at(at) {
                if newest.get(&key) != Some(&record) {
                    past.insert((key, record.mod_revision), record.bytes());
                }
            }
        }
        past.values().sum()
    }

    /// What a revision did to each key, in the order in which these were last written.
    fn told(&self, revision: Revision) -> Vec<Told> {
        let (before, after) = (self.state_at(revision - 1), self.state_at(revision));
        let written = self.events.iter().filter(|e| e.revision == revision);
        let written: Vec<&Bytes> = written.map(|event| &event.key).collect();
        let mut told = Vec::new();
        for (at, key) in written.iter().enumerate() {
            if written[at + 1..].contains(key) {
                continue;
            }
            let (before, after) = (before.get(*key).cloned(), after.get(*key).cloned());
            let is_new = |record: &Record| record.create_revision == revision;
            let mut tell = |before, after| {
                told.push(Told {
                    key: (*key).clone(),
                    revision,
                    before,
                    after,
                });
            };
            match (before, after) {
                (None, None) => {}
                (Some(before), Some(after)) if is_new(&after) => {
                    tell(Some(before), None);
                    tell(None, Some(after));
                }
                (before, after) => tell(before, after),
            }
        }
        told
    }

    /// What a selection asks for, from a revision on, with what was before as far as
    /// that can be read.
    fn told_since(&self, of: &Interest, from: Revision, compacted: Revision) -> Vec<Told> {
        let all = (from..=self.revision()).flat_map(|revision| self.told(revision));
        let mut told: Vec<Told> = all
            .filter(|told| of.range.contains(&told.key))
            .filter(|told| {
                if told.after.is_some() {
                    of.puts
                } else {
                    of.deletes
                }
            })
            .collect();
        for told in &mut told {
            if told.revision <= compacted {
                told.before = None;
            }
        }
        told
    }

    fn delete_if(&mut self, revision: Revision, chosen: impl Fn(&Bytes) -> bool) {
        let keys = self.state_at(revision).into_keys().filter(chosen);
        self.events.extend(keys.map(|key| Event {
            revision,
            key,
            put: None,
        }));
    }
}

/// The wire's rule, written out.
fn in_range(at: &Bytes, key: &Bytes, end: &Bytes) -> bool {
    if end.is_empty() {
        at == key
    } else if end == "\0" {
        at >= key
    } else {
        at >= key && at < end
    }
}

fn run(keyspace: &mut Keyspace, command: &Command) -> (Vec<usize>, Vec<Change>) {
    let mut overlay = keyspace.overlay();
    let mut touched = Vec::new();
    for write in &command.writes {
        touched.push(match write.clone() {
            Write::Put { key, value, lease } => {
                overlay.put(key, value, lease);
                1
            }
            Write::Delete { key } => usize::from(overlay.delete(&key)),
            Write::DeleteRange { key, end } => {
                let range = KeyRange::new(key, end);
                let records = overlay.range(&range);
                let keys: Vec<Bytes> = records.map(|record| record.key.clone()).collect();
                keys.iter().filter(|key| overlay.delete(key)).count()
            }
        });
    }
    let everything: Vec<Record> = overlay.range(&KeyRange::prefix(b"")).cloned().collect();
    let writes = overlay.into_writes();
    if !command.kept {
        return (touched, Vec::new());
    }
    let changes = keyspace.keep(writes);
    // What the overlay showed is what there is once it is kept.
    assert!(keyspace.range(&KeyRange::prefix(b""), None).eq(&everything));
    (touched, changes)
}

/// Few keys, some a prefix of others, so that commands meet.
fn key() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["a", "a\0", "a/1", "a/2", "b", "b\u{7f}", "c"]).prop_map(Bytes::from)
}

fn end() -> impl Strategy<Value = Bytes> {
    prop::sample::select(vec!["", "\0", "a", "a0", "b", "c"]).prop_map(Bytes::from)
}

fn write() -> impl Strategy<Value = Write> {
    let lease = prop::option::of((1i64..4).prop_map(SessionId));
    let value = prop::collection::vec(any::<u8>(), 0..3).prop_map(Bytes::from);
    prop_oneof![
        4 => (key(), value, lease).prop_map(|(key, value, lease)| Write::Put { key, value, lease }),
        2 => key().prop_map(|key| Write::Delete { key }),
        1 => (key(), end()).prop_map(|(key, end)| Write::DeleteRange { key, end }),
    ]
}

fn commands() -> impl Strategy<Value = Vec<Command>> {
    let command = (
        prop::collection::vec(write(), 0..5),
        prop::bool::weighted(0.8),
    )
        .prop_map(|(writes, kept)| Command { writes, kept });
    prop::collection::vec(command, 1..25)
}

/// All that can be read of the keyspace without a revision.
fn check_present(keyspace: &Keyspace, model: &Model) {
    let state = model.state_at(model.revision());
    assert_eq!(keyspace.revision(), model.revision());
    assert_eq!(keyspace.len(), state.len());
    for (key, record) in &state {
        assert_eq!(keyspace.get(key), Some(record));
    }
    for session in (1..4).map(SessionId) {
        let bound = state
            .values()
            .filter(|r| r.lease == Some(session))
            .map(|r| &r.key);
        assert!(keyspace.keys_of(session).eq(bound.clone()));
        assert_eq!(keyspace.keys_bound(session), bound.count());
    }
}

fn selection() -> impl Strategy<Value = Interest> {
    (key(), end(), any::<bool>(), any::<bool>()).prop_map(|(key, end, puts, deletes)| Interest {
        range: KeyRange::new(key, end),
        puts,
        deletes,
    })
}

/// All events from a revision on, a few at a time.
fn follow(keyspace: &Keyspace, of: &Interest, from: Revision, max: usize) -> Vec<Told> {
    let (mut next, mut told) = (from, Vec::new());
    while next <= keyspace.revision() {
        let excerpt = keyspace.events_since(of, next, max, u64::MAX);
        assert!(excerpt.next > next);
        assert!(
            excerpt
                .events
                .iter()
                .all(|event| (next..excerpt.next).contains(&event.revision))
        );
        next = excerpt.next;
        told.extend(excerpt.events);
    }
    told
}

/// Everything from the compaction on is there, and what was before is refused.
fn check_compacted(keyspace: &Keyspace, model: &Model, compacted: Revision) {
    check_present(keyspace, model);
    assert_eq!(keyspace.compacted(), compacted);
    let newest = model.revision();
    for asked in 0..compacted {
        let refusal = RevisionError::Compacted { asked, compacted };
        assert_eq!(keyspace.check_readable(asked), Err(refusal));
    }
    for at in compacted..=newest {
        let everything = KeyRange::prefix(b"");
        let seen = keyspace.range(&everything, Some(at));
        assert_eq!(keyspace.check_readable(at), Ok(()));
        assert!(seen.eq(model.state_at(at).values()), "at {at}");
    }
    let asked = newest + 1;
    let refusal = RevisionError::Future { asked, newest };
    assert_eq!(keyspace.check_readable(asked), Err(refusal));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_read_at_any_revision_is_as_the_events_say(
        commands in commands(),
        ranges in prop::collection::vec((key(), end()), 1..6),
    ) {
        let (mut keyspace, mut model) = (Keyspace::new(), Model::default());
        for command in &commands {
            let before = keyspace.clone();
            let mut tried = model.clone();
            let (touched, changes) = run(&mut keyspace, command);
            prop_assert_eq!(touched, tried.apply(&command.writes));
            if command.kept {
                prop_assert_eq!(changes.len(), tried.events.len() - model.events.len());
                model = tried;
            } else {
                prop_assert_eq!(&keyspace, &before);
            }
            check_present(&keyspace, &model);
        }
        for at in 0..=model.revision() + 1 {
            let state = model.state_at(at);
            for (key, end) in &ranges {
                let range = KeyRange::new(key.clone(), end.clone());
                let expected = state.values().filter(|r| in_range(&r.key, key, end));
                prop_assert!(keyspace.range(&range, Some(at)).eq(expected), "{range:?} at {at}");
            }
        }
    }

    #[test]
    fn changes_say_what_was_before_and_after(commands in commands()) {
        let mut keyspace = Keyspace::new();
        let mut replayed = BTreeMap::<Bytes, Record>::new();
        for command in &commands {
            let (_, changes) = run(&mut keyspace, command);
            for (sub, change) in changes.into_iter().enumerate() {
                prop_assert_eq!(change.revision, keyspace.revision());
                prop_assert_eq!(change.sub as usize, sub);
                prop_assert_eq!(replayed.remove(&change.key), change.before);
                replayed.extend(change.after.map(|record| (change.key, record)));
            }
        }
        prop_assert!(keyspace.range(&KeyRange::prefix(b""), None).eq(replayed.values()));
    }

    #[test]
    fn equal_histories_have_equal_digests_and_each_change_makes_another(commands in commands()) {
        let (mut one, mut other) = (Keyspace::new(), Keyspace::new());
        for command in &commands {
            let before = one.digest();
            let (_, changes) = run(&mut one, command);
            prop_assert_eq!(before == one.digest(), changes.is_empty());
            run(&mut other, command);
            prop_assert_eq!(one.digest(), other.digest());
        }
        prop_assert_eq!(one, other);
    }

    #[test]
    fn a_compaction_takes_what_is_below_it_and_nothing_else(
        rounds in prop::collection::vec((commands(), 0..40u64, 0..4usize), 1..4),
    ) {
        let (mut keyspace, mut model) = (Keyspace::new(), Model::default());
        let mut compacted = 0;
        for (commands, at, sweep) in rounds {
            for command in commands.iter().filter(|command| command.kept) {
                run(&mut keyspace, command);
                model.apply(&command.writes);
            }
            let newest = model.revision();
            let expected = match at {
                _ if at <= compacted => Err(RevisionError::Compacted { asked: at, compacted }),
                _ if at > newest => Err(RevisionError::Future { asked: at, newest }),
                _ => Ok(()),
            };
            prop_assert_eq!(keyspace.compact(at), expected);
            if expected.is_ok() {
                compacted = at;
            }
            // Some of what is superseded stays for the next round.
            keyspace.sweep(sweep);
            check_compacted(&keyspace, &model, compacted);
        }
        keyspace.sweep(usize::MAX);
        prop_assert!(!keyspace.has_superseded());
        check_compacted(&keyspace, &model, compacted);
        let live: u64 = model.state_at(model.revision()).values().map(Record::bytes).sum();
        prop_assert_eq!(keyspace.history_bytes(), model.history_bytes(compacted));
        prop_assert_eq!(keyspace.bytes(), live + keyspace.history_bytes());
    }

    #[test]
    fn events_are_what_a_revision_changed_from_the_compaction_on(
        rounds in prop::collection::vec((commands(), 0..40u64, 0..4usize), 1..4),
        wanted in prop::collection::vec((selection(), 1..6usize), 1..6),
    ) {
        let (mut keyspace, mut model) = (Keyspace::new(), Model::default());
        for (commands, at, sweep) in rounds {
            for command in commands.iter().filter(|command| command.kept) {
                let before = model.revision();
                run(&mut keyspace, command);
                model.apply(&command.writes);
                let newest = model.revision();
                if newest > before {
                    let all = Interest {
                        range: KeyRange::prefix(b""),
                        puts: true,
                        deletes: true,
                    };
                    let told = keyspace.events_since(&all, newest, usize::MAX, u64::MAX);
                    prop_assert_eq!(told.events, model.told(newest));
                }
            }
            keyspace.compact(at).ok();
            keyspace.sweep(sweep);
            let compacted = keyspace.compacted();
            prop_assert_eq!(keyspace.complete_from(), compacted);
            for (of, max) in &wanted {
                for from in compacted.max(1)..=model.revision() {
                    prop_assert!(keyspace.knows_all(of, from));
                    let expected = model.told_since(of, from, compacted);
                    prop_assert_eq!(follow(&keyspace, of, from, *max), expected, "{:?} {}", of, from);
                }
                for from in 1..compacted {
                    // Whoever is told that nothing was missed has missed nothing.
                    if keyspace.knows_all(of, from) {
                        let expected = model.told_since(of, from, compacted);
                        prop_assert_eq!(follow(&keyspace, of, from, *max), expected);
                    }
                }
            }
        }
    }
}
