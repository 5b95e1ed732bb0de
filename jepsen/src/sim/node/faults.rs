//! What ends a node, or holds it up: crashes, pauses, and a disk that is slow or fails.

use std::fmt;

use conclave_core::replica::Input;

use super::Node;
use crate::sim::{
    ground::{Event, Ground, Reply},
    settings::ELECTION_MS,
    tally::Fault,
};

impl Node {
    /// Loses power: of what was not synced, any part is lost.
    pub(crate) fn crash(&mut self, ground: &mut Ground) {
        let Some(running) = self.running.take() else {
            return;
        };
        ground.tell(format_args!("node {} crashes", self.index));
        ground.stall_free[self.index].stop(ground.now_us);
        if running.sync.is_some_and(|sync| !sync.is_unnoticed) {
            ground.tally.fault(Fault::CrashDuringSync);
        }
        let kept_of_million = [0, 500_000, 900_000, 1_000_000][ground.rng.index(4)];
        if running.checkpoint.is_some() {
            ground.tally.fault(Fault::CrashDuringCheckpoint);
        }
        Self::count_crash(&running, ground);
        let rng = &mut ground.rng;
        self.disk.crash(&mut || rng.chance(kept_of_million));
        self.checkpoints.crash(&mut || rng.chance(kept_of_million));
        ground.checks.wakeups.stopped(self.index);
        ground.break_streams(self.index, None);
        for caller in running.callers.values() {
            // Some clients are told at once; others find out by waiting.
            if ground.rng.chance(800_000) {
                ground.send_reply(self.index, caller.actor, caller.id, Reply::Broken);
            }
        }
        self.paused = false;
        self.fails_next_sync = false;
        let peer = self.index;
        for node in (0..ground.settings.nodes).filter(|node| *node != peer) {
            if ground.rng.chance(800_000) {
                let at_us = ground.now_us + ground.rng.below(5_000);
                ground.schedule(at_us, Event::PeerLost { node, peer });
            }
        }
    }

    /// The loop thread ends, as after any failure of the disk.
    pub(super) fn disk_failed(&mut self, error: &dyn fmt::Display, ground: &mut Ground) {
        if !self.fails_next_sync {
            return ground.checks.node_failed(self.index, error);
        }
        ground.tally.fault(Fault::FailedSync);
        self.crash_for_a_while(ground);
    }

    /// Crashes, and starts again soon.
    pub(super) fn crash_for_a_while(&mut self, ground: &mut Ground) {
        self.crash(ground);
        let later = ground.now_us + ground.rng.between(50_000, 1_000_000);
        ground.schedule(later, Event::Start { node: self.index });
    }

    /// Stands still for a while; what arrives waits.
    pub(crate) fn pause(&mut self, until_us: u64, ground: &mut Ground) {
        self.pauses += 1;
        self.paused = true;
        self.paused_us = ground.now_us;
        ground.tell(format_args!("node {} pauses until {until_us}", self.index));
        ground.schedule(
            until_us,
            Event::Resume {
                node: self.index,
                pause: self.pauses,
            },
        );
    }

    pub(crate) fn resume(&mut self, pause: Option<u64>, ground: &mut Ground) {
        if !self.paused || pause.is_some_and(|pause| pause != self.pauses) {
            return;
        }
        self.paused = false;
        ground.tell(format_args!("node {} goes on", self.index));
        let is_long = ground.now_us - self.paused_us > 2 * ELECTION_MS * 1_000;
        let inbox = self.running.iter().flat_map(|running| &running.inbox);
        if is_long
            && inbox
                .into_iter()
                .any(|input| matches!(input, Input::Peer { .. }))
        {
            // By now another leads; what its peers said before comes all at once.
            ground.tally.fault(Fault::PacketsAfterPause);
        }
        let Some(running) = &self.running else {
            return;
        };
        match running.sync {
            Some(sync) if sync.is_unnoticed => self.synced(self.boot, ground),
            _ => self.alarm.set(ground.now_us, ground),
        }
    }

    pub(crate) fn slow_down(&mut self, slowness: u64) {
        self.slowness = slowness;
    }

    pub(crate) fn fail_next_sync(&mut self) {
        self.fails_next_sync = true;
    }

    /// All that is wrong with this node ends.
    pub(crate) fn heal(&mut self, ground: &mut Ground) {
        self.slowness = 1;
        self.fails_next_sync = false;
        self.resume(None, ground);
        if self.running.is_none() {
            let soon = ground.now_us + ground.rng.below(100_000);
            ground.schedule(soon, Event::Start { node: self.index });
        }
    }
}
