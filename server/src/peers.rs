//! The links between members.
//!
//! Each member dials every other one and sends on its own stream; what arrives
//! on a stream that others opened goes to the replica. A stream begins with a
//! greeting on both sides, and a mismatch ends it with a reason.
//!
//! All of this runs on the node's thread, between its turns: a message costs no
//! change of threads. The node only puts messages into a queue, so that its sync
//! never waits for a network.

mod accept;
mod dial;
mod fetch;
mod outbox;

use std::{collections::BTreeMap, net::TcpListener as StdListener, sync::Arc};

use conclave_core::{
    checkpoint::{FjallCheckpoints, Sink},
    ids::NodeId,
    node::Handle,
    replica::Fetch,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{PeerGreeting, PeerMessage};

use crate::{
    metrics::LinkCounters,
    net,
    options::{Member, Topology},
};
use outbox::Outbox;

/// The version of what members say to each other.
const PROTOCOL: u32 = 1;
/// The largest frame taken from a peer: the messages of one frame, or the
/// largest single one.
const FRAME_BYTES_MAX: usize = 16 << 20;

/// The links of this member.
#[derive(Debug)]
pub(crate) struct Peers {
    greeting: PeerGreeting,
    links: BTreeMap<NodeId, Link>,
}

/// The link to one other member.
#[derive(Clone, Debug)]
struct Link {
    member: Member,
    outbox: Arc<Outbox>,
}

impl Peers {
    /// Links that nothing runs yet.
    pub(crate) fn new(topology: &Topology, incarnation: u64, boot: u64) -> Self {
        let greeting = PeerGreeting {
            cluster_id: topology.cluster,
            node: topology.own().id.0,
            incarnation,
            boot,
            protocol: PROTOCOL,
        };
        let link = |member: &Member| {
            (
                member.id,
                Link {
                    member: member.clone(),
                    outbox: Arc::default(),
                },
            )
        };
        Self {
            greeting,
            links: topology.others().map(link).collect(),
        }
    }

    /// Queues messages for their receivers. Never waits: what a link cannot take
    /// is dropped, as a network would.
    pub(crate) fn send(&self, messages: Vec<(NodeId, PeerMessage)>) {
        for (to, message) in messages {
            if let Some(link) = self.links.get(&to) {
                link.outbox.push(message);
            }
        }
        self.links.values().for_each(|link| link.outbox.wake());
    }

    /// Gets a checkpoint from another member, see
    /// [`Outlets::fetch`](conclave_core::node::Outlets::fetch). Never waits.
    pub(crate) fn fetch(&self, fetch: Fetch, sink: Sink) {
        if let Some(link) = self.links.get(&fetch.from) {
            fetch::start(link, self.greeting, fetch, sink);
        }
    }

    /// Name of each other member, whether the link to it stands, its counters.
    pub(crate) fn counters(&self) -> Vec<(&str, bool, &LinkCounters)> {
        self.links
            .values()
            .map(|link| {
                (
                    link.member.name.as_str(),
                    link.outbox.is_open(),
                    link.outbox.counters(),
                )
            })
            .collect()
    }

    /// Dials the other members and serves them, for ever. The tasks end with the
    /// runtime.
    pub(crate) async fn run(
        self: Arc<Self>,
        handle: Handle<Primitives>,
        checkpoints: FjallCheckpoints,
        listeners: Vec<StdListener>,
    ) {
        for &peer in self.links.keys() {
            tokio::spawn(dial::keep_link(Arc::clone(&self), peer, handle.clone()));
        }
        let (sender, connections) = net::connections();
        for listener in listeners {
            tokio::spawn(net::accept(listener, vec![sender.clone()], || ()));
        }
        let sender = fetch::Sender::new(checkpoints, handle.clone());
        accept::serve(self, handle, sender, connections).await;
    }
}
