//! The checkpoints that a node writes, and what they let it cut from its log.

use std::mem;

use conclave_core::checkpoint::{self, Part};

use super::Node;
use crate::sim::ground::{Event, Ground};

/// Versions and sessions that one turn copies for a checkpoint: so few that its
/// picture takes many turns.
const DRAWN_PER_TURN_MAX: u64 = 64;

impl Node {
    /// Begins a checkpoint when one is due, and cuts the log.
    pub(super) fn keep_checkpoints(&mut self, ground: &mut Ground) {
        let Some(running) = &self.running else {
            return;
        };
        let written_bytes = running.log.written_bytes();
        let state = running.replica.state();
        let (applied, state_bytes) = (state.applied(), state.bytes());
        let is_due = running.schedule.is_due(applied, written_bytes, state_bytes);
        if is_due {
            // The thread that writes does one thing after the other.
            self.adopt(ground);
        }
        let Some(running) = &mut self.running else {
            return;
        };
        if is_due {
            if let Err(error) =
                checkpoint::keep_two(&mut self.checkpoints, running.schedule.newest())
            {
                return ground.checks.node_failed(self.index, &error);
            }
            running.schedule.begin(applied, written_bytes);
            running.replica.begin_image();
        }
        let drawn = 1 + ground.rng.below(DRAWN_PER_TURN_MAX);
        let drawn = usize::try_from(drawn).expect("it is small");
        running.parts.extend(running.replica.draw_part(drawn));
        if let Some(Part::Rest(image)) = running.parts.last() {
            let at = image.applied();
            running.checkpoint = Some(at);
            let parts = mem::take(&mut running.parts);
            self.checkpoints
                .begin(at.into(), checkpoint::records(parts.into_iter()));
            let (node, boot) = (self.index, self.boot);
            let at_us = ground.now_us + ground.rng.skewed(200_000);
            ground.schedule(at_us, Event::CheckpointWritten { node, boot });
        }
        self.cut(ground);
    }

    /// Cuts the log, if it is at hand.
    pub(super) fn cut(&mut self, ground: &mut Ground) {
        let Some(running) = self
            .running
            .as_mut()
            .filter(|running| running.sync.is_none())
        else {
            return;
        };
        let held = running.replica.held_by_all();
        let sent = running
            .sent
            .filter(|(_, until_us)| *until_us > ground.now_us);
        let sent = sent.map(|(at, _)| at);
        let upto = running.schedule.cut(held, sent, running.log.bytes());
        running.replica.cut(upto);
        if let Err(error) = running.log.cut(upto.max(running.log.base())) {
            self.disk_failed(&error, ground);
        }
    }

    /// A checkpoint has taken its time.
    pub(crate) fn checkpoint_written(&mut self, boot: u64, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        if boot == self.boot
            && let Some(at) = running.checkpoint.take()
        {
            self.checkpoints.sync(at.into());
            running.schedule.complete(at);
            running.replica.checkpointed(at);
            if let Err(error) = checkpoint::keep_two(&mut self.checkpoints, at) {
                ground.checks.node_failed(self.index, &error);
            }
        }
    }
}
