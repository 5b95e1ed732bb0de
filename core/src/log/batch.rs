//! What is written to a log: batches of entries, and what a node must remember beside
//! them.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::ids::{Index, NodeId, Term};

/// What one turn makes durable, in one write and one sync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// If changed.
    pub hard_state: Option<HardState>,
    /// If changed.
    pub facts: Option<Facts>,
    /// An entry, with its term, behind which the log begins anew: all others are
    /// dropped. A durable checkpoint must hold it.
    pub base: Option<(Index, Term)>,
    /// An entry replaces all earlier ones from its index on.
    pub entries: Vec<LogEntry>,
}

impl Batch {
    /// Whether the log begins anew with it.
    pub fn begins_anew(&self) -> bool {
        self.base.is_some()
    }

    /// Whether there is nothing to make durable.
    pub fn is_empty(&self) -> bool {
        let Self {
            hard_state,
            facts,
            base,
            entries,
        } = self;
        hard_state.is_none() && facts.is_none() && base.is_none() && entries.is_empty()
    }
}

/// Raft's hard state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// The current term.
    pub term: Term,
    /// Who got this node's vote in it; 0 for nobody.
    pub vote: u64,
    /// Up to where the log is known to be committed.
    pub commit: Index,
}

/// What a node must remember beside the log of Raft.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Whether enough other members know this directory's incarnation, so that
    /// it may vote.
    pub admitted: bool,
    /// The incarnations of other members, in order of id; the first one seen stays.
    pub incarnations: BTreeMap<NodeId, u64>,
    /// The voters, in order of id.
    pub voters: Vec<NodeId>,
}

/// One entry of Raft's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Its position.
    pub index: Index,
    /// The term it was proposed in.
    pub term: Term,
    /// What `data` is.
    pub kind: EntryKind,
    /// An encoded `internal::Entry`, or empty.
    pub data: Bytes,
}

/// The kinds of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// Commands.
    Normal,
    /// A change of membership.
    Membership,
}
