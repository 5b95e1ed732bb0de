//! What Conclave means: its primitives as deterministic procedures on the
//! replicated keyspace.
//!
//! In reading order:
//!
//! - [`name`]: names and owners, and the keys made of them;
//! - `value`: what a contender's key says;
//! - `contenders`: who contends for what, in order, and who holds;
//! - [`contention`]: what locks and elections have in common;
//! - [`mutex`]: the commands, rules and answers of the mutex;
//! - [`election`]: those of the election, on the same contenders;
//! - [`observer`]: who leads, told from the keys of an election;
//! - `kept`: answers in the form in which they are kept for numbered commands.
//!
//! [`Primitives`] joins them into the one [`Machine`] that core replicates. It has
//! no state but an index derived from keys, and knows no clock, no network, no
//! disk and no encoding but that of its own commands and values.

mod contenders;
pub mod contention;
pub mod election;
mod kept;
pub mod mutex;
pub mod name;
pub mod observer;
mod value;

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, Revision, SessionId},
    keyspace::{Change, Keyspace, Overlay, Record},
    limits,
    machine::{Cause, Context, Executed, Machine, Place, Settled, View},
    session::EndReason,
    system::ForcedRelease,
};
use conclave_proto::internal::{PrimitiveCommand, Request, command, primitive_command};
use prost::Message as _;

pub use contention::{Contender, Grant, Held, LossReason, Note, Waiting};
pub use election::{ElectionInfo, Leader};
pub use mutex::LockInfo;
pub use name::Invalid;

use contenders::Contenders;

/// All primitives as one machine.
#[derive(Debug, PartialEq)]
pub struct Primitives {
    contenders: Contenders,
}

/// The result of a command that succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The lock is held, or the election won; `token` is the create revision of `key`.
    Granted {
        /// The key that the grant stands for.
        key: Bytes,
        /// The fencing token.
        token: Revision,
    },
    /// The lock was given up.
    Released,
    /// The request is withdrawn.
    Cancelled,
    /// This contender lost its grant.
    ForceReleased(Contender),
    /// The leader's value is this one now.
    Proclaimed,
    /// Leadership was given up.
    Resigned,
}

/// The result of a command that changed nothing, or of waiting that ended without a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// An argument that no server should have let through.
    Invalid(Invalid),
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
    /// The same session and owner holds the lock or waits for it, by another request.
    AlreadyContending {
        /// The create revision of its key.
        token: Revision,
    },
    /// The grant with this token is not held (any more). `forced` says why, if an
    /// operator took it.
    NotHolder {
        /// What the operator did, while it is on record.
        forced: Option<ForcedRelease>,
    },
    /// Nobody holds the lock.
    NotHeld,
    /// Too many requests of the session are not over, to note that this one is.
    TooManyRequests,
    /// Too many acquires share the grant.
    TooManyEntries,
    /// The session holds, leads and waits for too many locks and elections already.
    TooManyLocks,
}

impl From<Invalid> for Rejection {
    fn from(invalid: Invalid) -> Self {
        Self::Invalid(invalid)
    }
}

/// What a session is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A grant ended other than by its owner's will.
    GrantLost {
        /// What was held.
        grant: Grant,
        /// Why it is no more.
        reason: LossReason,
    },
}

/// A question.
#[derive(Debug)]
pub enum Query {
    /// One lock, or all locks after a name.
    Locks {
        /// The one lock.
        name: Option<String>,
        /// Else: those behind this name.
        after: String,
        /// Else: at most so many; 0 for `limits::LIST_LOCKS_MAX`, which also caps it.
        limit: usize,
    },
    /// Who leads an election.
    Leader {
        /// Its name.
        name: String,
    },
    /// One election, or those that have candidates, after a name.
    Elections {
        /// The one election, whoever contends for it.
        name: Option<String>,
        /// Else: those behind this name.
        after: String,
        /// Else: at most so many; 0 for `limits::LIST_LOCKS_MAX`, which also caps it.
        limit: usize,
    },
    /// Whether the grant with this token holds.
    Check {
        /// The lock or election.
        name: String,
        /// The token.
        token: Revision,
    },
    /// What a session holds and waits for, and what operators took from it.
    GrantsOf(SessionId),
}

/// The answer to a [`Query`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To `Query::Locks`, in order of name.
    Locks {
        /// Locks that are held; all others are free.
        locks: Vec<LockInfo>,
        /// Whether there are more behind the last one.
        more: bool,
    },
    /// To `Query::Leader`; `None` if nobody leads.
    Leader(Option<Leader>),
    /// To `Query::Elections`, in order of name.
    Elections {
        /// Those that someone contends for.
        elections: Vec<ElectionInfo>,
        /// Whether there are more behind the last one.
        more: bool,
    },
    /// To `Query::Check`.
    Checked(bool),
    /// To `Query::GrantsOf`.
    Grants {
        /// In order of key.
        grants: Vec<Held>,
        /// In order of key.
        waiting: Vec<Waiting>,
        /// In order of token, as far as they are on record.
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

impl Machine for Primitives {
    type Command = primitive_command::Command;
    type Reply = Reply;
    type Rejection = Rejection;
    type Note = Note;
    type Event = Event;
    type Query = Query;
    type Answer = Answer;

    fn rebuild(keyspace: &Keyspace) -> Self {
        Self {
            contenders: Contenders::rebuild(keyspace),
        }
    }

    fn decode(bytes: Bytes) -> Option<Self::Command> {
        let length = bytes.len();
        let decoded = PrimitiveCommand::decode(bytes).ok()?;
        // Fields this version does not know are dropped, which shows in the length.
        if decoded.encoded_len() == length {
            decoded.command
        } else {
            None
        }
    }

    fn request(command: &Self::Command) -> Option<(SessionId, &Request)> {
        use primitive_command::Command;
        let (session, request) = match command {
            Command::LockAcquire(command) => (command.session_id, &command.request),
            Command::LockRelease(command) => (command.session_id, &command.request),
            Command::LockCancel(command) => (command.session_id, &command.request),
            Command::LockForceRelease(_) => return None,
            Command::ElectCampaign(command) => (command.session_id, &command.request),
            Command::ElectProclaim(command) => (command.session_id, &command.request),
            Command::ElectResign(command) => (command.session_id, &command.request),
        };
        Some((SessionId(session), request.as_ref()?))
    }

    fn keep(answer: &Result<Reply, Rejection>) -> Bytes {
        kept::keep(answer)
    }

    fn recall(answer: &Bytes) -> Result<Reply, Rejection> {
        kept::recall(answer)
    }

    fn execute(
        &self,
        context: &mut Context<'_>,
        command: Self::Command,
    ) -> Result<Executed<Self>, Rejection> {
        use primitive_command::Command;
        match command {
            Command::LockAcquire(command) => mutex::acquire(&self.contenders, context, command),
            Command::LockRelease(command) => mutex::release(&self.contenders, context, command),
            Command::LockCancel(command) => contention::cancel(&self.contenders, context, command),
            Command::LockForceRelease(command) => {
                mutex::force_release(&self.contenders, context, command)
            }
            Command::ElectCampaign(command) => {
                election::campaign(&self.contenders, context, command)
            }
            Command::ElectProclaim(command) => {
                election::proclaim(&self.contenders, context, command)
            }
            Command::ElectResign(command) => election::resign(&self.contenders, context, command),
        }
    }

    fn can_wait(&self, view: View<'_>, command: &Self::Command) -> bool {
        use primitive_command::Command;
        let (name, session, owner, wait_ms) = match command {
            Command::LockAcquire(it) => (&it.name, it.session_id, &it.owner, it.wait_ms),
            Command::ElectCampaign(it) => (&it.name, it.session_id, &it.owner, it.wait_ms),
            _ => return false,
        };
        let session = SessionId(session);
        wait_ms != Some(0)
            && contention::waits_long(&self.contenders, view.keyspace, name, session, owner)
    }

    fn may_be_awaited(place: &Place) -> bool {
        // Any key with a `/` has a place.
        name::session_of(&place.key).is_some()
    }

    fn next_due(&self) -> Option<LogTime> {
        contention::next_due(&self.contenders)
    }

    fn fire(&self, context: &mut Context<'_>) -> Note {
        contention::fire(&self.contenders, context)
    }

    fn outlives(&self, record: &Record, reason: EndReason, now: LogTime) -> Option<Bytes> {
        mutex::outlives(&self.contenders, record, reason, now)
    }

    fn withdraw(&self, context: &mut Context<'_>, session: SessionId, wanted: &[u64]) {
        contention::withdraw(&self.contenders, context, session, wanted);
    }

    fn holdings(&self, view: View<'_>, session: SessionId) -> Answer {
        contention::grants_of(&self.contenders, view, session)
    }

    fn follow(&self, overlay: &mut Overlay<'_>) {
        contention::follow(&self.contenders, overlay);
    }

    fn settle(&mut self, changes: &[Change], cause: Cause<'_, Note>) -> Settled<Self> {
        contention::settle(self.contenders.update(changes), cause)
    }

    fn query(&self, view: View<'_>, query: Query) -> Answer {
        match query {
            Query::Locks { name, after, limit } => {
                mutex::locks(&self.contenders, view, name, after, limit)
            }
            Query::Leader { name } => election::leader(&self.contenders, view, name),
            Query::Elections { name, after, limit } => {
                election::elections(&self.contenders, view, name, after, limit)
            }
            Query::Check { name, token } => contention::check(&self.contenders, name, token),
            Query::GrantsOf(session) => contention::grants_of(&self.contenders, view, session),
        }
    }

    fn work(answer: &Answer) -> usize {
        // Those that are not shown are counted, which takes less.
        let work = |listed: usize, total: usize| {
            listed * limits::READ_STEPS_LISTED + total.saturating_sub(listed) / 4
        };
        match answer {
            Answer::Locks { locks, .. } => {
                let of = |lock: &LockInfo| work(1 + lock.waiters.len(), 1 + lock.waiters_total);
                locks.iter().map(of).sum()
            }
            Answer::Elections { elections, .. } => {
                let of = |election: &ElectionInfo| {
                    work(election.candidates.len(), election.candidates_total)
                };
                elections.iter().map(of).sum()
            }
            Answer::Grants {
                grants,
                waiting,
                forced,
            } => work(grants.len() + waiting.len() + forced.len(), 0),
            Answer::Leader(_) | Answer::Checked(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::internal::LockRelease;

    use super::*;

    fn release() -> PrimitiveCommand {
        let release = LockRelease {
            name: "a".to_owned(),
            token: 2,
            ..LockRelease::default()
        };
        let command = Some(primitive_command::Command::LockRelease(release));
        PrimitiveCommand { command }
    }

    #[test]
    fn a_command_comes_back_as_it_was_wrapped() {
        let wrapped = command(release().command.unwrap());
        let command::Body::Machine(bytes) = wrapped else {
            panic!("not wrapped for the machine");
        };
        assert_eq!(Primitives::decode(bytes), release().command);
    }

    #[test]
    fn what_this_version_does_not_know_is_not_decoded() {
        let known = release().encode_to_vec();
        // The same with a field 15, outside and inside the command, and a command 15.
        let outside = [&known[..], &[0x78, 1]].concat();
        let mut inside = [&known[..], &[0x78, 1]].concat();
        inside[1] += 2;
        let other = vec![0x7a, 0];
        for bytes in [outside, inside, other, vec![], vec![0xff]] {
            assert_eq!(Primitives::decode(bytes.into()), None);
        }
    }
}
