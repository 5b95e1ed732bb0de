//! What can go wrong, for the caller, and the translation of what servers and
//! connections report into it.

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::session_state::LossReason;

/// The domain of the machine-readable reasons in errors of the servers.
const ERROR_DOMAIN: &str = "conclave.dev";

/// Why a call failed.
///
/// Two questions matter to a caller: may it be repeated
/// ([`Error::is_retryable`]), and may it have happened
/// ([`Error::may_have_applied`])? Calls on a session ask them themselves: they
/// repeat until they have an answer or the session is over.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An address of a server cannot be used.
    #[error("invalid endpoint `{endpoint}`: {problem}")]
    InvalidEndpoint {
        /// As it was given.
        endpoint: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The call breaks a limit or is malformed; see the message.
    #[error("{message}")]
    InvalidArgument {
        /// The stable reason, such as `INVALID_NAME`.
        reason: String,
        /// The same in words.
        message: String,
    },
    /// Someone else holds the lock or leads, and the call would not wait.
    #[error("someone else holds it")]
    LockHeld,
    /// The lock was not granted, or the election not won, in the time given.
    #[error("it was not granted in time")]
    WaitTimedOut,
    /// The request was withdrawn.
    #[error("the request was cancelled")]
    Cancelled,
    /// The place in the queue was taken away while waiting.
    #[error("the place in the queue was lost: {message}")]
    PlaceLost {
        /// How.
        message: String,
    },
    /// The same session and owner has this lock or leads already, or waits for it.
    #[error("this session and owner already have it or wait for it")]
    AlreadyContending,
    /// The grant with this token is not held (any more).
    #[error("it is not held with this token: {message}")]
    NotHolder {
        /// What is known about it.
        message: String,
    },
    /// Nobody holds the lock.
    #[error("nobody holds it")]
    NotHeld,
    /// The session is over, and with it everything bound to it.
    #[error("the session is over: {0}")]
    SessionLost(LossReason),
    /// There is no lease with this id (any more).
    #[error("there is no such lease; it was revoked, has expired, or never was")]
    LeaseNotFound,
    /// The history that was asked for has been given up.
    #[error("{}", given_up(*.compacted))]
    Compacted {
        /// The lowest revision that can be read, or watched from; 0 if the server did
        /// not say.
        compacted: i64,
    },
    /// The servers have too much to do; the call had no effect.
    #[error("the servers are overloaded: {message}")]
    Overloaded {
        /// What is full.
        message: String,
    },
    /// No server could do the call; it had no effect.
    #[error("no server could be reached: {message}")]
    Unreachable {
        /// The last thing that was tried.
        message: String,
    },
    /// The call was sent, and its outcome is not known.
    #[error("the call may have had its effect: {message}")]
    OutcomeUnknown {
        /// The last thing that was tried.
        message: String,
    },
    /// Anything else a server said.
    #[error("{reason}: {message}")]
    Server {
        /// The stable reason, or the gRPC code.
        reason: String,
        /// The same in words.
        message: String,
    },
}

fn given_up(compacted: i64) -> String {
    let what = match compacted {
        0 => "the history of that revision".to_owned(),
        compacted => format!("what happened before revision {compacted}"),
    };
    format!("{what} is given up: read what is there now, and watch from the revision after that")
}

impl Error {
    /// Whether the same call can succeed later without anything being changed
    /// about it.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::LockHeld
            | Error::WaitTimedOut
            | Error::Overloaded { .. }
            | Error::Unreachable { .. }
            | Error::OutcomeUnknown { .. } => true,
            Error::InvalidEndpoint { .. }
            | Error::InvalidArgument { .. }
            | Error::Cancelled
            | Error::PlaceLost { .. }
            | Error::AlreadyContending
            | Error::NotHolder { .. }
            | Error::NotHeld
            | Error::SessionLost(_)
            | Error::LeaseNotFound
            | Error::Compacted { .. }
            | Error::Server { .. } => false,
        }
    }

    /// Whether the call may have had its effect although it failed. After the
    /// loss of a session this does not matter: its grants are gone with it.
    pub fn may_have_applied(&self) -> bool {
        matches!(self, Error::OutcomeUnknown { .. })
    }
}

/// How one attempt failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The cluster's answer; no attempt elsewhere would change it.
    Refused(Error),
    /// This server cannot; the attempt certainly had no effect. `leader` is
    /// its hint; `is_reached`: it told us so itself.
    NotApplied {
        message: String,
        is_reached: bool,
        leader: Option<String>,
    },
    /// This server would, but has too much to do; the attempt had no effect.
    Overloaded { message: String },
    /// The attempt may have had its effect. `is_reached` as above.
    Unknown { message: String, is_reached: bool },
}

impl Failure {
    /// What went wrong, for people.
    pub(crate) fn message(&self) -> String {
        match self {
            Failure::Refused(error) => error.to_string(),
            Failure::NotApplied { message, .. }
            | Failure::Overloaded { message }
            | Failure::Unknown { message, .. } => message.clone(),
        }
    }

    /// The error that the caller gets if this was the last attempt.
    pub(crate) fn into_error(self, may_have_applied: bool) -> Error {
        match self {
            Failure::Refused(error) => error,
            Failure::Unknown { message, .. } => Error::OutcomeUnknown { message },
            Failure::NotApplied { message, .. } | Failure::Overloaded { message }
                if may_have_applied =>
            {
                Error::OutcomeUnknown { message }
            }
            Failure::NotApplied { message, .. } => Error::Unreachable { message },
            Failure::Overloaded { message } => Error::Overloaded { message },
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        let message = || status.message().to_owned();
        let Some(info) = status
            .get_details_error_info()
            .filter(|info| info.domain == ERROR_DOMAIN)
        else {
            return etcd(&status).unwrap_or_else(|| unexplained(&status));
        };
        match info.reason.as_str() {
            "NOT_LEADER" | "SHUTTING_DOWN" => Failure::NotApplied {
                message: message(),
                is_reached: true,
                leader: info.metadata.get("leader").cloned(),
            },
            // There is room again when others are over.
            "OVERLOADED" | "TOO_MANY_REQUESTS" => Failure::Overloaded { message: message() },
            // A server with an internal error goes down; what it began may be done.
            "OUTCOME_UNKNOWN" | "INTERNAL" => Failure::Unknown {
                message: message(),
                is_reached: true,
            },
            _ => Failure::Refused(refusal(info.reason, message())),
        }
    }
}

/// A domain error as the caller sees it.
fn refusal(reason: String, message: String) -> Error {
    match reason.as_str() {
        "LOCK_HELD" => Error::LockHeld,
        "WAIT_TIMED_OUT" => Error::WaitTimedOut,
        "CANCELLED" => Error::Cancelled,
        "PLACE_LOST" => Error::PlaceLost { message },
        "ALREADY_CONTENDING" => Error::AlreadyContending,
        "NOT_HOLDER" => Error::NotHolder { message },
        "NOT_HELD" => Error::NotHeld,
        // No record of it: it ended long ago.
        "SESSION_EXPIRED" | "SESSION_NOT_FOUND" => Error::SessionLost(LossReason::SessionExpired),
        "SESSION_CLOSED" => Error::SessionLost(LossReason::SessionClosed),
        "SESSION_SUPERSEDED" | "ATTACHMENT_CHANGED" => Error::SessionLost(LossReason::Superseded),
        "SESSION_REVOKED" => Error::SessionLost(LossReason::Revoked),
        _ if reason.starts_with("INVALID_") => Error::InvalidArgument { reason, message },
        _ => Error::Server { reason, message },
    }
}

/// A status of etcd, which has texts instead of reasons: servers of ours give a reason,
/// too, wherever a call may or may not have had its effect. Those of errors
/// that tell nothing about the call itself are left to [`unexplained`].
fn etcd(status: &Status) -> Option<Failure> {
    let text = status.message().strip_prefix("etcdserver: ")?;
    let message = status.message().to_owned();
    let refused = |error| Some(Failure::Refused(error));
    match (text, status.code()) {
        ("no leader" | "not capable" | "rpc not supported for learner", _) => {
            Some(Failure::NotApplied {
                message,
                is_reached: true,
                leader: None,
            })
        }
        // Of whatever code it comes with.
        ("too many requests", _) => Some(Failure::Overloaded { message }),
        ("requested lease not found", _) => refused(Error::LeaseNotFound),
        ("mvcc: required revision has been compacted", _) => {
            refused(Error::Compacted { compacted: 0 })
        }
        ("mvcc: database space exceeded", _) => refused(Error::Server {
            reason: "NO_SPACE".to_owned(),
            message,
        }),
        (_, Code::InvalidArgument) => refused(Error::InvalidArgument {
            reason: "INVALID_ARGUMENT".to_owned(),
            message,
        }),
        // The server is well; what became of the call it does not know.
        (_, Code::Unavailable) => Some(Failure::Unknown {
            message,
            is_reached: true,
        }),
        (_, Code::OutOfRange) => refused(Error::Server {
            reason: "OUT_OF_RANGE".to_owned(),
            message,
        }),
        _ => None,
    }
}

/// A status without a reason of ours: from the connection, from tonic, or from
/// something that is no Conclave server.
fn unexplained(status: &Status) -> Failure {
    let message = describe(status);
    if never_connected(status) {
        return Failure::NotApplied {
            message,
            is_reached: false,
            leader: None,
        };
    }
    match status.code() {
        Code::Unknown
        | Code::Unavailable
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal => Failure::Unknown {
            message,
            is_reached: false,
        },
        // A stream that was cut (ENHANCE_YOUR_CALM): the server may have done it.
        Code::ResourceExhausted if causes(status).next().is_some() => Failure::Unknown {
            message,
            is_reached: false,
        },
        Code::ResourceExhausted => Failure::Overloaded { message },
        code => Failure::Refused(Error::Server {
            reason: format!("{code:?}"),
            message,
        }),
    }
}

/// Whether the connection could not even be made.
fn never_connected(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<tonic::ConnectError>())
}

/// The message with the innermost cause, which says most.
fn describe(status: &Status) -> String {
    match causes(status).last() {
        Some(cause) => format!("{}: {cause}", status.message()),
        None => status.message().to_owned(),
    }
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |cause| cause.source())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn explained(code: Code, reason: &str, metadata: &[(&str, &str)]) -> Failure {
        let metadata: HashMap<String, String> = metadata
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata);
        Status::with_error_details(code, "in words", details).into()
    }

    #[test]
    fn reasons_become_errors_that_say_whether_to_repeat() {
        let not_leader = explained(Code::Unavailable, "NOT_LEADER", &[("leader", "b:1")]);
        assert!(matches!(not_leader, Failure::NotApplied { leader: Some(l), .. } if l == "b:1"));
        let unknown = explained(Code::Unavailable, "OUTCOME_UNKNOWN", &[]);
        assert!(unknown.into_error(false).may_have_applied());
        let expired = explained(Code::FailedPrecondition, "SESSION_EXPIRED", &[]);
        assert!(matches!(
            expired,
            Failure::Refused(Error::SessionLost(LossReason::SessionExpired))
        ));
        let invalid = explained(Code::InvalidArgument, "INVALID_NAME", &[]);
        assert!(!invalid.into_error(false).is_retryable());
        let overloaded = explained(Code::ResourceExhausted, "OVERLOADED", &[]);
        assert!(overloaded.into_error(true).may_have_applied());
    }

    #[test]
    fn etcds_texts_say_whether_a_call_may_have_happened() {
        let failure = |code, text: &str| Failure::from(Status::new(code, text));
        let no_leader = failure(Code::Unavailable, "etcdserver: no leader");
        assert!(matches!(
            no_leader,
            Failure::NotApplied {
                is_reached: true,
                ..
            }
        ));
        // Of a server of ours, by its reason; the text of another is no promise.
        let text = "etcdserver: server stopped";
        let details = ErrorDetails::with_error_info("SHUTTING_DOWN", ERROR_DOMAIN, []);
        let stopped = Status::with_error_details(Code::Unavailable, text, details);
        assert!(matches!(stopped.into(), Failure::NotApplied { .. }));
        let stopped = failure(Code::Unavailable, text);
        assert!(matches!(stopped, Failure::Unknown { .. }));
        let late = failure(Code::Unavailable, "etcdserver: request timed out");
        assert!(matches!(
            late,
            Failure::Unknown {
                is_reached: true,
                ..
            }
        ));
        let busy = failure(Code::Unknown, "etcdserver: too many requests");
        assert!(matches!(busy, Failure::Overloaded { .. }));
        let gone = failure(Code::NotFound, "etcdserver: requested lease not found");
        assert!(matches!(gone, Failure::Refused(Error::LeaseNotFound)));
        let full = "etcdserver: mvcc: database space exceeded";
        let full = failure(Code::ResourceExhausted, full).into_error(true);
        assert!(!full.is_retryable() && !full.may_have_applied());
        assert!(!given_up(0).contains('0') && given_up(7).contains("revision 7"));
        let compacted = "etcdserver: mvcc: required revision has been compacted";
        let compacted = failure(Code::OutOfRange, compacted);
        assert!(matches!(
            compacted,
            Failure::Refused(Error::Compacted { .. })
        ));
        let other = failure(Code::PermissionDenied, "etcdserver: permission denied");
        assert!(matches!(other, Failure::Refused(Error::Server { .. })));
    }

    #[test]
    fn a_status_without_a_reason_counts_as_perhaps_applied_unless_it_says_otherwise() {
        let lost: Failure = Status::unavailable("connection reset").into();
        assert!(matches!(lost, Failure::Unknown { .. }));
        let full = Status::resource_exhausted("too many connections");
        let mut cut = full.clone();
        assert!(matches!(full.into(), Failure::Overloaded { .. }));
        cut.set_source(std::sync::Arc::new(std::io::Error::other("calm down")));
        assert!(matches!(cut.into(), Failure::Unknown { .. }));
        let foreign: Failure = Status::unimplemented("no such service").into();
        assert!(matches!(foreign, Failure::Refused(Error::Server { .. })));
        let refused = tonic::ConnectError("refused".into());
        let refused: Failure = Status::from_error(Box::new(refused)).into();
        assert!(matches!(refused, Failure::NotApplied { .. }));
    }
}
