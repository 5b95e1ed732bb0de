//! Which live keys are bound to which session.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound as End,
};

use bytes::Bytes;

use super::Record;
use crate::ids::SessionId;

/// See the module. One set for all sessions: most have a key or two, and a set each
/// would take several times the memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Bound {
    keys: BTreeSet<(SessionId, Bytes)>,
    /// How many each session has that has any.
    counts: BTreeMap<SessionId, usize>,
}

impl Bound {
    /// The index for these records, which are in order of key.
    pub(super) fn restore<'a>(live: impl Iterator<Item = &'a Record>) -> Self {
        let bound = live.filter_map(|record| Some((record.lease?, record.key.clone())));
        let mut bound: Vec<_> = bound.collect();
        // Keeps the order of keys, and so compares none.
        bound.sort_by_key(|(session, _)| *session);
        let chunks = bound.chunk_by(|(one, _), (other, _)| one == other);
        Self {
            counts: chunks.map(|keys| (keys[0].0, keys.len())).collect(),
            keys: bound.into_iter().collect(),
        }
    }

    /// The keys of a session, in order.
    pub(super) fn keys_of(&self, session: SessionId) -> impl Iterator<Item = &Bytes> {
        let from = End::Included((session, Bytes::new()));
        let behind = self.keys.range((from, End::Unbounded));
        behind
            .take_while(move |(owner, _)| *owner == session)
            .map(|(_, key)| key)
    }

    /// How many keys a session has.
    pub(super) fn count(&self, session: SessionId) -> usize {
        self.counts.get(&session).copied().unwrap_or(0)
    }

    pub(super) fn insert(&mut self, session: SessionId, key: Bytes) {
        if self.keys.insert((session, key)) {
            *self.counts.entry(session).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, session: SessionId, key: Bytes) {
        if self.keys.remove(&(session, key))
            && let Some(count) = self.counts.get_mut(&session)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&session);
            }
        }
    }
}
