//! Nobody is granted a lock within the delay of a holder that was lost.
//!
//! Let a client hold a lock with a delay, and let it have sent its newest
//! acknowledged renewal at true time S. Its session expires no earlier than
//! `S + TTL / 1.05` (see `early_expiry`), and the delay counts in log time from
//! then, which no leader's clock lets pass more than 5 % too fast. So unless the
//! holder begins a release, or an operator takes the lock by force, no later token
//! is granted before `S + (TTL + delay) / 1.05`, less [`SLACK_US`].

use std::collections::BTreeMap;

use super::{Verdict, broken};

const NAME: &str = "lock_delay";

/// Rounding to milliseconds, as in `early_expiry`.
const SLACK_US: u64 = 4_000;

#[derive(Debug)]
struct Guard {
    /// Whose renewals move it on.
    client: Option<usize>,
    token: u64,
    /// From the sending of a renewal.
    lasts_us: u64,
    until_us: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LockDelay {
    /// By lock.
    guards: BTreeMap<usize, Vec<Guard>>,
}

impl LockDelay {
    /// A client holds a lock with a delay; its newest acknowledged renewal was sent
    /// at `sent_us`.
    pub(crate) fn holds(
        &mut self,
        lock: usize,
        client: usize,
        token: u64,
        sent_us: u64,
        (ttl_us, delay_us): (u64, u64),
    ) {
        let lasts_us = ((ttl_us + delay_us) * 100 / 105).saturating_sub(SLACK_US);
        self.guards.entry(lock).or_default().push(Guard {
            client: Some(client),
            token,
            lasts_us,
            until_us: sent_us + lasts_us,
        });
    }

    /// A renewal of a client that was sent at `sent_us` is acknowledged.
    pub(crate) fn renewed(&mut self, client: usize, sent_us: u64) {
        for guard in self.guards.values_mut().flatten() {
            if guard.client == Some(client) {
                guard.until_us = guard.until_us.max(sent_us + guard.lasts_us);
            }
        }
    }

    /// A holder gives its lock up.
    pub(crate) fn gives_up(&mut self, lock: usize, token: u64) {
        if let Some(guards) = self.guards.get_mut(&lock) {
            guards.retain(|guard| guard.token != token);
        }
    }

    /// The session of a client is over. Whether it held anything with a delay.
    pub(crate) fn lost(&mut self, client: usize) -> bool {
        let mut has_held = false;
        for guard in self.guards.values_mut().flatten() {
            if guard.client == Some(client) {
                guard.client = None;
                has_held = true;
            }
        }
        has_held
    }

    /// A node answers "granted" at true time `at_us`; `is_forced`: whether by its
    /// state an operator took the grant with this token.
    pub(crate) fn answered(
        &mut self,
        at_us: u64,
        lock: usize,
        token: u64,
        is_forced: impl Fn(u64) -> bool,
    ) -> Verdict {
        let guards = self.guards.entry(lock).or_default();
        guards.retain(|guard| guard.until_us > at_us && !is_forced(guard.token));
        match guards.iter().find(|guard| guard.token < token) {
            Some(guard) => broken(
                NAME,
                format!(
                    "lock {lock}: token {token} granted {} us before the delay of the lost \
                     token {} can have ended",
                    guard.until_us - at_us,
                    guard.token
                ),
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMES: (u64, u64) = (1_000_000, 50_000);

    fn holding() -> LockDelay {
        let mut checker = LockDelay::default();
        checker.holds(0, 1, 5, 0, TIMES);
        checker.renewed(1, 500_000);
        assert!(checker.lost(1));
        checker
    }

    fn granted(checker: &mut LockDelay, at_us: u64, token: u64) -> Verdict {
        checker.answered(at_us, 0, token, |_| false)
    }

    #[test]
    fn finds_a_grant_within_the_delay() {
        let mut checker = holding();
        checker.renewed(1, 5_000_000);
        let verdict = granted(&mut checker, 1_490_000, 6);
        assert_eq!(verdict.unwrap_err().checker, "lock_delay");
        granted(&mut checker, 1_500_000, 6).unwrap();
    }

    #[test]
    fn accepts_late_answers_releases_and_force() {
        granted(&mut holding(), 600_000, 5).unwrap();
        granted(&mut holding(), 600_000, 4).unwrap();
        let mut checker = holding();
        checker.answered(600_000, 0, 6, |token| token == 5).unwrap();
        checker.holds(0, 2, 6, 600_000, TIMES);
        checker.gives_up(0, 6);
        granted(&mut checker, 600_001, 7).unwrap();
        assert!(!checker.lost(2));
    }
}
