//! The stream on which the cluster tells what happens to the sessions of a
//! client. There is one stream a client; it is reopened when it breaks, and
//! each session's grants are compared then.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};

use conclave_proto::v1::{
    self, SessionEvent, WatchSessionsRequest, session_client::SessionClient, session_event::Event,
};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;

use crate::{
    error::Failure,
    session::Core,
    session_state::LossReason,
    transport::{ATTEMPT_TIMEOUT, Backoff, Transport},
};

/// How often the stream is moved if the client talks to another server now,
/// or closed if no session is left.
const LOOK_AROUND: Duration = Duration::from_secs(1);

/// The sessions that are followed.
#[derive(Debug, Default)]
pub(crate) struct Events {
    following: Mutex<Following>,
}

#[derive(Debug, Default)]
struct Following {
    sessions: BTreeMap<i64, Weak<Core>>,
    /// The open stream's own requests.
    requests: Option<mpsc::UnboundedSender<WatchSessionsRequest>>,
    is_running: bool,
}

impl Events {
    /// Follows a session until it is removed.
    pub(crate) fn add(self: &Arc<Self>, transport: &Arc<Transport>, core: &Arc<Core>) {
        let mut following = self.following();
        following.sessions.insert(core.id(), Arc::downgrade(core));
        if let Some(requests) = &following.requests
            && requests.send(core.watch_request()).is_err()
        {
            tracing::trace!("the stream has just ended; the next one asks for all");
        }
        if !following.is_running {
            following.is_running = true;
            let events = Arc::clone(self);
            transport.runtime().spawn(events.run(Arc::clone(transport)));
        }
    }

    /// The session is over for this attachment.
    pub(crate) fn remove(&self, core: &Arc<Core>) {
        let mut following = self.following();
        let sessions = &mut following.sessions;
        if let Entry::Occupied(followed) = sessions.entry(core.id())
            && followed.get().as_ptr() == Arc::as_ptr(core)
        {
            followed.remove();
        }
    }

    async fn run(self: Arc<Self>, transport: Arc<Transport>) {
        let mut backoff = Backoff::default();
        while let Some(requests) = self.requests_of_new_stream() {
            let (index, channel) = transport.server();
            let client = SessionClient::new(channel);
            let streamed = self.stream(&transport, index, client, requests, &mut backoff);
            let Err(status) = streamed.await else {
                backoff = Backoff::default();
                continue;
            };
            let failure = Failure::from(status);
            tracing::debug!(?failure, "the stream of session events broke");
            let moved = transport.note_failure(index, &failure);
            backoff.pause(moved).await;
        }
    }

    /// Reads one stream to its end; pauses begin anew once it has told something. `Ok`: it was left because there is a
    /// better server or nothing to follow.
    async fn stream(
        &self,
        transport: &Transport,
        index: usize,
        mut client: SessionClient<tonic::transport::Channel>,
        requests: mpsc::UnboundedReceiver<WatchSessionsRequest>,
        backoff: &mut Backoff,
    ) -> Result<(), Status> {
        let opening = client.watch(UnboundedReceiverStream::new(requests));
        let opened = timeout(ATTEMPT_TIMEOUT, opening).await;
        let opened = opened.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
        let mut events = opened?.into_inner();
        loop {
            tokio::select! {
                event = events.message() => match event? {
                    Some(event) => {
                        *backoff = Backoff::default();
                        self.deliver(event);
                    }
                    None => return Err(Status::unavailable("the server ended the stream")),
                },
                () = sleep(LOOK_AROUND) => {
                    if !transport.is_current(index) || self.following().sessions.is_empty() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// The requests for a new stream, beginning with all sessions; `None` if
    /// there are none, and then the task must end.
    fn requests_of_new_stream(&self) -> Option<mpsc::UnboundedReceiver<WatchSessionsRequest>> {
        let mut following = self.following();
        if following.sessions.is_empty() {
            following.requests = None;
            following.is_running = false;
            return None;
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        for core in following.sessions.values().filter_map(Weak::upgrade) {
            sender
                .send(core.watch_request())
                .expect("the receiver is alive: it is returned below");
        }
        following.requests = Some(sender);
        Some(receiver)
    }

    fn deliver(&self, event: SessionEvent) {
        let core = self
            .following()
            .sessions
            .get(&event.session_id)
            .and_then(Weak::upgrade);
        let (Some(core), Some(what)) = (core, event.event) else {
            return;
        };
        match what {
            Event::Attached(attached) => {
                // First, so that these losses get their reason.
                for lost in attached.forced {
                    deliver_loss(&core, lost);
                }
                let tokens = attached.grants.iter().map(|grant| grant.token);
                core.attached(event.revision, tokens.collect::<BTreeSet<u64>>());
            }
            // Told to an attachment before ours.
            Event::Ended(ended) if (1..=core.attachment()).contains(&ended.attachment) => {}
            Event::Ended(ended) => core.ended(loss_reason(ended.reason(), String::new())),
            Event::GrantLost(lost) => deliver_loss(&core, lost),
        }
    }

    fn following(&self) -> MutexGuard<'_, Following> {
        self.following
            .lock()
            .expect("no panic while the sessions are locked")
    }
}

fn deliver_loss(core: &Core, lost: v1::GrantLost) {
    let reason = loss_reason(lost.reason(), lost.detail);
    if let Some(grant) = lost.grant {
        core.grant_lost(grant.token, reason);
    }
}

fn loss_reason(reason: v1::LossReason, detail: String) -> LossReason {
    match reason {
        v1::LossReason::SessionExpired => LossReason::SessionExpired,
        v1::LossReason::SessionClosed => LossReason::SessionClosed,
        v1::LossReason::Revoked => LossReason::Revoked,
        v1::LossReason::Forced => LossReason::Forced { reason: detail },
        v1::LossReason::Superseded => LossReason::Superseded,
        // Of a reason that this version does not know, the deletion of the key
        // is what is certain.
        v1::LossReason::KeyDeleted | v1::LossReason::Unspecified => LossReason::KeyDeleted,
    }
}
