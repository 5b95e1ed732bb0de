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
//! - An acquire puts a key, unless the request is over, the same contender is
//!   there by another request, or it would have to wait and does not want to. The
//!   same request again finds its place or grant.
//! - A wait that ends deletes the waiter's key. A holder has no deadline.
//! - A release deletes the holder's key if the token is that of its grant.
//! - A request whose key goes by a command of the mutex, or that is cancelled
//!   before it made one, is noted in its session as over: a copy of it that is
//!   still on its way is refused, and cannot hold a lock for nobody.
//! - Who holds is decided in `settle` alone, once a command, from the keys that
//!   changed.
//!
//! **Invariants.** At any revision at most one key holds a lock. Tokens of one lock
//! grow. Of two who wait, the one that came first is granted first. A lock that
//! anyone contends for is held.

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, Revision, SessionId},
    keyspace::Record,
    limits,
    machine::{Cause, Context, Outcome, Settled, View},
    session::{EndReason, Sessions},
    system::ForcedRelease,
};
use conclave_proto::internal::{
    LockAcquire, LockCancel, LockContender, LockForceRelease, LockRelease,
};
use prost::Message as _;

use crate::{
    Answer, Event, Primitives, Rejection, Reply,
    contenders::{Contenders, Shift, Ticket, native},
    name::{contender_key, lock_of, owner_of, validate_name, validate_reason},
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
    /// The wait has ended.
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

/// Who holds a lock or waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its key.
    pub key: Bytes,
    /// The session the key is bound to, if any.
    pub session: Option<SessionId>,
    /// What people call that session.
    pub session_name: String,
    /// The owner inside the session.
    pub owner: String,
    /// The token it has or will have.
    pub token: Revision,
    /// How long it has contended, by log time; 0 if not known.
    pub since_ms: u64,
    /// 0 for the holder.
    pub place: usize,
}

/// A lock with all who contend for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    /// Its name.
    pub name: String,
    /// Who holds it.
    pub holder: Contender,
    /// In order; at most `limits::LIST_WAITERS_MAX`.
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
    let session = context.session(id).map_err(Rejection::SessionEnded)?;
    let LockAcquire {
        request,
        acknowledged,
        ..
    } = command;
    if request != 0 && (request <= acknowledged || session.requests.is_over(request)) {
        return Err(Rejection::StaleRequest);
    }
    if acknowledged > 0 {
        context.acknowledge(id, acknowledged);
    }
    let lock = Bytes::from(command.name);
    let note = Note::Acquired;
    if let Some(record) = context.overlay.get(&key) {
        let outcome = join(contenders, &lock, record, id, request)?;
        return Ok(Executed { outcome, note });
    }
    if command.wait_ms == Some(0) && contenders.holder(&lock).is_some() {
        return Err(Rejection::Held);
    }
    let now = context.now();
    let value = LockContender {
        request,
        wait_until_ms: command.wait_ms.map_or(0, |ms| wait_end(now, ms)),
        asked_ms: now,
    };
    let value = value.encode_to_vec().into();
    context.overlay.put(key, value, Some(id));
    let outcome = Outcome::Waiting(context.overlay.revision());
    Ok(Executed { outcome, note })
}

/// What an acquire finds whose key is there already.
fn join(
    contenders: &Contenders,
    lock: &Bytes,
    record: &Record,
    session: SessionId,
    request: u64,
) -> Result<Outcome<Reply>, Rejection> {
    let token = record.create_revision;
    if !asked_by(record, session, request) {
        return Err(Rejection::AlreadyContending { token });
    }
    if holds(contenders, lock, record) {
        return Ok(Outcome::Done(Reply::Granted {
            key: record.key.clone(),
            token,
        }));
    }
    Ok(Outcome::Waiting(token))
}

/// Gives the lock up.
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
    } = command;
    let key = contender_key(&name, SessionId(session_id), &owner)?;
    let lock = Bytes::from(name);
    let grant = context
        .overlay
        .get(&key)
        .filter(|record| record.create_revision == token && holds(contenders, &lock, record));
    #[cfg(conclave_plant)]
    let grant = match context.overlay.get(&key) {
        Some(record) if conclave_core::plant::is("accept-stale-release") => Some(record),
        _ => grant,
    };
    let Some(grant) = grant.cloned() else {
        return Err(not_holder(context, &lock, token));
    };
    remove(context, &grant);
    Ok(done(Reply::Released, Note::Released))
}

/// Withdraws a request, whatever became of it.
pub(crate) fn cancel(
    context: &mut Context<'_>,
    command: LockCancel,
) -> Result<Executed, Rejection> {
    let LockCancel {
        name,
        session_id,
        owner,
        request,
        place,
    } = command;
    let id = SessionId(session_id);
    let key = contender_key(&name, id, &owner)?;
    let is_over = match request {
        0 => true,
        _ => {
            let session = context.session(id).map_err(Rejection::SessionEnded)?;
            session.requests.is_over(request)
        }
    };
    let meant = |record: &Record| match request {
        0 => record.create_revision == place,
        request => asked_by(record, id, request),
    };
    let found = context.overlay.get(&key).filter(|record| meant(record));
    match found.cloned() {
        // Even without room for the note: a lock held for nobody is worse than
        // what a late copy could do.
        Some(record) => remove(context, &record),
        None if is_over => {}
        None if !note(context, id, request) => return Err(Rejection::TooManyCancelled),
        None => {}
    }
    Ok(done(Reply::Cancelled, Note::Cancelled))
}

/// Takes the lock from its holder.
pub(crate) fn force_release(
    contenders: &Contenders,
    context: &mut Context<'_>,
    command: LockForceRelease,
) -> Result<Executed, Rejection> {
    let LockForceRelease {
        name,
        reason,
        token,
    } = command;
    validate_name(&name)?;
    validate_reason(&reason)?;
    let lock = Bytes::from(name);
    let holder = contenders.holder(&lock).ok_or(Rejection::NotHeld)?;
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
    remove(context, &record);
    Ok(done(Reply::ForceReleased(released), Note::Forced(reason)))
}

/// When the first wait ends.
pub(crate) fn next_due(contenders: &Contenders) -> Option<LogTime> {
    contenders.first_timer().map(|(end, _)| *end)
}

/// Ends the first wait.
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
        Cause::Machine(Note::Cancelled) => Rejection::Cancelled,
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
        Cause::Machine(Note::Released | Note::Cancelled) => None,
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
    if let Some(name) = name {
        let holder = contenders.holder(&Bytes::from(name));
        let lock = holder.map(|holder| lock_info(contenders, view, holder));
        let locks = lock.into_iter().collect();
        return Answer::Locks { locks, more: false };
    }
    let limit = match limit {
        0 => limits::LIST_LOCKS_MAX,
        limit => limit.min(limits::LIST_LOCKS_MAX),
    };
    let mut holders = contenders.holders_after(Bytes::from(after));
    let locks = holders
        .by_ref()
        .take(limit)
        .map(|holder| lock_info(contenders, view, holder))
        .collect();
    Answer::Locks {
        locks,
        more: holders.next().is_some(),
    }
}

/// Whether the grant with this token holds.
pub(crate) fn check(contenders: &Contenders, name: String, token: Revision) -> Answer {
    let holder = contenders.holder(&Bytes::from(name));
    Answer::Checked(holder.is_some_and(|holder| holder.create_revision == token))
}

/// What a session holds, and what operators took from it.
pub(crate) fn grants_of(contenders: &Contenders, view: View<'_>, session: SessionId) -> Answer {
    let held = |key: &Bytes| {
        let holder = contenders.holder(&lock_of(key)?)?;
        (holder.key == *key).then(|| grant(holder))
    };
    let grants = view.keyspace.keys_of(session).filter_map(held).collect();
    let forced = view.system.forced_releases_of(session).cloned().collect();
    Answer::Grants { grants, forced }
}

fn lock_info(contenders: &Contenders, view: View<'_>, holder: &Ticket) -> LockInfo {
    let mut queue = contenders.queue(&holder.lock).enumerate().skip(1);
    let waiters: Vec<Contender> = queue
        .by_ref()
        .take(limits::LIST_WAITERS_MAX)
        .map(|(place, ticket)| listed(view, ticket, place))
        .collect();
    LockInfo {
        name: holder.lock_name(),
        holder: listed(view, holder, 0),
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
    Contender {
        key: record.key.clone(),
        session: record.lease,
        session_name,
        owner: owner_of(&record.key),
        token: record.create_revision,
        since_ms: native(record).map_or(0, |value| now.saturating_sub(value.asked_ms)),
        place,
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

/// Deletes a contender's key, and notes the numbered request that made it as over.
/// A session that acknowledges nothing may have no room for the note; then a late
/// copy of its request would run.
fn remove(context: &mut Context<'_>, record: &Record) {
    context.overlay.delete(&record.key);
    let (Some(id), Some(value)) = (record.lease, native(record)) else {
        return;
    };
    note(context, id, value.request);
}

/// Notes that a request is over; false if there is no room.
fn note(context: &mut Context<'_>, id: SessionId, request: u64) -> bool {
    let Ok(session) = context.session(id) else {
        return false;
    };
    let has_room = session.requests.is_over(request) || !session.requests.is_full();
    if has_room {
        context.cancel(id, request);
    }
    has_room
}

/// Whether this session's numbered request made this key.
fn asked_by(record: &Record, session: SessionId, request: u64) -> bool {
    let value = native(record).filter(|_| request != 0 && record.lease == Some(session));
    value.is_some_and(|value| value.request == request)
}

fn not_holder(context: &Context<'_>, lock: &Bytes, token: Revision) -> Rejection {
    let forced = context
        .forced_release(token)
        .filter(|forced| forced.lock.as_bytes() == lock);
    Rejection::NotHolder {
        forced: forced.cloned(),
    }
}

/// The log time at which a wait ends. Log time is cut to whole milliseconds, so
/// one more than asked keeps a wait from ending early. Never 0, which means no end.
fn wait_end(now: LogTime, wait_ms: u64) -> LogTime {
    now.saturating_add(wait_ms).saturating_add(1)
}
