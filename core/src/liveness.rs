//! Who is alive: the deadlines of sessions, in the memory of the leader of one
//! term and nowhere else.
//!
//! An object of this kind is made when a leader has applied the first entry of
//! its term, and dropped with its leadership. It gives every session its full
//! TTL from then on, since it cannot know what the leader before it promised.

use std::collections::{BTreeMap, BTreeSet};

use crate::{ids::SessionId, session::Sessions};

/// Deadlines by the node's [`Clock`](crate::clock::Clock), in microseconds.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    sessions: BTreeMap<SessionId, Life>,
    by_deadline: BTreeSet<(u64, SessionId)>,
}

#[derive(Debug)]
struct Life {
    ttl_us: u64,
    deadline_us: u64,
    /// Renewals that wait for a quorum to confirm this leader.
    renewals: u32,
    /// Its expiry is proposed and not applied yet.
    expiring: bool,
}

impl Liveness {
    pub(crate) fn new(sessions: &Sessions, now_us: u64) -> Self {
        let mut liveness = Self::default();
        for (id, session) in sessions.iter() {
            liveness.opened(id, session.ttl_ms, now_us);
        }
        liveness
    }

    /// A mistake: with the deadlines that these sessions had before.
    #[cfg(conclave_plant)]
    pub(crate) fn as_in(mut self, old: &Self) -> Self {
        for (id, life) in &mut self.sessions {
            if let Some(old) = old.sessions.get(id) {
                self.by_deadline.remove(&(life.deadline_us, *id));
                life.deadline_us = old.deadline_us;
                self.by_deadline.insert((life.deadline_us, *id));
            }
        }
        self
    }

    pub(crate) fn opened(&mut self, id: SessionId, ttl_ms: u64, now_us: u64) {
        let ttl_us = ttl_ms.saturating_mul(1_000);
        let deadline_us = now_us.saturating_add(ttl_us);
        self.sessions.insert(
            id,
            Life {
                ttl_us,
                deadline_us,
                renewals: 0,
                expiring: false,
            },
        );
        self.by_deadline.insert((deadline_us, id));
    }

    pub(crate) fn ended(&mut self, id: SessionId) {
        if let Some(life) = self.sessions.remove(&id) {
            self.by_deadline.remove(&(life.deadline_us, id));
        }
    }

    /// A renewal arrived. While it waits for its confirmation, the session is
    /// not expired. If its expiry is under way, the renewal does not count, and
    /// its answer is the outcome of that.
    pub(crate) fn renewal_arrived(&mut self, id: SessionId) {
        if let Some(life) = self.sessions.get_mut(&id) {
            life.renewals += 1;
        }
    }

    /// The renewal that arrived at `arrived_us` is confirmed, or given up.
    pub(crate) fn renewal_over(&mut self, id: SessionId, confirmed_arrival_us: Option<u64>) {
        let Some(life) = self.sessions.get_mut(&id) else {
            return;
        };
        life.renewals = life.renewals.saturating_sub(1);
        if let Some(arrived_us) = confirmed_arrival_us {
            let deadline_us = arrived_us.saturating_add(life.ttl_us).max(life.deadline_us);
            self.by_deadline.remove(&(life.deadline_us, id));
            self.by_deadline.insert((deadline_us, id));
            life.deadline_us = deadline_us;
        }
    }

    /// How long a session has left, in microseconds.
    pub(crate) fn left_us(&self, id: SessionId, now_us: u64) -> u64 {
        let life = self.sessions.get(&id);
        life.map_or(0, |life| life.deadline_us.saturating_sub(now_us))
    }

    /// Whether an expiry of this session is proposed and its outcome open.
    pub(crate) fn is_expiring(&self, id: SessionId) -> bool {
        self.sessions.get(&id).is_some_and(|life| life.expiring)
    }

    /// Sessions whose time is over, as many as `max` work allows, or one that takes
    /// more; `work` says what the end of a session takes. Each is named once.
    pub(crate) fn expire(
        &mut self,
        now_us: u64,
        max: usize,
        work: impl Fn(SessionId) -> usize,
    ) -> Vec<SessionId> {
        let mut due = Vec::new();
        let mut left = max;
        for (deadline_us, id) in &self.by_deadline {
            if *deadline_us >= now_us || left == 0 {
                break;
            }
            let life = self
                .sessions
                .get_mut(id)
                .expect("both maps hold the same sessions");
            if life.renewals == 0 && !life.expiring {
                left = left.saturating_sub(work(*id));
                life.expiring = true;
                due.push(*id);
            }
        }
        due
    }

    /// The expiry of these sessions could not be proposed after all.
    pub(crate) fn expiry_dropped(&mut self, ids: &[SessionId]) {
        for id in ids {
            if let Some(life) = self.sessions.get_mut(id) {
                life.expiring = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);

    fn one(ttl_ms: u64) -> Liveness {
        let mut liveness = Liveness::default();
        liveness.opened(A, ttl_ms, 0);
        liveness
    }

    #[test]
    fn a_session_expires_once_after_its_ttl() {
        let mut liveness = one(1);
        assert_eq!(liveness.expire(1_000, 10, |_| 1), []);
        assert_eq!(liveness.expire(1_001, 10, |_| 1), [A]);
        assert_eq!(liveness.expire(2_000, 10, |_| 1), []);
        assert!(liveness.is_expiring(A));
        liveness.expiry_dropped(&[A]);
        assert_eq!(liveness.expire(2_000, 10, |_| 1), [A]);
    }

    #[test]
    fn a_confirmed_renewal_counts_from_its_arrival() {
        let mut liveness = one(1);
        liveness.renewal_arrived(A);
        assert_eq!(liveness.expire(5_000, 10, |_| 1), [], "its renewal waits");
        liveness.renewal_over(A, Some(900));
        assert_eq!(liveness.expire(1_900, 10, |_| 1), []);
        assert_eq!(liveness.expire(1_901, 10, |_| 1), [A]);
    }

    #[test]
    fn as_many_expire_at_once_as_the_work_allows_and_at_least_one() {
        let mut liveness = Liveness::default();
        for id in 1..=5 {
            liveness.opened(SessionId(id), 1, 0);
        }
        let work = |id: SessionId| if id.0 == 3 { 100 } else { 2 };
        let mut next = || liveness.expire(2_000, 4, work);
        assert_eq!(next(), [SessionId(1), SessionId(2)]);
        assert_eq!(next(), [SessionId(3)]);
        assert_eq!(next(), [SessionId(4), SessionId(5)]);
        assert_eq!(next(), []);
    }

    #[test]
    fn a_renewal_that_was_given_up_does_not_count() {
        let mut liveness = one(1);
        liveness.renewal_arrived(A);
        liveness.renewal_over(A, None);
        assert_eq!(liveness.expire(1_001, 10, |_| 1), [A]);
    }

    #[test]
    fn a_late_renewal_never_shortens() {
        let mut liveness = one(1);
        liveness.renewal_arrived(A);
        liveness.renewal_arrived(A);
        liveness.renewal_over(A, Some(800));
        liveness.renewal_over(A, Some(100));
        assert_eq!(liveness.expire(1_700, 10, |_| 1), []);
    }
}
