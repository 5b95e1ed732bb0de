//! What clients and faults of a run share: the history, the storage that the
//! locks protect, and the evidence for the checkers.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    history::{Ending, History},
    store::{Fenced as Refused, Store},
};
use crate::checkers::{
    Verdict, Violation,
    acknowledged::Acknowledged,
    fenced::Fenced,
    linearizable::{ABSENT, Action, Linearizable, Operation},
    liveness::Liveness,
    one_holder::OneHolder,
    tokens_grow::TokensGrow,
};

/// A session that is alive, as a register has it.
const ALIVE: u64 = 1;

/// See the module.
#[derive(Debug)]
pub(crate) struct World {
    /// What happened, in Jepsen's form.
    pub(crate) history: History,
    /// Where the servers are, for clients.
    pub(crate) endpoints: Vec<String>,
    /// Locks in use at a time.
    pub(crate) locks: u64,
    evidence: Mutex<Evidence>,
    stops: AtomicBool,
}

/// An interval in which a client knew that it held a lock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Belief {
    /// The lock.
    pub(crate) lock: u64,
    /// Who.
    pub(crate) client: usize,
    /// By which grant.
    pub(crate) token: u64,
    /// It heard of the grant.
    pub(crate) since_us: u64,
    /// The last time at which it looked and still held.
    pub(crate) until_us: u64,
}

/// An acquire that was not granted as far as its client knows. It may have been
/// for a while, and others may have seen that.
#[derive(Clone, Copy, Debug)]
struct Maybe {
    lock: u64,
    session: i64,
    called_us: u64,
}

/// A list named this holder.
#[derive(Clone, Copy, Debug)]
struct Sighting {
    lock: u64,
    session: i64,
    token: u64,
    returned_us: u64,
}

/// What checkers are told.
#[derive(Debug, Default)]
struct Evidence {
    store: Store,
    locks: Linearizable,
    sessions: Linearizable,
    fenced: Fenced,
    tokens: TokensGrow,
    acknowledged: Acknowledged,
    liveness: Liveness,
    granted: BTreeSet<u64>,
    maybes: Vec<Maybe>,
    sightings: Vec<Sighting>,
    beliefs: Vec<Belief>,
    /// Completions by operation and how they ended.
    completed: BTreeMap<(&'static str, &'static str), u64>,
    unknown: u64,
    broken: Option<Violation>,
}

impl World {
    /// A world in which nothing has happened yet.
    pub(crate) fn new(history: History, endpoints: Vec<String>, locks: u64) -> Self {
        Self {
            history,
            endpoints,
            locks,
            evidence: Mutex::default(),
            stops: AtomicBool::new(false),
        }
    }

    /// Clients begin nothing new.
    pub(crate) fn stop(&self) {
        self.stops.store(true, Ordering::Relaxed);
    }

    /// Whether clients begin nothing new.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stops.load(Ordering::Relaxed) || self.is_broken()
    }

    /// Whether a promise was broken.
    pub(crate) fn is_broken(&self) -> bool {
        self.evidence().broken.is_some()
    }

    /// Takes note of a verdict.
    pub(crate) fn note(&self, verdict: Verdict) {
        self.evidence().note(verdict);
    }

    /// A client begins an operation.
    pub(crate) fn begins(&self, client: usize) {
        let now_us = self.history.now_us();
        self.evidence().liveness.begins(client, now_us);
    }

    /// A client's operation is over: done, or given up.
    pub(crate) fn ends(&self, client: usize, is_done: bool) {
        let now_us = self.history.now_us();
        let liveness = &mut self.evidence().liveness;
        if is_done {
            liveness.completes(client, now_us);
        } else {
            liveness.gone(client);
        }
    }

    /// All faults are over.
    pub(crate) fn healed(&self) {
        let now_us = self.history.now_us();
        self.evidence().liveness.healed(now_us);
    }

    /// Whether these clients were served since faults were over.
    pub(crate) fn recovered(&self, clients: usize, within_us: u64) -> Verdict {
        self.evidence().liveness.recovered(0..clients, within_us)
    }

    /// Whether nothing is left of work.
    pub(crate) fn drained(&self, contenders: &[String], applied: &[Option<u64>]) -> Verdict {
        // Asked again until they agree.
        let newest = applied.iter().flatten().max().copied().unwrap_or(0);
        self.evidence()
            .liveness
            .drained(contenders, applied, newest)
    }

    /// Counts a completion.
    pub(crate) fn completed(&self, operation: &'static str, how: &'static str, ending: Ending) {
        let mut evidence = self.evidence();
        *evidence.completed.entry((operation, how)).or_default() += 1;
        evidence.unknown += u64::from(ending == Ending::Info);
    }

    /// A client hears that it holds a lock.
    pub(crate) fn granted(&self, lock: u64, session: i64, token: u64, when: (u64, u64)) {
        let mut evidence = self.evidence();
        let index = usize::try_from(lock).expect("a small number");
        let verdict = evidence.tokens.answered(index, session, token);
        evidence.note(verdict);
        evidence.granted.insert(token);
        let action = Action::Swap {
            old: ABSENT,
            new: token,
        };
        evidence.locks.record(lock, operation(when, action));
    }

    /// A client's acquire ended in another way.
    pub(crate) fn not_granted(&self, lock: u64, session: i64, called_us: u64) {
        let maybe = Maybe {
            lock,
            session,
            called_us,
        };
        self.evidence().maybes.push(maybe);
    }

    /// A grant was released.
    pub(crate) fn released(&self, lock: u64, token: u64, when: (u64, u64)) {
        let action = release(token);
        self.evidence().locks.record(lock, operation(when, action));
    }

    /// A grant ends some time after this, or has ended; nobody will know when.
    pub(crate) fn abandoned(&self, lock: u64, token: u64, since_us: u64) {
        let lost = unknown(since_us, release(token));
        self.evidence().locks.record(lock, lost);
    }

    /// A check said that this grant holds.
    pub(crate) fn holds(&self, lock: u64, token: u64, when: (u64, u64)) {
        let seen = operation(when, Action::Read(token));
        self.evidence().locks.record(lock, seen);
    }

    /// A check or a release said that a grant does not hold, and its client
    /// trusts it.
    pub(crate) fn denied(&self, token: u64, how: &str) {
        let mut evidence = self.evidence();
        let verdict = evidence.acknowledged.denied(token, how);
        evidence.note(verdict);
    }

    /// A list named the holder of a lock, or nobody.
    pub(crate) fn listed(&self, lock: u64, holder: Option<(u64, i64)>, when: (u64, u64)) {
        let mut evidence = self.evidence();
        let token = holder.map_or(ABSENT, |(token, _)| token);
        evidence
            .locks
            .record(lock, operation(when, Action::Read(token)));
        if let Some((token, session)) = holder {
            evidence.sightings.push(Sighting {
                lock,
                session,
                token,
                returned_us: when.1,
            });
        }
    }

    /// A client knew that it held a lock for a while.
    pub(crate) fn believed(&self, belief: Belief) {
        self.evidence().beliefs.push(belief);
    }

    /// A session was opened.
    pub(crate) fn opened(&self, session: i64, when: (u64, u64)) {
        let action = Action::Swap {
            old: ABSENT,
            new: ALIVE,
        };
        let opened = operation(when, action);
        self.evidence().sessions.record(register(session), opened);
    }

    /// A session was closed.
    pub(crate) fn closed(&self, session: i64, when: (u64, u64)) {
        let closed = operation(when, release(ALIVE));
        self.evidence().sessions.record(register(session), closed);
    }

    /// A session ends some time after this.
    pub(crate) fn left(&self, session: i64, since_us: u64) {
        let left = unknown(since_us, release(ALIVE));
        self.evidence().sessions.record(register(session), left);
    }

    /// A list had this session, or had it not.
    pub(crate) fn saw(&self, session: i64, is_there: bool, when: (u64, u64)) {
        let action = Action::Read(if is_there { ALIVE } else { ABSENT });
        let seen = operation(when, action);
        self.evidence().sessions.record(register(session), seen);
    }

    /// The storage: how much there is behind a lock.
    pub(crate) fn length(&self, lock: u64, token: u64, client: usize) -> Result<usize, Refused> {
        let mut evidence = self.evidence();
        let length = evidence.store.length(lock, token)?;
        let verdict = evidence.fenced.accepted(lock, token, client);
        evidence.note(verdict);
        Ok(length)
    }

    /// The storage: puts an element where its client believes the end to be.
    pub(crate) fn put(
        &self,
        lock: u64,
        token: u64,
        client: usize,
        (place, element): (usize, u64),
    ) -> Result<(), Refused> {
        let mut evidence = self.evidence();
        let put = evidence.store.put(lock, token, place, element);
        let verdict = match put {
            Ok(()) => {
                evidence.fenced.acknowledged(lock, element);
                evidence.fenced.accepted(lock, token, client)
            }
            Err(Refused) => {
                evidence.fenced.refused_element(lock, element);
                Ok(())
            }
        };
        evidence.note(verdict);
        put
    }

    /// A client was refused by the storage, and then trusted its grant or not.
    pub(crate) fn refused(&self, lock: u64, token: u64, trusts: bool) {
        let mut evidence = self.evidence();
        let verdict = evidence.fenced.refused(lock, token, trusts);
        evidence.note(verdict);
    }

    /// The end: what all checkers say, and keys that could not be decided.
    pub(crate) fn conclude(&self) -> (Option<Violation>, Vec<u64>) {
        self.evidence().conclude()
    }

    /// Completed operations, unknown outcomes, and each kind.
    pub(crate) fn counts(&self) -> (u64, u64, String) {
        let evidence = self.evidence();
        let all: u64 = evidence.completed.values().sum();
        let each: Vec<String> = evidence
            .completed
            .iter()
            .map(|((operation, how), count)| format!("{operation}-{how}={count}"))
            .collect();
        (all - evidence.unknown, evidence.unknown, each.join(" "))
    }

    fn evidence(&self) -> MutexGuard<'_, Evidence> {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Evidence {
    fn note(&mut self, verdict: Verdict) {
        if let Err(violation) = verdict {
            self.broken.get_or_insert(violation);
        }
    }

    fn conclude(&mut self) -> (Option<Violation>, Vec<u64>) {
        let verdict = self.beliefs_agree();
        self.note(verdict);
        let lists = self.store.lists();
        let wrong = lists.map(|(lock, elements)| self.fenced.in_the_end(lock, elements));
        let wrong = wrong.collect::<Verdict>();
        self.note(wrong);
        self.explain_sightings();
        let mut undecided = Vec::new();
        for registers in [&self.locks, &self.sessions] {
            match registers.verdict_within(SEARCH_STEPS_MAX) {
                Ok(keys) => undecided.extend(keys),
                Err(violation) => {
                    self.broken.get_or_insert(violation);
                }
            }
        }
        (self.broken.clone(), undecided)
    }

    /// One holder at a time by the clock, and each with a higher token.
    fn beliefs_agree(&mut self) -> Verdict {
        self.beliefs.sort_by_key(|belief| belief.since_us);
        let mut holders = OneHolder::default();
        for belief in &self.beliefs {
            let lock = usize::try_from(belief.lock).expect("a small number");
            let Belief {
                client,
                token,
                since_us,
                until_us,
                ..
            } = *belief;
            holders.believes(since_us, lock, client, token, until_us)?;
            self.tokens.believes(lock, token)?;
        }
        Ok(())
    }

    /// A holder that nobody knew to be one must be an acquire whose client gave
    /// up. The first that can have been it explains the most.
    fn explain_sightings(&mut self) {
        for sighting in std::mem::take(&mut self.sightings) {
            if self.granted.contains(&sighting.token) {
                continue;
            }
            let candidates = self.maybes.iter().filter(|maybe| {
                (maybe.lock, maybe.session) == (sighting.lock, sighting.session)
                    && maybe.called_us <= sighting.returned_us
            });
            if let Some(called_us) = candidates.map(|maybe| maybe.called_us).min() {
                self.granted.insert(sighting.token);
                let (old, new) = (ABSENT, sighting.token);
                let granted = unknown(called_us, Action::Swap { old, new });
                self.locks.record(sighting.lock, granted);
                let ended = unknown(called_us, release(sighting.token));
                self.locks.record(sighting.lock, ended);
            }
        }
    }
}

/// What the search for an order may cost for one key.
const SEARCH_STEPS_MAX: u64 = 20_000_000;

fn operation((called_us, returned_us): (u64, u64), action: Action) -> Operation {
    Operation {
        called_us,
        returned_us: Some(returned_us),
        action,
    }
}

fn unknown(called_us: u64, action: Action) -> Operation {
    Operation {
        called_us,
        returned_us: None,
        action,
    }
}

fn release(token: u64) -> Action {
    Action::Swap {
        old: token,
        new: ABSENT,
    }
}

fn register(session: i64) -> u64 {
    session.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A world without servers, to be told what happened.
    fn world() -> World {
        let history = History::create(std::path::Path::new("/dev/null")).unwrap();
        World::new(history, Vec::new(), 1)
    }

    fn found(world: &World) -> Option<&'static str> {
        world.conclude().0.map(|violation| violation.checker)
    }

    #[test]
    fn a_hand_over_with_a_lost_holder_and_a_late_list_is_fine() {
        let world = world();
        world.granted(0, 1, 5, (0, 10));
        world.listed(0, Some((5, 1)), (11, 12));
        world.abandoned(0, 5, 20);
        world.granted(0, 2, 8, (15, 40));
        world.listed(0, None, (13, 50));
        world.released(0, 8, (60, 70));
        world.listed(0, None, (71, 72));
        assert_eq!(found(&world), None);
    }

    #[test]
    fn two_holders_are_found_by_the_order_and_by_the_clock() {
        let by_order = world();
        by_order.granted(0, 1, 5, (0, 10));
        by_order.granted(0, 2, 6, (11, 12));
        by_order.released(0, 5, (20, 30));
        assert_eq!(found(&by_order), Some("linearizable"));
        let by_clock = world();
        for (client, token, since_us) in [(1, 5, 10), (2, 6, 19)] {
            by_clock.believed(Belief {
                lock: 0,
                client,
                token,
                since_us,
                until_us: 20,
            });
        }
        assert_eq!(found(&by_clock), Some("one_holder"));
    }

    #[test]
    fn a_stale_list_is_found() {
        let world = world();
        world.granted(0, 1, 5, (0, 10));
        world.released(0, 5, (20, 30));
        world.listed(0, Some((5, 1)), (31, 32));
        assert_eq!(found(&world), Some("linearizable"));
    }

    #[test]
    fn an_unknown_holder_needs_an_acquire_that_explains_it() {
        let explained = world();
        explained.not_granted(0, 1, 5);
        explained.listed(0, Some((7, 1)), (8, 9));
        explained.granted(0, 2, 8, (10, 11));
        assert_eq!(found(&explained), None);
        let other_session = world();
        other_session.not_granted(0, 2, 5);
        other_session.listed(0, Some((7, 1)), (8, 9));
        assert_eq!(found(&other_session), Some("linearizable"));
    }

    #[test]
    fn a_session_that_is_forgotten_or_outlives_its_close_is_found() {
        let fine = world();
        fine.opened(1, (0, 1));
        fine.saw(1, true, (2, 3));
        fine.closed(1, (4, 5));
        fine.saw(1, false, (6, 7));
        assert_eq!(found(&fine), None);
        let forgotten = world();
        forgotten.opened(1, (0, 1));
        forgotten.saw(1, false, (2, 3));
        forgotten.left(1, 4);
        assert_eq!(found(&forgotten), Some("linearizable"));
        let outlived = world();
        outlived.opened(1, (0, 1));
        outlived.closed(1, (4, 5));
        outlived.saw(1, true, (6, 7));
        assert_eq!(found(&outlived), Some("linearizable"));
    }

    #[test]
    fn the_storage_refuses_the_past_and_tells_who_was_wronged() {
        let world = world();
        assert_eq!(world.length(0, 6, 1), Ok(0));
        assert_eq!(world.put(0, 6, 1, (0, 60)), Ok(()));
        assert_eq!(world.put(0, 5, 2, (1, 50)), Err(Refused));
        world.refused(0, 5, false);
        assert_eq!(found(&world), None);
        world.refused(0, 5, true);
        assert_eq!(found(&world), Some("fenced"));
    }
}
