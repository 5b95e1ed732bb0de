//! A replicated keyspace with sessions. Knows no primitive, no gRPC, no async.
//!
//! In reading order:
//! - [`ids`], [`limits`]: the words and the bounds;
//! - [`replica`]: one member as a step function with effects, over
//!   `consensus` (raft-rs), `clock` (elapsed time) and `liveness` (who renewed);
//! - [`state`]: the replicated state and how an entry changes it: [`keyspace`]
//!   (keys with history), [`session`] (who is alive) with its [`requests`] (what
//!   ran), [`system`] (the rest), and [`machine`] (the seam to what commands mean);
//! - [`log`] over [`disk`], and [`checkpoint`]: what is durable;
//! - [`node`]: all of this with a clock and an inbox, for a thread to run.
//!
//! Invariants: time, randomness and messages come in as parameters, and the
//! only clock is read by [`node`]; the same entries give the same state on every
//! node; nothing is answered before it is durable on a majority; after a failed
//! sync nothing is answered at all.

pub mod checkpoint;
mod clock;
mod consensus;
pub mod disk;
pub mod ids;
pub mod keyspace;
pub mod limits;
mod liveness;
pub mod log;
pub mod machine;
pub mod node;
mod picture;
pub mod plant;
pub mod replica;
pub mod requests;
pub mod session;
pub mod state;
pub mod system;
pub mod watch;

/// The highest apply version that this binary supports: which meaning commands
/// have. Procedures branch on the version that the log has settled on.
pub const APPLY_VERSION: u32 = 1;
