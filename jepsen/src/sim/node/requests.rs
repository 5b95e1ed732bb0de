//! What arrives at a node, and waits for its next turn.

use conclave_core::replica::Input;
use conclave_primitives::Primitives;
use conclave_proto::internal::PeerMessage;

use super::{Caller, Node, id};
use crate::sim::ground::{Call, CallBody, Ground, Reply};

impl Node {
    pub(crate) fn peer(&mut self, from: usize, message: PeerMessage, ground: &mut Ground) {
        self.take_in(
            Input::Peer {
                from: id(from),
                message,
            },
            ground,
        );
    }

    pub(crate) fn peer_lost(&mut self, peer: usize, ground: &mut Ground) {
        self.take_in(Input::PeerLost { peer: id(peer) }, ground);
    }

    pub(super) fn take_in(&mut self, input: Input<Primitives>, ground: &mut Ground) {
        if let Some(running) = &mut self.running {
            running.inbox.push(input);
            let soon = ground.now_us + ground.rng.between(5, 50);
            self.alarm.set(soon, ground);
        }
    }

    pub(crate) fn call(&mut self, call: Call, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return ground.send_reply(self.index, call.actor, call.id, Reply::Refused);
        };
        running.calls += 1;
        let number = running.calls;
        ground.checks.arrived(self.index, number, &call);
        let caller = Caller {
            actor: call.actor,
            id: call.id,
            sent: call.sent,
            about: call.about,
            is_command: matches!(call.body, CallBody::Command(_)),
        };
        running.callers.insert(number, caller);
        let input = match call.body {
            CallBody::Command(body) => Input::Command { number, body },
            CallBody::Renew(of) => Input::Renew { number, of },
            CallBody::Read(query) => Input::Read { number, query },
            CallBody::LocalRead(query) => Input::LocalRead { number, query },
            CallBody::TimeLeft(session) => Input::TimeLeft { number, session },
        };
        self.take_in(input, ground);
    }

    /// A client hung up. If the loop has not taken its call yet, the server may
    /// notice in time and drop it.
    pub(crate) fn abandoned(&mut self, actor: usize, id: u64, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        if !self.paused || ground.rng.chance(300_000) {
            return;
        }
        let found = running
            .callers
            .iter()
            .find(|(_, caller)| caller.actor == actor && caller.id == id)
            .map(|(number, caller)| (*number, caller.about));
        let Some((number, about)) = found else { return };
        let before = running.inbox.len();
        running.inbox.retain(|input| match input {
            Input::Command { number: other, .. }
            | Input::Read { number: other, .. }
            | Input::LocalRead { number: other, .. }
            | Input::Renew { number: other, .. }
            | Input::TimeLeft { number: other, .. }
            | Input::Hash { number: other, .. } => *other != number,
            Input::Peer { .. }
            | Input::PeerLost { .. }
            | Input::Watch(_)
            | Input::Fetched(_)
            | Input::Resign
            | Input::HandOver(_) => true,
        });
        if running.inbox.len() < before {
            running.callers.remove(&number);
            ground.checks.dropped(self.index, number, about);
        }
    }

    /// The calls of a client that wait for an answer here.
    pub(crate) fn calls_of(&self, actor: usize) -> Vec<u64> {
        let callers = self
            .running
            .iter()
            .flat_map(|running| running.callers.values());
        callers
            .filter(|caller| caller.actor == actor)
            .map(|caller| caller.id)
            .collect()
    }
}
