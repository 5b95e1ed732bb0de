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
        let mut asked_elsewhere = BTreeSet::new();
        for (origin, outcome) in outcomes {
            match outcome {
                Outcome::Waiting(place) if !self.is_mine(&origin) => {
                    if self.leadership.is_some() {
                        asked_elsewhere.insert(place);
                    }
                }
                _ if !self.is_mine(&origin) => {}
                _ if self.pending.remove(&origin.number).is_none() => {}
                Outcome::Done(answer) => self.output.answers.push((origin.number, Ok(answer))),
                Outcome::Waiting(place) => self.wait_at(place, origin.number),
            }
        }
        let mut is_awaited = false;
        for resolved in resolved {
            // Who asked with this entry hears of it at once anyway.
            let is_old = !asked_elsewhere.contains(&resolved.place);
            is_awaited |= !self.resolve(resolved, entry.term) && is_old;
        }
        if is_awaited && let Some(leadership) = &mut self.leadership {
            // A client of another member may wait for it.
            leadership.tell_commit_us = Some(self.now.boot_us);
        }
        self.output.events.extend(events);
        self.follow_lives(entry.term, &lives);
        Ok(work)
    }
}
