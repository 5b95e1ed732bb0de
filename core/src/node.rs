//! The loop thread that drives a [`Replica`](crate::replica::Replica).

use std::{sync::Arc, thread::JoinHandle};

use conclave_proto::internal::{PeerMessage, command};

use crate::{
    disk::Disk,
    ids::{NodeId, SessionId},
    log::{Log, Recovered},
    machine::Machine,
    replica::{Answer, Config, Event, Failure, Fatal, Query, Status},
};

/// Called once with the outcome of a request, on the loop thread; must not block.
pub type Responder<M> = Box<dyn FnOnce(Result<Answer<M>, Failure>) + Send>;

/// Where the loop thread sends what leaves it. Called on that thread; must not
/// block.
pub struct Outlets<M: Machine> {
    /// Sends to peers; may drop what it cannot send.
    pub send: Box<dyn FnMut(Vec<(NodeId, PeerMessage)>) + Send>,
    /// Tells sessions; each call brings events in order, after the answers of the
    /// same turn have been given.
    pub publish: Box<dyn FnMut(Vec<Event<M::Event>>) + Send>,
}

/// Starts the loop thread over an open log. The thread ends after
/// [`Handle::stop`], or with the reason why it cannot go on.
pub fn start<M, D>(
    config: Config,
    log: Log<D>,
    recovered: Recovered,
    outlets: Outlets<M>,
) -> (Handle<M>, JoinHandle<Result<(), Fatal>>)
where
    M: Machine + 'static,
    D: Disk + Send + 'static,
{
    todo!()
}

/// How the rest of the process talks to the loop thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle<M: Machine> {
    _machine: std::marker::PhantomData<M>,
}

impl<M: Machine> Handle<M> {
    /// Hands a command over; `respond` is called exactly once, at once if the queue is full.
    pub fn command(&self, body: command::Body, respond: Responder<M>) { todo!() }
    /// Asks a linearizable question.
    pub fn read(&self, query: Query<M>, respond: Responder<M>) { todo!() }
    /// Renews a session.
    pub fn renew(&self, session: SessionId, respond: Responder<M>) { todo!() }
    /// Hands over what a peer sent. Dropped if too much is waiting, as a network would.
    pub fn peer(&self, from: NodeId, message: PeerMessage) { todo!() }
    /// Says that the connection to a peer broke.
    pub fn peer_lost(&self, peer: NodeId) { todo!() }
    /// What the node knows of itself, as of its last turn.
    pub fn status(&self) -> Arc<Status> { todo!() }
    /// Hands leadership over if this node has it, refuses new work, and ends the loop.
    pub fn stop(&self) { todo!() }
}
