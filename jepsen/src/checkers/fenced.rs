//! What a lock protects is safe, if it is guarded by the token.
//!
//! Whatever the lock protects accepts a read or a write only with a token at
//! least as high as the highest it has seen. Then, for each lock: tokens that it
//! accepts never go down; one token is used by one client; a client that still
//! trusts its grant is never refused, since nobody can have a newer one; what was
//! acknowledged is there in the end, once; and nothing is there that was refused.

use std::collections::{BTreeMap, BTreeSet};

use super::{Verdict, broken};

const NAME: &str = "fenced";

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Fenced {
    locks: BTreeMap<u64, Guarded>,
}

#[derive(Debug, Default)]
struct Guarded {
    newest: u64,
    /// Whose token it is.
    clients: BTreeMap<u64, usize>,
    acknowledged: BTreeSet<u64>,
    refused: BTreeSet<u64>,
}

impl Fenced {
    /// A read or a write of this client was accepted.
    pub(crate) fn accepted(&mut self, lock: u64, token: u64, client: usize) -> Verdict {
        let guarded = self.locks.entry(lock).or_default();
        if token < guarded.newest {
            let newest = guarded.newest;
            return broken(
                NAME,
                format!("lock {lock}: token {token} accepted after {newest}"),
            );
        }
        guarded.newest = token;
        let owner = *guarded.clients.entry(token).or_insert(client);
        if owner == client {
            return Ok(());
        }
        broken(
            NAME,
            format!("lock {lock}: token {token} used by clients {owner} and {client}"),
        )
    }

    /// A write was acknowledged.
    pub(crate) fn acknowledged(&mut self, lock: u64, element: u64) {
        let guarded = self.locks.entry(lock).or_default();
        guarded.acknowledged.insert(element);
    }

    /// A client was refused. `trusts`: afterwards it still trusted its grant.
    pub(crate) fn refused(&mut self, lock: u64, token: u64, trusts: bool) -> Verdict {
        if !trusts {
            return Ok(());
        }
        broken(
            NAME,
            format!("lock {lock}: token {token} is trusted by its client, and fenced out"),
        )
    }

    /// This element was refused.
    pub(crate) fn refused_element(&mut self, lock: u64, element: u64) {
        self.locks.entry(lock).or_default().refused.insert(element);
    }

    /// The end: what is there.
    pub(crate) fn in_the_end(&self, lock: u64, elements: &[u64]) -> Verdict {
        let Some(guarded) = self.locks.get(&lock) else {
            return Ok(());
        };
        let there: BTreeSet<u64> = elements.iter().copied().collect();
        let wrong = |what: &str, element: u64| {
            broken(NAME, format!("lock {lock}: element {element} {what}"))
        };
        if let Some(lost) = guarded.acknowledged.difference(&there).next() {
            return wrong("was acknowledged and is lost", *lost);
        }
        if let Some(ghost) = guarded.refused.intersection(&there).next() {
            return wrong("was refused and is there", *ghost);
        }
        if there.len() < elements.len() {
            return broken(NAME, format!("lock {lock}: an element is there twice"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_tokens_that_interleave() {
        let mut checker = Fenced::default();
        checker.accepted(0, 5, 1).unwrap();
        checker.accepted(0, 6, 2).unwrap();
        checker.accepted(1, 5, 1).unwrap();
        let violation = checker.accepted(0, 5, 1).unwrap_err();
        assert_eq!(violation.checker, "fenced");
    }

    #[test]
    fn finds_a_token_of_two_clients() {
        let mut checker = Fenced::default();
        checker.accepted(0, 5, 1).unwrap();
        checker.accepted(0, 5, 1).unwrap();
        assert!(checker.accepted(0, 5, 2).is_err());
    }

    #[test]
    fn finds_a_holder_that_is_fenced_out() {
        let mut checker = Fenced::default();
        checker.refused(0, 5, false).unwrap();
        assert!(checker.refused(0, 5, true).is_err());
    }

    #[test]
    fn finds_what_is_lost_doubled_or_should_not_be() {
        let mut checker = Fenced::default();
        checker.acknowledged(0, 50);
        checker.acknowledged(0, 51);
        checker.refused_element(0, 52);
        checker.in_the_end(0, &[50, 51]).unwrap();
        checker.in_the_end(1, &[]).unwrap();
        assert!(checker.in_the_end(0, &[50]).is_err());
        assert!(checker.in_the_end(0, &[50, 51, 52]).is_err());
        assert!(checker.in_the_end(0, &[50, 51, 51]).is_err());
    }
}
