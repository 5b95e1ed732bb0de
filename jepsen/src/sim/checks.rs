//! All checkers of a run, and how what nodes and clients do is told to them.

mod histories;

use std::collections::BTreeMap;

use bytes::Bytes;
use conclave_core::{
    ids::{NodeId, Revision, SessionId},
    keyspace::{Interest, KeyRange, Keyspace},
    machine::Machine as _,
    replica::{Answer, AnswerBody, Event, EventBody, Replica},
    session::EndReason,
    state::State,
};
use conclave_primitives::{
    Event as LockEvent, Leader, LossReason, Primitives, Reply as LockReply, observer::Observer,
};
use conclave_proto::internal::{Campaign, LockContender};
use prost::Message as _;

use super::{
    ground::{About, Call},
    replay::Replay,
};
use crate::checkers::{
    STAYS_UP, Verdict, Violation, WHOLE_CHECKPOINT,
    acknowledged::{Acknowledged, Known},
    broken,
    early_expiry::{EarlyExpiry, Moment, NODES_MAX},
    equal_state::{self, EqualState},
    fifo,
    leases::Leases,
    linearizable::{ABSENT, Action, Linearizable, Operation},
    liveness::Liveness,
    lock_delay::LockDelay,
    observed::{Observed, Said},
    once::Once,
    one_holder::OneHolder,
    serializable::Serializable,
    shared,
    tokens_grow::TokensGrow,
    wakeups::Wakeups,
    watched::Watched,
};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    pub(crate) one_holder: OneHolder,
    pub(crate) tokens_grow: TokensGrow,
    pub(crate) wakeups: Wakeups,
    pub(crate) early_expiry: EarlyExpiry,
    pub(crate) equal_state: EqualState,
    pub(crate) linearizable: Linearizable,
    pub(crate) acknowledged: Acknowledged,
    pub(crate) liveness: Liveness,
    pub(crate) lock_delay: LockDelay,
    pub(crate) once: Once,
    pub(crate) serializable: Serializable,
    pub(crate) watched: Watched,
    pub(crate) leases: Leases,
    replay: Replay,
    observed: Observed,
    /// By node and lock.
    observers: BTreeMap<(usize, usize), (Revision, Observer)>,
    /// The first.
    violation: Option<Violation>,
}

impl Checks {
    /// Takes a verdict; the first one against ends the run.
    pub(crate) fn note(&mut self, verdict: Verdict) {
        if let Err(violation) = verdict {
            self.violation.get_or_insert(violation);
        }
    }

    pub(crate) fn violation(&self) -> Option<&Violation> {
        self.violation.as_ref()
    }

    /// A node stopped although its disk did nothing wrong.
    pub(crate) fn node_failed(&mut self, node: usize, why: &dyn std::fmt::Display) {
        self.note(broken(STAYS_UP, format!("node {node} stopped: {why}")));
    }

    /// A node starts and finds no whole checkpoint, although none was damaged.
    pub(crate) fn checkpoint_missing(&mut self, node: usize) {
        let what = format!("node {node} starts without a whole checkpoint of what it cut off");
        self.note(broken(WHOLE_CHECKPOINT, what));
    }

    /// A node takes a call in under a number.
    pub(crate) fn arrived(&mut self, node: usize, number: u64, call: &Call) {
        match call.about {
            About::Acquire {
                lock,
                session,
                request,
                first: true,
            } => {
                self.wakeups.arrived(node, lock, number, session, request);
            }
            About::Acquire {
                lock,
                session,
                request,
                first: false,
            } => {
                self.wakeups.repeated(lock, session, request);
            }
            _ => {}
        }
    }

    /// A node will not answer a call it took in.
    pub(crate) fn dropped(&mut self, node: usize, number: u64, about: About) {
        if let About::Acquire { lock, .. } = about {
            self.wakeups.answered(node, lock, number);
        }
    }

    /// A node tells sessions.
    pub(crate) fn published(
        &mut self,
        event: &Event<LockEvent>,
        at: Moment,
        led_since: impl Fn(u64) -> [bool; NODES_MAX],
    ) {
        match &event.body {
            EventBody::SessionEnded(EndReason::Expired) => {
                let session = event.session.0;
                let since = self.early_expiry.renewed_at(session).unwrap_or(0);
                let verdict = self.early_expiry.expired(session, at, led_since(since));
                self.note(verdict);
            }
            EventBody::SessionEnded(_) | EventBody::SessionAttached { .. } => {}
            EventBody::Machine(LockEvent::GrantLost { grant, reason }) => {
                if matches!(reason, LossReason::Forced(_)) {
                    self.forced(grant.token);
                }
            }
        }
    }

    fn forced(&mut self, token: u64) {
        self.one_holder.forced(token);
        self.tokens_grow.forced(token);
        self.acknowledged.forced(token);
    }

    /// A node answers a call. Whether it is a numbered one that was answered before.
    pub(crate) fn answered(
        &mut self,
        about: About,
        sent: Moment,
        answer: &Answer<Primitives>,
        now_us: u64,
        state: &State<Primitives>,
    ) -> bool {
        let is_again = self.answered_once(about, answer, state);
        let verdict = match (about, &answer.body) {
            (About::Open { first_sent }, AnswerBody::SessionOpened { session, ttl_ms }) => {
                self.acknowledged.opened(session.0);
                self.early_expiry.renewed(session.0, first_sent, *ttl_ms)
            }
            (About::Renew { session }, AnswerBody::Renewed { ttl_ms }) => {
                self.early_expiry.renewed(session, sent, *ttl_ms)
            }
            (About::Close { session }, AnswerBody::Done) => {
                self.acknowledged.closed(session);
                Ok(())
            }
            (
                About::Acquire { lock, session, .. },
                AnswerBody::Machine(Ok(LockReply::Granted { token, .. })),
            ) => {
                let is_forced = |token| state.system().forced_release(token).is_some();
                let verdict = self.lock_delay.answered(now_us, lock, *token, is_forced);
                self.note(verdict);
                self.granted(lock, session, *token, answer.revision, state.keyspace())
            }
            (About::Proclaim { lock, token, said }, AnswerBody::Machine(Ok(_))) => {
                self.observed
                    .proclaimed(lock, answer.revision, (token, said));
                Ok(())
            }
            (about, AnswerBody::Machine(Ok(LockReply::Released | LockReply::Resigned))) => {
                self.released(about, answer.revision, state)
            }
            _ => Ok(()),
        };
        self.note(verdict);
        is_again
    }

    /// Of a session that has ended nothing is remembered.
    fn answered_once(
        &mut self,
        about: About,
        answer: &Answer<Primitives>,
        state: &State<Primitives>,
    ) -> bool {
        let (session, number) = match about {
            About::Acquire {
                session, request, ..
            }
            | About::Release {
                session, request, ..
            } if request != 0 => (session, request),
            _ => return false,
        };
        let id = SessionId(session);
        let AnswerBody::Machine(result) = &answer.body else {
            return false;
        };
        if state.sessions().get(id).is_none() {
            return false;
        }
        let said = format!("{result:?}");
        match self.once.answered(session, number, answer.revision, said) {
            Ok(is_again) => is_again,
            Err(violation) => {
                self.note(Err(violation));
                true
            }
        }
    }

    fn granted(
        &mut self,
        lock: usize,
        session: i64,
        token: u64,
        revision: u64,
        keyspace: &Keyspace,
    ) -> Verdict {
        self.acknowledged.granted(token, revision)?;
        self.tokens_grow.answered(lock, session, token)?;
        if keyspace.check_readable(revision).is_err() {
            // Compacted since; who was alive then is not to be seen any more.
            return Ok(());
        }
        let alive: Vec<u64> = keyspace
            .range(&keys_of(lock), Some(revision))
            .map(|record| record.create_revision)
            .collect();
        self.one_holder.answered(lock, token, revision, &alive)?;
        fifo::answered(lock, token, &alive)
    }

    /// What a lost holder left while its delay runs goes with any release of it.
    fn released(&mut self, about: About, revision: u64, state: &State<Primitives>) -> Verdict {
        let is_lost = |token, session| {
            let is_forced = state.system().forced_release(token).is_some();
            is_forced || state.sessions().get(SessionId(session)).is_none()
        };
        match about {
            About::Release {
                lock,
                token,
                session,
                left,
                ..
            } => {
                if left == 0 {
                    self.acknowledged.released(token, revision)?;
                }
                let keyspace = state.keyspace();
                if is_lost(token, session) || keyspace.check_readable(revision).is_err() {
                    return Ok(());
                }
                let is_there = keyspace
                    .range(&keys_of(lock), Some(revision))
                    .any(|record| record.create_revision == token);
                shared::released(token, left, is_there)
            }
            About::UndoneRelease { token, session } if !is_lost(token, session) => {
                shared::released_again(token)
            }
            _ => Ok(()),
        }
    }

    /// A turn of a node is over, and has applied something.
    pub(crate) fn applied(&mut self, node: usize, locks: usize, replica: &Replica<Primitives>) {
        let state = replica.state();
        let verdict = self
            .equal_state
            .applied(node, state.applied(), state.digest());
        self.note(verdict);
        for election in (0..locks).filter(|lock| is_election(*lock)) {
            self.observe(node, election, state.keyspace());
        }
        for lock in 0..locks {
            if self.wakeups.watches(node, lock)
                && let Some((session, requests)) = first_in_line(state.keyspace(), lock)
            {
                for request in requests {
                    let verdict = self.wakeups.after_turn(node, lock, session, request);
                    self.note(verdict);
                }
            }
        }
    }

    /// Observers at a node are told what it has applied.
    fn observe(&mut self, node: usize, election: usize, keyspace: &Keyspace) {
        let name = lock_name(election);
        let of = Interest {
            range: Observer::range(&name),
            puts: true,
            deletes: true,
        };
        let now = keyspace.revision();
        let known = self.observers.get_mut(&(node, election));
        // One that was restarted, or went on from a checkpoint, may know less or more.
        let known = known.filter(|(told, _)| *told <= now && keyspace.knows_all(&of, told + 1));
        let Some((behind, observer)) = known else {
            let records = keyspace.range(&of.range, None).cloned();
            let observer = Observer::new(&name, records);
            let said = observer.leader().map(said);
            self.observers.insert((node, election), (now, observer));
            let verdict = self.observed.begins(node, election, now, said);
            return self.note(verdict);
        };
        let behind = std::mem::replace(behind, now);
        let excerpt = keyspace.events_since(&of, behind + 1, usize::MAX, u64::MAX);
        let observations = observer.take(&excerpt.events);
        let told: Vec<Revision> = observations.iter().map(|one| one.revision).collect();
        for observation in observations {
            let said: Said = observation.leader.map(said);
            let verdict = self
                .observed
                .told(node, election, observation.revision, said);
            self.note(verdict);
        }
        let verdict = self.observed.left_out(node, election, behind, now, &told);
        self.note(verdict);
        self.observed.passed(node, election, now);
    }

    /// The index of a node against the same made anew.
    pub(crate) fn rebuilt(&mut self, replica: &Replica<Primitives>) {
        let state = replica.state();
        let anew = Primitives::rebuild(state.keyspace());
        self.note(equal_state::same(
            "the index and the index made anew",
            state.machine(),
            &anew,
        ));
    }

    /// The end of a run: what is left, and whether all nodes have applied this entry.
    pub(crate) fn in_the_end(
        &mut self,
        now_us: u64,
        locks: usize,
        upto: u64,
        replicas: &[(NodeId, Option<&Replica<Primitives>>)],
    ) {
        let applied: Vec<Option<u64>> = replicas
            .iter()
            .map(|(_, replica)| Some((*replica)?.state().applied()))
            .collect();
        let contenders: Vec<String> = replicas
            .iter()
            .filter_map(|(_, replica)| *replica)
            .take(1)
            .flat_map(|replica| contenders(replica.state().keyspace(), locks))
            .collect();
        let verdict = self.liveness.drained(&contenders, &applied, upto);
        self.note(verdict);
        let running: Vec<&Replica<Primitives>> = replicas
            .iter()
            .filter_map(|(_, replica)| *replica)
            .collect();
        for pair in running.windows(2) {
            let (left, right) = (pair[0].state(), pair[1].state());
            if left.applied() == right.applied() {
                let digests = (left.digest(), right.digest());
                self.note(equal_state::same("final digests", &digests.0, &digests.1));
                self.note(equal_state::same(
                    "final keys",
                    left.keyspace(),
                    right.keyspace(),
                ));
                self.note(equal_state::same(
                    "final indexes",
                    left.machine(),
                    right.machine(),
                ));
                self.note(equal_state::same(
                    "final sessions",
                    left.sessions(),
                    right.sessions(),
                ));
                self.note(equal_state::same(
                    "final system",
                    left.system(),
                    right.system(),
                ));
            }
        }
        if let Some(replica) = running.first() {
            self.rebuilt(replica);
            self.nothing_is_forgotten(now_us, locks, replica);
        }
    }

    fn nothing_is_forgotten(&mut self, now_us: u64, locks: usize, replica: &Replica<Primitives>) {
        let state = replica.state();
        let known = |session| {
            let session = SessionId(session);
            if state.sessions().get(session).is_some() {
                Known::Alive
            } else if state.system().end_reason(session) == EndReason::Unknown {
                Known::Nothing
            } else {
                Known::Ended
            }
        };
        let alive = (0..locks).flat_map(|lock| {
            let keys: Vec<u64> = state
                .keyspace()
                .range(&keys_of(lock), None)
                .map(|record| record.create_revision)
                .collect();
            keys
        });
        let verdict = self.acknowledged.in_the_end(known, alive);
        self.note(verdict);
        let keys: Vec<u64> = self.linearizable.keys().collect();
        for key in keys {
            let record = state.keyspace().get(&register_key(key));
            let value = record.map_or(ABSENT, |record| register_value(&record.value));
            let operation = Operation {
                called_us: now_us,
                returned_us: Some(now_us),
                action: Action::Read(value),
            };
            self.linearizable.record(key, operation);
        }
        let verdict = self.linearizable.verdict();
        self.note(verdict);
        let verdict = self.observed.in_the_end();
        self.note(verdict);
    }
}

/// Whether it is an election.
pub(crate) fn is_election(lock: usize) -> bool {
    lock % 2 == 1
}

/// The name of a lock.
pub(crate) fn lock_name(lock: usize) -> String {
    format!("lock-{lock}")
}

/// The key of a register.
pub(crate) fn register_key(key: u64) -> Bytes {
    format!("register/{key}").into()
}

/// The value in a register, as its client wrote it.
pub(crate) fn register_value(bytes: &[u8]) -> u64 {
    std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.parse().ok())
        .expect("only register clients write here")
}

/// The term of a leader, and what it says; clients say numbers.
fn said(leader: Leader) -> (u64, u64) {
    let said = <[u8; 8]>::try_from(&leader.value[..]);
    (leader.term, said.map_or(u64::MAX, u64::from_be_bytes))
}

fn keys_of(lock: usize) -> KeyRange {
    KeyRange::prefix(format!("lock-{lock}/").as_bytes())
}

/// The session with the lowest create revision, and its requests.
fn first_in_line(keyspace: &Keyspace, lock: usize) -> Option<(i64, Vec<u64>)> {
    let first = keyspace
        .range(&keys_of(lock), None)
        .min_by_key(|record| record.create_revision)?;
    let beside = [b"_conclave/elect/", &first.key[..]].concat();
    let requests = match keyspace.get(&beside) {
        Some(campaign) => vec![Campaign::decode(campaign.value.clone()).ok()?.request],
        None => {
            let contender = LockContender::decode(first.value.clone()).ok()?;
            let mut requests = contender.inner;
            requests.push(contender.request);
            requests
        }
    };
    Some((first.lease?.0, requests))
}

fn contenders(keyspace: &Keyspace, locks: usize) -> Vec<String> {
    (0..locks)
        .flat_map(|lock| {
            let range = keys_of(lock);
            let keys: Vec<String> = keyspace
                .range(&range, None)
                .map(|record| String::from_utf8_lossy(&record.key).into_owned())
                .collect();
            keys
        })
        .collect()
}
