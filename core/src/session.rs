//! The replicated side of sessions: which are alive, and which of their
//! requests must not run any more. Who is alive is decided by the leader (see
//! `liveness`); here is only what its decisions led to.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use crate::{
    ids::{LogTime, Revision, SessionId},
    limits,
    picture::UnderWay,
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
    /// Which of its requests are over.
    pub requests: RequestWindow,
}

impl Session {
    /// What it counts for in the size of the state. Stays the same while it lives.
    pub fn bytes(&self) -> u64 {
        let metadata = self.metadata.iter();
        let metadata = metadata.map(|(key, value)| key.len() + value.len());
        (self.name.len() + metadata.sum::<usize>()) as u64 + limits::SESSION_OVERHEAD_BYTES
    }
}

/// The numbered requests of a session that must not run (again).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestWindow {
    acknowledged: u64,
    cancelled: BTreeSet<u64>,
}

impl RequestWindow {
    /// Whether this request is over: acknowledged or cancelled.
    pub fn is_over(&self, request: u64) -> bool {
        request <= self.acknowledged || self.cancelled.contains(&request)
    }

    /// Whether a cancellation can still be noted; see
    /// [`crate::limits::CANCELLED_REQUESTS_MAX`].
    pub fn is_full(&self) -> bool {
        self.cancelled.len() >= limits::CANCELLED_REQUESTS_MAX
    }

    /// Up to where requests are acknowledged, and those cancelled above that.
    pub(crate) fn parts(&self) -> (u64, impl Iterator<Item = u64>) {
        (self.acknowledged, self.cancelled.iter().copied())
    }

    pub(crate) fn from_parts(acknowledged: u64, cancelled: impl Iterator<Item = u64>) -> Self {
        Self {
            acknowledged,
            cancelled: cancelled.collect(),
        }
    }

    pub(crate) fn acknowledge(&mut self, request: u64) {
        if request > self.acknowledged {
            self.acknowledged = request;
            self.cancelled = self.cancelled.split_off(&request);
            self.cancelled.remove(&request);
        }
    }

    pub(crate) fn cancel(&mut self, request: u64) {
        if !self.is_over(request) {
            self.cancelled.insert(request);
        }
    }
}

/// All live sessions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sessions {
    live: BTreeMap<SessionId, Session>,
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

    pub(crate) fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.rescue(id);
        self.live.get_mut(&id)
    }

    pub(crate) fn insert(&mut self, id: SessionId, session: Session) {
        if let Some(drawing) = &mut self.drawing.0 {
            drawing.opened.insert(id);
        }
        self.bytes += session.bytes();
        let before = self.live.insert(id, session);
        assert!(before.is_none(), "session id {id} given out twice");
    }

    pub(crate) fn remove(&mut self, id: SessionId) -> Option<Session> {
        self.rescue(id);
        let removed = self.live.remove(&id);
        self.bytes -= removed.as_ref().map_or(0, Session::bytes);
        removed
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
