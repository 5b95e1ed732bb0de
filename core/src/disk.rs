//! The seam to the file system: one flat directory of files.
//!
//! Two implementations: [`FileDisk`] is the real one; [`SimDisk`] keeps what was
//! written apart from what was synced, so that a simulated crash can lose any
//! part of the difference.

mod file;
mod sim;

use std::io;

pub use file::FileDisk;
pub use sim::SimDisk;

/// A directory of files.
///
/// Nothing is durable before a `sync` that returned `Ok`: a write is durable
/// after [`Disk::sync`] of its file, and that the file exists at all only after
/// [`Disk::sync_directory`]. After a failed sync the caller must not go on: what
/// was written since the last good one may be lost although a later sync
/// succeeds (Rebello et al., "Can Applications Recover from fsync Failures?",
/// USENIX ATC 2020).
pub trait Disk {
    /// The names of all files, in order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// The whole content of a file.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Writes at an offset; makes the file, or makes it longer, as needed.
    fn write(&mut self, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes the content and length of a file durable.
    fn sync(&mut self, name: &str) -> io::Result<()>;
    /// Makes the set of file names durable.
    fn sync_directory(&mut self) -> io::Result<()>;
    /// Removes a file.
    fn remove(&mut self, name: &str) -> io::Result<()>;
}
