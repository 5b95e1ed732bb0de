//! What a node tells the checker of leases.

use conclave_core::{ids::Index, replica::AnswerBody};
use conclave_primitives::Primitives;

use super::{Caller, Running, id};
use crate::sim::{
    ground::{About, Ground},
    tally::Operation,
};

impl Running {
    /// It has applied its log up to an index.
    pub(super) fn committed(&self, node: usize, upto: Index, ground: &mut Ground) {
        let (at, led) = (ground.moment(), ground.led_us);
        let before = ground.checks.leases_expired();
        ground.checks.committed(node, upto, at, &led);
        if ground.checks.leases_expired() > before {
            ground.did(Operation::LeaseExpired);
        }
    }

    /// It answers a call, which may be about a lease.
    pub(super) fn lease_answered(
        &self,
        node: usize,
        number: u64,
        caller: &Caller,
        body: &AnswerBody<Primitives>,
        ground: &mut Ground,
    ) {
        match caller.about {
            About::Lease(call) => {
                let times = (caller.sent, ground.moment());
                let leader = ground.leader;
                ground.checks.lease_answered(call, times, leader, body);
            }
            About::Grant => {
                let times = (caller.sent, ground.moment());
                let origin = (id(node).0, self.process, number);
                ground.checks.grant_answered(origin, times, body);
            }
            _ => {}
        }
    }
}
