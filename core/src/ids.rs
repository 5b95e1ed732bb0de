//! Identities and positions. Plain numbers on the wire, distinct types here.

use std::fmt;

/// A position in the history of the keyspace. The first write makes 2; a
/// revision is never used twice and never goes down.
pub type Revision = u64;

/// A Raft term.
pub type Term = u64;

/// A position in the Raft log; the first entry has 1.
pub type Index = u64;

/// Milliseconds of log time: elapsed, not the date. See `clock`.
pub type LogTime = u64;

/// A member of the cluster; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// A session, which is an etcd lease; never 0. Clients may choose the ids of leases, so
/// that one may be negative, or come again after its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub i64);

impl fmt::Display for SessionId {
    /// In lowercase hex, as etcd's clients write it into keys: a sign in front of what
    /// is negative.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        write!(f, "{sign}{:x}", self.0.unsigned_abs())
    }
}

/// One client's hold on a session. The number grows with each client that attaches,
/// from 1; 0 stands for 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The session.
    pub session: SessionId,
    /// Which attachment to it.
    pub number: u64,
}

impl Attachment {
    /// Whichever is the present one: for who does not attach to sessions, as clients of
    /// leases.
    pub fn present(session: SessionId) -> Self {
        Self {
            session,
            number: u64::MAX,
        }
    }
}

/// A number that a node gives to a request of its own clients; unique within
/// one start of the process, growing.
pub type RequestNumber = u64;
