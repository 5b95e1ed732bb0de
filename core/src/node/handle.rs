//! How the rest of the process talks to a node: requests go into the inbox, what the
//! node says of itself is read beside it. Every request that is taken is answered once.

use std::{
    fmt,
    sync::{Arc, Mutex, atomic::Ordering},
};

use conclave_proto::internal::{PeerMessage, command};

use super::{Responder, Shared, inbox::Request, unpoisoned};
use crate::{
    ids::{Attachment, Index, NodeId, Revision, SessionId},
    machine::Machine,
    replica::{Failure, Input, Query, Status},
    watch,
};

/// How the rest of the process talks to the node. Cheap to clone.
pub struct Handle<M: Machine> {
    pub(super) shared: Arc<Shared<M>>,
}

impl<M: Machine> Clone for Handle<M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<M: Machine> fmt::Debug for Handle<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

impl<M: Machine> Handle<M> {
    /// Hands a command over. `respond` is called exactly once, on the node's thread.
    ///
    /// # Errors
    ///
    /// If the queue is full or the node is stopping; then `respond` is not called.
    pub fn command(&self, body: command::Body, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Command(body), respond)
    }

    /// Hands over a command that gives something back: a release, a cancel, the end
    /// of a session. It goes ahead of other work that has arrived, and overload with
    /// that does not refuse it; otherwise as [`Handle::command`].
    pub fn ending(&self, body: command::Body, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Ending(body), respond)
    }

    /// Asks a linearizable question; otherwise as [`Handle::command`].
    pub fn read(&self, query: Query<M>, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Read(query), respond)
    }

    /// Asks what this node has applied, without a word to others; otherwise as
    /// [`Handle::command`].
    pub fn read_local(&self, query: Query<M>, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::LocalRead(query), respond)
    }

    /// Renews a session for one of its attachments; otherwise as [`Handle::command`].
    pub fn renew(&self, of: Attachment, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Renew(of), respond)
    }

    /// Hands over what a reader of events asks for; it is told by notices.
    ///
    /// # Errors
    ///
    /// If a new watcher or a question is too much at the moment, or the node is
    /// stopping.
    pub fn watch(&self, request: watch::Request) -> Result<(), Failure> {
        self.shared.watch(request)
    }

    /// Asks how long a session has left, which only the leader knows; otherwise as
    /// [`Handle::command`].
    pub fn time_left(&self, session: SessionId, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::TimeLeft(session), respond)
    }

    /// Asks for a hash over all keys as this node has them, at a revision or now;
    /// otherwise as [`Handle::command`].
    pub fn hash(&self, at: Option<Revision>, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Hash(at), respond)
    }

    /// Has leadership handed over to a member, if this one has it. Whether it comes to
    /// that is seen by [`Handle::status`], after one election timeout at most.
    pub fn hand_over(&self, to: NodeId) {
        unpoisoned(self.shared.inbox.lock()).hand_over = Some(to);
        (self.shared.wake)();
    }

    /// Hands over what a peer sent, in one go, so that one turn takes it all.
    /// Dropped if too much is waiting, as a network would.
    pub fn peer(&self, from: NodeId, messages: impl IntoIterator<Item = PeerMessage>) {
        let inputs = messages.into_iter();
        self.shared
            .peer(inputs.map(|message| Input::Peer { from, message }));
    }

    /// Says that the connection to a peer broke.
    pub fn peer_lost(&self, peer: NodeId) {
        self.shared.peer([Input::PeerLost { peer }]);
    }

    /// What the node knows of itself, as of its last turn.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&*unpoisoned(self.shared.status.lock()))
    }

    /// How many checkpoints of other members this one has gone on from, since its start.
    pub fn installs(&self) -> u64 {
        self.shared.installs.load(Ordering::Relaxed)
    }

    /// Bytes of the log on disk.
    pub fn log_bytes(&self) -> u64 {
        self.shared.log_bytes.load(Ordering::Relaxed)
    }

    /// The newest checkpoint that is durable; 0 for none.
    pub fn checkpoint(&self) -> Index {
        self.shared.checkpoint.load(Ordering::Relaxed)
    }

    /// Asks that a checkpoint be made which reaches up to this entry, once that can be.
    pub fn want_checkpoint(&self, at_least: Index) {
        self.shared.wanted.fetch_max(at_least, Ordering::Relaxed);
    }

    /// While what this gives is there, the log is kept behind a checkpoint: another
    /// member is sent it, and will need what follows.
    pub fn keep_log_behind(&self, at: Index) -> Sent {
        let all = Arc::clone(&self.shared.sent);
        unpoisoned(all.lock()).push(at);
        Sent { all, at }
    }

    /// Refuses new work, hands leadership over if this node has it, waits for answers
    /// to what is under way, but for locks, and then stops; after one election timeout
    /// at most.
    pub fn stop(&self) {
        unpoisoned(self.shared.inbox.lock()).stopping = true;
        (self.shared.wake)();
    }
}

/// A checkpoint that another member is sent; see [`Handle::keep_log_behind`].
#[derive(Debug)]
pub struct Sent {
    all: Arc<Mutex<Vec<Index>>>,
    at: Index,
}

impl Drop for Sent {
    fn drop(&mut self) {
        let mut sent = unpoisoned(self.all.lock());
        if let Some(place) = sent.iter().position(|at| *at == self.at) {
            sent.swap_remove(place);
        }
    }
}
