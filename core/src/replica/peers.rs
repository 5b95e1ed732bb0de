//! What other members say, and are told. What they say may be lost, doubled, late and
//! out of order; each kind of message goes to the module that knows what it means.

use std::mem;

use bytes::Bytes;
use conclave_proto::internal::{
    ForwardRefused, Held, PeerMessage, RenewalReplies, Renewals, peer_message,
};

use super::{
    Fatal, Replica,
    reads::{Renewer, Wish},
};
use crate::{
    ids::{Attachment, NodeId, SessionId},
    machine::Machine,
};

impl<M: Machine> Replica<M> {
    pub(super) fn receive(&mut self, from: NodeId, message: PeerMessage) -> Result<(), Fatal> {
        use peer_message::Message;
        // An unknown kind of message comes from a newer version; the handshake
        // decides who may talk to whom, so it can only be one that may be lost.
        let Some(message) = message.message else {
            return Ok(());
        };
        match message {
            Message::Hello(hello) => self.receive_hello(from, &hello),
            Message::HelloReply(reply) => return self.receive_hello_reply(from, &reply),
            _ if self.admission.is_some() => {}
            Message::Raft(bytes) => match self.consensus.step(from, &bytes, self.now.boot_us) {
                Ok(None) => {}
                Ok(Some(offered)) => self.install.want(offered),
                Err(why) => {
                    tracing::warn!(peer = %from, why, "dropped a malformed message");
                }
            },
            Message::Forward(forward) => {
                self.consensus.serves(from, self.now.boot_us);
                self.arrived.forwarded.push((from, forward));
            }
            Message::ForwardRefused(refused) => self.receive_refusal(&refused),
            Message::Renewals(renewals) => {
                self.consensus.serves(from, self.now.boot_us);
                let Renewals { boot, renewals } = renewals;
                self.arrived
                    .renewals
                    .extend(renewals.into_iter().map(|renewal| {
                        let from = Renewer::There {
                            node: from,
                            boot,
                            number: renewal.number,
                        };
                        let of = Attachment {
                            session: SessionId(renewal.session_id),
                            number: renewal.attachment,
                        };
                        Wish {
                            of,
                            from,
                            only_asks: renewal.only_asks,
                        }
                    }));
            }
            Message::RenewalReplies(replies) => self.receive_renewal_replies(replies),
            Message::StateDigest(digest) => return self.receive_digest(from, digest),
            // What every member holds, this one does, too.
            Message::Held(Held { index }) if index > self.consensus.last_index() => {}
            Message::Held(Held { index }) => self.held = self.held.max(index),
        }
        Ok(())
    }

    /// The connection to a peer broke: what was on its way there, or the answer
    /// that was on its way back, may be lost.
    pub(super) fn lose_peer(&mut self, peer: NodeId) {
        self.consensus.unreachable(peer);
        self.fail_pending(|under| under.0 == peer);
    }

    /// Tells the others how much of the log nobody needs any more, if that has grown.
    pub(super) fn tell_held(&mut self) {
        let index = self.consensus.held_by_all();
        if index <= self.held {
            return;
        }
        self.held = index;
        let others = self.facts.voters.iter().copied();
        for peer in others.filter(|peer| *peer != self.config.node) {
            let held = peer_message::Message::Held(Held { index });
            self.outbox.push(to(peer, held));
        }
    }

    pub(super) fn take_outbox(&mut self) -> Vec<(NodeId, PeerMessage)> {
        let mut messages = mem::take(&mut self.outbox);
        for ((node, boot), numbers) in mem::take(&mut self.refusals) {
            let refused = ForwardRefused { boot, numbers };
            messages.push(to(node, peer_message::Message::ForwardRefused(refused)));
        }
        for ((node, boot), replies) in mem::take(&mut self.renewal_replies) {
            let replies = RenewalReplies { boot, replies };
            messages.push(to(node, peer_message::Message::RenewalReplies(replies)));
        }
        messages
    }
}

pub(super) fn to(node: NodeId, message: peer_message::Message) -> (NodeId, PeerMessage) {
    (
        node,
        PeerMessage {
            message: Some(message),
        },
    )
}

pub(super) fn raft_message((node, bytes): (NodeId, Bytes)) -> (NodeId, PeerMessage) {
    to(node, peer_message::Message::Raft(bytes))
}
