//! A simulated world: nodes, clients, and everything that happens to them in the
//! order in which it happens.

use super::{
    alarm::Owner,
    client::LockClient,
    faults,
    ground::{Event, Ground, Reply},
    kv::KvClient,
    lease::LeaseClient,
    node::{self, Node, id},
    operator::Operator,
    pace::Paced as _,
    register::RegisterClient,
    settings::Settings,
    tally::Tally,
    watch::WatchClient,
};
use crate::{
    checkers::{Violation, liveness::RECOVERY_US},
    rng::Rng,
};

/// What was applied anywhere by the end is given this time to reach everyone. A leader
/// may propose more meanwhile, a compaction say.
const SETTLES_US: u64 = 1_000_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct World {
    ground: Ground,
    nodes: Vec<Node>,
    actors: Vec<Actor>,
    /// The newest entry that a node had applied at the end.
    end: Option<u64>,
}

/// Someone who calls.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a world has a handful, and most are the large one"
)]
enum Actor {
    Locks(LockClient),
    Registers(RegisterClient),
    Keys(KvClient),
    Watches(WatchClient),
    Leases(LeaseClient),
    Operator(Operator),
}

/// What came of a seed.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) violation: Option<Violation>,
    /// In true time.
    pub(crate) violation_us: u64,
    pub(crate) tally: Tally,
    pub(crate) trace: String,
}

impl World {
    pub(crate) fn new(seed: u64, sim_seconds: u64, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let settings = Settings::draw(&mut rng, sim_seconds);
        let mut ground = Ground::new(rng, settings, trace);
        let settings = ground.settings.clone();
        ground.tell(format_args!("seed {seed}: {settings:?}"));
        let nodes = (0..settings.nodes)
            .map(|node| Node::new(node, &mut ground))
            .collect();
        let actors = Actor::all(&settings, &mut ground);
        let (heal_us, drain_us) = (ground.settings.heal_us, ground.settings.drain_us);
        ground.schedule(ground.settings.fault_gap_us, Event::Trouble);
        ground.schedule(heal_us, Event::Heal);
        ground.schedule(drain_us, Event::Drain);
        Self {
            ground,
            nodes,
            actors,
            end: None,
        }
    }

    /// Runs to the end, or to the first violation.
    pub(crate) fn run(mut self) -> Outcome {
        while let Some(event) = self.ground.advance() {
            let beyond_us = self.ground.now_us.checked_sub(self.ground.settings.end_us);
            if beyond_us.is_some() && self.end.is_none() {
                self.end = self.applied().max().flatten();
            }
            if beyond_us.is_some_and(|us| us > SETTLES_US || self.has_settled()) {
                self.finish();
                break;
            }
            self.happens(event);
            if self.ground.checks.violation().is_some() {
                break;
            }
        }
        let violation = self.ground.checks.violation().cloned();
        if let Some(violation) = &violation {
            self.ground
                .tell(format_args!("{}: {}", violation.checker, violation.what));
        }
        Outcome {
            violation,
            violation_us: self.ground.now_us,
            tally: self.ground.tally.clone(),
            trace: self.ground.trace.take(),
        }
    }

    fn happens(&mut self, event: Event) {
        let Self {
            ground,
            nodes,
            actors,
            end: _,
        } = self;
        match event {
            Event::Peer { from, to, message } => {
                ground.tell(format_args!("{from} -> {to}: {message:?}"));
                nodes[to].peer(from, message, ground);
            }
            Event::PeerLost { node, peer } => nodes[node].peer_lost(peer, ground),
            Event::Alarm {
                owner: Owner::Node(node),
            } => nodes[node].turn(ground),
            Event::Alarm {
                owner: Owner::Actor(actor),
            } => actors[actor].wake(ground),
            Event::Synced { node, boot } => nodes[node].synced(boot, ground),
            Event::CheckpointWritten { node, boot } => {
                nodes[node].checkpoint_written(boot, ground);
            }
            Event::Install { node, step } => node::happens(nodes, node, step, ground),
            Event::Start { node } => nodes[node].start(ground),
            Event::Resume { node, pause } => nodes[node].resume(Some(pause), ground),
            Event::DiskRecovers { node } => nodes[node].slow_down(1),
            Event::Call { node, call } => nodes[node].call(*call, ground),
            Event::Abandoned { node, actor, id } => nodes[node].abandoned(actor, id, ground),
            Event::Asked {
                node,
                stream,
                request,
            } => nodes[node].asked(stream, request, ground),
            Event::Told {
                actor,
                stream,
                notice,
            } => {
                if let Actor::Watches(client) = &mut actors[actor] {
                    client.told(stream, notice, ground);
                }
            }
            Event::StreamClosed { node, stream } => nodes[node].stream_closed(stream, ground),
            Event::Reply { actor, id, reply } => actors[actor].hear(id, reply, ground),
            Event::Trouble => faults::trouble(nodes, actors.len(), ground),
            Event::NetworkHeals { since } => ground.network.end(since),
            Event::Heal => self.heal(),
            Event::Drain => self.drain(),
        }
    }

    fn heal(&mut self) {
        self.ground.tell(format_args!("all faults stop"));
        self.ground.network.calm();
        self.ground.checks.liveness.healed(self.ground.now_us);
        for node in &mut self.nodes {
            node.heal(&mut self.ground);
        }
    }

    fn drain(&mut self) {
        self.ground.tell(format_args!("clients begin nothing new"));
        self.ground.draining = true;
        let living = (0..self.actors.len()).filter(|actor| self.actors[*actor].must_be_served());
        let liveness = &self.ground.checks.liveness;
        let verdict = liveness.recovered(living, RECOVERY_US);
        self.ground.checks.note(verdict);
    }

    /// Whether all nodes have applied the same.
    fn has_settled(&self) -> bool {
        let mut applied = self.applied();
        let first = applied.next().flatten();
        applied.all(|index| index == first)
    }

    /// What each node has applied.
    fn applied(&self) -> impl Iterator<Item = Option<u64>> {
        let replicas = self.nodes.iter().map(Node::replica);
        replicas.map(|replica| Some(replica?.state().applied()))
    }

    fn finish(&mut self) {
        let replicas: Vec<_> = self
            .nodes
            .iter()
            .map(|node| (id(node.index()), node.replica()))
            .collect();
        let (now_us, locks) = (self.ground.now_us, self.ground.settings.locks);
        let upto = self.end.unwrap_or(0);
        self.ground
            .checks
            .in_the_end(now_us, locks, upto, &replicas);
    }
}

impl Actor {
    fn all(settings: &Settings, ground: &mut Ground) -> Vec<Self> {
        let mut actors = Vec::new();
        for _ in 0..settings.lock_clients {
            actors.push(Self::Locks(LockClient::new(actors.len(), ground)));
        }
        for _ in 0..settings.register_clients {
            actors.push(Self::Registers(RegisterClient::new(actors.len(), ground)));
        }
        for _ in 0..settings.kv_clients {
            actors.push(Self::Keys(KvClient::new(actors.len(), ground)));
        }
        for _ in 0..settings.watch_clients {
            actors.push(Self::Watches(WatchClient::new(actors.len(), ground)));
        }
        for _ in 0..settings.lease_clients {
            actors.push(Self::Leases(LeaseClient::new(actors.len(), ground)));
        }
        actors.push(Self::Operator(Operator::new(actors.len(), ground)));
        actors
    }

    fn wake(&mut self, ground: &mut Ground) {
        match self {
            Self::Locks(client) => client.wake(ground),
            Self::Registers(client) => client.wake(ground),
            Self::Keys(client) => client.wake(ground),
            Self::Leases(client) => client.wake(ground),
            Self::Watches(client) => client.wake(ground),
            Self::Operator(operator) => operator.wake(ground),
        }
    }

    fn hear(&mut self, id: u64, reply: Reply, ground: &mut Ground) {
        match self {
            Self::Locks(client) => client.hear(id, reply, ground),
            Self::Registers(client) => client.hear(id, reply, ground),
            Self::Keys(client) => client.hear(id, reply, ground),
            Self::Leases(client) => client.hear(id, reply, ground),
            // It is told things on its stream.
            Self::Watches(_) => {}
            Self::Operator(operator) => operator.hear(id, reply, ground),
        }
    }

    fn must_be_served(&self) -> bool {
        match self {
            Self::Locks(client) => !client.is_gone(),
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_trace() {
        let run = || World::new(3, 26, true).run();
        let (one, other) = (run(), run());
        assert!(
            one.trace.len() > 100_000,
            "{} bytes say little",
            one.trace.len()
        );
        assert!(one.trace == other.trace, "two runs of one seed differ");
        assert!(World::new(4, 26, true).run().trace != one.trace);
    }

    #[test]
    fn a_few_seeds_keep_every_promise() {
        let mut operations = 0;
        for seed in 1..=6 {
            let outcome = World::new(seed, 40, false).run();
            assert_eq!(outcome.violation, None, "seed {seed}");
            operations += outcome.tally.operations();
        }
        assert!(
            operations > 6 * 40 * 50,
            "{operations} operations are too few"
        );
    }
}
