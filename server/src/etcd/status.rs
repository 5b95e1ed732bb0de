//! Every way in which a call of the etcd API fails, with etcd's code and text: the
//! only place where one becomes a gRPC status. Clients of etcd tell errors apart by
//! their texts, to the letter.
//!
//! Whether a request may have had its effect: `request timed out, possibly due to
//! previous leader failure` means that it may; with every other text here it has
//! not. Clients of ours read that from the details. The Go client repeats reads on UNAVAILABLE, and no write on any of these.
#![deny(clippy::wildcard_enum_match_arm)]

use conclave_core::{
    keyspace::{RevisionError, txn::TxnError},
    replica::Failure,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::status::Refusal;

const LEASE_NOT_FOUND: (Code, &str) = (Code::NotFound, "etcdserver: requested lease not found");

/// Why a call fails.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Error {
    /// Rules for what is read or written.
    Txn(TxnError),
    /// A stream of a range in an order or with a filter.
    StreamNotPlain,
    /// A metadata entry that is no text.
    InvalidClientVersion,
    /// No leader is known, and the client wants one.
    NoLeader,
    /// More than the log takes.
    RequestTooLarge,
    /// This member lags too far behind to serve.
    Behind,
    /// A TTL beyond the longest.
    LeaseTtlTooLarge,
    /// The id that was chosen is that of another lease.
    LeaseExists,
    /// No leader was reached in time.
    TimedOut,
    /// This member stops.
    Stopped,
    /// A member that there is not.
    MemberNotFound,
    /// What is no address of a member.
    InvalidMemberUrls,
    /// The address of another member.
    PeerUrlsExist,
    /// Who is a member already cannot be made one.
    NoLearner,
    /// What is not there yet; a text of our own.
    MembersFixed,
    /// Only the leader can do this.
    NotLeader,
    /// Leadership cannot go there.
    BadTransferee,
    /// It did not in time.
    TransferTimedOut,
    /// A member that differs stops instead; a text of our own.
    NoSuchAlarm,
    /// The checkpoint went away, or is damaged; a text of our own.
    SnapshotFailed,
    /// There is no older version.
    NotCapable,
    /// None is under way.
    NoDowngrade,
    /// What is no version.
    DowngradeVersionFormat,
    /// What is no action of a downgrade.
    UnknownAction,
    /// Of users and roles.
    Auth(AuthError),
    /// A revision that cannot be read or compacted.
    Revision(RevisionError),
    /// The name of a lock or election cannot be one.
    BadName,
    /// The place of a contender went before it was first, with its lease or its key.
    SessionExpired,
    /// The lease has a candidate of the name and asks for the lock, or the other way round.
    OtherContender,
    /// What a candidate proclaims would be taken for a native lock; a text of our own.
    ValueOfLock,
    /// Nobody leads.
    NobodyElected,
    /// The candidate is none (any more).
    NotElected,
    /// A request of a leader that does not say which.
    LeaderMissing,
    /// What a service for locks or elections fails with, to which etcd gives no code.
    InRecipe(Box<Self>),
    /// Everything that native calls fail with, too.
    Refused(Refusal),
}

impl From<TxnError> for Error {
    fn from(error: TxnError) -> Self {
        Self::Txn(error)
    }
}

impl From<RevisionError> for Error {
    fn from(error: RevisionError) -> Self {
        Self::Revision(error)
    }
}

/// What is wrong with what is asked of users and roles, while there are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AuthError {
    /// Authentication needs one to be enabled.
    RootUserMissing,
    /// There are no users.
    Disabled,
    /// A user without a name.
    UserNameEmpty,
    /// A role without a name.
    RoleNameEmpty,
    /// A user that there is not.
    UserNotFound,
    /// A role that there is not.
    RoleNotFound,
    /// A grant of nothing.
    PermissionNotGiven,
}

impl From<AuthError> for Error {
    fn from(error: AuthError) -> Self {
        Self::Auth(error)
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Revision(error) => Self::Revision(error),
            refusal @ (Refusal::Invalid(_)
            | Refusal::SessionEnded(_)
            | Refusal::NotRun(_)
            | Refusal::Rejected(_)
            | Refusal::NoSpace
            | Refusal::Failed(_)
            | Refusal::SlowReader
            | Refusal::Internal(_)) => Self::Refused(refusal),
        }
    }
}

impl Error {
    /// As the services for locks and elections tell it: all codes are UNKNOWN, but for
    /// those of what may be tried again.
    pub(super) fn in_recipe(self) -> Self {
        if matches!(
            self,
            Self::Refused(Refusal::Failed(_) | Refusal::Internal(_))
        ) {
            return self;
        }
        Self::InRecipe(Box::new(self))
    }

    /// What the client is told. Native clients are told in the details, as by native
    /// services, whether the request may have had its effect; all others pass over them.
    pub(crate) fn into_status(self) -> Status {
        let (code, text) = self.code_and_text();
        let Some(failure) = self.failure() else {
            return Status::new(code, text);
        };
        let native = Refusal::Failed(failure).into_status(None);
        // With code and text once more: where there are details, Go reads these.
        Status::with_error_details(code, text, native.get_error_details())
    }

    /// The attempt got no answer from the state machine, for this reason.
    fn failure(&self) -> Option<Failure> {
        if let Self::Refused(Refusal::Failed(failure)) = self {
            return Some(*failure);
        }
        let is_stopping = *self == Self::Stopped;
        let no_leader = Failure::NotLeader { leader: None };
        (*self == Self::NoLeader)
            .then_some(no_leader)
            .or_else(|| is_stopping.then_some(Failure::ShuttingDown))
    }

    /// The contract of the wire.
    #[expect(clippy::too_many_lines, reason = "one table")]
    fn code_and_text(&self) -> (Code, &'static str) {
        match self {
            Self::Txn(error) => txn(*error),
            Self::StreamNotPlain => (
                Code::Unimplemented,
                "etcdserver: a stream of a range has no order and no filter",
            ),
            Self::InvalidClientVersion => (
                Code::InvalidArgument,
                "etcdserver: invalid client api version",
            ),
            Self::NoLeader => (Code::Unavailable, "etcdserver: no leader"),
            Self::RequestTooLarge => (Code::InvalidArgument, "etcdserver: request is too large"),
            Self::Behind => (
                Code::Unavailable,
                "etcdserver: request timed out, waiting for the applied index took too long",
            ),
            Self::LeaseTtlTooLarge => (Code::OutOfRange, "etcdserver: too large lease TTL"),
            Self::LeaseExists => (Code::FailedPrecondition, "etcdserver: lease already exists"),
            Self::TimedOut => (Code::Unavailable, "etcdserver: request timed out"),
            Self::Stopped => (Code::Unavailable, "etcdserver: server stopped"),
            Self::MemberNotFound => (Code::NotFound, "etcdserver: member not found"),
            Self::InvalidMemberUrls => (
                Code::InvalidArgument,
                "etcdserver: given member URLs are invalid",
            ),
            Self::PeerUrlsExist => (
                Code::FailedPrecondition,
                "etcdserver: Peer URLs already exists",
            ),
            Self::NoLearner => (
                Code::FailedPrecondition,
                "etcdserver: can only promote a learner member",
            ),
            Self::MembersFixed => (
                Code::Unimplemented,
                "etcdserver: members cannot be changed in this version",
            ),
            Self::NotLeader => (Code::FailedPrecondition, "etcdserver: not leader"),
            Self::BadTransferee => (
                Code::FailedPrecondition,
                "etcdserver: bad leader transferee",
            ),
            Self::TransferTimedOut => (
                Code::Unknown,
                "etcdserver: request timed out, leader transfer took too long",
            ),
            Self::NoSuchAlarm => (
                Code::Unimplemented,
                "etcdserver: alarm CORRUPT cannot be raised",
            ),
            Self::SnapshotFailed => (
                Code::Unavailable,
                "etcdserver: the snapshot could not be read",
            ),
            Self::NotCapable => (Code::FailedPrecondition, "etcdserver: not capable"),
            Self::NoDowngrade => (
                Code::FailedPrecondition,
                "etcdserver: no inflight downgrade job",
            ),
            Self::DowngradeVersionFormat => (
                Code::InvalidArgument,
                "etcdserver: wrong downgrade target version format",
            ),
            Self::UnknownAction => (Code::Unknown, "etcdserver: unknown method"),
            Self::Auth(error) => auth(*error),
            Self::Revision(error) => revision(*error),
            Self::BadName => (
                Code::InvalidArgument,
                "etcdserver: a name has 1 to 1024 bytes of UTF-8 and is not of the service",
            ),
            Self::SessionExpired => (Code::Unknown, "mutex: session is expired"),
            Self::OtherContender => (
                Code::FailedPrecondition,
                "etcdserver: the lease contends for a lock and an election of one name",
            ),
            Self::ValueOfLock => (
                Code::InvalidArgument,
                "etcdserver: the value is that of a native lock",
            ),
            Self::NobodyElected => (Code::Unknown, "election: no leader"),
            Self::NotElected => (Code::Unknown, "election: not leader"),
            Self::LeaderMissing => (Code::Unknown, "\"leader\" field must be provided"),
            Self::InRecipe(error) => (Code::Unknown, error.code_and_text().1),
            Self::Refused(refusal) => refused(refusal),
        }
    }
}

fn txn(error: TxnError) -> (Code, &'static str) {
    let text = match error {
        TxnError::EmptyKey => "etcdserver: key is not provided",
        TxnError::DuplicateKey => "etcdserver: duplicate key given in txn request",
        TxnError::TooManyOperations => "etcdserver: too many operations in txn request",
        TxnError::ValueGiven => "etcdserver: value is provided",
        TxnError::SessionGiven => "etcdserver: lease is provided",
        TxnError::KeyNotFound | TxnError::UnknownOperation => "etcdserver: key not found",
        TxnError::UnknownOrder => "etcdserver: invalid sort option",
        TxnError::SessionNotAlive(_) => return LEASE_NOT_FOUND,
        TxnError::Reserved => return (Code::PermissionDenied, "etcdserver: permission denied"),
        TxnError::Revision(error) => return revision(error),
    };
    (Code::InvalidArgument, text)
}

fn revision(error: RevisionError) -> (Code, &'static str) {
    let text = match error {
        RevisionError::Compacted { .. } => "etcdserver: mvcc: required revision has been compacted",
        RevisionError::Future { .. } => "etcdserver: mvcc: required revision is a future revision",
    };
    (Code::OutOfRange, text)
}

fn auth(error: AuthError) -> (Code, &'static str) {
    match error {
        AuthError::RootUserMissing => (
            Code::FailedPrecondition,
            "etcdserver: root user does not exist",
        ),
        AuthError::Disabled => (
            Code::FailedPrecondition,
            "etcdserver: authentication is not enabled",
        ),
        AuthError::UserNameEmpty => (Code::InvalidArgument, "etcdserver: user name is empty"),
        AuthError::RoleNameEmpty => (Code::InvalidArgument, "etcdserver: role name is empty"),
        AuthError::UserNotFound => (Code::FailedPrecondition, "etcdserver: user name not found"),
        AuthError::RoleNotFound => (Code::FailedPrecondition, "etcdserver: role name not found"),
        AuthError::PermissionNotGiven => {
            (Code::InvalidArgument, "etcdserver: permission not given")
        }
    }
}

fn refused(refusal: &Refusal) -> (Code, &'static str) {
    match refusal {
        Refusal::SessionEnded(_) => LEASE_NOT_FOUND,
        Refusal::NoSpace => (
            Code::ResourceExhausted,
            "etcdserver: mvcc: database space exceeded",
        ),
        Refusal::Failed(failure) => failed(*failure),
        Refusal::Internal(what) => {
            tracing::error!(what, "a defect: the replica gave an answer of another kind");
            (Code::Internal, "etcdserver: internal error")
        }
        Refusal::Invalid(_)
        | Refusal::NotRun(_)
        | Refusal::Rejected(_)
        | Refusal::Revision(_)
        | Refusal::SlowReader => {
            tracing::error!(%refusal, "a defect: no call of this API fails like that");
            (Code::Internal, "etcdserver: internal error")
        }
    }
}

fn failed(failure: Failure) -> (Code, &'static str) {
    match failure {
        Failure::NotLeader { .. } => (Code::Unavailable, "etcdserver: no leader"),
        Failure::Overloaded => (Code::ResourceExhausted, "etcdserver: too many requests"),
        Failure::OutcomeUnknown => (
            Code::Unavailable,
            "etcdserver: request timed out, possibly due to previous leader failure",
        ),
        Failure::ShuttingDown => (Code::Unavailable, "etcdserver: server stopped"),
    }
}

/// A method that a service of etcd's does not have; `path` is what was called.
pub(super) fn unknown_method(path: &str) -> Status {
    let (service, method) = path
        .trim_start_matches('/')
        .rsplit_once('/')
        .unwrap_or_default();
    let text = format!("unknown method {method} for service {service}");
    Status::unimplemented(text)
}

/// How tonic says that a message is longer than allowed, in the words of etcd; `None`
/// if it says something else. Calls with one request are seen to; whoever reads a
/// stream of requests asks for himself.
pub(crate) fn too_long(told: &Status) -> Option<Status> {
    let numbers = told
        .message()
        .strip_prefix("Error, decoded message length too large: found ")?;
    let (found, limit) = numbers
        .strip_suffix(" bytes")?
        .split_once(" bytes, the limit is: ")?;
    let text = format!("grpc: received message larger than max ({found} vs. {limit})");
    Some(Status::resource_exhausted(text))
}

#[cfg(test)]
mod tests {
    use conclave_core::{ids::SessionId, session::EndReason};
    use prost::Message as _;

    use super::*;

    fn assert_told(error: impl Into<Error>, code: Code, text: &str) {
        let status = error.into().into_status();
        assert_eq!(status.code(), code, "{text}");
        assert_eq!(status.message(), format!("etcdserver: {text}"));
    }

    #[test]
    fn rules_for_keys_have_the_texts_of_etcd() {
        for (error, text) in [
            (TxnError::EmptyKey, "key is not provided"),
            (TxnError::DuplicateKey, "duplicate key given in txn request"),
            (
                TxnError::TooManyOperations,
                "too many operations in txn request",
            ),
            (TxnError::ValueGiven, "value is provided"),
            (TxnError::SessionGiven, "lease is provided"),
            (TxnError::KeyNotFound, "key not found"),
            (TxnError::UnknownOperation, "key not found"),
            (TxnError::UnknownOrder, "invalid sort option"),
        ] {
            assert_told(error, Code::InvalidArgument, text);
        }
        let no_session = TxnError::SessionNotAlive(SessionId(1));
        assert_told(no_session, Code::NotFound, "requested lease not found");
        assert_told(
            TxnError::Reserved,
            Code::PermissionDenied,
            "permission denied",
        );
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "one table")]
    fn what_leases_and_operators_are_told_has_the_words_of_etcd() {
        for (error, code, text) in [
            (
                Error::LeaseTtlTooLarge,
                Code::OutOfRange,
                "too large lease TTL",
            ),
            (
                Error::LeaseExists,
                Code::FailedPrecondition,
                "lease already exists",
            ),
            (Error::TimedOut, Code::Unavailable, "request timed out"),
            (Error::Stopped, Code::Unavailable, "server stopped"),
            (Error::MemberNotFound, Code::NotFound, "member not found"),
            (
                Error::InvalidMemberUrls,
                Code::InvalidArgument,
                "given member URLs are invalid",
            ),
            (
                Error::PeerUrlsExist,
                Code::FailedPrecondition,
                "Peer URLs already exists",
            ),
            (
                Error::NoLearner,
                Code::FailedPrecondition,
                "can only promote a learner member",
            ),
            (
                Error::MembersFixed,
                Code::Unimplemented,
                "members cannot be changed in this version",
            ),
            (Error::NotLeader, Code::FailedPrecondition, "not leader"),
            (
                Error::BadTransferee,
                Code::FailedPrecondition,
                "bad leader transferee",
            ),
            (
                Error::TransferTimedOut,
                Code::Unknown,
                "request timed out, leader transfer took too long",
            ),
            (
                Error::NoSuchAlarm,
                Code::Unimplemented,
                "alarm CORRUPT cannot be raised",
            ),
            (
                Error::SnapshotFailed,
                Code::Unavailable,
                "the snapshot could not be read",
            ),
            (Error::NotCapable, Code::FailedPrecondition, "not capable"),
            (
                Error::NoDowngrade,
                Code::FailedPrecondition,
                "no inflight downgrade job",
            ),
            (
                Error::DowngradeVersionFormat,
                Code::InvalidArgument,
                "wrong downgrade target version format",
            ),
            (Error::UnknownAction, Code::Unknown, "unknown method"),
            (
                AuthError::RootUserMissing.into(),
                Code::FailedPrecondition,
                "root user does not exist",
            ),
            (
                AuthError::Disabled.into(),
                Code::FailedPrecondition,
                "authentication is not enabled",
            ),
            (
                AuthError::UserNameEmpty.into(),
                Code::InvalidArgument,
                "user name is empty",
            ),
            (
                AuthError::RoleNameEmpty.into(),
                Code::InvalidArgument,
                "role name is empty",
            ),
            (
                AuthError::UserNotFound.into(),
                Code::FailedPrecondition,
                "user name not found",
            ),
            (
                AuthError::RoleNotFound.into(),
                Code::FailedPrecondition,
                "role name not found",
            ),
            (
                AuthError::PermissionNotGiven.into(),
                Code::InvalidArgument,
                "permission not given",
            ),
        ] {
            assert_told(error, code, text);
        }
    }

    #[test]
    fn revisions_out_of_reach_are_told_apart() {
        let (asked, compacted, newest) = (3, 4, 2);
        let gone = RevisionError::Compacted { asked, compacted };
        let future = RevisionError::Future { asked, newest };
        for (error, text) in [
            (gone, "mvcc: required revision has been compacted"),
            (future, "mvcc: required revision is a future revision"),
        ] {
            assert_told(error, Code::OutOfRange, text);
            assert_told(TxnError::Revision(error), Code::OutOfRange, text);
            assert_told(Refusal::Revision(error), Code::OutOfRange, text);
        }
    }

    #[test]
    fn other_errors_have_the_codes_and_texts_of_etcd() {
        let unavailable = Code::Unavailable;
        assert_told(Error::NoLeader, unavailable, "no leader");
        assert_told(
            Error::Behind,
            unavailable,
            "request timed out, waiting for the applied index took too long",
        );
        assert_told(
            Error::RequestTooLarge,
            Code::InvalidArgument,
            "request is too large",
        );
        assert_told(
            Error::InvalidClientVersion,
            Code::InvalidArgument,
            "invalid client api version",
        );
        let no_session = Refusal::SessionEnded(EndReason::Unknown);
        assert_told(no_session, Code::NotFound, "requested lease not found");
        let full = "mvcc: database space exceeded";
        assert_told(Refusal::NoSpace, Code::ResourceExhausted, full);
        let failed = |failure| Refusal::from(failure);
        let no_leader = Failure::NotLeader { leader: None };
        assert_told(failed(no_leader), unavailable, "no leader");
        assert_told(
            failed(Failure::Overloaded),
            Code::ResourceExhausted,
            "too many requests",
        );
        assert_told(
            failed(Failure::OutcomeUnknown),
            unavailable,
            "request timed out, possibly due to previous leader failure",
        );
        assert_told(failed(Failure::ShuttingDown), unavailable, "server stopped");
    }

    #[test]
    fn native_clients_are_told_whether_it_may_have_happened() {
        let no_leader = Failure::NotLeader { leader: None };
        for (error, reason, may_have_applied) in [
            (Error::NoLeader, "NOT_LEADER", "false"),
            (Error::Stopped, "SHUTTING_DOWN", "false"),
            (Refusal::from(no_leader).into(), "NOT_LEADER", "false"),
            (
                Refusal::from(Failure::ShuttingDown).into(),
                "SHUTTING_DOWN",
                "false",
            ),
            (
                Refusal::from(Failure::Overloaded).into(),
                "OVERLOADED",
                "false",
            ),
            (
                Refusal::from(Failure::OutcomeUnknown).into(),
                "OUTCOME_UNKNOWN",
                "true",
            ),
        ] {
            let status = error.into_status();
            let details = tonic_types::pb::Status::decode(status.details()).unwrap();
            assert_eq!(details.code, i32::from(status.code()));
            assert_eq!(details.message, status.message());
            let info = status.get_details_error_info().unwrap();
            assert_eq!((&*info.domain, &*info.reason), ("conclave.dev", reason));
            assert_eq!(info.metadata["may_have_applied"], may_have_applied);
        }
        let refused = Error::Txn(TxnError::EmptyKey).into_status();
        assert!(refused.details().is_empty());
    }

    #[test]
    fn what_tonic_says_is_reworded() {
        let tonic = Status::out_of_range(
            "Error, decoded message length too large: found 3000000 bytes, \
             the limit is: 2097152 bytes",
        );
        let status = too_long(&tonic).unwrap();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(
            status.message(),
            "grpc: received message larger than max (3000000 vs. 2097152)"
        );
        assert!(too_long(&Status::out_of_range("other")).is_none());

        let status = unknown_method("/etcdserverpb.KV/Fly");
        assert_eq!(status.code(), Code::Unimplemented);
        assert_eq!(
            status.message(),
            "unknown method Fly for service etcdserverpb.KV"
        );
    }
}
