//! What all services share: the way to the replica and back.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use conclave_core::{
    ids::{Attachment, Revision, SessionId, Term},
    limits,
    node::{Handle, Responder},
    replica::{self, AnswerBody, Failure, Query, Status},
};
use conclave_primitives::Primitives;
use conclave_proto::{internal::command, v1};
use tokio::{sync::oneshot, time};
use tonic::{Code, Response};

use crate::{
    etcd::Snapshots,
    events::Hub,
    mailbox::Mailbox,
    metrics::{Counted, Method, Metrics},
    options::Settings,
    peers::Peers,
    readers::{Reader, Readers},
    status::Refusal,
    storage,
};

/// What the replica answers.
pub(crate) type Answer = replica::Answer<Primitives>;

/// A stream that needs a leader ends after so many election timeouts without one.
const TIMEOUTS_WITHOUT_LEADER: u32 = 3;

/// The gateway of one thread. See the module.
#[derive(Debug)]
pub(crate) struct Gateway {
    pub(crate) handle: Handle<Primitives>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) hub: Arc<Hub>,
    readers: Arc<Readers>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) snapshots: Arc<Snapshots>,
    /// Where answers for this thread arrive; somebody must deliver them.
    pub(crate) mailbox: Arc<Mailbox>,
    /// Those of all threads, that of the control thread first.
    mailboxes: Arc<[Arc<Mailbox>]>,
    next_tag: Arc<AtomicU64>,
}

impl Gateway {
    /// The gateway of the control thread, which has the first of the mailboxes.
    pub(crate) fn new(
        handle: Handle<Primitives>,
        settings: Arc<Settings>,
        hub: Arc<Hub>,
        readers: Arc<Readers>,
        peers: Arc<Peers>,
        snapshots: Snapshots,
        mailboxes: Vec<Arc<Mailbox>>,
    ) -> Self {
        Self {
            handle,
            settings,
            hub,
            readers,
            peers,
            metrics: Arc::new(Metrics::new()),
            snapshots: Arc::new(snapshots),
            mailbox: Arc::clone(&mailboxes[0]),
            mailboxes: mailboxes.into(),
            // Keeps the tags of this process apart from those of others.
            next_tag: Arc::new(AtomicU64::new(storage::random())),
        }
    }

    /// The mailboxes of the threads that serve clients.
    pub(crate) fn client_mailboxes(&self) -> impl Iterator<Item = &Arc<Mailbox>> {
        self.mailboxes.iter().skip(1)
    }

    /// The gateway of another thread.
    pub(crate) fn with_mailbox(&self, mailbox: Arc<Mailbox>) -> Self {
        Self {
            handle: self.handle.clone(),
            settings: Arc::clone(&self.settings),
            hub: Arc::clone(&self.hub),
            readers: Arc::clone(&self.readers),
            peers: Arc::clone(&self.peers),
            metrics: Arc::clone(&self.metrics),
            snapshots: Arc::clone(&self.snapshots),
            mailbox,
            mailboxes: Arc::clone(&self.mailboxes),
            next_tag: Arc::clone(&self.next_tag),
        }
    }

    /// A stream of events that this thread serves.
    pub(crate) fn reader(&self) -> Reader {
        Reader::new(&self.readers, self.handle.clone(), &self.mailbox)
    }

    /// A tag for a request to which the client gave no number.
    pub(crate) fn tag(&self) -> u64 {
        self.next_tag.fetch_add(1, Ordering::Relaxed) | (limits::REQUEST_NUMBER_MAX + 1)
    }

    /// Has a command replicated.
    pub(crate) async fn command(&self, body: command::Body) -> Result<Answer, Refusal> {
        self.answered(|respond| self.handle.command(body, respond))
            .await
    }

    /// Has a command replicated that gives something back, ahead of others.
    pub(crate) async fn ending(&self, body: command::Body) -> Result<Answer, Refusal> {
        self.answered(|respond| self.handle.ending(body, respond))
            .await
    }

    /// Asks a linearizable question.
    pub(crate) async fn read(&self, query: Query<Primitives>) -> Result<Answer, Refusal> {
        self.answered(|respond| self.handle.read(query, respond))
            .await
    }

    /// Asks what this member has applied.
    pub(crate) async fn read_local(&self, query: Query<Primitives>) -> Result<Answer, Refusal> {
        self.answered(|respond| self.handle.read_local(query, respond))
            .await
    }

    /// Renews a session for one of its attachments.
    pub(crate) async fn renew(&self, of: Attachment) -> Result<Answer, Refusal> {
        self.answered(|respond| self.handle.renew(of, respond))
            .await
    }

    /// Asks how long a session has left.
    pub(crate) async fn time_left(&self, session: SessionId) -> Result<Answer, Refusal> {
        self.answered(|respond| self.handle.time_left(session, respond))
            .await
    }

    /// Asks for a hash over all keys as this member has them, at a revision or now.
    pub(crate) async fn hash(&self, at: Option<Revision>) -> Result<Answer, Refusal> {
        self.answered(|respond| self.handle.hash(at, respond)).await
    }

    /// Waits for the outcome of a request. If the loop thread ends without having
    /// given one, the request may have been applied.
    async fn answered(
        &self,
        submit: impl FnOnce(Responder<Primitives>) -> Result<(), Failure>,
    ) -> Result<Answer, Refusal> {
        let (sender, receiver) = oneshot::channel();
        let mailbox = Arc::clone(&self.mailbox);
        submit(Box::new(move |outcome| mailbox.put(sender, outcome)))?;
        let outcome = receiver.await.unwrap_or(Err(Failure::OutcomeUnknown));
        match outcome? {
            Answer {
                body: AnswerBody::SessionEnded(end),
                ..
            } => Err(Refusal::SessionEnded(end)),
            Answer {
                body: AnswerBody::NotRun(why),
                ..
            } => Err(Refusal::NotRun(why)),
            Answer {
                body: AnswerBody::Machine(Err(rejection)),
                ..
            } => Err(Refusal::Rejected(rejection)),
            Answer {
                body:
                    AnswerBody::Compacted(Err(error))
                    | AnswerBody::Range(Err(error))
                    | AnswerBody::Hashed(Err(error)),
                ..
            } => Err(Refusal::Revision(error)),
            Answer {
                body: AnswerBody::NoSpace,
                ..
            } => Err(Refusal::NoSpace),
            answer => Ok(answer),
        }
    }

    /// Why a stream ends although its client does not end it: this member stops, or has
    /// lost the leader, if the client wants one to be known as long as the stream lasts.
    pub(crate) async fn is_over(self: Arc<Self>, wants_leader: bool) -> Failure {
        tokio::select! {
            () = self.hub.closed() => Failure::ShuttingDown,
            () = self.leader_is_lost(), if wants_leader => Failure::NotLeader { leader: None },
        }
    }

    /// Ends when no leader was known at each of three looks in a row, an election
    /// timeout apart.
    async fn leader_is_lost(&self) {
        let timeout = Duration::from_millis(self.settings.election_ms);
        let mut without = 0;
        while without < TIMEOUTS_WITHOUT_LEADER {
            time::sleep(timeout).await;
            without = match self.handle.status().leader {
                Some(_) => 0,
                None => without + 1,
            };
        }
    }

    /// The header of an answer made at this revision and term.
    pub(crate) fn header(&self, revision: Revision, term: Term) -> Option<v1::ResponseHeader> {
        let topology = &self.settings.topology;
        Some(v1::ResponseHeader {
            cluster_id: topology.cluster,
            member_id: topology.own().id.0,
            revision,
            term,
            leader_id: self.handle.status().leader.map_or(0, |leader| leader.0),
        })
    }

    /// Runs a call: counts it, and tells the client why it failed.
    pub(crate) async fn serve<T>(
        &self,
        method: Method,
        work: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<Response<T>, tonic::Status> {
        let call = self.metrics.begin(method);
        match work.await {
            Ok(response) => {
                call.end(Code::Ok);
                Ok(Response::new(response))
            }
            Err(refusal) => {
                let status = self.status_of(refusal);
                call.end(status.code());
                Err(status)
            }
        }
    }

    /// Opens a stream: counts it until it ends, and tells the client why it was not opened.
    pub(crate) async fn stream<S>(
        &self,
        method: Method,
        open: impl Future<Output = Result<S, Refusal>>,
    ) -> Result<Response<Counted<S>>, tonic::Status> {
        let call = self.metrics.begin(method);
        match open.await {
            Ok(stream) => Ok(Response::new(call.stream(stream))),
            Err(refusal) => {
                let status = self.status_of(refusal);
                call.end(status.code());
                Err(status)
            }
        }
    }

    /// What a client is told.
    pub(crate) fn status_of(&self, refusal: Refusal) -> tonic::Status {
        if let Refusal::Internal(what) = refusal {
            tracing::error!(what, "a defect: the replica gave an answer of another kind");
        }
        let leader = leader_address(&self.handle.status());
        refusal.into_status(leader.as_deref())
    }
}

/// Where clients reach the leader, if it is known.
fn leader_address(status: &Status) -> Option<String> {
    let leader = status.leader?;
    let (_, _, urls) = status.members.iter().find(|(id, _, _)| *id == leader)?;
    urls.first().cloned()
}

#[cfg(test)]
mod tests {
    use conclave_core::ids::NodeId;

    use super::*;

    #[test]
    fn the_leader_is_named_by_the_address_it_told() {
        let mut status = Status {
            members: Arc::new(vec![(
                NodeId(7),
                "a".to_owned(),
                vec!["http://h:1".to_owned()],
            )]),
            ..Status::default()
        };
        assert_eq!(leader_address(&status), None);
        status.leader = Some(NodeId(8));
        assert_eq!(leader_address(&status), None);
        status.leader = Some(NodeId(7));
        assert_eq!(leader_address(&status).as_deref(), Some("http://h:1"));
    }
}
