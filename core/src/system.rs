//! The system table: replicated state without revisions, invisible to ranges.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use conclave_proto::internal::CheckpointSystem;

use crate::{
    ids::{LogTime, NodeId, Revision, SessionId},
    limits,
    session::{EndReason, Secret},
};

/// A member as the log knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedMember {
    /// Its name.
    pub name: String,
    /// Where clients reach it.
    pub client_urls: Vec<String>,
    /// The highest apply version its binary supports.
    pub apply_version: u32,
}

/// A grant that an operator took from its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForcedRelease {
    /// Whose grant it was.
    pub session: SessionId,
    /// The token of the grant.
    pub token: Revision,
    /// What was held, in the machine's own words.
    pub lock: String,
    /// The owner inside the session.
    pub owner: String,
    /// What the operator said.
    pub reason: String,
}

/// A session that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) session: SessionId,
    pub(crate) reason: EndReason,
    pub(crate) secret: Option<Secret>,
}

/// The system table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct System {
    /// Raised by every entry; never goes down.
    pub(crate) log_time: LogTime,
    /// The date of the newest entry, for display.
    pub(crate) date_ms: u64,
    /// Sessions opened so far, from which ids are made.
    pub(crate) sessions_opened: u64,
    pub(crate) members: BTreeMap<NodeId, PublishedMember>,
    /// How often a member published itself.
    pub(crate) publications: u64,
    pub(crate) apply_version: u32,
    /// The alarm NOSPACE: the members that raised it, 0 if that is not known.
    pub(crate) out_of_space: BTreeSet<NodeId>,
    /// The newest at the back; bounded.
    pub(crate) ended: VecDeque<Ended>,
    /// The newest end of each, and how many are on record: a client may choose the id of
    /// a lease that has ended.
    pub(crate) ended_by_id: BTreeMap<SessionId, (EndReason, u32)>,
    pub(crate) ended_by_secret: BTreeMap<Secret, EndReason>,
    /// By token; bounded.
    pub(crate) forced: BTreeMap<Revision, ForcedRelease>,
}

impl System {
    /// Log time of the newest entry.
    pub fn log_time(&self) -> LogTime {
        self.log_time
    }

    /// The date of the newest entry in milliseconds since 1970; for display.
    pub fn date_ms(&self) -> u64 {
        self.date_ms
    }

    /// Members that have served, in order of id.
    pub fn members(&self) -> &BTreeMap<NodeId, PublishedMember> {
        &self.members
    }

    /// How often a member published itself; changes whenever `members` may have.
    pub fn publications(&self) -> u64 {
        self.publications
    }

    /// Which meaning commands have. 0 until all members have served once, which
    /// is that of 1.
    pub fn apply_version(&self) -> u32 {
        self.apply_version
    }

    /// Whether the alarm NOSPACE is raised: what would grow the state is refused.
    pub fn is_out_of_space(&self) -> bool {
        !self.out_of_space.is_empty()
    }

    /// The members that raised the alarm NOSPACE.
    pub fn out_of_space(&self) -> &BTreeSet<NodeId> {
        &self.out_of_space
    }

    /// Why a session that is not alive ended, as far as it is on record.
    pub fn end_reason(&self, id: SessionId) -> EndReason {
        self.ended_by_id
            .get(&id)
            .map_or(EndReason::Unknown, |(reason, _)| *reason)
    }

    /// Why the session that was opened with this secret ended, if it did and that is
    /// on record.
    pub fn end_reason_of(&self, secret: Secret) -> Option<EndReason> {
        self.ended_by_secret.get(&secret).copied()
    }

    /// The forced release of the grant with this token, if on record.
    pub fn forced_release(&self, token: Revision) -> Option<&ForcedRelease> {
        self.forced.get(&token)
    }

    /// The forced releases on record that this session suffered.
    pub fn forced_releases_of(&self, session: SessionId) -> impl Iterator<Item = &ForcedRelease> {
        self.forced
            .values()
            .filter(move |record| record.session == session)
    }

    pub(crate) fn stamp(&mut self, log_time: LogTime, date_ms: u64) {
        self.log_time = self.log_time.max(log_time);
        self.date_ms = date_ms;
    }

    pub(crate) fn restore_counts(&mut self, counts: CheckpointSystem) {
        let CheckpointSystem {
            log_time_ms,
            date_ms,
            sessions_opened,
            publications,
            apply_version,
            out_of_space,
        } = counts;
        self.log_time = log_time_ms;
        self.date_ms = date_ms;
        self.sessions_opened = sessions_opened;
        self.publications = publications;
        self.apply_version = apply_version;
        self.out_of_space = out_of_space.into_iter().map(NodeId).collect();
    }

    pub(crate) fn count_session(&mut self) -> u64 {
        self.sessions_opened += 1;
        self.sessions_opened
    }

    pub(crate) fn publish(&mut self, node: NodeId, member: PublishedMember) {
        self.members.insert(node, member);
        self.publications += 1;
    }

    pub(crate) fn raise_apply_version(&mut self, version: u32) {
        self.apply_version = self.apply_version.max(version);
    }

    /// Raises the alarm NOSPACE for a member.
    pub(crate) fn raise_out_of_space(&mut self, member: NodeId) {
        self.out_of_space.insert(member);
    }

    /// Clears the alarm NOSPACE of a member, or all; those for which it was raised.
    pub(crate) fn clear_out_of_space(&mut self, member: Option<NodeId>) -> Vec<NodeId> {
        self.out_of_space
            .extract_if(.., |raised| member.is_none_or(|member| member == *raised))
            .collect()
    }

    pub(crate) fn record_end(&mut self, ended: Ended) {
        self.ended.push_back(ended);
        let newest = self.ended_by_id.entry(ended.session);
        let (reason, count) = newest.or_insert((ended.reason, 0));
        *reason = ended.reason;
        *count += 1;
        if let Some(secret) = ended.secret {
            self.ended_by_secret.insert(secret, ended.reason);
        }
        if self.ended.len() > limits::ENDED_SESSIONS_KEPT
            && let Some(oldest) = self.ended.pop_front()
        {
            self.forget_end(oldest.session);
            if let Some(secret) = oldest.secret {
                self.ended_by_secret.remove(&secret);
            }
        }
    }

    fn forget_end(&mut self, session: SessionId) {
        if let Some((_, count)) = self.ended_by_id.get_mut(&session) {
            *count -= 1;
            if *count == 0 {
                self.ended_by_id.remove(&session);
            }
        }
    }

    pub(crate) fn record_forced(&mut self, record: ForcedRelease) {
        self.forced.insert(record.token, record);
        if self.forced.len() > limits::FORCED_RELEASES_KEPT {
            self.forced.pop_first();
        }
    }
}
