//! Fencing tokens only grow.
//!
//! One token names one grant, whoever asks and however often. Among clients
//! that believe they hold a lock, one after the other, each has a greater token
//! than all before it, so that whatever the lock protects can refuse the past.
//! A grant that was forced away may be heard of late, and is left out.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, broken};

const NAME: &str = "tokens_grow";

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct TokensGrow {
    /// Whose grant it is: lock and session.
    owners: BTreeMap<u64, (usize, i64)>,
    forced: BTreeSet<u64>,
    /// The greatest heard of, by lock.
    newest: BTreeMap<usize, u64>,
}

impl TokensGrow {
    /// A node answers "granted" with this token.
    pub(crate) fn answered(&mut self, lock: usize, session: i64, token: u64) -> Verdict {
        let owner = *self.owners.entry(token).or_insert((lock, session));
        if owner == (lock, session) {
            return Ok(());
        }
        broken(
            NAME,
            format!(
                "token {token} names lock {lock} of session {session:x}, and lock {} of {:x}",
                owner.0, owner.1
            ),
        )
    }

    /// A client believes in a new grant.
    pub(crate) fn believes(&mut self, lock: usize, token: u64) -> Verdict {
        if self.forced.contains(&token) {
            return Ok(());
        }
        match self.newest.insert(lock, token) {
            Some(before) if before >= token => {
                broken(NAME, format!("lock {lock}: token {token} after {before}"))
            }
            _ => Ok(()),
        }
    }

    /// An operator took a grant away.
    pub(crate) fn forced(&mut self, token: u64) {
        self.forced.insert(token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_token_that_does_not_grow() {
        let mut checker = TokensGrow::default();
        checker.believes(0, 7).unwrap();
        checker.believes(1, 3).unwrap();
        assert_eq!(checker.believes(0, 7).unwrap_err().checker, "tokens_grow");
        assert!(checker.believes(0, 6).is_err());
    }

    #[test]
    fn finds_a_token_with_two_meanings() {
        let mut checker = TokensGrow::default();
        checker.answered(0, 1, 7).unwrap();
        checker.answered(0, 1, 7).unwrap();
        assert!(checker.answered(0, 2, 7).is_err());
        assert!(checker.answered(1, 1, 7).is_err());
    }

    #[test]
    fn leaves_out_what_was_forced() {
        let mut checker = TokensGrow::default();
        checker.believes(0, 9).unwrap();
        checker.forced(7);
        checker.believes(0, 7).unwrap();
    }
}
