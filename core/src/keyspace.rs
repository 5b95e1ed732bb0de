//! The MVCC keyspace, with etcd's data model.
//!
//! A command writes to an [`Overlay`], which is kept or dropped as a whole. A
//! command that is kept takes one main revision, and its writes are numbered
//! inside it in their order. Every earlier revision stays readable.
//!
//! Two sets hold the keys: `live` has the newest version of each key that is
//! there, so that reads of the present never meet what was deleted; `past` has
//! every version that was replaced or deleted, each under the revision that
//! ended it. The version of a key that was there at revision r is thus the one
//! with the lowest end above r, if it was made by then. A compaction at r drops
//! from `past` what ended by r, and nothing else: r and all after it stay
//! readable. Keys and values are reference-counted: an index on top costs a
//! handle, not a copy.

mod bound;
mod changes;
mod chunks;
mod events;
mod hash;
mod history;
mod order;
mod overlay;
mod picture;
mod range;
pub(crate) mod reach;
mod select;
pub mod txn;

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;

use self::{
    bound::Bound,
    changes::{Changes, Entry, Kind},
    history::History,
    order::{Live, Past},
    picture::Drawing,
};
use crate::{
    checkpoint::Versions,
    ids::{Revision, SessionId},
    limits,
    picture::UnderWay,
};

pub use events::{Event, Excerpt, Interest};
pub use hash::Hashed;
use hash::Hashing;
pub use overlay::{Overlay, Writes};
pub(crate) use picture::Picture;
pub use range::KeyRange;
pub use select::{Filter, Found, Piece, Selection};

/// The revision of a keyspace that nothing was ever written to.
pub const REVISION_FRESH: Revision = 1;

/// Keys under it are the service's own: clients read them, and cannot write them.
pub const RESERVED_PREFIX: &[u8] = b"_conclave/";

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

impl Record {
    /// What it counts for in the size of the state: its key and value, and what
    /// the maps around them take.
    pub fn bytes(&self) -> u64 {
        (self.key.len() + self.value.len()) as u64 + limits::RECORD_OVERHEAD_BYTES
    }
}

/// Why a keyspace cannot be read, or compacted, at a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevisionError {
    /// What there was is dropped.
    #[error("revision {asked} is compacted; the lowest that is left is {compacted}")]
    Compacted {
        /// The revision asked for.
        asked: Revision,
        /// That of the newest compaction.
        compacted: Revision,
    },
    /// It is yet to come.
    #[error("revision {asked} is beyond the newest, {newest}")]
    Future {
        /// The revision asked for.
        asked: Revision,
        /// The newest.
        newest: Revision,
    },
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

/// The keyspace. See the module.
#[derive(Clone)]
pub struct Keyspace {
    revision: Revision,
    /// The newest version of every key that is there.
    live: BTreeSet<Live>,
    live_bytes: u64,
    /// Versions that are no more. A version made and ended inside one revision is
    /// never seen by a read, and not here.
    past: History,
    /// Both, by revision.
    changes: Changes,
    bound: Bound,
    digest: u64,
    drawing: UnderWay<Drawing>,
    hashing: UnderWay<Hashing>,
}

impl Keyspace {
    /// An empty keyspace, at revision 1.
    pub fn new() -> Self {
        Self {
            revision: REVISION_FRESH,
            live: BTreeSet::new(),
            live_bytes: 0,
            past: History::default(),
            changes: Changes::default(),
            bound: Bound::default(),
            digest: 0,
            drawing: UnderWay::default(),
            hashing: UnderWay::default(),
        }
    }

    /// The newest revision.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// How many keys live.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether no key lives.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// A key's newest version, if it lives.
    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        self.live.get(key).map(|Live(record)| record)
    }

    /// The revision of the newest compaction: the lowest that can be read. 0
    /// before the first.
    pub fn compacted(&self) -> Revision {
        self.past.compacted()
    }

    /// The size of everything, by [`Record::bytes`].
    pub fn bytes(&self) -> u64 {
        self.live_bytes + self.history_bytes()
    }

    /// The size of the versions that are no more, by [`Record::bytes`].
    pub fn history_bytes(&self) -> u64 {
        self.past.bytes()
    }

    /// Whether the keyspace can be read as it was at `revision`.
    pub fn check_readable(&self, revision: Revision) -> Result<(), RevisionError> {
        let compacted = self.compacted();
        if revision < compacted {
            return Err(RevisionError::Compacted {
                asked: revision,
                compacted,
            });
        }
        self.check_reached(revision)
    }

    /// Gives up everything that only reads below `revision` would need. Those
    /// are refused from now on; what they would have seen is dropped by
    /// [`Self::sweep`].
    pub fn compact(&mut self, revision: Revision) -> Result<(), RevisionError> {
        let compacted = self.compacted();
        if revision <= compacted {
            return Err(RevisionError::Compacted {
                asked: revision,
                compacted,
            });
        }
        self.check_reached(revision)?;
        self.past.compact(revision);
        self.changes.compact(revision);
        Ok(())
    }

    /// Drops what compactions have given up, `max` versions at most.
    pub fn sweep(&mut self, max: usize) {
        self.changes.sweep(max);
        let mut drawing = self.drawing.0.as_mut();
        let mut hashing = self.hashing.0.as_mut();
        self.past.sweep(max, |ended, record| {
            if let Some(drawing) = &mut drawing {
                drawing.rescue(ended, record);
            }
            if let Some(hashing) = &mut hashing {
                hashing.rescue(ended, record);
            }
        });
    }

    /// Whether nothing is left of what compactions up to this revision have given up.
    pub fn is_swept(&self, revision: Revision) -> bool {
        self.past.is_swept(revision)
    }

    /// Whether compactions have given up something that is not dropped yet.
    pub fn has_superseded(&self) -> bool {
        self.past.has_superseded()
    }

    /// The keys of a range in order, as they were at `revision`, which must be
    /// readable; see [`Self::check_readable`]. `None` means now.
    pub fn range(
        &self,
        range: &KeyRange,
        revision: Option<Revision>,
    ) -> impl Iterator<Item = &Record> {
        let at = revision.unwrap_or(self.revision);
        self.looked_at(range, at).filter_map(|(_, record)| record)
    }

    /// A part of a range as it was at `revision`, which must be readable: from its
    /// first key on, `steps` keys at most, those included that were not there then. So
    /// the work is bounded, whatever is in the range. At most `limit` records are given;
    /// the others are only counted.
    pub fn piece(
        &self,
        range: &KeyRange,
        revision: Revision,
        filter: &Filter,
        limit: usize,
        steps: usize,
    ) -> Piece {
        let mut piece = Piece::default();
        for (key, record) in self.looked_at(range, revision) {
            if piece.steps == steps {
                piece.next = Some(key.clone());
                break;
            }
            piece.steps += 1;
            if let Some(record) = record {
                piece.add(record, filter, limit);
            }
        }
        piece
    }

    /// The keys of a range that are there or were, in order, each with its version at
    /// `at` if it had one. Bounded work for each.
    fn looked_at(
        &self,
        range: &KeyRange,
        at: Revision,
    ) -> impl Iterator<Item = (&Bytes, Option<&Record>)> {
        let live = self
            .live
            .range::<[u8], _>(range.bounds())
            .map(move |Live(live)| (&live.key, Some(live).filter(|live| live.mod_revision <= at)));
        let ended = (at < self.revision).then(|| self.past.ended_after(range, at));
        // Of one key, at most one version was there at a time, so one of them is none.
        merge_by(
            live,
            ended.into_iter().flatten(),
            |(key, _)| *key,
            |a, b| (a.0, a.1.or(b.1)),
        )
    }

    /// The keys bound to a session, in order.
    pub fn keys_of(&self, session: SessionId) -> impl Iterator<Item = &Bytes> {
        self.bound.keys_of(session)
    }

    /// How many keys are bound to a session, without a walk over them.
    pub fn keys_bound(&self, session: SessionId) -> usize {
        self.bound.count(session)
    }

    /// Begins a command.
    pub fn overlay(&self) -> Overlay<'_> {
        Overlay::new(self)
    }

    /// Keeps the writes of an overlay: one main revision, or none if there are no
    /// writes. The changes are in the order in which they were written.
    ///
    /// Panics if the writes were not made on this state of the keyspace.
    pub fn keep(&mut self, writes: Writes) -> Vec<Change> {
        let (changes, has_repeats) = writes.into_changes();
        let Some(first) = changes.first() else {
            return changes;
        };
        assert_eq!(
            first.revision,
            self.revision + 1,
            "writes on another state of the keyspace"
        );
        self.revision = first.revision;
        let ended = changes.iter().filter_map(|change| self.apply(change));
        let ended = ended.collect();
        self.past.add(self.revision, ended);
        match has_repeats {
            true => self.index_net(&changes),
            false => changes.iter().for_each(|change| {
                self.index(change, change.after.is_some());
            }),
        }
        changes
    }

    /// A hash of the whole history of changes, equal on nodes that applied the same.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Begins a picture of all versions as they are now.
    pub(crate) fn begin_picture(&mut self) {
        let drawing = Drawing::new(self.revision, self.digest, &self.past);
        self.drawing = UnderWay(Some(drawing));
    }

    /// Goes on with the picture, by `max` versions; gives it out when it is whole.
    pub(crate) fn draw_picture(&mut self, max: usize) -> Option<Picture> {
        let drawing = self.drawing.0.as_mut()?;
        if !drawing.walk(&self.live, &self.past, max) {
            return None;
        }
        self.drawing.0.take().map(Drawing::into_picture)
    }

    /// What of the picture is drawn so far, if one is under way; it will lack it.
    pub(crate) fn take_drawn(&mut self) -> Option<Versions> {
        Some(self.drawing.0.as_mut()?.take_drawn())
    }

    /// The keyspace of a picture.
    pub(crate) fn restore(picture: Picture) -> Self {
        let Picture {
            revision,
            compacted,
            digest,
            live,
            past,
        } = picture;
        let live_bytes = live.iter().map(Record::bytes).sum();
        // In place, and then a tree at once, since it is sorted: no insert for each.
        let live: BTreeSet<_> = live.into_iter().map(Live).collect();
        let past = History::restore(compacted, past);
        Self {
            revision,
            bound: Bound::restore(live.iter().map(|Live(record)| record)),
            changes: Changes::restore(compacted, versions(&live, &past)),
            live,
            live_bytes,
            past,
            digest,
            drawing: UnderWay::default(),
            hashing: UnderWay::default(),
        }
    }

    /// Gives out the version that the change has ended, if reads of the past see it.
    fn apply(&mut self, change: &Change) -> Option<Record> {
        self.digest = chain(self.digest, change);
        self.bind(change);
        let replaced = match &change.after {
            Some(after) => self.live.replace(Live(after.clone())),
            None => self.live.take(&change.key[..]),
        };
        let replaced = replaced.map(|Live(record)| record);
        let size = |record: &Option<Record>| record.as_ref().map_or(0, Record::bytes);
        self.live_bytes = self.live_bytes + size(&change.after) - size(&replaced);
        debug_assert_eq!(
            replaced, change.before,
            "a change follows from the version before"
        );
        replaced.filter(|replaced| replaced.mod_revision < change.revision)
    }

    fn index(&mut self, change: &Change, is_put: bool) {
        self.changes.add(Entry {
            revision: change.revision,
            kind: if is_put { Kind::Put } else { Kind::Delete },
            key: change.key.clone(),
        });
    }

    /// Of a command that wrote some key more than once: what readers see of each.
    fn index_net(&mut self, changes: &[Change]) {
        let last = changes.iter().enumerate();
        let last: BTreeMap<&Bytes, usize> = last.map(|(at, change)| (&change.key, at)).collect();
        for (at, change) in changes.iter().enumerate() {
            if last[&change.key] != at {
                continue;
            }
            let was_there = self.past.ended_at(&change.key, change.revision).is_some();
            let made = change.after.as_ref();
            let is_new = made.is_none_or(|made| made.create_revision == change.revision);
            if was_there && is_new {
                self.index(change, false);
            }
            if made.is_some() {
                self.index(change, true);
            }
        }
    }

    /// Moves a changed key in the index of sessions.
    fn bind(&mut self, change: &Change) {
        let before = change.before.as_ref().and_then(|record| record.lease);
        let after = change.after.as_ref().and_then(|record| record.lease);
        if before == after {
            return;
        }
        if let Some(session) = before {
            self.bound.remove(session, &change.key);
        }
        if let Some(session) = after {
            self.bound.insert(session, change.key.clone());
        }
    }

    fn check_reached(&self, revision: Revision) -> Result<(), RevisionError> {
        if revision > self.revision {
            return Err(RevisionError::Future {
                asked: revision,
                newest: self.revision,
            });
        }
        Ok(())
    }
}

impl Default for Keyspace {
    fn default() -> Self {
        Self::new()
    }
}

impl PartialEq for Keyspace {
    fn eq(&self, other: &Self) -> bool {
        let Self {
            revision,
            live,
            live_bytes,
            past,
            bound,
            digest,
            // An index of the versions, and no truth of its own.
            changes: _,
            drawing: _,
            hashing: _,
        } = self;
        let counts = (*revision, *live_bytes, *digest);
        let records = live.iter().map(|Live(record)| record);
        counts == (other.revision, other.live_bytes, other.digest)
            && records.eq(other.live.iter().map(|Live(record)| record))
            && *past == other.past
            && *bound == other.bound
    }
}

impl fmt::Debug for Keyspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyspace")
            .field("revision", &self.revision)
            .field("live", &self.live.len())
            .field("past", &self.past.len())
            .field("compacted", &self.compacted())
            .field("digest", &format_args!("{:016x}", self.digest))
            .finish()
    }
}

/// All versions in order of key, those of one key in their order; the past ones with
/// the revision that ended them.
fn versions<'a>(
    live: &'a BTreeSet<Live>,
    past: &'a History,
) -> impl Iterator<Item = (Option<Revision>, &'a Record)> {
    let mut live = live.iter().map(|Live(record)| record).peekable();
    let mut past = past.all().peekable();
    std::iter::from_fn(move || {
        let is_past = match (past.peek(), live.peek()) {
            (Some(past), Some(live)) => past.record.key <= live.key,
            (past, _) => past.is_some(),
        };
        match is_past {
            true => past
                .next()
                .map(|Past { ended, record }| (Some(*ended), record)),
            false => live.next().map(|record| (None, record)),
        }
    })
}

/// Two sequences in order of key as one. What both have is joined.
fn merge_by<'a, T>(
    left: impl Iterator<Item = T>,
    right: impl Iterator<Item = T>,
    key: impl Fn(&T) -> &'a Bytes,
    join: impl Fn(T, T) -> T,
) -> impl Iterator<Item = T> {
    let (mut left, mut right) = (left.peekable(), right.peekable());
    std::iter::from_fn(move || {
        let ordering = match (left.peek(), right.peek()) {
            (Some(a), Some(b)) => key(a).cmp(key(b)),
            (_, None) => Ordering::Less,
            (None, _) => Ordering::Greater,
        };
        match ordering {
            Ordering::Less => left.next(),
            Ordering::Greater => right.next(),
            Ordering::Equal => Some(join(left.next()?, right.next()?)),
        }
    })
}

/// A revision or a version as the wire has it. None ever gets near the limit.
fn as_signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The digest of a history that goes on with `change`. Each field has a fixed
/// width or its length before it, so that no two changes read the same.
fn chain(digest: u64, change: &Change) -> u64 {
    let mut hasher = Xxh3::new();
    let mut number = |n: u64| hasher.update(&n.to_le_bytes());
    number(digest);
    number(change.revision);
    number(u64::from(change.sub));
    number(
        change
            .before
            .as_ref()
            .map_or(0, |record| record.mod_revision),
    );
    if let Some(after) = &change.after {
        number(after.create_revision);
        number(after.version);
        number(after.lease.map_or(0, |session| session.0.cast_unsigned()));
        number(after.value.len() as u64);
        hasher.update(&after.value);
    }
    hasher.update(&change.key);
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: SessionId = SessionId(1);
    const TWO: SessionId = SessionId(2);

    fn put(keyspace: &mut Keyspace, key: &'static str, lease: Option<SessionId>) -> Vec<Change> {
        let mut overlay = keyspace.overlay();
        overlay.put(key.into(), "value".into(), lease);
        let writes = overlay.into_writes();
        keyspace.keep(writes)
    }

    fn delete(keyspace: &mut Keyspace, key: &str) -> Vec<Change> {
        let mut overlay = keyspace.overlay();
        overlay.delete(key.as_bytes());
        let writes = overlay.into_writes();
        keyspace.keep(writes)
    }

    fn versions_at(keyspace: &Keyspace, key: &'static str, at: Revision) -> Vec<u64> {
        let range = KeyRange::single(key.into());
        keyspace
            .range(&range, Some(at))
            .map(|record| record.version)
            .collect()
    }

    #[test]
    fn the_first_write_makes_revision_two_and_nothing_makes_none() {
        let mut keyspace = Keyspace::new();
        assert_eq!(keyspace.revision(), 1);
        assert_eq!(delete(&mut keyspace, "a"), []);
        assert_eq!(keyspace.revision(), 1);
        let changes = put(&mut keyspace, "a", None);
        assert_eq!(
            (keyspace.revision(), changes[0].revision, changes[0].sub),
            (2, 2, 0)
        );
    }

    #[test]
    fn every_version_stays_readable_at_its_revisions() {
        let mut keyspace = Keyspace::new();
        put(&mut keyspace, "a", None); // 2
        put(&mut keyspace, "b", None); // 3
        put(&mut keyspace, "a", None); // 4
        delete(&mut keyspace, "a"); // 5
        put(&mut keyspace, "a", None); // 6
        let seen: Vec<_> = (1..=6).map(|at| versions_at(&keyspace, "a", at)).collect();
        assert_eq!(seen, [vec![], vec![1], vec![1], vec![2], vec![], vec![1]]);
        assert_eq!(keyspace.get(b"a").unwrap().create_revision, 6);
    }

    #[test]
    fn what_one_revision_made_and_ended_is_no_history() {
        let mut keyspace = Keyspace::new();
        let mut overlay = keyspace.overlay();
        overlay.put("a".into(), "1".into(), None);
        overlay.delete(b"a");
        let writes = overlay.into_writes();
        assert_eq!(keyspace.keep(writes).len(), 2);
        assert_eq!(keyspace.revision(), 2);
        assert_eq!(versions_at(&keyspace, "a", 2), []);
        assert_eq!(keyspace.past.len(), 0);
    }

    #[test]
    fn a_key_belongs_to_the_session_of_its_last_put() {
        let mut keyspace = Keyspace::new();
        put(&mut keyspace, "a", Some(ONE));
        put(&mut keyspace, "b", Some(ONE));
        assert_eq!(keyspace.keys_bound(ONE), 2);
        put(&mut keyspace, "a", Some(TWO));
        put(&mut keyspace, "b", None);
        assert_eq!((keyspace.keys_bound(ONE), keyspace.keys_bound(TWO)), (0, 1));
        delete(&mut keyspace, "a");
        assert_eq!(keyspace.bound, Bound::default());
    }

    #[test]
    #[should_panic(expected = "another state")]
    fn writes_made_on_an_older_state_are_refused() {
        let mut keyspace = Keyspace::new();
        let mut overlay = keyspace.overlay();
        overlay.put("a".into(), "1".into(), None);
        let stale = overlay.into_writes();
        put(&mut keyspace, "a", None);
        keyspace.keep(stale);
    }

    #[test]
    fn a_compaction_refuses_at_once_and_drops_later() {
        let mut keyspace = Keyspace::new();
        put(&mut keyspace, "a", None); // 2
        put(&mut keyspace, "b", None); // 3
        put(&mut keyspace, "a", None); // 4
        delete(&mut keyspace, "b"); // 5
        let full = keyspace.history_bytes();
        let (asked, newest) = (6, 5);
        let future = RevisionError::Future { asked, newest };
        assert_eq!(keyspace.compact(6), Err(future));
        assert_eq!(keyspace.check_readable(6), Err(future));

        assert_eq!(keyspace.compact(4), Ok(()));
        let (asked, compacted) = (3, 4);
        let gone = RevisionError::Compacted { asked, compacted };
        assert_eq!(keyspace.check_readable(3), Err(gone));
        assert_eq!(keyspace.compact(3), Err(gone));
        assert!(keyspace.compact(4).is_err() && keyspace.check_readable(4).is_ok());
        assert_eq!((keyspace.history_bytes(), keyspace.past.len()), (full, 2));

        keyspace.sweep(9);
        assert!(!keyspace.has_superseded());
        assert_eq!(
            (keyspace.past.len(), versions_at(&keyspace, "b", 4)),
            (1, vec![1])
        );
        assert!(keyspace.history_bytes() < full);
        keyspace.compact(5).unwrap();
        keyspace.sweep(9);
        assert_eq!((keyspace.past.len(), keyspace.history_bytes()), (0, 0));
        assert_eq!(versions_at(&keyspace, "a", 5), [2]);
    }

    #[test]
    fn the_digest_tells_histories_apart_that_end_in_the_same_keys() {
        let (mut one, mut other) = (Keyspace::new(), Keyspace::new());
        assert_eq!(one.digest(), other.digest());
        put(&mut one, "a", None);
        put(&mut other, "a", Some(ONE));
        assert_ne!(one.digest(), other.digest());
        put(&mut one, "a", None);
        put(&mut other, "a", None);
        assert_eq!(one.get(b"a"), other.get(b"a"));
        assert_ne!(one.digest(), other.digest());
    }
}
