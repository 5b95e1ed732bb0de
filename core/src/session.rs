//! The replicated side of sessions: which are alive, and which of their
//! requests must not run any more. Who is alive is decided by the leader (see
//! `liveness`); here is only what its decisions led to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Bound,
};

use crate::{
    ids::{LogTime, Revision, SessionId},
    limits,
    machine::Place,
    picture::UnderWay,
    requests::{Answered, Requests, Slot},
};

/// Why a session is not alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// Its client did not renew it in time.
    Expired,
    /// Its client closed it.
    Closed,
    /// Its lease was revoked through the etcd API.
    Revoked,
    /// There is no record of it: it never was, or ended long ago.
    Unknown,
}

/// What the client that opens a session makes up: who knows it may attach to the
/// session, and a repeated opening with it finds the session again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Secret([u8; limits::SECRET_BYTES]);

impl Secret {
    /// `None` if it does not have the length of one.
    pub fn new(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// A live session.
#[derive(Clone, Debug, PartialEq)]
pub struct Session {
    /// How long it lives without a renewal.
    pub ttl_ms: u64,
    /// What people see in lists.
    pub name: String,
    /// Free for the client, in order of key.
    pub metadata: BTreeMap<String, String>,
    /// The revision of the keyspace when it was opened.
    pub opened_revision: Revision,
    /// When it was opened.
    pub opened_at: LogTime,
    /// If its client gave one.
    pub secret: Option<Secret>,
    /// Its numbered requests.
    pub requests: Requests,
}

/// What there is to be shown of a live session, as in [`Session`].
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "they are those of the session")]
pub struct Face {
    pub ttl_ms: u64,
    pub name: String,
    pub metadata: BTreeMap<String, String>,
    pub opened_revision: Revision,
    pub opened_at: LogTime,
    /// The number of the present attachment, from 1.
    pub attachment: u64,
    /// How many keys are bound to it.
    pub keys: usize,
}

impl Session {
    /// What there is to be shown of it; its requests stay here.
    pub fn face(&self, keys: usize) -> Face {
        Face {
            ttl_ms: self.ttl_ms,
            name: self.name.clone(),
            metadata: self.metadata.clone(),
            opened_revision: self.opened_revision,
            opened_at: self.opened_at,
            attachment: self.requests.attachment(),
            keys,
        }
    }

    /// What it counts for in the size of the state.
    pub fn bytes(&self) -> u64 {
        let metadata = self.metadata.iter();
        let metadata = metadata.map(|(key, value)| key.len() + value.len());
        let face = (self.name.len() + metadata.sum::<usize>()) as u64;
        face + self.requests.bytes() + limits::SESSION_OVERHEAD_BYTES
    }
}

/// All live sessions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sessions {
    live: BTreeMap<SessionId, Session>,
    by_secret: BTreeMap<Secret, SessionId>,
    /// Whose numbered request waits at a place.
    waiting: BTreeMap<Place, (SessionId, u64)>,
    bytes: u64,
    drawing: UnderWay<Box<Drawing>>,
}

/// A picture of all sessions, as far as it is drawn. A session that changes ahead
/// of the walk is taken before.
#[derive(Clone, Debug, Default)]
struct Drawing {
    picture: Sessions,
    /// Up to where the walk came.
    at: Option<SessionId>,
    /// Those that were not there when it began.
    opened: BTreeSet<SessionId>,
}

impl Drawing {
    fn take(&mut self, id: SessionId, session: &Session) {
        if self.picture.get(id).is_none() && !self.opened.contains(&id) {
            self.picture.insert(id, session.clone());
        }
    }
}

impl Sessions {
    /// A live session.
    pub fn get(&self, id: SessionId) -> Option<&Session> {
        self.live.get(&id)
    }

    /// The live session that was opened with this secret.
    pub fn opened_with(&self, secret: Secret) -> Option<SessionId> {
        self.by_secret.get(&secret).copied()
    }

    /// All live sessions in order of id.
    pub fn iter(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.live.iter().map(|(id, session)| (*id, session))
    }

    /// Live sessions behind this one, in order of id.
    pub fn behind(&self, id: Option<SessionId>) -> impl Iterator<Item = (SessionId, &Session)> {
        let from = id.map_or(Bound::Unbounded, Bound::Excluded);
        let behind = self.live.range((from, Bound::Unbounded));
        behind.map(|(id, session)| (*id, session))
    }

    /// How many are alive.
    pub fn len(&self) -> usize {
        self.live.len()
    }

    /// Whether none is alive.
    pub fn is_empty(&self) -> bool {
        self.live.is_empty()
    }

    /// The size of all of them, by [`Session::bytes`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn into_iter(self) -> impl Iterator<Item = (SessionId, Session)> {
        self.live.into_iter()
    }

    /// Begins a picture of all sessions as they are now.
    pub(crate) fn begin_picture(&mut self) {
        self.drawing = UnderWay(Some(Box::default()));
    }

    /// Goes on with the picture, by `max` sessions, from which those walked over are
    /// taken off; gives it out when it is whole.
    pub(crate) fn draw_picture(&mut self, max: &mut usize) -> Option<Self> {
        let drawing = self.drawing.0.as_mut()?;
        let from = drawing.at.map_or(Bound::Unbounded, Bound::Excluded);
        let mut ahead = self.live.range((from, Bound::Unbounded));
        for (id, session) in ahead.by_ref().take(*max) {
            drawing.take(*id, session);
            drawing.at = Some(*id);
            *max -= 1;
        }
        if ahead.next().is_some() {
            return None;
        }
        self.drawing.0.take().map(|drawing| drawing.picture)
    }

    pub(crate) fn insert(&mut self, id: SessionId, session: Session) {
        if let Some(drawing) = &mut self.drawing.0 {
            drawing.opened.insert(id);
        }
        self.bytes += session.bytes();
        if let Some(secret) = session.secret {
            self.by_secret.insert(secret, id);
        }
        for (number, place) in session.requests.waiting() {
            self.waiting.insert(place.clone(), (id, number));
        }
        let before = self.live.insert(id, session);
        assert!(before.is_none(), "session id {id} given out twice");
    }

    pub(crate) fn remove(&mut self, id: SessionId) -> Option<Session> {
        self.rescue(id);
        let removed = self.live.remove(&id)?;
        self.bytes -= removed.bytes();
        if let Some(secret) = removed.secret {
            self.by_secret.remove(&secret);
        }
        for (_, place) in removed.requests.waiting() {
            self.waiting.remove(place);
        }
        Some(removed)
    }

    /// Changes what is known of a session's requests, but none that waits.
    pub(crate) fn change(&mut self, id: SessionId, change: impl FnOnce(&mut Requests)) {
        self.rescue(id);
        if let Some(session) = self.live.get_mut(&id) {
            self.bytes -= session.requests.bytes();
            change(&mut session.requests);
            self.bytes += session.requests.bytes();
        }
    }

    /// A request waits at a place from now on.
    pub(crate) fn wait(&mut self, id: SessionId, number: u64, place: Place) {
        self.waiting.insert(place.clone(), (id, number));
        self.change(id, |requests| requests.set(number, Slot::Waiting(place)));
    }

    /// The numbered request that waits at a place.
    pub(crate) fn waits_at(&self, place: &Place) -> Option<(SessionId, u64)> {
        self.waiting.get(place).copied()
    }

    /// The request that waits at a place is decided.
    pub(crate) fn resolve(&mut self, place: &Place, answered: Answered) {
        if let Some((id, number)) = self.waiting.remove(place) {
            self.change(id, |requests| {
                requests.set(number, Slot::Answered(answered));
            });
        }
    }

    /// A session is about to change: the picture takes it as it was.
    fn rescue(&mut self, id: SessionId) {
        if let Some(drawing) = &mut self.drawing.0
            && let Some(session) = self.live.get(&id)
        {
            drawing.take(id, session);
        }
    }
}
