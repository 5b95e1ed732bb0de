//! What all clients share: a server they talk to, and numbered calls.

use super::{
    alarm::{Alarm, Owner},
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

    /// Goes to another server: mostly where the leader is said to be.
    pub(crate) fn move_on(&mut self, hint: Option<usize>, ground: &mut Ground) {
        let nodes = ground.settings.nodes;
        self.node = match hint {
            Some(leader) if ground.rng.chance(700_000) => leader,
            _ => (self.node + 1 + ground.rng.index(nodes - 1)) % nodes,
        };
    }
}

/// A client with one call at a time and rests between them.
#[derive(Debug)]
pub(crate) struct Pace {
    pub(crate) link: Link,
    alarm: Alarm,
    pending: Option<Pending>,
    /// When it begins the next call.
    next_us: u64,
    /// From when on it begins nothing new.
    until_us: u64,
}

/// What is due for such a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// It gives its call up.
    GiveUp(Pending),
    /// It begins another.
    Begin,
}

impl Pace {
    /// A client that begins at `next_us`, and begins nothing new from `until_us` on.
    pub(crate) fn new(actor: usize, next_us: u64, until_us: u64, ground: &mut Ground) -> Self {
        let mut pace = Self {
            link: Link::new(actor, ground),
            alarm: Alarm::new(Owner::Actor(actor)),
            pending: None,
            next_us,
            until_us,
        };
        pace.rearm(ground);
        pace
    }

    /// Its alarm may ring: what it must do then.
    pub(crate) fn wake(&mut self, ground: &mut Ground) -> Option<Due> {
        if !self.alarm.rings(ground) {
            return None;
        }
        let due = match self.pending {
            Some(pending) if pending.until_us <= ground.now_us => {
                self.link.abandon(pending, ground);
                self.pending = None;
                Some(Due::GiveUp(pending))
            }
            None if self.next_us <= ground.now_us && ground.now_us < self.until_us => {
                Some(Due::Begin)
            }
            _ => None,
        };
        if due.is_none() {
            self.rearm(ground);
        }
        due
    }

    /// The call that a reply ends.
    pub(crate) fn ended(&mut self, id: u64) -> Option<Pending> {
        self.pending.take_if(|pending| pending.id == id)
    }

    /// Sends a call, which must be served in time.
    pub(crate) fn begin(&mut self, body: CallBody, patience_us: u64, ground: &mut Ground) {
        self.begin_as(body, About::Other, patience_us, ground);
    }

    /// The same of one that means something to checkers.
    pub(crate) fn begin_as(
        &mut self,
        body: CallBody,
        about: About,
        patience_us: u64,
        ground: &mut Ground,
    ) {
        let (actor, now_us) = (self.link.actor, ground.now_us);
        ground.checks.liveness.begins(actor, now_us);
        self.pending = Some(self.link.call(body, about, patience_us, ground));
        self.rearm(ground);
    }

    /// Begins the next call after a rest.
    pub(crate) fn rest(&mut self, rest_us: u64, ground: &mut Ground) {
        self.next_us = ground.now_us + rest_us;
        self.rearm(ground);
    }

    fn rearm(&mut self, ground: &mut Ground) {
        let at_us = match self.pending {
            Some(pending) => pending.until_us,
            None if ground.now_us >= self.until_us => return,
            None => self.next_us,
        };
        self.alarm.set(at_us, ground);
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
