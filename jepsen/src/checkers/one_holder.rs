//! At most one holder.
//!
//! By the log: when a node answers that a lock is granted, no other contender
//! whose key was alive at that revision had been told the same.
//!
//! By the clock: between clients that trust nothing but their own deadline, the
//! times during which they believe to hold one lock never overlap, as long as
//! clock rates stay within 5 % of true. A client believes from hearing
//! "granted" until it begins to release, dies, is told of a loss, or its own
//! deadline passes. A grant that an operator forced away ends for this checker
//! when the force is applied: its old holder cannot know yet, and only the
//! token protects.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, broken};

const NAME: &str = "one_holder";

#[derive(Debug)]
struct Belief {
    client: usize,
    token: u64,
    /// The true time at which the client's own clock says it is over.
    until_us: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct OneHolder {
    /// Tokens that some client was told it holds, with the lowest revision of
    /// such an answer. Nodes that lag answer late, so not in order.
    told: BTreeMap<u64, u64>,
    forced: BTreeSet<u64>,
    /// By lock.
    beliefs: BTreeMap<usize, Vec<Belief>>,
}

impl OneHolder {
    /// A node answers "granted". `alive` are the create revisions of the lock's
    /// keys at the revision of the answer.
    pub(crate) fn answered(
        &mut self,
        lock: usize,
        token: u64,
        revision: u64,
        alive: &[u64],
    ) -> Verdict {
        let told = self.told.entry(token).or_insert(revision);
        *told = revision.min(*told);
        for other in alive {
            let is_held = self.told.get(other).is_some_and(|told| *told <= revision);
            if *other != token && is_held {
                return broken(
                    NAME,
                    format!("lock {lock}: token {token} granted while {other} is held"),
                );
            }
        }
        Ok(())
    }

    /// A client hears "granted" and begins to believe.
    pub(crate) fn believes(
        &mut self,
        at_us: u64,
        lock: usize,
        client: usize,
        token: u64,
        until_us: u64,
    ) -> Verdict {
        let beliefs = self.beliefs.entry(lock).or_default();
        beliefs.retain(|belief| belief.until_us > at_us);
        if self.forced.contains(&token) {
            return Ok(());
        }
        let other = beliefs.first().map(|belief| {
            format!(
                "lock {lock}: client {client} holds with token {token} while client {} still \
                 believes in token {} for {} us",
                belief.client,
                belief.token,
                belief.until_us - at_us
            )
        });
        beliefs.push(Belief {
            client,
            token,
            until_us,
        });
        other.map_or(Ok(()), |what| broken(NAME, what))
    }

    /// A renewal moved a client's own deadline on.
    pub(crate) fn renewed(&mut self, client: usize, until_us: u64) {
        for belief in self.beliefs.values_mut().flatten() {
            if belief.client == client {
                belief.until_us = belief.until_us.max(until_us);
            }
        }
    }

    /// A client stops believing: it gives the lock up, or was told of the loss.
    pub(crate) fn gives_up(&mut self, lock: usize, token: u64) {
        if let Some(beliefs) = self.beliefs.get_mut(&lock) {
            beliefs.retain(|belief| belief.token != token);
        }
    }

    /// A client is gone, with all it believed.
    pub(crate) fn gone(&mut self, client: usize) {
        for beliefs in self.beliefs.values_mut() {
            beliefs.retain(|belief| belief.client != client);
        }
    }

    /// An operator took a grant away.
    pub(crate) fn forced(&mut self, token: u64) {
        if self.forced.insert(token) {
            for beliefs in self.beliefs.values_mut() {
                beliefs.retain(|belief| belief.token != token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_two_that_were_told_at_one_revision() {
        let mut checker = OneHolder::default();
        checker.answered(0, 6, 8, &[6]).unwrap();
        checker.answered(0, 5, 7, &[5, 6]).unwrap();
        let violation = checker.answered(0, 9, 9, &[6, 9]).unwrap_err();
        assert_eq!(violation.checker, "one_holder");
    }

    #[test]
    fn finds_two_that_believe_at_once() {
        let mut checker = OneHolder::default();
        checker.believes(100, 0, 1, 5, 1_000).unwrap();
        checker.renewed(1, 2_000);
        assert!(checker.believes(1_500, 0, 2, 6, 3_000).is_err());
    }

    #[test]
    fn accepts_a_hand_off_and_what_only_tokens_can_protect() {
        let mut checker = OneHolder::default();
        checker.believes(100, 0, 1, 5, 1_000).unwrap();
        checker.believes(150, 1, 2, 6, 1_000).unwrap();
        checker.believes(1_000, 0, 2, 7, 9_000).unwrap();
        checker.gives_up(0, 7);
        checker.believes(1_100, 0, 3, 8, 9_000).unwrap();
        checker.forced(8);
        checker.believes(1_200, 0, 4, 9, 9_000).unwrap();
        checker.gone(4);
        checker.believes(1_300, 0, 5, 10, 9_000).unwrap();
    }
}
