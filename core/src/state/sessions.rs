//! The commands that begin and end sessions, and hand them over.

use std::collections::BTreeMap;

use conclave_proto::internal::{
    AttachSession, CloseSession, ExpireSessions, GrantLease, OpenSession, RevokeLease,
};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::{Applied, Life, State};
use crate::{
    ids::{SessionId, Term},
    limits,
    machine::{Cause, Machine},
    replica::{AnswerBody, Event, EventBody},
    requests::{NotRun, Requests},
    session::{EndReason, Secret, Session},
    system::Ended,
};

impl<M: Machine> State<M> {
    /// Opens a session, unless this is a repetition: the secret says so.
    pub(super) fn open_session(
        &mut self,
        open: OpenSession,
        applied: &mut Applied<M>,
    ) -> AnswerBody<M> {
        let secret = Secret::new(&open.secret);
        if let Some(again) = secret.and_then(|secret| self.opened_with(secret)) {
            return again;
        }
        if self.system.is_out_of_space() {
            return AnswerBody::NoSpace;
        }
        let session = self.next_session_id();
        let ttl_ms = open
            .ttl_ms
            .clamp(limits::SESSION_TTL_MS_MIN, limits::SESSION_TTL_MS_MAX);
        let opened = Session {
            name: open.name,
            metadata: open.metadata.into_iter().collect(),
            secret,
            ..self.new_session(ttl_ms)
        };
        self.begin_session(session, opened, applied)
    }

    /// Opens a session that is only a lease, with the id that its client chose if it
    /// did and no session has that.
    pub(super) fn grant_lease(
        &mut self,
        grant: &GrantLease,
        applied: &mut Applied<M>,
    ) -> AnswerBody<M> {
        if self.system.is_out_of_space() {
            return AnswerBody::NoSpace;
        }
        let session = match grant.session_id {
            0 => self.next_session_id(),
            chosen => SessionId(chosen),
        };
        if self.sessions.get(session).is_some() {
            return AnswerBody::SessionExists;
        }
        let ttl_ms = grant
            .ttl_ms
            .clamp(limits::LEASE_TTL_MS_MIN, limits::LEASE_TTL_MS_MAX);
        self.begin_session(session, self.new_session(ttl_ms), applied)
    }

    fn new_session(&self, ttl_ms: u64) -> Session {
        Session {
            ttl_ms,
            name: String::new(),
            metadata: BTreeMap::new(),
            opened_revision: self.keyspace.revision(),
            opened_at: self.system.log_time(),
            secret: None,
            requests: Requests::default(),
        }
    }

    fn begin_session(
        &mut self,
        session: SessionId,
        opened: Session,
        applied: &mut Applied<M>,
    ) -> AnswerBody<M> {
        let ttl_ms = opened.ttl_ms;
        self.sessions.insert(session, opened);
        applied.lives.push(Life::Opened { session, ttl_ms });
        AnswerBody::SessionOpened { session, ttl_ms }
    }

    /// What became of the opening with this secret.
    fn opened_with(&self, secret: Secret) -> Option<AnswerBody<M>> {
        let Some(session) = self.sessions.opened_with(secret) else {
            let reason = self.system.end_reason_of(secret)?;
            return Some(AnswerBody::SessionEnded(reason));
        };
        let ttl_ms = self.sessions.get(session)?.ttl_ms;
        Some(AnswerBody::SessionOpened { session, ttl_ms })
    }

    /// Ids look random, so that one of another cluster is hardly ever one of
    /// this, and are never given out twice.
    fn next_session_id(&mut self) -> SessionId {
        loop {
            let count = self.system.count_session();
            let hash = xxh3_64_with_seed(&count.to_be_bytes(), self.cluster);
            let id = SessionId(hash.cast_signed() & i64::MAX);
            if id.0 != 0
                && self.sessions.get(id).is_none()
                && self.system.end_reason(id) == EndReason::Unknown
            {
                return id;
            }
        }
    }

    /// Makes this client's attachment the present one: what others send from now on
    /// is refused. What waits and is not wanted is cancelled in the same step.
    pub(super) fn attach_session(
        &mut self,
        attach: &AttachSession,
        applied: &mut Applied<M>,
    ) -> AnswerBody<M> {
        let id = SessionId(attach.session_id);
        let Some(session) = self.sessions.get(id) else {
            return AnswerBody::SessionEnded(self.system.end_reason(id));
        };
        if session.secret.is_none() || session.secret != Secret::new(&attach.secret) {
            return AnswerBody::NotRun(NotRun::WrongSecret);
        }
        if attach.replaces == 0 {
            // Only a question.
            return self.attached(id);
        }
        let attachment = session.requests.attachment();
        let is_again =
            attachment == attach.replaces.wrapping_add(1) && session.requests.nonce == attach.nonce;
        if attachment != attach.replaces && !is_again {
            return AnswerBody::NotRun(NotRun::Attached { attachment });
        }
        if !is_again {
            self.take_over(id, attach, applied);
        }
        self.attached(id)
    }

    fn take_over(&mut self, id: SessionId, attach: &AttachSession, applied: &mut Applied<M>) {
        let mut context = self.context();
        self.machine.withdraw(&mut context, id, &attach.wanted);
        let (writes, staged) = context.into_parts();
        let changes = self.keyspace.keep(writes);
        self.keep_staged(staged);
        self.sessions
            .change(id, |requests| requests.attach(attach.nonce));
        self.settle(&changes, Cause::Unwanted, applied);
        if let Some(session) = self.sessions.get(id) {
            let attachment = session.requests.attachment();
            applied.events.push(Event {
                session: id,
                revision: self.keyspace.revision(),
                body: EventBody::SessionAttached { attachment },
            });
        }
    }

    fn attached(&self, id: SessionId) -> AnswerBody<M> {
        let Some(session) = self.sessions.get(id) else {
            return AnswerBody::SessionEnded(self.system.end_reason(id));
        };
        AnswerBody::SessionAttached {
            attachment: session.requests.attachment(),
            last_request: session.requests.last(),
            ttl_ms: session.ttl_ms,
            holdings: self.machine.holdings(self.view(), id),
        }
    }

    pub(super) fn close_session(
        &mut self,
        close: &CloseSession,
        applied: &mut Applied<M>,
    ) -> AnswerBody<M> {
        let id = SessionId(close.session_id);
        let Some(session) = self.sessions.get(id) else {
            return AnswerBody::SessionEnded(self.system.end_reason(id));
        };
        if session.requests.fences(close.attachment) {
            return AnswerBody::NotRun(NotRun::Superseded);
        }
        self.end_session(id, EndReason::Closed, applied);
        AnswerBody::Done
    }

    /// Ends a session, native ones included; whoever has it learns the reason.
    pub(super) fn revoke_lease(
        &mut self,
        revoke: &RevokeLease,
        applied: &mut Applied<M>,
    ) -> AnswerBody<M> {
        let id = SessionId(revoke.session_id);
        if self.sessions.get(id).is_none() {
            return AnswerBody::SessionEnded(self.system.end_reason(id));
        }
        self.end_session(id, EndReason::Revoked, applied);
        AnswerBody::Done
    }

    /// Only the leader decides on expiry, and only in its own term: the term of
    /// the entry, which is the same on every node, unlike a node's current one. A
    /// session that was opened at another time is not the one that the leader meant,
    /// but another that was given the same id since.
    pub(super) fn expire_sessions(
        &mut self,
        expire: &ExpireSessions,
        term: Term,
        applied: &mut Applied<M>,
    ) -> AnswerBody<M> {
        #[cfg(conclave_plant)]
        let term = crate::plant::expiry_term(term);
        if expire.term == term {
            for (id, opened_at) in expire.session_ids.iter().zip(&expire.opened_at_ms) {
                let id = SessionId(*id);
                let live = self.sessions.get(id);
                if live.is_some_and(|live| live.opened_at == *opened_at) {
                    self.end_session(id, EndReason::Expired, applied);
                }
            }
        }
        AnswerBody::Done
    }

    fn end_session(&mut self, id: SessionId, reason: EndReason, applied: &mut Applied<M>) {
        let mut overlay = self.keyspace.overlay();
        let now = self.system.log_time();
        for key in self.keyspace.keys_of(id) {
            #[cfg(conclave_plant)]
            if reason == EndReason::Expired && crate::plant::is("expiry-leaves-keys") {
                break;
            }
            let record = self.keyspace.get(key).expect("keys of sessions are live");
            match self.machine.outlives(record, reason, now) {
                Some(value) => overlay.put(key.clone(), value, None),
                None => {
                    overlay.delete(key);
                }
            }
        }
        let writes = overlay.into_writes();
        let changes = self.keyspace.keep(writes);
        let secret = self.sessions.remove(id).and_then(|session| session.secret);
        self.system.record_end(Ended {
            session: id,
            reason,
            secret,
        });
        self.settle(&changes, Cause::SessionEnded(reason), applied);
        let revision = self.keyspace.revision();
        applied.events.push(Event {
            session: id,
            revision,
            body: EventBody::SessionEnded(reason),
        });
        applied.lives.push(Life::Ended(id));
    }
}
