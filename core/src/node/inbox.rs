//! What has arrived for a node and waits for its next turn, by urgency. Every queue is
//! bounded: what does not fit is refused at once, or, if a peer sent it, dropped.

use std::mem;

use conclave_proto::internal::command;
use prost::Message as _;

use super::{Responder, Shared, unpoisoned};
use crate::{
    ids::{Attachment, NodeId, Revision, SessionId},
    limits,
    machine::Machine,
    replica::{Failure, Input, Query},
    watch,
};

/// What has arrived, by urgency.
pub(super) struct Inbox<M: Machine> {
    pub(super) peers: Vec<Input<M>>,
    peer_bytes: usize,
    pub(super) renewals: Queue<Attachment, Responder<M>>,
    pub(super) endings: Queue<command::Body, Responder<M>>,
    pub(super) work: Queue<Request<M>, Responder<M>>,
    pub(super) watches: Queue<watch::Request, ()>,
    pub(super) hand_over: Option<NodeId>,
    pub(super) stopping: bool,
}

/// Requests that wait, the oldest first, within bounds on their number and bytes; each
/// with whom to answer.
pub(super) struct Queue<T, R> {
    waiting: Vec<(T, usize, R)>,
    bytes: usize,
}

/// What a client of this node asks for.
pub(super) enum Request<M: Machine> {
    Command(command::Body),
    Ending(command::Body),
    Read(Query<M>),
    LocalRead(Query<M>),
    Renew(Attachment),
    TimeLeft(SessionId),
    Hash(Option<Revision>),
}

/// What one turn took.
pub(super) struct Taken<M: Machine> {
    pub(super) inbox: Inbox<M>,
    /// The next turn is to follow at once: nobody wakes for what lies there already.
    pub(super) is_more_left: bool,
}

impl<M: Machine> Default for Inbox<M> {
    fn default() -> Self {
        Self {
            peers: Vec::new(),
            peer_bytes: 0,
            renewals: Queue::default(),
            endings: Queue::default(),
            work: Queue::default(),
            watches: Queue::default(),
            hand_over: None,
            stopping: false,
        }
    }
}

impl<M: Machine> Inbox<M> {
    pub(super) fn is_empty(&self) -> bool {
        self.peers.is_empty()
            && self.renewals.is_empty()
            && self.endings.is_empty()
            && self.work.is_empty()
            && self.watches.is_empty()
    }
}

impl<T, R> Default for Queue<T, R> {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            bytes: 0,
        }
    }
}

impl<T, R> Queue<T, R> {
    /// Adds a request of so many bytes, if there is room: for `max` in all.
    fn put(&mut self, request: T, bytes: usize, respond: R, max: usize) -> Result<(), Failure> {
        if self.waiting.len() >= max || self.bytes + bytes > limits::QUEUED_BYTES_MAX {
            return Err(Failure::Overloaded);
        }
        self.bytes += bytes;
        self.waiting.push((request, bytes, respond));
        Ok(())
    }

    /// Splits the first `max` off.
    fn take(&mut self, max: usize) -> Self {
        let rest = self.waiting.split_off(max.min(self.waiting.len()));
        let waiting = mem::replace(&mut self.waiting, rest);
        let bytes = waiting.iter().map(|(_, bytes, _)| bytes).sum();
        self.bytes -= bytes;
        Self { waiting, bytes }
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn into_iter(self) -> impl Iterator<Item = (T, R)> {
        let waiting = self.waiting.into_iter();
        waiting.map(|(request, _, respond)| (request, respond))
    }
}

impl<M: Machine> Shared<M> {
    pub(super) fn request(
        &self,
        request: Request<M>,
        respond: Responder<M>,
    ) -> Result<(), Failure> {
        let mut inbox = unpoisoned(self.inbox.lock());
        if inbox.stopping {
            return Err(Failure::ShuttingDown);
        }
        let was_empty = inbox.is_empty();
        let bytes = match &request {
            Request::Command(body) | Request::Ending(body) => body.encoded_len(),
            Request::Read(_)
            | Request::LocalRead(_)
            | Request::Renew(_)
            | Request::TimeLeft(_)
            | Request::Hash(_) => 0,
        };
        match request {
            Request::Renew(of) => {
                let max = limits::QUEUED_RENEWALS_MAX;
                inbox.renewals.put(of, bytes, respond, max)?;
            }
            Request::Ending(body) => {
                let max = limits::QUEUED_ENDINGS_MAX;
                inbox.endings.put(body, bytes, respond, max)?;
            }
            Request::Command(_)
            | Request::Read(_)
            | Request::LocalRead(_)
            | Request::TimeLeft(_)
            | Request::Hash(_) => {
                let max = limits::QUEUED_REQUESTS_MAX;
                inbox.work.put(request, bytes, respond, max)?;
            }
        }
        drop(inbox);
        self.wake_if(was_empty);
        Ok(())
    }

    pub(super) fn watch(&self, request: watch::Request) -> Result<(), Failure> {
        let mut inbox = unpoisoned(self.inbox.lock());
        if inbox.stopping {
            return Err(Failure::ShuttingDown);
        }
        let was_empty = inbox.is_empty();
        let (bytes, max) = match &request {
            watch::Request::Create { of, .. } => (of.range.bytes(), limits::QUEUED_WATCHES_MAX),
            watch::Request::Progress { .. } | watch::Request::ProgressOf { .. } => {
                (0, limits::QUEUED_WATCHES_MAX)
            }
            // They give something back, and are no more than there are of the others.
            watch::Request::Cancel { .. }
            | watch::Request::Consumed { .. }
            | watch::Request::Close { .. } => (0, usize::MAX),
        };
        inbox.watches.put(request, bytes, (), max)?;
        drop(inbox);
        self.wake_if(was_empty);
        Ok(())
    }

    pub(super) fn peer(&self, inputs: impl IntoIterator<Item = Input<M>>) {
        let mut inbox = unpoisoned(self.inbox.lock());
        let was_empty = inbox.is_empty();
        for input in inputs {
            let bytes = match &input {
                Input::Peer { message, .. } => message.encoded_len(),
                _ => 0,
            };
            if inbox.peers.len() < limits::QUEUED_PEER_MESSAGES_MAX
                && inbox.peer_bytes + bytes <= limits::QUEUED_PEER_BYTES_MAX
            {
                inbox.peer_bytes += bytes;
                inbox.peers.push(input);
            }
        }
        drop(inbox);
        self.wake_if(was_empty);
    }

    /// Only the first that arrives after a turn began wakes, and after the lock is
    /// free, or the node would run into it.
    fn wake_if(&self, was_empty: bool) {
        if was_empty {
            (self.wake)();
        }
    }

    /// Takes what there is, as much of it as one turn bears. The oldest of what is
    /// left stays the first.
    pub(super) fn take(&self) -> Taken<M> {
        let mut inbox = unpoisoned(self.inbox.lock());
        let stopping = inbox.stopping;
        let taken = Inbox {
            peers: mem::take(&mut inbox.peers),
            peer_bytes: mem::take(&mut inbox.peer_bytes),
            renewals: inbox.renewals.take(limits::RENEWALS_PER_TURN_MAX),
            endings: inbox.endings.take(limits::REQUESTS_PER_TURN_MAX),
            work: inbox.work.take(limits::REQUESTS_PER_TURN_MAX),
            watches: inbox.watches.take(limits::REQUESTS_PER_TURN_MAX),
            hand_over: inbox.hand_over.take(),
            stopping,
        };
        Taken {
            inbox: taken,
            is_more_left: !inbox.is_empty(),
        }
    }

    /// Takes everything, and lets nothing in any more.
    pub(super) fn close(&self) -> Inbox<M> {
        let mut inbox = unpoisoned(self.inbox.lock());
        let rest = mem::take(&mut *inbox);
        inbox.stopping = true;
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_full_by_number_or_by_bytes_until_some_are_taken() {
        let mut queue = Queue::default();
        let half = limits::QUEUED_BYTES_MAX / 2;
        queue.put(1, half, (), 3).unwrap();
        queue.put(2, half, (), 3).unwrap();
        assert_eq!(queue.put(3, 1, (), 3), Err(Failure::Overloaded));
        assert!(queue.take(1).into_iter().eq([(1, ())]));
        queue.put(3, 1, (), 3).unwrap();
        queue.put(4, 1, (), 3).unwrap();
        assert_eq!(queue.put(5, 1, (), 3), Err(Failure::Overloaded));
        assert!(queue.take(9).into_iter().eq([(2, ()), (3, ()), (4, ())]));
        assert_eq!(queue.bytes, 0);
    }
}
