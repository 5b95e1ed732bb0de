//! What a seed chooses before it begins. Not every seed has every fault: some
//! bugs need calm in one place and trouble in another.

use conclave_core::{limits, replica::Retention};

use crate::{
    checkers::liveness::{DRAIN_US, RECOVERY_US},
    rng::Rng,
};

/// Heartbeats and election timeouts of the nodes, as `conclave serve` has them.
pub(crate) const HEARTBEAT_MS: u64 = 100;
/// How long clients of a stream hear nothing before they take it for broken.
pub(crate) const PATIENCE_US: u64 = 1_500_000;

/// See [`HEARTBEAT_MS`].
pub(crate) const ELECTION_MS: u64 = 500;

/// What leaders keep of the history: little, so that they compact in each run.
pub(crate) const RETENTION: Retention = Retention {
    revisions: 200,
    ms: 5_000,
    bytes: 256 << 10,
};

/// The weather: what befalls messages at all times while faults last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weather {
    /// In a million.
    pub(crate) lost: u64,
    /// In a million.
    pub(crate) doubled: u64,
    /// In a million: late by much more than the usual.
    pub(crate) late: u64,
    /// The usual time a message takes.
    pub(crate) delay_us: u64,
    /// How late a late message is at most.
    pub(crate) late_us: u64,
}

impl Weather {
    pub(crate) const CALM: Self = Self {
        lost: 0,
        doubled: 0,
        late: 0,
        delay_us: 300,
        late_us: 0,
    };
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) nodes: usize,
    pub(crate) lock_clients: usize,
    pub(crate) register_clients: usize,
    pub(crate) kv_clients: usize,
    pub(crate) watch_clients: usize,
    pub(crate) lease_clients: usize,
    pub(crate) locks: usize,
    pub(crate) registers: u64,
    pub(crate) weather: Weather,
    /// The usual time a sync takes.
    pub(crate) sync_us: u64,
    /// Entries between two checkpoints of a node.
    pub(crate) checkpoint_every: u64,
    /// Bytes of log that are kept for nodes that are away.
    pub(crate) log_bytes_max: u64,
    /// What the state may take.
    pub(crate) quota_bytes: u64,
    /// Bytes of events that wait for one stream of watchers at most.
    pub(crate) watch_queue_bytes: u64,
    /// The usual time between two faults.
    pub(crate) fault_gap_us: u64,
    /// Faults a seed leaves out, as a set of bits by kind.
    pub(crate) left_out: u64,
    /// When faults stop.
    pub(crate) heal_us: u64,
    /// When clients begin nothing new.
    pub(crate) drain_us: u64,
    /// The end.
    pub(crate) end_us: u64,
}

impl Settings {
    /// Whether the cluster runs out of space at times.
    pub(crate) fn is_scarce(&self) -> bool {
        self.quota_bytes < limits::QUOTA_BYTES_DEFAULT
    }

    /// The settings of a seed.
    pub(crate) fn draw(rng: &mut Rng, sim_seconds: u64) -> Self {
        let end_us = sim_seconds * 1_000_000;
        // Recovery and draining get the times that `liveness` allows.
        let drain_us = end_us.saturating_sub(DRAIN_US);
        let heal_us = drain_us.saturating_sub(RECOVERY_US);
        Self {
            nodes: if rng.chance(700_000) { 3 } else { 5 },
            lock_clients: rng.between(4, 10) as usize,
            register_clients: rng.between(2, 4) as usize,
            kv_clients: rng.between(2, 4) as usize,
            watch_clients: rng.between(1, 3) as usize,
            lease_clients: rng.between(1, 3) as usize,
            locks: rng.between(1, 4) as usize,
            registers: rng.between(1, 3),
            weather: Weather {
                lost: *pick(rng, &[0, 2_000, 10_000, 30_000]),
                doubled: *pick(rng, &[0, 2_000, 20_000]),
                late: *pick(rng, &[0, 1_000, 10_000]),
                delay_us: *pick(rng, &[100, 300, 1_000, 2_000]),
                late_us: *pick(rng, &[100_000, 1_000_000, 3_000_000]),
            },
            sync_us: *pick(rng, &[100, 300, 1_000]),
            checkpoint_every: *pick(rng, &[30, 100, 500, 1_000_000]),
            log_bytes_max: *pick(rng, &[16 << 10, 64 << 10, 1 << 30]),
            // A small one is reached again and again.
            quota_bytes: match rng.chance(150_000) {
                true => *pick(rng, &[40 << 10, 60 << 10]),
                false => limits::QUOTA_BYTES_DEFAULT,
            },
            watch_queue_bytes: *pick(rng, &[1 << 10, 4 << 10, limits::WATCH_QUEUE_BYTES_MAX]),
            fault_gap_us: *pick(rng, &[500_000, 1_000_000, 2_000_000]),
            left_out: if rng.chance(500_000) {
                0
            } else {
                rng.next() & rng.next()
            },
            heal_us,
            drain_us,
            end_us,
        }
    }
}

fn pick<'a, T>(rng: &mut Rng, choices: &'a [T]) -> &'a T {
    &choices[rng.index(choices.len())]
}
