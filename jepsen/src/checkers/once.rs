//! A numbered request runs at most once, and its answer never changes.
//!
//! Every node answers for a request of a live session as the first did that answered:
//! the same result, decided at the same revision. One that ran again would give at
//! least another revision. No request is called over before its client has said so,
//! and what an attachment still asks for after a newer one was made is not done.

use std::collections::BTreeMap;

use super::{Verdict, broken};

const NAME: &str = "once";

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Once {
    /// By session and number.
    answers: BTreeMap<(i64, u64), (u64, String)>,
}

impl Once {
    /// A node answers for a request. Whether it was answered before.
    pub(crate) fn answered(
        &mut self,
        session: i64,
        number: u64,
        revision: u64,
        answer: String,
    ) -> Result<bool, super::Violation> {
        let now = (revision, answer);
        let Some(first) = self.answers.get(&(session, number)) else {
            self.answers.insert((session, number), now);
            return Ok(false);
        };
        if *first == now {
            return Ok(true);
        }
        let what = format!(
            "request {number} of session {session:x} was answered {} at revision {}, and {} at {}",
            first.1, first.0, now.1, now.0
        );
        broken(NAME, what).map(|()| true)
    }

    /// A client that still asks for a request of its own attachment is refused as if
    /// it were over.
    pub(crate) fn refused(&self, session: i64, why: &str) -> Verdict {
        let what = format!("a request of session {session:x} is not over, and refused as {why}");
        broken(NAME, what)
    }

    /// What an older attachment asks for was done.
    pub(crate) fn served(&self, session: i64, what: &str) -> Verdict {
        let what = format!("session {session:x}: {what} for an attachment that is over");
        broken(NAME, what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_an_answer_that_changes() {
        let mut checker = Once::default();
        let granted = || "granted 5".to_owned();
        assert_eq!(checker.answered(1, 1, 5, granted()), Ok(false));
        assert_eq!(checker.answered(1, 1, 5, granted()), Ok(true));
        assert_eq!(checker.answered(1, 2, 6, "held".to_owned()), Ok(false));
        assert_eq!(checker.answered(2, 1, 7, granted()), Ok(false));
        assert!(checker.answered(1, 1, 6, granted()).is_err());
        let other = checker.answered(1, 1, 5, "contends".to_owned());
        assert_eq!(other.unwrap_err().checker, "once");
    }

    #[test]
    fn finds_what_should_not_be_answered_at_all() {
        let checker = Once::default();
        assert!(checker.refused(1, "over").is_err());
        assert!(checker.served(1, "renewed").is_err());
    }
}
