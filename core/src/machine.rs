//! The seam to what is replicated: a [`Machine`] gives commands on the keyspace
//! their meaning.
//!
//! A machine holds no truth of its own. Its state is keys; what it keeps in
//! memory is an index derived from them. A command runs in two steps: first
//! [`Machine::execute`] reads the index and writes to an overlay, which is kept
//! or dropped as a whole; then, if it was kept, [`Machine::settle`] updates the
//! index from the changed keys and says who waits no longer. `settle` is also
//! called when a session ends or a plain transaction writes, so that there is
//! one place that decides who holds what.
//!
//! Everything here must be deterministic: the same entries give the same state
//! on every node. No clock, no random numbers, no iteration in hash order.

use std::fmt;

use bytes::Bytes;
use conclave_proto::internal::Request;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    ids::{LogTime, Revision, SessionId},
    keyspace::{Change, Keyspace, Overlay, Record, Writes},
    requests::Standing,
    session::{EndReason, Session, Sessions},
    system::{ForcedRelease, System},
};

/// A place in a queue: that of a key with which someone contends. It names the waiting
/// request until it is resolved.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The revision at which the key was created; others of one transaction share it.
    pub revision: Revision,
    /// The key.
    pub key: Bytes,
}

impl Place {
    /// That of a key that is there.
    pub fn of(record: &Record) -> Self {
        Self {
            revision: record.create_revision,
            key: record.key.clone(),
        }
    }

    /// A number made of both.
    pub(crate) fn fingerprint(&self) -> u64 {
        xxh3_64_with_seed(&self.key, self.revision)
    }
}

/// What is replicated. See the module for the contract.
pub trait Machine: fmt::Debug + PartialEq + Sized {
    /// A decoded command.
    type Command: fmt::Debug;
    /// The result of a command that succeeded.
    type Reply: fmt::Debug + Clone + PartialEq;
    /// The result of a command that changed nothing.
    type Rejection: fmt::Debug + Clone + PartialEq;
    /// What `execute` tells `settle` about why it changed keys.
    type Note: fmt::Debug;
    /// What is pushed to a session.
    type Event: fmt::Debug + Clone + PartialEq;
    /// A question answered from state without changing it.
    type Query: fmt::Debug;
    /// The answer to a query.
    type Answer: fmt::Debug + Clone + PartialEq;

    /// The index for a keyspace, made from its keys alone. The result must equal
    /// the index that incremental updates led to.
    fn rebuild(keyspace: &Keyspace) -> Self;

    /// Decodes a command. `None` for anything this version does not know in
    /// full, unknown fields included: the node then stops.
    fn decode(bytes: Bytes) -> Option<Self::Command>;

    /// The session on whose behalf a command runs, and what makes it safe to
    /// repeat. Core sees to it that a numbered command runs at most once.
    fn request(command: &Self::Command) -> Option<(SessionId, &Request)>;

    /// The answer to a numbered command in few bytes, to be kept.
    fn keep(answer: &Result<Self::Reply, Self::Rejection>) -> Bytes;

    /// The answer that was kept.
    fn recall(kept: &Bytes) -> Result<Self::Reply, Self::Rejection>;

    /// Runs a command against `context`. On `Err` nothing of it remains.
    fn execute(
        &self,
        context: &mut Context<'_>,
        command: Self::Command,
    ) -> Result<Executed<Self>, Self::Rejection>;

    /// Whether nobody gains if this command runs at once, and not with the next that comes
    /// from any client, soon. Only a leader asks, of what it has applied: it may be wrong,
    /// which costs `limits::UNHURRIED_WITHIN_US` and nothing else.
    fn can_wait(&self, _state: View<'_>, _command: &Self::Command) -> bool {
        false
    }

    /// Whether a request may wait at a place that `settle` says is decided. If not, a member
    /// that applies it later is told of it later.
    fn may_be_awaited(_place: &Place) -> bool {
        true
    }

    /// When the next timer is due, in log time.
    fn next_due(&self) -> Option<LogTime>;

    /// Runs the first due timer. Called only while `next_due` has passed; must
    /// move it on.
    fn fire(&self, context: &mut Context<'_>) -> Self::Note;

    /// The value with which a key stays when the session that it is bound to ends,
    /// bound to none from then on. `None`: it goes with the session.
    fn outlives(&self, record: &Record, reason: EndReason, now: LogTime) -> Option<Bytes>;

    /// Withdraws what a session waits for by another number than these.
    fn withdraw(&self, context: &mut Context<'_>, session: SessionId, wanted: &[u64]);

    /// What a session has and waits for.
    fn holdings(&self, state: View<'_>, session: SessionId) -> Self::Answer;

    /// Adds to the writes of a transaction on plain keys what has to change with them.
    fn follow(&self, overlay: &mut Overlay<'_>);

    /// Takes note of changed keys, and says what follows from them.
    fn settle(&mut self, changes: &[Change], cause: Cause<'_, Self::Note>) -> Settled<Self>;

    /// Answers a query, in bounded time.
    fn query(&self, state: View<'_>, query: Self::Query) -> Self::Answer;

    /// What it took to find an answer, in looks at a key.
    fn work(answer: &Self::Answer) -> usize;
}

/// What `execute` made of a command.
#[derive(Debug)]
pub struct Executed<M: Machine> {
    /// The result, now or later.
    pub outcome: Outcome<M::Reply>,
    /// Passed on to `settle`.
    pub note: M::Note,
}

/// A result, now or later.
#[derive(Debug)]
pub enum Outcome<R> {
    /// The command is done.
    Done(R),
    /// The answer comes when `settle` resolves this place, which may be in this
    /// very command.
    Waiting(Place),
}

/// Why keys changed.
#[derive(Debug)]
pub enum Cause<'a, N> {
    /// A transaction on plain keys.
    Txn,
    /// A session ended.
    SessionEnded(EndReason),
    /// A client attached to its session, and wants this no more.
    Unwanted,
    /// A command or timer of the machine.
    Machine(&'a N),
}

/// What follows from changed keys.
#[derive(Debug)]
pub struct Settled<M: Machine> {
    /// Places whose waiting is over.
    pub resolved: Vec<Resolved<M>>,
    /// What sessions are told.
    pub events: Vec<(SessionId, M::Event)>,
}

/// The end of a wait: which place, and what came of it.
pub type Resolved<M> = (
    Place,
    Result<<M as Machine>::Reply, <M as Machine>::Rejection>,
);

impl<M: Machine> Default for Settled<M> {
    fn default() -> Self {
        Self {
            resolved: Vec::new(),
            events: Vec::new(),
        }
    }
}

/// What a query sees.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The keys.
    pub keyspace: &'a Keyspace,
    /// The live sessions.
    pub sessions: &'a Sessions,
    /// The rest of the replicated state.
    pub system: &'a System,
}

/// What a command reads and writes. All writes are kept or dropped together.
#[derive(Debug)]
pub struct Context<'a> {
    /// The keys, with this command's writes on top.
    pub overlay: Overlay<'a>,
    state: View<'a>,
    staged: Staged,
}

/// Writes of a command beside keys.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    pub(crate) answered: Option<(SessionId, u64, Bytes)>,
    pub(crate) forced: Option<ForcedRelease>,
    pub(crate) gives_back: bool,
}

impl<'a> Context<'a> {
    pub(crate) fn new(state: View<'a>) -> Self {
        Self {
            overlay: state.keyspace.overlay(),
            state,
            staged: Staged::default(),
        }
    }

    pub(crate) fn into_parts(self) -> (Writes, Staged) {
        (self.overlay.into_writes(), self.staged)
    }

    /// Log time of the entry that is applied.
    pub fn now(&self) -> LogTime {
        self.state.system.log_time()
    }

    /// A live session, or why there is none.
    pub fn session(&self, id: SessionId) -> Result<&'a Session, EndReason> {
        self.state
            .sessions
            .get(id)
            .ok_or_else(|| self.state.system.end_reason(id))
    }

    /// The forced release of a grant, if it is still on record.
    pub fn forced_release(&self, token: Revision) -> Option<&'a ForcedRelease> {
        self.state.system.forced_release(token)
    }

    /// How a numbered request of a live session stands.
    pub fn standing(&self, session: SessionId, number: u64) -> Option<Standing<'a>> {
        let session = self.state.sessions.get(session)?;
        Some(session.requests.standing(number))
    }

    /// Gives a numbered request that has not arrived yet this answer, so that it
    /// never runs. False if there is no room to note that.
    pub fn forestall(&mut self, session: SessionId, number: u64, answer: Bytes) -> bool {
        let live = self.state.sessions.get(session);
        let has_room = live.is_some_and(|live| live.requests.has_room_for(number));
        if has_room {
            self.staged.answered = Some((session, number, answer));
        }
        has_room
    }

    /// Says that the command gives something back, and so runs above the quota
    /// although it writes.
    pub fn gives_back(&mut self) {
        self.staged.gives_back = true;
    }

    /// Puts a forced release on record, for the victim that was not listening.
    pub fn record_forced_release(&mut self, record: ForcedRelease) {
        self.staged.forced = Some(record);
    }
}
