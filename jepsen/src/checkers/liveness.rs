//! Served again.
//!
//! While faults last, nothing is promised but safety. Once they stop, within
//! a time (in the simulator [`RECOVERY_US`]) every client that lives completes what it was at and then
//! something it began after that; and when clients are told to start nothing
//! new, in the end no request is unanswered, no lock is held or queued for, and
//! all nodes have applied what any had applied a moment before.

use std::collections::BTreeMap;

use super::{Verdict, broken};

const NAME: &str = "liveness";

/// From the end of all faults: a few election timeouts, the longest time a
/// client waits before it tries again, the longest TTL in use, and the longest
/// queue.
pub(crate) const RECOVERY_US: u64 = 10_000_000;

/// From the moment at which clients begin nothing new, to the end.
pub(crate) const DRAIN_US: u64 = 5_000_000;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    healed_us: Option<u64>,
    /// For each client: when its current operation began.
    began: BTreeMap<usize, u64>,
    /// Clients that completed something they began after the end of faults.
    served: BTreeMap<usize, u64>,
}

impl Liveness {
    /// All faults have stopped.
    pub(crate) fn healed(&mut self, at_us: u64) {
        self.healed_us = Some(at_us);
    }

    /// A client begins an operation.
    pub(crate) fn begins(&mut self, client: usize, at_us: u64) {
        self.began.insert(client, at_us);
    }

    /// A client has completed its operation.
    pub(crate) fn completes(&mut self, client: usize, at_us: u64) {
        let began = self.began.remove(&client);
        if self
            .healed_us
            .is_some_and(|healed| began.is_some_and(|began| began >= healed))
        {
            self.served.entry(client).or_insert(at_us);
        }
    }

    /// A client is gone; nobody waits for it.
    pub(crate) fn gone(&mut self, client: usize) {
        self.began.remove(&client);
    }

    /// This time is up for these clients, which are all that live.
    pub(crate) fn recovered(
        &self,
        clients: impl IntoIterator<Item = usize>,
        within_us: u64,
    ) -> Verdict {
        for client in clients {
            if !self.served.contains_key(&client) {
                return broken(
                    NAME,
                    format!("client {client} was not served within {within_us} us after faults"),
                );
            }
        }
        Ok(())
    }

    /// The end: what is left of work, and where each node is. `upto` is the newest entry
    /// that a node had applied a moment before; what was proposed since may be under way.
    pub(crate) fn drained(
        &self,
        contenders: &[String],
        applied: &[Option<u64>],
        upto: u64,
    ) -> Verdict {
        if let Some((client, since)) = self.began.first_key_value() {
            return broken(
                NAME,
                format!("client {client} waits for an answer since {since} us"),
            );
        }
        let has_caught_up = |index: &Option<u64>| index.is_some_and(|index| index >= upto);
        if !applied.iter().all(has_caught_up) {
            let what = format!("nodes have not caught up to {upto}: {applied:?}");
            return broken(NAME, what);
        }
        match contenders.first() {
            Some(contender) => broken(
                NAME,
                format!(
                    "{} contenders are left over, such as {contender}",
                    contenders.len()
                ),
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_client_that_is_not_served() {
        let mut checker = Liveness::default();
        checker.begins(1, 50);
        checker.healed(100);
        checker.completes(1, 120);
        assert_eq!(checker.recovered([1], 20).unwrap_err().checker, "liveness");
        checker.begins(1, 130);
        checker.completes(1, 140);
        checker.recovered([1], 20).unwrap();
        assert!(checker.recovered([1, 2], 20).is_err());
    }

    #[test]
    fn finds_what_is_left_over() {
        let mut checker = Liveness::default();
        checker.drained(&[], &[Some(7), Some(7)], 7).unwrap();
        assert!(checker.drained(&["a/1".into()], &[Some(7)], 7).is_err());
        assert!(checker.drained(&[], &[Some(7), Some(6)], 7).is_err());
        assert!(checker.drained(&[], &[Some(7), None], 7).is_err());
        checker.begins(3, 1);
        assert!(checker.drained(&[], &[Some(7)], 7).is_err());
        checker.gone(3);
        checker.drained(&[], &[Some(7)], 7).unwrap();
    }

    #[test]
    fn accepts_what_was_proposed_just_before_the_end() {
        let checker = Liveness::default();
        checker.drained(&[], &[Some(8), Some(7)], 7).unwrap();
        assert!(checker.drained(&[], &[Some(8), Some(6)], 7).is_err());
    }
}
