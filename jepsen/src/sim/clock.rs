//! Clocks that run at their own rate.

use crate::rng::Rng;

/// Rates differ from true time by at most this many parts in a million.
const RATE_ERROR_PPM: u64 = 50_000;

/// The rate of a machine's clock, in parts of a million.
pub(crate) fn draw_rate(rng: &mut Rng) -> u64 {
    rng.between(1_000_000 - RATE_ERROR_PPM, 1_000_000 + RATE_ERROR_PPM)
}

/// A clock as one machine sees it, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin_true_us: u64,
    origin_local_us: u64,
    rate_ppm: u64,
}

impl Clock {
    /// A clock that shows `local_us` at true time `true_us`.
    pub(crate) fn new(true_us: u64, local_us: u64, rate_ppm: u64) -> Self {
        Self {
            origin_true_us: true_us,
            origin_local_us: local_us,
            rate_ppm,
        }
    }

    /// The same clock after its machine started again.
    pub(crate) fn restarted(self, true_us: u64, local_us: u64) -> Self {
        Self::new(true_us, local_us, self.rate_ppm)
    }

    /// What it shows at a true time.
    pub(crate) fn local(&self, true_us: u64) -> u64 {
        self.origin_local_us + (true_us - self.origin_true_us) * self.rate_ppm / 1_000_000
    }

    /// The first true time at which it shows `local_us` or more.
    pub(crate) fn true_at(&self, local_us: u64) -> u64 {
        let passed = local_us.saturating_sub(self.origin_local_us);
        let span = u128::from(passed) * 1_000_000;
        let span = span.div_ceil(u128::from(self.rate_ppm));
        self.origin_true_us
            .saturating_add(u64::try_from(span).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_directions_agree() {
        let mut rng = Rng::new(3);
        for _ in 0..1_000 {
            let clock = Clock::new(rng.below(1_000), rng.below(1_000), draw_rate(&mut rng));
            let local = 1_000 + rng.below(1 << 40);
            let at = clock.true_at(local);
            assert!(clock.local(at) >= local);
            assert!(clock.local(at - 1) < local);
        }
    }
}
