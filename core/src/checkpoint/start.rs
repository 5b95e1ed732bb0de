//! What a start makes of the checkpoints it finds.

use std::io;

use super::{CheckpointStore, Image, Invalid, Reader};
use crate::{
    ids::{Index, Term},
    log::Recovered,
    machine::Machine,
    state::State,
};

/// The state from which a log goes on: that of the newest checkpoint that
/// verifies, or of the one before, or the empty one if the log is whole.
///
/// Nothing on disk is changed.
pub fn restore<M: Machine>(
    store: &impl CheckpointStore,
    recovered: &Recovered,
) -> Result<State<M>, RestoreError> {
    let list = store.list().map_err(RestoreError::Store)?;
    let mut newest_first = list.into_iter().rev().map(|at| (at, read(store, at)));
    Ok(match choose(&mut newest_first, recovered)? {
        Some(image) => State::restore(image),
        None => State::new(recovered.identity.cluster),
    })
}

/// The checkpoint from which a start goes on, of those that were read, newest
/// first; `None` if it goes on from a whole log alone. Asks for no more of them
/// than it needs.
pub fn choose(
    newest_first: &mut impl Iterator<Item = (Index, Result<Image, ReadError>)>,
    recovered: &Recovered,
) -> Result<Option<Image>, RestoreError> {
    for (at, read) in newest_first {
        match read {
            Ok(image) => {
                check(&image, recovered)?;
                return Ok(Some(image));
            }
            // Also one whose writing was interrupted.
            Err(reason) => tracing::warn!(checkpoint = at, %reason, "passed over a checkpoint"),
        }
    }
    match recovered.first {
        1 => Ok(None),
        first => Err(RestoreError::NoCheckpoint { first }),
    }
}

/// Reads a checkpoint, and verifies it.
pub fn read(store: &impl CheckpointStore, at: Index) -> Result<Image, ReadError> {
    let mut reader = Reader::default();
    let mut taken = Ok(());
    store.read(at, &mut |record| {
        taken = reader.take(record);
        taken.is_ok()
    })?;
    taken?;
    let image = reader.finish()?;
    if image.applied == at {
        Ok(image)
    } else {
        Err(Invalid::Mismatch.into())
    }
}

/// Whether the log goes on where a checkpoint ends.
fn check(image: &Image, recovered: &Recovered) -> Result<(), RestoreError> {
    let Image {
        cluster,
        applied,
        term,
        ..
    } = *image;
    if cluster != recovered.identity.cluster {
        return Err(RestoreError::OtherCluster { found: cluster });
    }
    let next = recovered.first + recovered.entries.len() as u64;
    if applied >= next {
        return Err(RestoreError::LogTooShort { applied, next });
    }
    let first = recovered.first;
    match term_at(recovered, applied) {
        _ if applied + 1 < first => Err(RestoreError::Gap { applied, first }),
        Some(found) if found != term => Err(RestoreError::OtherHistory { applied }),
        _ => Ok(()),
    }
}

fn term_at(recovered: &Recovered, index: Index) -> Option<Term> {
    let place = usize::try_from(index.checked_sub(recovered.first)?).ok()?;
    recovered.entries.get(place).map(|entry| entry.term)
}

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is not whole.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// What to do is the same for all that follow.
const REMEDY: &str = "nothing was changed: restore this directory as it was";

/// Why a member cannot start from its checkpoints and its log.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The checkpoints cannot be listed.
    #[error("listing the checkpoints failed")]
    Store(#[source] io::Error),
    /// The log was cut, and what it was cut for is gone.
    #[error(
        "the log begins with entry {first}, and no checkpoint that is whole holds what was \
         before; {REMEDY}"
    )]
    NoCheckpoint {
        /// The first entry of the log.
        first: Index,
    },
    /// The only checkpoint that is whole is older than the log.
    #[error("the checkpoint ends with entry {applied}, and the log begins with {first}; {REMEDY}")]
    Gap {
        /// The newest entry of the checkpoint.
        applied: Index,
        /// The first entry of the log.
        first: Index,
    },
    /// The log has lost entries that were durable.
    #[error("the checkpoint holds entry {applied}, and the log ends before entry {next}; {REMEDY}")]
    LogTooShort {
        /// The newest entry of the checkpoint.
        applied: Index,
        /// The entry behind the newest of the log.
        next: Index,
    },
    /// The checkpoint is of other entries than the log.
    #[error("the checkpoint and the log differ in entry {applied}; {REMEDY}")]
    OtherHistory {
        /// The newest entry of the checkpoint.
        applied: Index,
    },
    /// The checkpoint belongs to another cluster.
    #[error("the checkpoint belongs to another cluster ({found:x}); {REMEDY}")]
    OtherCluster {
        /// The cluster it belongs to.
        found: u64,
    },
}
