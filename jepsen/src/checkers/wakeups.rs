//! No lost wake-up.
//!
//! After each turn of a node: whoever waits there and is first in line by what
//! the node has applied, has been answered. It is exact, not a matter of time:
//! the entry that makes a waiter the holder answers it in the same turn.
//!
//! Watched are requests while they are sent once. Of one that was repeated, the
//! key may be there by one attempt while the command of the other is still under
//! way, or lost; that such a client is served in the end, liveness sees.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, broken};

const NAME: &str = "wakeups";

#[derive(Debug)]
struct Waiter {
    session: i64,
    request: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Wakeups {
    /// By node and lock, then by the number of the call.
    waiting: BTreeMap<(usize, usize), BTreeMap<u64, Waiter>>,
    /// Session and request; the first attempt may arrive after another.
    repeated: BTreeSet<(i64, u64)>,
}

impl Wakeups {
    /// A node takes the first attempt of an acquire in.
    pub(crate) fn arrived(
        &mut self,
        node: usize,
        lock: usize,
        number: u64,
        session: i64,
        request: u64,
    ) {
        if self.repeated.contains(&(session, request)) {
            return;
        }
        let waiter = Waiter { session, request };
        self.waiting
            .entry((node, lock))
            .or_default()
            .insert(number, waiter);
    }

    /// A node takes another attempt of this acquire in.
    pub(crate) fn repeated(&mut self, lock: usize, session: i64, request: u64) {
        self.repeated.insert((session, request));
        for ((_, at), waiters) in &mut self.waiting {
            if *at == lock {
                waiters.retain(|_, waiter| (waiter.session, waiter.request) != (session, request));
            }
        }
    }

    /// A node has answered an acquire, whatever the answer.
    pub(crate) fn answered(&mut self, node: usize, lock: usize, number: u64) {
        if let Some(waiters) = self.waiting.get_mut(&(node, lock)) {
            waiters.remove(&number);
        }
    }

    /// A node stopped, and with it all calls to it.
    pub(crate) fn stopped(&mut self, node: usize) {
        self.waiting.retain(|(at, _), _| *at != node);
    }

    /// Whether a turn of this node has to look at this lock.
    pub(crate) fn watches(&self, node: usize, lock: usize) -> bool {
        self.waiting
            .get(&(node, lock))
            .is_some_and(|waiters| !waiters.is_empty())
    }

    /// A turn of a node is over; by its state, this session with this request is
    /// first in line.
    pub(crate) fn after_turn(
        &self,
        node: usize,
        lock: usize,
        session: i64,
        request: u64,
    ) -> Verdict {
        let lost = self.waiting.get(&(node, lock)).and_then(|waiters| {
            waiters
                .iter()
                .find(|(_, waiter)| waiter.session == session && waiter.request == request)
        });
        match lost {
            Some((number, _)) => broken(
                NAME,
                format!(
                    "lock {lock}: call {number} at node {node} is first in line \
                     (session {session:x}, request {request}) and was not answered"
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
    fn finds_a_waiter_that_is_first_and_not_told() {
        let mut checker = Wakeups::default();
        checker.arrived(0, 2, 11, 77, 1);
        checker.after_turn(0, 2, 66, 1).unwrap();
        checker.after_turn(1, 2, 77, 1).unwrap();
        assert!(checker.watches(0, 2));
        assert_eq!(
            checker.after_turn(0, 2, 77, 1).unwrap_err().checker,
            "wakeups"
        );
        checker.answered(0, 2, 11);
        checker.after_turn(0, 2, 77, 1).unwrap();
        assert!(!checker.watches(0, 2));
    }

    #[test]
    fn leaves_repeated_requests_to_liveness() {
        let mut checker = Wakeups::default();
        checker.arrived(0, 2, 11, 77, 1);
        checker.repeated(2, 77, 1);
        checker.arrived(0, 2, 12, 77, 1);
        checker.after_turn(0, 2, 77, 1).unwrap();
    }

    #[test]
    fn forgets_calls_of_a_node_that_stopped() {
        let mut checker = Wakeups::default();
        checker.arrived(0, 2, 11, 77, 1);
        checker.stopped(0);
        checker.after_turn(0, 2, 77, 1).unwrap();
    }
}
