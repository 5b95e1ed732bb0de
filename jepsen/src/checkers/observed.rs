//! What observers of an election are told.
//!
//! There is one history of who led and what it said, by revision. Whoever observes, on
//! whichever node and from whenever on, is told the part of it from there on, with
//! nothing left out; terms grow along it; and what a leader was told it has proclaimed
//! is in it.

use std::collections::BTreeMap;

use super::{Verdict, broken};

const NAME: &str = "observed";

/// Who leads, by term, and what it says; nobody.
pub(crate) type Said = Option<(u64, u64)>;

/// What one observer was told: everything behind the first, up to the second revision.
#[derive(Clone, Copy, Debug)]
struct Told {
    after: u64,
    upto: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    /// By election and revision.
    history: BTreeMap<(usize, u64), Said>,
    /// By node and election.
    told: BTreeMap<(usize, usize), Told>,
    /// By election and revision: what those found who began where nobody had been told
    /// of everything yet.
    found: BTreeMap<(usize, u64), Said>,
    /// By election and revision: of what is behind this one someone was told everything,
    /// up to another. Between these stretches, nobody was.
    stretches: BTreeMap<(usize, u64), u64>,
    /// Acknowledged, with the revision: by election, term, and what was said.
    proclaimed: Vec<(usize, u64, Said)>,
}

impl Observed {
    /// An observer at this node begins anew, and finds this.
    pub(crate) fn begins(
        &mut self,
        node: usize,
        election: usize,
        revision: u64,
        said: Said,
    ) -> Verdict {
        let told = Told {
            after: revision,
            upto: revision,
        };
        self.told.insert((node, election), told);
        let before = (election, 0)..=(election, revision);
        let stretch = self.stretches.range(before).next_back();
        if stretch.is_none_or(|(_, upto)| *upto < revision) {
            self.stretches.insert((election, revision), revision);
            self.found.insert((election, revision), said);
            return Ok(());
        }
        self.is_so(election, revision, revision + 1, said)
    }

    /// Whether this is what is known of a revision from what was told up to there, and
    /// found below another one.
    fn is_so(&self, election: usize, revision: u64, found_below: u64, said: Said) -> Verdict {
        let told = self
            .history
            .range((election, 0)..=(election, revision))
            .next_back();
        let found = self
            .found
            .range((election, 0)..(election, found_below))
            .next_back();
        let newest = told.into_iter().chain(found);
        match newest.max_by_key(|(at, _)| **at) {
            Some((_, known)) if *known != said => broken(
                NAME,
                format!("election {election}: {said:?} at {revision}, where it was {known:?}"),
            ),
            _ => Ok(()),
        }
    }

    /// An observer is told that this is so from `revision` on.
    pub(crate) fn told(
        &mut self,
        node: usize,
        election: usize,
        revision: u64,
        said: Said,
    ) -> Verdict {
        if let Some(known) = self.history.get(&(election, revision)) {
            if *known != said {
                let what = format!("election {election}: {said:?} and {known:?} at {revision}");
                return broken(NAME, what);
            }
            return Ok(());
        }
        for ((other, of), told) in &self.told {
            let is_passed = (told.after + 1..=told.upto).contains(&revision);
            if *of == election && *other != node && is_passed {
                let what = format!(
                    "election {election}: an observer at node {other} was not told of {said:?} \
                     at {revision}"
                );
                return broken(NAME, what);
            }
        }
        self.history.insert((election, revision), said);
        self.terms_grow(election, revision, said)
    }

    fn terms_grow(&self, election: usize, revision: u64, said: Said) -> Verdict {
        let Some((term, _)) = said else { return Ok(()) };
        let term_of = |said: &Said| said.map(|(term, _)| term);
        let before = self.history.range((election, 0)..(election, revision));
        let before = before.rev().find_map(|(_, said)| term_of(said));
        let after = self
            .history
            .range((election, revision + 1)..(election + 1, 0));
        let after = after.filter_map(|(_, said)| term_of(said)).next();
        if before.is_some_and(|before| before > term) || after.is_some_and(|after| after < term) {
            let what = format!(
                "election {election}: term {term} at {revision}, between {before:?} and {after:?}"
            );
            return broken(NAME, what);
        }
        Ok(())
    }

    /// An observer has been told everything up to here.
    pub(crate) fn passed(&mut self, node: usize, election: usize, revision: u64) {
        let Some(told) = self.told.get_mut(&(node, election)) else {
            return;
        };
        let behind = std::mem::replace(&mut told.upto, revision);
        let (mut from, mut upto) = (behind, revision);
        self.stretches.retain(|(of, start), end| {
            let is_met = *of == election && *start <= revision && *end >= behind;
            if is_met {
                from = from.min(*start);
                upto = upto.max(*end);
            }
            !is_met
        });
        self.stretches.insert((election, from), upto);
    }

    /// An observer was told of these revisions, of all behind one and up to another.
    /// What others have found there agrees with that.
    pub(crate) fn left_out(
        &self,
        node: usize,
        election: usize,
        behind: u64,
        upto: u64,
        told: &[u64],
    ) -> Verdict {
        if upto <= behind {
            return Ok(());
        }
        let known = self
            .history
            .range((election, behind + 1)..=(election, upto));
        let mut missing = known.map(|((_, revision), _)| *revision);
        if let Some(revision) = missing.find(|revision| !told.contains(revision)) {
            let what = format!("election {election}: an observer at node {node} misses {revision}");
            return broken(NAME, what);
        }
        let mut found = self.found.range((election, behind + 1)..=(election, upto));
        found.try_for_each(|((_, at), said)| self.is_so(election, *at, *at, *said))
    }

    /// A leader hears that it has proclaimed this.
    pub(crate) fn proclaimed(&mut self, election: usize, revision: u64, said: (u64, u64)) {
        self.proclaimed.push((election, revision, Some(said)));
    }

    /// Everything is told: nothing that was proclaimed is left out.
    pub(crate) fn in_the_end(&self) -> Verdict {
        for (election, revision, said) in &self.proclaimed {
            let is_observed = self.told.iter().any(|((_, of), told)| {
                of == election && (told.after + 1..=told.upto).contains(revision)
            });
            let known = self.history.get(&(*election, *revision));
            if is_observed && known != Some(said) {
                let what = format!("election {election}: {said:?} at {revision} is {known:?}");
                return broken(NAME, what);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed() -> Observed {
        let mut observed = Observed::default();
        for node in 0..2 {
            observed.begins(node, 1, 5, None).unwrap();
        }
        for (revision, said) in [(6, Some((6, 0))), (8, Some((6, 1))), (9, None)] {
            observed.told(0, 1, revision, said).unwrap();
        }
        observed.passed(0, 1, 9);
        observed
    }

    #[test]
    fn one_history_is_told_to_all() {
        let mut observed = observed();
        observed.told(1, 1, 6, Some((6, 0))).unwrap();
        observed.proclaimed(1, 8, (6, 1));
        observed.in_the_end().unwrap();
        observed.begins(1, 1, 8, Some((6, 1))).unwrap();
        observed.left_out(0, 1, 5, 9, &[6, 8, 9]).unwrap();
        // Of another election.
        observed.told(0, 2, 7, Some((2, 0))).unwrap();
    }

    #[test]
    fn another_word_or_one_that_was_left_out_is_refused() {
        let mut observed = observed();
        assert!(observed.told(1, 1, 8, Some((6, 2))).is_err());
        assert!(observed.told(1, 1, 7, Some((6, 1))).is_err());
        assert!(observed.begins(1, 1, 8, None).is_err());
        assert!(observed.left_out(1, 1, 5, 9, &[6, 9]).is_err());
        observed.proclaimed(1, 7, (6, 3));
        assert!(observed.in_the_end().is_err());
    }

    #[test]
    fn who_begins_ahead_of_everybody_finds_what_nobody_was_told_of() {
        let mut observed = observed();
        observed.begins(1, 1, 12, Some((11, 0))).unwrap();
        assert!(observed.begins(0, 1, 12, None).is_err());
        observed.told(0, 1, 11, Some((11, 0))).unwrap();
        observed.passed(0, 1, 12);
        assert!(observed.begins(1, 1, 13, None).is_ok(), "ahead again");
        assert!(observed.begins(0, 1, 12, None).is_err());
    }

    #[test]
    fn who_begins_between_what_others_know_finds_what_nobody_was_told_of() {
        let mut observed = observed();
        observed.begins(1, 1, 15, Some((14, 0))).unwrap();
        // It lost what it knew, and comes by an election that nobody has seen.
        observed.begins(0, 1, 12, Some((11, 0))).unwrap();
        assert!(observed.begins(2, 1, 12, None).is_err());
        observed.told(0, 1, 14, Some((14, 0))).unwrap();
        observed.left_out(0, 1, 12, 15, &[14]).unwrap();
        observed.passed(0, 1, 15);
        assert!(observed.begins(2, 1, 13, None).is_err(), "known since");
        assert!(observed.begins(2, 1, 13, Some((11, 0))).is_ok());
        assert!(observed.begins(2, 1, 10, Some((10, 0))).is_ok(), "between");
        assert!(observed.begins(2, 1, 9, Some((9, 0))).is_err());
    }

    #[test]
    fn what_was_found_is_what_others_are_told() {
        let mut observed = observed();
        observed.begins(1, 1, 12, Some((11, 0))).unwrap();
        assert!(observed.left_out(0, 1, 9, 12, &[]).is_err(), "nobody leads");
        observed.told(0, 1, 11, Some((11, 0))).unwrap();
        observed.left_out(0, 1, 9, 12, &[11]).unwrap();
        observed.told(0, 1, 12, None).unwrap();
        assert!(observed.left_out(0, 1, 9, 12, &[11, 12]).is_err());
    }

    #[test]
    fn a_term_that_comes_back_is_refused() {
        let mut observed = observed();
        assert!(observed.told(0, 1, 10, Some((5, 0))).is_err());
        observed.told(0, 1, 11, Some((11, 0))).unwrap();
    }
}
