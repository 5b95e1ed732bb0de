//! Versions that are no more, until a compaction drops them.

use std::{collections::BTreeSet, ops::Bound};

use bytes::Bytes;

use super::{KeyRange, Record, chunks::Chunks, order::Past};
use crate::ids::Revision;

/// See the module. Every version is under the revision that ended it.
///
/// A compaction takes effect at once: what it makes unreadable is refused from
/// then on. The versions themselves go little by little, so that none stops the
/// node. Both happen at the same entries on every node.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    compacted: Revision,
    past: BTreeSet<Past>,
    /// Where the same versions are, in order of when they ended and of key: those that a
    /// compaction drops first in front.
    by_end: Chunks<(Revision, Bytes)>,
    bytes: u64,
}

impl History {
    /// A history of these versions, each with the revision that ended it.
    pub(super) fn restore(compacted: Revision, past: Vec<(Revision, Record)>) -> Self {
        let of = |(ended, record)| Past { ended, record };
        // In place, and then a tree at once, since it is sorted.
        let past: BTreeSet<_> = past.into_iter().map(of).collect();
        let by_end = past
            .iter()
            .map(|past| (past.ended, past.record.key.clone()));
        let mut by_end: Vec<_> = by_end.collect();
        // Keeps the order of keys, and so compares none.
        by_end.sort_by_key(|(ended, _)| *ended);
        Self {
            compacted,
            by_end: by_end.into_iter().collect(),
            bytes: past.iter().map(|past| past.record.bytes()).sum(),
            past,
        }
    }

    /// The versions behind the one of this key that ended so, in order of both.
    pub(super) fn after(&self, key: &Bytes, ended: Revision) -> impl Iterator<Item = &Past> {
        let from = Bound::Excluded(Past::place(key.clone(), ended));
        self.past.range((from, Bound::Unbounded))
    }

    /// All versions, in order of key and of when they ended.
    pub(super) fn all(&self) -> impl Iterator<Item = &Past> {
        self.past.iter()
    }

    /// The version of a key that a revision ended.
    pub(super) fn ended_at(&self, key: &Bytes, revision: Revision) -> Option<&Record> {
        let ended = self.past.get(&Past::place(key.clone(), revision))?;
        Some(&ended.record)
    }

    /// The first version of a key that ended at `from` or later, and when.
    pub(super) fn first_of(&self, key: &Bytes, from: Revision) -> Option<(Revision, &Record)> {
        let first = self.past.range(Past::place(key.clone(), from)..).next()?;
        (first.record.key == *key).then_some((first.ended, &first.record))
    }

    /// The lowest revision that can be read, if it is not 0.
    pub(super) fn compacted(&self) -> Revision {
        self.compacted
    }

    /// How many versions are held, those included that are to be dropped.
    pub(super) fn len(&self) -> usize {
        self.past.len()
    }

    /// Their size by [`Record::bytes`].
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds the versions, one a key, that were there until `ended`, which is above all
    /// that was added before.
    pub(super) fn add(&mut self, ended: Revision, mut records: Vec<Record>) {
        // Whoever restores a checkpoint knows no other order, and must drop the same.
        if !records.is_sorted_by_key(|record| &record.key) {
            records.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        }
        for record in records {
            self.bytes += record.bytes();
            self.by_end.push((ended, record.key.clone()));
            self.past.insert(Past { ended, record });
        }
    }

    /// Makes `at` the lowest revision that can be read.
    pub(super) fn compact(&mut self, at: Revision) {
        self.compacted = at;
    }

    /// Whether versions are left that no read can see.
    pub(super) fn has_superseded(&self) -> bool {
        self.by_end
            .first()
            .is_some_and(|(ended, _)| *ended <= self.compacted)
    }

    /// Whether nothing is held that ended by `at`.
    pub(super) fn is_swept(&self, at: Revision) -> bool {
        self.by_end.first().is_none_or(|(ended, _)| *ended > at)
    }

    /// Drops versions that no read can see, `max` at most. `dropped` sees each, with
    /// the revision that ended it.
    pub(super) fn sweep(&mut self, max: usize, mut dropped: impl FnMut(Revision, &Record)) {
        for _ in 0..max {
            if !self.has_superseded() {
                return;
            }
            let (ended, key) = self.by_end.pop_first().expect("it has one");
            let gone = self.past.take(&Past::place(key, ended));
            let gone = gone.expect("both sets hold the same versions").record;
            self.bytes -= gone.bytes();
            dropped(ended, &gone);
        }
    }

    /// The keys of a range that any version of is held, in order: each with what was
    /// there at `at` and has ended since, if anything was. Two descents a key, however
    /// many versions it has had.
    pub(super) fn ended_after(
        &self,
        range: &KeyRange,
        at: Revision,
    ) -> impl Iterator<Item = (&Bytes, Option<&Record>)> {
        let mut from = Bound::Included(Past::place(range.start().clone(), 0));
        std::iter::from_fn(move || {
            let Past { ended, record } = self.first_behind(&from, range)?;
            let key = &record.key;
            from = Bound::Excluded(Past::place(key.clone(), Revision::MAX));
            let there = if *ended > at {
                Some(record)
            } else {
                let later = Bound::Included(Past::place(key.clone(), at + 1));
                let later = self.first_behind(&later, range);
                later
                    .map(|past| &past.record)
                    .filter(|later| later.key == *key)
            };
            Some((key, there.filter(|record| record.mod_revision <= at)))
        })
    }

    fn first_behind(&self, from: &Bound<Past>, range: &KeyRange) -> Option<&Past> {
        let next = self.past.range((from.as_ref(), Bound::Unbounded)).next();
        next.filter(|past| range.contains(&past.record.key))
    }
}

impl PartialEq for History {
    fn eq(&self, other: &Self) -> bool {
        let Self {
            compacted,
            past,
            by_end,
            bytes,
        } = self;
        let versions = |past: &Past| (past.ended, past.record.clone());
        (*compacted, *bytes) == (other.compacted, other.bytes)
            && past
                .iter()
                .map(versions)
                .eq(other.past.iter().map(versions))
            && *by_end == other.by_end
    }
}
