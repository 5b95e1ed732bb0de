//! Pictures of the state: everything as it was after one entry, copied little by
//! little while further entries are applied, so that nobody waits for the whole.
//!
//! Each part walks over what it holds in order, some of it at a time. What lies
//! before the walk is in the picture; what lies behind must still be found as it
//! was when the walk comes to it. The keyspace keeps every version that is
//! replaced, so only those that a compaction drops must be rescued
//! (`keyspace/picture.rs`); a session is copied before it changes (`session.rs`).
//! So applying costs next to nothing more, and nothing while no picture is taken.

/// A picture that is being taken, if one is. It is no part of the state that it is
/// taken of: any two are equal.
#[derive(Clone, Debug)]
pub(crate) struct UnderWay<T>(pub(crate) Option<T>);

impl<T> Default for UnderWay<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> PartialEq for UnderWay<T> {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}
