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

    /// All versions; see [`Self::after`].
    pub(super) fn all(&self) -> impl Iterator<Item = (&(Bytes, Revision), &Record)> {
        self.past.iter()
    }

    /// The version of a key that a revision ended.
    pub(super) fn ended_at(&self, key: &Bytes, revision: Revision) -> Option<&Record> {
        self.past.get(&(key.clone(), revision))
    }

    /// The first version of a key that ended at `from` or later, and when.
    pub(super) fn first_of(&self, key: &Bytes, from: Revision) -> Option<(Revision, &Record)> {
        let from = (key.clone(), from);
        let ((found, ended), record) = self.past.range(from..).next()?;
        (found == key).then_some((*ended, record))
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

    /// What was there at `at` and has ended since, in order of key. Costs two
    /// descents a key, however many versions it has had.
    pub(super) fn ended_after(
        &self,
        range: &KeyRange,
        at: Revision,
    ) -> impl Iterator<Item = &Record> {
        let mut from = Bound::Included((range.start().clone(), 0));
        std::iter::from_fn(move || {
            loop {
                let next = self.past.range((from.clone(), Bound::Unbounded)).next();
                let ((key, ended), record) = next.filter(|((key, _), _)| range.contains(key))?;
                if *ended <= at {
                    from = Bound::Included((key.clone(), at + 1));
                    continue;
                }
                from = Bound::Excluded((key.clone(), Revision::MAX));
                if record.mod_revision <= at {
                    return Some(record);
                }
            }
        })
    }
}
