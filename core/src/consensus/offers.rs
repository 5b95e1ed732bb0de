//! Checkpoints in place of what was cut off: offered to followers by the leader, taken
//! note of by those who need them. What is in them goes another way.

use raft::{
    ProgressState, SnapshotStatus,
    eraftpb::{Message, MessageType},
};

use super::Consensus;
use crate::ids::Index;

impl Consensus {
    /// A checkpoint that holds the log up to this entry is durable: followers that
    /// need what was cut off are offered it.
    pub(crate) fn offer(&mut self, at: Index) {
        if let Ok(term) = self.raw.raft.raft_log.term(at)
            && term > 0
        {
            self.raw.mut_store().offer = (at, term);
        }
    }

    /// A follower that was offered a checkpoint hears nothing but heartbeats until it
    /// has it. The offer may be lost, or the follower may have begun again: it is made
    /// once more until the follower has got on.
    pub(super) fn repeat_offers(&mut self) {
        let offered: Vec<u64> = self
            .raw
            .raft
            .prs()
            .iter()
            .filter(|(_, progress)| progress.state == ProgressState::Snapshot)
            .map(|(id, _)| *id)
            .collect();
        for follower in offered {
            self.raw.report_snapshot(follower, SnapshotStatus::Failure);
        }
    }

    /// Makes a heartbeat of an offer that is of use: raft-rs would drop the log for
    /// it at once, and the checkpoint is not here yet. To one that is of no use it
    /// answers how far this member has come.
    pub(super) fn take_offer(&self, message: &mut Message) -> Option<Index> {
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let is_offer = message.msg_type == MessageType::MsgSnapshot;
        if !is_offer || message.term < self.term() {
            return None;
        }
        if index < self.committed() || self.holds((index, term)) {
            return None;
        }
        message.clear_snapshot();
        message.msg_type = MessageType::MsgHeartbeat;
        Some(index)
    }
}
