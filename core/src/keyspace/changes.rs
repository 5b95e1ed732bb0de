//! Which keys each revision changed: the way from a revision to its events.

use bytes::Bytes;

use super::{Record, chunks::Chunks};
use crate::ids::Revision;

/// What became of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// In front: a key that one revision deletes and makes again has both.
    Delete,
    Put,
}

/// One event, as little of it as is needed to find the versions that it is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) revision: Revision,
    pub(super) kind: Kind,
    pub(super) key: Bytes,
}

/// The events of all revisions from the newest compaction on, in order. Inside a
/// revision they are in the order of the writes; those from before a checkpoint
/// that was restored, in the order of their keys, since a checkpoint does not say.
/// No part of what is replicated hangs on what is still here.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes {
    complete_from: Revision,
    entries: Chunks<Entry>,
}

impl Changes {
    /// Those of a keyspace with these versions, past ones with the revision that
    /// ended them, and of one key in order. What was deleted by the compaction itself
    /// may be gone.
    pub(super) fn restore<'a>(
        compacted: Revision,
        versions: impl Iterator<Item = (Option<Revision>, &'a Record)>,
    ) -> Self {
        let complete_from = if compacted == 0 { 0 } else { compacted + 1 };
        let mut entries = Vec::new();
        let mut add = |revision, kind, key: &Bytes| {
            if revision >= complete_from {
                let key = key.clone();
                entries.push(Entry {
                    revision,
                    kind,
                    key,
                });
            }
        };
        let mut versions = versions.peekable();
        while let Some((ended, record)) = versions.next() {
            add(record.mod_revision, Kind::Put, &record.key);
            let next = versions.peek().map(|(_, next)| *next);
            let is_replaced = |next: &Record, ended| {
                next.key == record.key
                    && next.mod_revision == ended
                    && next.create_revision != ended
            };
            if let Some(ended) = ended
                && !next.is_some_and(|next| is_replaced(next, ended))
            {
                add(ended, Kind::Delete, &record.key);
            }
        }
        entries.sort_unstable_by(|a, b| {
            (a.revision, &a.key, a.kind).cmp(&(b.revision, &b.key, b.kind))
        });
        Self {
            complete_from,
            entries: entries.into_iter().collect(),
        }
    }

    /// The lowest revision from which on nothing is missing.
    pub(super) fn complete_from(&self) -> Revision {
        self.complete_from
    }

    /// Adds the next one.
    pub(super) fn add(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// Nobody asks for what is below `at` any more.
    pub(super) fn compact(&mut self, at: Revision) {
        self.complete_from = self.complete_from.max(at);
    }

    /// Drops what nobody asks for any more, `max` entries at most.
    pub(super) fn sweep(&mut self, max: usize) {
        for _ in 0..max {
            let first = self.entries.first();
            if first.is_none_or(|first| first.revision >= self.complete_from) {
                return;
            }
            self.entries.pop_first();
        }
    }

    /// All from the first of `revision` on.
    pub(super) fn since(&self, revision: Revision) -> impl Iterator<Item = &Entry> {
        self.entries.since(move |entry| entry.revision < revision)
    }

    /// Those of one revision.
    pub(super) fn of(&self, revision: Revision) -> impl Iterator<Item = &Entry> {
        self.since(revision)
            .take_while(move |entry| entry.revision == revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(revisions: u64) -> Changes {
        let mut changes = Changes::default();
        for revision in 2..2 + revisions {
            for key in ["b", "a"] {
                changes.add(Entry {
                    revision,
                    kind: Kind::Put,
                    key: key.into(),
                });
            }
        }
        changes
    }

    fn len(changes: &Changes) -> usize {
        changes.since(0).count()
    }

    #[test]
    fn a_revision_is_found_wherever_its_chunk_begins() {
        let changes = filled(2_000);
        for revision in [2, 255, 256, 257, 258, 259, 513, 2_001] {
            let found: Vec<_> = changes.of(revision).map(|entry| &entry.key[..]).collect();
            assert_eq!(found, [b"b", b"a"], "at {revision}");
        }
        assert_eq!(changes.of(1).count() + changes.of(2_002).count(), 0);
        assert_eq!(changes.since(2_000).count(), 4);
    }

    #[test]
    fn what_is_compacted_goes_little_by_little() {
        let mut changes = filled(2_000);
        changes.sweep(usize::MAX);
        assert_eq!(len(&changes), 4_000);
        changes.compact(1_000);
        assert_eq!(changes.complete_from(), 1_000);
        changes.sweep(3);
        assert_eq!(len(&changes), 3_997);
        changes.sweep(usize::MAX);
        // Of revision 1,000 and all after it nothing is missing.
        assert_eq!(len(&changes), 2 * (2_002 - 1_000));
        assert_eq!(changes.of(1_000).count(), 2);
    }
}
