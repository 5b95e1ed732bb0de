//! Checks of what clients send, before anything is tried.

use std::collections::HashMap;

use conclave_core::{ids::SessionId, limits, session::EndReason};

use crate::status::Refusal;

/// Keys under this prefix belong to the service itself.
const RESERVED: &str = "_conclave";

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Invalid {
    /// Of a lock, or of a session.
    #[error("name: {0}")]
    Name(&'static str),
    /// Of a contender.
    #[error("owner: it is longer than {} bytes", limits::OWNER_BYTES_MAX)]
    Owner,
    /// Of a session.
    #[error(
        "ttl_ms: it must be {} to {}, or 0",
        limits::SESSION_TTL_MS_MIN,
        limits::SESSION_TTL_MS_MAX
    )]
    Ttl,
    /// Of a forced release.
    #[error("reason: it must have 1 to {} bytes", limits::REASON_BYTES_MAX)]
    Reason,
    /// Of a session.
    #[error("metadata: {0}")]
    SessionMetadata(&'static str),
    /// Anything else.
    #[error("{0}")]
    Argument(&'static str),
}

impl Invalid {
    /// The reason on the wire.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Name(_) => "INVALID_NAME",
            Self::Owner => "INVALID_OWNER",
            Self::Ttl => "INVALID_TTL",
            Self::Reason => "INVALID_REASON",
            Self::SessionMetadata(_) => "INVALID_SESSION_METADATA",
            Self::Argument(_) => "INVALID_ARGUMENT",
        }
    }
}

/// The name of a lock.
pub(crate) fn lock_name(name: &str) -> Result<(), Invalid> {
    if name.is_empty() {
        return Err(Invalid::Name("it is empty"));
    }
    if name.len() > limits::NAME_BYTES_MAX {
        return Err(Invalid::Name("it is longer than 1,024 bytes"));
    }
    if name
        .strip_prefix(RESERVED)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    {
        return Err(Invalid::Name("`_conclave/` is reserved"));
    }
    Ok(())
}

/// The owner inside a session; may be empty.
pub(crate) fn owner(owner: &str) -> Result<(), Invalid> {
    if owner.len() > limits::OWNER_BYTES_MAX {
        return Err(Invalid::Owner);
    }
    Ok(())
}

/// Why an operator takes a lock away.
pub(crate) fn reason(reason: &str) -> Result<(), Invalid> {
    if reason.trim().is_empty() || reason.len() > limits::REASON_BYTES_MAX {
        return Err(Invalid::Reason);
    }
    Ok(())
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
        return Err(Invalid::Name("it is longer than 256 bytes"));
    }
    if metadata.len() > limits::SESSION_METADATA_ENTRIES_MAX {
        return Err(Invalid::SessionMetadata("it has more than 16 entries"));
    }
    let bytes: usize = metadata
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if bytes > limits::SESSION_METADATA_BYTES_MAX {
        return Err(Invalid::SessionMetadata("it has more than 4,096 bytes"));
    }
    Ok(())
}

/// A session's id. No session ever has one that is not positive.
pub(crate) fn session(id: i64) -> Result<SessionId, Refusal> {
    if id <= 0 {
        return Err(Refusal::SessionEnded(EndReason::Unknown));
    }
    Ok(SessionId(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_locks() {
        for good in ["a", "a/b", "_conclaves", "é", &"x".repeat(1_024)] {
            assert_eq!(lock_name(good), Ok(()), "{good}");
        }
        for bad in ["", "_conclave", "_conclave/x", &"x".repeat(1_025)] {
            assert!(matches!(lock_name(bad), Err(Invalid::Name(_))), "{bad}");
        }
    }

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
    fn the_face_of_a_session_has_limits() {
        let metadata = |entries: usize, bytes: usize| {
            (0..entries)
                .map(|i| (format!("{i:02}"), "x".repeat(bytes)))
                .collect::<HashMap<_, _>>()
        };
        assert_eq!(session_face("worker", &metadata(16, 254)), Ok(()));
        assert!(matches!(
            session_face(&"x".repeat(257), &metadata(0, 0)),
            Err(Invalid::Name(_))
        ));
        assert!(matches!(
            session_face("", &metadata(17, 0)),
            Err(Invalid::SessionMetadata(_))
        ));
        assert!(matches!(
            session_face("", &metadata(16, 255)),
            Err(Invalid::SessionMetadata(_))
        ));
    }

    #[test]
    fn ids_of_sessions_are_positive() {
        assert_eq!(session(1), Ok(SessionId(1)));
        for bad in [0, -1, i64::MIN] {
            assert_eq!(session(bad), Err(Refusal::SessionEnded(EndReason::Unknown)));
        }
    }
}
