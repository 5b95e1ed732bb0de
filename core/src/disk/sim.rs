//! A disk in memory that can crash.

/// A disk in memory that can crash.
#[derive(Debug)]
pub struct SimDisk {}
