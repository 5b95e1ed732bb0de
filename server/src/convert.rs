//! From the types of core and primitives to those of the wire.

use conclave_core::{
    ids::SessionId,
    session::{EndReason, Face},
    system::ForcedRelease,
};
use conclave_primitives as primitives;
use conclave_proto::v1;

pub(crate) fn session_info(id: SessionId, session: Face, log_time_ms: u64) -> v1::SessionInfo {
    v1::SessionInfo {
        session_id: id.0,
        name: session.name,
        metadata: session.metadata.into_iter().collect(),
        ttl_ms: session.ttl_ms,
        opened_revision: session.opened_revision,
        age_ms: log_time_ms.saturating_sub(session.opened_at),
        keys: session.keys as u64,
    }
}

pub(crate) fn grant(grant: primitives::Grant) -> v1::Grant {
    v1::Grant {
        lock: grant.lock,
        owner: grant.owner,
        key: grant.key,
        token: grant.token,
        candidate: grant.is_candidate,
        entries: Vec::new(),
    }
}

pub(crate) fn held(held: primitives::Held) -> v1::Grant {
    v1::Grant {
        entries: held.entries,
        ..grant(held.grant)
    }
}

pub(crate) fn place(waiting: primitives::Waiting) -> v1::Place {
    v1::Place {
        contends: Some(grant(waiting.contends)),
        request: waiting.request,
    }
}

pub(crate) fn grant_lost(lost: primitives::Grant, reason: primitives::LossReason) -> v1::GrantLost {
    let (reason, detail) = match reason {
        primitives::LossReason::SessionEnded(end) => (end_reason(end), String::new()),
        primitives::LossReason::Forced(detail) => (v1::LossReason::Forced, detail),
        primitives::LossReason::KeyDeleted => (v1::LossReason::KeyDeleted, String::new()),
    };
    v1::GrantLost {
        grant: Some(grant(lost)),
        reason: reason.into(),
        detail,
    }
}

/// A forced release as its victim is told of it later. Which key it was is not
/// on record; lock, owner and token say it all.
pub(crate) fn forced(record: ForcedRelease) -> v1::GrantLost {
    let ForcedRelease {
        session: _,
        token,
        lock,
        owner,
        reason,
    } = record;
    v1::GrantLost {
        grant: Some(v1::Grant {
            lock,
            owner,
            token,
            ..v1::Grant::default()
        }),
        reason: v1::LossReason::Forced.into(),
        detail: reason,
    }
}

pub(crate) fn end_reason(end: EndReason) -> v1::LossReason {
    match end {
        EndReason::Expired => v1::LossReason::SessionExpired,
        EndReason::Closed => v1::LossReason::SessionClosed,
        EndReason::Revoked => v1::LossReason::Revoked,
        EndReason::Unknown => v1::LossReason::Unspecified,
    }
}

pub(crate) fn contender(contender: primitives::Contender) -> v1::Contender {
    v1::Contender {
        key: contender.key,
        session_id: contender.session.map_or(0, |session| session.0),
        session_name: contender.session_name,
        owner: contender.owner,
        token: contender.token,
        since_ms: contender.since_ms,
        place: contender.place as u64,
        delay_left_ms: contender.delay_left_ms,
        entries: contender.entries as u64,
        candidate: contender.is_candidate,
    }
}

pub(crate) fn lock(lock: primitives::LockInfo) -> v1::LockInfo {
    v1::LockInfo {
        name: lock.name,
        holder: Some(contender(lock.holder)),
        waiters: lock.waiters.into_iter().map(contender).collect(),
        waiters_total: lock.waiters_total as u64,
    }
}

pub(crate) fn leader(leader: primitives::Leader) -> v1::Leader {
    v1::Leader {
        key: leader.key,
        term: leader.term,
        value: leader.value,
        proclaimed_revision: leader.proclaimed,
        session_id: leader.session.map_or(0, |session| session.0),
        owner: leader.owner,
    }
}

pub(crate) fn election(election: primitives::ElectionInfo) -> v1::ElectionInfo {
    v1::ElectionInfo {
        name: election.name,
        leader: election.leader.map(leader),
        candidates: election.candidates.into_iter().map(contender).collect(),
        candidates_total: election.candidates_total as u64,
    }
}
