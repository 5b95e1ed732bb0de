//! The election: one leader at a time, in terms that grow, and what it proclaims.
//!
//! **Keys.** A candidate of election `N` is a key `N/S` (see [`crate::name`]), bound
//! to its session, whose value is what it proclaims, and nothing else. So etcd clients
//! and this API are candidates in one election, and see the same leader. Beside it, at
//! `_conclave/elect/N/S`, is its request: the number, the deadline. That comes with
//! the candidate and goes with it, whoever deletes the candidate.
//!
//! **Rules.**
//! - The leader is who holds the name, by the one rule for locks and elections: the
//!   live key with the lowest (create revision, key). That revision is the term, and
//!   the token.
//! - Leadership ends as a lock's grant does: resigned, withdrawn, with the session, by
//!   force, or because its key was deleted.
//! - Only the leader proclaims, and resigns, each fenced by the term.
//! - A lock and an election of one name exclude each other, since there is one queue: a
//!   candidate waits for whoever holds the lock, and there is no leader meanwhile. One
//!   session and owner is in it once, as the one or the other.
//!
//! **Invariants.** At any revision there is at most one leader; a term has one leader
//! and never returns; terms of one election grow.

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    keyspace::Record,
    limits,
    machine::{Context, View},
};
use conclave_proto::internal::{Campaign, ElectCampaign, ElectProclaim, ElectResign};

use crate::{
    Answer, Invalid, Rejection, Reply,
    contenders::Contenders,
    contention::{
        Contender, Executed, Note, Room, done, entry_of, found, holds, live, not_holder,
        put_beside, remove, waits_with,
    },
    name::{self, campaign_key, contender_key, owner_of},
    value,
};

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// Its key.
    pub key: Bytes,
    /// The term, which is the fencing token: the create revision of the key.
    pub term: Revision,
    /// What it proclaims.
    pub value: Bytes,
    /// The revision at which it proclaimed that.
    pub proclaimed: Revision,
    /// How often it has proclaimed something, the campaign included.
    pub version: u64,
    /// The session the key is bound to, if any.
    pub session: Option<SessionId>,
    /// The owner inside the session.
    pub owner: String,
}

impl Leader {
    pub(crate) fn of(record: &Record) -> Self {
        Self {
            key: record.key.clone(),
            term: record.create_revision,
            value: record.value.clone(),
            proclaimed: record.mod_revision,
            version: record.version,
            session: record.lease,
            owner: owner_of(&record.key),
        }
    }
}

/// An election with all who are in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElectionInfo {
    /// Its name.
    pub name: String,
    /// `None` while a lock of this name is held.
    pub leader: Option<Leader>,
    /// Everyone, the leader or whoever is in the way first; at most
    /// `limits::LIST_WAITERS_MAX` over all elections of an answer.
    pub candidates: Vec<Contender>,
    /// How many there are in all, as far as `limits::LIST_COUNTED_MAX` over all elections
    /// of an answer are counted beside those shown.
    pub candidates_total: usize,
}

/// Becomes a candidate.
pub(crate) fn campaign(
    contenders: &Contenders,
    context: &mut Context<'_>,
    command: ElectCampaign,
) -> Result<Executed, Rejection> {
    let id = SessionId(command.session_id);
    let key = contender_key(&command.name, id, &command.owner)?;
    context.session(id).map_err(Rejection::SessionEnded)?;
    validate_value(&command.value)?;
    let request = entry_of(command.request.as_ref(), command.tag);
    let ElectCampaign {
        name,
        wait_ms,
        value,
        plain,
        ..
    } = command;
    let lock = Bytes::from(name);
    if let Some(record) = context.overlay.get(&key).cloned() {
        if plain && leads(&record) {
            return Ok(campaign_on(
                contenders, context, &lock, &record, value, request,
            ));
        }
        let token = record.create_revision;
        return Err(Rejection::AlreadyContending { token });
    }
    if wait_ms == Some(0) && contenders.first(&lock).is_some() {
        return Err(Rejection::Held);
    }
    if !plain && contenders.contends_for(id) >= limits::SESSION_LOCKS_MAX {
        return Err(Rejection::TooManyLocks);
    }
    let now = context.now();
    let campaign = Campaign {
        request,
        wait_until_ms: wait_ms.map_or(0, |ms| value::end_of(now, ms)),
        asked_ms: now,
    };
    context.overlay.put(key.clone(), value, Some(id));
    put_beside(context, campaign_key(&key), &campaign, Some(id));
    Ok(waits_with(live(context.overlay.get(&key))))
}

/// Goes on with a candidate, or who contends for an etcd lock, that is there already, as
/// etcd's election service does: it proclaims the value, whoever leads. Of those without a
/// number, the newest can be withdrawn; one with a number stays as it is.
fn campaign_on(
    contenders: &Contenders,
    context: &mut Context<'_>,
    lock: &Bytes,
    record: &Record,
    value: Bytes,
    request: u64,
) -> Executed {
    if record.value != value {
        context.overlay.put(record.key.clone(), value, record.lease);
    }
    let noted = |beside: Bytes| {
        let before = value::campaign(context.overlay.get(&beside)?)?;
        (before.request > limits::REQUEST_NUMBER_MAX).then_some((beside, before))
    };
    if let Some((beside, before)) = name::beside(&record.key).into_iter().find_map(noted)
        && !holds(contenders, lock, record)
    {
        let campaign = Campaign { request, ..before };
        put_beside(context, beside, &campaign, record.lease);
    }
    found(contenders, lock, record)
}

/// Proclaims a value, as the leader of this term.
pub(crate) fn proclaim(
    contenders: &Contenders,
    context: &mut Context<'_>,
    command: ElectProclaim,
) -> Result<Executed, Rejection> {
    let ElectProclaim {
        name,
        session_id,
        owner,
        token,
        value,
        request: _,
    } = command;
    let key = contender_key(&name, SessionId(session_id), &owner)?;
    validate_value(&value)?;
    let lock = Bytes::from(name);
    let leader = leading(contenders, context, &lock, &key, token)?;
    context.overlay.put(key, value, leader.lease);
    Ok(done(Reply::Proclaimed, Note::Kept))
}

/// Gives leadership up, as the leader of this term.
pub(crate) fn resign(
    contenders: &Contenders,
    context: &mut Context<'_>,
    command: ElectResign,
) -> Result<Executed, Rejection> {
    let ElectResign {
        name,
        session_id,
        owner,
        token,
        request: _,
    } = command;
    let key = contender_key(&name, SessionId(session_id), &owner)?;
    let lock = Bytes::from(name);
    let leader = leading(contenders, context, &lock, &key, token)?;
    remove(contenders, context, &leader);
    Ok(done(Reply::Resigned, Note::Released))
}

/// The record of a leader, if it leads in this term.
fn leading(
    contenders: &Contenders,
    context: &Context<'_>,
    lock: &Bytes,
    key: &Bytes,
    token: Revision,
) -> Result<Record, Rejection> {
    let record = context.overlay.get(key).filter(|record| {
        record.create_revision == token && holds(contenders, lock, record) && leads(record)
    });
    #[cfg(conclave_plant)]
    let record = match context.overlay.get(key) {
        Some(record) if conclave_core::plant::is("accept-stale-term") => Some(record),
        _ => record,
    };
    record
        .cloned()
        .ok_or_else(|| not_holder(context, lock, token))
}

/// Whether whoever is first in the queue of a name leads: not with a native lock, nor
/// with what is left of one.
pub(crate) fn leads(first: &Record) -> bool {
    value::native_or_lost(first).is_none()
}

/// What a candidate says never makes its key that of a lock. How long it is at most is
/// the business of servers: etcd's clients may say more than others.
fn validate_value(value: &Bytes) -> Result<(), Invalid> {
    match value::is_of_lock(value) {
        true => Err(Invalid::ValueOfLock),
        false => Ok(()),
    }
}

/// Who leads.
pub(crate) fn leader(contenders: &Contenders, view: View<'_>, name: String) -> Answer {
    Answer::Leader(leader_of(contenders, view, &Bytes::from(name)))
}

fn leader_of(contenders: &Contenders, view: View<'_>, lock: &Bytes) -> Option<Leader> {
    let holder = contenders.holder(lock)?;
    let record = live(view.keyspace.get(&holder.key));
    leads(record).then(|| Leader::of(record))
}

/// Elections with all candidates: one, whoever contends for it, or in order of name
/// those that have a candidate of this API.
pub(crate) fn elections(
    contenders: &Contenders,
    view: View<'_>,
    name: Option<String>,
    after: String,
    limit: usize,
) -> Answer {
    let mut room = Room::new();
    let mut info = |lock: Bytes| election_info(contenders, view, &lock, &mut room);
    if let Some(name) = name {
        let lock = Bytes::from(name);
        let is_contended = contenders.first(&lock).is_some();
        let elections = is_contended.then(|| info(lock)).into_iter().collect();
        return Answer::Elections {
            elections,
            more: false,
        };
    }
    let limit = match limit {
        0 => limits::LIST_LOCKS_MAX,
        limit => limit.min(limits::LIST_LOCKS_MAX),
    };
    let mut names = contenders.elections_after(Bytes::from(after)).peekable();
    let (mut elections, mut bytes) = (Vec::new(), 0);
    while elections.len() < limit
        && bytes < limits::LIST_VALUES_BYTES_MAX
        && let Some(name) = names.next()
    {
        let election = info(name.clone());
        bytes += election
            .leader
            .as_ref()
            .map_or(0, |leader| leader.value.len());
        elections.push(election);
    }
    Answer::Elections {
        elections,
        more: names.peek().is_some(),
    }
}

fn election_info(
    contenders: &Contenders,
    view: View<'_>,
    lock: &Bytes,
    room: &mut Room,
) -> ElectionInfo {
    let queue = contenders.queue(lock).enumerate();
    let (candidates, candidates_total) = room.list(contenders, view, queue);
    ElectionInfo {
        name: String::from_utf8_lossy(lock).into_owned(),
        leader: leader_of(contenders, view, lock),
        candidates_total,
        candidates,
    }
}
