//! Registers are linearizable: each operation takes effect at one instant
//! between its call and its return.
//!
//! The search is the one of Wing and Gong with Lowe's memory of what was tried
//! ("Testing for linearizability", 2017), one key at a time, since a history is
//! linearizable if it is for each key alone. Every write has a value of its
//! own. That keeps unknown outcomes cheap: a write that may have happened and
//! whose value nobody ever saw may as well not have, and one whose value was
//! seen did.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{Verdict, Violation, broken};

const NAME: &str = "linearizable";

/// The value of a key that is not there.
pub(crate) const ABSENT: u64 = 0;

/// What an operation did, as its client knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Saw this value.
    Read(u64),
    /// Wrote this value.
    Write(u64),
    /// Wrote `new` in place of `old`, or if the outcome is unknown, maybe did not.
    Swap { old: u64, new: u64 },
}

/// One operation on one key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    /// When its client sent it.
    pub(crate) called_us: u64,
    /// When its client heard the outcome; never, if it is unknown.
    pub(crate) returned_us: Option<u64>,
    /// What it did.
    pub(crate) action: Action,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Linearizable {
    keys: BTreeMap<u64, Vec<Operation>>,
}

impl Linearizable {
    /// Takes note of an operation.
    pub(crate) fn record(&mut self, key: u64, operation: Operation) {
        self.keys.entry(key).or_default().push(operation);
    }

    /// The keys that were used.
    pub(crate) fn keys(&self) -> impl Iterator<Item = u64> {
        self.keys.keys().copied()
    }

    /// The verdict on all that was recorded, however long it takes.
    pub(crate) fn verdict(&self) -> Verdict {
        self.verdict_within(u64::MAX).map(|_| ())
    }

    /// The same with a bound on the steps of the search for each key. Keys for
    /// which it was reached are given back: nothing is known about them.
    pub(crate) fn verdict_within(&self, steps: u64) -> Result<Vec<u64>, Violation> {
        let mut undecided = Vec::new();
        for (key, operations) in &self.keys {
            match is_linearizable(&relevant(operations), steps) {
                Some(true) => {}
                None => undecided.push(*key),
                Some(false) => broken(
                    NAME,
                    format!("key {key}: {} operations have no order", operations.len()),
                )?,
            }
        }
        Ok(undecided)
    }
}

/// Without unknown writes that nobody saw; in order of their calls.
fn relevant(operations: &[Operation]) -> Vec<Operation> {
    let seen: BTreeSet<u64> = operations
        .iter()
        .filter_map(
            |operation| match (operation.action, operation.returned_us) {
                (Action::Read(value), Some(_)) => Some(value),
                (Action::Swap { old, .. }, Some(_)) => Some(old),
                _ => None,
            },
        )
        .collect();
    let mut kept: Vec<Operation> = operations
        .iter()
        .filter(|operation| {
            operation.returned_us.is_some()
                || match operation.action {
                    Action::Read(_) => false,
                    Action::Write(new) | Action::Swap { new, .. } => {
                        seen.contains(&new) || feeds_a_swap(new, operations)
                    }
                }
        })
        .copied()
        .collect();
    kept.sort_by_key(|operation| operation.called_us);
    kept
}

/// Whether an unknown swap may have built on this value.
fn feeds_a_swap(value: u64, operations: &[Operation]) -> bool {
    operations.iter().any(|operation| {
        operation.returned_us.is_none()
            && matches!(operation.action, Action::Swap { old, .. } if old == value)
    })
}

/// What a register holds after an action, if the action fits what it held.
fn after(state: u64, action: Action) -> Option<u64> {
    match action {
        Action::Read(value) => (value == state).then_some(state),
        Action::Write(value) => Some(value),
        Action::Swap { old, new } => (old == state).then_some(new),
    }
}

/// `None` if so many steps do not decide it.
fn is_linearizable(operations: &[Operation], steps: u64) -> Option<bool> {
    let mut steps_left = steps;
    let mut history = History::new(operations);
    let mut done = vec![0_u64; operations.len().div_ceil(64)];
    // Only asked, never iterated.
    let mut tried: HashSet<(Vec<u64>, u64)> = HashSet::new();
    let mut chosen: Vec<(usize, u64)> = Vec::new();
    let mut state = ABSENT;
    let mut at = history.first();
    while history.returns_left > 0 {
        steps_left = steps_left.checked_sub(1)?;
        match history.events[at] {
            Event::Call(operation) => {
                let (word, bit) = (operation / 64, 1 << (operation % 64));
                if let Some(next) = after(state, operations[operation].action) {
                    done[word] |= bit;
                    if tried.insert((done.clone(), next)) {
                        chosen.push((operation, state));
                        state = next;
                        history.lift(operation);
                        at = history.first();
                        continue;
                    }
                    done[word] &= !bit;
                }
                at = history.next[at];
            }
            // Nothing may be put off beyond its return: take the last choice back.
            Event::Return | Event::End => {
                let Some((operation, before)) = chosen.pop() else {
                    return Some(false);
                };
                state = before;
                done[operation / 64] &= !(1 << (operation % 64));
                history.put_back(operation);
                at = history.next[history.calls[operation]];
            }
        }
    }
    Some(true)
}

#[derive(Clone, Copy)]
enum Event {
    /// Before the first and after the last.
    End,
    Call(usize),
    Return,
}

/// Calls and returns in order of time, as a list from which operations can be
/// lifted and put back in reverse order.
struct History {
    events: Vec<Event>,
    next: Vec<usize>,
    previous: Vec<usize>,
    calls: Vec<usize>,
    returns: Vec<Option<usize>>,
    returns_left: usize,
}

impl History {
    fn new(operations: &[Operation]) -> Self {
        // At equal times calls come first: such operations are concurrent.
        let mut order: Vec<(u64, bool, usize)> = Vec::new();
        for (index, operation) in operations.iter().enumerate() {
            order.push((operation.called_us, false, index));
            order.extend(operation.returned_us.map(|at| (at, true, index)));
        }
        order.sort_unstable();
        let length = order.len() + 1;
        let mut history = Self {
            events: vec![Event::End],
            next: (0..length).map(|place| (place + 1) % length).collect(),
            previous: (0..length)
                .map(|place| (place + length - 1) % length)
                .collect(),
            calls: vec![0; operations.len()],
            returns: vec![None; operations.len()],
            returns_left: 0,
        };
        for (place, (_, returns, index)) in (1..).zip(order) {
            if returns {
                history.events.push(Event::Return);
                history.returns[index] = Some(place);
                history.returns_left += 1;
            } else {
                history.events.push(Event::Call(index));
                history.calls[index] = place;
            }
        }
        history
    }

    fn first(&self) -> usize {
        self.next[0]
    }

    fn lift(&mut self, operation: usize) {
        self.unlink(self.calls[operation]);
        if let Some(place) = self.returns[operation] {
            self.unlink(place);
            self.returns_left -= 1;
        }
    }

    fn put_back(&mut self, operation: usize) {
        if let Some(place) = self.returns[operation] {
            self.link(place);
            self.returns_left += 1;
        }
        self.link(self.calls[operation]);
    }

    fn unlink(&mut self, place: usize) {
        let (previous, next) = (self.previous[place], self.next[place]);
        self.next[previous] = next;
        self.previous[next] = previous;
    }

    fn link(&mut self, place: usize) {
        let (previous, next) = (self.previous[place], self.next[place]);
        self.next[previous] = place;
        self.previous[next] = place;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(history: &[(u64, Option<u64>, Action)]) -> Verdict {
        let mut checker = Linearizable::default();
        for (called_us, returned_us, action) in history {
            let operation = Operation {
                called_us: *called_us,
                returned_us: *returned_us,
                action: *action,
            };
            checker.record(0, operation);
        }
        checker.verdict()
    }

    #[test]
    fn finds_a_stale_read() {
        let stale = verdict(&[
            (0, Some(1), Action::Write(7)),
            (2, Some(3), Action::Write(8)),
            (4, Some(5), Action::Read(7)),
        ]);
        assert_eq!(stale.unwrap_err().checker, "linearizable");
    }

    #[test]
    fn finds_a_lost_write_and_a_double_swap() {
        assert!(
            verdict(&[
                (0, Some(1), Action::Write(7)),
                (2, Some(3), Action::Read(0))
            ])
            .is_err()
        );
        let double = [
            (0, Some(9), Action::Swap { old: 0, new: 7 }),
            (0, Some(9), Action::Swap { old: 0, new: 8 }),
        ];
        assert!(verdict(&double).is_err());
    }

    #[test]
    fn finds_an_effect_that_comes_and_goes() {
        let flicker = verdict(&[
            (0, Some(1), Action::Write(7)),
            (2, None, Action::Write(8)),
            (3, Some(4), Action::Read(8)),
            (5, Some(6), Action::Read(7)),
        ]);
        assert!(flicker.is_err());
    }

    #[test]
    fn accepts_concurrency_and_unknown_outcomes() {
        verdict(&[
            (0, Some(1), Action::Write(7)),
            (2, None, Action::Write(8)),
            (2, None, Action::Swap { old: 7, new: 9 }),
            (3, Some(4), Action::Read(7)),
            (5, Some(6), Action::Read(8)),
            (5, Some(9), Action::Write(10)),
            (5, Some(9), Action::Read(10)),
            (10, None, Action::Swap { old: 10, new: 11 }),
            (12, None, Action::Swap { old: 11, new: 12 }),
            (13, Some(14), Action::Read(12)),
        ])
        .unwrap();
    }

    /// A lock is a register that holds the token of its holder, if it has one.
    #[test]
    fn finds_a_lock_with_two_holders() {
        let acquire = |new| Action::Swap { old: ABSENT, new };
        let release = |old| Action::Swap { old, new: ABSENT };
        let handed_over = [
            (0, Some(1), acquire(5)),
            (2, Some(9), release(5)),
            (3, Some(4), acquire(6)),
            (5, Some(6), Action::Read(6)),
        ];
        verdict(&handed_over).unwrap();
        let mut lost = handed_over;
        lost[1] = (2, None, release(5));
        verdict(&lost).unwrap();
        let mut never_given_up = handed_over;
        never_given_up[1] = (7, None, release(5));
        assert!(verdict(&never_given_up).is_err());
        let mut seen_late = handed_over;
        seen_late[3] = (5, Some(6), Action::Read(5));
        assert!(verdict(&seen_late).is_err());
    }

    #[test]
    fn a_search_without_end_is_no_verdict() {
        let mut checker = Linearizable::default();
        for value in 1..40 {
            let action = Action::Write(value);
            checker.record(
                3,
                Operation {
                    called_us: 0,
                    returned_us: Some(9),
                    action,
                },
            );
        }
        let action = Action::Read(99);
        checker.record(
            3,
            Operation {
                called_us: 1,
                returned_us: Some(8),
                action,
            },
        );
        assert_eq!(checker.verdict_within(10_000), Ok(vec![3]));
    }

    /// Every order of operations against the search, on small random histories.
    #[test]
    fn agrees_with_trying_all_orders() {
        let mut rng = crate::rng::Rng::new(1);
        let mut refused = 0;
        for _ in 0..3_000 {
            let mut operations = Vec::new();
            for value in 1..=rng.between(2, 5) {
                let called_us = rng.below(12);
                let action = match rng.below(3) {
                    0 => Action::Read(rng.below(4)),
                    1 => Action::Write(value),
                    _ => Action::Swap {
                        old: rng.below(3),
                        new: value,
                    },
                };
                let returned_us = Some(called_us + rng.between(1, 6));
                operations.push(Operation {
                    called_us,
                    returned_us,
                    action,
                });
            }
            let expected = some_order_fits(&mut operations.clone(), ABSENT);
            refused += usize::from(!expected);
            let found = is_linearizable(&relevant(&operations), u64::MAX);
            assert_eq!(found, Some(expected), "{operations:?}");
        }
        assert!(
            (100..2_900).contains(&refused),
            "{refused} refused: too one-sided a test"
        );
    }

    fn some_order_fits(left: &mut Vec<Operation>, state: u64) -> bool {
        if left.is_empty() {
            return true;
        }
        let first_return = left
            .iter()
            .filter_map(|operation| operation.returned_us)
            .min();
        for place in 0..left.len() {
            let operation = left[place];
            if first_return.is_some_and(|returned| operation.called_us > returned) {
                continue;
            }
            if let Some(next) = after(state, operation.action) {
                left.remove(place);
                let fits = some_order_fits(left, next);
                left.insert(place, operation);
                if fits {
                    return true;
                }
            }
        }
        false
    }
}
