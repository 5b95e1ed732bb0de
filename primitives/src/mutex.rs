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
//!   as any key is, so etcd clients wait for it too. One that overwrites it ends the
//!   delay and contends anew: the token of the lost grant never comes again.
//! - That a numbered command runs once is core's business, and so is the answer to
//!   its copies. An acquire that is cancelled before it arrived has that for its
//!   answer, so that it cannot hold a lock for nobody when it does.
//! - A plain acquire, as etcd's lock service asks for it, has a key without a value,
//!   and joins the lock or etcd client that contends under that key already,
//!   but not a delay: nobody holds with that key again.
//!
//! **Invariants.** At any revision at most one key holds a lock. Tokens of one lock
//! grow. Of two who wait, the one that came first is granted first. A lock that
//! anyone contends for is held, or its delay runs.

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, SessionId},
    keyspace::Record,
    limits,
    machine::{Context, View},
    session::EndReason,
    system::ForcedRelease,
};
use conclave_proto::internal::{
    Campaign, LockAcquire, LockContender, LockForceRelease, LockRelease,
};
use prost::Message as _;

use crate::{
    Answer, Rejection, Reply,
    contenders::{Contenders, Ticket},
    contention::{
        Contender, Executed, Note, Room, asked_by, contender, done, entry_of, found, holds,
        is_candidate, is_first, leave, listed, live, not_holder, put_beside, remove, rewrite,
        waits_with,
    },
    name::{contender_key, lock_of, plain_wait_key, validate_name, validate_reason},
    value::{self, native},
};

/// A lock with all who contend for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockInfo {
    /// Its name.
    pub name: String,
    /// Who holds it, or did before the delay that runs.
    pub holder: Contender,
    /// In order; at most `limits::LIST_WAITERS_MAX` over all locks of an answer.
    pub waiters: Vec<Contender>,
    /// How many wait in all, as far as `limits::LIST_COUNTED_MAX` over all locks of an
    /// answer are counted beside those shown.
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
    let entry = entry_of(command.request.as_ref(), command.tag);
    let LockAcquire {
        name,
        wait_ms,
        delay_ms,
        reentrant,
        plain,
        ..
    } = command;
    let lock = Bytes::from(name);
    if plain {
        return acquire_plain(contenders, context, &lock, key, (id, entry));
    }
    if let Some(record) = context.overlay.get(&key).cloned() {
        let reply = join(contenders, context, &lock, &record, entry, reentrant)?;
        return Ok(done(reply, Note::Kept));
    }
    if wait_ms == Some(0) && contenders.first(&lock).is_some() {
        return Err(Rejection::Held);
    }
    if contenders.contends_for(id) >= limits::SESSION_LOCKS_MAX {
        return Err(Rejection::TooManyLocks);
    }
    let now = context.now();
    let value = LockContender {
        request: entry,
        wait_until_ms: wait_ms.map_or(0, |ms| value::end_of(now, ms)),
        asked_ms: now,
        delay_ms: delay_ms.min(limits::LOCK_DELAY_MS_MAX),
        reentrant,
        mark: value::MARK,
        ..LockContender::default()
    };
    let value = value.encode_to_vec().into();
    context.overlay.put(key.clone(), value, Some(id));
    Ok(waits_with(live(context.overlay.get(&key))))
}

/// Asks for the lock as etcd's lock service does: the key has no value, and is the
/// same for all requests of a session. Only one that waits can be withdrawn, the newest;
/// so that is noted beside it.
fn acquire_plain(
    contenders: &Contenders,
    context: &mut Context<'_>,
    lock: &Bytes,
    key: Bytes,
    (session, request): (SessionId, u64),
) -> Result<Executed, Rejection> {
    let before = context.overlay.get(&key).cloned();
    if let Some(record) = &before
        && (value::delay(record).is_some() || is_candidate(context.overlay.base(), &key))
    {
        let token = record.create_revision;
        return Err(Rejection::AlreadyContending { token });
    }
    let executed = match &before {
        Some(record) => found(contenders, lock, record),
        None => {
            let lease = Some(session);
            context.overlay.put(key.clone(), Bytes::new(), lease);
            waits_with(live(context.overlay.get(&key)))
        }
    };
    let is_plain = before
        .as_ref()
        .is_none_or(|record| native(record).is_none());
    let waits = match &before {
        Some(record) => !holds(contenders, lock, record),
        None => contenders.first(lock).is_some(),
    };
    if waits && is_plain {
        let asked_ms = context.now();
        let campaign = Campaign {
            request,
            asked_ms,
            ..Campaign::default()
        };
        let lease = before.map_or(Some(session), |record| record.lease);
        put_beside(context, plain_wait_key(&key), &campaign, lease);
    }
    Ok(executed)
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
    let Some(mut value) =
        shared.filter(|_| entry != 0 && !asked_by(contenders, context, record, entry))
    else {
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
            && is_undone_by(contenders, context, record, entry)
    });
    #[cfg(conclave_plant)]
    let grant = match context.overlay.get(&key) {
        Some(record) if conclave_core::plant::is("accept-stale-release") => Some(record),
        _ => grant,
    };
    let Some(grant) = grant.cloned() else {
        return Err(not_holder(context, &lock, token));
    };
    leave(contenders, context, &grant, entry);
    Ok(done(Reply::Released, Note::Released))
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
    let released = contender(
        contenders,
        context.overlay.base(),
        &record,
        session_name,
        context.now(),
        0,
    );
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
        _ => remove(contenders, context, &record),
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

/// Locks with all who contend for them: one, or those after a name in order.
pub(crate) fn locks(
    contenders: &Contenders,
    view: View<'_>,
    name: Option<String>,
    after: String,
    limit: usize,
) -> Answer {
    let mut room = Room::new();
    let mut info = |first| lock_info(contenders, view, first, &mut room);
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

fn lock_info(contenders: &Contenders, view: View<'_>, first: &Ticket, room: &mut Room) -> LockInfo {
    let lock = first.lock();
    let queue = contenders.queue(&lock).enumerate().skip(1);
    let (waiters, waiters_total) = room.list(contenders, view, queue);
    LockInfo {
        name: first.lock_name(),
        holder: listed(contenders, view, first, 0),
        waiters_total,
        waiters,
    }
}

/// Whether a release that names this acquire, or the newest by 0, undoes one. What a
/// lost holder left and others may share is undone by names alone: its session is
/// over, and so nothing tells a release that comes twice from two of them.
fn is_undone_by(
    contenders: &Contenders,
    context: &Context<'_>,
    record: &Record,
    entry: u64,
) -> bool {
    match value::delay(record) {
        Some(left) if entry == 0 => !left.reentrant,
        Some(left) => value::entries(&left).any(|other| other == entry),
        None => entry == 0 || asked_by(contenders, context, record, entry),
    }
}
