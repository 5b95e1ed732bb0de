//! Reads and renewals on their way to a quorum's confirmation.
//!
//! All that has arrived by the end of a turn shares one confirmation. Each
//! confirmation has a number of its own, never used again; one that was asked of
//! another leader or in another term than the present does not count, and what
//! it was for is asked again.

use std::collections::VecDeque;

use super::{Query, Replica};
use crate::{
    ids::{Attachment, Index, NodeId, RequestNumber, Term},
    machine::Machine,
};

/// Something to be answered once a quorum confirmed the leader.
#[derive(Debug)]
pub(super) struct Ask<M: Machine> {
    /// After this it is given up, by CLOCK_BOOTTIME.
    pub(super) deadline_us: u64,
    pub(super) body: AskBody<M>,
}

#[derive(Debug)]
pub(super) enum AskBody<M: Machine> {
    Read {
        number: RequestNumber,
        query: Query<M>,
    },
    /// Only on a leader.
    Renewal(RenewalAsk),
}

impl<M: Machine> Ask<M> {
    fn into_renewal(self) -> Option<RenewalAsk> {
        match self.body {
            AskBody::Read { .. } => None,
            AskBody::Renewal(renewal) => Some(renewal),
        }
    }
}

/// A renewal, with who is to be answered.
#[derive(Debug)]
pub(super) struct RenewalAsk {
    pub(super) wish: Wish,
    /// When it arrived, by the clock of this leader.
    pub(super) arrived_us: u64,
}

/// A renewal, or a question how long a session has left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    pub(super) of: Attachment,
    pub(super) from: Renewer,
    /// It renews nothing.
    pub(super) only_asks: bool,
}

/// Who renews.
#[derive(Clone, Copy, Debug)]
pub(super) enum Renewer {
    /// A client of this node.
    Here(RequestNumber),
    /// A client of another node.
    There {
        node: NodeId,
        boot: u64,
        number: RequestNumber,
    },
}

/// See the module.
#[derive(Debug)]
pub(super) struct Reads<M: Machine> {
    sequence: u64,
    fresh: Vec<Ask<M>>,
    asked: VecDeque<Asked<M>>,
    confirmed: VecDeque<(Index, Vec<Ask<M>>)>,
}

#[derive(Debug)]
struct Asked<M: Machine> {
    sequence: u64,
    of: (NodeId, Term),
    retry_us: u64,
    asks: Vec<Ask<M>>,
}

impl<M: Machine> Default for Reads<M> {
    fn default() -> Self {
        Self {
            sequence: 0,
            fresh: Vec::new(),
            asked: VecDeque::new(),
            confirmed: VecDeque::new(),
        }
    }
}

impl<M: Machine> Reads<M> {
    pub(super) fn add(&mut self, ask: Ask<M>) {
        self.fresh.push(ask);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.asked.is_empty() && self.confirmed.is_empty()
    }

    pub(super) fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// Begins a confirmation for all that is fresh; gives its number.
    pub(super) fn ask(&mut self, of: (NodeId, Term), retry_us: u64) -> u64 {
        self.sequence += 1;
        #[cfg(conclave_plant)]
        if crate::plant::is("reuse-read-context") {
            self.sequence = 1;
        }
        let asks = std::mem::take(&mut self.fresh);
        self.asked.push_back(Asked {
            sequence: self.sequence,
            of,
            retry_us,
            asks,
        });
        self.sequence
    }

    /// A confirmation came. It counts if the leader and term are those that
    /// were asked.
    pub(super) fn confirm(&mut self, sequence: u64, index: Index, of: Option<(NodeId, Term)>) {
        let Some(position) = self
            .asked
            .iter()
            .position(|asked| asked.sequence == sequence)
        else {
            return;
        };
        let asked = self.asked.remove(position).expect("just found");
        if Some(asked.of) == of {
            self.confirmed.push_back((index, asked.asks));
        } else {
            self.fresh.extend(asked.asks);
        }
    }

    /// Makes fresh what was asked of another leader or in another term, and what
    /// waits too long for its confirmation, which may be lost.
    pub(super) fn renew_stale(&mut self, of: Option<(NodeId, Term)>, now_us: u64) {
        for _ in 0..self.asked.len() {
            let asked = self.asked.pop_front().expect("counted");
            if Some(asked.of) == of && now_us < asked.retry_us {
                self.asked.push_back(asked);
            } else {
                self.fresh.extend(asked.asks);
            }
        }
    }

    /// What may be answered from the state at `applied`.
    pub(super) fn take_ready(&mut self, applied: Index) -> Vec<Ask<M>> {
        let mut ready = Vec::new();
        for _ in 0..self.confirmed.len() {
            let (index, asks) = self.confirmed.pop_front().expect("counted");
            if index <= applied {
                ready.extend(asks);
            } else {
                self.confirmed.push_back((index, asks));
            }
        }
        ready
    }

    /// What is given up: its deadline has passed.
    pub(super) fn take_late(&mut self, now_us: u64) -> Vec<Ask<M>> {
        self.take(|ask| ask.deadline_us <= now_us)
    }

    /// All renewals that are not answered yet; they are of no use to a node that
    /// does not lead any more.
    pub(super) fn take_renewals(&mut self) -> Vec<RenewalAsk> {
        let renewals = self.take(|ask| matches!(ask.body, AskBody::Renewal(_)));
        renewals.into_iter().filter_map(Ask::into_renewal).collect()
    }

    fn take(&mut self, which: impl Fn(&Ask<M>) -> bool) -> Vec<Ask<M>> {
        let asked = self.asked.iter_mut().map(|asked| &mut asked.asks);
        let confirmed = self.confirmed.iter_mut().map(|(_, asks)| asks);
        let mut taken = Vec::new();
        for asks in asked.chain(confirmed).chain([&mut self.fresh]) {
            taken.extend(asks.extract_if(.., |ask| which(ask)));
        }
        taken
    }
}

impl<M: Machine> Replica<M> {
    /// Before its first commit a leader drops the question without a word. A
    /// follower that knows of a commit in this term knows that the leader does.
    pub(super) fn can_confirm(&self) -> bool {
        self.consensus.leader().is_some() && self.consensus.has_committed_in_term()
    }

    pub(super) fn ask_for_confirmation(&mut self) {
        let of = self.leader_and_term();
        self.reads.renew_stale(of, self.now.boot_us);
        if let Some(of) = of
            && self.reads.has_fresh()
            && self.can_confirm()
        {
            let sequence = self.reads.ask(of, self.now.boot_us + self.election_us());
            self.consensus.confirm(sequence);
        }
    }
}
