//! The seam to where checkpoints are kept.
//!
//! Two implementations: [`FjallCheckpoints`](super::FjallCheckpoints) is the real
//! one; [`SimCheckpoints`](super::SimCheckpoints) keeps them in memory and can
//! crash while one is written.

use std::io;

use bytes::Bytes;

use crate::ids::Index;

/// A place for a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// Of the one that ends with this entry.
    At(Index),
    /// Of one that comes from another member. It is none of this member's until the
    /// log says so.
    Incoming,
}

impl From<Index> for Slot {
    fn from(at: Index) -> Self {
        Self::At(at)
    }
}

/// Checkpoints by the newest entry that each holds. What a store gives back is
/// not trusted: whoever reads a checkpoint verifies its records.
pub trait CheckpointStore {
    /// Those that are there, whole or not, in ascending order; the incoming one is
    /// not among them.
    fn list(&self) -> io::Result<Vec<Index>>;
    /// Hands the records of one over, in the order in which they were written,
    /// until `take` says that it wants no more.
    fn read(&self, slot: Slot, take: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<()>;
    /// Writes one in place of what is there, durable when this returns. After a
    /// failure or a crash it is gone, or may be there in part.
    fn write(&mut self, slot: Slot, records: &mut dyn Iterator<Item = Bytes>) -> io::Result<()>;
    /// Makes the incoming one that of an entry, in place of what is there, durable
    /// when this returns. After a crash it is the one or the other.
    fn adopt(&mut self, at: Index) -> io::Result<()>;
    /// Removes one, if it is there and nobody reads it.
    fn remove(&mut self, slot: Slot) -> io::Result<()>;
}
