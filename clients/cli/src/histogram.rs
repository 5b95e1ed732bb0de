//! Latencies in a fixed space: buckets that grow with the value, so that each
//! is right to within 1 %, however long a run lasts.

/// Values below this have a bucket each; above, each doubling has half as many.
const EXACT: u64 = 256;
const HALF: u64 = EXACT / 2;

/// Counts of values, in buckets.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Histogram {
    pub(crate) fn new() -> Histogram {
        Histogram {
            counts: vec![0; bucket(u64::MAX) + 1],
            total: 0,
            max: 0,
        }
    }

    pub(crate) fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.max = self.max.max(value);
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// The largest value; 0 without values.
    pub(crate) fn max(&self) -> u64 {
        self.max
    }

    /// The value that this many percent of all do not exceed; 0 without
    /// values.
    pub(crate) fn percentile(&self, percent: u64) -> u64 {
        let wanted = (self.total * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        found.map_or(0, |index| highest(index).min(self.max))
    }
}

fn bucket(value: u64) -> usize {
    // How often to halve the value until it is below EXACT.
    let halvings = u64::from((u64::BITS - (value | (EXACT - 1)).leading_zeros()) - EXACT.ilog2());
    let index = halvings * HALF + (value >> halvings);
    usize::try_from(index).expect("there are a few thousand buckets")
}

/// The largest value in a bucket.
fn highest(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < EXACT {
        return bucket;
    }
    let halvings = (bucket - HALF) / HALF;
    let lowest = bucket - halvings * HALF;
    (((u128::from(lowest) + 1) << halvings) - 1)
        .try_into()
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_known_values() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.percentile(50), 0);
        (1..=100).for_each(|value| histogram.record(value));
        assert_eq!(histogram.percentile(50), 50);
        assert_eq!(histogram.percentile(99), 99);
        assert_eq!(histogram.percentile(100), 100);
        histogram.record(1_000_000);
        assert_eq!((histogram.max(), histogram.total()), (1_000_000, 101));
        assert_eq!(histogram.percentile(100), 1_000_000);
    }

    #[test]
    fn every_bucket_is_right_to_within_one_percent_and_in_order() {
        let mut before = 0;
        for shift in 0..64 {
            for step in [0, 1, 3] {
                let value = (1_u64 << shift) + step * ((1 << shift) / 4);
                let index = bucket(value);
                let highest = highest(index);
                assert!(index >= before && highest >= value, "{value}");
                assert!(highest - value <= value / 100, "{value} {highest}");
                before = index;
            }
        }
        assert_eq!(highest(bucket(u64::MAX)), u64::MAX);
    }
}
