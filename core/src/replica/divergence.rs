//! Whether members that have applied the same hold the same.
//!
//! Every [`limits::DIGEST_EVERY`] entries each member tells the others the digest
//! of its state. One that a majority without it contradicts has gone astray: by a
//! defect that applied something differently, or by memory that failed. It stops,
//! before it serves more of that to anyone. Messages may be lost, since a digest
//! covers all of the history: the next comparison finds what this one missed.

use std::collections::BTreeMap;

use conclave_proto::internal::{StateDigest, peer_message};

use super::{Fatal, Replica, peers::to};
use crate::{
    ids::{Index, NodeId},
    limits,
    machine::Machine,
};

/// How far others may be ahead of this member's log for their digests to be noted: what
/// they say may arrive before the entries do. So what a faulty member says of entries
/// that are far away never takes the place of more than half of what is kept.
const AHEAD_MAX: u64 = limits::DIGESTS_KEPT as u64 / 2 * limits::DIGEST_EVERY;

/// What members said of their states. See the module.
#[derive(Debug, Default)]
pub(super) struct Digests {
    /// By index, the newest ones: not everybody is there at the same time.
    said: BTreeMap<Index, BTreeMap<NodeId, u64>>,
    /// What this member has not told the others.
    untold: Option<StateDigest>,
}

impl Digests {
    /// Notes what a member said. A repetition changes nothing.
    fn note(&mut self, node: NodeId, index: Index, digest: u64) {
        let said = self.said.entry(index).or_default();
        said.entry(node).or_insert(digest);
        if self.said.len() > limits::DIGESTS_KEPT {
            self.said.pop_first();
        }
    }

    /// How many members, of those that have said something about `index`, agree
    /// with each other in contradicting this one: as many as agree most.
    fn against(&self, me: NodeId, index: Index) -> usize {
        let Some(said) = self.said.get(&index) else {
            return 0;
        };
        let Some(mine) = said.get(&me) else {
            return 0;
        };
        let others = said.values().filter(|digest| *digest != mine);
        let agree = |digest| said.values().filter(|other| *other == digest).count();
        others.map(agree).max().unwrap_or(0)
    }
}

impl<M: Machine> Replica<M> {
    /// The state has moved on by one entry.
    pub(super) fn note_own_digest(&mut self) -> Result<(), Fatal> {
        let index = self.state.applied();
        if !index.is_multiple_of(limits::DIGEST_EVERY) {
            return Ok(());
        }
        let digest = self.state.digest();
        self.digests.untold = Some(StateDigest { index, digest });
        self.digests.note(self.config.node, index, digest);
        self.compare_digests(index)
    }

    /// Another member says what it has.
    pub(super) fn receive_digest(&mut self, from: NodeId, said: StateDigest) -> Result<(), Fatal> {
        if !self.facts.voters.contains(&from) {
            return Ok(());
        }
        let StateDigest { index, digest } = said;
        let ahead = index.saturating_sub(self.consensus.last_index());
        if ahead > AHEAD_MAX || !index.is_multiple_of(limits::DIGEST_EVERY) {
            return Ok(());
        }
        self.digests.note(from, index, digest);
        self.compare_digests(index)
    }

    fn compare_digests(&self, index: Index) -> Result<(), Fatal> {
        let node = self.config.node;
        let against = self.digests.against(node, index);
        let majority = self.facts.voters.len() / 2 + 1;
        if against >= majority {
            return Err(Fatal::Diverged { node, index });
        }
        if against > 0 {
            tracing::error!(index, against, "another member has another state");
        }
        Ok(())
    }

    /// Tells the others the newest digest, once.
    pub(super) fn tell_digest(&mut self) {
        let Some(digest) = self.digests.untold.take() else {
            return;
        };
        let me = self.config.node;
        for peer in self.facts.voters.iter().filter(|voter| **voter != me) {
            let message = peer_message::Message::StateDigest(digest);
            self.outbox.push(to(*peer, message));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: NodeId = NodeId(1);

    fn against(said: &[(u64, u64)]) -> usize {
        let mut digests = Digests::default();
        for (node, digest) in said {
            digests.note(NodeId(*node), 128, *digest);
        }
        digests.against(ME, 128)
    }

    #[test]
    fn only_members_that_agree_with_each_other_count() {
        assert_eq!(against(&[(1, 7), (2, 7), (3, 7)]), 0);
        assert_eq!(against(&[(1, 7), (2, 7), (3, 8)]), 1);
        assert_eq!(against(&[(1, 7), (2, 8), (3, 8)]), 2);
        assert_eq!(against(&[(1, 7), (2, 8), (3, 9)]), 1);
        assert_eq!(against(&[(2, 8), (3, 8)]), 0, "it has said nothing yet");
    }

    #[test]
    fn a_repetition_does_not_change_what_was_said_and_the_oldest_go() {
        let mut digests = Digests::default();
        digests.note(ME, 128, 7);
        digests.note(ME, 128, 8);
        digests.note(NodeId(2), 128, 8);
        assert_eq!(digests.against(ME, 128), 1);
        for index in 2..100 {
            digests.note(ME, index * 128, 7);
        }
        assert_eq!(digests.said.len(), limits::DIGESTS_KEPT);
        assert_eq!(digests.against(ME, 128), 0);
    }
}
