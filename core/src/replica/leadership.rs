//! What a leader keeps in memory for one term. Made when the term begins,
//! dropped when it ends; never carried over, never reset in place.

use std::collections::BTreeMap;

use super::reads::RenewalAsk;
use crate::{
    ids::{Index, NodeId, RequestNumber, SessionId, Term},
    liveness::Liveness,
};

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
    pub(super) parked: Vec<RenewalAsk>,
    /// The entry that fires the timers which are due, if one is on its way.
    pub(super) timers_entry: Index,
    /// When followers must be told of a commit, if no append has by then.
    pub(super) tell_commit_us: Option<u64>,
    /// The newest request taken from each node, with the boot it belongs to.
    taken: BTreeMap<NodeId, (u64, RequestNumber)>,
}

impl Leadership {
    pub(super) fn new(term: Term) -> Self {
        Self {
            term,
            liveness: None,
            early: Vec::new(),
            parked: Vec::new(),
            timers_entry: 0,
            tell_commit_us: None,
            taken: BTreeMap::new(),
        }
    }

    /// Whether a forwarded request may be taken: requests of a node come in
    /// growing order, so that one with a lower number is a repetition made by
    /// the network, or was overtaken; either way it must not run.
    pub(super) fn take(&mut self, node: NodeId, boot: u64, number: RequestNumber) -> bool {
        let taken = self.taken.entry(node).or_insert((boot, 0));
        if taken.0 != boot {
            // A later start of the same node counts from the beginning. One that
            // comes after it is of the past, but its numbers may not be told from
            // new ones: only the newest boot seen is kept, and an old one that
            // returns has nobody who waits for its answer.
            *taken = (boot, 0);
        }
        let newer = number > taken.1;
        taken.1 = taken.1.max(number);
        newer
    }

    /// A session ended: who waited to renew it hears so.
    pub(super) fn ended(&mut self, session: SessionId) -> Vec<RenewalAsk> {
        if let Some(liveness) = &mut self.liveness {
            liveness.ended(session);
        }
        self.parked
            .extract_if(.., |ask| ask.session == session)
            .collect()
    }
}
