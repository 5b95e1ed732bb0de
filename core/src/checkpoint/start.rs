//! What a start makes of the checkpoints it finds.

use std::io;

use super::{CheckpointStore, Image, Invalid, Reader, Slot, records::Verifier};
use crate::{
    ids::{Index, Term},
    log::Recovered,
    machine::Machine,
    state::State,
};

/// The state from which a log goes on: that of the newest checkpoint that
/// verifies, or of the one before, or the empty one if the log is whole. `None` if
/// there is no such state: then a member still has its term, its vote and its log,
/// and gets a checkpoint from the leader. A sole member has nobody to ask.
///
/// Nothing on disk is changed, but that a switch to another member's checkpoint
/// which the log has recorded is completed.
pub fn restore<M: Machine>(
    store: &mut impl CheckpointStore,
    recovered: &Recovered,
) -> Result<Option<State<M>>, RestoreError> {
    let list = store.list().map_err(RestoreError::Store)?;
    let mut newest_first = list.into_iter().rev().map(|at| (at, read(store, at)));
    let chosen = match choose(&mut newest_first, recovered) {
        Ok(chosen) => chosen,
        Err(RestoreError::NoCheckpoint { .. } | RestoreError::Gap { .. })
            if let Some(image) = incoming(store, recovered) =>
        {
            super::adopt(store, image.applied).map_err(RestoreError::Store)?;
            Some(image)
        }
        Err(RestoreError::NoCheckpoint { .. } | RestoreError::Gap { .. })
            if recovered.facts.voters.len() > 1 =>
        {
            tracing::warn!("no checkpoint is whole; one will be asked for from the leader");
            return Ok(None);
        }
        Err(refusal) => return Err(refusal),
    };
    let new = || State::new(recovered.identity.cluster);
    Ok(Some(chosen.map_or_else(new, State::restore)))
}

/// The checkpoint of another member, if the log goes on from it.
fn incoming(store: &impl CheckpointStore, recovered: &Recovered) -> Option<Image> {
    let image = read(store, Slot::Incoming).ok()?;
    check(&image, recovered).is_ok().then_some(image)
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
pub fn read(store: &impl CheckpointStore, slot: impl Into<Slot>) -> Result<Image, ReadError> {
    let slot = slot.into();
    let mut reader = Reader::default();
    each(store, slot, |record| reader.take(record))?;
    let image = reader.finish()?;
    match slot {
        Slot::At(at) if image.applied != at => Err(Invalid::Mismatch.into()),
        _ => Ok(image),
    }
}

/// Verifies a checkpoint that was just written, as [`read`] would, but for what a
/// record means: nothing of it is kept in memory.
pub fn verify(store: &impl CheckpointStore, at: Index) -> Result<(), ReadError> {
    let mut verifier = Verifier::default();
    each(store, at.into(), |record| verifier.take(record))?;
    match verifier.finish()?.applied == at {
        true => Ok(()),
        false => Err(Invalid::Mismatch.into()),
    }
}

fn each(
    store: &impl CheckpointStore,
    slot: Slot,
    mut take: impl FnMut(&[u8]) -> Result<(), Invalid>,
) -> Result<(), ReadError> {
    let mut taken = Ok(());
    store.read(slot, &mut |record| {
        taken = take(record);
        taken.is_ok()
    })?;
    Ok(taken?)
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
    if index == recovered.base.0 {
        return Some(recovered.base.1);
    }
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
