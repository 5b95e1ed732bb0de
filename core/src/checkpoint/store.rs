//! The seam to where checkpoints are kept.
//!
//! Two implementations: [`FjallCheckpoints`](super::FjallCheckpoints) is the real
//! one; [`SimCheckpoints`](super::SimCheckpoints) keeps them in memory and can
//! crash while one is written.

use std::io;

use bytes::Bytes;

use crate::ids::Index;

/// Checkpoints by the newest entry that each holds. What a store gives back is
/// not trusted: whoever reads a checkpoint verifies its records.
pub trait CheckpointStore {
    /// Those that are there, whole or not, in ascending order.
    fn list(&self) -> io::Result<Vec<Index>>;
    /// Hands the records of one over, in the order in which they were written,
    /// until `take` says that it wants no more.
    fn read(&self, at: Index, take: &mut dyn FnMut(Bytes) -> bool) -> io::Result<()>;
    /// Writes one in place of what is there, durable when this returns. After a
    /// failure or a crash it is gone, or may be there in part.
    fn write(&mut self, at: Index, records: &mut dyn Iterator<Item = Bytes>) -> io::Result<()>;
    /// Removes one, if it is there.
    fn remove(&mut self, at: Index) -> io::Result<()>;
}
