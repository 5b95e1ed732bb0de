//! What must always be true, one promise a file.
//!
//! A checker sees what happened, with true times that no part of the system
//! under test can see, and knows nothing of how it came about: the simulator
//! feeds it, and any other world could. Each has a positive control beside it:
//! a history that breaks the promise, which the checker must refuse.

pub(crate) mod acknowledged;
pub(crate) mod early_expiry;
pub(crate) mod equal_state;
pub(crate) mod fenced;
pub(crate) mod fifo;
pub(crate) mod leases;
pub(crate) mod linearizable;
pub(crate) mod liveness;
pub(crate) mod lock_delay;
pub(crate) mod model;
pub(crate) mod observed;
pub(crate) mod once;
pub(crate) mod one_holder;
pub(crate) mod serializable;
pub(crate) mod shared;
pub(crate) mod tokens_grow;
pub(crate) mod wakeups;
pub(crate) mod watched;

/// The checker that no file holds: a node stops only when its disk failed.
pub(crate) const STAYS_UP: &str = "stays_up";

/// The other one: of what the log of a node does not hold any more it has a whole
/// checkpoint when it starts, unless they were damaged at rest.
pub(crate) const WHOLE_CHECKPOINT: &str = "whole_checkpoint";

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    /// Which checker found it.
    pub(crate) checker: &'static str,
    /// What it saw.
    pub(crate) what: String,
}

/// What a checker says of an observation.
pub(crate) type Verdict = Result<(), Violation>;

/// A verdict against.
pub(crate) fn broken(checker: &'static str, what: String) -> Verdict {
    Err(Violation { checker, what })
}
