//! What is counted while a load runs.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use tokio::time::Instant;

use crate::histogram::Histogram;

/// What all clients of a run share.
#[derive(Debug)]
pub(super) struct Tally {
    /// What began earlier is reckoned from here.
    start: Instant,
    /// What ends later does not count.
    end: Instant,
    latencies: RefCell<Histogram>,
    /// Operations in each whole second.
    seconds: RefCell<Vec<u64>>,
    pub(super) errors: Cell<u64>,
    pub(super) violations: Cell<u64>,
}

/// What was seen of one lock.
#[derive(Debug)]
pub(super) struct Observed {
    last_token: Cell<u64>,
    is_held: Cell<bool>,
    given_up_at: Cell<Instant>,
    /// From where a holder begins to give it up to where the next one has it.
    hand_offs: RefCell<Histogram>,
}

/// What a run came to.
#[derive(Debug)]
pub(super) struct Figures {
    pub(super) ops: u64,
    pub(super) ops_s: f64,
    /// In the worst whole second.
    pub(super) ops_s_min: u64,
    pub(super) p50_us: u64,
    pub(super) p99_us: u64,
    pub(super) max_us: u64,
}

impl Tally {
    pub(super) fn new(start: Instant, time: Duration) -> Tally {
        let seconds = usize::try_from(time.as_secs()).expect("a run takes less than an age");
        Tally {
            start,
            end: start + time,
            latencies: RefCell::new(Histogram::new()),
            seconds: RefCell::new(vec![0; seconds]),
            errors: Cell::new(0),
            violations: Cell::new(0),
        }
    }

    /// When the run is over.
    pub(super) fn end(&self) -> Instant {
        self.end
    }

    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.end
    }

    pub(super) fn record(&self, began: Instant) {
        let now = Instant::now();
        if now > self.end {
            return;
        }
        let latency = now.duration_since(began.max(self.start));
        self.latencies.borrow_mut().record(micros(latency));
        let second = usize::try_from(now.duration_since(self.start).as_secs());
        let mut seconds = self.seconds.borrow_mut();
        if let Some(count) = second.ok().and_then(|second| seconds.get_mut(second)) {
            *count += 1;
        }
    }

    pub(super) fn count(counter: &Cell<u64>) {
        counter.set(counter.get() + 1);
    }

    pub(super) fn figures(&self) -> Figures {
        let latencies = self.latencies.borrow();
        let seconds = self.end.duration_since(self.start).as_secs_f64();
        let ops = latencies.total();
        Figures {
            ops,
            ops_s: (ops as f64 / seconds).round(),
            ops_s_min: self.seconds.borrow().iter().copied().min().unwrap_or(ops),
            p50_us: latencies.percentile(50),
            p99_us: latencies.percentile(99),
            max_us: latencies.max(),
        }
    }
}

impl Observed {
    pub(super) fn new() -> Observed {
        Observed {
            last_token: Cell::new(0),
            is_held: Cell::new(false),
            given_up_at: Cell::new(Instant::now()),
            hand_offs: RefCell::new(Histogram::new()),
        }
    }

    /// A grant was answered. Whether it goes together with what was seen
    /// before.
    pub(super) fn granted(&self, token: u64) -> bool {
        let waited = micros(self.given_up_at.get().elapsed());
        self.hand_offs.borrow_mut().record(waited);
        let is_alone = !self.is_held.replace(true);
        let grows = token > self.last_token.replace(token);
        is_alone && grows
    }

    /// The holder begins to give it up, or has lost it.
    pub(super) fn given_up(&self) {
        self.is_held.set(false);
        self.given_up_at.set(Instant::now());
    }

    /// The percentiles 50 and 99 of hand-offs, in microseconds.
    pub(super) fn hand_offs(&self) -> (u64, u64) {
        let hand_offs = self.hand_offs.borrow();
        (hand_offs.percentile(50), hand_offs.percentile(99))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_and_a_token_that_does_not_grow_are_violations() {
        let observed = Observed::new();
        assert!(observed.granted(5));
        assert!(!observed.granted(6), "two at once");
        observed.given_up();
        assert!(observed.granted(7));
        observed.given_up();
        assert!(!observed.granted(7), "the same token again");
    }

    #[test]
    fn what_ends_after_the_time_does_not_count() {
        let start = Instant::now() - Duration::from_secs(10);
        let tally = Tally::new(start, Duration::from_secs(5));
        tally.record(start);
        assert_eq!(tally.figures().ops, 0);
        let tally = Tally::new(start, Duration::from_secs(1_000));
        tally.record(start);
        let figures = tally.figures();
        assert_eq!((figures.ops, figures.ops_s_min), (1, 0));
    }

    #[test]
    fn what_began_before_the_time_is_reckoned_from_its_start() {
        let start = Instant::now();
        let tally = Tally::new(start, Duration::from_secs(1_000));
        tally.record(start - Duration::from_secs(500));
        assert!(tally.figures().max_us < 500_000_000);
    }
}
