//! Elapsed time that a stall does not advance.
//!
//! Log time is what waits, deadlines and expiry are measured in. It is the
//! leader's: each turn adds the CLOCK_BOOTTIME since the turn before, but at
//! most two heartbeats, so that a leader that was stopped, swapped out or
//! stuck in a sync does not find everybody's time over when it goes on. A turn comes at
//! least twice a heartbeat, so only one that takes as long as that runs late. Entries
//! carry it, and everybody else's clock continues from each one it applies; how
//! long a process has been up says nothing. So log time runs late while nobody
//! leads, and never early.

use std::mem;

use crate::{ids::LogTime, replica::Now};

/// The clock of one node; see the module.
#[derive(Debug)]
pub(crate) struct Clock {
    last_boot_us: u64,
    elapsed_us: u64,
    heartbeat_us: u64,
    /// Whether the newest step was longer than a heartbeat.
    was_long: bool,
}

impl Clock {
    /// A clock that goes on from this log time.
    pub(crate) fn new(now: Now, heartbeat_us: u64, log_time: LogTime) -> Self {
        let mut clock = Self {
            last_boot_us: now.boot_us,
            elapsed_us: 0,
            heartbeat_us,
            was_long: false,
        };
        clock.follow(log_time);
        clock
    }

    /// Takes note of the time at the start of a turn; whether that comes after a stall.
    /// When one turn after the other takes long, that is none.
    pub(crate) fn advance(&mut self, now: Now) -> bool {
        let step_us_max = 2 * self.heartbeat_us;
        let step = now.boot_us.saturating_sub(self.last_boot_us);
        #[cfg(conclave_plant)]
        if crate::plant::is("clock-over-stall") {
            self.elapsed_us += step.saturating_sub(step_us_max);
        }
        self.elapsed_us += step.min(step_us_max);
        self.last_boot_us = now.boot_us.max(self.last_boot_us);
        let is_long = step > self.heartbeat_us;
        let was_long = mem::replace(&mut self.was_long, is_long);
        is_long && !was_long
    }

    /// Never reads less than `log_time` from now on.
    pub(crate) fn raise(&mut self, log_time: LogTime) {
        self.elapsed_us = self.elapsed_us.max(log_time.saturating_mul(1_000));
    }

    /// Reads `log_time` now, even if it was ahead: for who does not lead.
    pub(crate) fn follow(&mut self, log_time: LogTime) {
        self.elapsed_us = log_time.saturating_mul(1_000);
    }

    /// In microseconds; for deadlines that stay on this node.
    pub(crate) fn micros(&self) -> u64 {
        self.elapsed_us
    }

    /// In log time, rounded down.
    pub(crate) fn log_time(&self) -> LogTime {
        self.elapsed_us / 1_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(boot_us: u64) -> Now {
        Now {
            boot_us,
            date_ms: 0,
        }
    }

    #[test]
    fn a_stall_counts_as_one_step_at_most() {
        let mut clock = Clock::new(at(1_000), 250, 0);
        assert!(!clock.advance(at(1_100)));
        assert_eq!(clock.micros(), 100);
        assert!(clock.advance(at(900_000)));
        assert_eq!(clock.micros(), 600);
        assert!(!clock.advance(at(900_300)), "this one takes long, too");
        assert!(!clock.advance(at(900_310)));
        assert!(clock.advance(at(901_000)));
    }

    #[test]
    fn time_that_goes_back_stands_still() {
        let mut clock = Clock::new(at(1_000), 500, 0);
        clock.advance(at(900));
        clock.advance(at(1_010));
        assert_eq!(clock.micros(), 10);
    }

    #[test]
    fn it_continues_from_the_log() {
        let mut clock = Clock::new(at(0), 1_000_000, 0);
        clock.raise(7_000);
        clock.advance(at(2_500));
        assert_eq!((clock.log_time(), clock.micros()), (7_002, 7_002_500));
        clock.raise(5);
        assert_eq!(clock.log_time(), 7_002);
        clock.follow(5);
        assert_eq!(clock.log_time(), 5);
    }
}
