//! How a member that cannot go on from its own log comes by a checkpoint of the
//! leader: one that is so far behind that the others have cut what it needs, or one
//! whose own checkpoints are damaged.
//!
//! Whoever drives the replica fetches it ([`Fetch`]), and hands its state over once it
//! is durable and verified. Then this member goes on as if it had started with it.
//! What its clients wait for by a number is looked up in the new state; of other waits
//! nobody can tell what became of them.

use std::mem;

use super::{Failure, Replica};
use crate::{
    ids::{Index, NodeId, RequestNumber, SessionId},
    machine::{Machine, Outcome},
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

/// Those who wait at a place.
#[derive(Debug)]
struct Waiting {
    /// What they wait for, if it has a number.
    request: Option<(SessionId, u64)>,
    asked_by: Vec<RequestNumber>,
}

impl Install {
    /// A checkpoint is needed.
    pub(super) fn want(&mut self, at_least: Index) {
        self.wanted = Some(at_least);
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted.is_some()
    }
}

impl<M: Machine> Replica<M> {
    /// Whether this member waits for a checkpoint: it cannot say what became of a
    /// request.
    pub(super) fn is_behind(&self) -> bool {
        self.install.is_wanted()
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
        assert!(self.saving.is_done(), "the log is not at rest");
        tracing::info!(index = at.0, keeps_log = holds, "installs a checkpoint");
        self.consensus.restart(at);
        self.unapplied.clear();
        if !holds {
            self.saving.base = Some(at);
        }
        let waiting = self.take_waiting();
        self.state = state;
        self.watchers.install(self.state.keyspace());
        self.hashings.restart();
        self.install.wanted = None;
        self.clock.follow(self.state.system().log_time());
        self.fail_pending(|_| true);
        self.look_after(waiting);
        self.output.installed = Some(at.0);
    }

    /// Who waits, as the state names them that is about to go.
    fn take_waiting(&mut self) -> Vec<Waiting> {
        let waiting = mem::take(&mut self.waiting).into_iter();
        let sessions = self.state.sessions();
        waiting
            .map(|(place, asked_by)| Waiting {
                request: sessions.waits_at(&place),
                asked_by,
            })
            .collect()
    }

    /// Answers requests that waited for what has happened by now.
    fn look_after(&mut self, waiting: Vec<Waiting>) {
        for Waiting { request, asked_by } in waiting {
            for asked in asked_by {
                match request.and_then(|(session, number)| self.state.outcome_of(session, number)) {
                    Some(Outcome::Done(answer)) => self.output.answers.push((asked, Ok(answer))),
                    Some(Outcome::Waiting(place)) => self.wait_at(place, asked),
                    // It may have been granted and be over.
                    None => self.fail(asked, Failure::OutcomeUnknown),
                }
            }
        }
    }
}
