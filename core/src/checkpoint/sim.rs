//! Checkpoints in memory, in a world that can crash.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use super::{CheckpointStore, Slot};
use crate::ids::Index;

/// See the module. Clones are handles on the same store, so that whoever gave one
/// away can crash it. Nothing here is random: what a crash keeps is asked of the
/// caller, always in the same order.
#[derive(Clone, Debug, Default)]
pub struct SimCheckpoints {
    stored: Arc<Mutex<BTreeMap<Slot, Stored>>>,
}

#[derive(Clone, Debug, Default)]
struct Stored {
    records: Vec<Bytes>,
    is_durable: bool,
}

impl SimCheckpoints {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins to write a checkpoint, which takes until [`SimCheckpoints::sync`].
    pub fn begin(&mut self, slot: Slot, records: impl Iterator<Item = Bytes>) {
        let stored = Stored {
            records: records.collect(),
            is_durable: false,
        };
        self.stored().insert(slot, stored);
    }

    /// Goes on with one that was begun.
    pub fn append(&mut self, slot: Slot, records: impl Iterator<Item = Bytes>) {
        if let Some(stored) = self.stored().get_mut(&slot) {
            stored.records.extend(records);
        }
    }

    /// Makes durable what was begun.
    pub fn sync(&mut self, slot: Slot) {
        if let Some(stored) = self.stored().get_mut(&slot) {
            stored.is_durable = true;
        }
    }

    /// Loses power: of a checkpoint that was not durable, any records are lost, or
    /// everything. What is left is durable.
    pub fn crash(&mut self, keep: &mut dyn FnMut() -> bool) {
        self.stored().retain(|_, stored| {
            if stored.is_durable {
                return true;
            }
            stored.is_durable = true;
            stored.records.retain(|_| keep());
            keep()
        });
    }

    /// Changes a durable checkpoint behind everyone's back.
    ///
    /// # Panics
    ///
    /// If it is not there.
    pub fn damage(&mut self, slot: Slot, change: impl FnOnce(&mut Vec<Bytes>)) {
        let mut stored = self.stored();
        change(
            &mut stored
                .get_mut(&slot)
                .expect("the one to damage is there")
                .records,
        );
    }

    fn stored(&self) -> MutexGuard<'_, BTreeMap<Slot, Stored>> {
        // Nothing panics while it holds the lock but `damage`, for a test to fail.
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CheckpointStore for SimCheckpoints {
    fn list(&self) -> io::Result<Vec<Index>> {
        let stored = self.stored();
        let slots = stored.keys();
        let named = slots.filter_map(|slot| match slot {
            Slot::At(at) => Some(*at),
            Slot::Incoming => None,
        });
        Ok(named.collect())
    }

    fn read(&self, slot: Slot, take: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<()> {
        let stored = self.stored().get(&slot).cloned();
        for record in stored.ok_or(io::ErrorKind::NotFound)?.records {
            if !take(&record) {
                break;
            }
        }
        Ok(())
    }

    fn write(&mut self, slot: Slot, records: &mut dyn Iterator<Item = Bytes>) -> io::Result<()> {
        self.begin(slot, records);
        self.sync(slot);
        Ok(())
    }

    fn adopt(&mut self, at: Index) -> io::Result<()> {
        let mut stored = self.stored();
        let incoming = stored.remove(&Slot::Incoming);
        stored.insert(Slot::At(at), incoming.ok_or(io::ErrorKind::NotFound)?);
        Ok(())
    }

    fn remove(&mut self, slot: Slot) -> io::Result<()> {
        self.stored().remove(&slot);
        Ok(())
    }
}
