//! The quota: the leader raises an alarm when the state is larger than it may be.
//!
//! Which size is too large is a setting of each member, and settings differ. So
//! it is not part of applying: the leader alone compares, and what it finds is an
//! entry like any other. Between the two, what is on its way still comes in: at
//! most [`limits::UNCOMMITTED_BYTES_MAX`] of entries.
//!
//! [`limits::UNCOMMITTED_BYTES_MAX`]: crate::limits::UNCOMMITTED_BYTES_MAX

use conclave_proto::internal::{Command, NoSpace, command};

use super::Replica;
use crate::machine::Machine;

impl<M: Machine> Replica<M> {
    /// Proposes the alarm if it is due and not on its way. An operator clears it;
    /// while the state is too large it is raised again.
    pub(super) fn guard_quota(&mut self) {
        let Some(leadership) = &self.leadership else {
            return;
        };
        let is_under_way = leadership.alarm_entry > self.state.applied();
        let is_raised = self.state.system().is_out_of_space();
        if is_under_way || is_raised || self.state.bytes() <= self.config.quota_bytes {
            return;
        }
        let body = Some(command::Body::NoSpace(NoSpace {
            raised: true,
            member: self.config.node.0,
        }));
        if self.propose(vec![Command { origin: None, body }]) {
            let entry = self.consensus.last_index();
            if let Some(leadership) = &mut self.leadership {
                leadership.alarm_entry = entry;
            }
        }
    }
}
