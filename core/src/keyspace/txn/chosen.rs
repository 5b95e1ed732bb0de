//! What of a transaction runs, and whether it can on the state before it: decided before
//! any of it does, so that nothing fails half-way.

use bytes::Bytes;
use conclave_proto::internal::{Put, Range, Txn, operation::Operation as Kind};

use super::{
    TxnError,
    compares::all_hold,
    visits::{Visits, wide_parts},
};
use crate::{
    ids::SessionId,
    keyspace::{KeyRange, Keyspace, RevisionError},
    session::Sessions,
};

/// Which branch runs, of each transaction that does, in the order in which they do.
pub(super) fn branches(
    keyspace: &Keyspace,
    sessions: &Sessions,
    txn: &Txn,
) -> Result<Vec<bool>, TxnError> {
    let mut chosen = Chosen {
        keyspace,
        sessions,
        visits: Visits::of(wide_parts(txn)),
        branches: Vec::new(),
        ranges: Vec::new(),
        spans: Vec::new(),
    };
    chosen.choose(txn)?;
    chosen.checked()
}

/// What of a transaction runs.
struct Chosen<'a> {
    keyspace: &'a Keyspace,
    sessions: &'a Sessions,
    visits: Visits,
    /// Which branch, of each transaction that runs, in the order in which they do.
    branches: Vec<bool>,
    ranges: Vec<&'a Range>,
    /// What its operations look at.
    spans: Vec<KeyRange>,
}

impl<'a> Chosen<'a> {
    /// Notes what runs, and refuses puts that cannot run on this state. What is wrong
    /// with a range comes after that, as in etcd.
    fn choose(&mut self, txn: &'a Txn) -> Result<(), TxnError> {
        let succeeded = all_hold(self.keyspace, &txn.compares, &mut self.visits)?;
        self.branches.push(succeeded);
        let branch = if succeeded {
            &txn.success
        } else {
            &txn.failure
        };
        for operation in branch {
            match operation.operation.as_ref() {
                Some(Kind::Put(put)) => {
                    // As in etcd the other way round than for a put alone.
                    check_kept(self.keyspace, put)?;
                    check_session(self.sessions, put)?;
                }
                Some(Kind::Range(range)) => {
                    self.ranges.push(range);
                    self.will_walk(&range.key, &range.end);
                }
                Some(Kind::Txn(txn)) => self.choose(txn)?,
                Some(Kind::DeleteRange(delete)) => self.will_walk(&delete.key, &delete.end),
                None => {}
            }
        }
        Ok(())
    }

    fn will_walk(&mut self, key: &Bytes, end: &Bytes) {
        if !end.is_empty() {
            self.spans.push(KeyRange::new(key.clone(), end.clone()));
        }
    }

    /// The branches, if the rest can run on this state, too.
    fn checked(mut self) -> Result<Vec<bool>, TxnError> {
        for range in &self.ranges {
            check_state_for_range(self.keyspace, range)?;
        }
        // Most often there is no need to count.
        let at_most = self.spans.len().saturating_mul(self.keyspace.len());
        if at_most > self.visits.left {
            for span in &self.spans {
                for _ in self.keyspace.range(span, None) {
                    self.visits.one()?;
                }
            }
        }
        Ok(self.branches)
    }
}

pub(super) fn check_session(sessions: &Sessions, put: &Put) -> Result<(), TxnError> {
    let session = SessionId(put.lease);
    if put.lease != 0 && sessions.get(session).is_none() {
        return Err(TxnError::SessionNotAlive(session));
    }
    Ok(())
}

/// Whether there is what a put is to keep.
pub(super) fn check_kept(keyspace: &Keyspace, put: &Put) -> Result<(), TxnError> {
    if (put.ignore_value || put.ignore_lease) && keyspace.get(&put.key).is_none() {
        return Err(TxnError::KeyNotFound);
    }
    Ok(())
}

/// Whether a range of a transaction can be read at its revision.
pub fn check_state_for_range(keyspace: &Keyspace, range: &Range) -> Result<(), TxnError> {
    match u64::try_from(range.revision) {
        Ok(0) => Ok(()),
        Ok(revision) => Ok(keyspace.check_readable(revision)?),
        Err(_) if keyspace.compacted() == 0 => Ok(()),
        Err(_) => Err(TxnError::Revision(RevisionError::Compacted {
            asked: 0,
            compacted: keyspace.compacted(),
        })),
    }
}
