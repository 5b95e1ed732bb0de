//! What everything in a simulated world stands on: time, chance, the queue of
//! what happens next, the network, and the checkers that watch.

use std::{collections::BTreeMap, fmt};

use conclave_core::{
    ids::{Attachment, SessionId, Term},
    replica::{Answer, EventBody, Failure, Query},
    watch::{Notice, Request, StreamId},
};
use conclave_primitives::{Event as LockEvent, Primitives};
use conclave_proto::internal::{PeerMessage, command};

use super::{
    alarm::Owner,
    checks::Checks,
    clock::Clock,
    network::Network,
    node::Step,
    queue::Queue,
    settings::{HEARTBEAT_MS, Settings},
    stream::Streams,
    tally::{Fault, Operation, Tally},
};
use crate::{
    checkers::{
        early_expiry::{Moment, NODES_MAX},
        leases,
    },
    rng::Rng,
};

/// Something that happens at a time.
#[derive(Debug)]
pub(crate) enum Event {
    /// A message between nodes arrives.
    Peer {
        from: usize,
        to: usize,
        message: PeerMessage,
    },
    /// A node notices that its connection to a peer broke.
    PeerLost { node: usize, peer: usize },
    /// Someone may have something to do.
    Alarm { owner: Owner },
    /// A sync has taken its time.
    Synced { node: usize, boot: u64 },
    /// A checkpoint has taken its time.
    CheckpointWritten { node: usize, boot: u64 },
    /// Of a checkpoint that a node gets from another.
    Install { node: usize, step: Step },
    /// A node that was down starts.
    Start { node: usize },
    /// A node goes on after a pause.
    Resume { node: usize, pause: u64 },
    /// A node's disk is fast again.
    DiskRecovers { node: usize },
    /// A call of a client arrives.
    Call { node: usize, call: Box<Call> },
    /// A node learns that a client waits no longer.
    Abandoned { node: usize, actor: usize, id: u64 },
    /// The client of a stream asks for something.
    Asked {
        node: usize,
        stream: StreamId,
        request: Request,
    },
    /// The client of a stream is told something, or notices that it is broken.
    Told {
        actor: usize,
        stream: StreamId,
        notice: Option<Notice>,
    },
    /// A node notices that a stream is broken.
    StreamClosed { node: usize, stream: StreamId },
    /// An answer arrives at a client.
    Reply { actor: usize, id: u64, reply: Reply },
    /// The next fault.
    Trouble,
    /// A partition, or a storm, ends unless another has begun since.
    NetworkHeals { since: u64 },
    /// All faults stop.
    Heal,
    /// Everything must have been served again.
    Drain,
}

/// A call of a client.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) actor: usize,
    /// Unique among the calls of the client.
    pub(crate) id: u64,
    /// When it was sent.
    pub(crate) sent: Moment,
    pub(crate) body: CallBody,
    /// For the checkers.
    pub(crate) about: About,
}

/// What a call asks.
#[derive(Debug)]
pub(crate) enum CallBody {
    Command(command::Body),
    Renew(Attachment),
    Read(Query<Primitives>),
    LocalRead(Query<Primitives>),
    TimeLeft(SessionId),
}

/// What a call means to the checkers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum About {
    Open {
        /// When the first call for this session was sent: a repeated opening is as
        /// old as the first.
        first_sent: Moment,
    },
    Attach,
    Close {
        session: i64,
    },
    Renew {
        session: i64,
    },
    Acquire {
        lock: usize,
        session: i64,
        request: u64,
        first: bool,
    },
    Release {
        lock: usize,
        token: u64,
        session: i64,
        /// 0 for none.
        request: u64,
        /// How many acquires share the grant afterwards.
        left: usize,
    },
    /// A leader says something.
    Proclaim {
        lock: usize,
        token: u64,
        said: u64,
    },
    /// Of an acquire that was undone before.
    UndoneRelease {
        token: u64,
        session: i64,
    },
    /// Of a lease.
    Grant,
    Lease(leases::Call),
    Other,
}

/// What a client hears.
#[derive(Debug)]
pub(crate) enum Reply {
    /// The outcome.
    Answer(Box<Answer<Primitives>>),
    /// The node could not.
    Failure(Failure),
    /// There was no connection; the call did not arrive.
    Refused,
    /// The connection broke.
    Broken,
    /// Pushed, not asked for: a session event.
    Event {
        session: i64,
        body: EventBody<LockEvent>,
    },
}

/// A node's time without its own stalls, as its session clock may count it. It
/// stands still while the node is down, and never goes back: what was counted at one
/// moment is counted at every later one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StallFree {
    clock: Clock,
    counted_us: u64,
    /// When its last turn began, by its clock; none while it is down.
    turn_us: Option<u64>,
}

impl StallFree {
    /// Of a node that has not started yet.
    pub(crate) fn new(clock: Clock) -> Self {
        Self {
            clock,
            counted_us: 0,
            turn_us: None,
        }
    }

    fn at(&self, true_us: u64) -> u64 {
        let passed = self
            .turn_us
            .map_or(0, |turn_us| self.clock.local(true_us) - turn_us);
        self.counted_us + passed.min(2 * HEARTBEAT_MS * 1_000)
    }

    /// The node begins a turn.
    pub(crate) fn turn(&mut self, true_us: u64) {
        self.counted_us = self.at(true_us);
        self.turn_us = Some(self.clock.local(true_us));
    }

    /// The node, which was down, starts; its clock may be set anew.
    pub(crate) fn start(&mut self, clock: Clock, true_us: u64) {
        self.clock = clock;
        self.turn_us = Some(clock.local(true_us));
    }

    /// The node goes down.
    pub(crate) fn stop(&mut self, true_us: u64) {
        self.counted_us = self.at(true_us);
        self.turn_us = None;
    }
}

/// Lines that tell what happened, if someone wants to read them.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    lines: Option<String>,
}

impl Trace {
    pub(crate) fn new(on: bool) -> Self {
        Self {
            lines: on.then(String::new),
        }
    }

    pub(crate) fn take(&mut self) -> String {
        self.lines.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(crate) fn line(&mut self, at_us: u64, what: fmt::Arguments<'_>) {
        use std::fmt::Write as _;
        if let Some(lines) = &mut self.lines {
            writeln!(
                lines,
                "{:>3}.{:06} {what}",
                at_us / 1_000_000,
                at_us % 1_000_000
            )
            .expect("a string takes everything");
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) now_us: u64,
    pub(crate) rng: Rng,
    pub(crate) settings: Settings,
    pub(crate) network: Network,
    pub(crate) checks: Checks,
    pub(crate) tally: Tally,
    pub(crate) trace: Trace,
    pub(crate) stall_free: Vec<StallFree>,
    /// For each node: when a turn last ended with it leading.
    pub(crate) led_us: [Option<u64>; NODES_MAX],
    /// The newest term in which a node was seen to lead.
    pub(crate) term: Term,
    pub(crate) leader: leases::Leader,
    /// Clients begin nothing new.
    pub(crate) draining: bool,
    /// The node whose checkpoints were all damaged, until it has another one. One at a
    /// time: no majority of a cluster may be without a state.
    pub(crate) without_state: Option<usize>,
    /// Fetches of checkpoints so far.
    pub(crate) fetches: u64,
    pub(super) streams: Streams,
    /// Which client listens for a session's events, and at which node.
    attached: BTreeMap<i64, (usize, usize)>,
    queue: Queue<Event>,
}

impl Ground {
    pub(crate) fn new(rng: Rng, settings: Settings, trace: bool) -> Self {
        Self {
            now_us: 0,
            network: Network::new(&settings),
            checks: Checks::default(),
            tally: Tally::default(),
            trace: Trace::new(trace),
            stall_free: Vec::new(),
            led_us: [None; NODES_MAX],
            term: 0,
            leader: leases::Leader::default(),
            draining: false,
            without_state: None,
            fetches: 0,
            streams: Streams::default(),
            attached: BTreeMap::new(),
            queue: Queue::default(),
            rng,
            settings,
        }
    }

    pub(crate) fn schedule(&mut self, at_us: u64, event: Event) {
        self.queue.push(at_us.max(self.now_us), event);
    }

    /// Moves time on to what happens next.
    pub(crate) fn advance(&mut self) -> Option<Event> {
        let (at_us, event) = self.queue.pop()?;
        self.now_us = at_us;
        Some(event)
    }

    pub(crate) fn tell(&mut self, what: fmt::Arguments<'_>) {
        self.trace.line(self.now_us, what);
    }

    /// This moment, as `early_expiry` counts it.
    pub(crate) fn moment(&self) -> Moment {
        let mut stall_free_us = [0; NODES_MAX];
        for (slot, node) in stall_free_us.iter_mut().zip(&self.stall_free) {
            *slot = node.at(self.now_us);
        }
        Moment {
            true_us: self.now_us,
            stall_free_us,
        }
    }

    /// Sends a message from node to node, through whatever the network does.
    pub(crate) fn send_peer(&mut self, from: usize, to: usize, message: PeerMessage) {
        if self.network.is_cut(from, to) {
            return;
        }
        let weather = self.network.weather();
        if self.rng.chance(weather.lost) {
            self.tally.fault(Fault::MessageLost);
            return;
        }
        if self.rng.chance(weather.doubled) {
            self.tally.fault(Fault::MessageDoubled);
            let at_us = self.arrival();
            self.schedule(
                at_us,
                Event::Peer {
                    from,
                    to,
                    message: message.clone(),
                },
            );
        }
        let at_us = self.arrival();
        if self.network.overtakes(from, to, at_us) {
            self.tally.fault(Fault::MessageReordered);
        }
        self.schedule(at_us, Event::Peer { from, to, message });
    }

    /// When something that leaves now arrives.
    pub(crate) fn arrival(&mut self) -> u64 {
        let weather = self.network.weather();
        let usual = 20 + self.rng.skewed(weather.delay_us);
        if self.rng.chance(weather.late) {
            self.tally.fault(Fault::MessageDelayed);
            return self.now_us + usual + self.rng.below(weather.late_us + 1);
        }
        self.now_us + usual
    }

    /// Sends a call to a node.
    pub(crate) fn send_call(&mut self, node: usize, call: Call) {
        if self.network.is_client_cut(call.actor, node) {
            return;
        }
        let weather = self.network.weather();
        if self.rng.chance(weather.lost) {
            self.tally.fault(Fault::CallLost);
            return;
        }
        let at_us = self.arrival();
        self.schedule(
            at_us,
            Event::Call {
                node,
                call: Box::new(call),
            },
        );
    }

    /// Tells a node that its client hung up.
    pub(crate) fn send_abandon(&mut self, node: usize, actor: usize, id: u64) {
        if !self.network.is_client_cut(actor, node) {
            let at_us = self.arrival();
            self.schedule(at_us, Event::Abandoned { node, actor, id });
        }
    }

    /// Sends something to a client.
    pub(crate) fn send_reply(&mut self, node: usize, actor: usize, id: u64, reply: Reply) {
        if self.network.is_client_cut(actor, node) {
            return;
        }
        let weather = self.network.weather();
        if self.rng.chance(weather.lost) {
            self.tally.fault(Fault::ReplyLost);
            return;
        }
        let at_us = self.arrival();
        self.schedule(at_us, Event::Reply { actor, id, reply });
    }

    /// A client listens for the events of its session at this node from now on.
    pub(crate) fn attach(&mut self, session: i64, actor: usize, node: usize) {
        self.attached.insert(session, (actor, node));
    }

    /// A node tells a session something, if its client listens there.
    pub(crate) fn publish(&mut self, node: usize, session: i64, body: EventBody<LockEvent>) {
        if let Some((actor, at)) = self.attached.get(&session)
            && *at == node
        {
            let actor = *actor;
            self.send_reply(node, actor, 0, Reply::Event { session, body });
        }
    }

    /// Whether faults still happen.
    pub(crate) fn troubled(&self) -> bool {
        self.now_us < self.settings.heal_us
    }

    pub(crate) fn did(&mut self, operation: Operation) {
        self.tally.operation(operation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 1_030_000;

    #[test]
    fn a_stall_counts_as_two_heartbeats() {
        let mut node = StallFree::new(Clock::new(0, 7, 1_000_000));
        node.start(node.clock, 0);
        node.turn(100_000);
        assert_eq!(node.at(300_000), 300_000);
        assert_eq!(node.at(900_000), 300_000);
        node.turn(900_000);
        assert_eq!(node.at(1_000_000), 400_000);
    }

    /// A session is opened by a call sent while the node is down, and expires under
    /// that node once a TTL has passed since it started.
    #[test]
    fn what_is_counted_at_a_moment_is_no_more_than_what_is_counted_later() {
        let clock = Clock::new(0, 1_000_000, RATE);
        let mut node = StallFree::new(clock);
        assert_eq!(node.at(10_000), 0, "not started yet");
        node.start(clock, 20_000);
        node.turn(50_000);
        node.stop(60_000);
        let sent = node.at(2_000_000);
        assert_eq!(sent, 41_200, "it ran for 40 ms");
        node.start(clock.restarted(2_500_000, 3), 2_500_000);
        assert_eq!(node.at(2_500_000), sent);
        for turn_us in (2_510_000..3_700_000).step_by(10_000) {
            node.turn(turn_us);
        }
        assert_eq!(node.at(3_700_000) - sent, 1_200_000 * RATE / 1_000_000);
    }
}
