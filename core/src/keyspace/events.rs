//! What happened to keys, from a revision on.

use bytes::Bytes;

use super::{
    KeyRange, Keyspace, Record,
    changes::{Entry, Kind},
};
use crate::ids::Revision;

/// What one revision did to a key, as reads before and after it see that. A key that
/// a command wrote more than once has one event, or two if it was there before, was
/// deleted, and made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which key.
    pub key: Bytes,
    /// Which revision.
    pub revision: Revision,
    /// The version that was replaced or deleted. Of an event of the compacted
    /// revision it may be gone.
    pub before: Option<Record>,
    /// The version that was made; `None` if the key was deleted.
    pub after: Option<Record>,
}

impl Event {
    /// What it counts for wherever it waits, in bytes.
    pub fn bytes(&self) -> u64 {
        let versions = self.before.iter().chain(&self.after);
        versions.map(Record::bytes).sum::<u64>() + self.key.len() as u64
    }
}

/// Which events are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Of which keys.
    pub range: KeyRange,
    /// Versions that were made.
    pub puts: bool,
    /// Keys that were deleted.
    pub deletes: bool,
}

impl Interest {
    fn takes(&self, kind: Kind) -> bool {
        match kind {
            Kind::Put => self.puts,
            Kind::Delete => self.deletes,
        }
    }

    /// Whether an event of a key in the range is asked for.
    pub fn takes_event(&self, event: &Event) -> bool {
        self.takes(match event.after {
            Some(_) => Kind::Put,
            None => Kind::Delete,
        })
    }
}

/// Some of what happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Excerpt {
    /// In order; all of a revision or none.
    pub events: Vec<Event>,
    /// There are no other events below this revision.
    pub next: Revision,
    /// What it took to find them.
    pub looked_at: usize,
}

impl Keyspace {
    /// The lowest revision from which on all events are known. It is the compacted
    /// one; after a checkpoint was restored the one behind that, until the next
    /// compaction.
    pub fn complete_from(&self) -> Revision {
        self.changes.complete_from()
    }

    /// Whether nothing that a selection asks for happened from `from` on that is not
    /// known any more.
    pub fn knows_all(&self, of: &Interest, from: Revision) -> bool {
        if from >= self.complete_from() {
            return true;
        }
        // A key that lives, and was written last before that.
        let single = of.range.as_single();
        single
            .and_then(|key| self.get(key))
            .is_some_and(|record| record.mod_revision < from)
    }

    /// The events of a revision, which must be known.
    pub fn events_of(&self, revision: Revision) -> impl Iterator<Item = Event> {
        let entries = self.changes.of(revision);
        entries.map(|entry| self.event(entry))
    }

    /// The keys that a revision changed, some of them twice, each with a way to its event.
    /// All of them must be known.
    pub(crate) fn changed_by(
        &self,
        revision: Revision,
    ) -> impl Iterator<Item = (&Bytes, impl FnOnce() -> Event)> {
        let entries = self.changes.of(revision);
        entries.map(|entry| (&entry.key, || self.event(entry)))
    }

    /// The events from revision `from` on, of which all must be known. Looks at some
    /// `max` changes, and takes some `max_bytes` of events; what is begun of a
    /// revision is brought to its end.
    pub fn events_since(
        &self,
        of: &Interest,
        from: Revision,
        max: usize,
        max_bytes: u64,
    ) -> Excerpt {
        let mut taking = Taking {
            keyspace: self,
            of,
            max,
            max_bytes,
            bytes: 0,
            excerpt: Excerpt {
                next: from,
                ..Excerpt::default()
            },
        };
        let is_whole = match of.range.as_single() {
            Some(key) => taking.follow_key(key),
            None => taking.follow_all(),
        };
        if is_whole {
            taking.excerpt.next = self.revision + 1;
        }
        taking.excerpt
    }

    fn event(&self, entry: &Entry) -> Event {
        let Entry {
            revision,
            kind,
            key,
        } = entry;
        let after = match kind {
            Kind::Put => self.made_at(key, *revision),
            Kind::Delete => None,
        };
        let is_new = after.is_some_and(|after| after.create_revision == *revision);
        let before = match is_new {
            true => None,
            false => self.past.ended_at(key, *revision),
        };
        Event {
            key: key.clone(),
            revision: *revision,
            before: before.cloned(),
            after: after.cloned(),
        }
    }

    /// The version of a key that a revision made.
    fn made_at(&self, key: &Bytes, revision: Revision) -> Option<&Record> {
        let live = self.get(key);
        live.filter(|record| record.mod_revision == revision)
            .or_else(|| {
                let (_, record) = self.past.first_of(key, revision + 1)?;
                (record.mod_revision == revision).then_some(record)
            })
    }

    /// What a revision did to one key, whatever it did to others: the same as its entries
    /// in the list of changes. It must be behind the compacted one.
    fn changes_of(&self, key: &Bytes, revision: Revision) -> impl Iterator<Item = Entry> {
        let made = self.made_at(key, revision);
        let has_ended = self.past.ended_at(key, revision).is_some();
        let is_deleted = has_ended && made.is_none_or(|made| made.create_revision == revision);
        let kinds = [
            is_deleted.then_some(Kind::Delete),
            made.is_some().then_some(Kind::Put),
        ];
        kinds.into_iter().flatten().map(move |kind| Entry {
            revision,
            kind,
            key: key.clone(),
        })
    }

    /// The first revision from `from` on that changed a key, if what it did is known.
    fn next_change(&self, key: &Bytes, from: Revision) -> Option<Revision> {
        match self.past.first_of(key, from) {
            Some((_, record)) if record.mod_revision >= from => Some(record.mod_revision),
            Some((ended, _)) => Some(ended),
            None => {
                let live = self.get(key)?;
                (live.mod_revision >= from).then_some(live.mod_revision)
            }
        }
    }
}

/// An excerpt, as far as it has come.
struct Taking<'a> {
    keyspace: &'a Keyspace,
    of: &'a Interest,
    max: usize,
    max_bytes: u64,
    bytes: u64,
    excerpt: Excerpt,
}

impl Taking<'_> {
    fn is_full(&self) -> bool {
        self.excerpt.looked_at >= self.max || self.bytes >= self.max_bytes
    }

    fn look_at(&mut self, entry: &Entry) {
        self.excerpt.looked_at += 1;
        if self.of.takes(entry.kind) && self.of.range.contains(&entry.key) {
            let mut event = self.keyspace.event(entry);
            if event.revision <= self.keyspace.compacted() {
                // It may be there still, and may not.
                event.before = None;
            }
            self.bytes += event.bytes();
            self.excerpt.events.push(event);
        }
    }

    /// Goes through all changes; whether to the end.
    fn follow_all(&mut self) -> bool {
        for entry in self.keyspace.changes.since(self.excerpt.next) {
            if entry.revision > self.excerpt.next {
                self.excerpt.next = entry.revision;
                if self.is_full() {
                    return false;
                }
            }
            self.look_at(entry);
        }
        true
    }

    /// Goes from one change of a key to the next; whether to the end.
    fn follow_key(&mut self, key: &Bytes) -> bool {
        let keyspace = self.keyspace;
        let mut from = self.excerpt.next;
        loop {
            let revision = if from == keyspace.compacted() {
                // What it deleted leads nowhere any more.
                Some(from)
            } else {
                keyspace.next_change(key, from)
            };
            let Some(revision) = revision else {
                return true;
            };
            if self.is_full() {
                self.excerpt.next = revision;
                return false;
            }
            if revision == keyspace.compacted() {
                for entry in keyspace.changes.of(revision) {
                    self.look_at(entry);
                }
            } else {
                for entry in keyspace.changes_of(key, revision) {
                    self.look_at(&entry);
                }
            }
            self.excerpt.looked_at += 1;
            from = revision + 1;
        }
    }
}
