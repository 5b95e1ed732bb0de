//! Checks of what clients send, before anything is tried.

use std::collections::HashMap;

use conclave_core::{ids::SessionId, limits, session::EndReason};
use conclave_primitives::name;
use conclave_proto::{internal::Request, v1};

use crate::status::Refusal;

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Invalid {
    /// A name, owner, reason or value of a lock or election.
    #[error(transparent)]
    Lock(#[from] name::Invalid),
    /// The TTL of a session.
    #[error(
        "ttl_ms must be {} to {}, or 0",
        limits::SESSION_TTL_MS_MIN,
        limits::SESSION_TTL_MS_MAX
    )]
    Ttl,
    /// The delay of a lock.
    #[error("lock_delay_ms must be at most {}", limits::LOCK_DELAY_MS_MAX)]
    LockDelay,
    /// The name of a session.
    #[error("name is longer than {} bytes", limits::SESSION_NAME_BYTES_MAX)]
    SessionName,
    /// The metadata of a session.
    #[error(
        "metadata has more than {} entries or {} bytes",
        limits::SESSION_METADATA_ENTRIES_MAX,
        limits::SESSION_METADATA_BYTES_MAX
    )]
    SessionMetadata,
    /// Anything else.
    #[error("{0}")]
    Argument(&'static str),
}

/// The contender that a request is about.
pub(crate) fn contender(name: &str, session_id: i64, owner: &str) -> Result<(), Refusal> {
    name::validate_name(name).map_err(Invalid::from)?;
    name::validate_owner(owner).map_err(Invalid::from)?;
    session(session_id)?;
    Ok(())
}

/// The name of a lock.
pub(crate) fn lock_name(name: &str) -> Result<(), Invalid> {
    Ok(name::validate_name(name)?)
}

/// What a list shows: the one of this name, or all after another name.
pub(crate) fn listed(name: String, after: &str) -> Result<Option<String>, Invalid> {
    if after.len() > limits::NAME_BYTES_MAX {
        return Err(Invalid::Argument("after: it is longer than any name"));
    }
    if name.is_empty() {
        return Ok(None);
    }
    lock_name(&name)?;
    Ok(Some(name))
}

/// How long nobody else gets a lock whose holder is lost.
pub(crate) fn lock_delay(delay_ms: u64) -> Result<(), Invalid> {
    if delay_ms > limits::LOCK_DELAY_MS_MAX {
        Err(Invalid::LockDelay)
    } else {
        Ok(())
    }
}

/// What a candidate proclaims.
pub(crate) fn election_value(value: &[u8]) -> Result<(), Invalid> {
    match value.len() {
        0..=limits::ELECTION_VALUE_BYTES_MAX => Ok(()),
        _ => Err(name::Invalid::ValueTooLong.into()),
    }
}

/// Why an operator takes a lock away.
pub(crate) fn reason(reason: &str) -> Result<(), Invalid> {
    Ok(name::validate_reason(reason)?)
}

/// The TTL that a request for `ttl_ms` gets.
pub(crate) fn ttl_ms(ttl_ms: u64) -> Result<u64, Invalid> {
    match ttl_ms {
        0 => Ok(limits::SESSION_TTL_MS_DEFAULT),
        limits::SESSION_TTL_MS_MIN..=limits::SESSION_TTL_MS_MAX => Ok(ttl_ms),
        _ => Err(Invalid::Ttl),
    }
}

/// What people see of a session.
pub(crate) fn session_face(name: &str, metadata: &HashMap<String, String>) -> Result<(), Invalid> {
    if name.len() > limits::SESSION_NAME_BYTES_MAX {
        return Err(Invalid::SessionName);
    }
    let bytes: usize = metadata
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if metadata.len() > limits::SESSION_METADATA_ENTRIES_MAX
        || bytes > limits::SESSION_METADATA_BYTES_MAX
    {
        return Err(Invalid::SessionMetadata);
    }
    Ok(())
}

/// The secret of a session; empty is none.
pub(crate) fn secret(secret: &[u8]) -> Result<(), Invalid> {
    if secret.is_empty() || secret.len() == limits::SECRET_BYTES {
        Ok(())
    } else {
        Err(Invalid::Argument("secret: it must have 16 bytes, or none"))
    }
}

/// What makes a request safe to repeat.
pub(crate) fn number(number: Option<v1::RequestNumber>) -> Result<Request, Invalid> {
    let v1::RequestNumber {
        attachment,
        request,
        acknowledged,
        unfinished,
    } = number.unwrap_or_default();
    if request.max(acknowledged) > limits::REQUEST_NUMBER_MAX {
        return Err(Invalid::Argument("number: it must be less than 2^63"));
    }
    if unfinished.len() > limits::REQUESTS_OPEN_MAX || !unfinished.is_sorted_by(|a, b| a < b) {
        return Err(Invalid::Argument(
            "number: unfinished must be in order, and at most 4,096",
        ));
    }
    Ok(Request {
        attachment,
        number: request,
        acknowledged,
        unfinished,
    })
}

/// A session's id. No session ever has 0.
pub(crate) fn session(id: i64) -> Result<SessionId, Refusal> {
    if id == 0 {
        return Err(Refusal::SessionEnded(EndReason::Unknown));
    }
    Ok(SessionId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ttls() {
        assert_eq!(ttl_ms(0), Ok(10_000));
        assert_eq!(ttl_ms(500), Ok(500));
        assert_eq!(ttl_ms(86_400_000), Ok(86_400_000));
        for bad in [1, 499, 86_400_001, u64::MAX] {
            assert_eq!(ttl_ms(bad), Err(Invalid::Ttl));
        }
    }

    #[test]
    fn what_is_listed() {
        let longest = "n".repeat(limits::NAME_BYTES_MAX);
        assert_eq!(listed(String::new(), &longest), Ok(None));
        assert_eq!(listed("one".into(), ""), Ok(Some("one".into())));
        assert!(listed(String::new(), &format!("{longest}n")).is_err());
        assert!(listed("/".into(), "").is_err());
    }

    #[test]
    fn lock_delays() {
        assert_eq!(lock_delay(0), Ok(()));
        assert_eq!(lock_delay(60_000), Ok(()));
        assert_eq!(lock_delay(60_001), Err(Invalid::LockDelay));
    }

    #[test]
    fn the_face_of_a_session_has_limits() {
        let metadata = |entries: usize, bytes: usize| {
            (0..entries)
                .map(|i| (format!("{i:02}"), "x".repeat(bytes)))
                .collect::<HashMap<_, _>>()
        };
        assert_eq!(session_face("worker", &metadata(16, 254)), Ok(()));
        let invalid = |name: &str, entries, bytes| session_face(name, &metadata(entries, bytes));
        assert_eq!(invalid(&"x".repeat(257), 0, 0), Err(Invalid::SessionName));
        assert_eq!(invalid("", 17, 0), Err(Invalid::SessionMetadata));
        assert_eq!(invalid("", 16, 255), Err(Invalid::SessionMetadata));
    }

    #[test]
    fn a_secret_has_its_length_or_none() {
        for good in [0, limits::SECRET_BYTES] {
            assert_eq!(secret(&vec![1; good]), Ok(()));
        }
        for bad in [1, 15, 17] {
            assert!(secret(&vec![1; bad]).is_err());
        }
    }

    #[test]
    fn numbers_have_limits() {
        let numbered = |request, acknowledged, unfinished: &[u64]| {
            number(Some(v1::RequestNumber {
                attachment: 0,
                request,
                acknowledged,
                unfinished: unfinished.to_vec(),
            }))
        };
        let max = limits::REQUEST_NUMBER_MAX;
        assert!(numbered(max, max, &[3, 4]).is_ok());
        assert!(numbered(max + 1, 0, &[]).is_err());
        assert!(numbered(1, max + 1, &[]).is_err());
        assert!(numbered(9, 8, &[4, 3]).is_err());
        assert!(numbered(9, 8, &[4, 4]).is_err());
        assert!(numbered(9, 8, &(0..4_097).collect::<Vec<_>>()).is_err());
        assert_eq!(number(None), Ok(Request::default()));
    }

    #[test]
    fn no_session_has_the_id_zero() {
        for good in [1, -1, i64::MIN] {
            assert_eq!(session(good), Ok(SessionId(good)));
        }
        assert_eq!(session(0), Err(Refusal::SessionEnded(EndReason::Unknown)));
    }
}
