//! One server: the real replica over the real log on a disk that can crash,
//! driven as its loop thread drives it, with time taken by syncs, pauses and
//! restarts.

mod damage;
mod install;
mod leases;
mod streams;

use std::{collections::BTreeMap, mem};

use conclave_core::{
    checkpoint::{self, Part, Schedule, SimCheckpoints},
    disk::SimDisk,
    ids::{Index, NodeId},
    log::{Facts, Identity, Layout, Log},
    replica::{AnswerBody, Config, EventBody, Finished, Input, Now, Replica, Role},
    session::EndReason,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::PeerMessage;

use self::install::Receiving;
pub(crate) use self::install::{Step, happens};
use super::{
    alarm::{Alarm, Owner},
    clock::Clock,
    ground::{About, Call, CallBody, Event, Ground, Reply, StallFree},
    settings::{ELECTION_MS, HEARTBEAT_MS, RETENTION},
    tally::{Fault, Operation},
};
use crate::checkers::{early_expiry::Moment, leases::Leader};

/// The cluster that all nodes belong to.
pub(crate) const CLUSTER: u64 = 0xC0_9C1A;
/// How often an index is made anew and compared, in a million turns.
const REBUILDS: u64 = 200;

/// Small, so that there is always something to cut.
const LAYOUT: Layout = Layout {
    segment_bytes: 8 << 10,
    step_bytes: 2 << 10,
};

/// Versions and sessions that one turn copies for a checkpoint: so few that its
/// picture takes many turns.
const DRAWN_PER_TURN_MAX: u64 = 64;

/// See the module.
#[derive(Debug)]
pub(crate) struct Node {
    index: usize,
    disk: SimDisk,
    checkpoints: SimCheckpoints,
    clock: Clock,
    running: Option<Running>,
    /// Counts starts.
    boot: u64,
    /// Counts pauses; `paused` while one lasts.
    pauses: u64,
    paused: bool,
    paused_us: u64,
    /// Syncs take so many times their usual time.
    slowness: u64,
    fails_next_sync: bool,
    /// When a turn is due.
    alarm: Alarm,
}

#[derive(Debug)]
struct Running {
    replica: Replica<Primitives>,
    /// Names this start of the process.
    process: u64,
    log: Log<SimDisk>,
    schedule: Schedule,
    /// The checkpoint that is being written.
    checkpoint: Option<Index>,
    /// What of it is drawn.
    parts: Vec<Part>,
    /// What it gets from another node, and then what it has got.
    receiving: Option<Receiving>,
    received: Option<Receiving>,
    /// Between the log and the name of a checkpoint that it has got.
    adopts: Option<Index>,
    /// What another node gets from it, and until when it keeps the log for that.
    sent: Option<(Index, u64)>,
    inbox: Vec<Input<Primitives>>,
    /// Between the halves of a turn.
    sync: Sync,
    callers: BTreeMap<u64, Caller>,
    calls: u64,
    applied: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sync {
    None,
    UnderWay,
    /// Done while the node was paused.
    Unnoticed,
}

/// Who waits for an answer.
#[derive(Clone, Copy, Debug)]
struct Caller {
    actor: usize,
    id: u64,
    sent: Moment,
    about: About,
    is_command: bool,
}

impl Node {
    /// A node with a new data directory, that will start soon.
    pub(crate) fn new(index: usize, ground: &mut Ground) -> Self {
        let rate = 1_000_000 - super::clock::RATE_ERROR_PPM
            + ground.rng.below(2 * super::clock::RATE_ERROR_PPM + 1);
        let clock = Clock::new(0, ground.rng.below(1 << 40), rate);
        ground.stall_free.push(StallFree::new(clock));
        let disk = SimDisk::new();
        let identity = Identity {
            cluster: CLUSTER,
            node: id(index),
            incarnation: ground.rng.next(),
        };
        let facts = Facts {
            voters: (0..ground.settings.nodes).map(id).collect(),
            ..Facts::default()
        };
        if let Err(error) = Log::create_with(disk.clone(), LAYOUT, identity, facts) {
            ground.checks.node_failed(index, &error);
        }
        let soon = ground.now_us + ground.rng.below(50_000);
        ground.schedule(soon, Event::Start { node: index });
        Self {
            index,
            disk,
            checkpoints: SimCheckpoints::new(),
            clock,
            running: None,
            boot: 0,
            pauses: 0,
            paused: false,
            paused_us: 0,
            slowness: 1,
            fails_next_sync: false,
            alarm: Alarm::new(Owner::Node(index)),
        }
    }

    pub(crate) fn index(&self) -> usize {
        self.index
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

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.replica()
            .is_some_and(|replica| replica.status().role == Role::Leader)
    }

    pub(crate) fn replica(&self) -> Option<&Replica<Primitives>> {
        self.running.as_ref().map(|running| &running.replica)
    }

    /// Starts from what the disk holds.
    pub(crate) fn start(&mut self, ground: &mut Ground) {
        if self.running.is_some() {
            return;
        }
        if self.boot > 0 && ground.rng.chance(300_000) {
            // The machine, not only the process, was started again.
            ground.tally.fault(Fault::Reboot);
            self.clock = self
                .clock
                .restarted(ground.now_us, ground.rng.below(10_000_000));
        }
        self.damage_checkpoint(ground);
        self.damage_log(ground);
        let (log, recovered) = match Log::open_with(self.disk.clone(), LAYOUT) {
            Ok(Some(opened)) => opened,
            Ok(None) => return ground.checks.node_failed(self.index, &"its log is gone"),
            Err(error) => return ground.checks.node_failed(self.index, &error),
        };
        let state = match checkpoint::restore::<Primitives>(&mut self.checkpoints, &recovered) {
            Ok(state) => state,
            Err(error) => return ground.checks.node_failed(self.index, &error),
        };
        if !self.may_start(state.is_some(), ground) {
            return;
        }
        self.boot += 1;
        let restored = state.as_ref().map_or(0, |state| state.applied());
        let entries = recovered.entries.len();
        ground.tell(format_args!(
            "node {} starts from {restored} with {entries} entries",
            self.index
        ));
        if restored > 0 {
            ground.did(Operation::Restored);
        }
        let process = ground.rng.next();
        ground.checks.starts(self.index, &recovered.entries);
        let config = self.config(process, ground);
        let replica = Replica::new(config, recovered, state, self.clocks(ground));
        ground.stall_free[self.index].start(self.clock, ground.now_us);
        self.running = Some(Running {
            replica,
            process,
            log,
            schedule: Schedule::new(
                ground.settings.checkpoint_every,
                ground.settings.log_bytes_max,
                restored,
            ),
            checkpoint: None,
            parts: Vec::new(),
            receiving: None,
            received: None,
            adopts: None,
            sent: None,
            inbox: Vec::new(),
            sync: Sync::None,
            callers: BTreeMap::new(),
            calls: 0,
            applied: restored,
        });
        self.paused = false;
        self.alarm.stop();
        self.alarm.set(ground.now_us, ground);
    }

    fn config(&self, process: u64, ground: &mut Ground) -> Config {
        Config {
            node: id(self.index),
            boot: process,
            seed: ground.rng.next(),
            heartbeat_ms: HEARTBEAT_MS,
            election_ms: ELECTION_MS,
            name: format!("n{}", self.index),
            client_urls: vec![format!("http://n{}:2379", self.index)],
            retention: Some(RETENTION),
            quota_bytes: ground.settings.quota_bytes,
            watch_queue_bytes: ground.settings.watch_queue_bytes,
        }
    }

    /// Whether a node may find itself without a state: only if its checkpoints were
    /// damaged at rest.
    fn may_start(&self, has_state: bool, ground: &mut Ground) -> bool {
        let is_damaged = ground.without_state == Some(self.index);
        if has_state {
            if is_damaged {
                // The log was whole without them.
                ground.without_state = None;
            }
            return true;
        }
        if is_damaged {
            ground.tally.fault(Fault::CheckpointsLost);
        } else {
            ground.checks.checkpoint_missing(self.index);
        }
        is_damaged
    }

    /// Loses power: of what was not synced, any part is lost.
    pub(crate) fn crash(&mut self, ground: &mut Ground) {
        let Some(running) = self.running.take() else {
            return;
        };
        ground.tell(format_args!("node {} crashes", self.index));
        ground.stall_free[self.index].stop(ground.now_us);
        if running.sync == Sync::UnderWay {
            ground.tally.fault(Fault::CrashDuringSync);
        }
        let kept_of_million = [0, 500_000, 900_000, 1_000_000][ground.rng.index(4)];
        if running.checkpoint.is_some() {
            ground.tally.fault(Fault::CrashDuringCheckpoint);
        }
        Self::count_crash(&running, ground);
        let rng = &mut ground.rng;
        self.disk.crash(&mut || rng.chance(kept_of_million));
        self.checkpoints.crash(&mut || rng.chance(kept_of_million));
        ground.checks.wakeups.stopped(self.index);
        ground.break_streams(self.index, None);
        for caller in running.callers.values() {
            // Some clients are told at once; others find out by waiting.
            if ground.rng.chance(800_000) {
                ground.send_reply(self.index, caller.actor, caller.id, Reply::Broken);
            }
        }
        self.paused = false;
        self.fails_next_sync = false;
        let (index, nodes) = (self.index, ground.settings.nodes);
        for peer in (0..nodes).filter(|peer| *peer != index) {
            if ground.rng.chance(800_000) {
                let at_us = ground.now_us + ground.rng.below(5_000);
                ground.schedule(
                    at_us,
                    Event::PeerLost {
                        node: peer,
                        peer: index,
                    },
                );
            }
        }
    }

    /// Stands still for a while; what arrives waits.
    pub(crate) fn pause(&mut self, until_us: u64, ground: &mut Ground) {
        self.pauses += 1;
        self.paused = true;
        self.paused_us = ground.now_us;
        ground.tell(format_args!("node {} pauses until {until_us}", self.index));
        ground.schedule(
            until_us,
            Event::Resume {
                node: self.index,
                pause: self.pauses,
            },
        );
    }

    pub(crate) fn resume(&mut self, pause: Option<u64>, ground: &mut Ground) {
        if !self.paused || pause.is_some_and(|pause| pause != self.pauses) {
            return;
        }
        self.paused = false;
        ground.tell(format_args!("node {} goes on", self.index));
        let is_long = ground.now_us - self.paused_us > 2 * ELECTION_MS * 1_000;
        let inbox = self.running.iter().flat_map(|running| &running.inbox);
        if is_long
            && inbox
                .into_iter()
                .any(|input| matches!(input, Input::Peer { .. }))
        {
            // By now another leads; what its peers said before comes all at once.
            ground.tally.fault(Fault::PacketsAfterPause);
        }
        match self.running.as_ref().map(|running| running.sync) {
            Some(Sync::Unnoticed) => self.synced(self.boot, ground),
            Some(_) => self.alarm.set(ground.now_us, ground),
            None => {}
        }
    }

    pub(crate) fn slow_down(&mut self, slowness: u64) {
        self.slowness = slowness;
    }

    pub(crate) fn fail_next_sync(&mut self) {
        self.fails_next_sync = true;
    }

    /// All that is wrong with this node ends.
    pub(crate) fn heal(&mut self, ground: &mut Ground) {
        self.slowness = 1;
        self.fails_next_sync = false;
        self.resume(None, ground);
        if self.running.is_none() {
            let soon = ground.now_us + ground.rng.below(100_000);
            ground.schedule(soon, Event::Start { node: self.index });
        }
    }

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

    fn take_in(&mut self, input: Input<Primitives>, ground: &mut Ground) {
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

    /// The first half of a turn, if one is due.
    pub(crate) fn turn(&mut self, ground: &mut Ground) {
        if !self.alarm.rings(ground) {
            return;
        }
        let now = self.clocks(ground);
        let Some(running) = &mut self.running else {
            return;
        };
        if self.paused || running.sync != Sync::None {
            return;
        }
        ground.stall_free[self.index].turn(ground.now_us);
        let inputs = mem::take(&mut running.inbox);
        let is_idle = inputs.is_empty();
        let begun = match running.replica.begin(now, inputs) {
            Ok(begun) => begun,
            Err(fatal) => return ground.checks.node_failed(self.index, &fatal),
        };
        send(self.index, begun.messages, ground);
        if let Some(batch) = begun.batch {
            ground.checks.logs(self.index, &batch);
            if let Err(error) = running.log.append(&batch) {
                return self.disk_failed(&error, ground);
            }
            running.sync = Sync::UnderWay;
            let takes = (10 + ground.rng.skewed(ground.settings.sync_us)) * self.slowness;
            let at_us = ground.now_us + takes;
            ground.schedule(
                at_us,
                Event::Synced {
                    node: self.index,
                    boot: self.boot,
                },
            );
            return;
        }
        if is_idle
            && running.log.wants_mark()
            && let Err(error) = running.log.mark()
        {
            return self.disk_failed(&error, ground);
        }
        self.finish(ground);
    }

    /// A sync has taken its time.
    pub(crate) fn synced(&mut self, boot: u64, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        if boot != self.boot {
            return;
        }
        if self.paused {
            running.sync = Sync::Unnoticed;
            return;
        }
        if self.fails_next_sync {
            self.disk.fail_syncs(1);
        }
        if let Err(error) = running.log.sync() {
            return self.disk_failed(&error, ground);
        }
        running.sync = Sync::None;
        self.finish(ground);
    }

    /// The loop thread ends, as after any failure of the disk.
    fn disk_failed(&mut self, error: &dyn std::fmt::Display, ground: &mut Ground) {
        if !self.fails_next_sync {
            return ground.checks.node_failed(self.index, error);
        }
        ground.tally.fault(Fault::FailedSync);
        self.crash(ground);
        let later = ground.now_us + ground.rng.between(50_000, 1_000_000);
        ground.schedule(later, Event::Start { node: self.index });
    }

    /// The second half of a turn.
    fn finish(&mut self, ground: &mut Ground) {
        let index = self.index;
        let Some(running) = &mut self.running else {
            return;
        };
        let finished = match running.replica.finish() {
            Ok(finished) => finished,
            Err(fatal) => return ground.checks.node_failed(index, &fatal),
        };
        let status = running.replica.status();
        if status.role == Role::Leader {
            ground.led_us[index] = Some(ground.now_us);
            if status.term > ground.term {
                ground.term = status.term;
                ground.leader = Leader {
                    node: index,
                    since_us: ground.now_us,
                };
            }
        }
        let (fetch, installed) = (finished.fetch, finished.installed);
        running.deliver(index, finished, ground);
        if let Some(at) = installed {
            self.installed(at, ground);
        }
        if let Some(fetch) = fetch {
            self.fetch(fetch, ground);
        }
        self.keep_checkpoints(ground);
        let Some(running) = &mut self.running else {
            return;
        };
        let next_us = self.clock.true_at(running.replica.next_turn_us());
        let next_us = if running.inbox.is_empty() {
            next_us
        } else {
            ground.now_us
        };
        self.alarm.set(next_us.max(ground.now_us + 1), ground);
    }

    /// Begins a checkpoint when one is due, and cuts the log.
    fn keep_checkpoints(&mut self, ground: &mut Ground) {
        let Some(running) = &self.running else {
            return;
        };
        let written_bytes = running.log.written_bytes();
        let state = running.replica.state();
        let (applied, state_bytes) = (state.applied(), state.bytes());
        let is_due = running.schedule.is_due(applied, written_bytes, state_bytes);
        if is_due {
            // The thread that writes does one thing after the other.
            self.adopt(ground);
        }
        let Some(running) = &mut self.running else {
            return;
        };
        if is_due {
            if let Err(error) =
                checkpoint::keep_two(&mut self.checkpoints, running.schedule.newest())
            {
                return ground.checks.node_failed(self.index, &error);
            }
            running.schedule.begin(applied, written_bytes);
            running.replica.begin_image();
        }
        let drawn = 1 + ground.rng.below(DRAWN_PER_TURN_MAX);
        let drawn = usize::try_from(drawn).expect("it is small");
        running.parts.extend(running.replica.draw_part(drawn));
        if let Some(Part::Rest(image)) = running.parts.last() {
            let at = image.applied();
            running.checkpoint = Some(at);
            let parts = mem::take(&mut running.parts);
            self.checkpoints
                .begin(at.into(), checkpoint::records(parts.into_iter()));
            let (node, boot) = (self.index, self.boot);
            let at_us = ground.now_us + ground.rng.skewed(200_000);
            ground.schedule(at_us, Event::CheckpointWritten { node, boot });
        }
        let held = running.replica.held_by_all();
        let sent = running
            .sent
            .filter(|(_, until_us)| *until_us > ground.now_us);
        let sent = sent.map(|(at, _)| at);
        let upto = running.schedule.cut(held, sent, running.log.bytes());
        running.replica.cut(upto);
        if let Err(error) = running.log.cut(upto.max(running.log.base())) {
            self.disk_failed(&error, ground);
        }
    }

    /// A checkpoint has taken its time.
    pub(crate) fn checkpoint_written(&mut self, boot: u64, ground: &mut Ground) {
        let Some(running) = &mut self.running else {
            return;
        };
        if boot == self.boot
            && let Some(at) = running.checkpoint.take()
        {
            self.checkpoints.sync(at.into());
            running.schedule.complete(at);
            running.replica.checkpointed(at);
            if let Err(error) = checkpoint::keep_two(&mut self.checkpoints, at) {
                ground.checks.node_failed(self.index, &error);
            }
        }
    }

    fn clocks(&self, ground: &Ground) -> Now {
        Now {
            boot_us: self.clock.local(ground.now_us),
            date_ms: 1_800_000_000_000 + ground.now_us / 1_000,
        }
    }
}

impl Running {
    /// Events before answers, for the checkers: who was forced out is known
    /// before the next holder is told.
    fn deliver(&mut self, node: usize, finished: Finished<Primitives>, ground: &mut Ground) {
        send(node, finished.messages, ground);
        let applied = self.replica.state().applied();
        if applied != self.applied {
            self.committed(node, applied, ground);
        }
        self.notify(node, finished.notices, ground);
        if !finished.events.is_empty() {
            let at = ground.moment();
            let led = ground.led_us;
            let led_since = |since| led.map(|led| led.is_some_and(|at: u64| at >= since));
            for event in &finished.events {
                ground.checks.published(event, at, led_since);
            }
        }
        for (number, result) in finished.answers {
            let Some(caller) = self.callers.remove(&number) else {
                ground
                    .checks
                    .node_failed(node, &format_args!("call {number} answered twice"));
                continue;
            };
            ground.checks.dropped(node, number, caller.about);
            if caller.is_command {
                let origin = (id(node).0, self.process, number);
                ground.checks.command_answered(origin, &result);
            }
            let reply = match result {
                Ok(answer) => {
                    self.lease_answered(node, number, &caller, &answer.body, ground);
                    if matches!(answer.body, AnswerBody::NoSpace) {
                        ground.did(Operation::NoSpace);
                    }
                    let (now_us, state) = (ground.now_us, self.replica.state());
                    let about = caller.about;
                    let checks = &mut ground.checks;
                    if checks.answered(about, caller.sent, &answer, now_us, state) {
                        ground.did(Operation::AnsweredAgain);
                    }
                    Reply::Answer(Box::new(answer))
                }
                Err(failure) => Reply::Failure(failure),
            };
            ground.tell(format_args!(
                "node {node} answers {}.{}: {reply:?}",
                caller.actor, caller.id
            ));
            ground.send_reply(node, caller.actor, caller.id, reply);
        }
        for event in finished.events {
            if matches!(event.body, EventBody::SessionEnded(EndReason::Expired))
                && self.replica.status().role == Role::Leader
            {
                ground.did(Operation::SessionExpired);
            }
            ground.publish(node, event.session.0, event.body);
        }
        if applied != self.applied {
            self.applied = applied;
            ground
                .checks
                .applied(node, ground.settings.locks, &self.replica);
            if ground.rng.chance(REBUILDS) {
                ground.checks.rebuilt(&self.replica);
                ground.did(Operation::IndexRebuilt);
            }
        }
    }
}

/// The member with this index.
pub(crate) fn id(index: usize) -> NodeId {
    NodeId(index as u64 + 1)
}

/// The index of a member.
pub(crate) fn index(id: NodeId) -> usize {
    usize::try_from(id.0 - 1).expect("members are few")
}

fn send(from: usize, messages: Vec<(NodeId, PeerMessage)>, ground: &mut Ground) {
    for (to, message) in messages {
        ground.send_peer(from, index(to), message);
    }
}
