//! What a leader keeps in memory for one term. Made when the term begins,
//! dropped when it ends; never carried over, never reset in place.

use std::collections::{BTreeMap, VecDeque};

use super::{Replica, Role, compaction::Compactor, reads::RenewalAsk, unhurried::Unhurried};
use crate::{
    ids::{Index, NodeId, RequestNumber, SessionId, Term},
    liveness::Liveness,
    machine::Machine,
};

/// How long followers may not know of a commit, if no append tells them. Watchers at a
/// follower see it that much later on an idle cluster. Those who wait there for an answer
/// or a lock are not delayed, but for one whose request another member has passed on before.
const TELL_COMMIT_WITHIN_US: u64 = 1_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Leadership {
    pub(super) term: Term,
    /// From the moment the first entry of the term is applied: before that, this
    /// leader may not know every session.
    pub(super) liveness: Option<Liveness>,
    /// Renewals that arrived before that.
    pub(super) early: Vec<RenewalAsk>,
    /// Renewals whose session's expiry is under way; its outcome answers them.
    pub(super) parked: BTreeMap<SessionId, Vec<RenewalAsk>>,
    /// The entry that ends sessions, if one is on its way.
    pub(super) expiry_entry: Index,
    /// It was full, or this node stood still: when the next may follow, by
    /// CLOCK_BOOTTIME.
    pub(super) expiry_resumes_us: Option<u64>,
    /// The entry that fires the timers which are due, if one is on its way.
    pub(super) timers_entry: Index,
    /// The entry that raises the alarm NOSPACE, if one is on its way.
    pub(super) alarm_entry: Index,
    /// The entry that raises the apply version, if one is on its way.
    pub(super) version_entry: Index,
    /// When followers must be told of a commit, if no append has by then.
    pub(super) tell_commit_us: Option<u64>,
    /// The entries that are not committed with requests of other members' clients, in
    /// order, and which member waits for each.
    pub(super) awaited: VecDeque<(Index, NodeId)>,
    pub(super) compactor: Compactor,
    pub(super) unhurried: Unhurried,
}

impl Leadership {
    pub(super) fn new(term: Term) -> Self {
        Self {
            term,
            liveness: None,
            early: Vec::new(),
            parked: BTreeMap::new(),
            expiry_entry: 0,
            expiry_resumes_us: None,
            timers_entry: 0,
            alarm_entry: 0,
            version_entry: 0,
            tell_commit_us: None,
            awaited: VecDeque::new(),
            compactor: Compactor::default(),
            unhurried: Unhurried::default(),
        }
    }

    /// Nothing expires before this.
    pub(super) fn hold_expiry(&mut self, until_us: u64) {
        // Before it is known who lives, nothing does anyway.
        if self.liveness.is_some() {
            self.expiry_resumes_us = self.expiry_resumes_us.max(Some(until_us));
        }
    }

    /// When more sessions may expire, if the entry before is applied.
    pub(super) fn next_expiry_us(&self, applied: Index) -> Option<u64> {
        self.expiry_resumes_us
            .filter(|_| self.expiry_entry <= applied)
    }
}

impl<M: Machine> Replica<M> {
    /// Makes or drops what belongs to a term of leadership.
    pub(super) fn follow_role(&mut self) {
        let term = self.consensus.term();
        let leads = self.consensus.role() == Role::Leader;
        if leads
            && self
                .leadership
                .as_ref()
                .is_some_and(|leadership| leadership.term == term)
        {
            return;
        }
        if let Some(mut leadership) = self.leadership.take() {
            self.refuse_commands(leadership.unhurried.take());
            #[cfg(conclave_plant)]
            {
                self.old_liveness = leadership.liveness;
            }
            let parked = leadership.parked.into_values().flatten();
            let given_up = leadership.early.into_iter().chain(parked);
            for renewal in given_up.chain(self.reads.take_renewals()) {
                self.refuse_renewal(renewal.wish.from);
            }
        }
        if leads {
            self.clock.raise(self.state.system().log_time());
            self.leadership = Some(Leadership::new(term));
            self.taken = Taken::new(term);
        }
    }

    /// Tells those followers of a commit whose clients wait for it. They hear of it before
    /// this member has applied it.
    pub(super) fn tell_who_awaits(&mut self) {
        let committed = self.consensus.committed();
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        while let Some((entry, follower)) = leadership.awaited.front().copied()
            && entry <= committed
        {
            leadership.awaited.pop_front();
            self.consensus.tell_commit_to(follower, entry);
        }
    }

    /// Tells followers of a commit when it is time and no append has.
    pub(super) fn tell_commit(&mut self) {
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        if leadership
            .tell_commit_us
            .is_some_and(|at| at <= self.now.boot_us)
        {
            leadership.tell_commit_us = None;
            if self.consensus.has_untold_commit() {
                self.consensus.tell_commit();
            }
        }
    }

    pub(super) fn plan_to_tell_commit(&mut self) {
        if let Some(leadership) = &mut self.leadership {
            let at = leadership
                .tell_commit_us
                .unwrap_or(self.now.boot_us + TELL_COMMIT_WITHIN_US);
            leadership.tell_commit_us = self.consensus.has_untold_commit().then_some(at);
        }
    }
}

/// Which requests of other members a leader has taken: the newest of each start
/// of each of them. It outlives the leadership, until the next one of this
/// process, so that no request is called untouched that was taken.
#[derive(Debug, Default)]
pub(super) struct Taken {
    term: Term,
    newest: BTreeMap<(NodeId, u64), RequestNumber>,
}

impl Taken {
    pub(super) fn new(term: Term) -> Self {
        Self {
            term,
            newest: BTreeMap::new(),
        }
    }

    /// The term of the leadership, which may be over.
    pub(super) fn term(&self) -> Term {
        self.term
    }

    /// Whether a request is seen for the first time. Requests of one start come
    /// in growing order, so that one with a lower number is a copy made by the
    /// network, or was overtaken; either way it must not run.
    pub(super) fn is_new(&self, node: NodeId, boot: u64, number: RequestNumber) -> bool {
        let newest = self.newest.get(&(node, boot));
        newest.is_none_or(|newest| number > *newest)
    }

    /// Takes a request if it is new.
    pub(super) fn take(&mut self, node: NodeId, boot: u64, number: RequestNumber) -> bool {
        let is_new = self.is_new(node, boot, number);
        if is_new {
            self.newest.insert((node, boot), number);
        }
        is_new
    }
}
