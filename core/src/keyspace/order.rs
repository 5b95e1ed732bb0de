//! Records in the order in which the keyspace keeps them. The key is in the record
//! and nowhere else: of a million keys, it is what takes the memory.

use std::{borrow::Borrow, cmp::Ordering};

use bytes::Bytes;

use super::Record;
use crate::ids::Revision;

/// The newest version of a key, in order of key.
#[derive(Clone, Debug)]
pub(super) struct Live(pub(super) Record);

/// A version that is no more, in order of key and of the revision that ended it.
#[derive(Clone, Debug)]
pub(super) struct Past {
    pub(super) ended: Revision,
    pub(super) record: Record,
}

impl Past {
    /// Where the version of a key is that ended so.
    pub(super) fn place(key: Bytes, ended: Revision) -> Self {
        let record = Record {
            key,
            value: Bytes::new(),
            create_revision: 0,
            mod_revision: 0,
            version: 0,
            lease: None,
        };
        Self { ended, record }
    }

    fn order(&self) -> (&Bytes, Revision) {
        (&self.record.key, self.ended)
    }
}

impl Borrow<[u8]> for Live {
    fn borrow(&self) -> &[u8] {
        &self.0.key
    }
}

impl Ord for Live {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.key.cmp(&other.0.key)
    }
}

impl Ord for Past {
    fn cmp(&self, other: &Self) -> Ordering {
        self.order().cmp(&other.order())
    }
}

impl PartialOrd for Live {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialOrd for Past {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

// Equal is what has the same place, as for every order.
impl PartialEq for Live {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl PartialEq for Past {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Live {}

impl Eq for Past {}
