//! What locks and elections have in common: places in the queue of a name, what
//! ends them, and who is told.
//!
//! A contender is known by the number or tag of the request that made its key. A
//! native lock has that in the key's value; a candidate, whose value is only what it
//! proclaims, and a plain contender that waits have it beside their key (see
//! [`crate::name`]), in a key that comes and goes with theirs.
//!
//! Who holds is decided in `settle` alone, once a command, from the keys that
//! changed.

use std::collections::BTreeSet;

use bytes::Bytes;
use conclave_core::{
    ids::{LogTime, Revision, SessionId},
    keyspace::{Change, Keyspace, Overlay, Record},
    limits,
    machine::{Cause, Context, Outcome, Place, Settled, View},
    requests::Standing,
    session::{EndReason, Sessions},
    system::ForcedRelease,
};
use conclave_proto::internal::{Campaign, LockCancel, LockContender};
use prost::Message as _;

use crate::{
    Answer, Event, Primitives, Rejection, Reply,
    contenders::{Contenders, Shift, Ticket},
    kept,
    name::{self, campaign_key, contender_key, lock_of, owner_of},
    value::{self, native},
};

pub(crate) type Executed = conclave_core::machine::Executed<Primitives>;

/// Why a command deleted a contender's key, if it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// It deleted none.
    Kept,
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

/// A lock that is held, or an election that is won.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The lock or election.
    pub lock: String,
    /// The owner inside the session.
    pub owner: String,
    /// The key the grant stands for.
    pub key: Bytes,
    /// Its create revision.
    pub token: Revision,
    /// Whether it is that of a candidate.
    pub is_candidate: bool,
}

/// What a session holds, with who shares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// The grant.
    pub grant: Grant,
    /// One for each acquire that shares it, the first first, by which a release can
    /// undo it: its number, the tag of one without, or 0 for a key of an etcd client.
    /// For a candidate, its campaign.
    pub entries: Vec<u64>,
}

/// A place in the queue of a lock or election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What it will hold, with the token that it will have.
    pub contends: Grant,
    /// The number of the request that waits; 0 if it has none.
    pub request: u64,
}

/// Who holds a lock or leads, or waits for it.
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
    /// Whether it is a candidate of this API.
    pub is_candidate: bool,
}

/// Withdraws an acquire or a campaign, whatever became of it.
pub(crate) fn cancel(
    contenders: &Contenders,
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
    let found = context.overlay.get(&key).cloned();
    match found.filter(|record| asked_by(contenders, context, record, entry)) {
        Some(record) => leave(contenders, context, &record, entry),
        None if is_numbered => forestall(context, id, entry)?,
        None => {}
    }
    Ok(done(Reply::Cancelled, Note::Cancelled))
}

/// A request that has not arrived yet never runs.
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
    let wanted: BTreeSet<u64> = wanted.iter().copied().collect();
    let keyspace = context.overlay.base();
    for key in keyspace.keys_of(session) {
        let record = live(keyspace.get(key));
        let waits = lock_of(key).is_some_and(|lock| !holds(contenders, &lock, record));
        let request = request_of(contenders, keyspace, record);
        if waits && request.is_some_and(|request| !wanted.contains(&request)) {
            remove(contenders, context, record);
        }
    }
}

/// Whether whoever asks for this gets a place behind at least two others.
pub(crate) fn waits_long(
    contenders: &Contenders,
    keyspace: &Keyspace,
    name: &str,
    session: SessionId,
    owner: &str,
) -> bool {
    let lock = Bytes::copy_from_slice(name.as_bytes());
    let is_new = || {
        let key = contender_key(name, session, owner);
        key.is_ok_and(|key| keyspace.get(&key).is_none())
    };
    contenders.queue(&lock).nth(1).is_some() && is_new()
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
    context.overlay.delete(&waiter.key);
    remove_beside(contenders, &mut context.overlay, &waiter.key);
    Note::WaitTimedOut
}

/// Says who waits no longer and who lost what.
pub(crate) fn settle(shift: Shift, cause: Cause<'_, Note>) -> Settled<Primitives> {
    let mut settled = Settled::default();
    for gone in shift.gone {
        if !gone.held {
            let place = gone.ticket.place();
            settled.resolved.push((place, Err(wait_ended(&cause))));
        } else if let (Some(session), Some(reason)) = (gone.session, loss(&cause)) {
            let is_candidate = shift.campaigns_over.contains(&gone.ticket.key);
            let grant = grant(&gone.ticket, is_candidate);
            settled
                .events
                .push((session, Event::GrantLost { grant, reason }));
        }
    }
    for ticket in shift.granted {
        let place = ticket.place();
        let (key, token) = (ticket.key, ticket.create_revision);
        settled
            .resolved
            .push((place, Ok(Reply::Granted { key, token })));
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
        Cause::Txn | Cause::Machine(Note::Kept | Note::Released) => {
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
        Cause::Txn | Cause::Machine(Note::Kept | Note::WaitTimedOut) => {
            Some(LossReason::KeyDeleted)
        }
    }
}

/// What is beside a contender's key goes with the key, and with its session's hold on
/// it: so it is that of the contender who is there. A delay that is overwritten ends, and
/// whoever contends with its key since is another, behind those who wait.
pub(crate) fn follow(contenders: &Contenders, overlay: &mut Overlay<'_>) {
    let left = |change: &Change| {
        let before = change.before.as_ref()?;
        let stays = change
            .after
            .as_ref()
            .is_some_and(|after| after.lease == before.lease);
        (!stays && lock_of(&change.key).is_some()).then(|| change.key.clone())
    };
    let left: Vec<Bytes> = overlay.changes().iter().filter_map(left).collect();
    for key in left {
        remove_beside(contenders, overlay, &key);
    }
    let changes = overlay.changes().iter();
    let overwritten: Vec<Bytes> = changes.filter_map(overwritten_delay).collect();
    for key in overwritten {
        if let Some(record) = overlay.get(&key).cloned() {
            overlay.delete(&key);
            overlay.put(key, record.value, record.lease);
        }
    }
}

/// The key, if something contends with it that was the delay of one who is lost.
fn overwritten_delay(change: &Change) -> Option<Bytes> {
    let (before, after) = (change.before.as_ref()?, change.after.as_ref()?);
    let contends = value::delay(before).is_some() && value::delay(after).is_none();
    (contends && lock_of(&change.key).is_some()).then(|| change.key.clone())
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
            is_candidate: is_candidate(view.keyspace, key),
        };
        if holds(contenders, &lock, record) {
            let campaign = request_of(contenders, view.keyspace, record);
            let entries = match native(record) {
                Some(value) => value::entries(&value).collect(),
                None => vec![campaign.unwrap_or(0)],
            };
            grants.push(Held {
                grant: contends,
                entries,
            });
        } else {
            let number = request_of(contenders, view.keyspace, record);
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

/// How a contender stands in a list, as of its record in these keys.
pub(crate) fn listed(
    contenders: &Contenders,
    view: View<'_>,
    ticket: &Ticket,
    place: usize,
) -> Contender {
    let record = live(view.keyspace.get(&ticket.key));
    let name = session_name(view.sessions, record);
    let now = view.system.log_time();
    contender(contenders, view.keyspace, record, name, now, place)
}

/// What one answer of a list may yet show and count.
pub(crate) struct Room {
    shown: usize,
    counted: usize,
}

impl Room {
    pub(crate) fn new() -> Self {
        Self {
            shown: limits::LIST_WAITERS_MAX,
            counted: limits::LIST_COUNTED_MAX,
        }
    }

    /// A queue as it is listed, as far as there is room, and how many are in it, as far as
    /// they are counted.
    pub(crate) fn list<'a>(
        &mut self,
        contenders: &Contenders,
        view: View<'_>,
        mut queue: impl Iterator<Item = (usize, &'a Ticket)>,
    ) -> (Vec<Contender>, usize) {
        let shown = queue.by_ref().take(self.shown);
        let shown: Vec<Contender> = shown
            .map(|(place, ticket)| listed(contenders, view, ticket, place))
            .collect();
        self.shown -= shown.len();
        let others = queue.take(self.counted).count();
        self.counted -= others;
        let total = shown.len() + others;
        (shown, total)
    }
}

/// A contender as it is listed, at this time.
pub(crate) fn contender(
    contenders: &Contenders,
    keyspace: &Keyspace,
    record: &Record,
    session_name: String,
    now: LogTime,
    place: usize,
) -> Contender {
    let delay = value::delay(record);
    let delay_left_ms = delay
        .as_ref()
        .map(|delay| delay.delay_until_ms.saturating_sub(now));
    let beside = beside_of(contenders, keyspace, &record.key);
    let is_candidate = is_candidate(keyspace, &record.key);
    let value = value::native_or_lost(record);
    let asked = value.as_ref().map(|value| value.asked_ms);
    let asked = beside.map(|campaign| campaign.asked_ms).or(asked);
    Contender {
        key: record.key.clone(),
        session: value::session_of(record),
        session_name,
        owner: owner_of(&record.key),
        token: record.create_revision,
        since_ms: asked.map_or(0, |asked| now.saturating_sub(asked)),
        place,
        delay_left_ms,
        entries: value.map_or(1, |value| value::entries(&value).count()),
        is_candidate,
    }
}

/// The record of a ticket.
pub(crate) fn live(record: Option<&Record>) -> &Record {
    record.expect("the index names live keys")
}

/// What people call the session of a record.
fn session_name(sessions: &Sessions, record: &Record) -> String {
    let session = record.lease.and_then(|id| sessions.get(id));
    session
        .map(|session| session.name.clone())
        .unwrap_or_default()
}

/// A command that is done.
pub(crate) fn done(reply: Reply, note: Note) -> Executed {
    Executed {
        outcome: Outcome::Done(reply),
        note,
    }
}

/// A command that waits with its contender's key, maybe for no time at all.
pub(crate) fn waits_with(record: &Record) -> Executed {
    Executed {
        outcome: Outcome::Waiting(Place::of(record)),
        note: Note::Kept,
    }
}

/// What a contender finds that is there already and may wait there: its grant, or its
/// place.
pub(crate) fn found(contenders: &Contenders, lock: &Bytes, record: &Record) -> Executed {
    match holds(contenders, lock, record) {
        true => {
            let (key, token) = (record.key.clone(), record.create_revision);
            done(Reply::Granted { key, token }, Note::Kept)
        }
        false => waits_with(record),
    }
}

/// Whether this is the key of who holds the lock or leads.
pub(crate) fn holds(contenders: &Contenders, lock: &Bytes, record: &Record) -> bool {
    contenders
        .holder(lock)
        .is_some_and(|holder| holder.key == record.key)
}

/// Whether this is the key that is in the way of all others.
pub(crate) fn is_first(contenders: &Contenders, lock: &Bytes, record: &Record) -> bool {
    contenders
        .first(lock)
        .is_some_and(|first| first.key == record.key)
}

/// Whether this is the key of a candidate of this API.
pub(crate) fn is_candidate(keyspace: &Keyspace, key: &Bytes) -> bool {
    keyspace.get(&campaign_key(key)).is_some()
}

/// Undoes one acquire, by its number or tag, or the newest for 0: with the last one
/// goes the key.
pub(crate) fn leave(
    contenders: &Contenders,
    context: &mut Context<'_>,
    record: &Record,
    entry: u64,
) {
    let shared = value::native_or_lost(record).and_then(|value| value::without(value, entry));
    #[cfg(conclave_plant)]
    let shared = shared.filter(|_| !conclave_core::plant::is("one-release-frees-all"));
    match shared {
        Some(value) => {
            context.gives_back();
            rewrite(context, record, &value);
        }
        None => remove(contenders, context, record),
    }
}

/// Changes what the key of a lock's contender says.
pub(crate) fn rewrite(context: &mut Context<'_>, record: &Record, value: &LockContender) {
    let (key, value) = (record.key.clone(), value.encode_to_vec());
    context.overlay.put(key, value.into(), record.lease);
}

/// Deletes a contender's key, with what is beside it.
pub(crate) fn remove(contenders: &Contenders, context: &mut Context<'_>, record: &Record) {
    context.overlay.delete(&record.key);
    remove_beside(contenders, &mut context.overlay, &record.key);
}

fn remove_beside(contenders: &Contenders, overlay: &mut Overlay<'_>, key: &Bytes) {
    for beside in beside(contenders, key) {
        overlay.delete(&beside);
    }
}

/// All that may lie beside a contender's key.
fn beside(contenders: &Contenders, key: &Bytes) -> impl Iterator<Item = Bytes> {
    let may = lock_of(key).is_some_and(|lock| contenders.has_beside(&lock));
    may.then(|| name::beside(key)).into_iter().flatten()
}

/// Puts a request beside the key of its contender, which has no room for it, bound to
/// what that is bound to.
pub(crate) fn put_beside(
    context: &mut Context<'_>,
    beside: Bytes,
    campaign: &Campaign,
    lease: Option<SessionId>,
) {
    let value = campaign.encode_to_vec();
    context.overlay.put(beside, value.into(), lease);
}

/// By what a request is known: its number, or the tag that a server gave it.
pub(crate) fn entry_of(request: Option<&conclave_proto::internal::Request>, tag: u64) -> u64 {
    match request.map_or(0, |request| request.number) {
        0 => tag,
        number => number,
    }
}

/// Whether the request with this number or tag made the key or shares it.
pub(crate) fn asked_by(
    contenders: &Contenders,
    context: &Context<'_>,
    record: &Record,
    entry: u64,
) -> bool {
    if entry == 0 {
        return false;
    }
    if let Some(campaign) = beside_of(contenders, context.overlay.base(), &record.key) {
        return campaign.request == entry;
    }
    native(record).is_some_and(|value| value::entries(&value).any(|other| other == entry))
}

/// The first request of a contender of this API.
fn request_of(contenders: &Contenders, keyspace: &Keyspace, record: &Record) -> Option<u64> {
    match beside_of(contenders, keyspace, &record.key) {
        Some(campaign) => Some(campaign.request),
        None => native(record).map(|value| value.request),
    }
}

/// What is beside a contender's key.
fn beside_of(contenders: &Contenders, keyspace: &Keyspace, key: &Bytes) -> Option<Campaign> {
    let beside = beside(contenders, key).find_map(|key| keyspace.get(&key));
    beside.and_then(value::campaign)
}

/// Why a token is not that of the grant.
pub(crate) fn not_holder(context: &Context<'_>, lock: &Bytes, token: Revision) -> Rejection {
    let forced = context
        .forced_release(token)
        .filter(|forced: &&ForcedRelease| forced.lock.as_bytes() == lock);
    Rejection::NotHolder {
        forced: forced.cloned(),
    }
}

fn grant(ticket: &Ticket, is_candidate: bool) -> Grant {
    Grant {
        lock: ticket.lock_name(),
        owner: owner_of(&ticket.key),
        key: ticket.key.clone(),
        token: ticket.create_revision,
        is_candidate,
    }
}
