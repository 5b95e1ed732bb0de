//! The one clock of the client: elapsed time that never steps and goes on
//! while the machine is suspended, so that a laptop that wakes up knows that
//! its sessions are gone.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::session_state::Micros;

/// Microseconds of `CLOCK_BOOTTIME`.
pub(crate) fn now() -> Micros {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("the time since boot is not negative");
    let nanoseconds = u64::try_from(time.tv_nsec).expect("a part of a second is not negative");
    seconds * 1_000_000 + nanoseconds / 1_000
}

/// How often those who wait for a loss look at this clock: timers of tokio stand still
/// while the machine is suspended.
pub(crate) const LOOK: Duration = Duration::from_secs(1);
