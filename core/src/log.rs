//! The write-ahead log.

use bytes::Bytes;

use crate::{
    disk::Disk,
    ids::{Index, NodeId, Term},
};

/// What a data directory is; written once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster it belongs to.
    pub cluster: u64,
    /// The member it belongs to.
    pub node: NodeId,
    /// Random, made with the directory.
    pub incarnation: u64,
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
    pub incarnations: std::collections::BTreeMap<NodeId, u64>,
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

/// What one turn makes durable, in one write and one sync.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// If changed.
    pub hard_state: Option<HardState>,
    /// If changed.
    pub facts: Option<Facts>,
    /// An entry replaces all earlier ones from its index on.
    pub entries: Vec<LogEntry>,
}

/// What a log held when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Whose directory it is.
    pub identity: Identity,
    /// The newest.
    pub hard_state: HardState,
    /// The newest.
    pub facts: Facts,
    /// All entries, without gaps, from the first index on.
    pub entries: Vec<LogEntry>,
}

/// The log over a disk.
#[derive(Debug)]
pub struct Log<D> {
    disk: D,
}

impl<D: Disk> Log<D> {
    /// Makes the log of a new data directory, durable when this returns.
    pub fn create(disk: D, identity: Identity, facts: Facts) -> Result<Self, LogError> {
        todo!()
    }

    /// Opens a log, or says that the directory holds none. What lies behind the
    /// last attested record is written again and synced before this returns.
    pub fn open(disk: D) -> Result<Option<(Self, Recovered)>, LogError> {
        todo!()
    }

    /// Writes a batch; not durable before [`Log::sync`].
    pub fn append(&mut self, batch: &Batch) -> Result<(), LogError> {
        todo!()
    }

    /// Makes everything appended durable. After an error nothing more is written.
    pub fn sync(&mut self) -> Result<(), LogError> {
        todo!()
    }

    /// Whether a mark is due: the newest batch is not attested by a record behind it.
    pub fn wants_mark(&self) -> bool {
        todo!()
    }

    /// Writes and syncs a mark, when the node is idle.
    pub fn mark(&mut self) -> Result<(), LogError> {
        todo!()
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        todo!()
    }
}

/// Why the log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {}
