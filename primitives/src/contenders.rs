//! Who contends for what, in order: the index over the contenders of all names.
//!
//! One rule says who holds: the live key with the lowest (create revision, key)
//! among the contenders of a name; nobody, while that is the key of a holder that
//! was lost with a delay. Keys are the truth and this is derived from
//! them. Every change of keys passes through [`Contenders::update`], whoever made
//! it, and [`Contenders::rebuild`] makes the same from the keys alone.
//!
//! All names share one ordered map, so that a name costs nothing but its
//! contenders, and an operation costs O(log n) in the number of all contenders.

use std::{
    borrow::Borrow,
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, Revision, SessionId},
    keyspace::{Change, KeyRange, Keyspace, Record},
    machine::Place,
};

use crate::{
    name,
    value::{self, Standing},
};

/// A place in a queue. Their order is the rule: tickets of one name follow each other,
/// the holder first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// The contender's key.
    pub(crate) key: Bytes,
    /// How much of that is the name contended for.
    name_bytes: u16,
    /// The token, once it holds.
    pub(crate) create_revision: Revision,
}

/// The index. See the module.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Contenders {
    /// Every contender, and every delay that runs.
    tickets: BTreeMap<Ticket, Standing>,
    /// How many candidates an election has; by what lies beside their keys.
    elections: BTreeMap<Bytes, usize>,
    /// How many plain contenders of a lock have waited; by what lies beside their keys.
    plain_waits: BTreeMap<Bytes, usize>,
    /// For how much each session contends, if it does.
    of_sessions: BTreeMap<SessionId, usize>,
    /// When candidates wait no longer.
    deadlines: BTreeMap<Ticket, LogTime>,
    /// The waits and delays that end. A holder waits no more and is not here.
    timers: BTreeSet<(LogTime, Ticket)>,
}

/// What a command changed.
#[derive(Debug, Default)]
pub(crate) struct Shift {
    /// Contenders that were there before the command and are no more, in the order
    /// in which they went; also those of which only a delay is left.
    pub(crate) gone: Vec<Gone>,
    /// Who holds now and did not before, in order of name.
    pub(crate) granted: Vec<Ticket>,
    /// The keys of those who were candidates before the command and are no more.
    pub(crate) campaigns_over: BTreeSet<Bytes>,
}

/// A contender that is no more.
#[derive(Debug)]
pub(crate) struct Gone {
    pub(crate) ticket: Ticket,
    /// Whether it held; else it waited.
    pub(crate) held: bool,
    /// The session that its key was bound to.
    pub(crate) session: Option<SessionId>,
}

impl Ticket {
    fn of(record: &Record) -> Option<Self> {
        let lock = name::lock_of(&record.key)?;
        Some(Self::new(record.key.clone(), &lock, record.create_revision))
    }

    fn new(key: Bytes, lock: &Bytes, create_revision: Revision) -> Self {
        let name_bytes = u16::try_from(lock.len()).unwrap_or(u16::MAX);
        Self {
            key,
            name_bytes,
            create_revision,
        }
    }

    /// Before every ticket of a name.
    fn before(lock: &Bytes) -> Self {
        Self::new(lock.clone(), lock, Revision::MIN)
    }

    /// Behind every ticket of a name, since no key has this revision.
    fn behind(lock: &Bytes) -> Self {
        Self::new(lock.clone(), lock, Revision::MAX)
    }

    /// The name contended for; shares the memory of the key.
    pub(crate) fn lock(&self) -> Bytes {
        self.key.slice(..usize::from(self.name_bytes))
    }

    /// The name contended for.
    pub(crate) fn lock_name(&self) -> String {
        String::from_utf8_lossy(self.name()).into_owned()
    }

    /// Where its request waits, if one does.
    pub(crate) fn place(&self) -> Place {
        Place {
            revision: self.create_revision,
            key: self.key.clone(),
        }
    }

    fn name(&self) -> &[u8] {
        &self.key[..self.name_bytes.into()]
    }
}

impl Ord for Ticket {
    fn cmp(&self, other: &Self) -> Ordering {
        let names = self.name().cmp(other.name());
        let places = || (self.create_revision, &self.key).cmp(&(other.create_revision, &other.key));
        names.then_with(places)
    }
}

impl PartialOrd for Ticket {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Contenders {
    /// The index for these keys.
    pub(crate) fn rebuild(keyspace: &Keyspace) -> Self {
        let keys = KeyRange::prefix(b"");
        let mut tickets = Vec::new();
        let mut contenders = Self::default();
        for record in keyspace.range(&keys, None) {
            contenders.insert_beside(record);
            contenders.insert_plain_wait(&record.key);
            if let Some(ticket) = Ticket::of(record) {
                contenders.count(record);
                tickets.push((ticket, Standing::of(record)));
            }
        }
        // Nearly in order, so sorted at once, and a tree at once.
        contenders.tickets = tickets.into_iter().collect();
        let ends = contenders.tickets.iter();
        let ends = ends.filter_map(|(ticket, standing)| Some((standing.end()?, ticket)));
        let deadlines = contenders
            .deadlines
            .iter()
            .map(|(ticket, end)| (*end, ticket));
        let mut timers = Vec::new();
        for (end, ticket) in ends.chain(deadlines) {
            if contenders.holder(&ticket.lock()) != Some(ticket) {
                timers.push((end, ticket.clone()));
            }
        }
        contenders.timers = timers.into_iter().collect();
        contenders
    }

    /// Takes note of what one command changed. Who holds is settled once, at the
    /// end: one who was first only in between never held.
    pub(crate) fn update(&mut self, changes: &[Change]) -> Shift {
        let mut shift = Shift::default();
        let mut holders = BTreeMap::<Bytes, Option<Ticket>>::new();
        // Written over a delay: they did not contend before the command.
        let mut over_delays = BTreeSet::new();
        for change in changes {
            self.update_plain_waits(change);
            let candidate = name::candidate_of(&change.key);
            let Some(lock) = name::lock_of(candidate.as_ref().unwrap_or(&change.key)) else {
                continue;
            };
            let holder = holders
                .entry(lock)
                .or_insert_with_key(|lock| self.holder(lock).cloned());
            if let Some(candidate) = candidate {
                self.update_beside(change);
                if change.after.is_none() {
                    shift.campaigns_over.insert(candidate);
                }
                continue;
            }
            let removed = change
                .before
                .as_ref()
                .and_then(|record| self.remove(record));
            let inserted = change.after.as_ref().and_then(|record| self.insert(record));
            let was_before = |ticket: &Ticket| ticket.create_revision < change.revision;
            if removed.is_none() {
                over_delays.extend(inserted.clone().filter(was_before));
            }
            if let Some(ticket) = removed
                && inserted.as_ref() != Some(&ticket)
                && was_before(&ticket)
                && !over_delays.contains(&ticket)
            {
                let session = change.before.as_ref().and_then(|record| record.lease);
                shift.gone.push(Gone {
                    held: holder.as_ref() == Some(&ticket),
                    ticket,
                    session,
                });
            }
        }
        for (lock, before) in holders {
            let Some((holder, wait)) = self.holder_and_wait(&lock) else {
                continue;
            };
            let holder = holder.clone();
            self.stop_wait(&holder, wait);
            #[cfg(conclave_plant)]
            let holder = match self.queue(&lock).nth(1) {
                Some(second) if conclave_core::plant::is("grant-second") => second.clone(),
                _ => holder,
            };
            if before.as_ref() != Some(&holder) {
                shift.granted.push(holder);
            }
        }
        shift
    }

    /// Who holds this: nobody, while a delay runs.
    pub(crate) fn holder(&self, lock: &Bytes) -> Option<&Ticket> {
        self.holder_and_wait(lock).map(|(holder, _)| holder)
    }

    /// The same, and when its wait would have ended.
    fn holder_and_wait(&self, lock: &Bytes) -> Option<(&Ticket, Option<LogTime>)> {
        match self.entries(lock).next()? {
            (holder, Standing::Contends(end)) => Some((holder, *end)),
            (_, Standing::Delays(_)) => None,
        }
    }

    /// Who is in the way of everyone else: the holder, or one that was lost.
    pub(crate) fn first(&self, lock: &Bytes) -> Option<&Ticket> {
        self.queue(lock).next()
    }

    /// Everyone who contends for this, the first first.
    pub(crate) fn queue(&self, lock: &Bytes) -> impl Iterator<Item = &Ticket> {
        self.entries(lock).map(|(ticket, _)| ticket)
    }

    /// One descent: where the name ends is seen when it is reached.
    fn entries(&self, lock: &Bytes) -> impl Iterator<Item = (&Ticket, &Standing)> {
        let behind = self.tickets.range(Ticket::before(lock)..);
        behind.take_while(move |(ticket, _)| ticket.name() == lock)
    }

    /// The first of everything behind this name, in order of name. A step costs
    /// O(log n), whoever waits.
    pub(crate) fn firsts_after(&self, lock: Bytes) -> impl Iterator<Item = &Ticket> {
        let mut behind = Ticket::behind(&lock);
        std::iter::from_fn(move || {
            let range = (Bound::Excluded(&behind), Bound::Unbounded);
            let (first, _) = self.tickets.range(range).next()?;
            behind = Ticket::behind(&first.lock());
            Some(first)
        })
    }

    /// The elections behind this name that have candidates of this API, in order.
    pub(crate) fn elections_after(&self, name: Bytes) -> impl Iterator<Item = &Bytes> {
        let behind = (Bound::Excluded(name), Bound::Unbounded);
        self.elections.range(behind).map(|(name, _)| name)
    }

    /// Whether something lies beside the key of any contender for this: most often
    /// nothing, and this is known without a look at the keys.
    pub(crate) fn has_beside(&self, lock: &[u8]) -> bool {
        self.elections.contains_key(lock) || self.plain_waits.contains_key(lock)
    }

    /// How many locks and elections a session holds, leads and waits for, each owner
    /// counted: the keys that are bound to it and bear its name.
    pub(crate) fn contends_for(&self, session: SessionId) -> usize {
        self.of_sessions.get(&session).copied().unwrap_or(0)
    }

    /// The wait or delay that ends first, and when.
    pub(crate) fn first_timer(&self) -> Option<&(LogTime, Ticket)> {
        self.timers.first()
    }

    /// Takes note of what is beside a candidate's key.
    fn update_beside(&mut self, change: &Change) {
        if let Some((ticket, end)) = change.before.as_ref().and_then(beside) {
            if let Some(end) = end {
                self.deadlines.remove(&ticket);
                self.timers.remove(&(end, ticket.clone()));
            }
            uncount(&mut self.elections, ticket.name());
        }
        if let Some(record) = &change.after {
            self.insert_beside(record);
        }
    }

    fn insert_beside(&mut self, record: &Record) {
        let Some((ticket, end)) = beside(record) else {
            return;
        };
        *self.elections.entry(ticket.lock()).or_default() += 1;
        if let Some(end) = end {
            self.timers.insert((end, ticket.clone()));
            self.deadlines.insert(ticket, end);
        }
    }

    fn update_plain_waits(&mut self, change: &Change) {
        match (&change.before, &change.after) {
            (None, Some(_)) => self.insert_plain_wait(&change.key),
            (Some(_), None) => {
                if let Some(lock) = name::plain_wait_of(&change.key) {
                    uncount(&mut self.plain_waits, &lock);
                }
            }
            _ => {}
        }
    }

    fn insert_plain_wait(&mut self, key: &Bytes) {
        if let Some(lock) = name::plain_wait_of(key) {
            *self.plain_waits.entry(lock).or_default() += 1;
        }
    }

    /// The ticket, if it contends.
    fn insert(&mut self, record: &Record) -> Option<Ticket> {
        let ticket = Ticket::of(record)?;
        let standing = Standing::of(record);
        if let Some(end) = standing.end() {
            self.timers.insert((end, ticket.clone()));
        }
        self.count(record);
        self.tickets.insert(ticket.clone(), standing);
        matches!(standing, Standing::Contends(_)).then_some(ticket)
    }

    /// The ticket, if it contended.
    fn remove(&mut self, record: &Record) -> Option<Ticket> {
        let ticket = Ticket::of(record)?;
        let standing = self.tickets.remove(&ticket)?;
        if let Some(session) = contends_as(record) {
            uncount(&mut self.of_sessions, &session);
        }
        if let Some(end) = standing.end() {
            self.timers.remove(&(end, ticket.clone()));
        }
        matches!(standing, Standing::Contends(_)).then_some(ticket)
    }

    /// Notes whose contender this is.
    fn count(&mut self, record: &Record) {
        if let Some(session) = contends_as(record) {
            *self.of_sessions.entry(session).or_default() += 1;
        }
    }

    fn stop_wait(&mut self, ticket: &Ticket, wait: Option<LogTime>) {
        for end in wait.into_iter().chain(self.deadlines.get(ticket).copied()) {
            self.timers.remove(&(end, ticket.clone()));
        }
    }
}

/// Takes back what was counted.
fn uncount<K: Borrow<Q> + Ord, Q: Ord + ?Sized>(counts: &mut BTreeMap<K, usize>, of: &Q) {
    let count = counts.get_mut(of).expect("it was counted when it came");
    *count -= 1;
    if *count == 0 {
        counts.remove(of);
    }
}

/// The session that contends with this key, if it is bound to one whose name it bears. Any
/// other key with a `/` may be only a key.
fn contends_as(record: &Record) -> Option<SessionId> {
    record
        .lease
        .filter(|session| name::is_of(&record.key, *session))
}

/// Whose request is beside a key, and when its wait ends.
fn beside(record: &Record) -> Option<(Ticket, Option<LogTime>)> {
    let key = name::candidate_of(&record.key)?;
    let lock = name::lock_of(&key)?;
    let ticket = Ticket::new(key, &lock, record.create_revision);
    let end = value::campaign(record)?.wait_until_ms;
    Some((ticket, (end != 0).then_some(end)))
}
