//! How a node comes to be, and starts from what its disk holds.

use std::collections::BTreeMap;

use conclave_core::{
    checkpoint::{self, Schedule, SimCheckpoints},
    disk::SimDisk,
    log::{Facts, Identity, Log},
    replica::{Config, Replica},
};
use conclave_primitives::Primitives;

use super::{CLUSTER, LAYOUT, Node, Running, id};
use crate::sim::{
    alarm::{Alarm, Owner},
    clock::{self, Clock},
    ground::{Event, Ground, StallFree},
    settings::{ELECTION_MS, HEARTBEAT_MS, RETENTION},
    tally::{Fault, Operation},
};

impl Node {
    /// A node with a new data directory, that will start soon.
    pub(crate) fn new(index: usize, ground: &mut Ground) -> Self {
        let rate = clock::draw_rate(&mut ground.rng);
        let clock = Clock::new(0, ground.rng.below(1 << 40), rate);
        ground.stall_free.push(StallFree::new(clock));
        let disk = SimDisk::new();
        let identity = Identity {
            cluster: CLUSTER,
            node: id(index),
            incarnation: ground.rng.next(),
        };
        let facts = Facts {
            voters: (0..ground.settings.nodes).map(id).collect(),
            ..Facts::default()
        };
        if let Err(error) = Log::create_with(disk.clone(), LAYOUT, identity, facts) {
            ground.checks.node_failed(index, &error);
        }
        let soon = ground.now_us + ground.rng.below(50_000);
        ground.schedule(soon, Event::Start { node: index });
        Self {
            index,
            disk,
            checkpoints: SimCheckpoints::new(),
            clock,
            running: None,
            boot: 0,
            pauses: 0,
            paused: false,
            paused_us: 0,
            slowness: 1,
            fails_next_sync: false,
            alarm: Alarm::new(Owner::Node(index)),
        }
    }

    /// Starts from what the disk holds.
    pub(crate) fn start(&mut self, ground: &mut Ground) {
        if self.running.is_some() {
            return;
        }
        if self.boot > 0 && ground.rng.chance(300_000) {
            // The machine, not only the process, was started again.
            ground.tally.fault(Fault::Reboot);
            self.clock = self
                .clock
                .restarted(ground.now_us, ground.rng.below(10_000_000));
        }
        self.damage_checkpoint(ground);
        self.damage_log(ground);
        let (log, recovered) = match Log::open_with(self.disk.clone(), LAYOUT) {
            Ok(Some(opened)) => opened,
            Ok(None) => return ground.checks.node_failed(self.index, &"its log is gone"),
            Err(error) => return ground.checks.node_failed(self.index, &error),
        };
        let state = match checkpoint::restore::<Primitives>(&mut self.checkpoints, &recovered) {
            Ok(state) => state,
            Err(error) => return ground.checks.node_failed(self.index, &error),
        };
        if !self.may_start(state.is_some(), ground) {
            return;
        }
        self.boot += 1;
        let restored = state.as_ref().map_or(0, |state| state.applied());
        let entries = recovered.entries.len();
        ground.tell(format_args!(
            "node {} starts from {restored} with {entries} entries",
            self.index
        ));
        if restored > 0 {
            ground.did(Operation::Restored);
        }
        let process = ground.rng.next();
        ground.checks.starts(self.index, &recovered.entries);
        let config = self.config(process, ground);
        let replica = Replica::new(config, recovered, state, self.clocks(ground));
        ground.stall_free[self.index].start(self.clock, ground.now_us);
        self.running = Some(Running {
            replica,
            process,
            log,
            schedule: Schedule::new(
                ground.settings.checkpoint_every,
                ground.settings.log_bytes_max,
                restored,
            ),
            checkpoint: None,
            parts: Vec::new(),
            receiving: None,
            received: None,
            adopts: None,
            sent: None,
            inbox: Vec::new(),
            sync: None,
            unsaved: Vec::new(),
            handed: 0,
            callers: BTreeMap::new(),
            calls: 0,
            applied: restored,
        });
        self.paused = false;
        self.alarm.stop();
        self.alarm.set(ground.now_us, ground);
    }

    fn config(&self, process: u64, ground: &mut Ground) -> Config {
        Config {
            node: id(self.index),
            boot: process,
            seed: ground.rng.next(),
            heartbeat_ms: HEARTBEAT_MS,
            election_ms: ELECTION_MS,
            name: format!("n{}", self.index),
            client_urls: vec![format!("http://n{}:2379", self.index)],
            retention: Some(RETENTION),
            quota_bytes: ground.settings.quota_bytes,
            watch_queue_bytes: ground.settings.watch_queue_bytes,
        }
    }

    /// Whether a node may find itself without a state: only if its checkpoints were
    /// damaged at rest.
    fn may_start(&self, has_state: bool, ground: &mut Ground) -> bool {
        let is_damaged = ground.without_state == Some(self.index);
        if has_state {
            if is_damaged {
                // The log was whole without them.
                ground.without_state = None;
            }
            return true;
        }
        if is_damaged {
            ground.tally.fault(Fault::CheckpointsLost);
        } else {
            ground.checks.checkpoint_missing(self.index);
        }
        is_damaged
    }
}
