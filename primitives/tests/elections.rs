//! Elections against a naive model: a list of contenders, sorted for every question.
//!
//! Beside what the model says, it is checked that terms of an election grow, and that
//! observers that begin at any revision are told what the model saw: every leader, every
//! word of it, in order.

mod harness;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    keyspace::{Interest, KeyRange},
    machine::{Machine as _, Outcome, Place as At},
    replica::{AnswerBody, EventBody},
    session::EndReason,
};
use conclave_primitives::{
    Answer, Event, Leader, LossReason, Query, Rejection, Reply, command,
    observer::{Observation, Observer},
};
use conclave_proto::internal::{
    CloseSession, DeleteRange, ElectCampaign, ElectProclaim, ElectResign, LockAcquire, LockCancel,
    LockForceRelease, LockRelease, Operation, Put, Txn, command::Body,
    operation::Operation as Kind, primitive_command::Command,
};
use harness::{Driver, Step};
use proptest::prelude::*;

const SESSIONS: usize = 3;
/// Keys of the second one are among those below the first.
const NAMES: [&str; 2] = ["e", "e/f"];
const OWNERS: [&str; 2] = ["", "o"];

#[derive(Clone, Copy, Debug)]
struct Who {
    session: usize,
    name: usize,
    owner: usize,
}

#[derive(Clone, Debug)]
enum Action {
    Campaign {
        who: Who,
        wait_ms: Option<u64>,
        value: u8,
        plain: bool,
    },
    /// In the term of the own key, or one that is off.
    Proclaim {
        who: Who,
        off: u64,
        value: u8,
    },
    Resign {
        who: Who,
        off: u64,
    },
    /// Of the newest request, or the one before.
    Cancel {
        who: Who,
        back: u64,
    },
    Acquire {
        who: Who,
        plain: bool,
    },
    Release {
        who: Who,
    },
    Force {
        name: usize,
    },
    /// As an etcd client, with or without a lease, maybe several in one transaction.
    Put {
        who: Vec<Who>,
        value: u8,
        lease: bool,
    },
    Delete {
        who: Who,
    },
    End {
        session: usize,
        expires: bool,
    },
    Pass {
        ms: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Role {
    Candidate {
        until: u64,
    },
    Lock,
    /// Of an etcd client, or of its lock service.
    Plain,
}

#[derive(Clone, Debug)]
struct Place {
    name: usize,
    key: String,
    session: Option<SessionId>,
    token: Revision,
    value: Bytes,
    proclaimed: Revision,
    role: Role,
    /// By which it can be withdrawn.
    tag: u64,
}

/// A term, the key that leads in it, what it said and when. One transaction may make
/// several keys of a term.
type Reign = (Revision, Bytes, Bytes, Revision);
/// Who led from a revision on.
type Reigns = Vec<(Revision, Option<Reign>)>;
type Told = (At, Result<Reply, Rejection>);

struct World {
    driver: Driver,
    sessions: Vec<SessionId>,
    places: Vec<Place>,
    last_tag: u64,
    /// By name.
    history: BTreeMap<usize, Reigns>,
    opened: usize,
}

/// What the model expects of one command.
#[derive(Debug, Default)]
struct Expected {
    answer: Option<Result<Reply, Rejection>>,
    waits_at: Option<At>,
    /// Keys that go, and why waiters and holders lose them.
    gone: Vec<String>,
    refusal: Option<Rejection>,
    loss: Option<LossReason>,
    is_forced: bool,
}

fn owner_suffix(owner: usize) -> &'static str {
    ["", ":o"][owner]
}

fn value_of(value: u8) -> Bytes {
    format!("v{value}").into()
}

impl Place {
    fn at(&self) -> At {
        At {
            revision: self.token,
            key: self.key.clone().into(),
        }
    }
}

impl World {
    fn new() -> Self {
        let mut driver = Driver::new();
        let sessions = (0..SESSIONS).map(|number| driver.open(&number.to_string(), Bytes::new()));
        let sessions = sessions.map(|session| session.expect("it opens")).collect();
        Self {
            driver,
            sessions,
            places: Vec::new(),
            last_tag: 1 << 63,
            history: BTreeMap::new(),
            opened: SESSIONS,
        }
    }

    fn revision(&self) -> Revision {
        self.driver.state.keyspace().revision()
    }

    fn key(&self, who: Who) -> String {
        let session = self.sessions[who.session];
        format!("{}/{session}{}", NAMES[who.name], owner_suffix(who.owner))
    }

    fn find(&self, key: &str) -> Option<&Place> {
        self.places.iter().find(|place| place.key == key)
    }

    fn queue(&self, name: usize) -> Vec<&Place> {
        let mut queue: Vec<&Place> = self.places.iter().filter(|p| p.name == name).collect();
        queue.sort_by_key(|place| (place.token, &place.key));
        queue
    }

    fn holder(&self, name: usize) -> Option<&Place> {
        self.queue(name).first().copied()
    }

    fn holds(&self, place: &Place) -> bool {
        self.holder(place.name).is_some_and(|h| h.key == place.key)
    }

    fn leader(&self, name: usize) -> Option<&Place> {
        self.holder(name).filter(|holder| holder.role != Role::Lock)
    }

    fn token(&self, who: Who) -> Revision {
        self.find(&self.key(who)).map_or(1, |place| place.token)
    }

    fn contender(&self, who: Who) -> (String, i64, String) {
        let session = self.sessions[who.session].0;
        (
            NAMES[who.name].to_owned(),
            session,
            OWNERS[who.owner].to_owned(),
        )
    }

    fn step(&mut self, action: &Action) {
        let before: Vec<Place> = self.places.clone();
        let holders: Vec<Option<At>> = (0..NAMES.len())
            .map(|name| self.holder(name).map(Place::at))
            .collect();
        let (step, expected) = self.run(action);
        for key in &expected.gone {
            self.places.retain(|place| place.key != *key);
        }
        let mut told: Vec<Told> = Vec::new();
        let mut events = Vec::new();
        for place in before.iter().filter(|p| expected.gone.contains(&p.key)) {
            let held = holders[place.name] == Some(place.at());
            match (held, place.session) {
                (false, _) => told.push((
                    place.at(),
                    Err(expected.refusal.clone().expect("waiters are told why")),
                )),
                (true, Some(session)) => {
                    if let Some(loss) = &expected.loss {
                        events.push((session, place.token, loss.clone()));
                    }
                }
                (true, None) => {}
            }
        }
        for (name, before) in holders.iter().enumerate() {
            if let Some(holder) = self.holder(name)
                && Some(holder.at()) != *before
            {
                let key = holder.key.clone().into();
                let token = holder.token;
                told.push((holder.at(), Ok(Reply::Granted { key, token })));
            }
        }
        self.compare(step, expected, told, events);
        self.note();
        self.check();
    }

    fn compare(
        &self,
        step: Step,
        expected: Expected,
        mut told: Vec<Told>,
        mut events: Vec<(SessionId, Revision, LossReason)>,
    ) {
        match step.outcome {
            Outcome::Waiting(place) => assert_eq!(Some(place), expected.waits_at),
            Outcome::Done(answer) => match answer.body {
                AnswerBody::Machine(Ok(Reply::ForceReleased(_))) => assert!(expected.is_forced),
                AnswerBody::Machine(result) => assert_eq!(Some(result), expected.answer),
                AnswerBody::Done | AnswerBody::Txn(Ok(_)) => assert_eq!(expected.answer, None),
                other => panic!("{other:?}"),
            },
        }
        let resolved = step.applied.resolved.into_iter();
        let mut resolved: Vec<Told> = resolved.map(|end| (end.place, end.result)).collect();
        let seen = step.applied.events.into_iter();
        let mut seen: Vec<_> = seen
            .filter_map(|event| match event.body {
                EventBody::Machine(Event::GrantLost { grant, reason }) => {
                    Some((event.session, grant.token, reason))
                }
                _ => None,
            })
            .collect();
        for list in [&mut resolved, &mut told] {
            list.sort_by_key(|told| format!("{told:?}"));
        }
        for list in [&mut seen, &mut events] {
            list.sort_by_key(|event| format!("{event:?}"));
        }
        assert_eq!((resolved, seen), (told, events));
    }

    fn run(&mut self, action: &Action) -> (Step, Expected) {
        match action.clone() {
            Action::Campaign {
                who,
                wait_ms,
                value,
                plain,
            } => self.campaign(who, wait_ms, value, plain),
            Action::Proclaim { who, off, value } => self.proclaim(who, off, value),
            Action::Resign { who, off } => self.resign(who, off),
            Action::Cancel { who, back } => self.cancel(who, back),
            Action::Acquire { who, plain } => self.acquire(who, plain),
            Action::Release { who } => self.release(who),
            Action::Force { name } => self.force(name),
            Action::Put { who, value, lease } => self.put(&who, value, lease),
            Action::Delete { who } => {
                let delete = DeleteRange {
                    key: self.key(who).into(),
                    ..DeleteRange::default()
                };
                let gone = self.find(&self.key(who)).map(|place| place.key.clone());
                let expected = Expected {
                    gone: gone.into_iter().collect(),
                    refusal: Some(Rejection::PlaceLost(LossReason::KeyDeleted)),
                    loss: Some(LossReason::KeyDeleted),
                    ..Expected::default()
                };
                (self.txn([Kind::DeleteRange(delete)]), expected)
            }
            Action::End { session, expires } => self.end(session, expires),
            Action::Pass { ms } => self.pass(ms),
        }
    }

    fn command(&mut self, body: Command) -> Step {
        self.driver.run(command(body))
    }

    fn txn(&mut self, operations: impl IntoIterator<Item = Kind>) -> Step {
        let operations = operations.into_iter().map(Some);
        let success = operations.map(|operation| Operation { operation });
        self.driver.run(Body::Txn(Txn {
            success: success.collect(),
            ..Txn::default()
        }))
    }

    fn insert(&mut self, who: Who, role: Role, value: Bytes, session: Option<SessionId>, tag: u64) {
        let token = self.revision();
        self.places.push(Place {
            name: who.name,
            key: self.key(who),
            session,
            token,
            value,
            proclaimed: token,
            role,
            tag,
        });
    }

    fn campaign(
        &mut self,
        who: Who,
        wait_ms: Option<u64>,
        value: u8,
        plain: bool,
    ) -> (Step, Expected) {
        self.last_tag += 1;
        let tag = self.last_tag;
        let (name, session_id, owner) = self.contender(who);
        let is_first = self.holder(who.name).is_none();
        let found = self.find(&self.key(who)).cloned();
        let now = self.driver.now;
        let step = self.command(Command::ElectCampaign(ElectCampaign {
            name,
            session_id,
            owner,
            tag,
            wait_ms,
            value: value_of(value),
            plain,
            ..ElectCampaign::default()
        }));
        let mut expected = Expected::default();
        match found {
            Some(place) if plain && place.role != Role::Lock => {
                let holds = self.holds(&place);
                let revision = self.revision();
                let mut places = self.places.iter_mut();
                let mine = places.find(|p| p.key == place.key);
                let mine = mine.expect("it was found");
                if mine.value != value_of(value) {
                    mine.value = value_of(value);
                    mine.proclaimed = revision;
                }
                if holds {
                    let (key, token) = (place.key.clone().into(), place.token);
                    expected.answer = Some(Ok(Reply::Granted { key, token }));
                } else {
                    // What an etcd client has made itself bears no note.
                    if matches!(mine.role, Role::Candidate { .. }) || mine.tag != 0 {
                        mine.tag = tag;
                    }
                    expected.waits_at = Some(place.at());
                }
            }
            Some(place) => {
                let token = place.token;
                expected.answer = Some(Err(Rejection::AlreadyContending { token }));
            }
            None if wait_ms == Some(0) && !is_first => {
                expected.answer = Some(Err(Rejection::Held));
            }
            None => {
                let until = wait_ms.map_or(0, |ms| now + ms + 1);
                let session = Some(self.sessions[who.session]);
                self.insert(
                    who,
                    Role::Candidate { until },
                    value_of(value),
                    session,
                    tag,
                );
                expected.waits_at = self.places.last().map(Place::at);
            }
        }
        (step, expected)
    }

    fn is_leader(&self, who: Who, token: Revision) -> bool {
        let key = self.key(who);
        let leader = self.leader(who.name);
        leader.is_some_and(|leader| leader.key == key && leader.token == token)
    }

    fn proclaim(&mut self, who: Who, off: u64, value: u8) -> (Step, Expected) {
        let token = self.token(who) + off;
        let leads = self.is_leader(who, token);
        let (name, session_id, owner) = self.contender(who);
        let step = self.command(Command::ElectProclaim(ElectProclaim {
            name,
            session_id,
            owner,
            token,
            value: value_of(value),
            request: None,
        }));
        if leads {
            let (key, revision) = (self.key(who), self.revision());
            let mine = self.places.iter_mut().find(|place| place.key == key);
            let mine = mine.expect("it leads");
            mine.value = value_of(value);
            mine.proclaimed = revision;
        }
        let answer = match leads {
            true => Ok(Reply::Proclaimed),
            false => Err(self.not_holder(who, token)),
        };
        let answer = Some(answer);
        (
            step,
            Expected {
                answer,
                ..Expected::default()
            },
        )
    }

    /// What operators did is taken from the state.
    fn not_holder(&self, who: Who, token: Revision) -> Rejection {
        let forced = self.driver.state.system().forced_release(token);
        let forced = forced.filter(|forced| forced.lock == NAMES[who.name]);
        Rejection::NotHolder {
            forced: forced.cloned(),
        }
    }

    fn resign(&mut self, who: Who, off: u64) -> (Step, Expected) {
        let token = self.token(who) + off;
        let leads = self.is_leader(who, token);
        let (name, session_id, owner) = self.contender(who);
        let step = self.command(Command::ElectResign(ElectResign {
            name,
            session_id,
            owner,
            token,
            request: None,
        }));
        let mut expected = Expected::default();
        if leads {
            expected.answer = Some(Ok(Reply::Resigned));
            expected.gone = vec![self.key(who)];
        } else {
            expected.answer = Some(Err(self.not_holder(who, token)));
        }
        (step, expected)
    }

    fn cancel(&mut self, who: Who, back: u64) -> (Step, Expected) {
        let found = self.find(&self.key(who)).cloned();
        let newest = found.as_ref().map_or(self.last_tag, |place| place.tag);
        let entry = newest.saturating_sub(back).max(1 << 63);
        let (name, session_id, owner) = self.contender(who);
        let step = self.command(Command::LockCancel(LockCancel {
            name,
            session_id,
            owner,
            entry,
            request: None,
        }));
        let gone = found.filter(|place| place.tag == entry && place.tag != 0);
        let expected = Expected {
            answer: Some(Ok(Reply::Cancelled)),
            gone: gone.map(|place| place.key).into_iter().collect(),
            refusal: Some(Rejection::Cancelled),
            ..Expected::default()
        };
        (step, expected)
    }

    fn acquire(&mut self, who: Who, plain: bool) -> (Step, Expected) {
        self.last_tag += 1;
        let tag = self.last_tag;
        let (name, session_id, owner) = self.contender(who);
        let found = self.find(&self.key(who)).cloned();
        let is_first = self.holder(who.name).is_none();
        let step = self.command(Command::LockAcquire(LockAcquire {
            name,
            session_id,
            owner,
            tag,
            plain,
            ..LockAcquire::default()
        }));
        let mut expected = Expected::default();
        match found {
            Some(place) if plain && !matches!(place.role, Role::Candidate { .. }) => {
                if self.holds(&place) {
                    let (key, token) = (place.key.into(), place.token);
                    expected.answer = Some(Ok(Reply::Granted { key, token }));
                } else {
                    expected.waits_at = Some(place.at());
                    let key = place.key.clone();
                    let mine = self.places.iter_mut().find(|p| p.key == key);
                    let mine = mine.expect("it was found");
                    if mine.role == Role::Plain {
                        mine.tag = tag;
                    }
                }
            }
            Some(place) => {
                let token = place.token;
                expected.answer = Some(Err(Rejection::AlreadyContending { token }));
            }
            None => {
                let session = Some(self.sessions[who.session]);
                let (role, tag) = match (plain, is_first) {
                    (false, _) => (Role::Lock, tag),
                    (true, true) => (Role::Plain, 0),
                    (true, false) => (Role::Plain, tag),
                };
                self.insert(who, role, Bytes::new(), session, tag);
                expected.waits_at = self.places.last().map(Place::at);
            }
        }
        (step, expected)
    }

    fn release(&mut self, who: Who) -> (Step, Expected) {
        let token = self.token(who);
        let (name, session_id, owner) = self.contender(who);
        let key = self.key(who);
        let holds = self.find(&key).is_some_and(|place| self.holds(place));
        let step = self.command(Command::LockRelease(LockRelease {
            name,
            session_id,
            owner,
            token,
            ..LockRelease::default()
        }));
        let mut expected = Expected::default();
        if holds {
            expected.answer = Some(Ok(Reply::Released));
            expected.gone = vec![key];
        } else {
            expected.answer = Some(Err(self.not_holder(who, token)));
        }
        (step, expected)
    }

    fn force(&mut self, name: usize) -> (Step, Expected) {
        let holder = self.holder(name).map(|holder| holder.key.clone());
        let step = self.command(Command::LockForceRelease(LockForceRelease {
            name: NAMES[name].to_owned(),
            reason: "r".to_owned(),
            ..LockForceRelease::default()
        }));
        let expected = Expected {
            answer: holder.is_none().then_some(Err(Rejection::NotHeld)),
            is_forced: holder.is_some(),
            gone: holder.into_iter().collect(),
            loss: Some(LossReason::Forced("r".to_owned())),
            ..Expected::default()
        };
        (step, expected)
    }

    fn put(&mut self, who: &[Who], value: u8, lease: bool) -> (Step, Expected) {
        let session = |who: &Who| lease.then(|| self.sessions[who.session]);
        let puts = who.iter().map(|who| {
            Kind::Put(Put {
                key: self.key(*who).into(),
                value: value_of(value),
                lease: session(who).map_or(0, |session| session.0),
                ..Put::default()
            })
        });
        let puts: Vec<Kind> = puts.collect();
        let step = self.txn(puts);
        for who in who {
            self.was_put(*who, value, lease);
        }
        (step, Expected::default())
    }

    fn was_put(&mut self, who: Who, value: u8, lease: bool) {
        let key = self.key(who);
        let session = lease.then(|| self.sessions[who.session]);
        let revision = self.revision();
        let Some(place) = self.places.iter_mut().find(|place| place.key == key) else {
            self.insert(who, Role::Plain, value_of(value), session, 0);
            return;
        };
        place.value = value_of(value);
        place.proclaimed = revision;
        if place.session != session || place.role == Role::Lock {
            // Nobody's request any more.
            place.role = Role::Plain;
            place.tag = 0;
        }
        place.session = session;
    }

    fn end(&mut self, session: usize, expires: bool) -> (Step, Expected) {
        let id = self.sessions[session];
        let (step, reason) = match expires {
            true => (self.driver.expire(id), EndReason::Expired),
            false => {
                let close = CloseSession {
                    session_id: id.0,
                    attachment: 0,
                };
                (
                    self.driver.run(Body::CloseSession(close)),
                    EndReason::Closed,
                )
            }
        };
        let gone = self.places.iter().filter(|place| place.session == Some(id));
        let expected = Expected {
            gone: gone.map(|place| place.key.clone()).collect(),
            refusal: Some(Rejection::SessionEnded(reason)),
            loss: Some(LossReason::SessionEnded(reason)),
            ..Expected::default()
        };
        self.opened += 1;
        let name = self.opened.to_string();
        self.sessions[session] = self.driver.open(&name, Bytes::new()).expect("it opens");
        (step, expected)
    }

    fn pass(&mut self, ms: u64) -> (Step, Expected) {
        let applied = self.driver.pass(ms);
        let now = self.driver.now;
        let over = self.places.iter().filter(|place| {
            let ends =
                matches!(place.role, Role::Candidate { until } if until != 0 && until <= now);
            ends && !self.holds(place)
        });
        let expected = Expected {
            answer: Some(Ok(Reply::Cancelled)),
            gone: over.map(|place| place.key.clone()).collect(),
            refusal: Some(Rejection::WaitTimedOut),
            ..Expected::default()
        };
        let answer = conclave_core::replica::Answer {
            revision: 0,
            term: 0,
            body: AnswerBody::Machine(Ok(Reply::Cancelled)),
        };
        let outcome = Outcome::Done(answer);
        (Step { outcome, applied }, expected)
    }

    /// Writes down who leads.
    fn note(&mut self) {
        let revision = self.revision();
        for name in 0..NAMES.len() {
            let leader = self.leader(name);
            let said = leader.map(|leader| {
                let (key, value) = (leader.key.clone().into(), leader.value.clone());
                (leader.token, key, value, leader.proclaimed)
            });
            let history = self.history.entry(name).or_default();
            if history.last().map(|(_, last)| last) != Some(&said) {
                history.push((revision, said));
            }
        }
    }

    fn check(&self) {
        for (name, text) in NAMES.iter().enumerate() {
            let question = Query::Leader {
                name: (*text).to_owned(),
            };
            let state = &self.driver.state;
            let Answer::Leader(found) = state.machine().query(state.view(), question) else {
                panic!("not a leader");
            };
            let leader = self.leader(name);
            assert_eq!(
                found.map(|f| (f.key, f.term, f.value, f.proclaimed, f.session)),
                leader.map(|l| {
                    (
                        l.key.clone().into(),
                        l.token,
                        l.value.clone(),
                        l.proclaimed,
                        l.session,
                    )
                }),
            );
            let question = Query::Elections {
                name: Some((*text).to_owned()),
                after: String::new(),
                limit: 0,
            };
            let Answer::Elections { elections, .. } = state.machine().query(state.view(), question)
            else {
                panic!("not elections");
            };
            let candidates = elections
                .first()
                .map(|e| &e.candidates[..])
                .unwrap_or_default();
            let listed = candidates
                .iter()
                .map(|c| (c.key.clone(), c.token, c.is_candidate));
            let queue = self.queue(name).into_iter().map(|place| {
                let is_candidate = matches!(place.role, Role::Candidate { .. });
                (Bytes::from(place.key.clone()), place.token, is_candidate)
            });
            assert!(listed.eq(queue));
        }
    }

    /// Terms grow, and observers see this history from wherever they begin.
    fn check_history(&self) {
        for (name, history) in &self.history {
            let terms = history.iter().filter_map(|(_, said)| said.as_ref());
            let terms: Vec<Revision> = terms.map(|(term, ..)| *term).collect();
            assert!(terms.is_sorted(), "{terms:?}");
            for (at, (revision, said)) in history.iter().enumerate() {
                let (first, rest) = self.observed(NAMES[*name], *revision);
                assert_eq!(first, *said);
                assert_eq!(rest, history[at + 1..]);
            }
        }
    }

    fn observed(&self, name: &str, revision: Revision) -> (Option<Reign>, Reigns) {
        let keyspace = self.driver.state.keyspace();
        let range = Observer::range(name);
        let records = keyspace.range(&range, Some(revision)).cloned();
        let mut observer = Observer::new(name, records);
        let of = Interest {
            range,
            puts: true,
            deletes: true,
        };
        let excerpt = keyspace.events_since(&of, revision + 1, usize::MAX, u64::MAX);
        let said = |leader: Leader| (leader.term, leader.key, leader.value, leader.proclaimed);
        let first = observer.leader().map(said);
        let rest = observer.take(&excerpt.events).into_iter();
        let rest = rest.map(|Observation { revision, leader }| (revision, leader.map(said)));
        (first, rest.collect())
    }
}

fn who() -> impl Strategy<Value = Who> {
    (0..SESSIONS, 0..NAMES.len(), 0..OWNERS.len()).prop_map(|(session, name, owner)| Who {
        session,
        name,
        owner,
    })
}

/// One or more, each another.
fn whos() -> impl Strategy<Value = Vec<Who>> {
    prop::collection::vec(who(), 1..4).prop_map(|mut whos| {
        let mut keys = BTreeSet::new();
        whos.retain(|who| keys.insert((who.session, who.name, who.owner)));
        whos
    })
}

fn action() -> impl Strategy<Value = Action> {
    let wait_ms = prop_oneof![Just(None), Just(Some(0)), (1u64..30).prop_map(Some)];
    let off = || prop_oneof![4 => Just(0u64), 1 => 1u64..3];
    prop_oneof![
        8 => (who(), wait_ms, 0u8..4, any::<bool>()).prop_map(|(who, wait_ms, value, plain)| {
            Action::Campaign { who, wait_ms, value, plain }
        }),
        5 => (who(), off(), 0u8..4).prop_map(|(who, off, value)| Action::Proclaim { who, off, value }),
        5 => (who(), off()).prop_map(|(who, off)| Action::Resign { who, off }),
        2 => (who(), 0u64..2).prop_map(|(who, back)| Action::Cancel { who, back }),
        2 => (who(), any::<bool>()).prop_map(|(who, plain)| Action::Acquire { who, plain }),
        2 => who().prop_map(|who| Action::Release { who }),
        1 => (0..NAMES.len()).prop_map(|name| Action::Force { name }),
        2 => (whos(), 0u8..4, any::<bool>()).prop_map(|(who, value, lease)| Action::Put { who, value, lease }),
        1 => who().prop_map(|who| Action::Delete { who }),
        1 => (0..SESSIONS, any::<bool>()).prop_map(|(session, expires)| Action::End { session, expires }),
        2 => (0u64..15).prop_map(|ms| Action::Pass { ms }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 512,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn elections_do_what_a_sorted_list_would(
        actions in prop::collection::vec(action(), 1..60),
    ) {
        let mut world = World::new();
        for action in &actions {
            world.step(action);
        }
        world.check_history();
        let all = KeyRange::prefix(b"");
        let everything = world.driver.state.keyspace().range(&all, None);
        let beside = everything.filter(|record| record.key.starts_with(b"_conclave/elect/"));
        let candidates = world.places.iter();
        let candidates = candidates.filter(|place| matches!(place.role, Role::Candidate { .. }));
        prop_assert_eq!(beside.count(), candidates.count());
    }
}
