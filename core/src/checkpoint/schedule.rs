//! When a checkpoint is due, and how much of the log is needed no more.

use crate::{ids::Index, limits};

/// See the module. One checkpoint is written at a time.
#[derive(Debug)]
pub struct Schedule {
    /// Entries between two checkpoints.
    every: Index,
    /// The newest that is durable; 0 for none.
    newest: Index,
    /// The one before that.
    older: Index,
    /// Bytes written to the log when the newest was begun.
    begun_bytes: u64,
    is_writing: bool,
}

impl Schedule {
    /// After a start from the checkpoint at an index; 0 for none. Another one that
    /// may be there was not verified, and counts for nothing.
    pub fn new(every: Index, newest: Index) -> Self {
        Self {
            every: every.max(1),
            newest,
            older: 0,
            begun_bytes: 0,
            is_writing: false,
        }
    }

    /// Whether to write one now: enough entries are applied since the newest, or
    /// so much was written to the log.
    pub fn is_due(&self, applied: Index, written_bytes: u64) -> bool {
        let entries = applied.saturating_sub(self.newest);
        let bytes = written_bytes.saturating_sub(self.begun_bytes);
        let is_enough = entries >= self.every || bytes >= limits::CHECKPOINT_LOG_BYTES;
        is_enough && entries > 0 && !self.is_writing
    }

    /// One is being written.
    pub fn begin(&mut self, written_bytes: u64) {
        self.is_writing = true;
        self.begun_bytes = written_bytes;
    }

    /// It is durable, and has been read back.
    pub fn complete(&mut self, at: Index) {
        self.is_writing = false;
        self.older = self.newest;
        self.newest = at;
    }

    /// The newest that is durable; 0 for none.
    pub fn newest(&self) -> Index {
        self.newest
    }

    /// Up to where the log can be cut: never behind the older checkpoint, so that
    /// damage to the newer one costs nothing; nor behind what some member may still
    /// need, unless the log takes too many bytes.
    pub fn cut(&self, held_by_all: Index, log_bytes: u64) -> Index {
        if log_bytes > limits::LOG_BYTES_MAX {
            self.older
        } else {
            self.older.min(held_by_all)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_due_after_so_many_entries_or_bytes() {
        let mut schedule = Schedule::new(100, 50);
        assert!(!schedule.is_due(149, 0));
        assert!(schedule.is_due(150, 0));
        assert!(schedule.is_due(51, limits::CHECKPOINT_LOG_BYTES));
        assert!(!schedule.is_due(50, limits::CHECKPOINT_LOG_BYTES));
        schedule.begin(1_000);
        assert!(!schedule.is_due(500, 2 * limits::CHECKPOINT_LOG_BYTES));
        schedule.complete(150);
        assert!(!schedule.is_due(249, limits::CHECKPOINT_LOG_BYTES));
        assert!(schedule.is_due(250, 0));
    }

    #[test]
    fn the_log_is_cut_behind_the_older_of_two_checkpoints_only() {
        let mut schedule = Schedule::new(100, 50);
        assert_eq!(schedule.cut(500, 0), 0);
        schedule.begin(0);
        assert_eq!(schedule.cut(500, 0), 0);
        schedule.complete(150);
        assert_eq!(schedule.newest(), 150);
        assert_eq!(schedule.cut(500, 0), 50);
        assert_eq!(schedule.cut(30, 0), 30);
        assert_eq!(schedule.cut(30, limits::LOG_BYTES_MAX + 1), 50);
    }
}
