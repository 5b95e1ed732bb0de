//! How checkpoints leave, for members and for clients: read by a thread that may wait, at
//! a measured pace, and only for as long as they are taken. Meanwhile one stays on disk,
//! and others wait for their turn.

use std::{
    thread,
    time::{Duration, Instant},
};

use tokio::sync::mpsc::{self, error::TrySendError};

/// How fast a checkpoint is sent at most, in bytes a second: so that a third of one
/// processor and of a usual disk is left to those who wait for locks.
const BYTES_PER_S: u64 = 48 << 20;
/// How often it is looked whether there is room for one more message.
const ROOM_AFTER: Duration = Duration::from_millis(2);
/// So long may whoever receives one take nothing.
pub(crate) const STALLED_AFTER: Duration = Duration::from_secs(30);

/// How fast a thread that may wait reads a checkpoint.
#[derive(Debug)]
pub(crate) struct Pace {
    read_bytes: u64,
    began: Instant,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self {
            read_bytes: 0,
            began: Instant::now(),
        }
    }

    /// Waits until these bytes may be sent.
    pub(crate) fn wait_for(&mut self, bytes: u64) {
        self.read_bytes += bytes;
        let due = Duration::from_micros(self.read_bytes * 1_000_000 / BYTES_PER_S);
        thread::sleep(due.saturating_sub(self.began.elapsed()));
    }
}

/// Why nothing more is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Untaken {
    /// The receiver has gone, or its connection.
    #[error("nobody receives it any more")]
    Gone,
    /// The receiver is there and took nothing for too long.
    #[error("it is not received any more")]
    Stalled,
}

/// Puts a message into a queue; waits for room, but no longer than `patience` in a row.
/// Needs no runtime to be running, so that one that shuts down keeps nobody here.
pub(crate) fn put<T>(
    to: &mpsc::Sender<T>,
    mut message: T,
    patience: Duration,
) -> Result<(), Untaken> {
    let began = Instant::now();
    loop {
        message = match to.try_send(message) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(Untaken::Gone),
            Err(TrySendError::Full(_)) if began.elapsed() >= patience => {
                return Err(Untaken::Stalled);
            }
            Err(TrySendError::Full(back)) => back,
        };
        thread::sleep(ROOM_AFTER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_takes_something_now_and_then_gets_all_of_it() {
        let (to, mut receiver) = mpsc::channel(1);
        let puts = thread::spawn(move || (0..20).try_for_each(|n| put(&to, n, STALLED_AFTER)));
        let mut taken = Vec::new();
        while let Some(number) = receiver.blocking_recv() {
            taken.push(number);
            thread::sleep(2 * ROOM_AFTER);
        }
        assert_eq!(puts.join().unwrap(), Ok(()));
        assert_eq!(taken, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn who_takes_nothing_is_told_from_who_is_gone() {
        let (to, receiver) = mpsc::channel(1);
        let patience = 5 * ROOM_AFTER;
        assert_eq!(put(&to, 1, patience), Ok(()));
        assert_eq!(put(&to, 2, patience), Err(Untaken::Stalled));
        drop(receiver);
        assert_eq!(put(&to, 3, STALLED_AFTER), Err(Untaken::Gone));
    }
}
