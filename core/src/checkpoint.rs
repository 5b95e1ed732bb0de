//! Checkpoints: the whole replicated state on disk, so that the log need not
//! reach back to the beginning.
//!
//! A checkpoint is an [`Image`] of the state after one entry, written as a row of
//! records that ends with a manifest: how many records there are, and a hash over
//! all of them. Only a row that agrees with its manifest is a checkpoint, so one
//! whose writing was interrupted, or that was damaged since, is never taken for
//! the state.
//!
//! The two newest are kept, and the log behind the older one. [`Schedule`] says
//! when the next is due; the [`Writer`] writes it, on a thread of its own, to a
//! [`CheckpointStore`]; a start goes on from the newest that verifies
//! ([`restore`]).
//!
//! A member that is too far behind, or whose checkpoints are damaged, gets the
//! records of another's. The same thread writes them to a slot of their own
//! ([`Slot::Incoming`]), verifies and syncs them; the log then begins anew behind
//! them if it has to; and only then the slot takes the name of a checkpoint.

mod fjall;
mod records;
mod schedule;
mod sim;
mod start;
mod store;
mod writer;

use crate::{
    ids::{Index, Revision, Term},
    keyspace::{Picture, Record},
    session::Sessions,
    system::System,
};

pub use self::fjall::FjallCheckpoints;
pub use records::{Invalid, Reader, records};
pub use schedule::Schedule;
pub use sim::SimCheckpoints;
pub use start::{ReadError, RestoreError, choose, read, restore, verify};
pub use store::{CheckpointStore, Slot};
pub use writer::{Done, Sink, WriteError, Writer, adopt, keep_two};

/// Everything that is replicated, after one entry. See
/// [`State::begin_image`](crate::state::State::begin_image).
#[derive(Debug)]
pub struct Image {
    pub(crate) cluster: u64,
    pub(crate) applied: Index,
    pub(crate) term: Term,
    pub(crate) digest: u64,
    pub(crate) keyspace: Picture,
    pub(crate) sessions: Sessions,
    pub(crate) system: System,
}

/// What of an [`Image`] is drawn at a time, so that no more than that is in memory while
/// it is written. See [`State::draw_part`](crate::state::State::draw_part).
#[derive(Debug)]
pub enum Part {
    /// Some of its versions of keys.
    Versions(Versions),
    /// All the rest, and the last part.
    Rest(Box<Image>),
}

impl Part {
    /// The last part: all there is if everything was drawn at once.
    pub fn rest(self) -> Option<Image> {
        match self {
            Self::Rest(image) => Some(*image),
            Self::Versions(_) => None,
        }
    }
}

/// Versions of keys.
#[derive(Debug, Default)]
pub struct Versions {
    pub(crate) live: Vec<Record>,
    /// Each with the revision that ended it.
    pub(crate) past: Vec<(Revision, Record)>,
}

impl Image {
    /// The newest entry that it holds.
    pub fn applied(&self) -> Index {
        self.applied
    }

    /// The term of that entry.
    pub fn term(&self) -> Term {
        self.term
    }

    /// The cluster that it belongs to.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The hash over the history up to that entry, equal on all members.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// How many versions of keys it holds, superseded ones included.
    pub fn versions(&self) -> usize {
        self.keyspace.live.len() + self.keyspace.past.len()
    }

    /// How many sessions it holds.
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }
}
