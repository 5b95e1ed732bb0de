//! Every way in which a request can fail, and what a client is told: the only
//! place where an error becomes a gRPC status.
//!
//! Beside the code, each status carries a `google.rpc.ErrorInfo` with the domain
//! [`DOMAIN`], a reason that is a stable contract, and metadata:
//!
//! - `may_have_applied`: `true` or `false`, on every attempt that got no answer
//!   from the state machine: whether the request may have had its effect;
//! - `leader`: where clients reach the leader, if that may help;
//! - `token`, `forced`, `loss`, `detail`, `attachment`: see the reasons that have them.
#![deny(clippy::wildcard_enum_match_arm)]

use std::collections::HashMap;

use conclave_core::{
    keyspace::RevisionError, replica::Failure, requests::NotRun, session::EndReason,
};
use conclave_primitives::{LossReason, Rejection, name};
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
    /// It was not run, for what is known of its session's requests.
    #[error("{}", not_run(*.0))]
    NotRun(NotRun),
    /// The state machine refused it.
    #[error("{}", rejected(.0))]
    Rejected(Rejection),
    /// A revision that cannot be read or compacted.
    #[error(transparent)]
    Revision(#[from] RevisionError),
    /// The state is at its quota, and the command would grow it.
    #[error("the state is at its quota: compact, or end sessions, then clear the alarm")]
    NoSpace,
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
            Self::Invalid(invalid) => (Code::InvalidArgument, invalid_reason(*invalid)),
            Self::SessionEnded(end) => session_ended(*end),
            Self::Rejected(rejection) => rejection_status(rejection),
            Self::NotRun(why) => not_run_status(*why),
            Self::Revision(RevisionError::Compacted { .. }) => {
                (Code::OutOfRange, "REVISION_COMPACTED")
            }
            Self::Revision(RevisionError::Future { .. }) => (Code::OutOfRange, "REVISION_FUTURE"),
            Self::NoSpace => (Code::ResourceExhausted, "NO_SPACE"),
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
            Self::Invalid(_) | Self::SessionEnded(_) | Self::Revision(_) | Self::NoSpace => {
                vec![]
            }
            Self::Rejected(rejection) => rejection_metadata(rejection),
            Self::NotRun(NotRun::Attached { attachment }) => {
                vec![("attachment", attachment.to_string())]
            }
            Self::NotRun(_) => vec![],
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

fn invalid_reason(invalid: Invalid) -> &'static str {
    match invalid {
        Invalid::Lock(invalid) => lock_invalid_reason(invalid),
        Invalid::Ttl => "INVALID_TTL",
        Invalid::LockDelay => "INVALID_LOCK_DELAY",
        Invalid::SessionName => "INVALID_NAME",
        Invalid::SessionMetadata => "INVALID_SESSION_METADATA",
        Invalid::Argument(_) => "INVALID_ARGUMENT",
    }
}

fn lock_invalid_reason(invalid: name::Invalid) -> &'static str {
    match invalid {
        name::Invalid::NameEmpty
        | name::Invalid::NameTooLong
        | name::Invalid::NameWithZero
        | name::Invalid::NameReserved => "INVALID_NAME",
        name::Invalid::OwnerTooLong => "INVALID_OWNER",
        name::Invalid::ReasonEmpty | name::Invalid::ReasonTooLong => "INVALID_REASON",
        name::Invalid::ValueTooLong | name::Invalid::ValueOfLock => "INVALID_VALUE",
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

fn not_run_status(why: NotRun) -> (Code, &'static str) {
    match why {
        NotRun::Over => (Code::FailedPrecondition, "STALE_REQUEST"),
        NotRun::Superseded => (Code::FailedPrecondition, "SESSION_SUPERSEDED"),
        NotRun::TooMany => (Code::ResourceExhausted, "TOO_MANY_REQUESTS"),
        NotRun::WrongSecret => (Code::PermissionDenied, "WRONG_SECRET"),
        NotRun::Attached { .. } => (Code::FailedPrecondition, "ATTACHMENT_CHANGED"),
    }
}

fn rejection_status(rejection: &Rejection) -> (Code, &'static str) {
    match rejection {
        Rejection::Invalid(invalid) => (Code::InvalidArgument, lock_invalid_reason(*invalid)),
        Rejection::SessionEnded(end) => session_ended(*end),
        Rejection::Held => (Code::FailedPrecondition, "LOCK_HELD"),
        Rejection::WaitTimedOut => (Code::DeadlineExceeded, "WAIT_TIMED_OUT"),
        Rejection::Cancelled => (Code::Cancelled, "CANCELLED"),
        Rejection::PlaceLost(_) => (Code::Aborted, "PLACE_LOST"),
        Rejection::AlreadyContending { .. } => (Code::AlreadyExists, "ALREADY_CONTENDING"),
        Rejection::NotHolder { .. } => (Code::FailedPrecondition, "NOT_HOLDER"),
        Rejection::NotHeld => (Code::NotFound, "NOT_HELD"),
        Rejection::TooManyRequests => not_run_status(NotRun::TooMany),
        Rejection::TooManyEntries => (Code::ResourceExhausted, "TOO_MANY_ENTRIES"),
        Rejection::TooManyLocks => (Code::ResourceExhausted, "TOO_MANY_LOCKS"),
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
        | Rejection::Invalid(_)
        | Rejection::SessionEnded(_)
        | Rejection::Held
        | Rejection::WaitTimedOut
        | Rejection::Cancelled
        | Rejection::NotHeld
        | Rejection::TooManyRequests
        | Rejection::TooManyEntries
        | Rejection::TooManyLocks => vec![],
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

fn not_run(why: NotRun) -> &'static str {
    match why {
        NotRun::Over => "the request is over and does not run (again)",
        NotRun::Superseded => "another process of the client has attached to the session",
        NotRun::TooMany => "too many requests of the session are unfinished",
        NotRun::WrongSecret => "that is not the secret of the session",
        NotRun::Attached { .. } => "another attachment to the session is the present one",
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
        Rejection::Invalid(invalid) => return invalid.to_string(),
        Rejection::SessionEnded(end) => ended(*end),
        Rejection::Held => "it is held, or others wait for it",
        Rejection::WaitTimedOut => "it was not free in time",
        Rejection::Cancelled => "the request was withdrawn",
        Rejection::PlaceLost(LossReason::Forced(reason)) => {
            return format!("the place was taken away: {reason}");
        }
        Rejection::PlaceLost(LossReason::KeyDeleted | LossReason::SessionEnded(_)) => {
            "the place was lost: its key is gone"
        }
        Rejection::AlreadyContending { token } => {
            return format!("the same owner has it or waits for it, with token {token}");
        }
        Rejection::NotHolder {
            forced: Some(record),
        } => {
            return format!("the grant was taken by force: {}", record.reason);
        }
        Rejection::NotHolder { forced: None } => "no grant with this token is held",
        Rejection::NotHeld => "nobody holds it",
        Rejection::TooManyRequests => not_run(NotRun::TooMany),
        Rejection::TooManyEntries => "too many acquires share the grant",
        Rejection::TooManyLocks => {
            "the session holds, leads and waits for too many locks and elections"
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

    /// What clients of any language rely on: code, reason, metadata.
    fn told(refusal: Refusal) -> String {
        let status = refusal.into_status(Some("http://h:1"));
        let info = status
            .get_details_error_info()
            .expect("every status has it");
        assert_eq!(info.domain, DOMAIN);
        assert!(!status.message().is_empty());
        let mut metadata: Vec<String> = info
            .metadata
            .iter()
            .map(|(key, value)| format!(" {key}={value}"))
            .collect();
        metadata.sort();
        format!("{:?} {}{}", status.code(), info.reason, metadata.concat())
    }

    #[test]
    fn invalid_requests_say_which_field() {
        let table: [(Invalid, &str); 14] = [
            (Invalid::LockDelay, "INVALID_LOCK_DELAY"),
            (name::Invalid::NameEmpty.into(), "INVALID_NAME"),
            (name::Invalid::NameTooLong.into(), "INVALID_NAME"),
            (name::Invalid::NameWithZero.into(), "INVALID_NAME"),
            (name::Invalid::NameReserved.into(), "INVALID_NAME"),
            (name::Invalid::OwnerTooLong.into(), "INVALID_OWNER"),
            (name::Invalid::ReasonEmpty.into(), "INVALID_REASON"),
            (name::Invalid::ReasonTooLong.into(), "INVALID_REASON"),
            (name::Invalid::ValueTooLong.into(), "INVALID_VALUE"),
            (name::Invalid::ValueOfLock.into(), "INVALID_VALUE"),
            (Invalid::Ttl, "INVALID_TTL"),
            (Invalid::SessionName, "INVALID_NAME"),
            (Invalid::SessionMetadata, "INVALID_SESSION_METADATA"),
            (Invalid::Argument("x"), "INVALID_ARGUMENT"),
        ];
        for (invalid, reason) in table {
            assert_eq!(
                told(invalid.into()),
                format!("InvalidArgument {reason}"),
                "{invalid:?}"
            );
        }
    }

    #[test]
    fn attempts_without_an_answer_say_whether_they_may_have_happened() {
        let not_leader = Failure::NotLeader {
            leader: Some(NodeId(1)),
        };
        let here = "leader=http://h:1";
        let table: [(Refusal, String); 6] = [
            (
                not_leader.into(),
                format!("Unavailable NOT_LEADER {here} may_have_applied=false"),
            ),
            (
                Failure::Overloaded.into(),
                format!("ResourceExhausted OVERLOADED {here} may_have_applied=false"),
            ),
            (
                Failure::OutcomeUnknown.into(),
                format!("Unavailable OUTCOME_UNKNOWN {here} may_have_applied=true"),
            ),
            (
                Failure::ShuttingDown.into(),
                format!("Unavailable SHUTTING_DOWN {here} may_have_applied=false"),
            ),
            (
                Refusal::SlowReader,
                "ResourceExhausted OVERLOADED may_have_applied=false".to_owned(),
            ),
            (
                Refusal::Internal("x"),
                "Internal INTERNAL may_have_applied=true".to_owned(),
            ),
        ];
        for (refusal, expected) in table {
            let shown = format!("{refusal:?}");
            assert_eq!(told(refusal), expected, "{shown}");
        }
    }

    #[test]
    fn revisions_out_of_reach_are_told_apart() {
        let (asked, compacted, newest) = (3, 4, 2);
        let gone = RevisionError::Compacted { asked, compacted };
        let future = RevisionError::Future { asked, newest };
        assert_eq!(told(gone.into()), "OutOfRange REVISION_COMPACTED");
        assert_eq!(told(future.into()), "OutOfRange REVISION_FUTURE");
    }

    #[test]
    fn no_space_has_a_reason_of_its_own() {
        assert_eq!(told(Refusal::NoSpace), "ResourceExhausted NO_SPACE");
    }

    #[test]
    fn the_end_of_a_session_is_told_alike_by_every_request() {
        for (end, expected) in [
            (EndReason::Unknown, "NotFound SESSION_NOT_FOUND"),
            (EndReason::Expired, "FailedPrecondition SESSION_EXPIRED"),
            (EndReason::Closed, "FailedPrecondition SESSION_CLOSED"),
            (EndReason::Revoked, "FailedPrecondition SESSION_REVOKED"),
        ] {
            assert_eq!(told(Refusal::SessionEnded(end)), expected);
            assert_eq!(
                told(Refusal::Rejected(Rejection::SessionEnded(end))),
                expected
            );
        }
    }

    #[test]
    fn what_is_not_run_again_says_why() {
        for (why, expected) in [
            (NotRun::Over, "FailedPrecondition STALE_REQUEST"),
            (NotRun::Superseded, "FailedPrecondition SESSION_SUPERSEDED"),
            (NotRun::TooMany, "ResourceExhausted TOO_MANY_REQUESTS"),
            (NotRun::WrongSecret, "PermissionDenied WRONG_SECRET"),
            (
                NotRun::Attached { attachment: 3 },
                "FailedPrecondition ATTACHMENT_CHANGED attachment=3",
            ),
        ] {
            assert_eq!(told(Refusal::NotRun(why)), expected);
        }
    }

    #[test]
    fn the_loss_of_a_place_says_why() {
        let lost = |loss| told(Refusal::Rejected(Rejection::PlaceLost(loss)));
        let ended = |end| lost(LossReason::SessionEnded(end));
        let forced = lost(LossReason::Forced("stuck".to_owned()));
        assert_eq!(forced, "Aborted PLACE_LOST detail=stuck loss=forced");
        assert_eq!(
            lost(LossReason::KeyDeleted),
            "Aborted PLACE_LOST loss=key_deleted"
        );
        assert_eq!(
            ended(EndReason::Expired),
            "Aborted PLACE_LOST loss=session_expired"
        );
        assert_eq!(
            ended(EndReason::Closed),
            "Aborted PLACE_LOST loss=session_closed"
        );
        assert_eq!(ended(EndReason::Revoked), "Aborted PLACE_LOST loss=revoked");
        assert_eq!(ended(EndReason::Unknown), "Aborted PLACE_LOST loss=unknown");
    }

    #[test]
    fn refusals_of_the_state_machine_have_stable_reasons() {
        use Rejection as R;
        let told = |rejection| told(Refusal::Rejected(rejection));
        let not_holder = |forced| told(R::NotHolder { forced });
        let contending = told(R::AlreadyContending { token: 5 });
        assert_eq!(
            told(R::Invalid(name::Invalid::NameEmpty)),
            "InvalidArgument INVALID_NAME"
        );
        assert_eq!(told(R::Held), "FailedPrecondition LOCK_HELD");
        assert_eq!(told(R::WaitTimedOut), "DeadlineExceeded WAIT_TIMED_OUT");
        assert_eq!(told(R::Cancelled), "Cancelled CANCELLED");
        assert_eq!(contending, "AlreadyExists ALREADY_CONTENDING token=5");
        assert_eq!(not_holder(None), "FailedPrecondition NOT_HOLDER");
        assert_eq!(
            not_holder(Some(forced())),
            "FailedPrecondition NOT_HOLDER forced=stuck"
        );
        assert_eq!(told(R::NotHeld), "NotFound NOT_HELD");
        assert_eq!(
            told(R::TooManyEntries),
            "ResourceExhausted TOO_MANY_ENTRIES"
        );
        assert_eq!(told(R::TooManyLocks), "ResourceExhausted TOO_MANY_LOCKS");
        assert_eq!(
            told(R::TooManyRequests),
            "ResourceExhausted TOO_MANY_REQUESTS"
        );
    }
}
