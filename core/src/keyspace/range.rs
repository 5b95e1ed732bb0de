//! Sets of keys, in etcd's terms.

use std::ops::{Bound, RangeBounds};

use bytes::Bytes;

/// A range of keys. May be empty; every operation takes an empty one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    start: Bytes,
    /// Never below `start`.
    end: Bound<Bytes>,
}

impl KeyRange {
    /// The range `[key, end)` as on the wire: an empty `end` means the one key,
    /// a single zero byte means all keys from `key` on. Empty if `end <= key`.
    pub fn new(key: Bytes, end: Bytes) -> Self {
        let end = match &end[..] {
            [] => return Self::single(key),
            [0] => Bound::Unbounded,
            _ => Bound::Excluded(end.max(key.clone())),
        };
        Self { start: key, end }
    }

    /// The one key.
    pub fn single(key: Bytes) -> Self {
        Self {
            start: key.clone(),
            end: Bound::Included(key),
        }
    }

    /// All keys that start with `prefix`; all keys, if it is empty.
    pub fn prefix(prefix: &[u8]) -> Self {
        let end = match prefix.iter().rposition(|byte| *byte != u8::MAX) {
            Some(last) => {
                let mut end = prefix[..=last].to_vec();
                end[last] += 1;
                Bound::Excluded(end.into())
            }
            None => Bound::Unbounded,
        };
        Self {
            start: Bytes::copy_from_slice(prefix),
            end,
        }
    }

    /// The same without the keys before `key`.
    pub fn from(self, key: Bytes) -> Self {
        let start = self.start.max(key);
        let end = match self.end {
            Bound::Included(end) | Bound::Excluded(end) if end < start => {
                Bound::Excluded(start.clone())
            }
            end => end,
        };
        Self { start, end }
    }

    /// Whether a key is in it.
    pub fn contains(&self, key: &[u8]) -> bool {
        RangeBounds::<[u8]>::contains(&self.bounds(), key)
    }

    /// The length of what it is made of.
    pub(crate) fn bytes(&self) -> usize {
        let end = match &self.end {
            Bound::Included(end) | Bound::Excluded(end) => end.len(),
            Bound::Unbounded => 0,
        };
        self.start.len() + end
    }

    /// The key, if it was made for one.
    pub fn as_single(&self) -> Option<&Bytes> {
        matches!(self.end, Bound::Included(_)).then_some(&self.start)
    }

    pub(crate) fn start(&self) -> &Bytes {
        &self.start
    }

    pub(crate) fn end(&self) -> Bound<&Bytes> {
        self.end.as_ref()
    }

    /// For a map that is ordered by key.
    pub(super) fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        (
            Bound::Included(&self.start),
            self.end.as_ref().map(|end| &end[..]),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(key: &'static str, end: &'static str) -> KeyRange {
        KeyRange::new(
            Bytes::from_static(key.as_bytes()),
            Bytes::from_static(end.as_bytes()),
        )
    }

    #[test]
    fn an_empty_end_means_the_one_key() {
        let one = range("b", "");
        assert!(one.contains(b"b"));
        assert!(!one.contains(b"a") && !one.contains(b"b\0"));
    }

    #[test]
    fn a_zero_byte_means_everything_from_the_key_on() {
        let tail = range("b", "\0");
        assert!(tail.contains(b"b") && tail.contains(b"\xff\xff"));
        assert!(!tail.contains(b"a"));
    }

    #[test]
    fn the_end_is_not_part_of_the_range() {
        let span = range("a", "c");
        assert!(span.contains(b"a") && span.contains(b"b\xff"));
        assert!(!span.contains(b"c"));
    }

    #[test]
    fn an_end_at_or_below_the_start_leaves_nothing() {
        for empty in [range("b", "b"), range("b", "a")] {
            assert!(!empty.contains(b"a") && !empty.contains(b"b"));
        }
    }

    #[test]
    fn a_range_can_begin_later() {
        let later = range("a", "d").from("c".into());
        assert!(later.contains(b"c") && !later.contains(b"b") && !later.contains(b"d"));
        for empty in [range("a", "c"), range("a", "")] {
            let empty = empty.from("e".into());
            assert!(!empty.contains(b"a") && !empty.contains(b"e"));
        }
        assert!(!range("b", "c").from("a".into()).contains(b"a"));
        assert!(range("a", "\0").from("b".into()).contains(b"z"));
    }

    #[test]
    fn a_prefix_ends_where_its_last_byte_would_grow() {
        let prefix = KeyRange::prefix(b"ab");
        assert!(prefix.contains(b"ab") && prefix.contains(b"ab\xff\xff"));
        assert!(!prefix.contains(b"aa") && !prefix.contains(b"ac"));

        let carried = KeyRange::prefix(b"a\xff");
        assert!(carried.contains(b"a\xff\xff"));
        assert!(!carried.contains(b"b") && !carried.contains(b"a\xfe"));

        assert!(KeyRange::prefix(b"\xff\xff").contains(b"\xff\xff\xff"));
        assert!(KeyRange::prefix(b"").contains(b"anything"));
    }
}
