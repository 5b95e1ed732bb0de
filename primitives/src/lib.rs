//! skeleton

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, Revision, SessionId},
    keyspace::{Change, Keyspace},
    machine::{Cause, Context, Executed, Machine, Settled, View},
    session::EndReason,
    system::ForcedRelease,
};
use conclave_proto::internal::{PrimitiveCommand, command, primitive_command};
use prost::Message as _;

/// All primitives as one machine.
#[derive(Debug, PartialEq)]
pub struct Primitives {}

/// The result of a command that succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The lock is held; `token` is the create revision of `key`.
    Granted { key: Bytes, token: Revision },
    /// The lock was given up.
    Released,
    /// The request is withdrawn.
    Cancelled,
    /// This contender lost its grant.
    ForceReleased(Contender),
}

/// The result of a command that changed nothing, or of waiting that ended without a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The session is not alive, or ended while waiting.
    SessionEnded(EndReason),
    /// Someone else holds the lock or is before, and the request would not wait.
    Held,
    /// The time to wait has passed.
    WaitTimedOut,
    /// The request was withdrawn while it waited.
    Cancelled,
    /// The place was taken away while waiting (its key deleted, or forced).
    PlaceLost(LossReason),
    /// The request is over for the client that sent it; it does not run (again).
    StaleRequest,
    /// The same session and owner holds the lock or waits for it, by another request.
    AlreadyContending { token: Revision },
    /// The grant with this token is not held (any more). `forced` says why, if an
    /// operator took it.
    NotHolder { forced: Option<ForcedRelease> },
    /// Nobody holds the lock.
    NotHeld,
    /// Too many cancelled requests in this session are not acknowledged.
    TooManyCancelled,
}

/// Why a grant or place ended other than by its owner's will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LossReason {
    /// The session ended.
    SessionEnded(EndReason),
    /// An operator took it; with the reason in words.
    Forced(String),
    /// The key was deleted by someone else.
    KeyDeleted,
}

/// What a session is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A grant ended other than by its owner's will.
    GrantLost { grant: Grant, reason: LossReason },
}

/// A lock that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The lock.
    pub lock: String,
    /// The owner inside the session.
    pub owner: String,
    /// The key the grant stands for.
    pub key: Bytes,
    /// Its create revision.
    pub token: Revision,
}

/// Who holds a lock or waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its key.
    pub key: Bytes,
    /// The session the key is bound to, if any.
    pub session: Option<SessionId>,
    /// What people call that session.
    pub session_name: String,
    /// The owner inside the session.
    pub owner: String,
    /// The token it has or will have.
    pub token: Revision,
    /// How long it has contended, by log time; 0 if not known.
    pub since_ms: u64,
    /// 0 for the holder.
    pub place: usize,
}

/// A lock with all who contend for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    /// Its name.
    pub name: String,
    /// Who holds it.
    pub holder: Contender,
    /// In order; at most `limits::LIST_WAITERS_MAX`.
    pub waiters: Vec<Contender>,
    /// How many wait in all.
    pub waiters_total: usize,
}

/// A question.
#[derive(Debug)]
pub enum Query {
    /// One lock, or all locks after a name.
    Locks {
        name: Option<String>,
        after: String,
        limit: usize,
    },
    /// Whether the grant with this token holds.
    Check { name: String, token: Revision },
    /// What a session holds, and what operators took from it.
    GrantsOf(SessionId),
}

/// The answer to a [`Query`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// In order of name.
    Locks { locks: Vec<LockInfo>, more: bool },
    /// To `Query::Check`.
    Checked(bool),
    /// To `Query::GrantsOf`.
    Grants {
        grants: Vec<Grant>,
        forced: Vec<ForcedRelease>,
    },
}

/// Wraps a command for the log.
pub fn command(command: primitive_command::Command) -> command::Body {
    let command = PrimitiveCommand {
        command: Some(command),
    };
    command::Body::Machine(command.encode_to_vec().into())
}

/// Why a command changed keys.
#[derive(Debug)]
pub enum Note {}

impl Machine for Primitives {
    type Command = primitive_command::Command;
    type Reply = Reply;
    type Rejection = Rejection;
    type Note = Note;
    type Event = Event;
    type Query = Query;
    type Answer = Answer;

    fn rebuild(_keyspace: &Keyspace) -> Self {
        todo!()
    }
    fn decode(_bytes: Bytes) -> Option<Self::Command> {
        todo!()
    }
    fn execute(
        &self,
        _context: &mut Context<'_>,
        _command: Self::Command,
    ) -> Result<Executed<Self>, Rejection> {
        todo!()
    }
    fn next_due(&self) -> Option<LogTime> {
        todo!()
    }
    fn fire(&self, _context: &mut Context<'_>) -> Note {
        todo!()
    }
    fn settle(&mut self, _changes: &[Change], _cause: Cause<'_, Note>) -> Settled<Self> {
        todo!()
    }
    fn query(&self, _state: View<'_>, _query: Query) -> Answer {
        todo!()
    }
}
