//! Event streams: who follows which session, and what each stream is told.
//!
//! The loop thread puts both the answers to a stream's questions and the events
//! of its sessions into one bounded queue. So their order in the queue is the
//! order in which they happened, and "everything after the snapshot" is a
//! comparison of revisions. A reader that lets the queue fill up is cut off: it
//! attaches again and gets a fresh snapshot.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::Ordering},
};

use conclave_core::{
    ids::{Attachment, Revision, SessionId},
    replica::{AnswerBody, Event, EventBody, Failure, Query},
    session::EndReason,
};
use conclave_primitives as primitives;
use conclave_proto::v1::{self, session_event};
use tokio::sync::{
    Notify,
    mpsc::{self, error::TrySendError},
    watch,
};
use tonic::{Status, Streaming};

use crate::{
    convert,
    gateway::{Answer, Gateway},
    status::Refusal,
    validate,
};

/// Notes that wait for one stream. Enough for the end of as many sessions at
/// once, which a client with many sessions sees after a long partition.
const QUEUED_MAX: usize = 16_384;
/// Sessions of one stream whose snapshot is under way.
const ATTACHING_MAX: usize = 1_024;
/// Converted events that wait for the connection.
const BUFFERED: usize = 64;

const _: () = assert!(2 * ATTACHING_MAX < QUEUED_MAX);

/// Which streams follow which session.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    registry: Mutex<Registry>,
    /// Changes under the lock of the registry.
    closed: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Registry {
    followers: BTreeMap<SessionId, Vec<Arc<Inbox>>>,
}

impl Hub {
    /// Passes events on to those who follow their sessions. Never waits.
    pub(crate) fn publish(&self, events: Vec<Event<primitives::Event>>) {
        if events.is_empty() {
            return;
        }
        let mut registry = self.registry();
        for Event {
            session,
            revision,
            body,
        } in events
        {
            let followers = match body {
                EventBody::SessionEnded(_) => {
                    registry.followers.remove(&session).unwrap_or_default()
                }
                EventBody::Machine(_) | EventBody::SessionAttached { .. } => registry
                    .followers
                    .get(&session)
                    .cloned()
                    .unwrap_or_default(),
            };
            for inbox in followers {
                let body = NoteBody::Happened(revision, body.clone());
                inbox.put(Note { session, body });
            }
        }
    }

    /// Ends every stream, and those that begin later.
    pub(crate) fn close(&self) {
        let mut registry = self.registry();
        self.closed.send_replace(true);
        for inbox in std::mem::take(&mut registry.followers)
            .into_values()
            .flatten()
        {
            inbox.end(Failure::ShuttingDown.into());
        }
    }

    /// Resolves when [`Hub::close`] was called.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut closed = self.closed.subscribe();
        async move {
            // An error means that the hub is gone.
            closed.wait_for(|closed| *closed).await.ok();
        }
    }

    /// Ends every stream: this member has missed events, and whoever follows a session
    /// must look afresh.
    pub(crate) fn missed(&self) {
        for inbox in std::mem::take(&mut self.registry().followers)
            .into_values()
            .flatten()
        {
            inbox.end(Failure::NotLeader { leader: None }.into());
        }
    }

    /// How many sessions are followed.
    pub(crate) fn watched(&self) -> usize {
        self.registry().followers.len()
    }

    fn register(&self, session: SessionId, inbox: &Arc<Inbox>) {
        let mut registry = self.registry();
        if *self.closed.borrow() {
            return inbox.end(Failure::ShuttingDown.into());
        }
        let followers = registry.followers.entry(session).or_default();
        if !followers.iter().any(|other| Arc::ptr_eq(other, inbox)) {
            followers.push(Arc::clone(inbox));
        }
    }

    fn unregister(&self, sessions: impl Iterator<Item = SessionId>, inbox: &Arc<Inbox>) {
        let mut registry = self.registry();
        for session in sessions {
            if let Some(followers) = registry.followers.get_mut(&session) {
                followers.retain(|other| !Arc::ptr_eq(other, inbox));
                if followers.is_empty() {
                    registry.followers.remove(&session);
                }
            }
        }
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        // Nothing in here can stop half way.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the loop thread leaves what concerns one stream.
#[derive(Debug)]
struct Inbox {
    notes: mpsc::Sender<Note>,
    end: OnceLock<Refusal>,
    ended: Notify,
}

impl Inbox {
    fn new() -> (Arc<Self>, mpsc::Receiver<Note>) {
        let (notes, receiver) = mpsc::channel(QUEUED_MAX);
        (
            Arc::new(Self {
                notes,
                end: OnceLock::new(),
                ended: Notify::new(),
            }),
            receiver,
        )
    }

    fn put(&self, note: Note) {
        if let Err(TrySendError::Full(_)) = self.notes.try_send(note) {
            self.end(Refusal::SlowReader);
        }
    }

    /// Ends the stream. The first reason counts.
    fn end(&self, reason: Refusal) {
        if self.end.set(reason).is_ok() {
            self.ended.notify_one();
        }
    }

    async fn ended(&self) -> Refusal {
        loop {
            if let Some(reason) = self.end.get() {
                return reason.clone();
            }
            self.ended.notified().await;
        }
    }
}

/// Something that concerns one session of a stream.
#[derive(Debug)]
struct Note {
    session: SessionId,
    body: NoteBody,
}

#[derive(Debug)]
enum NoteBody {
    /// The answer to what the session holds.
    Grants(Result<Answer, Failure>),
    /// The answer to whether it lives.
    Liveness(Result<Answer, Failure>),
    Happened(Revision, EventBody<primitives::Event>),
}

/// The sessions of one stream, and up to where their events are told.
#[derive(Debug, Default)]
struct Attachments {
    sessions: BTreeMap<SessionId, Followed>,
    asking: usize,
}

#[derive(Clone, Copy, Debug)]
struct Followed {
    /// On behalf of which attachment; 0 is the first.
    attachment: u64,
    /// Told of its grants at this revision. Until they come, what happens is part of
    /// them.
    since: Option<Revision>,
}

impl Attachments {
    fn ask(&mut self, of: Attachment) {
        let asked = Followed {
            attachment: of.number,
            since: None,
        };
        let before = self.sessions.insert(of.session, asked);
        if before.is_none_or(|before| before.since.is_some()) {
            self.asking += 1;
        }
    }

    /// It is followed no longer; whether it was.
    fn leave(&mut self, session: SessionId) -> bool {
        let Some(followed) = self.sessions.remove(&session) else {
            return false;
        };
        if followed.since.is_none() {
            self.asking -= 1;
        }
        true
    }

    /// What the stream is told. An error ends it.
    fn take(&mut self, note: Note) -> Result<Option<v1::SessionEvent>, Refusal> {
        let Note { session, body } = note;
        match body {
            NoteBody::Grants(outcome) => self.attached(session, outcome?),
            NoteBody::Liveness(outcome) => {
                let Answer { revision, body, .. } = outcome?;
                match body {
                    AnswerBody::SessionEnded(end) => Ok(self.ended(session, revision, end)),
                    AnswerBody::Session(found) => {
                        Ok(self.superseded(session, revision, found.attachment))
                    }
                    _ => Ok(None),
                }
            }
            NoteBody::Happened(revision, EventBody::SessionEnded(end)) => {
                Ok(self.ended(session, revision, end))
            }
            NoteBody::Happened(revision, EventBody::SessionAttached { attachment }) => {
                Ok(self.superseded(session, revision, attachment))
            }
            NoteBody::Happened(revision, EventBody::Machine(event)) => {
                Ok(self.happened(session, revision, event))
            }
        }
    }

    fn attached(
        &mut self,
        session: SessionId,
        answer: Answer,
    ) -> Result<Option<v1::SessionEvent>, Refusal> {
        let AnswerBody::Query(primitives::Answer::Grants {
            grants,
            waiting,
            forced,
        }) = answer.body
        else {
            return Err(Refusal::Internal("grants of a session"));
        };
        let Some(followed) = self.sessions.get_mut(&session) else {
            return Ok(None);
        };
        if followed.since.replace(answer.revision).is_none() {
            self.asking -= 1;
        }
        let attached = v1::SessionAttached {
            grants: grants.into_iter().map(convert::held).collect(),
            forced: forced.into_iter().map(convert::forced).collect(),
            places: waiting.into_iter().map(convert::place).collect(),
        };
        Ok(Some(event(
            session,
            answer.revision,
            session_event::Event::Attached(attached),
        )))
    }

    fn ended(
        &mut self,
        session: SessionId,
        revision: Revision,
        end: EndReason,
    ) -> Option<v1::SessionEvent> {
        self.leave(session).then(|| ended(session, revision, end))
    }

    /// The present attachment is this; who follows for an older one is told that it
    /// is over.
    fn superseded(
        &mut self,
        session: SessionId,
        revision: Revision,
        present: u64,
    ) -> Option<v1::SessionEvent> {
        let followed = self.sessions.get(&session)?;
        if followed.attachment.max(1) >= present {
            return None;
        }
        self.leave(session);
        let ended = v1::SessionEnded {
            reason: v1::LossReason::Superseded.into(),
            attachment: present,
        };
        Some(event(session, revision, session_event::Event::Ended(ended)))
    }

    fn happened(
        &self,
        session: SessionId,
        revision: Revision,
        happened: primitives::Event,
    ) -> Option<v1::SessionEvent> {
        let since = self.sessions.get(&session)?.since?;
        let primitives::Event::GrantLost { grant, reason } = happened;
        let lost = session_event::Event::GrantLost(convert::grant_lost(grant, reason));
        (revision > since).then(|| event(session, revision, lost))
    }
}

fn ended(session: SessionId, revision: Revision, end: EndReason) -> v1::SessionEvent {
    let ended = v1::SessionEnded {
        reason: convert::end_reason(end).into(),
        attachment: 0,
    };
    event(session, revision, session_event::Event::Ended(ended))
}

fn event(session: SessionId, revision: Revision, event: session_event::Event) -> v1::SessionEvent {
    v1::SessionEvent {
        session_id: session.0,
        revision,
        event: Some(event),
    }
}

/// Serves one stream, until either side ends it.
pub(crate) fn follow(
    gateway: Arc<Gateway>,
    requests: Streaming<v1::WatchSessionsRequest>,
) -> mpsc::Receiver<Result<v1::SessionEvent, Status>> {
    let (out, events) = mpsc::channel(BUFFERED);
    let (inbox, notes) = Inbox::new();
    let follower = Follower {
        gateway,
        inbox,
        attachments: Attachments::default(),
    };
    // It ends with the connection: either `requests` fails or `out` is closed.
    tokio::spawn(follower.run(requests, notes, out));
    events
}

#[derive(Debug)]
struct Follower {
    gateway: Arc<Gateway>,
    inbox: Arc<Inbox>,
    attachments: Attachments,
}

type Out = mpsc::Sender<Result<v1::SessionEvent, Status>>;

impl Follower {
    async fn run(
        mut self,
        requests: Streaming<v1::WatchSessionsRequest>,
        notes: mpsc::Receiver<Note>,
        out: Out,
    ) {
        let reason = self.forward(requests, notes, &out).await;
        self.gateway
            .hub
            .unregister(self.attachments.sessions.keys().copied(), &self.inbox);
        let Some(reason) = reason else {
            return;
        };
        if reason == Refusal::SlowReader {
            self.gateway
                .metrics
                .slow_readers
                .fetch_add(1, Ordering::Relaxed);
        }
        // The reader may be gone by now.
        out.send(Err(self.gateway.status_of(reason))).await.ok();
    }

    /// Runs until the stream ends; for what reason, unless the client ended it.
    async fn forward(
        &mut self,
        mut requests: Streaming<v1::WatchSessionsRequest>,
        mut notes: mpsc::Receiver<Note>,
        out: &Out,
    ) -> Option<Refusal> {
        let inbox = Arc::clone(&self.inbox);
        let mut asks = true;
        loop {
            let event = tokio::select! {
                () = out.closed() => return None,
                reason = inbox.ended() => return Some(reason),
                Some(note) = notes.recv() => match self.take(note) {
                    Ok(event) => event,
                    Err(refusal) => return Some(refusal),
                },
                request = requests.message(), if asks && self.attachments.asking < ATTACHING_MAX => {
                    match request {
                        Ok(Some(request)) => self.attach(request),
                        Ok(None) => {
                            asks = false;
                            None
                        }
                        Err(_) => return None,
                    }
                }
            };
            let Some(event) = event else {
                continue;
            };
            tokio::select! {
                sent = out.send(Ok(event)) => sent.ok()?,
                reason = inbox.ended() => return Some(reason),
            }
        }
    }

    /// What the stream is told. A session that is over is not followed any longer:
    /// if it had ended before it was asked for, no event will ever remove it.
    fn take(&mut self, note: Note) -> Result<Option<v1::SessionEvent>, Refusal> {
        let session = note.session;
        let event = self.attachments.take(note)?;
        if !self.attachments.sessions.contains_key(&session) {
            self.gateway
                .hub
                .unregister(std::iter::once(session), &self.inbox);
        }
        Ok(event)
    }

    /// Registers first and asks then, so that nothing falls in between.
    fn attach(&mut self, request: v1::WatchSessionsRequest) -> Option<v1::SessionEvent> {
        let v1::WatchSessionsRequest {
            session_id: id,
            attachment: number,
        } = request;
        let Ok(session) = validate::session(id) else {
            return Some(ended(SessionId(id), 0, EndReason::Unknown));
        };
        self.attachments.ask(Attachment { session, number });
        self.gateway.hub.register(session, &self.inbox);
        // In this order: a session that is over must not look like one whose keys
        // were deleted.
        self.ask(session, Query::Session(session), NoteBody::Liveness);
        let grants = Query::Machine(primitives::Query::GrantsOf(session));
        self.ask(session, grants, NoteBody::Grants);
        None
    }

    fn ask(
        &self,
        session: SessionId,
        query: Query<primitives::Primitives>,
        body: fn(Result<Answer, Failure>) -> NoteBody,
    ) {
        let note = move |outcome| Note {
            session,
            body: body(outcome),
        };
        let inbox = Arc::clone(&self.inbox);
        let respond = Box::new(move |outcome| inbox.put(note(outcome)));
        if let Err(failure) = self.gateway.handle.read(query, respond) {
            self.inbox.put(note(Err(failure)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId(7);
    const FIRST: Attachment = Attachment {
        session: SESSION,
        number: 0,
    };

    fn grant(token: Revision) -> primitives::Grant {
        let key = format!("l/{token}").into();
        primitives::Grant {
            is_candidate: false,
            lock: "l".to_owned(),
            owner: String::new(),
            key,
            token,
        }
    }

    fn lost(revision: Revision) -> Event<primitives::Event> {
        let reason = primitives::LossReason::KeyDeleted;
        let body = EventBody::Machine(primitives::Event::GrantLost {
            grant: grant(2),
            reason,
        });
        Event {
            session: SESSION,
            revision,
            body,
        }
    }

    fn session_ended(revision: Revision) -> Event<primitives::Event> {
        Event {
            session: SESSION,
            revision,
            body: EventBody::SessionEnded(EndReason::Expired),
        }
    }

    fn grants_at(revision: Revision) -> Note {
        let grants = primitives::Answer::Grants {
            grants: vec![primitives::Held {
                grant: grant(2),
                entries: vec![1],
            }],
            waiting: vec![],
            forced: vec![],
        };
        let answer = Answer {
            revision,
            term: 1,
            body: AnswerBody::Query(grants),
        };
        Note {
            session: SESSION,
            body: NoteBody::Grants(Ok(answer)),
        }
    }

    fn liveness(revision: Revision, end: EndReason) -> Note {
        let answer = Answer {
            revision,
            term: 1,
            body: AnswerBody::SessionEnded(end),
        };
        Note {
            session: SESSION,
            body: NoteBody::Liveness(Ok(answer)),
        }
    }

    /// Names of what the stream is told, with their revisions.
    fn told(
        attachments: &mut Attachments,
        notes: &mut mpsc::Receiver<Note>,
    ) -> Vec<(&'static str, u64)> {
        let mut told = vec![];
        while let Ok(note) = notes.try_recv() {
            let Some(event) = attachments.take(note).unwrap() else {
                continue;
            };
            let name = match event.event.unwrap() {
                session_event::Event::Attached(_) => "attached",
                session_event::Event::Ended(_) => "ended",
                session_event::Event::GrantLost(_) => "lost",
            };
            told.push((name, event.revision));
        }
        told
    }

    fn attached() -> (Hub, Arc<Inbox>, mpsc::Receiver<Note>, Attachments) {
        let hub = Hub::default();
        let (inbox, notes) = Inbox::new();
        let mut attachments = Attachments::default();
        attachments.ask(FIRST);
        hub.register(SESSION, &inbox);
        (hub, inbox, notes, attachments)
    }

    #[test]
    fn a_stream_gets_a_snapshot_and_then_only_what_came_after_it() {
        let (hub, inbox, mut notes, mut attachments) = attached();
        hub.publish(vec![lost(3)]);
        inbox.put(grants_at(5));
        hub.publish(vec![lost(5), lost(6)]);
        assert_eq!(
            told(&mut attachments, &mut notes),
            [("attached", 5), ("lost", 6)]
        );
        assert_eq!(attachments.asking, 0);
    }

    #[test]
    fn the_end_of_a_session_is_told_once_whatever_its_revision() {
        let (hub, inbox, mut notes, mut attachments) = attached();
        inbox.put(grants_at(5));
        hub.publish(vec![session_ended(5), lost(6)]);
        inbox.put(liveness(5, EndReason::Expired));
        assert_eq!(
            told(&mut attachments, &mut notes),
            [("attached", 5), ("ended", 5)]
        );
        assert_eq!(hub.watched(), 0);
    }

    #[test]
    fn a_session_that_is_over_is_told_so() {
        let (_hub, inbox, mut notes, mut attachments) = attached();
        inbox.put(liveness(5, EndReason::Unknown));
        inbox.put(grants_at(5));
        assert_eq!(told(&mut attachments, &mut notes), [("ended", 5)]);
        assert_eq!(attachments.asking, 0);
    }

    #[test]
    fn attaching_again_gives_a_fresh_snapshot_and_no_event_twice() {
        let (hub, inbox, mut notes, mut attachments) = attached();
        inbox.put(grants_at(5));
        assert_eq!(told(&mut attachments, &mut notes), [("attached", 5)]);
        attachments.ask(FIRST);
        hub.register(SESSION, &inbox);
        hub.publish(vec![lost(6)]);
        inbox.put(grants_at(6));
        hub.publish(vec![lost(7)]);
        assert_eq!(
            told(&mut attachments, &mut notes),
            [("attached", 6), ("lost", 7)]
        );
    }

    #[test]
    fn who_follows_for_an_older_attachment_is_told_that_it_is_over() {
        let attached = |attachment| Event {
            session: SESSION,
            revision: 6,
            body: EventBody::SessionAttached { attachment },
        };
        let (hub, inbox, mut notes, mut attachments) = self::attached();
        inbox.put(grants_at(5));
        hub.publish(vec![attached(2), lost(7)]);
        assert_eq!(
            told(&mut attachments, &mut notes),
            [("attached", 5), ("ended", 6)]
        );
        attachments.ask(Attachment { number: 2, ..FIRST });
        inbox.put(grants_at(7));
        hub.publish(vec![attached(2), lost(8)]);
        assert_eq!(
            told(&mut attachments, &mut notes),
            [("attached", 7), ("lost", 8)]
        );
    }

    #[test]
    fn a_failed_snapshot_ends_the_stream_with_its_reason() {
        let (_hub, inbox, mut notes, mut attachments) = attached();
        inbox.put(Note {
            session: SESSION,
            body: NoteBody::Grants(Err(Failure::Overloaded)),
        });
        let note = notes.try_recv().unwrap();
        assert_eq!(attachments.take(note), Err(Failure::Overloaded.into()));
    }

    #[test]
    fn a_queue_that_is_full_cuts_its_stream_and_no_other() {
        let (hub, inbox, notes, _attachments) = attached();
        let (other, mut others) = Inbox::new();
        hub.register(SESSION, &other);
        for revision in 0..QUEUED_MAX as u64 {
            hub.publish(vec![lost(revision)]);
            others.try_recv().unwrap();
        }
        assert_eq!(inbox.end.get(), None);
        hub.publish(vec![lost(9)]);
        assert_eq!(inbox.end.get(), Some(&Refusal::SlowReader));
        assert_eq!(other.end.get(), None);
        assert_eq!(notes.len(), QUEUED_MAX);
    }

    #[test]
    fn closing_ends_streams_that_are_and_streams_that_come() {
        let (hub, inbox, _notes, _attachments) = attached();
        hub.close();
        assert_eq!(inbox.end.get(), Some(&Failure::ShuttingDown.into()));
        let (late, _notes) = Inbox::new();
        hub.register(SESSION, &late);
        assert_eq!(late.end.get(), Some(&Failure::ShuttingDown.into()));
    }

    #[test]
    fn a_stream_that_is_gone_leaves_nothing_behind() {
        let (hub, inbox, _notes, attachments) = attached();
        let (other, _others) = Inbox::new();
        hub.register(SESSION, &other);
        hub.unregister(attachments.sessions.keys().copied(), &inbox);
        assert_eq!(hub.watched(), 1);
        hub.unregister(std::iter::once(SESSION), &other);
        assert_eq!(hub.watched(), 0);
    }
}
