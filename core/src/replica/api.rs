//! What goes into a replica and what comes out of it.

use bytes::Bytes;
use conclave_proto::internal::{Compare, PeerMessage, command};

use super::{compaction::Retention, install::Fetch};
use crate::{
    ids::{Attachment, Index, NodeId, RequestNumber, Revision, SessionId, Term},
    keyspace::{
        Filter, Hashed, KeyRange, Piece, RevisionError,
        txn::{OperationReply, TxnError, TxnReply},
    },
    log::Batch,
    machine::Machine,
    requests::NotRun,
    session::{EndReason, Face},
    state::State,
    watch,
};

/// The clocks, read by the driver at the start of each turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// CLOCK_BOOTTIME in microseconds: goes on during suspend, is never set.
    pub boot_us: u64,
    /// The date, in milliseconds since 1970. For display only.
    pub date_ms: u64,
}

/// How a replica takes part.
#[derive(Clone, Debug)]
pub struct Config {
    /// This member.
    pub node: NodeId,
    /// A random number for this start of the process.
    pub boot: u64,
    /// From which election timeouts are drawn.
    pub seed: u64,
    /// Between two heartbeats of the leader, in milliseconds.
    pub heartbeat_ms: u64,
    /// Without a heartbeat for this long, and up to twice as long, a follower campaigns.
    pub election_ms: u64,
    /// This member's name, told to the others.
    pub name: String,
    /// Where clients reach this member, told to the others.
    pub client_urls: Vec<String>,
    /// What automatic compaction keeps while this member leads; `None`: all.
    pub retention: Option<Retention>,
    /// The size of the state above which this member, while it leads, raises the
    /// alarm NOSPACE, in bytes by [`crate::state::State::bytes`].
    pub quota_bytes: u64,
    /// Bytes of events that may wait for one stream of watchers; see [`watch::Hub`].
    pub watch_queue_bytes: u64,
}

/// What a turn takes in.
#[derive(Debug)]
pub enum Input<M: Machine> {
    /// From another member. May be lost, doubled, late and out of order.
    Peer {
        /// The sender, as the transport has verified it.
        from: NodeId,
        /// What it says.
        message: PeerMessage,
    },
    /// The connection to a member broke.
    PeerLost {
        /// Which member.
        peer: NodeId,
    },
    /// A command of a client of this node.
    Command {
        /// Names the answer.
        number: RequestNumber,
        /// What to do.
        body: command::Body,
    },
    /// A linearizable read for a client of this node.
    Read {
        /// Names the answer.
        number: RequestNumber,
        /// What to answer.
        query: Query<M>,
    },
    /// A read of what this node has applied, which may be less than what is committed:
    /// it asks nobody. Answered in this turn, but for `Query::Swept`.
    LocalRead {
        /// Names the answer.
        number: RequestNumber,
        /// What to answer.
        query: Query<M>,
    },
    /// A renewal of a client of this node.
    Renew {
        /// Names the answer.
        number: RequestNumber,
        /// Which session, and on behalf of which attachment; one that is older than
        /// the present one renews nothing.
        of: Attachment,
    },
    /// Of a reader of events of this node.
    Watch(watch::Request),
    /// A client of this node asks how long a session has left, which only the leader
    /// knows.
    TimeLeft {
        /// Names the answer.
        number: RequestNumber,
        /// Which session.
        session: SessionId,
    },
    /// A hash over keys is asked of this node alone, as it stands.
    Hash {
        /// Names the answer.
        number: RequestNumber,
        /// As of when; `None` for now.
        revision: Option<Revision>,
    },
    /// What became of a [`Fetch`]: the state of a checkpoint that is durable and
    /// verified, or nothing.
    Fetched(Option<Box<State<M>>>),
    /// Hand leadership over, if this node has it.
    Resign,
    /// Hand leadership over to this member, if this node has it.
    HandOver(NodeId),
}

/// A question.
#[derive(Debug)]
pub enum Query<M: Machine> {
    /// Nothing but the confirmation.
    Barrier,
    /// A session, or why there is none.
    Session(SessionId),
    /// Live sessions, in order of id.
    Sessions {
        /// Only those behind this one; `None` from the first on.
        after: Option<SessionId>,
        /// At most so many.
        limit: usize,
    },
    /// The ids of all live sessions.
    SessionIds,
    /// The keys that are bound to a session.
    KeysOf(SessionId),
    /// The members that raised the alarm NOSPACE.
    Alarms,
    /// Keys, now or at an earlier revision: as much of them as one turn bears.
    Range {
        /// Which keys.
        range: KeyRange,
        /// As of when; `None` for now.
        revision: Option<Revision>,
        /// Which records are given.
        filter: Filter,
        /// At most so many, from the first on.
        limit: usize,
    },
    /// Whether all of these hold, as for a transaction.
    Compare(Vec<Compare>),
    /// Answered when what compactions up to this revision have given up is dropped, or
    /// when that takes too long.
    Swept(Revision),
    /// A question for the machine.
    Machine(M::Query),
}

/// What a request led to.
#[derive(Debug)]
pub struct Answer<M: Machine> {
    /// The revision of the keyspace when it was made.
    pub revision: Revision,
    /// The term then.
    pub term: Term,
    /// The result.
    pub body: AnswerBody<M>,
}

/// See [`Answer`].
#[derive(Debug)]
pub enum AnswerBody<M: Machine> {
    /// To `Query::Barrier`, and to commands that only succeed.
    Done,
    /// A session was opened.
    SessionOpened {
        /// Its id.
        session: SessionId,
        /// Its TTL, within the limits.
        ttl_ms: u64,
    },
    /// The id that was chosen for a session is that of a live one.
    SessionExists,
    /// A client attached to its session, or asked how that stands.
    SessionAttached {
        /// The present attachment.
        attachment: u64,
        /// The highest number that any request of the session has had.
        last_request: u64,
        /// The TTL of the session. Attaching does not renew it.
        ttl_ms: u64,
        /// What it has and waits for.
        holdings: M::Answer,
    },
    /// A session was renewed.
    Renewed {
        /// How long it lives from when the renewal was sent, at least.
        ttl_ms: u64,
    },
    /// To `Input::TimeLeft`: the session lives.
    TimeLeft {
        /// Its TTL.
        ttl_ms: u64,
        /// Until it expires, if nobody renews it.
        left_ms: u64,
    },
    /// The session named is not alive.
    SessionEnded(EndReason),
    /// It was not run, for what is known of its session's requests.
    NotRun(NotRun),
    /// To `Query::Session`: it lives.
    Session(Face),
    /// To `Query::Sessions`.
    Sessions {
        /// The newest log time, to tell ages.
        log_time_ms: u64,
        /// In order of id.
        sessions: Vec<(SessionId, Face)>,
        /// Whether there are more behind the last one.
        more: bool,
    },
    /// To `Query::SessionIds`, in order.
    SessionIds(Vec<SessionId>),
    /// To `Query::KeysOf`, in order.
    Keys(Vec<Bytes>),
    /// To `Query::Alarms`: for which members it is raised; to an alarm: for which of
    /// them it was changed, or was raised before.
    Alarms(Vec<NodeId>),
    /// To `Input::Hash`.
    Hashed(Result<Hashed, RevisionError>),
    /// To `Query::Range`; of the revision that was asked for, or of [`Answer::revision`].
    Range(Result<Piece, RevisionError>),
    /// To `Query::Compare`.
    Compared(Result<bool, TxnError>),
    /// Of a compaction by request.
    Compacted(Result<(), RevisionError>),
    /// Refused, because it would grow a state that is at its quota.
    NoSpace,
    /// Of a transaction.
    Txn(Result<TxnReply, TxnError>),
    /// Of a put or a delete.
    Operation(Result<OperationReply, TxnError>),
    /// Of a machine's command.
    Machine(Result<M::Reply, M::Rejection>),
    /// To `Query::Machine`.
    Query(M::Answer),
}

impl<M: Machine> AnswerBody<M> {
    /// Whether it says that a command changed nothing.
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::SessionEnded(_)
                | Self::NotRun(_)
                | Self::NoSpace
                | Self::SessionExists
                | Self::Compacted(Err(_))
                | Self::Txn(Err(_))
                | Self::Operation(Err(_))
                | Self::Machine(Err(_))
        )
    }
}

/// Why this attempt has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// This node does not lead and could not pass the request on. Certainly not
    /// applied.
    #[error("no leader to serve the request")]
    NotLeader {
        /// Who leads, as far as is known.
        leader: Option<NodeId>,
    },
    /// A queue is full. Certainly not applied.
    #[error("too many requests")]
    Overloaded,
    /// The leader, the connection to it or its term was lost meanwhile. It may
    /// have been applied, or may yet be.
    #[error("the outcome is unknown")]
    OutcomeUnknown,
    /// The node is stopping. Certainly not applied.
    #[error("the server is stopping")]
    ShuttingDown,
}

impl Failure {
    /// Whether the request may have been, or may yet be, applied.
    pub fn may_have_applied(self) -> bool {
        matches!(self, Self::OutcomeUnknown)
    }
}

/// Something a session is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<E> {
    /// Whom it concerns.
    pub session: SessionId,
    /// The revision of the change.
    pub revision: Revision,
    /// What happened.
    pub body: EventBody<E>,
}

/// See [`Event`].
#[derive(Clone, Debug, PartialEq)]
pub enum EventBody<E> {
    /// The session ended.
    SessionEnded(EndReason),
    /// A client attached to it; all older attachments are over.
    SessionAttached {
        /// The present attachment.
        attachment: u64,
    },
    /// Of the machine.
    Machine(E),
}

/// What leaves in the first half of a turn, before anything is synced.
#[derive(Debug, Default)]
pub struct Begun {
    /// May be sent at once.
    pub messages: Vec<(NodeId, PeerMessage)>,
    /// Must be made durable in its turn; then [`Replica::saved`](super::Replica::saved)
    /// is to be called. Batches are numbered from 1 in the order in which they are given.
    pub batch: Option<Batch>,
}

/// What leaves in the second half of a turn.
#[derive(Debug)]
pub struct Finished<M: Machine> {
    /// To be sent.
    pub messages: Vec<(NodeId, PeerMessage)>,
    /// To this node's clients.
    pub answers: Vec<(RequestNumber, Result<Answer<M>, Failure>)>,
    /// To sessions, in order; each node sees the same ones, unless it installs a
    /// checkpoint.
    pub events: Vec<Event<M::Event>>,
    /// To this node's readers of events, in order.
    pub notices: watch::Notices,
    /// Get a checkpoint of another member; the outcome is [`Input::Fetched`], once.
    pub fetch: Option<Fetch>,
    /// The state of the checkpoint that was fetched last, up to this entry, is now that
    /// of this member, and its log begins there or goes on. It is to be kept like its
    /// own. Events before those given here were missed: whoever listens must ask again.
    pub installed: Option<Index>,
}

impl<M: Machine> Default for Finished<M> {
    fn default() -> Self {
        Self {
            messages: Vec::new(),
            answers: Vec::new(),
            events: Vec::new(),
            notices: Vec::new(),
            fetch: None,
            installed: None,
        }
    }
}

/// A reason to stop this node for good.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The disk failed, or holds what cannot be trusted.
    #[error("storage: {0}")]
    Storage(String),
    /// Another directory is known under this member's id.
    #[error(
        "member {node} is known to the cluster with another data directory; \
         restore that directory (this version cannot yet replace a member)"
    )]
    Replaced {
        /// This member.
        node: NodeId,
    },
    /// This member's state is another than a majority's after the same entries.
    #[error(
        "member {node} holds another state than a majority after entry {index}; start it again, \
         and it makes its state anew; if it stops again, keep its directory, leave it stopped, \
         and report it"
    )]
    Diverged {
        /// This member.
        node: NodeId,
        /// Up to where entries were applied.
        index: Index,
    },
    /// The log holds what this version does not know in full.
    #[error("entry {index} was written by a newer version: {what}")]
    Unknown {
        /// Where.
        index: Index,
        /// What was not understood.
        what: String,
    },
}
