//! Versions that are no more, until a compaction drops them.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use bytes::Bytes;

use super::{KeyRange, Record};
use crate::ids::Revision;

/// See the module. Every version is under the revision that ended it.
///
/// A compaction takes effect at once: what it makes unreadable is refused from
/// then on. The versions themselves go little by little, so that none stops the
/// node. Both happen at the same entries on every node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct History {
    compacted: Revision,
    past: BTreeMap<(Bytes, Revision), Record>,
    /// The same versions, those that a compaction drops first in front.
    by_end: BTreeSet<(Revision, Bytes)>,
    bytes: u64,
}

impl History {
    /// A history of these versions, each with the revision that ended it.
    pub(super) fn restore(compacted: Revision, past: Vec<(Revision, Record)>) -> Self {
        let mut history = Self {
            compacted,
            ..Self::default()
        };
        for (ended, record) in past {
            history.add(ended, record);
        }
        history
    }

    /// The versions behind this one, each under its key and the revision that ended
    /// it, in that order.
    pub(super) fn after(
        &self,
        (key, ended): &(Bytes, Revision),
    ) -> impl Iterator<Item = (&(Bytes, Revision), &Record)> {
        let from = Bound::Excluded((key.clone(), *ended));
        self.past.range((from, Bound::Unbounded))
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

    /// Adds the version of a key that was there until `ended`.
    pub(super) fn add(&mut self, ended: Revision, record: Record) {
        self.bytes += record.bytes();
        self.by_end.insert((ended, record.key.clone()));
        self.past.insert((record.key.clone(), ended), record);
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
            let gone = self.past.remove(&(key, ended));
            let gone = gone.expect("both maps hold the same versions");
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
        let mut from = Bound::Included((range.start().clone(), 0));
        std::iter::from_fn(move || {
            let ((key, ended), record) = self.first_behind(&from, range)?;
            from = Bound::Excluded((key.clone(), Revision::MAX));
            if *ended > at {
                return Some((key, Some(record).filter(|record| record.mod_revision <= at)));
            }
            let later = self.first_behind(&Bound::Included((key.clone(), at + 1)), range);
            let later = later.filter(|((same, _), _)| same == key);
            let there = later.map(|(_, record)| record);
            Some((key, there.filter(|record| record.mod_revision <= at)))
        })
    }

    fn first_behind(
        &self,
        from: &Bound<(Bytes, Revision)>,
        range: &KeyRange,
    ) -> Option<(&(Bytes, Revision), &Record)> {
        let next = self.past.range((from.clone(), Bound::Unbounded)).next();
        next.filter(|((key, _), _)| range.contains(key))
    }
}
