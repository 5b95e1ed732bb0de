//! Which live keys are bound to which session.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{Record, merge_by};
use crate::ids::SessionId;

/// So many keys of a session are looked for one by one.
const RECENT_MAX: usize = 16;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Bound {
    /// Those that have any.
    sessions: BTreeMap<SessionId, Keys>,
}

/// The keys of one session. What it has bound last it most often gives up first: a lock
/// taken and released stays out of the set, however many others the session holds.
#[derive(Clone, Debug, Default)]
struct Keys {
    /// Those bound last, the newest last.
    recent: Vec<Bytes>,
    rest: BTreeSet<Bytes>,
}

impl Bound {
    /// The index for these records, which are in order of key.
    pub(super) fn restore<'a>(live: impl Iterator<Item = &'a Record>) -> Self {
        let bound = live.filter_map(|record| Some((record.lease?, record.key.clone())));
        let mut bound: Vec<_> = bound.collect();
        // Keeps the order of keys, and so compares none.
        bound.sort_by_key(|(session, _)| *session);
        let chunks = bound.chunk_by(|(one, _), (other, _)| one == other);
        let keys = |chunk: &[(SessionId, Bytes)]| {
            let keys = chunk.iter().map(|(_, key)| key.clone());
            (chunk[0].0, Keys::restore(keys))
        };
        Self {
            sessions: chunks.map(keys).collect(),
        }
    }

    /// The keys of a session, in order.
    pub(super) fn keys_of(&self, session: SessionId) -> impl Iterator<Item = &Bytes> {
        let keys = self.sessions.get(&session);
        keys.into_iter().flat_map(Keys::in_order)
    }

    /// How many keys a session has.
    pub(super) fn count(&self, session: SessionId) -> usize {
        self.sessions.get(&session).map_or(0, Keys::len)
    }

    /// Binds a key that is bound to no session.
    pub(super) fn insert(&mut self, session: SessionId, key: Bytes) {
        self.sessions.entry(session).or_default().insert(key);
    }

    /// Takes a key from the session that it is bound to.
    pub(super) fn remove(&mut self, session: SessionId, key: &Bytes) {
        let Some(keys) = self.sessions.get_mut(&session) else {
            return;
        };
        keys.remove(key);
        if keys.len() == 0 {
            self.sessions.remove(&session);
        }
    }
}

impl Keys {
    fn restore(keys: impl ExactSizeIterator<Item = Bytes>) -> Self {
        let mut restored = Self::default();
        match keys.len() <= RECENT_MAX {
            true => restored.recent = keys.collect(),
            false => restored.rest = keys.collect(),
        }
        restored
    }

    fn len(&self) -> usize {
        self.recent.len() + self.rest.len()
    }

    fn in_order(&self) -> impl Iterator<Item = &Bytes> {
        let mut recent: Vec<_> = self.recent.iter().collect();
        recent.sort_unstable();
        merge_by(recent.into_iter(), self.rest.iter(), |key| *key, |a, _| a)
    }

    fn insert(&mut self, key: Bytes) {
        if self.recent.len() == RECENT_MAX {
            self.rest.extend(self.recent.drain(..RECENT_MAX / 2));
        }
        self.recent.push(key);
    }

    fn remove(&mut self, key: &Bytes) {
        match self.recent.iter().rposition(|recent| recent == key) {
            Some(at) => {
                self.recent.remove(at);
                if self.recent.len() <= RECENT_MAX / 4 {
                    self.recent.shrink_to(RECENT_MAX / 2);
                }
            }
            None => {
                self.rest.remove(key);
            }
        }
    }
}

impl PartialEq for Keys {
    fn eq(&self, other: &Self) -> bool {
        self.in_order().eq(other.in_order())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SESSION: SessionId = SessionId(7);

    proptest! {
        #[test]
        fn it_has_what_a_set_has(picked in prop::collection::vec(0u8..60, 0..400)) {
            let mut bound = Bound::default();
            let mut set = BTreeSet::new();
            for pick in picked {
                let key = Bytes::from(vec![pick]);
                match set.remove(&key) {
                    true => bound.remove(SESSION, &key),
                    false => {
                        bound.insert(SESSION, key.clone());
                        set.insert(key);
                    }
                }
                prop_assert!(bound.keys_of(SESSION).eq(&set));
                prop_assert_eq!(bound.count(SESSION), set.len());
            }
            let restored = Keys::restore(Vec::from_iter(set.clone()).into_iter());
            prop_assert_eq!(bound.sessions.len(), usize::from(!set.is_empty()));
            prop_assert!(bound.sessions.into_values().all(|keys| keys == restored));
        }
    }
}
