//! Nothing acknowledged is lost.
//!
//! A session whose opening was acknowledged is alive in the end, or its end is
//! on record. A grant that was released stays released. A grant that its client
//! still trusts is there: a check of its token says so, its first release does
//! not say "not held", and no new request of the same owner stumbles over one
//! that was given up. (Of plain keys, `linearizable` sees the same.)

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, broken};

const NAME: &str = "acknowledged";

/// What is promised about a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    Opened,
    Closed,
}

/// What the state says of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Known {
    /// It lives.
    Alive,
    /// It ended, and why is on record.
    Ended,
    /// Nothing.
    Nothing,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Acknowledged {
    sessions: BTreeMap<i64, Promise>,
    /// With the revision at which each was released.
    released: BTreeMap<u64, u64>,
    forced: BTreeSet<u64>,
}

impl Acknowledged {
    /// A node acknowledges the opening of a session.
    pub(crate) fn opened(&mut self, session: i64) {
        self.sessions.entry(session).or_insert(Promise::Opened);
    }

    /// A node acknowledges that a session was closed.
    pub(crate) fn closed(&mut self, session: i64) {
        self.sessions.insert(session, Promise::Closed);
    }

    /// A node acknowledges a release, or does so again for a copy of the request. A
    /// second release of the same grant is stale and must not be acknowledged.
    pub(crate) fn released(&mut self, token: u64, revision: u64) -> Verdict {
        let released = *self.released.entry(token).or_insert(revision);
        if released == revision {
            return Ok(());
        }
        broken(NAME, format!("token {token} released twice"))
    }

    /// An operator took a grant away.
    pub(crate) fn forced(&mut self, token: u64) {
        self.forced.insert(token);
    }

    /// A node answers "granted": not at a revision at which it was released.
    pub(crate) fn granted(&self, token: u64, revision: u64) -> Verdict {
        if self
            .released
            .get(&token)
            .is_some_and(|released| *released <= revision)
        {
            return broken(NAME, format!("token {token} granted after its release"));
        }
        Ok(())
    }

    /// A client that still trusts its grant hears that it is not held.
    pub(crate) fn denied(&self, token: u64, how: &str) -> Verdict {
        if self.forced.contains(&token) {
            return Ok(());
        }
        broken(
            NAME,
            format!("token {token} is trusted by its client, but {how}"),
        )
    }

    /// A client is told that it still contends with a token it gave up.
    pub(crate) fn stumbled(&self, token: u64) -> Verdict {
        if self.released.contains_key(&token) {
            return broken(
                NAME,
                format!("token {token} contends although it was released"),
            );
        }
        Ok(())
    }

    /// The end: what the state says of sessions, and the tokens of all live keys.
    pub(crate) fn in_the_end(
        &self,
        known: impl Fn(i64) -> Known,
        alive: impl IntoIterator<Item = u64>,
    ) -> Verdict {
        for (session, promise) in &self.sessions {
            let lost = match (promise, known(*session)) {
                (_, Known::Nothing) => true,
                (Promise::Closed, Known::Alive) => true,
                (_, Known::Ended) | (Promise::Opened, Known::Alive) => false,
            };
            if lost {
                return broken(
                    NAME,
                    format!("session {session:x}: {promise:?} is forgotten"),
                );
            }
        }
        match alive
            .into_iter()
            .find(|token| self.released.contains_key(token))
        {
            Some(token) => broken(NAME, format!("the release of token {token} is forgotten")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_a_session_that_is_forgotten() {
        let mut checker = Acknowledged::default();
        checker.opened(1);
        checker.in_the_end(|_| Known::Alive, []).unwrap();
        checker.in_the_end(|_| Known::Ended, []).unwrap();
        let verdict = checker.in_the_end(|_| Known::Nothing, []);
        assert_eq!(verdict.unwrap_err().checker, "acknowledged");
        checker.closed(1);
        checker.in_the_end(|_| Known::Ended, []).unwrap();
        assert!(checker.in_the_end(|_| Known::Alive, []).is_err());
    }

    #[test]
    fn finds_a_release_that_is_forgotten() {
        let mut checker = Acknowledged::default();
        checker.released(5, 9).unwrap();
        checker.in_the_end(|_| Known::Alive, [6]).unwrap();
        assert!(checker.in_the_end(|_| Known::Alive, [6, 5]).is_err());
        checker.granted(5, 8).unwrap();
        assert!(checker.granted(5, 9).is_err());
        assert!(checker.stumbled(5).is_err());
        checker.granted(6, 9).unwrap();
    }

    #[test]
    fn finds_a_stale_release_that_is_accepted() {
        let mut checker = Acknowledged::default();
        checker.released(5, 9).unwrap();
        checker.released(6, 10).unwrap();
        // The answer to a copy of the request.
        checker.released(5, 9).unwrap();
        assert!(checker.released(5, 11).is_err());
    }

    #[test]
    fn finds_a_grant_that_is_forgotten() {
        let mut checker = Acknowledged::default();
        assert!(checker.denied(5, "a check says no").is_err());
        checker.forced(5);
        checker.denied(5, "a check says no").unwrap();
    }
}
