//! What all clients share: a server they talk to, and numbered calls.

use super::{
    ground::{About, Call, CallBody, Ground, Reply},
    tally::Fault,
};
use conclave_client::requests::Outcome;
use conclave_core::{
    ids::Revision,
    replica::{Answer, AnswerBody, Failure},
    requests::NotRun,
};
use conclave_primitives::{Primitives, Rejection};
use conclave_proto::internal::command;

/// A client's way to the servers.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) actor: usize,
    /// The server in use.
    pub(crate) node: usize,
    calls: u64,
}

/// A call that has no answer yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pending {
    pub(crate) id: u64,
    pub(crate) node: usize,
    /// When it was sent, in true time.
    pub(crate) sent_us: u64,
    /// When the client gives it up.
    pub(crate) until_us: u64,
    /// The newest revision that was committed when it was sent, as far as any node knew.
    pub(crate) newest: Revision,
    /// That of the newest compaction then.
    pub(crate) compacted: Revision,
}

impl Link {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        let node = ground.rng.index(ground.settings.nodes);
        Self {
            actor,
            node,
            calls: 0,
        }
    }

    /// Sends a call to the server in use and says under which number.
    pub(crate) fn send(&mut self, body: CallBody, about: About, ground: &mut Ground) -> u64 {
        self.send_to(self.node, body, about, ground)
    }

    /// Sends a copy of a numbered call to any server, and does not wait for what it
    /// comes to.
    pub(crate) fn send_copy(&mut self, body: command::Body, about: About, ground: &mut Ground) {
        ground.tally.fault(Fault::CallRepeated);
        let node = ground.rng.index(ground.settings.nodes);
        self.send_to(node, CallBody::Command(body), about, ground);
    }

    fn send_to(&mut self, node: usize, body: CallBody, about: About, ground: &mut Ground) -> u64 {
        self.calls += 1;
        let call = Call {
            actor: self.actor,
            id: self.calls,
            sent: ground.moment(),
            body,
            about,
        };
        ground.tell(format_args!(
            "client {}.{} calls node {}: {:?}",
            self.actor, self.calls, node, call.body
        ));
        ground.send_call(node, call);
        self.calls
    }

    /// The same, with the time for which to wait.
    pub(crate) fn call(
        &mut self,
        body: CallBody,
        about: About,
        patience_us: u64,
        ground: &mut Ground,
    ) -> Pending {
        let id = self.send(body, about, ground);
        let sent_us = ground.now_us;
        let model = &ground.checks.serializable.model;
        Pending {
            id,
            node: self.node,
            sent_us,
            until_us: sent_us + patience_us,
            newest: model.revision(),
            compacted: model.compacted(),
        }
    }

    /// Hangs up on a call.
    pub(crate) fn abandon(&self, pending: Pending, ground: &mut Ground) {
        ground.send_abandon(pending.node, self.actor, pending.id);
    }

    /// From now on its client must be served in time.
    pub(crate) fn begins(&self, ground: &mut Ground) {
        ground.checks.liveness.begins(self.actor, ground.now_us);
    }

    /// Its client was served.
    pub(crate) fn served(&self, ground: &mut Ground) {
        ground.checks.liveness.completes(self.actor, ground.now_us);
    }

    /// Its client gives up, or is gone; what it begins next counts as another.
    pub(crate) fn gone(&self, ground: &mut Ground) {
        ground.checks.liveness.gone(self.actor);
    }

    /// Goes to another server: mostly where the leader is said to be.
    pub(crate) fn move_on(&mut self, hint: Option<usize>, ground: &mut Ground) {
        let nodes = ground.settings.nodes;
        self.node = match hint {
            Some(leader) if ground.rng.chance(700_000) => leader,
            _ => (self.node + 1 + ground.rng.index(nodes - 1)) % nodes,
        };
    }
}

/// What became of a call: an answer, a refusal that stands, or whether it may
/// have had its effect.
pub(crate) type CallOutcome = Outcome<Answer<Primitives>, Refusal>;

/// A refusal that stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Refusal {
    /// By the primitives.
    Rejected(Rejection),
    /// For what is known of the session's requests.
    NotRun(NotRun),
}

/// What a reply means, and where the leader is, as far as the reply says.
pub(crate) fn outcome(reply: Reply) -> (CallOutcome, Option<usize>) {
    let answer = match reply {
        Reply::Answer(answer) => *answer,
        Reply::Failure(Failure::NotLeader { leader }) => {
            return (Outcome::NotApplied, leader.map(super::node::index));
        }
        Reply::Failure(failure) if failure.may_have_applied() => return (Outcome::Unknown, None),
        Reply::Failure(_) | Reply::Refused => return (Outcome::NotApplied, None),
        Reply::Broken | Reply::Event { .. } => return (Outcome::Unknown, None),
    };
    let outcome = match answer.body {
        // Others must be over first, or room be made; the client tries again, as it does
        // when servers are overloaded.
        AnswerBody::NoSpace => Outcome::NotApplied,
        AnswerBody::NotRun(NotRun::TooMany)
        | AnswerBody::Machine(Err(Rejection::TooManyRequests)) => Outcome::NotApplied,
        AnswerBody::NotRun(why) => Outcome::Refused(Refusal::NotRun(why)),
        AnswerBody::Machine(Err(rejection)) => Outcome::Refused(Refusal::Rejected(rejection)),
        AnswerBody::SessionEnded(reason) => {
            Outcome::Refused(Refusal::Rejected(Rejection::SessionEnded(reason)))
        }
        _ => Outcome::Answered(answer),
    };
    (outcome, None)
}
