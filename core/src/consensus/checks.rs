//! A check of every message from a peer before raft-rs sees it, since it panics on some
//! that a correct peer never sends, and believes others.

use raft::eraftpb::{Message, MessageType};

use super::Consensus;
use crate::ids::NodeId;

impl Consensus {
    /// Shapes that raft-rs trusts a peer to keep.
    pub(super) fn check(&self, from: NodeId, message: &Message) -> Result<(), &'static str> {
        use MessageType::{
            MsgAppend, MsgAppendResponse, MsgHeartbeat, MsgHeartbeatResponse, MsgReadIndex,
            MsgReadIndexResp, MsgRequestPreVote, MsgRequestPreVoteResponse, MsgRequestVote,
            MsgRequestVoteResponse, MsgSnapshot, MsgTimeoutNow,
        };
        let last = self.last_index();
        if message.from != from.0 || message.to != self.raw.raft.id {
            return Err("names another sender or receiver");
        }
        if !self.raw.store().voters.contains(&from.0) {
            return Err("comes from no member");
        }
        if (message.term == 0) != (message.msg_type == MsgReadIndex) {
            return Err("has no term, or should have none");
        }
        match message.msg_type {
            MsgAppend => self.check_append(message),
            MsgSnapshot => self.check_offer(message),
            MsgHeartbeat if message.term >= self.term() && message.commit > last => {
                Err("commits more than this log holds")
            }
            MsgAppendResponse if message.reject && message.reject_hint > message.index => {
                Err("rejects something else than was sent")
            }
            MsgAppendResponse
                if !message.reject && message.term == self.term() && message.index > last =>
            {
                Err("acknowledges more than was sent")
            }
            MsgReadIndex | MsgReadIndexResp if message.entries.len() != 1 => {
                Err("asks for a read without a context")
            }
            MsgHeartbeat
            | MsgAppendResponse
            | MsgReadIndex
            | MsgReadIndexResp
            | MsgHeartbeatResponse
            | MsgRequestPreVote
            | MsgRequestPreVoteResponse
            | MsgRequestVote
            | MsgRequestVoteResponse
            | MsgTimeoutNow => Ok(()),
            _ => Err("has a type that members do not exchange"),
        }
    }

    fn check_append(&self, message: &Message) -> Result<(), &'static str> {
        let mut before = (message.index, message.log_term);
        if before.0 > 0 && before.1 == 0 {
            // raft-rs takes 0 for the term of everything behind the log.
            return Err("appends behind an entry without a term");
        }
        for entry in message.entries.iter() {
            if Some(entry.index) != before.0.checked_add(1)
                || entry.term < before.1
                || entry.term > message.term
            {
                return Err("appends entries out of order");
            }
            before = (entry.index, entry.term);
            // What was cut off cannot be compared, and raft-rs does not look at it.
            let replaces_committed = entry.index <= self.committed()
                && entry.index > self.raw.store().cut.0
                && self.raw.raft.raft_log.term(entry.index).ok() != Some(entry.term);
            if replaces_committed && message.term >= self.term() {
                return Err("replaces committed entries");
            }
        }
        Ok(())
    }

    fn check_offer(&self, message: &Message) -> Result<(), &'static str> {
        let snapshot = message.get_snapshot();
        let metadata = snapshot.get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        if index == 0 || term == 0 || term > message.term || !snapshot.data.is_empty() {
            return Err("offers what is no checkpoint");
        }
        if metadata.get_conf_state().voters != self.raw.store().voters {
            return Err("offers a checkpoint of other members");
        }
        if index == self.committed() && !self.holds((index, term)) {
            return Err("offers another history");
        }
        Ok(())
    }
}
