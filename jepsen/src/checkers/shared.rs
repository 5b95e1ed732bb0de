//! A grant that several acquires share lasts until each of them is undone, and no
//! longer.
//!
//! Right after the release of one, by the state at the revision of its answer, the
//! grant is there if others share it, and is not if it was the last. So no acquire
//! counts twice however often it was sent, none is forgotten, and no release undoes
//! more than one. One that was undone cannot be undone again, and who did not ask
//! for it, with the first acquire and with the next, shares nothing.

use super::{Verdict, broken};

const NAME: &str = "shared";

/// A node acknowledges a release by a live session that leaves so many acquires to
/// share a grant. `is_there`: at the revision of the answer, the key of the grant.
pub(crate) fn released(token: u64, left: usize, is_there: bool) -> Verdict {
    if is_there == (left > 0) {
        return Ok(());
    }
    let is = if is_there { "still" } else { "not" };
    let what = format!("token {token} is {is} there, and {left} acquires share it after a release");
    broken(NAME, what)
}

/// A node acknowledges the release of an acquire that was undone before.
pub(crate) fn released_again(token: u64) -> Verdict {
    broken(NAME, format!("token {token}: an acquire was undone twice"))
}

/// An acquire of a holder is granted with the token that it holds.
pub(crate) fn joined(token: u64, may_share: bool) -> Verdict {
    match may_share {
        true => Ok(()),
        false => broken(NAME, format!("token {token} is shared unasked")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_grant_that_ends_too_early_or_too_late() {
        released(5, 1, true).unwrap();
        released(5, 0, false).unwrap();
        assert_eq!(released(5, 1, false).unwrap_err().checker, "shared");
        assert!(released(5, 0, true).is_err());
    }

    #[test]
    fn finds_what_should_not_be_done() {
        assert!(released_again(5).is_err());
        joined(5, true).unwrap();
        assert!(joined(5, false).is_err());
    }
}
