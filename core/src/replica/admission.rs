//! How a new data directory comes to take part.
//!
//! A member that lost its directory has forgotten votes and entries that it
//! acknowledged; if it voted again, a majority could forget what was committed.
//! So a new directory has a random incarnation, and before its member votes or
//! answers any Raft message, so many others must know that incarnation, durably,
//! that every later directory of the same id meets one of them. The first
//! incarnation that a member learns for an id is the one it keeps.

use std::collections::BTreeSet;

use conclave_proto::internal::{Hello, HelloReply, peer_message};

use super::{Fatal, Replica, peers::to};
use crate::{ids::NodeId, machine::Machine};

/// The questions of a new directory.
#[derive(Debug)]
pub(super) struct Admission {
    others: BTreeSet<NodeId>,
    known_by: BTreeSet<NodeId>,
    needed: usize,
}

impl Admission {
    pub(super) fn new(me: NodeId, voters: &[NodeId]) -> Self {
        let others: BTreeSet<_> = voters
            .iter()
            .copied()
            .filter(|voter| *voter != me)
            .collect();
        let needed = needed(voters.len());
        Self {
            others,
            known_by: BTreeSet::new(),
            needed,
        }
    }

    /// Whom to ask (again).
    pub(super) fn unanswered(&self) -> impl Iterator<Item = NodeId> {
        self.others.difference(&self.known_by).copied()
    }

    /// A member knows this incarnation.
    pub(super) fn known_by(&mut self, member: NodeId) {
        if self.others.contains(&member) {
            self.known_by.insert(member);
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.known_by.len() >= self.needed
    }
}

impl<M: Machine> Replica<M> {
    /// Asks those who have not said that they know this directory. Once enough do, this
    /// member takes part.
    pub(super) fn seek_admission(&mut self) {
        let Some(admission) = &self.admission else {
            return;
        };
        if admission.is_complete() {
            self.admission = None;
            self.facts.admitted = true;
            self.saving.has_new_facts = true;
            return;
        }
        let hello = Hello {
            incarnation: self.incarnation,
        };
        for peer in admission.unanswered() {
            self.outbox
                .push(to(peer, peer_message::Message::Hello(hello)));
        }
    }

    pub(super) fn receive_hello(&mut self, from: NodeId, hello: &Hello) {
        if !self.facts.voters.contains(&from) || hello.incarnation == 0 {
            return;
        }
        let incarnation = hello.incarnation;
        let known = *self.facts.incarnations.entry(from).or_insert_with(|| {
            self.saving.has_new_facts = true;
            incarnation
        });
        let reply = HelloReply { incarnation, known };
        self.saving
            .messages
            .push(to(from, peer_message::Message::HelloReply(reply)));
    }

    pub(super) fn receive_hello_reply(
        &mut self,
        from: NodeId,
        reply: &HelloReply,
    ) -> Result<(), Fatal> {
        let Some(admission) = &mut self.admission else {
            return Ok(());
        };
        if reply.incarnation != self.incarnation {
            return Ok(());
        }
        if reply.known != self.incarnation {
            return Err(Fatal::Replaced {
                node: self.config.node,
            });
        }
        admission.known_by(from);
        Ok(())
    }
}

/// How many others must know a new directory. Any two sets of this size among
/// the others share a member, so that the second directory of an id is found
/// out; and any majority that holds what the first one helped to commit has a
/// member in common with it.
fn needed(voters: usize) -> usize {
    let others = voters.saturating_sub(1);
    let majority = voters / 2 + 1;
    (voters - majority + 1).min(others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_two_sets_of_acquaintances_meet() {
        for voters in 2..=9 {
            let others = voters - 1;
            assert!(2 * needed(voters) > others, "{voters} voters");
            assert!(needed(voters) <= others, "{voters} voters");
        }
        assert_eq!(needed(1), 0);
        assert_eq!(needed(3), 2);
        assert_eq!(needed(5), 3);
    }

    #[test]
    fn strangers_do_not_count() {
        let voters = [NodeId(1), NodeId(2), NodeId(3)];
        let mut admission = Admission::new(NodeId(1), &voters);
        admission.known_by(NodeId(1));
        admission.known_by(NodeId(9));
        admission.known_by(NodeId(2));
        assert!(!admission.is_complete());
        assert_eq!(admission.unanswered().collect::<Vec<_>>(), [NodeId(3)]);
        admission.known_by(NodeId(3));
        assert!(admission.is_complete());
    }
}
