//! A committed entry becomes part of the state, and what it led to is told: to this
//! node's clients, to watchers, and to the leader's notes of who lives.

use std::collections::BTreeSet;

use conclave_proto::internal::Origin;

use super::{Fatal, Replica};
use crate::{
    log::{EntryKind, LogEntry},
    machine::{Machine, Outcome},
    state::Applied,
};

impl<M: Machine> Replica<M> {
    /// Applies an entry; what it took, as [`Applied::work`] has it.
    pub(super) fn apply(&mut self, entry: &LogEntry) -> Result<usize, Fatal> {
        if entry.kind == EntryKind::Membership {
            let what = "a change of membership".to_owned();
            return Err(Fatal::Unknown {
                index: entry.index,
                what,
            });
        }
        #[cfg(conclave_plant)]
        crate::plant::note_node_term(self.consensus.term());
        let (node, boot) = (self.config.node.0, self.config.boot);
        let is_own = |origin: &Origin| origin.node == node && origin.boot == boot;
        let applied = self
            .state
            .apply_for(entry.index, entry.term, &entry.data, is_own)?;
        self.watchers
            .advance(self.state.keyspace(), &mut self.output.notices);
        self.note_own_digest()?;
        if self.leadership.is_none() && !entry.data.is_empty() {
            self.clock.follow(self.state.system().log_time());
        }
        let Applied {
            outcomes,
            resolved,
            events,
            lives,
            work,
        } = applied;
        // Places of requests that came with this entry: those who passed them on hear of it
        // at once anyway.
        let mut is_new = BTreeSet::new();
        for (origin, outcome) in outcomes {
            if !self.is_mine(&origin) {
                if let (Outcome::Waiting(place), Some(_)) = (outcome, &self.leadership) {
                    is_new.insert(place);
                }
                continue;
            }
            if self.pending.remove(&origin.number).is_none() {
                continue;
            }
            match outcome {
                Outcome::Done(answer) => self.output.answers.push((origin.number, Ok(answer))),
                Outcome::Waiting(place) => self.wait_at(place, origin.number),
            }
        }
        let mut is_awaited = false;
        for resolved in resolved {
            let elsewhere = !is_new.contains(&resolved.place) && M::may_be_awaited(&resolved.place);
            is_awaited |= !self.resolve(resolved, entry.term) && elsewhere;
        }
        if is_awaited && self.leadership.is_some() {
            self.consensus.tell_commit_to_all(entry.index);
        }
        self.output.events.extend(events);
        self.follow_lives(entry.term, &lives);
        Ok(work)
    }
}
