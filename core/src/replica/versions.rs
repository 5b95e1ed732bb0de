//! The apply version of the cluster: raised by the leader once every member has
//! published a binary that supports more.

use conclave_proto::internal::{Command, RaiseApplyVersion, command};

use super::Replica;
use crate::machine::Machine;

impl<M: Machine> Replica<M> {
    /// Proposes the raise that is due, if it is not on its way.
    pub(super) fn raise_apply_version(&mut self) {
        let Some(leadership) = &self.leadership else {
            return;
        };
        let system = self.state.system();
        let supported = |voter| {
            system
                .members()
                .get(voter)
                .map(|member| member.apply_version)
        };
        // One that never served may be of any version.
        let version = self.facts.voters.iter().map(supported).min().flatten();
        let is_under_way = leadership.version_entry > self.state.applied();
        let Some(version) = version.filter(|version| *version > system.apply_version()) else {
            return;
        };
        if is_under_way {
            return;
        }
        let body = command::Body::RaiseApplyVersion(RaiseApplyVersion { version });
        let body = Some(body);
        if self.propose(vec![Command { origin: None, body }]) {
            let entry = self.consensus.last_index();
            if let Some(leadership) = &mut self.leadership {
                leadership.version_entry = entry;
            }
        }
    }
}
