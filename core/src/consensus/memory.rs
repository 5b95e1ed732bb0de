//! Raft's log in memory, as raft-rs reads it.

use std::collections::VecDeque;

use protobuf::Message as _;
use raft::{
    GetEntriesContext, RaftState, Storage, StorageError,
    eraftpb::{
        ConfState, Entry, EntryType, HardState as RaftHardState, Snapshot, SnapshotMetadata,
    },
};

use crate::{
    ids::{Index, NodeId, Term},
    log::{EntryKind, HardState, LogEntry},
};

/// What lies behind the newest entry
/// that was cut off.
pub(super) struct MemoryLog {
    pub(super) hard_state: RaftHardState,
    pub(super) voters: Vec<u64>,
    /// The newest entry that is not held, and its term; (0, 0) if all are.
    pub(super) cut: (Index, Term),
    /// What followers are offered who need what was cut off: the newest durable
    /// checkpoint, and the term of its last entry; (0, 0) for none.
    pub(super) offer: (Index, Term),
    /// The entry at index i is at i - 1 - the index of `cut`.
    entries: VecDeque<Entry>,
}

impl MemoryLog {
    /// `before` is an entry that the state holds, or that the log was begun anew
    /// behind; (0, 0) for none.
    pub(super) fn new(
        voters: &[NodeId],
        before: (Index, Term),
        hard_state: HardState,
        entries: Vec<LogEntry>,
    ) -> Self {
        let mut entries: VecDeque<Entry> = entries.into_iter().map(raft_entry).collect();
        // Of the entry before the first, only the term is needed; where the log
        // does not hold that one any more, its first one stands in for it.
        let cut = match entries.front().map(|first| (first.index, first.term)) {
            None => before,
            Some((1, _)) => (0, 0),
            Some((first, _)) if first == before.0 + 1 => before,
            Some(first) => {
                entries.pop_front();
                first
            }
        };
        let last = cut.0 + entries.len() as u64;
        let hard_state = RaftHardState {
            term: hard_state.term,
            vote: hard_state.vote,
            commit: hard_state.commit.min(last).max(before.0).max(cut.0),
            ..RaftHardState::default()
        };
        Self {
            hard_state,
            voters: voters.iter().map(|node| node.0).collect(),
            cut,
            offer: (0, 0),
            entries,
        }
    }

    /// All entries that it holds, to make another of them.
    pub(super) fn log_entries(&self) -> Vec<LogEntry> {
        self.entries.iter().map(log_entry).collect()
    }

    pub(super) fn append(&mut self, entries: &[Entry]) {
        if let Some(first) = entries.first() {
            let place = self.place(first.index).expect("committed entries stay");
            self.entries.truncate(place);
            assert_eq!(self.entries.len(), place, "a gap in the log");
            self.entries.extend(entries.iter().cloned());
        }
    }

    /// Forgets entries up to an index that is held.
    pub(super) fn cut(&mut self, upto: Index) {
        if let Some(place) = self.place(upto)
            && let Some(newest) = self.entries.drain(..=place).next_back()
        {
            self.cut = (newest.index, newest.term);
        }
    }

    fn last(&self) -> Index {
        self.cut.0 + self.entries.len() as u64
    }

    /// Where an entry is or will be; `None` if it was cut off.
    fn place(&self, index: Index) -> Option<usize> {
        let place = index.checked_sub(self.cut.0 + 1)?;
        Some(usize::try_from(place).expect("indexes fit in memory"))
    }
}

impl Storage for MemoryLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let conf_state = ConfState::from((self.voters.clone(), Vec::new()));
        Ok(RaftState::new(self.hard_state.clone(), conf_state))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        assert!(
            high <= self.last() + 1,
            "raft asks for entries it has not appended"
        );
        let compacted = raft::Error::Store(StorageError::Compacted);
        let (Some(low), Some(high)) = (self.place(low), self.place(high)) else {
            return Err(compacted);
        };
        let entries = self.entries.range(low..high);
        let count = fitting(entries.clone(), max_size.into().unwrap_or(u64::MAX));
        Ok(entries.take(count).cloned().collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.cut.0 {
            return Ok(self.cut.1);
        }
        let place = self
            .place(index)
            .ok_or(raft::Error::Store(StorageError::Compacted))?;
        self.entries
            .get(place)
            .map(|entry| entry.term)
            .ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.cut.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    /// Says which checkpoint there is; its records go another way.
    fn snapshot(&self, request_index: u64, _: u64) -> raft::Result<Snapshot> {
        let (index, term) = self.offer;
        if index == 0 || index < request_index.max(self.cut.0) {
            let not_yet = StorageError::SnapshotTemporarilyUnavailable;
            return Err(raft::Error::Store(not_yet));
        }
        let mut metadata = SnapshotMetadata {
            index,
            term,
            ..SnapshotMetadata::default()
        };
        metadata.set_conf_state(ConfState::from((self.voters.clone(), Vec::new())));
        let mut snapshot = Snapshot::default();
        snapshot.set_metadata(metadata);
        Ok(snapshot)
    }
}

/// How many entries fit into so many bytes; the first always does.
pub(super) fn fitting<'a>(
    entries: impl ExactSizeIterator<Item = &'a Entry>,
    bytes_max: u64,
) -> usize {
    let count = entries.len();
    let mut bytes = 0;
    let mut entries = entries;
    let over = entries.position(|entry| {
        bytes += u64::from(entry.compute_size());
        bytes > bytes_max
    });
    over.map_or(count, |over| over.max(1))
}

pub(super) fn log_entry(entry: &Entry) -> LogEntry {
    let kind = match entry.entry_type {
        EntryType::EntryNormal => EntryKind::Normal,
        EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => EntryKind::Membership,
    };
    LogEntry {
        index: entry.index,
        term: entry.term,
        kind,
        data: entry.data.clone(),
    }
}

fn raft_entry(entry: LogEntry) -> Entry {
    Entry {
        index: entry.index,
        term: entry.term,
        data: entry.data,
        entry_type: match entry.kind {
            EntryKind::Normal => EntryType::EntryNormal,
            EntryKind::Membership => EntryType::EntryConfChangeV2,
        },
        ..Entry::default()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use bytes::Bytes;

    use super::*;

    pub(in crate::consensus) fn entries(sizes: &[usize]) -> Vec<Entry> {
        let entry = |(index, size): (u64, &usize)| Entry {
            index,
            term: index,
            data: vec![0; *size].into(),
            ..Entry::default()
        };
        (1..).zip(sizes).map(entry).collect()
    }

    #[test]
    fn the_first_entry_always_fits() {
        let entries = entries(&[100, 10, 10, 100]);
        assert_eq!(
            [1, 130, 1_000].map(|max| fitting(entries.iter(), max)),
            [1, 2, 4]
        );
        assert_eq!(fitting([].iter(), 1), 0);
    }

    fn log_entries(indexes: std::ops::Range<u64>) -> Vec<LogEntry> {
        let entry = |index| LogEntry {
            index,
            term: index / 10 + 1,
            kind: EntryKind::Normal,
            data: Bytes::new(),
        };
        indexes.map(entry).collect()
    }

    fn memory_log(applied: Index, indexes: std::ops::Range<u64>) -> MemoryLog {
        let hard_state = HardState {
            commit: 7,
            ..HardState::default()
        };
        let applied = (applied, applied / 10 + 1);
        MemoryLog::new(&[NodeId(1)], applied, hard_state, log_entries(indexes))
    }

    #[test]
    fn a_log_goes_on_where_a_checkpoint_ends() {
        // Behind it, from the entry after it, and from one before it.
        for (first, expected) in [(26, 26), (20, 21)] {
            let log = memory_log(25, first..31);
            assert_eq!(log.first_index().unwrap(), expected);
            assert_eq!(log.last_index().unwrap(), 30);
            assert_eq!(log.term(expected - 1).unwrap(), 3);
            assert_eq!(log.hard_state.commit, 25);
            assert!(log.term(expected - 2).is_err());
        }
        let nothing = memory_log(25, 26..26);
        assert_eq!((nothing.first_index().unwrap(), nothing.last()), (26, 25));
        assert_eq!(nothing.term(25).unwrap(), 3);
    }

    #[test]
    fn a_log_that_was_cut_keeps_the_term_before_its_first_entry() {
        let mut log = memory_log(0, 1..31);
        log.cut(0);
        assert_eq!(log.first_index().unwrap(), 1);
        log.cut(19);
        log.cut(12);
        assert_eq!(log.first_index().unwrap(), 20);
        assert_eq!((log.term(19).unwrap(), log.term(20).unwrap()), (2, 3));
        let context = || GetEntriesContext::empty(false);
        let entries = log.entries(20, 31, None, context()).unwrap();
        assert_eq!(entries.len(), 11);
        assert!(log.entries(19, 31, None, context()).is_err());
        log.append(&entries[5..6]);
        assert_eq!(log.last(), 25);
        log.cut(25);
        assert_eq!((log.first_index().unwrap(), log.last()), (26, 25));
    }
}
