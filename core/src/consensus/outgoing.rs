//! Messages on their way out: which may leave now, what they tell followers of commits,
//! and how they go over the wire.

use bytes::Bytes;
use protobuf::Message as _;
use raft::{
    Raft, StateRole,
    eraftpb::{Message, MessageType},
};

use super::{
    Consensus,
    memory::{MemoryLog, fitting},
};
use crate::{
    ids::{Index, NodeId},
    limits,
};

impl Consensus {
    /// What may leave now of these messages and of earlier ones.
    pub(super) fn defer(&mut self, messages: Vec<Message>, now_us: u64) -> Vec<Message> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            self.deferral.forget();
            self.told.clear();
            return messages;
        }
        self.deferral.choose(followers(raft), now_us);
        let mut leaving = self.deferral.pass(messages, now_us);
        for message in &mut leaving {
            self.note_told(message);
        }
        leaving
    }

    /// Notes what a message tells its receiver of commits: an append, no more than up to
    /// its last entry. One that was held back gets the newest that is known.
    fn note_told(&mut self, message: &mut Message) {
        let commit = match message.msg_type {
            MessageType::MsgAppend => {
                message.commit = message.commit.max(self.raw.raft.raft_log.committed);
                let last = message.index + message.entries.len() as u64;
                message.commit.min(last)
            }
            MessageType::MsgHeartbeat => message.commit,
            _ => return,
        };
        let told = self.told.entry(message.to).or_default();
        *told = commit.max(*told);
    }

    /// Whether a follower has acknowledged what is committed, and nothing that was sent
    /// to it or is about to be says so. Before that, a heartbeat could not tell it: that
    /// says no more than the follower has acknowledged.
    pub(crate) fn has_untold_commit(&self) -> bool {
        let raft = &self.raw.raft;
        let is_untold = |(id, matched): (u64, Index)| {
            self.told_to(id) < matched.min(raft.raft_log.committed) && !self.deferral.holds(id)
        };
        raft.state == StateRole::Leader && followers(raft).any(is_untold)
    }

    fn told_to(&self, follower: u64) -> Index {
        self.told.get(&follower).copied().unwrap_or(0)
    }

    /// Tells followers how much is committed, without waiting for an append that
    /// would say it in passing. Under load that is what happens, and it halves the
    /// messages and turns that an entry costs.
    pub(crate) fn tell_commit(&mut self) {
        self.raw.ping();
    }

    /// Tells one follower at once that an entry is committed, if nothing has: with what
    /// leaves for it in this turn, if anything does. One that takes no appends now hears
    /// of it with the next that it takes.
    pub(crate) fn tell_commit_to(&mut self, follower: NodeId, entry: Index) {
        let is_told = self.told_to(follower.0) >= entry;
        if !is_told && self.raw.raft.prs().get(follower.0).is_some() {
            self.raw.raft.send_append(follower.0);
        }
    }

    /// The same for all followers.
    pub(crate) fn tell_commit_to_all(&mut self, entry: Index) {
        let followers: Vec<_> = followers(&self.raw.raft)
            .map(|(id, _)| NodeId(id))
            .collect();
        for follower in followers {
            self.tell_commit_to(follower, entry);
        }
    }
}

/// All members but this leader, and up to where each has acknowledged the log.
fn followers(raft: &Raft<MemoryLog>) -> impl Iterator<Item = (u64, Index)> {
    let others = raft.prs().iter().filter(|(id, _)| **id != raft.id);
    others.map(|(id, progress)| (*id, progress.matched))
}

pub(super) fn encode(messages: Vec<Message>) -> Vec<(NodeId, Bytes)> {
    messages
        .into_iter()
        .flat_map(split)
        .map(|message| {
            let bytes = message
                .write_to_bytes()
                .expect("writing to memory does not fail");
            (NodeId(message.to), Bytes::from(bytes))
        })
        .collect()
}

/// raft-rs joins all appends of a turn to one receiver, without limit; a follower
/// that is far behind would get everything at once. Several in a row say the same.
fn split(mut message: Message) -> Vec<Message> {
    if fitting(message.entries.iter(), limits::APPEND_BYTES_MAX) == message.entries.len() {
        return vec![message];
    }
    let mut entries: Vec<_> = message.take_entries().into();
    let mut parts = Vec::new();
    loop {
        let rest = entries.split_off(fitting(entries.iter(), limits::APPEND_BYTES_MAX));
        let mut part = message.clone();
        if let Some(last) = entries.last() {
            (message.index, message.log_term) = (last.index, last.term);
        }
        part.set_entries(entries.into());
        parts.push(part);
        if rest.is_empty() {
            return parts;
        }
        entries = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::memory::tests::entries;

    #[test]
    fn a_long_append_goes_in_parts_that_join() {
        let mib = 1 << 20;
        let whole = entries(&[10, mib, 10, mib + 10, mib - 100, 20]);
        let mut message = Message::default();
        message.set_entries(whole.clone().into());
        let parts = split(message);
        let lengths: Vec<_> = parts.iter().map(|part| part.entries.len()).collect();
        assert_eq!(lengths, [1, 1, 1, 1, 2]);
        let before: Vec<_> = parts.iter().map(|p| (p.index, p.log_term)).collect();
        assert_eq!(before, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]);
        let joined: Vec<_> = parts.iter().flat_map(|p| p.entries.to_vec()).collect();
        assert_eq!(joined, whole);
        assert_eq!(split(Message::default()).len(), 1);
    }
}
