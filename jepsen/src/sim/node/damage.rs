//! Damage at rest: what a start finds that was whole when it was written.

use conclave_core::{
    checkpoint::{self, CheckpointStore as _, Slot},
    ids::Index,
    log::{Log, LogError},
};

use super::{LAYOUT, Node};
use crate::sim::{ground::Ground, tally::Fault};

/// How often a start is shown a damaged log, in a million.
const LOG_DAMAGES: u64 = 200_000;
/// How often a start finds its newest checkpoint damaged, in a million.
const DAMAGES: u64 = 50_000;
/// How often it finds all of them damaged.
const LOSSES: u64 = 50_000;

impl Node {
    /// Damages the newest checkpoint at rest, if there is another one, or all of them,
    /// if no other node is without one.
    pub(super) fn damage_checkpoint(&mut self, ground: &mut Ground) {
        let Ok(stored) = self.checkpoints.list() else {
            return;
        };
        let may_lose = ground.without_state.is_none() && !stored.is_empty();
        if may_lose && ground.rng.chance(LOSSES) {
            ground.without_state = Some(self.index);
            for at in stored {
                self.checkpoints
                    .damage(at.into(), |records| drop(records.pop()));
            }
            if let Err(error) = self.checkpoints.remove(Slot::Incoming) {
                ground.checks.node_failed(self.index, &error);
            }
            return;
        }
        let is_whole = |at: &&Index| checkpoint::read(&self.checkpoints, **at).is_ok();
        if let [_, newest] = stored.iter().filter(is_whole).collect::<Vec<_>>()[..]
            && ground.rng.chance(DAMAGES)
        {
            ground.tally.fault(Fault::CheckpointDamaged);
            let newest = *newest;
            self.checkpoints.damage(newest.into(), |records| {
                let lost = ground.rng.index(records.len());
                records.remove(lost);
            });
        }
    }

    /// Shows a start what damage at rest would make of the log: it is refused, or
    /// nothing that was attested is gone. Then the directory is restored as it was.
    pub(super) fn damage_log(&mut self, ground: &mut Ground) {
        let Ok(Some(whole)) = Log::inspect(&self.disk) else {
            return;
        };
        if !ground.rng.chance(LOG_DAMAGES) {
            return;
        }
        let mut damaged = self.disk.fork();
        let place = ground.rng.index(whole.segments.len());
        let (name, length) = &whole.segments[place];
        let is_newest = place + 1 == whole.segments.len();
        let at = ground.rng.below(*length);
        let is_attested = if is_newest && ground.rng.chance(100_000) {
            damaged.damage(name, |bytes| bytes.fill(0));
            whole.unattested_bytes < whole.end
        } else {
            damaged.damage(name, |bytes| bytes[at as usize] ^= 1 << (at % 8));
            !is_newest || at < whole.end - whole.unattested_bytes
        };
        match Log::open_with(damaged, LAYOUT) {
            Err(LogError::Damaged { .. } | LogError::Corrupt { .. }) => {
                ground.tally.fault(Fault::LogDamaged);
            }
            Ok(Some((_, found))) if found == whole.recovered || !is_attested => {}
            // Of a log that is all in its first segment nothing else is left that
            // could tell; the server knows by the directory of checkpoints.
            Ok(None) if whole.segments.len() == 1 => {}
            found => {
                let what = format!("{name} was damaged at {at}, and a start found {found:?}");
                ground.checks.node_failed(self.index, &what);
            }
        }
    }
}
