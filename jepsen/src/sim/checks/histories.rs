//! What was committed and answered, told to the models of keys and leases.

use conclave_core::{
    ids::Index,
    log::{Batch, LogEntry},
    replica::{Answer, AnswerBody, Failure},
};
use conclave_primitives::Primitives;

use super::Checks;
use crate::{
    checkers::{
        early_expiry::{Moment, NODES_MAX},
        leases::{self, Told},
        model::Outcome,
        serializable::Origin,
    },
    sim::replay::Histories,
};

/// The place among nodes of the state that applies everything once more.
const REPLAY: usize = NODES_MAX;

impl Checks {
    /// A node starts with these entries in its log.
    pub(crate) fn starts(&mut self, node: usize, entries: &[LogEntry]) {
        self.replay.starts(node, entries);
    }

    /// A node adds this to its log.
    pub(crate) fn logs(&mut self, node: usize, batch: &Batch) {
        if batch.base.is_some() {
            self.replay.starts(node, &[]);
        }
        self.replay.logs(node, &batch.entries);
    }

    /// A node has applied its log up to an index, and answers nothing before this.
    pub(crate) fn committed(&mut self, node: usize, upto: Index, at: Moment, led: &leases::Led) {
        let equal_state = &mut self.equal_state;
        let mut histories = Histories {
            keys: &mut self.serializable,
            leases: &mut self.leases,
            at,
            led,
        };
        let verdict = self
            .replay
            .applied(node, upto, &mut histories, |index, digest| {
                equal_state.applied(REPLAY, index, digest)
            });
        self.note(verdict);
    }

    /// How many leases have expired that had keys.
    pub(crate) fn leases_expired(&self) -> u64 {
        self.replay.leases_expired()
    }

    /// A node says something of a lease.
    pub(crate) fn lease_answered(
        &mut self,
        call: leases::Call,
        times: (Moment, Moment),
        leader: leases::Leader,
        body: &AnswerBody<Primitives>,
    ) {
        let told = match *body {
            AnswerBody::Renewed { ttl_ms } => Told::Renewed { ttl_ms },
            AnswerBody::TimeLeft { ttl_ms, left_ms } => Told::Left { ttl_ms, left_ms },
            AnswerBody::Done => Told::Revoked,
            AnswerBody::SessionEnded(_) => Told::Over,
            _ => return,
        };
        let verdict = self.leases.answered(call, told, times, leader);
        self.note(verdict);
    }

    /// A node answers a grant.
    pub(crate) fn grant_answered(
        &mut self,
        origin: Origin,
        (sent, at): (Moment, Moment),
        body: &AnswerBody<Primitives>,
    ) {
        let told = match *body {
            AnswerBody::SessionOpened { session, ttl_ms } => Some((session.0, ttl_ms)),
            _ => None,
        };
        let verdict = self.leases.grant_answered(origin, told, sent, at);
        self.note(verdict);
    }

    /// A node answers a command.
    pub(crate) fn command_answered(
        &mut self,
        origin: Origin,
        result: &Result<Answer<Primitives>, Failure>,
    ) {
        let verdict = match result {
            Ok(answer) => {
                let told = match &answer.body {
                    AnswerBody::Txn(reply) => Some(Outcome::Txn(reply.clone())),
                    AnswerBody::Operation(reply) => Some(Outcome::Operation(reply.clone())),
                    AnswerBody::Compacted(result) => Some(Outcome::Compacted(*result)),
                    AnswerBody::NoSpace => Some(Outcome::NoSpace),
                    _ => None,
                };
                let revision = answer.revision;
                self.serializable.answered(origin, revision, told)
            }
            Err(failure) if !failure.may_have_applied() => self.serializable.refused(origin),
            Err(_) => Ok(()),
        };
        self.note(verdict);
    }
}
