//! Who leads, told from the keys of an election: what they were at one revision, and
//! what happened to them since.
//!
//! An observer needs no index: it can begin at any revision that can be read, and
//! goes on with the events behind it. It tells each revision at which there is another
//! leader, none, or another value of the same one; so it leaves out nothing that was
//! proclaimed, whenever it began.

use std::collections::BTreeMap;

use bytes::Bytes;
#[cfg(conclave_plant)]
use conclave_core::plant;
use conclave_core::{
    ids::Revision,
    keyspace::{Event, KeyRange, Record},
};

use crate::{Leader, election::leads, name::lock_of};

/// See the module.
#[derive(Clone, Debug)]
pub struct Observer {
    name: Bytes,
    /// In the order in which they lead.
    contenders: BTreeMap<(Revision, Bytes), Record>,
    /// By key; events may not say what was before them.
    created: BTreeMap<Bytes, Revision>,
}

/// How an election stands from a revision on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// Which revision.
    pub revision: Revision,
    /// Who leads then.
    pub leader: Option<Leader>,
}

impl Observer {
    /// The keys that tell about the election of this name, among others.
    pub fn range(name: &str) -> KeyRange {
        KeyRange::prefix(format!("{name}/").as_bytes())
    }

    /// One that knows what these keys were at some revision.
    pub fn new(name: &str, records: impl IntoIterator<Item = Record>) -> Self {
        let mut observer = Self {
            name: Bytes::copy_from_slice(name.as_bytes()),
            contenders: BTreeMap::new(),
            created: BTreeMap::new(),
        };
        for record in records {
            observer.put(record);
        }
        observer
    }

    /// Who leads now.
    pub fn leader(&self) -> Option<Leader> {
        let (_, first) = self.contenders.first_key_value()?;
        leads(first).then(|| Leader::of(first))
    }

    /// Takes note of what happened, in order, all of a revision at once. What there is
    /// to tell of it.
    pub fn take(&mut self, events: &[Event]) -> Vec<Observation> {
        let mut told = Vec::new();
        let is_same = |one: &Event, next: &Event| one.revision == next.revision;
        #[cfg(conclave_plant)]
        let is_same =
            |one: &Event, next: &Event| plant::is("observe-last-only") || is_same(one, next);
        for events in events.chunk_by(is_same) {
            let before = self.leader();
            for event in events {
                self.happened(event);
            }
            let leader = self.leader();
            if leader != before {
                let revision = events[0].revision;
                told.push(Observation { revision, leader });
            }
        }
        told
    }

    fn happened(&mut self, event: &Event) {
        if let Some(created) = self.created.remove(&event.key) {
            self.contenders.remove(&(created, event.key.clone()));
        }
        if let Some(after) = &event.after {
            self.put(after.clone());
        }
    }

    fn put(&mut self, record: Record) {
        if lock_of(&record.key).as_ref() == Some(&self.name) {
            let (created, key) = (record.create_revision, record.key.clone());
            self.created.insert(key.clone(), created);
            self.contenders.insert((created, key), record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &'static str, value: &'static str, create: u64, revision: u64) -> Record {
        Record {
            key: key.into(),
            value: value.into(),
            create_revision: create,
            mod_revision: revision,
            version: 1,
            lease: None,
        }
    }

    fn event(revision: u64, before: Option<Record>, after: Option<Record>) -> Event {
        let key = before.iter().chain(&after).next().unwrap().key.clone();
        Event {
            key,
            revision,
            before,
            after,
        }
    }

    fn told(observations: Vec<Observation>) -> Vec<(u64, Option<Bytes>)> {
        let told = observations.into_iter();
        told.map(|told| (told.revision, told.leader.map(|leader| leader.value)))
            .collect()
    }

    #[test]
    fn each_change_of_the_leader_or_its_word_is_told_and_nothing_else() {
        let (a, b) = (record("n/a", "1", 2, 2), record("n/b", "x", 3, 3));
        let again = record("n/a", "1", 2, 5);
        let deeper = record("n/m/a", "no", 1, 1);
        let mut observer = Observer::new("n", [a.clone(), deeper]);
        assert_eq!(observer.leader().unwrap().value, "1");
        let events = [
            event(3, None, Some(b.clone())),
            event(4, None, Some(record("n/m/b", "no", 4, 4))),
            event(5, Some(a), Some(again.clone())),
            event(6, Some(again), None),
            event(7, Some(b), None),
        ];
        let expected = [(5, Some("1".into())), (6, Some("x".into())), (7, None)];
        assert_eq!(told(observer.take(&events)), expected);
    }

    #[test]
    fn of_one_revision_only_its_end_is_told() {
        let (a, b) = (record("n/a", "1", 2, 2), record("n/b", "2", 3, 3));
        let mut observer = Observer::new("n", [a.clone(), b.clone()]);
        let events = [
            event(4, Some(a), None),
            event(4, Some(b), None),
            event(4, None, Some(record("n/a", "3", 4, 4))),
        ];
        assert_eq!(told(observer.take(&events)), [(4, Some("3".into()))]);
    }
}
