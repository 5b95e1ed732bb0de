//! One server: the real replica over the real log on a disk that can crash,
//! driven as its loop thread drives it, with time taken by syncs, pauses and
//! restarts.
//!
//! In reading order: [`start`], [`requests`], [`turn`] with [`streams`] and [`leases`],
//! [`checkpoints`], [`install`], then [`faults`] and [`damage`].

mod checkpoints;
mod damage;
mod faults;
mod install;
mod leases;
mod requests;
mod start;
mod streams;
mod turn;

use std::collections::BTreeMap;

use conclave_core::{
    checkpoint::{Part, Schedule, SimCheckpoints},
    disk::SimDisk,
    ids::{Index, NodeId},
    log::{Batch, Layout, Log},
    replica::{Input, Now, Replica, Role},
};
use conclave_primitives::Primitives;

use self::install::Receiving;
pub(crate) use self::install::{Step, happens};
use super::{
    alarm::Alarm,
    clock::Clock,
    ground::{About, Ground},
};
use crate::checkers::early_expiry::Moment;

/// The cluster that all nodes belong to.
pub(crate) const CLUSTER: u64 = 0xC0_9C1A;

/// Small, so that there is always something to cut.
const LAYOUT: Layout = Layout {
    segment_bytes: 8 << 10,
    step_bytes: 2 << 10,
};

/// See the module.
#[derive(Debug)]
pub(crate) struct Node {
    index: usize,
    disk: SimDisk,
    checkpoints: SimCheckpoints,
    clock: Clock,
    running: Option<Running>,
    /// Counts starts.
    boot: u64,
    /// Counts pauses; `paused` while one lasts.
    pauses: u64,
    paused: bool,
    paused_us: u64,
    /// Syncs take so many times their usual time.
    slowness: u64,
    fails_next_sync: bool,
    /// When a turn is due.
    alarm: Alarm,
}

#[derive(Debug)]
struct Running {
    replica: Replica<Primitives>,
    /// Names this start of the process.
    process: u64,
    log: Log<SimDisk>,
    schedule: Schedule,
    /// The checkpoint that is being written.
    checkpoint: Option<Index>,
    /// What of it is drawn.
    parts: Vec<Part>,
    /// What it gets from another node, and then what it has got.
    receiving: Option<Receiving>,
    received: Option<Receiving>,
    /// Between the log and the name of a checkpoint that it has got.
    adopts: Option<Index>,
    /// What another node gets from it, and until when it keeps the log for that.
    sent: Option<(Index, u64)>,
    inbox: Vec<Input<Primitives>>,
    sync: Option<Sync>,
    /// What waits for the log.
    unsaved: Vec<Batch>,
    /// How many batches have gone there before these.
    handed: u64,
    callers: BTreeMap<u64, Caller>,
    calls: u64,
    applied: u64,
}

/// A sync that is under way. The log is not at hand before it is done.
#[derive(Clone, Copy, Debug)]
struct Sync {
    since_us: u64,
    /// Nothing else is done meanwhile; otherwise turns go on.
    blocks: bool,
    /// Done while the node was paused.
    is_unnoticed: bool,
}

/// Who waits for an answer.
#[derive(Clone, Copy, Debug)]
struct Caller {
    actor: usize,
    id: u64,
    sent: Moment,
    about: About,
    is_command: bool,
}

impl Node {
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.replica()
            .is_some_and(|replica| replica.status().role == Role::Leader)
    }

    pub(crate) fn replica(&self) -> Option<&Replica<Primitives>> {
        self.running.as_ref().map(|running| &running.replica)
    }

    fn clocks(&self, ground: &Ground) -> Now {
        Now {
            boot_us: self.clock.local(ground.now_us),
            date_ms: 1_800_000_000_000 + ground.now_us / 1_000,
        }
    }
}

/// The member with this index.
pub(crate) fn id(index: usize) -> NodeId {
    NodeId(index as u64 + 1)
}

/// The index of a member.
pub(crate) fn index(id: NodeId) -> usize {
    usize::try_from(id.0 - 1).expect("members are few")
}
