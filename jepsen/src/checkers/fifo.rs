//! First come, first served.
//!
//! When a lock is granted, no contender that came before is still alive: the
//! one granted has the lowest create revision among the keys of the lock.

use super::{Verdict, broken};

const NAME: &str = "fifo";

/// A node answers "granted". `alive` are the create revisions of the lock's
/// keys at the revision of the answer.
pub(crate) fn answered(lock: usize, token: u64, alive: &[u64]) -> Verdict {
    if !alive.contains(&token) {
        return broken(
            NAME,
            format!("lock {lock}: token {token} granted without a live key"),
        );
    }
    match alive.iter().find(|other| **other < token) {
        Some(first) => broken(
            NAME,
            format!("lock {lock}: token {token} granted before live {first}"),
        ),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_who_overtakes() {
        answered(0, 5, &[5, 6, 9]).unwrap();
        answered(0, 5, &[9, 5]).unwrap();
        assert_eq!(answered(0, 6, &[5, 6, 9]).unwrap_err().checker, "fifo");
    }

    #[test]
    fn finds_a_grant_of_nothing() {
        assert!(answered(0, 5, &[]).is_err());
        assert!(answered(0, 5, &[6]).is_err());
    }
}
