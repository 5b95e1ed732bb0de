//! How a member that cannot go on from its own log comes by a checkpoint of the
//! leader: one that is so far behind that the others have cut what it needs, or one
//! whose own checkpoints are damaged.
//!
//! Whoever drives the replica fetches it ([`Fetch`]), and hands its state over once it
//! is durable and verified. Then this member goes on as if it had started with it.
//! What its clients wait for is looked up in the new state; of what happened in
//! between, nobody can tell them more.

use std::{collections::BTreeSet, mem};

use super::{Answer, AnswerBody, Failure, Replica};
use crate::{
    ids::{Index, NodeId},
    machine::Machine,
    state::State,
};

/// A checkpoint that this member needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Who has it.
    pub from: NodeId,
    /// The lowest entry that it must reach up to.
    pub at_least: Index,
}

/// What is known of the checkpoint that this member needs.
#[derive(Debug, Default)]
pub(super) struct Install {
    /// The lowest entry that it must reach up to.
    wanted: Option<Index>,
    is_under_way: bool,
    /// After a failure: when to try again.
    retry_us: u64,
}

impl Install {
    /// A checkpoint is needed.
    pub(super) fn want(&mut self, at_least: Index) {
        self.wanted = Some(at_least);
    }
}

impl<M: Machine> Replica<M> {
    /// Whether this member waits for a checkpoint: it cannot say what became of a
    /// request.
    pub(super) fn is_behind(&self) -> bool {
        self.install.wanted.is_some()
    }

    /// Orders the checkpoint that is needed, once at a time.
    pub(super) fn plan_fetch(&mut self) {
        let committed = self.consensus.committed();
        if self.consensus.has_state() && self.install.wanted.is_some_and(|at| at <= committed) {
            // The log has come another way.
            self.install.wanted = None;
        }
        if let Some(at_least) = self.install.wanted
            && let Some(from) = self.consensus.leader()
            && from != self.config.node
            && !self.install.is_under_way
            && self.install.retry_us <= self.now.boot_us
        {
            self.install.is_under_way = true;
            self.output.fetch = Some(Fetch { from, at_least });
        }
    }

    /// What was fetched is here, or the attempt has failed.
    pub(super) fn fetched(&mut self, state: Option<State<M>>) {
        self.install.is_under_way = false;
        self.install.retry_us = self.now.boot_us + self.election_us();
        if let Some(state) = state {
            self.install(state);
        }
    }

    fn install(&mut self, state: State<M>) {
        let at = (state.applied(), state.term());
        if state.cluster() != self.state.cluster() {
            tracing::error!(index = at.0, "was sent a checkpoint of another cluster");
            return;
        }
        let holds = self.consensus.holds(at);
        if self.consensus.has_state() {
            if holds || at.0 <= self.consensus.committed() {
                // The log has come another way.
                return;
            }
        } else if !holds && at.0 <= self.consensus.committed() {
            // It ends before the log begins.
            self.install.want(self.consensus.before_first());
            return;
        }
        tracing::info!(index = at.0, keeps_log = holds, "installs a checkpoint");
        self.consensus.restart(at);
        self.unapplied.clear();
        if !holds {
            self.base = Some(at);
        }
        self.state = state;
        self.install.wanted = None;
        self.clock.follow(self.state.system().log_time());
        self.fail_pending(|_| true);
        self.look_after_places();
        self.output.installed = Some(at.0);
    }

    /// Answers requests that waited for what has happened by now.
    fn look_after_places(&mut self) {
        let asked: BTreeSet<_> = self.waiting.keys().copied().collect();
        if asked.is_empty() {
            return;
        }
        let mut found = self.state.machine().places(&asked);
        for (place, numbers) in mem::take(&mut self.waiting) {
            match found.remove(&place) {
                Some(None) => drop(self.waiting.insert(place, numbers)),
                Some(Some(reply)) => {
                    for number in numbers {
                        self.output.answers.push((
                            number,
                            Ok(Answer {
                                revision: self.state.keyspace().revision(),
                                term: self.state.term(),
                                body: AnswerBody::Machine(Ok(reply.clone())),
                            }),
                        ));
                    }
                }
                // It may have been granted and be over.
                None => {
                    for number in numbers {
                        self.fail(number, Failure::OutcomeUnknown);
                    }
                }
            }
        }
    }
}
