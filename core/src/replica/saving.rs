//! What is to be made durable, and what waits until it is.

use std::{collections::VecDeque, mem};

use conclave_proto::internal::PeerMessage;

use super::{Replica, peers::raft_message};
use crate::{
    consensus::Unsaved,
    ids::{Index, NodeId, Term},
    log::Batch,
    machine::Machine,
};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Saving {
    /// The next batch has what this member knows of itself.
    pub(super) has_new_facts: bool,
    /// The entry behind which the log begins anew, with the next batch.
    pub(super) base: Option<(Index, Term)>,
    /// Must not leave before the next batch is durable.
    pub(super) messages: Vec<(NodeId, PeerMessage)>,
    /// How many batches were given out.
    given: u64,
    /// For those that are not durable.
    bound: VecDeque<Bound>,
}

/// What waits until a batch is durable, and all before it.
#[derive(Debug)]
struct Bound {
    batch: u64,
    /// To be told to consensus then.
    number: u64,
    messages: Vec<(NodeId, PeerMessage)>,
}

impl Saving {
    /// Whether all that was given out is durable.
    pub(super) fn is_done(&self) -> bool {
        self.bound.is_empty()
    }

    fn next_done(&mut self, batches: u64) -> Option<Bound> {
        let first = self.bound.front()?;
        (first.batch <= batches)
            .then(|| self.bound.pop_front())
            .flatten()
    }
}

impl<M: Machine> Replica<M> {
    /// So many batches, from the first that [`Replica::begin`] gave, are durable.
    pub fn saved(&mut self, batches: u64) {
        while let Some(bound) = self.saving.next_done(batches) {
            self.consensus.saved(bound.number);
            self.outbox.extend(bound.messages);
        }
    }

    /// Takes what consensus has come to. What must be saved first is given, and numbered.
    pub(super) fn advance(&mut self) -> Option<Batch> {
        let prepared = self.consensus.prepare(self.now.boot_us);
        for (sequence, index) in prepared.reads {
            self.reads.confirm(sequence, index, self.leader_and_term());
        }
        // Without a state, nobody can apply them.
        if self.consensus.has_state() {
            self.unapplied.extend(prepared.committed);
        }
        let messages = prepared.messages.into_iter().map(raft_message);
        self.outbox.extend(messages);
        let batch = self.batch(prepared.unsaved);
        let mut messages = mem::take(&mut self.saving.messages);
        messages.extend(prepared.bound.into_iter().map(raft_message));
        if batch.is_some() {
            self.saving.given += 1;
            self.saving.bound.push_back(Bound {
                batch: self.saving.given,
                number: prepared.number,
                messages,
            });
        } else if let Some(last) = self.saving.bound.back_mut() {
            last.number = last.number.max(prepared.number);
            last.messages.extend(messages);
        } else {
            self.consensus.saved(prepared.number);
            self.outbox.extend(messages);
        }
        batch
    }

    fn batch(&mut self, unsaved: Option<Unsaved>) -> Option<Batch> {
        let facts = mem::take(&mut self.saving.has_new_facts).then(|| self.facts.clone());
        let base = self.saving.base.take();
        if unsaved.is_none() && facts.is_none() && base.is_none() {
            return None;
        }
        let Unsaved {
            hard_state,
            entries,
        } = unsaved.unwrap_or_default();
        // With a base goes that it is committed.
        let hard_state = hard_state.or_else(|| base.map(|_| self.consensus.hard_state()));
        Some(Batch {
            hard_state,
            facts,
            base,
            entries,
        })
    }
}
