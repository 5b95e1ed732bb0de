//! One member of the cluster as a step function: [`Replica`].
//!
//! Everything happens in turns. A turn takes in what has arrived, and has two
//! halves. [`Replica::begin`] hands it to consensus; what may leave before
//! anything is durable leaves with it, and so does the batch that must be made
//! durable. [`Replica::finish`], called when that is done, applies what is
//! committed and gives out the answers. No clock, no disk, no network and no
//! randomness in here: [`crate::node`] and the simulator drive
//! the same code.
//!
//! What becomes of a request:
//! - a command goes into the entry that this turn proposes (one that only queues,
//!   soon into another), or, once, to the leader. It is answered when this node applies it. If the leader or the term
//!   is lost first, the answer is [`Failure::OutcomeUnknown`];
//! - a read waits for a quorum's confirmation that began after it arrived, and
//!   for this node to apply what was committed then;
//! - a renewal does the same, always on the leader, and never enters the log.
//!
//! Not done here: retries of commands. Only a client repeats, since only it can
//! say that two requests are the same.

mod admission;
mod api;
mod apply;
mod commands;
mod compaction;
mod divergence;
mod hashing;
mod install;
mod leadership;
mod peers;
mod queries;
mod quota;
mod reads;
mod renewals;
mod saving;
mod status;
mod unhurried;
mod versions;
mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
};

use conclave_proto::internal::{Forward, Origin, PeerMessage, RenewalReply, command};

use self::{
    admission::Admission,
    divergence::Digests,
    hashing::Hashings,
    install::Install,
    leadership::{Leadership, Taken},
    queries::Readable,
    reads::{Ask, AskBody, Reads, Renewer, Wish},
    saving::Saving,
    waiting::{Pending, PendingRenewal},
};
pub use self::{
    api::{
        Answer, AnswerBody, Begun, Config, Event, EventBody, Failure, Fatal, Finished, Input, Now,
        Query,
    },
    compaction::Retention,
    install::Fetch,
    status::{Role, Status},
};
use crate::{
    checkpoint::Part,
    clock::Clock,
    consensus::{Consensus, ConsensusConfig, ticks_per_heartbeat},
    ids::{Attachment, Index, NodeId, RequestNumber, Revision, Term},
    limits,
    log::{Facts, LogEntry, Recovered},
    machine::{Machine, Place},
    state::State,
    watch::{self, Hub, Notice},
};

/// Between two attempts to propose an entry for timers that are due.
const TIMER_RETRY_US: u64 = 1_000;

/// One member. See the module.
#[derive(Debug)]
pub struct Replica<M: Machine> {
    config: Config,
    incarnation: u64,
    facts: Facts,
    consensus: Consensus,
    state: State<M>,

    now: Now,
    clock: Clock,
    next_tick_us: u64,
    /// In this turn; deadlines are looked at as often.
    has_ticked: bool,
    next_publish_us: u64,

    /// Every member has the log up to here on disk; only grows.
    held: Index,

    /// While this directory is new.
    admission: Option<Admission>,
    /// While this node leads.
    leadership: Option<Leadership>,
    /// Of the leadership before.
    #[cfg(conclave_plant)]
    old_liveness: Option<crate::liveness::Liveness>,
    /// What it took from others while it leads, or when it led last.
    taken: Taken,
    /// The leader and term at the end of the last turn.
    served_under: Option<(NodeId, Term)>,

    /// Committed, and not applied yet.
    unapplied: VecDeque<LogEntry>,
    /// What arrived in this turn.
    arrived: Arrived,
    /// Commands of this node's clients on their way.
    pending: BTreeMap<RequestNumber, Pending>,
    /// Requests of this node's clients that have a place in a queue.
    waiting: BTreeMap<Place, Vec<RequestNumber>>,
    reads: Reads<M>,
    /// Reads that are confirmed, or need no confirmation, in turn.
    readable: VecDeque<Readable<M>>,
    /// Who waits until what compactions up to a revision have given up is dropped, and
    /// for how long.
    sweeps: Vec<(RequestNumber, Revision, u64)>,
    /// Keys that reads of this turn may still look at.
    read_steps_left: usize,
    /// Renewals of this node's clients on their way to the leader.
    renewals: BTreeMap<RequestNumber, PendingRenewal>,
    /// Those of which the leader said that the session ended; why is in this
    /// node's state once it has applied the entry.
    renewals_ended: BTreeSet<(Index, RequestNumber)>,

    digests: Digests,
    /// Those of this node's clients who watch keys.
    watchers: Hub,
    hashings: Hashings,

    install: Install,

    outbox: Vec<(NodeId, PeerMessage)>,
    /// Answers to other members by node and boot: one message a turn for all.
    refusals: BTreeMap<(NodeId, u64), Vec<RequestNumber>>,
    renewal_replies: BTreeMap<(NodeId, u64), Vec<RenewalReply>>,
    saving: Saving,
    output: Finished<M>,
    status: Status,
    /// As of `status.members`.
    published_seen: u64,
}

/// Commands and renewals of one turn, before it is clear who leads.
#[derive(Debug, Default)]
struct Arrived {
    commands: Vec<(RequestNumber, command::Body)>,
    forwarded: Vec<(NodeId, Forward)>,
    renewals: Vec<Wish>,
}

impl<M: Machine> Replica<M> {
    /// A replica over a state, the first one or that of a checkpoint, and a log that
    /// goes on from there; see [`checkpoint::restore`](crate::checkpoint::restore).
    /// Without a state it votes and keeps a log, and gets a state from the leader.
    pub fn new(config: Config, recovered: Recovered, state: Option<State<M>>, now: Now) -> Self {
        let Recovered {
            identity,
            hard_state,
            facts,
            first: _,
            base,
            entries,
        } = recovered;
        #[cfg(conclave_plant)]
        let entries = crate::plant::forget_a_lock(entries);
        let consensus_config = ConsensusConfig {
            node: config.node,
            voters: facts.voters.clone(),
            boot: config.boot,
            seed: config.seed,
            heartbeats_per_election: usize::try_from(config.election_ms / config.heartbeat_ms)
                .expect("validated to be a small number"),
            applied: state.as_ref().map(|state| (state.applied(), state.term())),
            base,
        };
        let consensus = Consensus::new(consensus_config, hard_state, entries);
        let mut install = Install::default();
        let state = state.unwrap_or_else(|| {
            install.want(consensus.before_first());
            State::new(identity.cluster)
        });
        let clock = Clock::new(now, config.heartbeat_ms * 1_000, state.system().log_time());
        let admission = (!facts.admitted).then(|| Admission::new(config.node, &facts.voters));
        Self {
            consensus,
            clock,
            watchers: Hub::new(state.keyspace().revision(), config.watch_queue_bytes),
            state,
            held: 0,
            incarnation: identity.incarnation,
            facts,
            config,
            now,
            next_tick_us: now.boot_us,
            has_ticked: false,
            next_publish_us: now.boot_us,
            admission,
            leadership: None,
            #[cfg(conclave_plant)]
            old_liveness: None,
            taken: Taken::default(),
            served_under: None,
            unapplied: VecDeque::new(),
            arrived: Arrived::default(),
            pending: BTreeMap::new(),
            waiting: BTreeMap::new(),
            reads: Reads::default(),
            readable: VecDeque::new(),
            sweeps: Vec::new(),
            read_steps_left: 0,
            renewals: BTreeMap::new(),
            renewals_ended: BTreeSet::new(),
            digests: Digests::default(),
            hashings: Hashings::default(),
            install,
            outbox: Vec::new(),
            refusals: BTreeMap::new(),
            renewal_replies: BTreeMap::new(),
            saving: Saving::default(),
            output: Finished::default(),
            status: Status::default(),
            published_seen: 0,
        }
    }

    /// The replicated state.
    pub fn state(&self) -> &State<M> {
        &self.state
    }

    /// See [`State::begin_image`].
    pub fn begin_image(&mut self) {
        self.state.begin_image();
    }

    /// See [`State::draw_part`].
    pub fn draw_part(&mut self, max: usize) -> Option<Part> {
        self.state.draw_part(max)
    }

    /// Up to where every member is known to have the log on disk: nobody will ever
    /// need that from this node. Only grows.
    pub fn held_by_all(&self) -> Index {
        self.held
    }

    /// Forgets the log up to an index, as far as it is applied. It must be in a
    /// durable checkpoint. A follower that still needs it gets nothing any more.
    pub fn cut(&mut self, upto: Index) {
        self.consensus.cut(upto);
    }

    /// A checkpoint that holds the log up to this entry is durable: from now on it is
    /// what others are offered who need what was cut off.
    pub fn checkpointed(&mut self, at: Index) {
        self.consensus.offer(at);
    }

    /// Whether requests of this node's clients are under way. Those that have a place
    /// in a queue are not: nobody knows when that comes to its end.
    pub fn owes_answers(&self) -> bool {
        !self.pending.is_empty()
            || !self.renewals.is_empty()
            || !self.reads.is_empty()
            || !self.readable.is_empty()
            || !self.sweeps.is_empty()
            || !self.hashings.is_empty()
    }

    /// What this node knows, as of the end of its last turn.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// When the next turn is due although nothing arrives, by CLOCK_BOOTTIME in
    /// microseconds.
    pub fn next_turn_us(&self) -> u64 {
        let is_behind = !self.unapplied.is_empty() || self.watchers.has_work();
        if is_behind
            || !self.readable.is_empty()
            || !self.hashings.is_empty()
            || self.consensus.has_ready()
            || (self.reads.has_fresh() && self.can_confirm())
        {
            return self.now.boot_us;
        }
        let applied = self.state.applied();
        let leadership = self.leadership.as_ref();
        let expiry_us = leadership.and_then(|leadership| leadership.next_expiry_us(applied));
        let tell_us = leadership.and_then(|leadership| leadership.tell_commit_us);
        let unhurried_us = leadership.and_then(|leadership| leadership.unhurried.due_us());
        let timer_us = self.leadership.as_ref().and_then(|leadership| {
            let due_us = self.state.next_due()?.saturating_mul(1_000);
            let wait_us = due_us.saturating_sub(self.clock.micros());
            let under_way = leadership.timers_entry > self.state.applied();
            (!under_way).then(|| self.now.boot_us.saturating_add(wait_us.max(TIMER_RETRY_US)))
        });
        [
            expiry_us,
            tell_us,
            unhurried_us,
            timer_us,
            self.consensus.next_due_us(),
        ]
        .into_iter()
        .flatten()
        .fold(self.next_tick_us, u64::min)
    }

    /// The first half of a turn: takes in what has arrived.
    pub fn begin(
        &mut self,
        now: Now,
        inputs: impl IntoIterator<Item = Input<M>>,
    ) -> Result<Begun, Fatal> {
        self.now = now;
        self.note_step();
        for input in inputs {
            self.take(input)?;
        }
        self.tick();
        self.follow_role();
        self.dispatch();
        self.tell_who_awaits();
        self.tell_commit();
        self.ask_for_confirmation();
        let batch = self.advance();
        Ok(Begun {
            messages: self.take_outbox(),
            batch,
        })
    }

    /// The second half: applies and answers. What is durable by now may have been said
    /// in between.
    pub fn finish(&mut self) -> Result<Finished<M>, Fatal> {
        self.tell_who_awaits();
        let batch = self.advance();
        assert!(batch.is_none(), "only what is taken in must be saved");
        let mut work = 0;
        while work < limits::CHANGES_PER_TURN_MAX
            && let Some(entry) = self.unapplied.pop_front()
        {
            work += self.apply(&entry)?;
        }
        self.watchers
            .catch_up(self.state.keyspace(), &mut self.output.notices);
        self.follow_role();
        self.plan_to_tell_commit();
        self.fail_what_lost_its_leader();
        self.answer_reads();
        self.go_on_hashing();
        self.answer_ended_renewals();
        if mem::take(&mut self.has_ticked) {
            self.give_up_late();
        }
        self.tell_digest();
        self.plan_fetch();
        self.output.messages = self.take_outbox();
        self.update_status();
        Ok(mem::take(&mut self.output))
    }

    /// Time has passed. After a stall of this node nothing expires for one heartbeat:
    /// renewals that came meanwhile are yet to be read.
    fn note_step(&mut self) {
        let has_stalled = self.clock.advance(self.now);
        #[cfg(conclave_plant)]
        let has_stalled = has_stalled && !crate::plant::is("clock-over-stall");
        if has_stalled && let Some(leadership) = &mut self.leadership {
            leadership.hold_expiry(self.now.boot_us + self.config.heartbeat_ms * 1_000);
        }
    }

    fn take(&mut self, input: Input<M>) -> Result<(), Fatal> {
        match input {
            Input::Peer { from, message } => return self.receive(from, message),
            Input::PeerLost { peer } => self.lose_peer(peer),
            Input::Fetched(state) => self.fetched(state.map(|state| *state)),
            Input::Command { number, body } => self.arrived.commands.push((number, body)),
            Input::Read { number, .. } | Input::LocalRead { number, .. } if !self.may_read() => {
                let leader = self.consensus.leader();
                self.fail(number, Failure::NotLeader { leader });
            }
            #[cfg(conclave_plant)]
            Input::Read { number, query } if crate::plant::is("serializable-as-linearizable") => {
                self.may_be_read(number, query);
            }
            Input::Read { number, query } => self.reads.add(Ask {
                deadline_us: self.request_deadline_us(),
                body: AskBody::Read { number, query },
            }),
            Input::LocalRead { number, query } => self.may_be_read(number, query),
            Input::Watch(request) => self.watch(request),
            Input::Renew { number, of } => self.arrived.renewals.push(Wish {
                of,
                from: Renewer::Here(number),
                only_asks: false,
            }),
            Input::TimeLeft { number, session } => self.arrived.renewals.push(Wish {
                of: Attachment::present(session),
                from: Renewer::Here(number),
                only_asks: true,
            }),
            Input::Hash { number, revision } => self.hash(number, revision),
            Input::HandOver(to) => self.consensus.hand_over_to(to),
            Input::Resign => self.consensus.hand_over(),
        }
        Ok(())
    }

    fn tick(&mut self) {
        if self.now.boot_us < self.next_tick_us {
            return;
        }
        // One tick a turn, however late: a node that stood still must first hear
        // what happened meanwhile.
        self.next_tick_us = self.now.boot_us + self.tick_us();
        self.has_ticked = true;
        if self.admission.is_some() {
            return self.seek_admission();
        }
        self.consensus.tick(self.facts.voters.len() == 1);
        self.tell_held();
    }

    fn watch(&mut self, request: watch::Request) {
        let may_read = self.may_read();
        let notices = &mut self.output.notices;
        match request {
            // What it has may be older than what its reader has seen elsewhere.
            watch::Request::Create {
                stream, watcher, ..
            } if !may_read => notices.push((stream, Notice::Refused { watcher })),
            request => self.watchers.take(request, self.state.keyspace(), notices),
        }
    }

    fn leader_and_term(&self) -> Option<(NodeId, Term)> {
        self.consensus
            .leader()
            .map(|leader| (leader, self.consensus.term()))
    }

    fn is_mine(&self, origin: &Origin) -> bool {
        origin.node == self.config.node.0 && origin.boot == self.config.boot
    }

    fn tick_us(&self) -> u64 {
        self.config.heartbeat_ms * 1_000 / ticks_per_heartbeat()
    }

    fn election_us(&self) -> u64 {
        self.config.election_ms * 1_000
    }
}
