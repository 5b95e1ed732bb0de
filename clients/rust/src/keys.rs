//! Which keys a call is about, and what is found or said about them.

use bytes::Bytes;
use conclave_proto::etcd::mvccpb;

pub use conclave_proto::etcd::mvccpb::KeyValue;

/// One key, or all keys from one up to another. Keys are ordered by their bytes.
///
/// A string or a slice of bytes is one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRange {
    pub(crate) key: Bytes,
    /// As etcd has it: empty for one key, a zero byte for no end.
    pub(crate) end: Bytes,
}

/// What no key lies behind.
const NO_END: &[u8] = b"\0";

impl KeyRange {
    /// One key, which must not be empty.
    pub fn key(key: impl Into<Bytes>) -> KeyRange {
        KeyRange {
            key: key.into(),
            end: Bytes::new(),
        }
    }

    /// All keys that begin so; with an empty prefix, all keys.
    pub fn prefix(prefix: impl Into<Bytes>) -> KeyRange {
        let key = prefix.into();
        if key.is_empty() {
            return KeyRange::all();
        }
        let last = key.iter().rposition(|byte| *byte != u8::MAX);
        let end = last.map_or_else(
            || Bytes::from_static(NO_END),
            |last| {
                let mut end = key[..=last].to_vec();
                end[last] += 1;
                end.into()
            },
        );
        KeyRange { key, end }
    }

    /// All keys from this one on.
    pub fn starting_at(key: impl Into<Bytes>) -> KeyRange {
        let key = key.into();
        if key.is_empty() {
            return KeyRange::all();
        }
        KeyRange {
            key,
            end: Bytes::from_static(NO_END),
        }
    }

    /// All keys from the first on, before the second.
    pub fn between(key: impl Into<Bytes>, end: impl Into<Bytes>) -> KeyRange {
        KeyRange {
            key: key.into(),
            end: end.into(),
        }
    }

    /// All keys.
    pub fn all() -> KeyRange {
        KeyRange {
            key: Bytes::from_static(NO_END),
            end: Bytes::from_static(NO_END),
        }
    }
}

macro_rules! one_key {
    ($($type:ty),*) => {
        $(impl From<$type> for KeyRange {
            fn from(key: $type) -> KeyRange {
                KeyRange::key(Bytes::copy_from_slice(key.as_ref()))
            }
        })*
    };
}

one_key!(&str, &String, String, &[u8], Vec<u8>, &Bytes);

impl From<Bytes> for KeyRange {
    fn from(key: Bytes) -> KeyRange {
        KeyRange::key(key)
    }
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The key as it is now; of one that was deleted only `key` and `mod_revision`,
    /// which is the revision of the deletion.
    pub kv: KeyValue,
    /// What was there before, if it was asked for, there was something, and it is
    /// not compacted.
    pub previous: Option<KeyValue>,
}

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// It was written.
    Put,
    /// It was deleted.
    Delete,
}

impl Event {
    /// Whether the key was not there before.
    pub fn is_creation(&self) -> bool {
        self.kind == EventKind::Put && self.kv.create_revision == self.kv.mod_revision
    }
}

impl From<mvccpb::Event> for Event {
    fn from(event: mvccpb::Event) -> Event {
        let kind = match event.r#type() {
            mvccpb::event::EventType::Put => EventKind::Put,
            mvccpb::event::EventType::Delete => EventKind::Delete,
        };
        Event {
            kind,
            kv: event.kv.unwrap_or_default(),
            previous: event.prev_kv,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_before_the_next_key_that_does_not_begin_so() {
        let ends: [(&[u8], &[u8]); 4] = [
            (b"a", b"b"),
            (b"a\xff", b"b"),
            (b"ab\xff\xff", b"ac"),
            (b"\xff\xff", b"\0"),
        ];
        for (prefix, end) in ends {
            let range = KeyRange::prefix(prefix);
            assert_eq!((&range.key[..], &range.end[..]), (prefix, end));
        }
        assert_eq!(KeyRange::prefix(""), KeyRange::all());
        assert_eq!(KeyRange::from("a"), KeyRange::key("a"));
        assert_eq!(KeyRange::starting_at("a").end, NO_END);
    }
}
