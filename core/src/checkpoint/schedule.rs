//! When a checkpoint is due, and how much of the log is needed no more.

use crate::{ids::Index, limits};

/// See the module. One checkpoint is written at a time.
#[derive(Debug)]
pub struct Schedule {
    /// Entries between two checkpoints.
    every: Index,
    /// Bytes of log above which it is not kept for those who lag.
    log_bytes_max: u64,
    /// The newest that is durable; 0 for none.
    newest: Index,
    /// The one before that.
    older: Index,
    /// Bytes written to the log when the newest was begun.
    begun_bytes: u64,
    is_writing: bool,
    /// Another member needs one that reaches up to here.
    wanted: Index,
}

impl Schedule {
    /// After a start from the checkpoint at an index; 0 for none. Another one that
    /// may be there was not verified, and counts for nothing.
    pub fn new(every: Index, log_bytes_max: u64, newest: Index) -> Self {
        Self {
            every: every.max(1),
            log_bytes_max,
            newest,
            older: 0,
            begun_bytes: 0,
            is_writing: false,
            wanted: 0,
        }
    }

    /// Another member needs a checkpoint that holds this entry.
    pub fn want(&mut self, at_least: Index) {
        self.wanted = at_least;
    }

    /// Whether to write one now, of a state of so many bytes: enough entries are applied
    /// since the newest, or so much was written to the log, or another member needs one.
    pub fn is_due(&self, applied: Index, written_bytes: u64, state_bytes: u64) -> bool {
        let entries = applied.saturating_sub(self.newest);
        let bytes = written_bytes.saturating_sub(self.begun_bytes);
        let is_wanted = self.newest < self.wanted && self.wanted <= applied;
        let is_enough = entries >= self.every || bytes >= self.enough(state_bytes) || is_wanted;
        is_enough && entries > 0 && !self.is_writing
    }

    /// Bytes of log after which a checkpoint is worth it: about what is written and read
    /// back for it, as the size of a state counts what memory holds around its keys, too.
    /// So checkpoints cost about as much as the log, however large the state is.
    fn enough(&self, state_bytes: u64) -> u64 {
        let as_many = (state_bytes / 3).min(self.log_bytes_max / 4);
        as_many.max(limits::CHECKPOINT_LOG_BYTES)
    }

    /// The one that ends with this entry is being written.
    pub fn begin(&mut self, at: Index, written_bytes: u64) {
        self.is_writing = true;
        self.begun_bytes = written_bytes;
        #[cfg(conclave_plant)]
        if crate::plant::is("cut-behind-unsynced-checkpoint") {
            self.older = at;
        }
        debug_assert!(at > self.newest, "checkpoints move on");
    }

    /// Whether one is being written, or received.
    pub fn is_busy(&self) -> bool {
        self.is_writing
    }

    /// One of another member is being received: none is written meanwhile, and none
    /// must be already.
    pub fn receive(&mut self) {
        debug_assert!(!self.is_writing, "one at a time");
        self.is_writing = true;
    }

    /// What was received is of no use.
    pub fn discard(&mut self) {
        self.is_writing = false;
    }

    /// One of another member takes the place of all others.
    pub fn install(&mut self, at: Index) {
        self.is_writing = false;
        (self.older, self.newest) = (0, at);
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
    /// need, unless the log takes too many bytes. Such a member gets a checkpoint
    /// instead, `sent` while that is on its way, and needs what follows on it; only at
    /// twice as many bytes that counts for nothing.
    pub fn cut(&self, held_by_all: Index, sent: Option<Index>, log_bytes: u64) -> Index {
        if log_bytes > self.log_bytes_max.saturating_mul(2) {
            self.older
        } else if log_bytes > self.log_bytes_max {
            self.older.min(sent.unwrap_or(Index::MAX))
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
        let mut schedule = Schedule::new(100, limits::LOG_BYTES_MAX, 50);
        assert!(!schedule.is_due(149, 0, 0));
        assert!(schedule.is_due(150, 0, 0));
        assert!(schedule.is_due(51, limits::CHECKPOINT_LOG_BYTES, 0));
        assert!(!schedule.is_due(50, limits::CHECKPOINT_LOG_BYTES, 0));
        schedule.begin(150, 1_000);
        assert!(!schedule.is_due(500, 2 * limits::CHECKPOINT_LOG_BYTES, 0));
        schedule.complete(150);
        assert!(!schedule.is_due(249, limits::CHECKPOINT_LOG_BYTES, 0));
        assert!(schedule.is_due(250, 0, 0));
    }

    #[test]
    fn of_a_large_state_a_checkpoint_is_due_after_as_much_log() {
        let schedule = Schedule::new(100, limits::LOG_BYTES_MAX, 50);
        let large = 6 * limits::CHECKPOINT_LOG_BYTES;
        assert!(!schedule.is_due(51, large / 3 - 1, large));
        assert!(schedule.is_due(51, large / 3, large));
        // The log has room for what two of them leave in it, whatever the state takes.
        assert!(schedule.is_due(51, limits::LOG_BYTES_MAX / 4, u64::MAX));
    }

    #[test]
    fn the_log_is_cut_behind_the_older_of_two_checkpoints_only() {
        let mut schedule = Schedule::new(100, limits::LOG_BYTES_MAX, 50);
        assert_eq!(schedule.cut(500, None, 0), 0);
        schedule.begin(150, 0);
        assert_eq!(schedule.cut(500, None, 0), 0);
        schedule.complete(150);
        assert_eq!(schedule.newest(), 150);
        assert_eq!(schedule.cut(500, None, 0), 50);
        assert_eq!(schedule.cut(30, None, 0), 30);
        let many = limits::LOG_BYTES_MAX + 1;
        assert_eq!(schedule.cut(30, None, many), 50);
        assert_eq!(schedule.cut(30, Some(40), many), 40);
        assert_eq!(schedule.cut(30, Some(40), 2 * many), 50);
    }

    #[test]
    fn one_of_another_member_takes_the_place_of_all() {
        let mut schedule = Schedule::new(100, limits::LOG_BYTES_MAX, 50);
        schedule.receive();
        assert!(schedule.is_busy() && !schedule.is_due(500, 0, 0));
        schedule.discard();
        assert!(schedule.is_due(500, 0, 0));
        schedule.receive();
        schedule.install(700);
        assert_eq!((schedule.newest(), schedule.is_busy()), (700, false));
        assert_eq!(schedule.cut(700, None, limits::LOG_BYTES_MAX + 1), 0);
        assert!(!schedule.is_due(700, 0, 0));
        assert!(schedule.is_due(800, 0, 0));
    }

    #[test]
    fn a_checkpoint_that_a_member_needs_is_due_once_it_can_be_made() {
        let mut schedule = Schedule::new(100, limits::LOG_BYTES_MAX, 50);
        schedule.want(60);
        assert!(!schedule.is_due(59, 0, 0));
        assert!(schedule.is_due(60, 0, 0));
        schedule.begin(60, 0);
        schedule.complete(60);
        assert!(!schedule.is_due(61, 0, 0));
    }
}
