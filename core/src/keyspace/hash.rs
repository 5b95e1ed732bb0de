//! A hash over all that can be read at one revision, made little by little.
//!
//! It goes over the versions of keys as a picture does, and for the same reason meets
//! each version that was made by its revision once, whatever is written meanwhile. What
//! can be read is as of when it began: what a compaction drops since, ahead of the walk,
//! is taken when it goes. So the order differs from node to node, and does not count.

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
    /// The lowest revision that could be read when it began; 0 if all could.
    pub compacted: Revision,
}

/// A hash, as far as it is made.
#[derive(Clone, Debug)]
pub(super) struct Hashing {
    walk: Walk,
    sum: Sum,
}

/// Of the versions met so far.
#[derive(Clone, Debug)]
struct Sum {
    revision: Revision,
    compacted: Revision,
    sum: u64,
}

impl Hashing {
    fn new(keyspace: &Keyspace, revision: Option<Revision>) -> Result<Self, RevisionError> {
        let revision = revision.unwrap_or(keyspace.revision);
        keyspace.check_readable(revision)?;
        Ok(Self {
            walk: Walk::default(),
            sum: Sum {
                revision,
                compacted: keyspace.compacted(),
                sum: 0,
            },
        })
    }

    /// A version that has ended goes for good.
    pub(super) fn rescue(&mut self, ended: Revision, record: &Record) {
        if self.walk.is_ahead(ended, record) {
            self.sum.add(ended, record);
        }
    }
}

impl Sum {
    /// Adds a version, if it can be read.
    fn add(&mut self, ended: Revision, record: &Record) {
        if record.mod_revision > self.revision || ended <= self.compacted {
            return;
        }
        let ended = if ended > self.revision { 0 } else { ended };
        self.sum = self.sum.wrapping_add(of_version(ended, record));
    }
}

impl Keyspace {
    /// Begins a hash as of a revision; `None`: the newest. One that was under way is
    /// given up.
    pub(crate) fn begin_hash(&mut self, revision: Option<Revision>) -> Result<(), RevisionError> {
        self.hashing.0 = None;
        self.hashing.0 = Some(Hashing::new(self, revision)?);
        Ok(())
    }

    /// Goes on with the hash over `max` versions, or so many as have `max_bytes` of
    /// values; gives it out when it is whole.
    pub(crate) fn go_on_hashing(&mut self, max: usize, max_bytes: usize) -> Option<Hashed> {
        let Hashing { walk, sum } = self.hashing.0.as_mut()?;
        let mut left = max_bytes;
        let is_whole = walk.go_on(&self.live, &self.past, max, |ended, record| {
            sum.add(ended, record);
            left = left.saturating_sub(record.value.len());
            left > 0
        });
        let Sum {
            revision,
            compacted,
            sum,
        } = *sum;
        is_whole.then(|| {
            self.hashing.0 = None;
            Hashed {
                hash: folded(sum),
                revision,
                compacted,
            }
        })
    }

    /// Gives up the hash that is under way.
    pub(crate) fn give_up_hash(&mut self) {
        self.hashing.0 = None;
    }
}

/// Each field has a fixed width or its length before it, so that no two versions read
/// the same.
fn of_version(ended: Revision, record: &Record) -> u64 {
    let Record {
        key,
        value,
        create_revision,
        mod_revision,
        version,
        lease,
    } = record;
    let mut hash = Xxh3::new();
    for number in [
        key.len() as u64,
        value.len() as u64,
        *create_revision,
        *mod_revision,
        *version,
        lease.map_or(0, |session| session.0.cast_unsigned()),
        ended,
    ] {
        hash.update(&number.to_le_bytes());
    }
    hash.update(key);
    hash.update(value);
    hash.digest()
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
        let mut keyspace = keyspace.clone();
        keyspace.begin_hash(revision).unwrap();
        keyspace.go_on_hashing(usize::MAX, usize::MAX).unwrap()
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
        keyspace.begin_hash(Some(revision)).unwrap();
        let mut round = 0;
        let hashed = loop {
            if let Some(hashed) = keyspace.go_on_hashing(3, usize::MAX) {
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
    fn compactions_meanwhile_neither_change_nor_delay_it() {
        let mut keyspace = Keyspace::new();
        for round in 0..5 {
            for key in 0..200 {
                write(&mut keyspace, &format!("{key:03}"), &format!("{round}"));
            }
        }
        keyspace.compact(100).unwrap();
        let revision = keyspace.revision() - 300;
        let expected = hash(&keyspace, Some(revision));
        assert_eq!(expected.compacted, 100);
        keyspace.begin_hash(Some(revision)).unwrap();
        let mut rounds = 0;
        let hashed = loop {
            if let Some(hashed) = keyspace.go_on_hashing(10, usize::MAX) {
                break hashed;
            }
            rounds += 1;
            write(&mut keyspace, "100", "later");
            let compacted = keyspace.compacted();
            keyspace.compact(compacted + 10).unwrap();
            // Some of it stays for later, and some is dropped before it is met.
            keyspace.sweep(7);
        };
        assert_eq!(hashed, expected);
        assert!(rounds <= 101, "each version is met once: {rounds}");
        assert!(keyspace.compacted() > revision);
    }

    #[test]
    fn what_is_compacted_when_it_begins_is_refused() {
        let mut keyspace = some_history();
        keyspace.compact(12).unwrap();
        assert!(keyspace.begin_hash(Some(11)).is_err());
        assert!(keyspace.begin_hash(Some(keyspace.revision() + 1)).is_err());
        assert_eq!(keyspace.go_on_hashing(9, 9), None, "nothing is under way");
    }

    #[test]
    fn large_values_end_a_step_early() {
        let mut keyspace = Keyspace::new();
        for key in ["a", "b", "c"] {
            write(&mut keyspace, key, &"x".repeat(100));
        }
        keyspace.begin_hash(None).unwrap();
        assert_eq!(keyspace.go_on_hashing(9, 150), None);
        assert_eq!(keyspace.go_on_hashing(9, 150), Some(hash(&keyspace, None)));
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
