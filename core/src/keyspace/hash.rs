//! A hash over all that can be read at one revision, made little by little.
//!
//! It goes over the versions of keys as a picture does, and for the same reason meets
//! each version that was made by its revision once, whatever is written meanwhile. A
//! compaction changes what can be read: then it begins anew.

use xxhash_rust::xxh3::Xxh3;

use super::{Keyspace, Record, RevisionError, picture::Walk};
use crate::ids::Revision;

/// See the module. Equal on all nodes that applied the same, at the same revision and
/// after the same compaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashed {
    /// Of every version that can be read at `revision`, or at an earlier one.
    pub hash: u32,
    /// As of when.
    pub revision: Revision,
    /// The lowest revision that can be read; 0 if all can.
    pub compacted: Revision,
}

/// A hash, as far as it is made.
pub(crate) struct Hashing {
    revision: Revision,
    compacted: Revision,
    walk: Walk,
    sum: Xxh3,
}

impl std::fmt::Debug for Hashing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hashing")
            .field("revision", &self.revision)
            .field("walk", &self.walk)
            .finish_non_exhaustive()
    }
}

impl Hashing {
    /// Begins one as of a revision; `None`: the newest.
    pub(crate) fn new(
        keyspace: &Keyspace,
        revision: Option<Revision>,
    ) -> Result<Self, RevisionError> {
        let revision = revision.unwrap_or_else(|| keyspace.revision());
        keyspace.check_readable(revision)?;
        Ok(Self {
            revision,
            compacted: keyspace.compacted(),
            walk: Walk::default(),
            sum: Xxh3::new(),
        })
    }

    /// Goes on over `max` versions, or so many as have `max_bytes` of values; gives the
    /// hash out when it is whole.
    pub(crate) fn go_on(
        &mut self,
        keyspace: &Keyspace,
        max: usize,
        max_bytes: usize,
    ) -> Result<Option<Hashed>, RevisionError> {
        if self.compacted != keyspace.compacted() {
            *self = Self::new(keyspace, Some(self.revision))?;
        }
        let (live, past) = (&keyspace.live, &keyspace.past);
        let (revision, compacted) = (self.revision, self.compacted);
        let sum = &mut self.sum;
        let mut left = max_bytes;
        let is_whole = self.walk.go_on(live, past, max, |ended, record| {
            if record.mod_revision <= revision && ended > compacted {
                add(sum, if ended > revision { 0 } else { ended }, record);
            }
            left = left.saturating_sub(record.value.len());
            left > 0
        });
        Ok(is_whole.then(|| Hashed {
            hash: folded(self.sum.digest()),
            revision,
            compacted,
        }))
    }
}

/// Each field has a fixed width or its length before it, so that no two versions read
/// the same.
fn add(sum: &mut Xxh3, ended: Revision, record: &Record) {
    let Record {
        key,
        value,
        create_revision,
        mod_revision,
        version,
        lease,
    } = record;
    for number in [
        key.len() as u64,
        value.len() as u64,
        *create_revision,
        *mod_revision,
        *version,
        lease.map_or(0, |session| session.0.cast_unsigned()),
        ended,
    ] {
        sum.update(&number.to_le_bytes());
    }
    sum.update(key);
    sum.update(value);
}

/// As wide as the API has it.
fn folded(hash: u64) -> u32 {
    let [a, b, c, d, e, f, g, h] = hash.to_le_bytes();
    u32::from_le_bytes([a ^ e, b ^ f, c ^ g, d ^ h])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(keyspace: &mut Keyspace, key: &str, value: &str) {
        let mut overlay = keyspace.overlay();
        overlay.put(key.to_owned().into(), value.to_owned().into(), None);
        let writes = overlay.into_writes();
        keyspace.keep(writes);
    }

    fn delete(keyspace: &mut Keyspace, key: &str) {
        let mut overlay = keyspace.overlay();
        overlay.delete(key.as_bytes());
        let writes = overlay.into_writes();
        keyspace.keep(writes);
    }

    fn hash(keyspace: &Keyspace, revision: Option<Revision>) -> Hashed {
        let mut hashing = Hashing::new(keyspace, revision).unwrap();
        hashing
            .go_on(keyspace, usize::MAX, usize::MAX)
            .unwrap()
            .unwrap()
    }

    fn some_history() -> Keyspace {
        let mut keyspace = Keyspace::new();
        for round in 0..6 {
            for key in ["a", "b", "c", "d"] {
                write(&mut keyspace, key, &format!("{key}{round}"));
            }
            delete(&mut keyspace, "b");
        }
        keyspace
    }

    #[test]
    fn what_is_written_meanwhile_changes_no_hash_of_an_earlier_revision() {
        let mut keyspace = some_history();
        let revision = keyspace.revision();
        let expected = hash(&keyspace, None);
        let mut hashing = Hashing::new(&keyspace, Some(revision)).unwrap();
        let mut round = 0;
        let hashed = loop {
            if let Some(hashed) = hashing.go_on(&keyspace, 3, usize::MAX).unwrap() {
                break hashed;
            }
            round += 1;
            write(&mut keyspace, "a", &format!("later{round}"));
            write(&mut keyspace, "bb", "new");
            delete(&mut keyspace, "c");
        };
        assert!(round > 3);
        assert_eq!(hashed, expected);
        assert_eq!(hash(&keyspace, Some(revision)), expected);
        assert_ne!(hash(&keyspace, None).hash, expected.hash);
    }

    #[test]
    fn a_compaction_counts_at_once_and_not_when_versions_are_dropped() {
        let mut keyspace = some_history();
        let before = hash(&keyspace, None);
        keyspace.compact(12).unwrap();
        let compacted = hash(&keyspace, None);
        assert_ne!(compacted.hash, before.hash);
        assert_eq!(compacted.compacted, 12);
        keyspace.sweep(2);
        assert_eq!(hash(&keyspace, None), compacted);
        keyspace.sweep(usize::MAX);
        assert_eq!(hash(&keyspace, None), compacted);
    }

    #[test]
    fn a_hash_that_a_compaction_meets_begins_anew_or_is_refused() {
        let mut keyspace = some_history();
        let revision = keyspace.revision();
        let mut newest = Hashing::new(&keyspace, Some(revision)).unwrap();
        let mut old = Hashing::new(&keyspace, Some(5)).unwrap();
        assert_eq!(newest.go_on(&keyspace, 4, usize::MAX).unwrap(), None);
        assert_eq!(old.go_on(&keyspace, 4, usize::MAX).unwrap(), None);
        keyspace.compact(12).unwrap();
        keyspace.sweep(usize::MAX);
        let hashed = newest.go_on(&keyspace, usize::MAX, usize::MAX).unwrap();
        assert_eq!(hashed, Some(hash(&keyspace, None)));
        assert!(old.go_on(&keyspace, 4, usize::MAX).is_err());
    }

    #[test]
    fn large_values_end_a_step_early() {
        let mut keyspace = Keyspace::new();
        for key in ["a", "b", "c"] {
            write(&mut keyspace, key, &"x".repeat(100));
        }
        let mut hashing = Hashing::new(&keyspace, None).unwrap();
        assert_eq!(hashing.go_on(&keyspace, 9, 150).unwrap(), None);
        assert_eq!(
            hashing.go_on(&keyspace, 9, 150).unwrap(),
            Some(hash(&keyspace, None))
        );
    }

    #[test]
    fn every_part_of_a_version_counts() {
        let mut one = Keyspace::new();
        write(&mut one, "a", "bc");
        let mut other = Keyspace::new();
        write(&mut other, "ab", "c");
        assert_ne!(hash(&one, None).hash, hash(&other, None).hash);
        let mut bound = Keyspace::new();
        let mut overlay = bound.overlay();
        overlay.put("a".into(), "bc".into(), Some(crate::ids::SessionId(1)));
        let writes = overlay.into_writes();
        bound.keep(writes);
        assert_ne!(hash(&one, None).hash, hash(&bound, None).hash);
    }
}
