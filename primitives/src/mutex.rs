//! The mutex: one holder at a time, first come first served, with a fencing token
//! on every grant.
//!
//! **Keys.** A contender of lock `N` is a key `N/S` (see [`crate::name`]), bound to
//! its session, with a `LockContender` as value. The holder is the live key with
//! the lowest (create revision, key); that revision is its token. So an etcd
//! client that uses the same keys excludes and is excluded, and whatever deletes
//! the holder's key ends its grant.
//!
//! **Rules.**
//! - An acquire puts a key, unless the same contender is there by another one, or
//!   it would have to wait and does not want to, or its session has too many.
//! - A wait that ends deletes the waiter's key. A holder has no deadline.
//! - A release deletes the holder's key if the token is that of its grant.
//! - Acquires of one session and owner that are reentrant share one grant: their
//!   numbers are in its value, and the key goes with the last one.
//! - The key of a holder that is lost with a lock-delay stays until the delay
//!   ends, bound to no session, and is nobody's. It is in the way of all others
//!   as any key is, so etcd clients wait for it too.
//! - That a numbered command runs once is core's business, and so is the answer to
//!   its copies. An acquire that is cancelled before it arrived has that for its
//!   answer, so that it cannot hold a lock for nobody when it does.
//! - Who holds is decided in `settle` alone, once a command, from the keys that
//!   changed.
//!
//! **Invariants.** At any revision at most one key holds a lock. Tokens of one lock
//! grow. Of two who wait, the one that came first is granted first. A lock that
//! anyone contends for is held, or its delay runs.

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, Revision, SessionId},
    keyspace::Record,
    limits,
    machine::{Cause, Context, Outcome, Settled, View},
    requests::Standing,
    session::{EndReason, Sessions},
    system::ForcedRelease,
};
use conclave_proto::internal::{
    LockAcquire, LockCancel, LockContender, LockForceRelease, LockRelease,
};
use prost::Message as _;

use crate::{
    Answer, Event, Primitives, Rejection, Reply,
    contenders::{Contenders, Shift, Ticket},
    kept,
    name::{contender_key, lock_of, owner_of, validate_name, validate_reason},
    value::{self, native},
};

type Executed = conclave_core::machine::Executed<Primitives>;

/// Why a command of the mutex deleted a key, if it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// It deleted none.
    Acquired,
    /// The holder gave it up.
    Released,
    /// The request was withdrawn.
    Cancelled,
    /// The wait has ended, or the delay.
    WaitTimedOut,
    /// An operator took it, for this reason.
    Forced(String),
}

/// Why a grant or place ended other than by its owner's will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LossReason {
    /// The session ended.
    SessionEnded(EndReason),
    /// An operator took it; with the reason in words.
    Forced(String),
    /// The key was deleted by someone else.
    KeyDeleted,
}

/// A lock that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The lock.
    pub lock: String,
    /// The owner inside the session.
    pub owner: String,
    /// The key the grant stands for.
    pub key: Bytes,
    /// Its create revision.
    pub token: Revision,
}

/// What a session holds, with who shares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The grant.
    pub grant: Grant,
    /// One for each acquire that shares it, the first first, by which a release can
    /// undo it: its number, the tag of one without, or 0 for a key of an etcd client.
    pub entries: Vec<u64>,
}

/// A place in the queue of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What it will hold, with the token that it will have.
    pub contends: Grant,
    /// The number of the acquire that waits; 0 if it has none.
    pub request: u64,
}

/// Who holds a lock or waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its key.
    pub key: Bytes,
    /// The session the key is bound to, if any; during a delay, the one that was.
    pub session: Option<SessionId>,
    /// What people call that session, while it is alive.
    pub session_name: String,
    /// The owner inside the session.
    pub owner: String,
    /// The token it has or will have.
    pub token: Revision,
    /// How long it has contended, by log time; 0 if not known.
    pub since_ms: u64,
    /// 0 for the holder.
    pub place: usize,
    /// It is lost, and what is left is its delay: for how much longer.
    pub delay_left_ms: Option<u64>,
    /// How many acquires share its place or grant.
    pub entries: usize,
}

/// A lock with all who contend for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    /// Its name.
    pub name: String,
    /// Who holds it, or did before the delay that runs.
    pub holder: Contender,
    /// In order; at most `limits::LIST_WAITERS_MAX` over all locks of an answer.
    pub waiters: Vec<Contender>,
    /// How many wait in all.
    pub waiters_total: usize,
}

/// Asks for the lock.
pub(crate) fn acquire(
    contenders: &Contenders,
    context: &mut Context<'_>,
    command: LockAcquire,
) -> Result<Executed, Rejection> {
    let id = SessionId(command.session_id);
    let key = contender_key(&command.name, id, &command.owner)?;
    context.session(id).map_err(Rejection::SessionEnded)?;
    let entry = entry_of(&command);
    let LockAcquire {
        name,
        wait_ms,
        delay_ms,
        reentrant,
        ..
    } = command;
    let lock = Bytes::from(name);
    let note = Note::Acquired;
    if let Some(record) = context.overlay.get(&key).cloned() {
        let reply = join(contenders, context, &lock, &record, entry, reentrant)?;
        return Ok(done(reply, note));
    }
    if wait_ms == Some(0) && contenders.first(&lock).is_some() {
        return Err(Rejection::Held);
    }
    if context.overlay.base().keys_bound(id) >= limits::SESSION_KEYS_MAX {
        return Err(Rejection::TooManyLocks);
    }
    let now = context.now();
    let value = LockContender {
        request: entry,
        wait_until_ms: wait_ms.map_or(0, |ms| value::end_of(now, ms)),
        asked_ms: now,
        delay_ms: delay_ms.min(limits::LOCK_DELAY_MS_MAX),
        reentrant,
        ..LockContender::default()
    };
    let value = value.encode_to_vec().into();
    context.overlay.put(key, value, Some(id));
    let outcome = Outcome::Waiting(context.overlay.revision());
    Ok(Executed { outcome, note })
}

/// By what an acquire is known among those that share a grant: its number, or the tag
/// that a server gave it.
fn entry_of(command: &LockAcquire) -> u64 {
    let number = command.request.as_ref().map_or(0, |request| request.number);
    if number == 0 { command.tag } else { number }
}

/// What an acquire finds whose key is there already: maybe a grant that it may share.
fn join(
    contenders: &Contenders,
    context: &mut Context<'_>,
    lock: &Bytes,
    record: &Record,
    entry: u64,
    reentrant: bool,
) -> Result<Reply, Rejection> {
    let token = record.create_revision;
    let key = record.key.clone();
    let holds = holds(contenders, lock, record);
    let shared = native(record).filter(|value| holds && value.reentrant && reentrant);
    let Some(mut value) = shared.filter(|_| entry != 0 && !asked_by(record, entry)) else {
        return Err(Rejection::AlreadyContending { token });
    };
    if value::entries(&value).count() >= limits::LOCK_ENTRIES_MAX {
        return Err(Rejection::TooManyEntries);
    }
    value.inner.push(entry);
    #[cfg(conclave_plant)]
    if conclave_core::plant::is("acquire-counts-twice") {
        value.inner.push(entry);
    }
    rewrite(context, record, &value);
    Ok(Reply::Granted { key, token })
}

/// Gives the lock up, or ends the delay of a holder that was lost: whoever
/// releases has come to an end.
pub(crate) fn release(
    contenders: &Contenders,
    context: &mut Context<'_>,
    command: LockRelease,
) -> Result<Executed, Rejection> {
    let LockRelease {
        name,
        session_id,
        owner,
        token,
        entry,
        request: _,
    } = command;
    let key = contender_key(&name, SessionId(session_id), &owner)?;
    let lock = Bytes::from(name);
    let grant = context.overlay.get(&key).filter(|record| {
        record.create_revision == token
            && is_first(contenders, &lock, record)
            && is_undone_by(record, entry)
    });
    #[cfg(conclave_plant)]
    let grant = match context.overlay.get(&key) {
        Some(record) if conclave_core::plant::is("accept-stale-release") => Some(record),
        _ => grant,
    };
    let Some(grant) = grant.cloned() else {
        return Err(not_holder(context, &lock, token));
    };
    leave(context, &grant, entry);
    Ok(done(Reply::Released, Note::Released))
}

/// Withdraws an acquire, whatever became of it.
pub(crate) fn cancel(
    context: &mut Context<'_>,
    command: LockCancel,
) -> Result<Executed, Rejection> {
    let LockCancel {
        name,
        session_id,
        owner,
        entry,
        request: _,
    } = command;
    let id = SessionId(session_id);
    let key = contender_key(&name, id, &owner)?;
    let is_numbered = (1..=limits::REQUEST_NUMBER_MAX).contains(&entry);
    if is_numbered {
        context.session(id).map_err(Rejection::SessionEnded)?;
    }
    let found = context.overlay.get(&key);
    match found.filter(|record| asked_by(record, entry)).cloned() {
        Some(record) => leave(context, &record, entry),
        None if is_numbered => forestall(context, id, entry)?,
        None => {}
    }
    Ok(done(Reply::Cancelled, Note::Cancelled))
}

/// An acquire that has not arrived yet never runs.
fn forestall(context: &mut Context<'_>, id: SessionId, number: u64) -> Result<(), Rejection> {
    if context.standing(id, number) != Some(Standing::New) {
        return Ok(());
    }
    let cancelled = kept::keep(&Err(Rejection::Cancelled));
    match context.forestall(id, number, cancelled) {
        true => Ok(()),
        false => Err(Rejection::TooManyRequests),
    }
}

/// Withdraws what a session waits for by another number than these.
pub(crate) fn withdraw(
    contenders: &Contenders,
    context: &mut Context<'_>,
    session: SessionId,
    wanted: &[u64],
) {
    let keyspace = context.overlay.base();
    for key in keyspace.keys_of(session) {
        let record = live(keyspace.get(key));
        let is_wanted = |value: &LockContender| wanted.contains(&value.request);
        let waits = lock_of(key).is_some_and(|lock| !holds(contenders, &lock, record));
        if waits && native(record).is_some_and(|value| !is_wanted(&value)) {
            remove(context, record);
        }
    }
}

/// Takes the lock from its holder, or cuts the delay of one that was lost short.
pub(crate) fn force_release(
    contenders: &Contenders,
    context: &mut Context<'_>,
    command: LockForceRelease,
) -> Result<Executed, Rejection> {
    let LockForceRelease {
        name,
        reason,
        token,
        skip_delay,
    } = command;
    validate_name(&name)?;
    validate_reason(&reason)?;
    let lock = Bytes::from(name);
    let holder = match skip_delay {
        true => contenders.first(&lock),
        false => contenders.holder(&lock),
    };
    let holder = holder.ok_or(Rejection::NotHeld)?;
    if token != 0 && holder.create_revision != token {
        return Err(not_holder(context, &lock, token));
    }
    let record = live(context.overlay.get(&holder.key)).clone();
    let session = record.lease.and_then(|id| context.session(id).ok());
    let session_name = session
        .map(|session| session.name.clone())
        .unwrap_or_default();
    let released = contender(&record, session_name, context.now(), 0);
    if let Some(session) = released.session {
        context.record_forced_release(ForcedRelease {
            session,
            token: released.token,
            lock: holder.lock_name(),
            owner: released.owner.clone(),
            reason: reason.clone(),
        });
    }
    match value::left_by(&record, context.now()) {
        Some(left) if !skip_delay => {
            context.gives_back();
            context.overlay.put(record.key, left, None);
        }
        _ => remove(context, &record),
    }
    Ok(done(Reply::ForceReleased(released), Note::Forced(reason)))
}

/// The value with which the key of a holder that is lost with its session stays,
/// if it asked for a delay. Closing a session is as good as a release.
pub(crate) fn outlives(
    contenders: &Contenders,
    record: &Record,
    reason: EndReason,
    now: LogTime,
) -> Option<Bytes> {
    #[cfg(conclave_plant)]
    if conclave_core::plant::is("skip-lock-delay") {
        return None;
    }
    match reason {
        EndReason::Expired | EndReason::Revoked => {}
        EndReason::Closed | EndReason::Unknown => return None,
    }
    let lock = lock_of(&record.key)?;
    let holder = Some(record).filter(|record| holds(contenders, &lock, record))?;
    value::left_by(holder, now)
}

/// When the first wait or delay ends.
pub(crate) fn next_due(contenders: &Contenders) -> Option<LogTime> {
    contenders.first_timer().map(|(end, _)| *end)
}

/// Ends the first wait or delay.
pub(crate) fn fire(contenders: &Contenders, context: &mut Context<'_>) -> Note {
    let (_, waiter) = contenders
        .first_timer()
        .expect("fired only when a timer is due");
    let record = live(context.overlay.get(&waiter.key)).clone();
    remove(context, &record);
    Note::WaitTimedOut
}

/// Says who waits no longer and who lost what.
pub(crate) fn settle(shift: Shift, cause: Cause<'_, Note>) -> Settled<Primitives> {
    let mut settled = Settled::default();
    for gone in shift.gone {
        let token = gone.ticket.create_revision;
        if !gone.held {
            settled.resolved.push((token, Err(wait_ended(&cause))));
        } else if let (Some(session), Some(reason)) = (gone.session, loss(&cause)) {
            let grant = grant(&gone.ticket);
            settled
                .events
                .push((session, Event::GrantLost { grant, reason }));
        }
    }
    for Ticket {
        key,
        create_revision: token,
        ..
    } in shift.granted
    {
        settled
            .resolved
            .push((token, Ok(Reply::Granted { key, token })));
    }
    settled
}

/// What a waiter is told whose key is no more.
fn wait_ended(cause: &Cause<'_, Note>) -> Rejection {
    match cause {
        Cause::SessionEnded(reason) => Rejection::SessionEnded(*reason),
        Cause::Machine(Note::WaitTimedOut) => Rejection::WaitTimedOut,
        Cause::Unwanted | Cause::Machine(Note::Cancelled) => Rejection::Cancelled,
        Cause::Machine(Note::Forced(reason)) => {
            Rejection::PlaceLost(LossReason::Forced(reason.clone()))
        }
        Cause::Txn | Cause::Machine(Note::Acquired | Note::Released) => {
            Rejection::PlaceLost(LossReason::KeyDeleted)
        }
    }
}

/// Why a holder lost its grant; `None` if it gave it up.
fn loss(cause: &Cause<'_, Note>) -> Option<LossReason> {
    match cause {
        Cause::SessionEnded(reason) => Some(LossReason::SessionEnded(*reason)),
        Cause::Machine(Note::Forced(reason)) => Some(LossReason::Forced(reason.clone())),
        Cause::Unwanted | Cause::Machine(Note::Released | Note::Cancelled) => None,
        Cause::Txn | Cause::Machine(Note::Acquired | Note::WaitTimedOut) => {
            Some(LossReason::KeyDeleted)
        }
    }
}

/// Locks with all who contend for them: one, or those after a name in order.
pub(crate) fn locks(
    contenders: &Contenders,
    view: View<'_>,
    name: Option<String>,
    after: String,
    limit: usize,
) -> Answer {
    let mut waiters_left = limits::LIST_WAITERS_MAX;
    let mut info = |first| lock_info(contenders, view, first, &mut waiters_left);
    if let Some(name) = name {
        let first = contenders.first(&Bytes::from(name));
        let locks = first.map(info).into_iter().collect();
        return Answer::Locks { locks, more: false };
    }
    let limit = match limit {
        0 => limits::LIST_LOCKS_MAX,
        limit => limit.min(limits::LIST_LOCKS_MAX),
    };
    let mut firsts = contenders.firsts_after(Bytes::from(after));
    let locks = firsts.by_ref().take(limit).map(&mut info).collect();
    Answer::Locks {
        locks,
        more: firsts.next().is_some(),
    }
}

/// Whether the grant with this token holds.
pub(crate) fn check(contenders: &Contenders, name: String, token: Revision) -> Answer {
    let holder = contenders.holder(&Bytes::from(name));
    Answer::Checked(holder.is_some_and(|holder| holder.create_revision == token))
}

/// What a session holds and waits for, and what operators took from it.
pub(crate) fn grants_of(contenders: &Contenders, view: View<'_>, session: SessionId) -> Answer {
    let (mut grants, mut waiting) = (Vec::new(), Vec::new());
    for key in view.keyspace.keys_of(session) {
        let record = live(view.keyspace.get(key));
        let Some(lock) = lock_of(key) else { continue };
        let contends = Grant {
            lock: String::from_utf8_lossy(&lock).into_owned(),
            owner: owner_of(key),
            key: key.clone(),
            token: record.create_revision,
        };
        if holds(contenders, &lock, record) {
            let entries = native(record).map(|value| value::entries(&value).collect());
            grants.push(Held {
                grant: contends,
                entries: entries.unwrap_or_else(|| vec![0]),
            });
        } else {
            let number = native(record).map(|value| value.request);
            let is_number = |number: &u64| *number <= limits::REQUEST_NUMBER_MAX;
            let request = number.filter(is_number).unwrap_or(0);
            waiting.push(Waiting { contends, request });
        }
    }
    let forced = view.system.forced_releases_of(session).cloned().collect();
    Answer::Grants {
        grants,
        waiting,
        forced,
    }
}

fn lock_info(
    contenders: &Contenders,
    view: View<'_>,
    first: &Ticket,
    waiters_left: &mut usize,
) -> LockInfo {
    let lock = first.lock();
    let mut queue = contenders.queue(&lock).enumerate().skip(1);
    let waiters: Vec<Contender> = queue
        .by_ref()
        .take(*waiters_left)
        .map(|(place, ticket)| listed(view, ticket, place))
        .collect();
    *waiters_left -= waiters.len();
    LockInfo {
        name: first.lock_name(),
        holder: listed(view, first, 0),
        waiters_total: waiters.len() + queue.count(),
        waiters,
    }
}

fn listed(view: View<'_>, ticket: &Ticket, place: usize) -> Contender {
    let record = live(view.keyspace.get(&ticket.key));
    contender(
        record,
        session_name(view.sessions, record),
        view.system.log_time(),
        place,
    )
}

/// The record of a ticket.
fn live(record: Option<&Record>) -> &Record {
    record.expect("the index names live keys")
}

fn session_name(sessions: &Sessions, record: &Record) -> String {
    let session = record.lease.and_then(|id| sessions.get(id));
    session
        .map(|session| session.name.clone())
        .unwrap_or_default()
}

fn contender(record: &Record, session_name: String, now: LogTime, place: usize) -> Contender {
    let delay = value::delay(record);
    let delay_left_ms = delay
        .as_ref()
        .map(|delay| delay.delay_until_ms.saturating_sub(now));
    let value = value::native_or_lost(record);
    Contender {
        key: record.key.clone(),
        session: value::session_of(record),
        session_name,
        owner: owner_of(&record.key),
        token: record.create_revision,
        since_ms: value
            .as_ref()
            .map_or(0, |value| now.saturating_sub(value.asked_ms)),
        place,
        delay_left_ms,
        entries: value.map_or(1, |value| value::entries(&value).count()),
    }
}

fn done(reply: Reply, note: Note) -> Executed {
    Executed {
        outcome: Outcome::Done(reply),
        note,
    }
}

fn grant(ticket: &Ticket) -> Grant {
    Grant {
        lock: ticket.lock_name(),
        owner: owner_of(&ticket.key),
        key: ticket.key.clone(),
        token: ticket.create_revision,
    }
}

fn holds(contenders: &Contenders, lock: &Bytes, record: &Record) -> bool {
    contenders
        .holder(lock)
        .is_some_and(|holder| holder.key == record.key)
}

fn is_first(contenders: &Contenders, lock: &Bytes, record: &Record) -> bool {
    contenders
        .first(lock)
        .is_some_and(|first| first.key == record.key)
}

/// Undoes one acquire, by its number or tag, or the newest for 0: with the last one
/// goes the key.
fn leave(context: &mut Context<'_>, record: &Record, entry: u64) {
    let shared = value::native_or_lost(record).and_then(|value| value::without(value, entry));
    #[cfg(conclave_plant)]
    let shared = shared.filter(|_| !conclave_core::plant::is("one-release-frees-all"));
    match shared {
        Some(value) => {
            context.gives_back();
            rewrite(context, record, &value);
        }
        None => remove(context, record),
    }
}

/// Changes what a contender's key says.
fn rewrite(context: &mut Context<'_>, record: &Record, value: &LockContender) {
    let (key, value) = (record.key.clone(), value.encode_to_vec());
    context.overlay.put(key, value.into(), record.lease);
}

/// Deletes a contender's key.
fn remove(context: &mut Context<'_>, record: &Record) {
    context.overlay.delete(&record.key);
}

/// Whether a release that names this acquire, or the newest by 0, undoes one. What a
/// lost holder left and others may share is undone by names alone: its session is
/// over, and so nothing tells a release that comes twice from two of them.
fn is_undone_by(record: &Record, entry: u64) -> bool {
    match value::delay(record) {
        Some(left) if entry == 0 => !left.reentrant,
        Some(left) => value::entries(&left).any(|other| other == entry),
        None => entry == 0 || asked_by(record, entry),
    }
}

/// Whether the acquire with this number or tag made the key or shares it.
fn asked_by(record: &Record, entry: u64) -> bool {
    let value = native(record).filter(|_| entry != 0);
    value.is_some_and(|value| value::entries(&value).any(|other| other == entry))
}

fn not_holder(context: &Context<'_>, lock: &Bytes, token: Revision) -> Rejection {
    let forced = context
        .forced_release(token)
        .filter(|forced| forced.lock.as_bytes() == lock);
    Rejection::NotHolder {
        forced: forced.cloned(),
    }
}
