//! The MVCC keyspace, with etcd's data model.

use bytes::Bytes;

use crate::ids::{Revision, SessionId};

/// One version of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
    /// The revision that made the key; stays until it is deleted.
    pub create_revision: Revision,
    /// The revision that made this version.
    pub mod_revision: Revision,
    /// 1 for the version that made the key, then one more each time.
    pub version: u64,
    /// The session it is bound to, if any: it is deleted when that ends.
    pub lease: Option<SessionId>,
}

/// One change, as it was kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which key.
    pub key: Bytes,
    /// The main revision of the command.
    pub revision: Revision,
    /// The place among the changes of that revision, from 0.
    pub sub: u32,
    /// The version before, if there was one.
    pub before: Option<Record>,
    /// The version after; `None` if it was deleted.
    pub after: Option<Record>,
}

/// A set of keys, in etcd's terms: see [`KeyRange::new`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    start: Bytes,
    end: Option<Bytes>,
}

impl KeyRange {
    /// The range `[key, end)` as on the wire: an empty `end` means the one key,
    /// a single zero byte means all keys from `key` on.
    pub fn new(key: Bytes, end: Bytes) -> Self {
        todo!()
    }

    /// All keys that start with `prefix`.
    pub fn prefix(prefix: &[u8]) -> Self {
        todo!()
    }
}

/// The keyspace.
#[derive(Clone, Debug, PartialEq)]
pub struct Keyspace {}

impl Keyspace {
    /// An empty keyspace, at revision 1.
    pub fn new() -> Self {
        todo!()
    }
    /// The newest revision.
    pub fn revision(&self) -> Revision {
        todo!()
    }
    /// How many keys live.
    pub fn len(&self) -> usize {
        todo!()
    }
    /// A key's newest version.
    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        todo!()
    }
    /// The keys of a range in order, as they were at `revision` (`None`: now).
    pub fn range(&self, range: &KeyRange, revision: Option<Revision>) -> impl Iterator<Item = &Record> {
        std::iter::empty()
    }
    /// The keys bound to a session, in order.
    pub fn keys_of(&self, session: SessionId) -> impl Iterator<Item = &Bytes> {
        std::iter::empty()
    }
    /// Begins a command.
    pub fn overlay(&self) -> Overlay<'_> {
        todo!()
    }
    /// Keeps the writes of an overlay: one main revision, or none if there are no writes.
    pub fn keep(&mut self, writes: Writes) -> Vec<Change> {
        todo!()
    }
    /// A hash of the whole history of changes, equal on nodes that applied the same.
    pub fn digest(&self) -> u64 {
        todo!()
    }
}

/// A keyspace with the writes of one command on top, to be kept or dropped.
#[derive(Debug)]
pub struct Overlay<'a> {
    base: &'a Keyspace,
}

/// What an overlay wrote.
#[derive(Debug)]
pub struct Writes {}

impl<'a> Overlay<'a> {
    /// The revision that this command's writes get.
    pub fn revision(&self) -> Revision {
        todo!()
    }
    /// A key with this command's writes.
    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        todo!()
    }
    /// The live keys of a range with this command's writes, in order.
    pub fn range(&self, range: &KeyRange) -> Vec<&Record> {
        todo!()
    }
    /// Writes a key.
    pub fn put(&mut self, key: Bytes, value: Bytes, lease: Option<SessionId>) {
        todo!()
    }
    /// Deletes a key; whether it was there.
    pub fn delete(&mut self, key: &[u8]) -> bool {
        todo!()
    }
    /// Deletes a range; how many were there.
    pub fn delete_range(&mut self, range: &KeyRange) -> usize {
        todo!()
    }
    /// Ends the borrow, for [`Keyspace::keep`].
    pub fn into_writes(self) -> Writes {
        todo!()
    }
}
