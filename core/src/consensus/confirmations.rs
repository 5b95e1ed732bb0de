//! Confirmations by a quorum that the leader still leads: raft-rs' ReadIndex, each with
//! a context that is never used again.

use raft::ReadState;

use super::Consensus;
use crate::ids::Index;

impl Consensus {
    /// Asks for a confirmation that this group's leader still leads. `sequence`
    /// must never have been used before in this start of the process: a late
    /// answer to an earlier one would confirm this one on a deposed leader (etcd
    /// issue 20418). Node and boot make it unique in the cluster.
    pub(crate) fn confirm(&mut self, sequence: u64) {
        let mut context = self.context_prefix();
        context.extend_from_slice(&sequence.to_be_bytes());
        self.raw.read_index(context);
    }

    pub(super) fn confirmed(&self, state: &ReadState) -> Option<(u64, Index)> {
        let sequence = state
            .request_ctx
            .strip_prefix(self.context_prefix().as_slice())?;
        Some((u64::from_be_bytes(sequence.try_into().ok()?), state.index))
    }

    fn context_prefix(&self) -> Vec<u8> {
        let mut prefix = Vec::with_capacity(24);
        prefix.extend_from_slice(&self.raw.raft.id.to_be_bytes());
        prefix.extend_from_slice(&self.config.boot.to_be_bytes());
        prefix
    }
}
