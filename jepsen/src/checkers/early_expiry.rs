//! No session expires early.
//!
//! Let a renewal (or the opening) of a session be acknowledged, and let its
//! client have sent it at true time S. The leader counts the session's TTL from
//! no earlier than the arrival of that request, so not from before S; so does
//! every later leader, since each begins with a full TTL after the round that
//! confirmed the renewal. Two bounds follow for the true time T at which any
//! node has applied the expiry:
//!
//! 1. A leader's clock runs at most 5 % fast, so `T - S >= TTL / 1.05`.
//! 2. A leader's own stall expires nobody: its clock adds, each turn, what
//!    passed since the turn before, but at most two heartbeats. Let
//!    `A(t)` be that sum for the node that proposed the expiry, by its own
//!    clock, up to `t` (with no more than two heartbeats for the turn that
//!    has not come yet); then `A(T) - A(S) >= TTL`. For that, `A` must never go
//!    back: it stands still while the node is down and goes on from there when it
//!    starts, after which the leader counts every TTL from no earlier than its
//!    start. Who proposed it is not visible from outside, but it led at some time
//!    between S and T: if no node that led satisfies the bound, it is broken.
//!
//! Both less [`SLACK_US`], since clocks of sessions count in milliseconds. The
//! client may count on 0.85 TTL by its own clock, at most 0.85 / 0.95 = 0.895
//! of the TTL in true time, which leaves room to the 1 / 1.05 = 0.952 here.

use std::collections::BTreeMap;

use super::{Verdict, broken};

const NAME: &str = "early_expiry";

/// Rounding to milliseconds on the way in and out, twice.
const SLACK_US: u64 = 4_000;

/// The nodes a cluster may have at most.
pub(crate) const NODES_MAX: usize = 5;

/// A point in time, as the checker counts it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moment {
    /// True time.
    pub(crate) true_us: u64,
    /// `A` for each node, by its own clock.
    pub(crate) stall_free_us: [u64; NODES_MAX],
}

#[derive(Debug)]
struct Watched {
    ttl_us: u64,
    /// When the newest acknowledged renewal was sent.
    renewed: Moment,
    expired: Option<(Moment, [bool; NODES_MAX])>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct EarlyExpiry {
    sessions: BTreeMap<i64, Watched>,
    /// Expired before it was known to be open.
    unknown: BTreeMap<i64, (Moment, [bool; NODES_MAX])>,
}

impl EarlyExpiry {
    /// A node acknowledges a renewal or an opening that was sent at `sent`.
    pub(crate) fn renewed(&mut self, session: i64, sent: Moment, ttl_ms: u64) -> Verdict {
        let unknown = self.unknown.remove(&session);
        let watched = self.sessions.entry(session).or_insert(Watched {
            ttl_us: ttl_ms * 1_000,
            renewed: sent,
            expired: unknown,
        });
        if sent.true_us > watched.renewed.true_us {
            watched.renewed = sent;
        }
        watched.verdict(session)
    }

    /// A node has applied the expiry; `led` are the nodes that led since `since`
    /// (see [`EarlyExpiry::renewed_at`]).
    pub(crate) fn expired(&mut self, session: i64, at: Moment, led: [bool; NODES_MAX]) -> Verdict {
        let Some(watched) = self.sessions.get_mut(&session) else {
            self.unknown.entry(session).or_insert((at, led));
            return Ok(());
        };
        if watched.expired.is_some() {
            return Ok(());
        }
        watched.expired = Some((at, led));
        watched.verdict(session)
    }

    /// When the newest acknowledged renewal of a session was sent.
    pub(crate) fn renewed_at(&self, session: i64) -> Option<u64> {
        self.sessions
            .get(&session)
            .map(|watched| watched.renewed.true_us)
    }
}

impl Watched {
    fn verdict(&self, session: i64) -> Verdict {
        let Some((at, led)) = &self.expired else {
            return Ok(());
        };
        let elapsed = at.true_us.saturating_sub(self.renewed.true_us);
        if elapsed + SLACK_US < self.ttl_us * 100 / 105 {
            return broken(
                NAME,
                format!(
                    "session {session:x} with a TTL of {} us expired {elapsed} us after an \
                     acknowledged renewal was sent",
                    self.ttl_us
                ),
            );
        }
        let counted = |node: usize| {
            at.stall_free_us[node].saturating_sub(self.renewed.stall_free_us[node]) + SLACK_US
        };
        let leaders = || (0..NODES_MAX).filter(|node| led[*node]);
        if leaders().next().is_some() && leaders().all(|node| counted(node) < self.ttl_us) {
            return broken(
                NAME,
                format!(
                    "session {session:x} with a TTL of {} us expired {elapsed} us after an \
                     acknowledged renewal was sent, part of which its leader stood still",
                    self.ttl_us
                ),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moment(true_us: u64, leader_us: u64) -> Moment {
        let mut stall_free_us = [true_us; NODES_MAX];
        stall_free_us[1] = leader_us;
        Moment {
            true_us,
            stall_free_us,
        }
    }

    const LED: [bool; NODES_MAX] = [false, true, false, false, false];

    #[test]
    fn finds_an_expiry_before_its_time() {
        let mut checker = EarlyExpiry::default();
        checker.renewed(1, moment(0, 0), 1_000).unwrap();
        checker.renewed(1, moment(500_000, 500_000), 1_000).unwrap();
        let verdict = checker.expired(1, moment(1_400_000, 1_400_000), LED);
        assert_eq!(verdict.unwrap_err().checker, "early_expiry");
    }

    #[test]
    fn finds_an_acknowledgement_that_comes_to_light_after_the_expiry() {
        let mut checker = EarlyExpiry::default();
        checker.renewed(1, moment(0, 0), 1_000).unwrap();
        checker
            .expired(1, moment(1_000_000, 1_000_000), LED)
            .unwrap();
        assert!(checker.renewed(1, moment(600_000, 600_000), 1_000).is_err());
        checker
            .expired(2, moment(1_000_000, 1_000_000), LED)
            .unwrap();
        assert!(checker.renewed(2, moment(600_000, 600_000), 1_000).is_err());
    }

    #[test]
    fn finds_an_expiry_by_a_stall() {
        let mut checker = EarlyExpiry::default();
        checker.renewed(1, moment(0, 0), 1_000).unwrap();
        assert!(checker.expired(1, moment(2_000_000, 700_000), LED).is_err());
    }

    #[test]
    fn accepts_an_expiry_in_time_by_a_fast_clock() {
        let mut checker = EarlyExpiry::default();
        checker.renewed(1, moment(0, 0), 1_000).unwrap();
        checker.expired(1, moment(953_000, 1_000_650), LED).unwrap();
    }
}
