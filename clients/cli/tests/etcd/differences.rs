//! Where Conclave answers otherwise than the reference, and means to.

use crate::{side::Answer, step::Step};

/// A difference that is meant, with its reason.
pub struct Known {
    pub name: &'static str,
    pub reason: &'static str,
    /// Whether these two answers to this request differ by it, and by nothing else.
    pub explains: fn(&Step, &Answer, &Answer) -> bool,
}

/// All of them. One that occurs no more makes the test fail: it is to be removed.
pub const KNOWN: &[Known] = &[];
