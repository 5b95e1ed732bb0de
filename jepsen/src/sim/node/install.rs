//! How a node gets a checkpoint of another, and what can go wrong with that.
//!
//! The stream is a row of chunks in order; whatever goes wrong, it breaks. The
//! receiver writes while it receives, makes durable and verifies what it has got,
//! and hands the state to its replica; once the log says so, the checkpoint gets its
//! name. Each step takes time, in which a crash can come.

use bytes::Bytes;
use conclave_core::{
    checkpoint::{self, CheckpointStore as _, Slot},
    ids::Index,
    replica::{Fetch, Input},
    state::State,
};
use conclave_primitives::Primitives;

use super::{Node, Running, index};
use crate::sim::{
    ground::{Event, Ground},
    tally::{Fault, Operation},
};

/// How often a node crashes while it gets a checkpoint, in a million, and as often
/// before what it has installed has its name.
const CRASHES: u64 = 250_000;
/// How often the leader changes while it sends one.
const RESIGNS: u64 = 400_000;
/// How long it takes at most to send a checkpoint.
const TAKES_US_MAX: u64 = 1_500_000;
/// For how long the sender keeps its log behind a checkpoint that it has sent.
const KEEPS_LOG_US: u64 = 3_000_000;

/// See the module.
#[derive(Debug)]
pub(crate) enum Step {
    /// A node is asked for its newest checkpoint.
    Asked {
        by: usize,
        fetch: u64,
        at_least: Index,
    },
    /// Records arrive.
    Chunk(Chunk),
    /// A node notices that its stream has broken.
    Broken { fetch: u64 },
    /// All that came is on disk.
    Stored { fetch: u64 },
    /// It is time that what was installed gets its name.
    Adopted { boot: u64 },
    /// A crash just then, since few come then by themselves.
    Crash { boot: u64 },
    /// Who sends hands leadership over.
    Resign,
}

/// Some records of a checkpoint.
#[derive(Debug)]
pub(crate) struct Chunk {
    from: usize,
    /// The start of the sender that sent it.
    from_boot: u64,
    fetch: u64,
    records: Vec<Bytes>,
    is_last: bool,
}

/// What a node receives, or has received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Receiving {
    fetch: u64,
    from: usize,
    is_begun: bool,
    /// Another one leads than the one that was asked.
    leads_no_more: bool,
}

/// Lets a step happen at a node.
pub(crate) fn happens(nodes: &mut [Node], node: usize, step: Step, ground: &mut Ground) {
    match step {
        Step::Asked {
            by,
            fetch,
            at_least,
        } => nodes[node].send_checkpoint(by, fetch, at_least, ground),
        Step::Chunk(chunk) => {
            let sender = &nodes[chunk.from];
            let is_sent = sender.running.is_some() && sender.boot == chunk.from_boot;
            let lost = ground.network.weather().lost / 10;
            if !is_sent || ground.network.is_cut(chunk.from, node) || ground.rng.chance(lost) {
                return break_stream(node, chunk.fetch, ground);
            }
            nodes[node].receive(chunk, ground);
        }
        Step::Broken { fetch } => nodes[node].fetch_broken(fetch, ground),
        Step::Stored { fetch } => nodes[node].fetched(fetch, ground),
        Step::Adopted { boot } if boot == nodes[node].boot => nodes[node].adopt(ground),
        Step::Crash { boot } if boot == nodes[node].boot => nodes[node].crash_now(ground),
        Step::Adopted { .. } | Step::Crash { .. } => {}
        Step::Resign => nodes[node].take_in(Input::Resign, ground),
    }
}

fn break_stream(receiver: usize, fetch: u64, ground: &mut Ground) {
    let at_us = ground.now_us + ground.rng.between(1_000, 1_000_000);
    let step = Step::Broken { fetch };
    ground.schedule(
        at_us,
        Event::Install {
            node: receiver,
            step,
        },
    );
}

impl Node {
    /// Asks another node for a checkpoint.
    pub(super) fn fetch(&mut self, fetch: Fetch, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        if running.schedule.is_busy() {
            // A checkpoint of its own is being written.
            return self.take_in(Input::Fetched(None), ground);
        }
        ground.fetches += 1;
        let Fetch { from, at_least } = fetch;
        let (by, fetch, from) = (self.index, ground.fetches, index(from));
        running.schedule.receive();
        running.receiving = Some(Receiving {
            fetch,
            from,
            is_begun: false,
            leads_no_more: false,
        });
        ground.tell(format_args!(
            "node {by} asks node {from} for a checkpoint up to {at_least}"
        ));
        if ground.network.is_cut(by, from) {
            return break_stream(by, fetch, ground);
        }
        let at_us = ground.arrival();
        let step = Step::Asked {
            by,
            fetch,
            at_least,
        };
        ground.schedule(at_us, Event::Install { node: from, step });
        self.crash_within(400_000, ground);
        if ground.troubled() && ground.rng.chance(RESIGNS) {
            let at_us = at_us + ground.rng.below(100_000);
            let step = Step::Resign;
            ground.schedule(at_us, Event::Install { node: from, step });
        }
    }

    fn send_checkpoint(&mut self, to: usize, fetch: u64, at_least: Index, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return break_stream(to, fetch, ground);
        };
        let at = running.schedule.newest();
        let has_name = at > 0 && running.adopts.is_none();
        if !has_name || at < at_least {
            running.schedule.want(at_least);
            return break_stream(to, fetch, ground);
        }
        running.sent = Some((at, ground.now_us + KEEPS_LOG_US));
        let mut records = Vec::new();
        let mut take = |record: &[u8]| {
            records.push(Bytes::copy_from_slice(record));
            true
        };
        if let Err(error) = self.checkpoints.read(at.into(), &mut take) {
            return ground.checks.node_failed(self.index, &error);
        }
        let chunks = ground.rng.between(1, 30) as usize;
        let length = records.len().div_ceil(chunks);
        let last = records.len().div_ceil(length) - 1;
        // Long enough for something to happen meanwhile, and no longer than what is
        // written meanwhile is kept.
        let whole_us = ground.rng.skewed(300_000).min(TAKES_US_MAX);
        let pace_us = whole_us / (last as u64 + 1);
        let mut at_us = ground.arrival();
        for (number, records) in records.chunks(length).enumerate() {
            let chunk = Chunk {
                from: self.index,
                from_boot: self.boot,
                fetch,
                records: records.to_vec(),
                is_last: number == last,
            };
            let step = Step::Chunk(chunk);
            ground.schedule(at_us, Event::Install { node: to, step });
            at_us += 1 + ground.rng.below(2 * pace_us + 1);
        }
    }

    fn receive(&mut self, chunk: Chunk, ground: &mut Ground) {
        if !self.receives(chunk.fetch) {
            return;
        }
        let running = self.running.as_mut();
        let receiving = running.and_then(|running| running.receiving.as_mut());
        let is_begun = receiving.map(|receiving| std::mem::replace(&mut receiving.is_begun, true));
        if is_begun == Some(false) {
            // The thread that writes does one thing after the other.
            self.adopt(ground);
            self.checkpoints.begin(Slot::Incoming, std::iter::empty());
        }
        self.checkpoints
            .append(Slot::Incoming, chunk.records.into_iter());
        if chunk.is_last {
            let at_us = ground.now_us + ground.rng.skewed(200_000);
            let step = Step::Stored { fetch: chunk.fetch };
            let node = self.index;
            ground.schedule(at_us, Event::Install { node, step });
        }
    }

    /// Whether this is still what the node waits for.
    fn receives(&self, fetch: u64) -> bool {
        let receiving = self.running.as_ref().and_then(|running| running.receiving);
        receiving.is_some_and(|receiving| receiving.fetch == fetch)
    }

    fn fetch_broken(&mut self, fetch: u64, ground: &mut Ground) {
        if self.receives(fetch) {
            ground.tally.fault(Fault::FetchBroken);
            self.hand_over(None, ground);
        }
    }

    fn fetched(&mut self, fetch: u64, ground: &mut Ground) {
        if !self.receives(fetch) {
            return;
        }
        self.checkpoints.sync(Slot::Incoming);
        // Of a stream that broke in the midst, a chunk may have come later.
        let image = checkpoint::read(&self.checkpoints, Slot::Incoming).ok();
        self.hand_over(image.map(State::restore), ground);
    }

    fn hand_over(&mut self, state: Option<State<Primitives>>, ground: &mut Ground) {
        if let Some(running) = &mut self.running {
            running.schedule.discard();
            running.received = running.receiving.take();
            if let Some(received) = &mut running.received {
                let leader = running.replica.status().leader.map(index);
                received.leads_no_more = leader.is_some_and(|leader| leader != received.from);
            }
        }
        self.take_in(Input::Fetched(state.map(Box::new)), ground);
    }

    /// The replica has installed what was fetched, and the log says so.
    pub(super) fn installed(&mut self, at: Index, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        ground.tell(format_args!("node {} installs {at}", self.index));
        ground.did(Operation::Installed);
        if running
            .received
            .take()
            .is_some_and(|received| received.leads_no_more)
        {
            ground.did(Operation::InstalledUnderAnother);
        }
        if ground.without_state == Some(self.index) {
            ground.without_state = None;
        }
        running.schedule.install(at);
        running.adopts = Some(at);
        let (node, boot) = (self.index, self.boot);
        let at_us = ground.now_us + ground.rng.skewed(200_000);
        let step = Step::Adopted { boot };
        ground.schedule(at_us, Event::Install { node, step });
        self.crash_within(100_000, ground);
    }

    /// Crashes now and then within this time.
    fn crash_within(&self, time_us: u64, ground: &mut Ground) {
        if ground.troubled() && ground.rng.chance(CRASHES) {
            let at_us = ground.now_us + ground.rng.below(time_us);
            let (node, boot) = (self.index, self.boot);
            let step = Step::Crash { boot };
            ground.schedule(at_us, Event::Install { node, step });
        }
    }

    fn crash_now(&mut self, ground: &mut Ground) {
        if self.running.is_some() && ground.troubled() {
            self.crash_for_a_while(ground);
        }
    }

    /// What was installed gets its name, if it has none yet.
    pub(super) fn adopt(&mut self, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        let Some(at) = running.adopts.take() else {
            return;
        };
        running.replica.checkpointed(at);
        if let Err(error) = checkpoint::adopt(&mut self.checkpoints, at) {
            ground.checks.node_failed(self.index, &error);
        }
    }

    /// Counts what a crash interrupts.
    pub(super) fn count_crash(running: &Running, ground: &mut Ground) {
        if running
            .receiving
            .is_some_and(|receiving| receiving.is_begun)
        {
            ground.tally.fault(Fault::CrashDuringFetch);
        }
        if running.adopts.is_some() {
            ground.tally.fault(Fault::CrashDuringInstall);
        }
    }
}
