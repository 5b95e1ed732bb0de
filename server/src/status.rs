//! Every way in which a request can fail, and what a client is told: the only
//! place where an error becomes a gRPC status.
//!
//! Beside the code, each status carries a `google.rpc.ErrorInfo` with the domain
//! [`DOMAIN`], a reason that is a stable contract, and metadata:
//!
//! - `may_have_applied`: `true` or `false`, on every attempt that got no answer
//!   from the state machine: whether the request may have had its effect;
//! - `leader`: where clients reach the leader, if that may help;
//! - `token`, `forced`, `loss`, `detail`: see the reasons that have them.
#![deny(clippy::wildcard_enum_match_arm)]

use std::collections::HashMap;

use conclave_core::{replica::Failure, session::EndReason};
use conclave_primitives::{LossReason, Rejection};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::validate::Invalid;

/// The domain of every reason.
pub(crate) const DOMAIN: &str = "conclave.dev";

/// Why a request is not served.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The request itself is wrong; nothing was tried.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The session named is not alive.
    #[error("{}", ended(*.0))]
    SessionEnded(EndReason),
    /// The state machine refused it.
    #[error("{}", rejected(.0))]
    Rejected(Rejection),
    /// This attempt got no answer.
    #[error(transparent)]
    Failed(#[from] Failure),
    /// A stream's reader let too many events wait.
    #[error("the stream was read too slowly and missed events")]
    SlowReader,
    /// A defect of this server.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl Refusal {
    /// What the client is told; `leader` is where it may turn to.
    pub(crate) fn into_status(self, leader: Option<&str>) -> Status {
        let mut metadata = self.metadata();
        if let (Some(leader), Self::Failed(_)) = (leader, &self) {
            metadata.insert("leader".to_owned(), leader.to_owned());
        }
        let (code, reason) = self.code_and_reason();
        let details = ErrorDetails::with_error_info(reason, DOMAIN, metadata);
        Status::with_error_details(code, self.to_string(), details)
    }

    /// The contract of the wire.
    fn code_and_reason(&self) -> (Code, &'static str) {
        match self {
            Self::Invalid(invalid) => (Code::InvalidArgument, invalid.reason()),
            Self::SessionEnded(end) => session_ended(*end),
            Self::Rejected(rejection) => rejection_status(rejection),
            Self::Failed(failure) => match failure {
                Failure::NotLeader { .. } => (Code::Unavailable, "NOT_LEADER"),
                Failure::Overloaded => (Code::ResourceExhausted, "OVERLOADED"),
                Failure::OutcomeUnknown => (Code::Unavailable, "OUTCOME_UNKNOWN"),
                Failure::ShuttingDown => (Code::Unavailable, "SHUTTING_DOWN"),
            },
            Self::SlowReader => (Code::ResourceExhausted, "OVERLOADED"),
            Self::Internal(_) => (Code::Internal, "INTERNAL"),
        }
    }

    fn metadata(&self) -> HashMap<String, String> {
        let pairs = match self {
            Self::Invalid(_) | Self::SessionEnded(_) => vec![],
            Self::Rejected(rejection) => rejection_metadata(rejection),
            Self::Failed(failure) => {
                vec![("may_have_applied", failure.may_have_applied().to_string())]
            }
            Self::SlowReader => vec![("may_have_applied", false.to_string())],
            Self::Internal(_) => vec![("may_have_applied", true.to_string())],
        };
        pairs
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect()
    }
}

fn session_ended(end: EndReason) -> (Code, &'static str) {
    match end {
        EndReason::Unknown => (Code::NotFound, "SESSION_NOT_FOUND"),
        EndReason::Expired => (Code::FailedPrecondition, "SESSION_EXPIRED"),
        EndReason::Closed => (Code::FailedPrecondition, "SESSION_CLOSED"),
        EndReason::Revoked => (Code::FailedPrecondition, "SESSION_REVOKED"),
    }
}

fn rejection_status(rejection: &Rejection) -> (Code, &'static str) {
    match rejection {
        Rejection::SessionEnded(end) => session_ended(*end),
        Rejection::Held => (Code::FailedPrecondition, "LOCK_HELD"),
        Rejection::WaitTimedOut => (Code::DeadlineExceeded, "WAIT_TIMED_OUT"),
        Rejection::Cancelled => (Code::Cancelled, "CANCELLED"),
        Rejection::PlaceLost(_) => (Code::Aborted, "PLACE_LOST"),
        Rejection::StaleRequest => (Code::FailedPrecondition, "STALE_REQUEST"),
        Rejection::AlreadyContending { .. } => (Code::AlreadyExists, "ALREADY_CONTENDING"),
        Rejection::NotHolder { .. } => (Code::FailedPrecondition, "NOT_HOLDER"),
        Rejection::NotHeld => (Code::NotFound, "NOT_HELD"),
        Rejection::TooManyCancelled => (Code::ResourceExhausted, "TOO_MANY_CANCELLED"),
    }
}

fn rejection_metadata(rejection: &Rejection) -> Vec<(&'static str, String)> {
    match rejection {
        Rejection::AlreadyContending { token } => vec![("token", token.to_string())],
        Rejection::NotHolder {
            forced: Some(record),
        } => vec![("forced", record.reason.clone())],
        Rejection::PlaceLost(loss) => {
            let mut pairs = vec![("loss", loss_name(loss).to_owned())];
            if let LossReason::Forced(reason) = loss {
                pairs.push(("detail", reason.clone()));
            }
            pairs
        }
        Rejection::NotHolder { forced: None }
        | Rejection::SessionEnded(_)
        | Rejection::Held
        | Rejection::WaitTimedOut
        | Rejection::Cancelled
        | Rejection::StaleRequest
        | Rejection::NotHeld
        | Rejection::TooManyCancelled => vec![],
    }
}

/// The name of a loss, as in the states of a client's session.
fn loss_name(loss: &LossReason) -> &'static str {
    match loss {
        LossReason::SessionEnded(EndReason::Expired) => "session_expired",
        LossReason::SessionEnded(EndReason::Closed) => "session_closed",
        LossReason::SessionEnded(EndReason::Revoked) => "revoked",
        LossReason::SessionEnded(EndReason::Unknown) => "unknown",
        LossReason::Forced(_) => "forced",
        LossReason::KeyDeleted => "key_deleted",
    }
}

fn ended(end: EndReason) -> &'static str {
    match end {
        EndReason::Unknown => "there is no such session",
        EndReason::Expired => "the session expired",
        EndReason::Closed => "the session was closed",
        EndReason::Revoked => "the session's lease was revoked",
    }
}

fn rejected(rejection: &Rejection) -> String {
    let text = match rejection {
        Rejection::SessionEnded(end) => ended(*end),
        Rejection::Held => "the lock is held, or others wait for it",
        Rejection::WaitTimedOut => "the lock was not free in time",
        Rejection::Cancelled => "the request was withdrawn",
        Rejection::PlaceLost(LossReason::Forced(reason)) => {
            return format!("the place was taken away: {reason}");
        }
        Rejection::PlaceLost(LossReason::KeyDeleted | LossReason::SessionEnded(_)) => {
            "the place was lost: its key is gone"
        }
        Rejection::StaleRequest => "the request is over and does not run again",
        Rejection::AlreadyContending { token } => {
            return format!("the same owner has the lock or waits for it, with token {token}");
        }
        Rejection::NotHolder {
            forced: Some(record),
        } => {
            return format!("the grant was taken by force: {}", record.reason);
        }
        Rejection::NotHolder { forced: None } => "no grant with this token is held",
        Rejection::NotHeld => "nobody holds the lock",
        Rejection::TooManyCancelled => {
            "too many cancelled requests of this session are not acknowledged"
        }
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use conclave_core::{
        ids::{NodeId, SessionId},
        system::ForcedRelease,
    };

    use super::*;

    fn forced() -> ForcedRelease {
        ForcedRelease {
            session: SessionId(7),
            token: 9,
            lock: "deploy".to_owned(),
            owner: String::new(),
            reason: "stuck".to_owned(),
        }
    }

    /// Code, reason, and metadata in order: what clients of any language rely on.
    fn told(refusal: Refusal) -> (Code, String, Vec<(String, String)>) {
        let status = refusal.into_status(Some("http://h:1"));
        let info = status
            .get_details_error_info()
            .expect("every status has it");
        assert_eq!(info.domain, DOMAIN);
        assert!(!status.message().is_empty());
        let mut metadata: Vec<_> = info.metadata.into_iter().collect();
        metadata.sort();
        (status.code(), info.reason, metadata)
    }

    #[test]
    fn the_contract_of_the_wire() {
        use Code::*;
        use Rejection as R;
        let rejected = Refusal::Rejected;
        let leader = ("leader", "http://h:1");
        let applied = |told| ("may_have_applied", told);
        let table: Vec<(Refusal, Code, &str, Vec<(&str, &str)>)> = vec![
            (
                Invalid::Name("x").into(),
                InvalidArgument,
                "INVALID_NAME",
                vec![],
            ),
            (
                Invalid::Owner.into(),
                InvalidArgument,
                "INVALID_OWNER",
                vec![],
            ),
            (Invalid::Ttl.into(), InvalidArgument, "INVALID_TTL", vec![]),
            (
                Invalid::Reason.into(),
                InvalidArgument,
                "INVALID_REASON",
                vec![],
            ),
            (
                Invalid::SessionMetadata("x").into(),
                InvalidArgument,
                "INVALID_SESSION_METADATA",
                vec![],
            ),
            (
                Invalid::Argument("x").into(),
                InvalidArgument,
                "INVALID_ARGUMENT",
                vec![],
            ),
            (
                Refusal::SessionEnded(EndReason::Unknown),
                NotFound,
                "SESSION_NOT_FOUND",
                vec![],
            ),
            (
                Refusal::SessionEnded(EndReason::Expired),
                FailedPrecondition,
                "SESSION_EXPIRED",
                vec![],
            ),
            (
                Refusal::SessionEnded(EndReason::Closed),
                FailedPrecondition,
                "SESSION_CLOSED",
                vec![],
            ),
            (
                Refusal::SessionEnded(EndReason::Revoked),
                FailedPrecondition,
                "SESSION_REVOKED",
                vec![],
            ),
            (
                rejected(R::SessionEnded(EndReason::Unknown)),
                NotFound,
                "SESSION_NOT_FOUND",
                vec![],
            ),
            (
                rejected(R::SessionEnded(EndReason::Expired)),
                FailedPrecondition,
                "SESSION_EXPIRED",
                vec![],
            ),
            (rejected(R::Held), FailedPrecondition, "LOCK_HELD", vec![]),
            (
                rejected(R::WaitTimedOut),
                DeadlineExceeded,
                "WAIT_TIMED_OUT",
                vec![],
            ),
            (rejected(R::Cancelled), Cancelled, "CANCELLED", vec![]),
            (
                rejected(R::PlaceLost(LossReason::KeyDeleted)),
                Aborted,
                "PLACE_LOST",
                vec![("loss", "key_deleted")],
            ),
            (
                rejected(R::PlaceLost(LossReason::Forced("stuck".to_owned()))),
                Aborted,
                "PLACE_LOST",
                vec![("detail", "stuck"), ("loss", "forced")],
            ),
            (
                rejected(R::StaleRequest),
                FailedPrecondition,
                "STALE_REQUEST",
                vec![],
            ),
            (
                rejected(R::AlreadyContending { token: 5 }),
                AlreadyExists,
                "ALREADY_CONTENDING",
                vec![("token", "5")],
            ),
            (
                rejected(R::NotHolder { forced: None }),
                FailedPrecondition,
                "NOT_HOLDER",
                vec![],
            ),
            (
                rejected(R::NotHolder {
                    forced: Some(forced()),
                }),
                FailedPrecondition,
                "NOT_HOLDER",
                vec![("forced", "stuck")],
            ),
            (rejected(R::NotHeld), NotFound, "NOT_HELD", vec![]),
            (
                rejected(R::TooManyCancelled),
                ResourceExhausted,
                "TOO_MANY_CANCELLED",
                vec![],
            ),
            (
                Failure::NotLeader {
                    leader: Some(NodeId(1)),
                }
                .into(),
                Unavailable,
                "NOT_LEADER",
                vec![leader, applied("false")],
            ),
            (
                Failure::Overloaded.into(),
                ResourceExhausted,
                "OVERLOADED",
                vec![leader, applied("false")],
            ),
            (
                Failure::OutcomeUnknown.into(),
                Unavailable,
                "OUTCOME_UNKNOWN",
                vec![leader, applied("true")],
            ),
            (
                Failure::ShuttingDown.into(),
                Unavailable,
                "SHUTTING_DOWN",
                vec![leader, applied("false")],
            ),
            (
                Refusal::SlowReader,
                ResourceExhausted,
                "OVERLOADED",
                vec![applied("false")],
            ),
            (
                Refusal::Internal("x"),
                Internal,
                "INTERNAL",
                vec![applied("true")],
            ),
        ];
        for (refusal, code, reason, metadata) in table {
            let shown = format!("{refusal:?}");
            let metadata = metadata
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .collect();
            assert_eq!(
                told(refusal),
                (code, reason.to_owned(), metadata),
                "{shown}"
            );
        }
    }
}
