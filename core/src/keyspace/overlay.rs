//! The writes of one command on top of the keyspace.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Change, KeyRange, Keyspace, Record, merge_by};
use crate::ids::{Revision, SessionId};

/// A keyspace with the writes of one command on top, to be kept or dropped. Its
/// reads see its writes.
#[derive(Debug)]
pub struct Overlay<'a> {
    base: &'a Keyspace,
    changes: Vec<Change>,
    /// The last change of each key that has one.
    newest: BTreeMap<Bytes, usize>,
}

/// What an overlay wrote.
#[derive(Debug)]
pub struct Writes {
    changes: Vec<Change>,
    /// Whether some key was written more than once.
    has_repeats: bool,
}

impl<'a> Overlay<'a> {
    pub(super) fn new(base: &'a Keyspace) -> Self {
        Self {
            base,
            changes: Vec::new(),
            newest: BTreeMap::new(),
        }
    }

    /// The keyspace below, which does not see the writes.
    pub fn base(&self) -> &'a Keyspace {
        self.base
    }

    /// The revision that this command's writes get.
    pub fn revision(&self) -> Revision {
        self.base.revision() + 1
    }

    /// A key with this command's writes.
    pub fn get(&self, key: &[u8]) -> Option<&Record> {
        match self.newest.get(key) {
            Some(change) => self.changes[*change].after.as_ref(),
            None => self.base.get(key),
        }
    }

    /// The live keys of a range with this command's writes, in order.
    pub fn range(&self, range: &KeyRange) -> impl Iterator<Item = &Record> {
        let untouched = self
            .base
            .range(range, None)
            .filter(|record| !self.newest.contains_key(&record.key));
        let written = self
            .newest
            .range::<[u8], _>(range.bounds())
            .filter_map(|(_, change)| self.changes[*change].after.as_ref());
        merge_by(
            untouched,
            written,
            |record| &record.key,
            |written, _| written,
        )
    }

    /// Writes a key, bound to a session or to none whatever it was bound to before. Both
    /// are copied, so that neither keeps in memory what it came with.
    ///
    /// Panics if the key is empty.
    pub fn put(&mut self, key: Bytes, value: Bytes, lease: Option<SessionId>) {
        assert!(!key.is_empty(), "a key is never empty");
        let revision = self.revision();
        let before = self.get(&key).cloned();
        let own = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        let key = before
            .as_ref()
            .map_or_else(|| own(&key), |record| record.key.clone());
        let (create_revision, version) = before.as_ref().map_or((revision, 0), |record| {
            (record.create_revision, record.version)
        });
        let after = Record {
            key: key.clone(),
            value: own(&value),
            create_revision,
            mod_revision: revision,
            version: version + 1,
            lease,
        };
        self.write(key, before, Some(after));
    }

    /// Deletes a key; whether it was there.
    pub fn delete(&mut self, key: &[u8]) -> bool {
        let Some(record) = self.get(key).cloned() else {
            return false;
        };
        self.write(record.key.clone(), Some(record), None);
        true
    }

    /// What was written so far, in order.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Ends the borrow, for [`Keyspace::keep`].
    pub fn into_writes(self) -> Writes {
        Writes {
            has_repeats: self.newest.len() < self.changes.len(),
            changes: self.changes,
        }
    }

    fn write(&mut self, key: Bytes, before: Option<Record>, after: Option<Record>) {
        let change = Change {
            revision: self.revision(),
            sub: u32::try_from(self.changes.len())
                .expect("a command has fewer writes than it has bytes or there are keys"),
            before,
            after,
            key: key.clone(),
        };
        self.newest.insert(key, self.changes.len());
        self.changes.push(change);
    }
}

impl Writes {
    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether anything was put, and not only deleted.
    pub fn has_puts(&self) -> bool {
        self.changes.iter().any(|change| change.after.is_some())
    }

    /// In order, and whether some key was written more than once.
    pub(super) fn into_changes(self) -> (Vec<Change>, bool) {
        (self.changes, self.has_repeats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(overlay: &mut Overlay<'_>, key: &'static str, value: &'static str) {
        overlay.put(key.into(), value.into(), None);
    }

    #[test]
    fn reads_see_the_writes_before_them() {
        let mut keyspace = Keyspace::new();
        let mut first = keyspace.overlay();
        put(&mut first, "a", "1");
        put(&mut first, "c", "1");
        let writes = first.into_writes();
        keyspace.keep(writes);

        let mut overlay = keyspace.overlay();
        assert_eq!(overlay.revision(), 3);
        assert!(overlay.delete(b"a"));
        put(&mut overlay, "b", "2");
        put(&mut overlay, "c", "2");
        let seen: Vec<_> = overlay
            .range(&KeyRange::prefix(b""))
            .map(|r| &r.value[..])
            .collect();
        assert_eq!(seen, [b"2", b"2"]);
        assert_eq!(overlay.get(b"a"), None);
        assert!(!overlay.delete(b"a"));
        assert_eq!(overlay.get(b"c").unwrap().create_revision, 2);
        assert_eq!(keyspace.get(b"c").unwrap().value, "1");
    }

    #[test]
    fn a_key_made_again_in_one_command_starts_anew() {
        let mut keyspace = Keyspace::new();
        let mut overlay = keyspace.overlay();
        put(&mut overlay, "a", "1");
        put(&mut overlay, "a", "2");
        assert_eq!(overlay.get(b"a").unwrap().version, 2);
        assert!(overlay.delete(b"a"));
        put(&mut overlay, "a", "3");
        let writes = overlay.into_writes();
        let changes = keyspace.keep(writes);

        assert_eq!(
            changes.iter().map(|change| change.sub).collect::<Vec<_>>(),
            [0, 1, 2, 3]
        );
        assert_eq!(changes[2].before.as_ref().unwrap().version, 2);
        assert_eq!(changes[3].before, None);
        let made = keyspace.get(b"a").unwrap();
        assert_eq!(
            (made.create_revision, made.mod_revision, made.version),
            (2, 2, 1)
        );
        assert_eq!(keyspace.revision(), 2);
    }
}
