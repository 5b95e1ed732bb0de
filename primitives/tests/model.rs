//! The mutex against a naive model: a list of contenders, searched from end to end
//! for every question, whose states before and after a command are compared.
//!
//! Beside what the model says, each step checks what a mutex promises: whoever is
//! first in a queue has been told so, and the grants of one lock grow. The harness
//! checks that the index follows from the keys alone.

mod harness;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    limits,
    machine::{Machine as _, Outcome, Place as At},
    replica::{AnswerBody, EventBody},
    requests::NotRun,
    session::EndReason,
    state::Applied,
    system::ForcedRelease,
};
use conclave_primitives::{
    Answer as Found, Contender, Event, Held, LockInfo, LossReason, Primitives, Query, Rejection,
    Reply, Waiting, command, name::lock_of,
};
use conclave_proto::internal::{
    AttachSession, CloseSession, DeleteRange, LockAcquire, LockCancel, LockContender,
    LockForceRelease, LockRelease, Operation, Put, Request, Txn, command::Body,
    operation::Operation as Kind, primitive_command::Command,
};
use harness::{Driver, Step};
use proptest::prelude::*;
use prost::Message as _;

const SESSIONS: usize = 4;
const LOCKS: [&str; 3] = ["a", "a/b", "c"];
/// Each as it is in a request and in a key.
const OWNERS: [(&str, &str); 2] = [("", ""), ("o/1", ":o%2F1")];
/// Contenders without a session in their name, and keys that contend for nothing.
const OTHER_KEYS: [&str; 4] = ["a/etcd", "a/b/x", "c/", "plain"];
/// In the values of native contenders.
const MARK: u32 = 0xC09C_1A7E;
const REASON: &str = "because";

/// Who contends for what, by number.
#[derive(Clone, Copy, Debug)]
struct Who {
    session: usize,
    lock: usize,
    owner: usize,
}

#[derive(Clone, Debug)]
enum Action {
    Acquire {
        who: Who,
        number: Number,
        how: How,
    },
    /// With the token of the contender's key, or one that is off; of the newest of the
    /// session's acquires that share it, or one from `back` numbers ago.
    Release {
        who: Who,
        number: Number,
        off: u64,
        back: Option<u64>,
    },
    /// Of the acquire from so many numbers ago, which may not have been used.
    Cancel {
        who: Who,
        back: u64,
    },
    /// Of all that waits, only the request from so many numbers ago is wanted.
    Attach {
        session: usize,
        back: u64,
    },
    Force {
        lock: usize,
        off: Option<u64>,
        skip_delay: bool,
    },
    Txn(Vec<(Key, Option<Write>)>),
    End {
        session: usize,
        reason: EndReason,
    },
    Pass {
        ms: u64,
    },
}

/// What makes a request safe to repeat.
#[derive(Clone, Copy, Debug)]
struct Number {
    which: Which,
    /// How far behind the newest number the acknowledged one is, if any is.
    lag: Option<u64>,
    /// Whether the one before that is unfinished.
    leaves_one: bool,
    /// It comes from the attachment before.
    is_old: bool,
}

#[derive(Clone, Copy, Debug)]
enum Which {
    None,
    Fresh,
    /// The one from so many numbers ago.
    Again(u64),
}

/// How a request stands, that of a session by its number.
#[derive(Clone, Debug, PartialEq)]
enum Slot {
    Waiting(At),
    Answered(Result<Reply, Rejection>),
    Over,
}

/// What a request comes to.
#[derive(Debug, PartialEq)]
enum Comes {
    Waiting(At),
    Answered(Result<Reply, Rejection>),
    NotRun(NotRun),
}

/// What an acquire wants.
#[derive(Clone, Copy, Debug)]
struct How {
    wait_ms: Option<u64>,
    delay_ms: u64,
    reentrant: bool,
}

/// A key that a transaction puts or deletes.
#[derive(Clone, Debug)]
enum Key {
    Native(Who),
    Other(usize),
}

/// What a transaction puts: maybe what a native contender would.
#[derive(Clone, Debug)]
struct Write {
    value: Option<LockContender>,
    session: Option<usize>,
}

/// A contender, or what a lost one left, as the model knows it.
#[derive(Clone, Debug, PartialEq)]
struct Place {
    lock: String,
    key: String,
    owner: &'static str,
    session: Option<SessionId>,
    token: Revision,
    /// As in a native value; one 0 if it has none.
    requests: Vec<u64>,
    is_native: bool,
    wait_until: u64,
    delay_ms: u64,
    reentrant: bool,
    /// If not 0, it is only a delay.
    delay_until: u64,
    /// Whose delay.
    lost: Option<SessionId>,
}

#[derive(Clone, Default)]
struct Model {
    now: u64,
    revision: Revision,
    sessions: Vec<SessionId>,
    places: Vec<Place>,
    /// Keys that contend for nothing.
    others: BTreeMap<String, Option<SessionId>>,
    slots: BTreeMap<(SessionId, u64), Slot>,
    /// The newest number and the attachment of a session.
    used: BTreeMap<SessionId, (u64, u64)>,
    forced: BTreeMap<Revision, ForcedRelease>,
}

/// What a command led to, or should lead to.
type Seen = (Vec<(At, Result<Reply, Rejection>)>, Vec<(SessionId, Event)>);

impl Place {
    fn at(&self) -> At {
        At {
            revision: self.token,
            key: self.key.clone().into(),
        }
    }

    fn is_delay(&self) -> bool {
        self.delay_until != 0
    }

    fn end(&self) -> u64 {
        self.wait_until.max(self.delay_until)
    }

    /// A native contender becomes what it leaves.
    fn lose(&mut self, now: u64) {
        self.lost = self.session.take();
        self.delay_until = now + self.delay_ms + 1;
        self.wait_until = 0;
        self.is_native = false;
    }
}

impl Model {
    fn queue(&self, lock: &str) -> Vec<&Place> {
        let mut queue: Vec<_> = self
            .places
            .iter()
            .filter(|place| place.lock == lock)
            .collect();
        queue.sort_by_key(|place| (place.token, &place.key));
        queue
    }

    fn first(&self, lock: &str) -> Option<&Place> {
        self.queue(lock).first().copied()
    }

    fn holder(&self, lock: &str) -> Option<&Place> {
        self.first(lock).filter(|first| !first.is_delay())
    }

    fn holds(&self, place: &Place) -> bool {
        self.holder(&place.lock) == Some(place)
    }

    fn find(&self, key: &str) -> Option<&Place> {
        self.places.iter().find(|place| place.key == key)
    }

    fn key(&self, who: Who) -> String {
        format!(
            "{}/{:x}{}",
            LOCKS[who.lock], self.sessions[who.session].0, OWNERS[who.owner].1
        )
    }

    fn place(&self, who: Who, value: &LockContender) -> Place {
        Place {
            lock: LOCKS[who.lock].to_owned(),
            key: self.key(who),
            owner: OWNERS[who.owner].0,
            session: Some(self.sessions[who.session]),
            token: self.revision + 1,
            requests: [&[value.request][..], &value.inner].concat(),
            // An empty value says nothing.
            is_native: value.mark == MARK,
            wait_until: value.wait_until_ms,
            delay_ms: value.delay_ms,
            reentrant: value.reentrant,
            delay_until: 0,
            lost: None,
        }
    }

    /// A command of the mutex takes a key away.
    fn remove(&mut self, key: &str) -> Place {
        let at = self
            .places
            .iter()
            .position(|place| place.key == key)
            .expect("it is there");
        let place = self.places.remove(at);
        self.revision += 1;
        place
    }

    /// The request that a number stands for.
    fn request(&mut self, who: Who, number: Number) -> Request {
        let (newest, attachment) = self
            .used
            .entry(self.sessions[who.session])
            .or_insert((0, 1));
        let acknowledged = number.lag.map_or(0, |lag| newest.saturating_sub(lag));
        let before = acknowledged.saturating_sub(1);
        let request = match number.which {
            Which::None => 0,
            Which::Again(back) => newest.saturating_sub(back),
            Which::Fresh => {
                *newest += 1;
                *newest
            }
        };
        Request {
            attachment: *attachment - u64::from(number.is_old),
            number: request,
            acknowledged,
            unfinished: [before; 1][..usize::from(number.leaves_one)].to_vec(),
        }
    }

    /// Takes a request in: what it comes to if it does not run.
    fn admit(&mut self, id: SessionId, request: &Request) -> Option<Comes> {
        if request.attachment.max(1) < self.used[&id].1 {
            return Some(Comes::NotRun(NotRun::Superseded));
        }
        for number in 1..=request.acknowledged {
            let waits = matches!(self.slots.get(&(id, number)), Some(Slot::Waiting(_)));
            if !waits && !request.unfinished.contains(&number) {
                self.slots.insert((id, number), Slot::Over);
            }
        }
        Some(match self.slots.get(&(id, request.number))? {
            Slot::Waiting(at) => Comes::Waiting(at.clone()),
            Slot::Answered(answer) => Comes::Answered(answer.clone()),
            Slot::Over => Comes::NotRun(NotRun::Over),
        })
    }

    /// Runs a request once.
    fn once(&mut self, who: Who, request: &Request, run: impl FnOnce(&mut Self) -> Comes) -> Comes {
        let id = self.sessions[who.session];
        if let Some(known) = self.admit(id, request) {
            return known;
        }
        let comes = run(self);
        let slot = match &comes {
            Comes::Waiting(at) => Slot::Waiting(at.clone()),
            Comes::Answered(answer) => Slot::Answered(answer.clone()),
            Comes::NotRun(_) => return comes,
        };
        if request.number != 0 {
            self.slots.insert((id, request.number), slot);
        }
        comes
    }

    /// Waits have ended.
    fn resolve(&mut self, resolved: &[(At, Result<Reply, Rejection>)]) {
        for (at, answer) in resolved {
            for slot in self.slots.values_mut() {
                if *slot == Slot::Waiting(at.clone()) {
                    *slot = Slot::Answered(answer.clone());
                }
            }
        }
    }

    fn attach(&mut self, id: SessionId, wanted: u64) {
        let waits = |place: &Place| {
            place.session == Some(id) && place.requests[0] != wanted && !self.holds(place)
        };
        let places = self.places.iter().filter(|place| place.is_native);
        let unwanted = places
            .filter(|place| waits(place))
            .map(|place| place.key.clone());
        let unwanted: Vec<String> = unwanted.collect();
        self.revision += u64::from(!unwanted.is_empty());
        self.places.retain(|place| !unwanted.contains(&place.key));
        self.used.entry(id).or_insert((0, 1)).1 += 1;
    }

    /// One of the acquires that share a place is undone.
    fn leave(&mut self, key: &str, entry: u64) {
        let place = self.places.iter_mut().find(|place| place.key == key);
        let place = place.expect("it is there");
        if place.requests.len() == 1 {
            self.remove(key);
            return;
        }
        let at = match entry {
            0 => Some(place.requests.len() - 1),
            _ => place.requests.iter().position(|request| *request == entry),
        };
        place.requests.remove(at.expect("it shares the place"));
        self.revision += 1;
    }

    fn acquire(&mut self, who: Who, request: u64, how: How) -> Comes {
        let key = self.key(who);
        if let Some(place) = self.find(&key).cloned() {
            let token = place.token;
            let is_shared = self.holds(&place) && place.reentrant && how.reentrant;
            if request == 0 || !is_shared || place.requests.contains(&request) {
                return Comes::Answered(Err(Rejection::AlreadyContending { token }));
            }
            let places = self.places.iter_mut();
            let requests = places.filter(|place| place.key == key);
            requests.for_each(|place| place.requests.push(request));
            self.revision += 1;
            return Comes::Answered(Ok(granted(&place)));
        }
        if how.wait_ms == Some(0) && self.first(LOCKS[who.lock]).is_some() {
            return Comes::Answered(Err(Rejection::Held));
        }
        let value = LockContender {
            request,
            wait_until_ms: how.wait_ms.map_or(0, |ms| self.now + ms + 1),
            asked_ms: self.now,
            delay_ms: how.delay_ms,
            reentrant: how.reentrant,
            mark: MARK,
            ..LockContender::default()
        };
        let place = self.place(who, &value);
        let at = place.at();
        self.places.push(place);
        self.revision += 1;
        Comes::Waiting(at)
    }

    fn release(&mut self, who: Who, token: Revision, entry: u64) -> Result<Reply, Rejection> {
        let key = self.key(who);
        let lock = LOCKS[who.lock];
        let is_meant = |place: &Place| {
            let has_entry = match entry {
                0 => !(place.is_delay() && place.reentrant),
                entry => place.requests.contains(&entry),
            };
            place.key == key && place.token == token && has_entry
        };
        if !self.first(lock).is_some_and(is_meant) {
            return Err(self.not_holder(lock, token));
        }
        self.leave(&key, entry);
        Ok(Reply::Released)
    }

    fn not_holder(&self, lock: &str, token: Revision) -> Rejection {
        let forced = self
            .forced
            .get(&token)
            .filter(|forced| forced.lock == lock)
            .cloned();
        Rejection::NotHolder { forced }
    }

    fn cancel(&mut self, who: Who, request: u64) {
        let id = self.sessions[who.session];
        let key = self.key(who);
        let is_known =
            |place: &Place| place.session == Some(id) && place.requests.contains(&request);
        if self.find(&key).is_some_and(is_known) {
            self.leave(&key, request);
        } else {
            let cancelled = Slot::Answered(Err(Rejection::Cancelled));
            self.slots.entry((id, request)).or_insert(cancelled);
        }
    }

    /// The victim, in the place of the reply.
    fn force(&mut self, lock: &str, token: Revision, skip_delay: bool) -> Result<Place, Rejection> {
        let found = self
            .first(lock)
            .filter(|first| skip_delay || !first.is_delay());
        let holder = found.ok_or(Rejection::NotHeld)?.clone();
        if token != 0 && token != holder.token {
            return Err(self.not_holder(lock, token));
        }
        if skip_delay || holder.delay_ms == 0 {
            self.remove(&holder.key);
        } else {
            let now = self.now;
            let places = self.places.iter_mut();
            let left = places.filter(|place| place.key == holder.key);
            left.for_each(|place| place.lose(now));
            self.revision += 1;
        }
        if let Some(session) = holder.session.or(holder.lost) {
            let record = ForcedRelease {
                session,
                token: holder.token,
                lock: holder.lock.clone(),
                owner: holder.owner.to_owned(),
                reason: REASON.to_owned(),
            };
            self.forced.insert(holder.token, record);
        }
        Ok(holder)
    }

    fn put(&mut self, key: &Key, write: &Write) {
        let session = write.session.map(|session| self.sessions[session]);
        let mut place = match key {
            Key::Native(who) => {
                let native = write
                    .value
                    .as_ref()
                    .filter(|value| value.mark == MARK)
                    .filter(|_| session == Some(self.sessions[who.session]));
                self.place(*who, &native.cloned().unwrap_or_default())
            }
            Key::Other(other) => {
                let key = OTHER_KEYS[*other].to_owned();
                let lock = match key.rsplit_once('/') {
                    Some((lock, _)) if LOCKS.contains(&lock) => lock.to_owned(),
                    _ => {
                        self.others.insert(key, session);
                        return;
                    }
                };
                let token = self.revision + 1;
                Place {
                    lock,
                    key,
                    owner: "",
                    session,
                    token,
                    requests: vec![0],
                    is_native: false,
                    wait_until: 0,
                    delay_ms: 0,
                    reentrant: false,
                    delay_until: 0,
                    lost: None,
                }
            }
        };
        place.session = session;
        let value = write.value.as_ref().filter(|value| value.mark == MARK);
        let value = value.filter(|_| session.is_none());
        if let Some(value) = value.filter(|value| value.delay_until_ms != 0) {
            place.delay_until = value.delay_until_ms;
            place.requests = [&[value.request][..], &value.inner].concat();
            place.reentrant = value.reentrant;
            if let Key::Native(who) = key {
                place.lost = Some(self.sessions[who.session]);
            }
        }
        match self.places.iter_mut().find(|there| there.key == place.key) {
            Some(there) => {
                // What contends in the place of a delay is another.
                let token = match there.is_delay() && !place.is_delay() {
                    true => place.token,
                    false => there.token,
                };
                *there = Place { token, ..place }
            }
            None => self.places.push(place),
        }
    }

    fn txn(&mut self, writes: &[(Key, Option<Write>)]) {
        let mut changed = false;
        for (key, write) in writes {
            if let Some(write) = write {
                self.put(key, write);
                changed = true;
                continue;
            }
            let name = self.name_of(key);
            let before = self.places.len();
            self.places.retain(|place| place.key != name);
            changed |= self.places.len() < before || self.others.remove(&name).is_some();
        }
        self.revision += u64::from(changed);
    }

    fn name_of(&self, key: &Key) -> String {
        match key {
            Key::Native(who) => self.key(*who),
            Key::Other(other) => OTHER_KEYS[*other].to_owned(),
        }
    }

    fn end(&mut self, id: SessionId, reason: EndReason) {
        let stays = |place: &&Place| {
            reason == EndReason::Expired
                && place.session == Some(id)
                && place.delay_ms != 0
                && self.holds(place)
        };
        let stay: Vec<Place> = self.places.iter().filter(stays).cloned().collect();
        let before = self.places.len() + self.others.len();
        self.places.retain(|place| place.session != Some(id));
        self.others.retain(|_, session| *session != Some(id));
        self.revision += u64::from(self.places.len() + self.others.len() < before);
        for mut place in stay {
            place.lose(self.now);
            self.places.push(place);
        }
    }

    fn fire(&mut self) {
        let is_due = |model: &Self, place: &Place| {
            !model.holds(place) && place.end() != 0 && place.end() <= model.now
        };
        loop {
            let due = self.places.iter().filter(|place| is_due(self, place));
            let first = due.min_by_key(|p| (p.end(), p.lock.clone(), p.token, p.key.clone()));
            let Some(key) = first.map(|place| place.key.clone()) else {
                return;
            };
            self.remove(&key);
        }
    }

    /// What follows from a change, found by comparing with what was before.
    fn since(&self, before: &Self, refusal: &Rejection, loss: Option<&LossReason>) -> Seen {
        let (mut resolved, mut events) = (Vec::new(), Vec::new());
        let is =
            |place: &Place, other: &Place| (&place.key, place.token) == (&other.key, other.token);
        let contends = |place: &&Place| !place.is_delay();
        for gone in before.places.iter().filter(contends) {
            let mut left = self.places.iter().filter(contends);
            if left.any(|place| is(place, gone)) {
                continue;
            }
            if !before.holds(gone) {
                resolved.push((gone.at(), Err(refusal.clone())));
            } else if let (Some(session), Some(reason)) = (gone.session, loss) {
                let grant = conclave_primitives::Grant {
                    lock: gone.lock.clone(),
                    owner: gone.owner.to_owned(),
                    key: gone.key.clone().into(),
                    token: gone.token,
                    is_candidate: false,
                };
                events.push((
                    session,
                    Event::GrantLost {
                        grant,
                        reason: reason.clone(),
                    },
                ));
            }
        }
        for holder in self.places.iter().filter(|place| self.holds(place)) {
            if !before
                .holder(&holder.lock)
                .is_some_and(|old| is(old, holder))
            {
                resolved.push((holder.at(), Ok(granted(holder))));
            }
        }
        (resolved, events)
    }
}

fn granted(place: &Place) -> Reply {
    Reply::Granted {
        key: place.key.clone().into(),
        token: place.token,
    }
}

/// The real machine beside the model.
struct World {
    driver: Driver,
    model: Model,
    secrets: BTreeMap<SessionId, Bytes>,
    /// The newest grant of each lock that was told to anyone.
    told: BTreeMap<Bytes, (Revision, Bytes)>,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            driver: Driver::new(),
            model: Model {
                revision: 1,
                ..Model::default()
            },
            secrets: BTreeMap::new(),
            told: BTreeMap::new(),
        };
        for _ in 0..SESSIONS {
            let id = world.open();
            world.model.sessions.push(id);
        }
        world
    }

    /// Runs one action on both, and compares.
    fn step(&mut self, action: &Action) {
        if let Action::Pass { ms } = action {
            self.model.now += ms;
        }
        let before = self.model.clone();
        self.model.fire();
        let mut expected = self.model.since(&before, &Rejection::WaitTimedOut, None);
        self.model.resolve(&expected.0);
        let before = self.model.clone();
        let (refusal, loss, applied) = self.act(action);
        let (resolved, events) = self.model.since(&before, &refusal, loss.as_ref());
        self.model.resolve(&resolved);
        expected.0.extend(resolved);
        expected.1.extend(events);
        self.note_grants(&applied);
        assert_same(seen(applied), expected);
        assert_eq!(self.driver.state.keyspace().revision(), self.model.revision);
        self.check_queries();
        if let Action::End { session, .. } = action {
            self.model.sessions[*session] = self.open();
        }
    }

    /// Runs an action on both. Says what waiters and holders are told whose keys it
    /// took away.
    fn act(&mut self, action: &Action) -> (Rejection, Option<LossReason>, Applied<Primitives>) {
        let deleted = (
            Rejection::PlaceLost(LossReason::KeyDeleted),
            Some(LossReason::KeyDeleted),
        );
        let ((refusal, loss), applied) = match action.clone() {
            Action::Acquire { who, number, how } => (deleted, self.acquire(who, number, how)),
            Action::Release {
                who,
                number,
                off,
                back,
            } => (
                (Rejection::Held, None),
                self.release(who, number, off, back),
            ),
            Action::Cancel { who, back } => {
                let entry = self.newest(who.session).saturating_sub(back).max(1);
                self.model.cancel(who, entry);
                ((Rejection::Cancelled, None), self.cancel(who, entry))
            }
            Action::Attach { session, back } => {
                let wanted = self.newest(session).saturating_sub(back);
                let applied = self.attach(session, wanted);
                ((Rejection::Cancelled, None), applied)
            }
            Action::Force {
                lock,
                off,
                skip_delay,
            } => {
                let why = (Rejection::Held, Some(LossReason::Forced(REASON.to_owned())));
                (why, self.force(LOCKS[lock], off, skip_delay))
            }
            Action::Txn(writes) => {
                let applied = self.txn(&writes);
                self.model.txn(&writes);
                (deleted, applied)
            }
            Action::End { session, reason } => {
                let id = self.model.sessions[session];
                self.model.end(id, reason);
                let step = match reason {
                    EndReason::Closed => self.driver.run(Body::CloseSession(CloseSession {
                        session_id: id.0,
                        attachment: u64::MAX,
                    })),
                    _ => self.driver.expire(id),
                };
                let why = (
                    Rejection::SessionEnded(reason),
                    Some(LossReason::SessionEnded(reason)),
                );
                (why, step.applied)
            }
            Action::Pass { ms } => (deleted, self.driver.pass(ms)),
        };
        (refusal, loss, applied)
    }

    /// Opens a session with a secret of its own.
    fn open(&mut self) -> SessionId {
        let mut secret = vec![0; limits::SECRET_BYTES];
        secret[..8].copy_from_slice(&self.driver.state.applied().to_le_bytes());
        let secret = Bytes::from(secret);
        let opened = self.driver.open("", secret.clone());
        let session = opened.expect("its secret is new");
        self.secrets.insert(session, secret);
        session
    }

    fn newest(&self, session: usize) -> u64 {
        let used = self.model.used.get(&self.model.sessions[session]);
        used.map_or(0, |(newest, _)| *newest)
    }

    fn acquire(&mut self, who: Who, number: Number, how: How) -> Applied<Primitives> {
        let request = self.model.request(who, number);
        let (name, session_id, owner) = self.names(who);
        let step = self.driver.run(command(Command::LockAcquire(LockAcquire {
            name,
            session_id,
            owner,
            request: Some(request.clone()),
            wait_ms: how.wait_ms,
            delay_ms: how.delay_ms,
            reentrant: how.reentrant,
            ..LockAcquire::default()
        })));
        let acquire = |model: &mut Model| model.acquire(who, request.number, how);
        assert_eq!(comes(&step), self.model.once(who, &request, acquire));
        step.applied
    }

    fn release(
        &mut self,
        who: Who,
        number: Number,
        off: u64,
        back: Option<u64>,
    ) -> Applied<Primitives> {
        let token = self.token_of(who) + off;
        let place = self.model.find(&self.model.key(who));
        let entries = place.map_or(&[][..], |place| &place.requests);
        let entry = back.map_or(0, |back| {
            entries.iter().rev().nth(back as usize).map_or(1, |e| *e)
        });
        let request = self.model.request(who, number);
        let (name, session_id, owner) = self.names(who);
        let release = LockRelease {
            name,
            session_id,
            owner,
            token,
            entry,
            request: Some(request.clone()),
        };
        let step = self.driver.run(command(Command::LockRelease(release)));
        let release = |model: &mut Model| Comes::Answered(model.release(who, token, entry));
        assert_eq!(comes(&step), self.model.once(who, &request, release));
        step.applied
    }

    fn attach(&mut self, session: usize, wanted: u64) -> Applied<Primitives> {
        let id = self.model.sessions[session];
        let replaces = self
            .model
            .used
            .get(&id)
            .map_or(1, |(_, attachment)| *attachment);
        self.model.attach(id, wanted);
        let step = self.driver.run(Body::AttachSession(AttachSession {
            session_id: id.0,
            secret: self.secrets[&id].clone(),
            replaces,
            nonce: 1,
            wanted: vec![wanted],
        }));
        let Outcome::Done(answer) = step.outcome else {
            panic!("it waits");
        };
        assert!(
            matches!(answer.body, AnswerBody::SessionAttached { attachment, .. }
                if attachment == replaces + 1)
        );
        step.applied
    }

    fn cancel(&mut self, who: Who, entry: u64) -> Applied<Primitives> {
        let (name, session_id, owner) = self.names(who);
        let cancel = LockCancel {
            name,
            session_id,
            owner,
            entry,
            request: None,
        };
        let step = self.driver.run(command(Command::LockCancel(cancel)));
        assert_eq!(answer(&step), Ok(Reply::Cancelled));
        step.applied
    }

    fn force(&mut self, lock: &str, off: Option<u64>, skip_delay: bool) -> Applied<Primitives> {
        let holder = self.model.first(lock).map_or(1, |place| place.token);
        let token = off.map_or(0, |off| holder + off);
        let (name, reason) = (lock.to_owned(), REASON.to_owned());
        let force = LockForceRelease {
            name,
            reason,
            token,
            skip_delay,
        };
        let step = self.driver.run(command(Command::LockForceRelease(force)));
        match (answer(&step), self.model.force(lock, token, skip_delay)) {
            (Ok(Reply::ForceReleased(released)), Ok(place)) => self.shows(&released, &place, 0),
            (Err(rejection), Err(expected)) => assert_eq!(rejection, expected),
            (answer, expected) => panic!("{answer:?} instead of {expected:?}"),
        }
        step.applied
    }

    fn txn(&mut self, writes: &[(Key, Option<Write>)]) -> Applied<Primitives> {
        let operation = |(key, write): &(Key, Option<Write>)| {
            let key = Bytes::from(self.model.name_of(key));
            let operation = match write {
                Some(write) => Kind::Put(Put {
                    key,
                    value: write
                        .value
                        .clone()
                        .map_or(Bytes::from_static(b"hi"), encoded),
                    lease: write
                        .session
                        .map_or(0, |session| self.model.sessions[session].0),
                    ..Put::default()
                }),
                None => Kind::DeleteRange(DeleteRange {
                    key,
                    end: Bytes::new(),
                    previous: false,
                }),
            };
            Operation {
                operation: Some(operation),
            }
        };
        let success = writes.iter().map(operation).collect();
        let step = self.driver.run(Body::Txn(Txn {
            success,
            ..Txn::default()
        }));
        assert!(matches!(&step.outcome, Outcome::Done(answer)
            if matches!(&answer.body, AnswerBody::Txn(Ok(_)))));
        step.applied
    }

    fn names(&self, who: Who) -> (String, i64, String) {
        let session = self.model.sessions[who.session].0;
        (
            LOCKS[who.lock].to_owned(),
            session,
            OWNERS[who.owner].0.to_owned(),
        )
    }

    fn token_of(&self, who: Who) -> Revision {
        self.model
            .find(&self.model.key(who))
            .map_or(1, |place| place.token)
    }

    /// Grants of one lock grow: by token, and by key where one transaction made both.
    fn note_grants(&mut self, applied: &Applied<Primitives>) {
        for resolved in &applied.resolved {
            if let Ok(Reply::Granted { key, token }) = &resolved.result {
                let lock = lock_of(key).expect("only contenders are granted anything");
                let grant = (*token, key.clone());
                let before = self.told.insert(lock, grant.clone());
                assert!(
                    before.is_none_or(|before| before < grant),
                    "{grant:?} is not newer"
                );
            }
        }
    }

    fn check_queries(&self) {
        let mut all = Vec::new();
        for lock in LOCKS {
            let queue = self.model.queue(lock);
            let (locks, more) = self.locks(Some(lock), "", 0);
            assert!(!more && locks.len() == usize::from(!queue.is_empty()));
            let Some(info) = locks.first() else { continue };
            let shown: Vec<&Contender> = [&info.holder].into_iter().chain(&info.waiters).collect();
            assert_eq!(shown.len(), queue.len());
            for (at, (contender, place)) in shown.into_iter().zip(&queue).enumerate() {
                self.shows(contender, place, at);
            }
            // No wake-up is lost: whoever is first has been told.
            let first = (info.holder.token, info.holder.key.clone());
            let is_held = !queue[0].is_delay();
            assert!(!is_held || self.told[lock.as_bytes()] == first);
            assert_eq!(self.ask_check(lock, first.0), is_held);
            assert!(!self.ask_check(lock, first.0 + 1));
            all.extend(locks);
        }
        let (first, more) = self.locks(None, "", 2);
        let after = first.last().map_or("", |lock| &lock.name);
        let (rest, end) = self.locks(None, after, 2);
        assert_eq!((more, end), (all.len() > 2, false));
        let paged: Vec<_> = if more { [first, rest].concat() } else { first };
        assert_eq!(paged, all);
        for session in &self.model.sessions {
            self.check_grants(*session);
        }
    }

    fn locks(&self, name: Option<&str>, after: &str, limit: usize) -> (Vec<LockInfo>, bool) {
        let (name, after) = (name.map(str::to_owned), after.to_owned());
        match self.ask(Query::Locks { name, after, limit }) {
            Found::Locks { locks, more } => (locks, more),
            other => panic!("{other:?}"),
        }
    }

    fn ask_check(&self, lock: &str, token: Revision) -> bool {
        self.ask(Query::Check {
            name: lock.to_owned(),
            token,
        }) == Found::Checked(true)
    }

    fn check_grants(&self, session: SessionId) {
        let Found::Grants {
            grants,
            waiting,
            forced,
        } = self.ask(Query::GrantsOf(session))
        else {
            panic!("not the answer to this question");
        };
        let of_session = |place: &&Place| place.session == Some(session);
        let held = self
            .model
            .places
            .iter()
            .filter(of_session)
            .filter(|p| self.model.holds(p));
        let held: BTreeSet<_> = held
            .map(|p| {
                let entries = match p.is_native {
                    true => p.requests.clone(),
                    false => vec![0],
                };
                (Bytes::from(p.key.clone()), p.token, entries)
            })
            .collect();
        assert!(
            grants
                .into_iter()
                .map(|Held { grant, entries }| (grant.key, grant.token, entries))
                .eq(held)
        );
        let waits = self.model.places.iter().filter(of_session);
        let waits = waits.filter(|place| !self.model.holds(place));
        let request = |place: &Place| {
            if place.is_native {
                place.requests[0]
            } else {
                0
            }
        };
        let waits: BTreeSet<_> = waits
            .map(|p| (Bytes::from(p.key.clone()), p.token, request(p)))
            .collect();
        assert!(
            waiting
                .into_iter()
                .map(|Waiting { contends, request }| (contends.key, contends.token, request))
                .eq(waits)
        );
        let expected = self
            .model
            .forced
            .values()
            .filter(|forced| forced.session == session);
        assert!(forced.iter().eq(expected));
    }

    fn shows(&self, contender: &Contender, place: &Place, at: usize) {
        let left = place.delay_until.saturating_sub(self.model.now);
        assert_eq!(contender.key, place.key);
        assert_eq!(
            (contender.token, contender.session, &contender.owner[..]),
            (place.token, place.session.or(place.lost), place.owner),
        );
        assert_eq!(
            (contender.place, contender.delay_left_ms, contender.entries),
            (at, place.is_delay().then_some(left), place.requests.len()),
        );
    }

    fn ask(&self, query: Query) -> Found {
        self.driver
            .state
            .machine()
            .query(self.driver.state.view(), query)
    }
}

fn comes(step: &Step) -> Comes {
    match &step.outcome {
        Outcome::Waiting(at) => Comes::Waiting(at.clone()),
        Outcome::Done(answer) => match &answer.body {
            AnswerBody::NotRun(why) => Comes::NotRun(*why),
            _ => Comes::Answered(self::answer(step)),
        },
    }
}

fn answer(step: &Step) -> Result<Reply, Rejection> {
    match &step.outcome {
        Outcome::Done(answer) => match &answer.body {
            AnswerBody::Machine(result) => result.clone(),
            other => panic!("the machine answered {other:?}"),
        },
        Outcome::Waiting(place) => panic!("waits at {place:?}"),
    }
}

fn seen(applied: Applied<Primitives>) -> Seen {
    let resolved = applied
        .resolved
        .into_iter()
        .map(|wait| (wait.place, wait.result))
        .collect();
    let events = applied
        .events
        .into_iter()
        .filter_map(|event| match event.body {
            EventBody::Machine(body) => Some((event.session, body)),
            EventBody::SessionEnded(_) | EventBody::SessionAttached { .. } => None,
        });
    (resolved, events.collect())
}

/// The model has no order among what one command led to.
fn assert_same((resolved, events): Seen, (mut resolved_expected, mut events_expected): Seen) {
    let (mut resolved, mut events) = (resolved, events);
    for list in [&mut resolved, &mut resolved_expected] {
        list.sort_by_key(|resolved| format!("{resolved:?}"));
    }
    for list in [&mut events, &mut events_expected] {
        list.sort_by_key(|event| format!("{event:?}"));
    }
    assert_eq!((resolved, events), (resolved_expected, events_expected));
}

fn encoded(value: LockContender) -> Bytes {
    value.encode_to_vec().into()
}

fn who() -> impl Strategy<Value = Who> {
    (0..SESSIONS, 0..LOCKS.len(), 0..OWNERS.len()).prop_map(|(session, lock, owner)| Who {
        session,
        lock,
        owner,
    })
}

/// The writes of one transaction, each to a key of its own.
fn writes() -> impl Strategy<Value = Vec<(Key, Option<Write>)>> {
    let key = prop_oneof![
        2 => who().prop_map(Key::Native),
        1 => (0..OTHER_KEYS.len()).prop_map(Key::Other),
    ];
    let delay_until_ms = prop_oneof![Just(0u64), 1u64..60];
    let mark = prop_oneof![3 => Just(MARK), 1 => Just(0)];
    let value = (0u64..4, 0u64..60, delay_until_ms, mark).prop_map(
        |(request, wait_until_ms, delay_until_ms, mark)| LockContender {
            mark,
            request,
            wait_until_ms,
            delay_until_ms,
            delay_ms: wait_until_ms / 2,
            reentrant: wait_until_ms % 2 == 0,
            ..LockContender::default()
        },
    );
    let write = (prop::option::of(value), prop::option::of(0..SESSIONS))
        .prop_map(|(value, session)| Write { value, session });
    prop::collection::vec((key, prop::option::of(write)), 1..5).prop_map(|mut writes| {
        let mut keys = BTreeSet::new();
        writes.retain(|(key, _)| keys.insert(format!("{key:?}")));
        writes
    })
}

fn action() -> impl Strategy<Value = Action> {
    let wait_ms = prop_oneof![Just(None), Just(Some(0)), (1u64..30).prop_map(Some)];
    let delay_ms = prop_oneof![Just(0u64), 1u64..30];
    let how = (wait_ms, delay_ms, any::<bool>()).prop_map(|(wait_ms, delay_ms, reentrant)| How {
        wait_ms,
        delay_ms,
        reentrant,
    });
    let which = || {
        prop_oneof![
            1 => Just(Which::None),
            4 => Just(Which::Fresh),
            1 => (0u64..4).prop_map(Which::Again),
        ]
    };
    let lag = || prop_oneof![2 => Just(None), 1 => (0u64..5).prop_map(Some)];
    let number = || {
        (which(), lag(), any::<bool>(), prop::bool::weighted(0.05)).prop_map(
            |(which, lag, leaves_one, is_old)| Number {
                which,
                lag,
                leaves_one,
                is_old,
            },
        )
    };
    let off = || prop_oneof![4 => Just(0u64), 1 => 1u64..3];
    let reason = prop_oneof![Just(EndReason::Closed), Just(EndReason::Expired)];
    prop_oneof![
        8 => (who(), number(), how)
            .prop_map(|(who, number, how)| Action::Acquire { who, number, how }),
        6 => (who(), number(), off(), prop::option::of(0u64..3))
            .prop_map(|(who, number, off, back)| Action::Release { who, number, off, back }),
        2 => (who(), 0u64..5).prop_map(|(who, back)| Action::Cancel { who, back }),
        1 => (0..SESSIONS, 0u64..4)
            .prop_map(|(session, back)| Action::Attach { session, back }),
        1 => (0..LOCKS.len(), prop::option::of(off()), any::<bool>())
            .prop_map(|(lock, off, skip_delay)| Action::Force { lock, off, skip_delay }),
        2 => writes().prop_map(Action::Txn),
        1 => (0..SESSIONS, reason).prop_map(|(session, reason)| Action::End { session, reason }),
        3 => (0u64..15).prop_map(|ms| Action::Pass { ms }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1_024,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_command_does_what_a_list_of_contenders_would(
        actions in prop::collection::vec(action(), 1..80),
    ) {
        let mut world = World::new();
        for action in &actions {
            world.step(action);
        }
    }
}
