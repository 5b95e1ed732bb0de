//! The value of a contender's key: what its request asked for, which acquires
//! share the grant, and the delay that a lost holder leaves behind.
//!
//! A value counts only if it bears the mark, since a candidate may proclaim anything,
//! and an etcd client write anything, and if its key can be what it says. With a session that its
//! key is named after, it is a contender of this API. Bound to none, with the end
//! of a delay, it is what a lost holder left: nobody's, and still in the way. All
//! else is a plain contender that waits without limit.

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, SessionId},
    keyspace::Record,
};
use conclave_proto::internal::{Campaign, LockContender};
use prost::Message as _;

use crate::name;

/// In the value of every native contender for a lock.
pub(crate) const MARK: u32 = 0xC0_9C_1A_7E;

/// What a contender's key stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// A contender. While it does not hold, its wait ends then.
    Contends(Option<LogTime>),
    /// A lost holder's delay, until then.
    Delays(LogTime),
}

impl Standing {
    /// What this key stands for.
    pub(crate) fn of(record: &Record) -> Self {
        match delay(record) {
            Some(value) => Self::Delays(value.delay_until_ms),
            None => Self::Contends(
                native(record)
                    .map(|value| value.wait_until_ms)
                    .filter(|end| *end != 0),
            ),
        }
    }

    /// When its timer fires, if it has one.
    pub(crate) fn end(self) -> Option<LogTime> {
        match self {
            Self::Contends(end) => end,
            Self::Delays(end) => Some(end),
        }
    }
}

/// What a contender of this API wrote. `None` for everyone else.
pub(crate) fn native(record: &Record) -> Option<LockContender> {
    let session = record.lease?;
    decode(record).filter(|_| name::is_of(&record.key, session))
}

/// What a lost holder left, while its delay runs.
pub(crate) fn delay(record: &Record) -> Option<LockContender> {
    if record.lease.is_some() {
        return None;
    }
    decode(record).filter(|value| value.delay_until_ms != 0)
}

/// What a contender of this API wrote, lost or not.
pub(crate) fn native_or_lost(record: &Record) -> Option<LockContender> {
    native(record).or_else(|| delay(record))
}

/// The session that a key is or was bound to.
pub(crate) fn session_of(record: &Record) -> Option<SessionId> {
    let lost = || delay(record).and_then(|_| name::session_of(&record.key));
    record.lease.or_else(lost)
}

/// What stays of a holder that is lost now, if it asked for a delay: also which
/// acquires share it, so that the delay ends with the last of them and not before.
pub(crate) fn left_by(holder: &Record, now: LogTime) -> Option<Bytes> {
    let value = native(holder).filter(|value| value.delay_ms != 0)?;
    let left = LockContender {
        wait_until_ms: 0,
        delay_until_ms: end_of(now, value.delay_ms),
        ..value
    };
    Some(left.encode_to_vec().into())
}

/// The requests of all acquires that share a grant or place, the first first.
pub(crate) fn entries(value: &LockContender) -> impl Iterator<Item = u64> {
    std::iter::once(value.request).chain(value.inner.iter().copied())
}

/// What is left when one of several acquires is undone: the one with this
/// request, or for 0 the newest. `None` if it is the only one.
pub(crate) fn without(mut value: LockContender, entry: u64) -> Option<LockContender> {
    if value.inner.is_empty() {
        return None;
    }
    match value.inner.iter().position(|inner| *inner == entry) {
        Some(at) => {
            value.inner.remove(at);
        }
        None if entry == 0 => {
            value.inner.pop();
        }
        None => value.request = value.inner.remove(0),
    }
    Some(value)
}

/// The log time at which what begins now and lasts so long ends. Log time is cut
/// to whole milliseconds, so one more than asked keeps it from ending early. Never
/// 0, which means no end.
pub(crate) fn end_of(now: LogTime, ms: u64) -> LogTime {
    now.saturating_add(ms).saturating_add(1)
}

/// Whether this is what a native contender for a lock writes.
pub(crate) fn is_of_lock(value: &Bytes) -> bool {
    lock_value(value).is_some()
}

fn decode(record: &Record) -> Option<LockContender> {
    lock_value(&record.value)
}

fn lock_value(bytes: &Bytes) -> Option<LockContender> {
    if bytes.is_empty() {
        return None;
    }
    let value = LockContender::decode(bytes.clone()).ok()?;
    let is_ours = value.mark == MARK && value.encoded_len() == bytes.len();
    is_ours.then_some(value)
}

/// What lies beside a contender's key.
pub(crate) fn campaign(record: &Record) -> Option<Campaign> {
    let value = Campaign::decode(record.value.clone()).ok()?;
    (value.encoded_len() == record.value.len()).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(request: u64, inner: &[u64]) -> LockContender {
        LockContender {
            request,
            inner: inner.to_vec(),
            ..LockContender::default()
        }
    }

    #[test]
    fn any_of_several_acquires_can_be_undone_and_the_last_one_is_none() {
        assert_eq!(without(shared(1, &[2, 3]), 2), Some(shared(1, &[3])));
        assert_eq!(without(shared(1, &[2, 3]), 1), Some(shared(2, &[3])));
        assert_eq!(without(shared(1, &[2, 3]), 0), Some(shared(1, &[2])));
        assert_eq!(without(shared(1, &[]), 1), None);
        assert_eq!(without(shared(1, &[]), 0), None);
    }

    #[test]
    fn what_lasts_longer_than_time_ends_with_it() {
        assert_eq!(end_of(5, 10), 16);
        assert_eq!(end_of(5, u64::MAX), u64::MAX);
    }
}
