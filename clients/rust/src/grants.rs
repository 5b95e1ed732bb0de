//! Which grants of a session are held, and which were lost and why. Answers and
//! events travel apart, so an event may come before the answer it is about, and
//! what happened while the stream of events was down must be inferred from the
//! grants it lists when it is back.

use std::collections::{BTreeMap, BTreeSet};

use crate::session_state::LossReason;

/// The grants of one session, by token.
#[derive(Debug, Default)]
pub(crate) struct Grants {
    held: BTreeMap<u64, Held>,
    /// Losses of grants whose answers have not come yet.
    early: BTreeMap<u64, LossReason>,
    attached: Attached,
}

#[derive(Debug)]
struct Held {
    /// It was granted at this revision or before. The token does not say when:
    /// it is as old as the place in the queue.
    revision: u64,
    loss: Option<LossReason>,
    /// How many guards share it.
    guards: usize,
}

/// What the cluster held for us at one revision.
#[derive(Debug, Default)]
struct Attached {
    revision: u64,
    tokens: BTreeSet<u64>,
}

impl Grants {
    /// A grant was answered, at this revision; it may have been lost already.
    pub(crate) fn granted(&mut self, token: u64, revision: u64) {
        let early = self.early.remove(&token);
        let is_missing = self.attached.lacks(token, revision);
        let loss = early.or_else(|| is_missing.then_some(LossReason::KeyDeleted));
        if let Some(held) = self.held.get_mut(&token) {
            held.guards += 1;
            return;
        }
        let held = Held {
            revision,
            loss,
            guards: 1,
        };
        self.held.insert(token, held);
    }

    /// A guard gives the grant up; what becomes of it after the last one is no loss.
    pub(crate) fn released(&mut self, token: u64) {
        if let Some(held) = self.held.get_mut(&token) {
            held.guards -= 1;
            if held.guards == 0 {
                self.held.remove(&token);
            }
        }
    }

    /// The cluster took the grant away. The first reason stays.
    pub(crate) fn lost(&mut self, token: u64, reason: LossReason) {
        match self.held.get_mut(&token) {
            Some(held) => {
                held.loss.get_or_insert(reason);
            }
            None => {
                self.early.entry(token).or_insert(reason);
            }
        }
    }

    /// At `revision`, the session held exactly these grants. An older list
    /// than the last one says nothing.
    pub(crate) fn attached(&mut self, revision: u64, tokens: BTreeSet<u64>) {
        if revision < self.attached.revision {
            return;
        }
        self.attached = Attached { revision, tokens };
        for (token, held) in &mut self.held {
            if self.attached.lacks(*token, held.revision) {
                held.loss.get_or_insert(LossReason::KeyDeleted);
            }
        }
    }

    /// No answer is outstanding, so early losses concern nobody.
    pub(crate) fn no_answer_outstanding(&mut self) {
        self.early.clear();
    }

    /// Why this grant is lost, if it is.
    pub(crate) fn loss(&self, token: u64) -> Option<&LossReason> {
        self.held.get(&token)?.loss.as_ref()
    }
}

impl Attached {
    /// Whether this grant, made by `revision`, should be listed and is not.
    fn lacks(&self, token: u64, revision: u64) -> bool {
        revision <= self.revision && !self.tokens.contains(&token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forced() -> LossReason {
        LossReason::Forced {
            reason: "maintenance".to_owned(),
        }
    }

    #[test]
    fn a_loss_may_arrive_before_the_grant() {
        let mut grants = Grants::default();
        grants.lost(5, forced());
        grants.granted(5, 5);
        assert_eq!(grants.loss(5), Some(&forced()));
        grants.lost(6, forced());
        grants.no_answer_outstanding();
        grants.granted(6, 6);
        assert_eq!(grants.loss(6), None);
    }

    #[test]
    fn grants_missing_from_a_list_are_lost_unless_they_are_newer() {
        let mut grants = Grants::default();
        for token in [5, 6, 9] {
            grants.granted(token, token);
        }
        grants.attached(7, BTreeSet::from([6]));
        assert_eq!(grants.loss(5), Some(&LossReason::KeyDeleted));
        assert_eq!((grants.loss(6), grants.loss(9)), (None, None));
        grants.granted(4, 4);
        assert_eq!(
            grants.loss(4),
            Some(&LossReason::KeyDeleted),
            "its answer came late"
        );
        grants.attached(3, BTreeSet::new());
        assert_eq!(grants.loss(6), None, "an older list says nothing");
    }

    #[test]
    fn a_place_that_became_a_grant_after_the_list_is_no_loss() {
        let mut grants = Grants::default();
        grants.attached(7, BTreeSet::new());
        grants.granted(3, 8);
        assert_eq!(grants.loss(3), None);
    }

    #[test]
    fn a_shared_grant_is_watched_until_the_last_guard_is_gone() {
        let mut grants = Grants::default();
        grants.granted(5, 5);
        grants.granted(5, 6);
        grants.released(5);
        grants.lost(5, forced());
        assert_eq!(grants.loss(5), Some(&forced()));
        grants.released(5);
        assert_eq!(grants.loss(5), None);
    }

    #[test]
    fn what_was_given_up_is_not_lost() {
        let mut grants = Grants::default();
        grants.granted(5, 5);
        grants.released(5);
        grants.attached(9, BTreeSet::new());
        assert_eq!(grants.loss(5), None);
    }
}
