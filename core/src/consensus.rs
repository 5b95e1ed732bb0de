//! raft-rs behind one door: the only module that knows its types.
//!
//! What this adds to `RawNode`:
//! - election timeouts that depend on nothing but seed, node, term and role;
//! - a check of every message from a peer before raft-rs sees it (`checks`), since
//!   it panics on some that a correct peer never sends;
//! - appends to followers that make no quorum faster wait a little (`deferral`);
//! - checkpoints are offered, and never sent, by raft-rs' messages (`offers`);
//! - quorum-confirmed reads only (`confirmations`, with `ReadOnlyOption::Safe`).
//!   raft-rs' lease-based reads are stale under partitions even with perfect clocks.

mod checks;
mod confirmations;
mod deferral;
mod memory;
mod offers;
mod outgoing;

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use protobuf::Message as _;
use raft::{
    Config as RaftConfig, RawNode, StateRole,
    eraftpb::{Entry, HardState as RaftHardState, Message, MessageType},
};
use slog::{Discard, Logger, o};

use self::{
    deferral::Deferral,
    memory::{MemoryLog, log_entry},
    outgoing::encode,
};
use crate::{
    ids::{Index, NodeId, Term},
    limits,
    log::{HardState, LogEntry},
    replica::Role,
};

/// Ticks between two heartbeats. More than one, so that randomised election
/// timeouts are finer than a heartbeat.
const HEARTBEAT_TICKS: usize = 2;

/// Bytes of committed entries applied in one turn, so that a long replay does
/// not keep a node from answering heartbeats.
const APPLY_BYTES_PER_TURN_MAX: u64 = 512 << 10;

/// How consensus is configured.
#[derive(Clone, Debug)]
pub(crate) struct ConsensusConfig {
    pub(crate) node: NodeId,
    pub(crate) voters: Vec<NodeId>,
    /// A random number for this start of the process.
    pub(crate) boot: u64,
    pub(crate) seed: u64,
    /// Heartbeats that fit into the shortest election timeout.
    pub(crate) heartbeats_per_election: usize,
    /// The entry that the state holds already, and its term; (0, 0) for none. Without
    /// a state, entries are given out that nobody can apply, and this member must not
    /// lead: it votes and keeps a log, no more.
    pub(crate) applied: Option<(Index, Term)>,
    /// The entry behind which the log was begun anew, and its term; (0, 0) if never.
    pub(crate) base: (Index, Term),
}

/// How many ticks make one heartbeat interval.
pub(crate) const fn ticks_per_heartbeat() -> u64 {
    HEARTBEAT_TICKS as u64
}

/// One member's part in Raft.
pub(crate) struct Consensus {
    config: ConsensusConfig,
    raw: RawNode<MemoryLog>,
    /// The term and role for which the election timeout was last drawn.
    drawn_for: (Term, Role),
    /// As last given out for the log.
    saved: HardState,
    /// How far each follower has been told of commits, while this node leads.
    told: BTreeMap<u64, Index>,
    deferral: Deferral,
    /// Until offers of checkpoints that came to nothing are repeated.
    ticks_to_offers: usize,
}

/// What must be made durable.
#[derive(Debug, Default)]
pub(crate) struct Unsaved {
    pub(crate) hard_state: Option<HardState>,
    pub(crate) entries: Vec<LogEntry>,
}

/// What comes of all that was taken in.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    /// Encoded messages and their receivers, which may leave at once.
    pub(crate) messages: Vec<(NodeId, Bytes)>,
    pub(crate) unsaved: Option<Unsaved>,
    /// Messages that must not leave before all that was given out to be saved, this
    /// time and before, is durable.
    pub(crate) bound: Vec<(NodeId, Bytes)>,
    /// To be said then; see [`Consensus::saved`].
    pub(crate) number: u64,
    /// Entries to be applied: durable here, and committed.
    pub(crate) committed: Vec<LogEntry>,
    /// Confirmed reads: the sequence given, and the index to wait for.
    pub(crate) reads: Vec<(u64, Index)>,
}

impl fmt::Debug for Consensus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consensus")
            .field("term", &self.term())
            .field("role", &self.role())
            .field("leader", &self.leader())
            .finish_non_exhaustive()
    }
}

impl Consensus {
    /// Starts over what the log held, which must reach from the entry behind what
    /// is applied, or from an earlier one, at least to what is applied.
    pub(crate) fn new(
        config: ConsensusConfig,
        hard_state: HardState,
        entries: Vec<LogEntry>,
    ) -> Self {
        let election_tick = config.heartbeats_per_election * HEARTBEAT_TICKS;
        let mut raft_config = RaftConfig {
            id: config.node.0,
            election_tick,
            heartbeat_tick: HEARTBEAT_TICKS,
            max_size_per_msg: limits::APPEND_BYTES_MAX,
            max_inflight_msgs: limits::APPENDS_INFLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            batch_append: true,
            // Followers hear of a commit with the next append; see `tell_commit`.
            skip_bcast_commit: true,
            max_uncommitted_size: limits::UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: APPLY_BYTES_PER_TURN_MAX,
            ..RaftConfig::default()
        };
        let before = config.applied.unwrap_or(config.base);
        let mut log = MemoryLog::new(&config.voters, before, hard_state, entries);
        log.offer = config.applied.unwrap_or_default();
        raft_config.applied = before.0.max(log.cut.0);
        if config.applied.is_none() {
            // For the timeout that never comes.
            raft_config.max_election_tick = usize::MAX;
        }
        let logger = Logger::root(Discard, o!());
        let raw = RawNode::new(&raft_config, log, &logger)
            .expect("the configuration and a recovered log are valid");
        let mut consensus = Self {
            config,
            raw,
            drawn_for: (0, Role::Joining),
            saved: hard_state,
            told: BTreeMap::new(),
            deferral: Deferral::default(),
            ticks_to_offers: election_tick,
        };
        consensus.draw_election_timeout();
        consensus
    }

    /// Goes on with a state that holds another entry, as a start with it would.
    /// Nothing must be on its way to the log. What is not sent yet is forgotten.
    ///
    /// The log stays as far as it holds that entry or goes on behind it; else it
    /// begins anew there, which must be made durable with what follows.
    pub(crate) fn restart(&mut self, applied: (Index, Term)) {
        let log = self.raw.store();
        let entries = match self.holds(applied) {
            true => log.log_entries(),
            false => Vec::new(),
        };
        let hard_state = plain(&log.hard_state);
        let config = ConsensusConfig {
            applied: Some(applied),
            base: self.raw.store().cut,
            ..self.config.clone()
        };
        let saved = self.saved;
        *self = Self::new(config, hard_state, entries);
        self.saved = saved;
    }

    /// Whether the log holds this entry, or begins right behind it.
    pub(crate) fn holds(&self, (index, term): (Index, Term)) -> bool {
        index >= self.raw.store().cut.0
            && index <= self.last_index()
            && self.raw.raft.raft_log.match_term(index, term)
    }

    /// Whether there is a state that entries are applied to.
    pub(crate) fn has_state(&self) -> bool {
        self.config.applied.is_some()
    }

    /// The entry before the first that is held.
    pub(crate) fn before_first(&self) -> Index {
        self.raw.store().cut.0
    }

    /// The newest, for a batch that must have it.
    pub(crate) fn hard_state(&mut self) -> HardState {
        self.saved = plain(&self.raw.store().hard_state);
        self.saved
    }

    pub(crate) fn term(&self) -> Term {
        self.raw.raft.term
    }

    pub(crate) fn leader(&self) -> Option<NodeId> {
        let leader = self.raw.raft.leader_id;
        (leader != 0).then_some(NodeId(leader))
    }

    pub(crate) fn role(&self) -> Role {
        match self.raw.raft.state {
            StateRole::Follower => Role::Follower,
            StateRole::PreCandidate | StateRole::Candidate => Role::Candidate,
            StateRole::Leader => Role::Leader,
        }
    }

    pub(crate) fn committed(&self) -> Index {
        self.raw.raft.raft_log.committed
    }

    pub(crate) fn last_index(&self) -> Index {
        self.raw.raft.raft_log.last_index()
    }

    /// Whether an entry of the present term is known to be committed.
    pub(crate) fn has_committed_in_term(&self) -> bool {
        self.raw.raft.commit_to_current_term()
    }

    /// Up to where every member is known to hold the log durably, as far as this
    /// leader knows; 0 on others.
    pub(crate) fn held_by_all(&self) -> Index {
        if self.raw.raft.state != StateRole::Leader {
            return 0;
        }
        let matched = self.raw.raft.prs().iter().map(|(_, p)| p.matched);
        matched.min().unwrap_or(0)
    }

    /// Forgets entries up to an index, which must be applied.
    pub(crate) fn cut(&mut self, upto: Index) {
        let upto = upto.min(self.raw.raft.raft_log.applied);
        self.raw.mut_store().cut(upto);
    }

    /// One tick. A sole voter need not wait for anybody: it campaigns at once.
    pub(crate) fn tick(&mut self, sole_voter: bool) {
        if sole_voter && self.raw.raft.state != StateRole::Leader {
            // Refused only while an entry of membership is not applied.
            self.raw.campaign().ok();
        } else {
            self.raw.tick();
        }
        self.ticks_to_offers -= 1;
        if self.ticks_to_offers == 0 {
            self.ticks_to_offers = self.raw.raft.election_timeout();
            self.repeat_offers();
        }
        self.draw_election_timeout();
    }

    /// The connection to a peer broke: messages to it may be lost.
    pub(crate) fn unreachable(&mut self, peer: NodeId) {
        self.raw.report_unreachable(peer.0);
    }

    /// Takes a message from a peer. One that no correct peer sends is dropped,
    /// with the reason. If it offers a checkpoint that this member needs to go on,
    /// gives its last entry.
    pub(crate) fn step(
        &mut self,
        from: NodeId,
        bytes: &Bytes,
        now_us: u64,
    ) -> Result<Option<Index>, &'static str> {
        let mut message = Message::parse_from_carllerche_bytes(bytes)
            .map_err(|_| "does not decode as a Raft message")?;
        self.check(from, &message)?;
        let offered = self.take_offer(&mut message);
        if message.msg_type == MessageType::MsgReadIndex {
            self.serves(from, now_us);
        }
        let campaigns = message.msg_type == MessageType::MsgTimeoutNow;
        if self.has_state() || !campaigns {
            // An error here says that the message does not matter any more.
            self.raw.step(message).ok();
        }
        self.draw_election_timeout();
        Ok(offered)
    }

    /// Appends an entry to the log of this leader; false if it cannot now.
    pub(crate) fn propose(&mut self, data: Vec<u8>) -> bool {
        self.raw.raft.state == StateRole::Leader && self.raw.propose(Vec::new(), data).is_ok()
    }

    /// Hands leadership, if this node has it, to the follower that has most of
    /// the log, if possible one that was heard of lately.
    pub(crate) fn hand_over(&mut self) {
        let me = self.raw.raft.id;
        let best = self
            .raw
            .raft
            .prs()
            .iter()
            .filter(|(id, _)| **id != me)
            .max_by_key(|(id, progress)| (progress.recent_active, progress.matched, **id))
            .map(|(id, _)| *id);
        if let Some(best) = best
            && self.role() == Role::Leader
        {
            self.raw.transfer_leader(best);
        }
    }

    /// Hands leadership, if this node has it, to a follower; ignored if there is none of
    /// that id.
    pub(crate) fn hand_over_to(&mut self, to: NodeId) {
        if self.role() == Role::Leader && to.0 != self.raw.raft.id {
            self.raw.transfer_leader(to.0);
        }
    }

    /// Whether leadership is on its way to another member; nothing can be
    /// proposed meanwhile.
    pub(crate) fn is_handing_over(&self) -> bool {
        self.raw.raft.lead_transferee.is_some()
    }

    /// A client of this member wants something of this leader.
    pub(crate) fn serves(&mut self, member: NodeId, now_us: u64) {
        self.deferral.serves(member.0, now_us);
    }

    /// When something that is held back must leave.
    pub(crate) fn next_due_us(&self) -> Option<u64> {
        self.deferral.next_due_us()
    }

    /// Whether there is something to prepare.
    pub(crate) fn has_ready(&self) -> bool {
        self.raw.has_ready()
    }

    /// What comes of all that was taken in since the last time.
    pub(crate) fn prepare(&mut self, now_us: u64) -> Prepared {
        if !self.raw.has_ready() {
            return Prepared {
                messages: encode(self.defer(Vec::new(), now_us)),
                ..Prepared::default()
            };
        }
        let mut ready = self.raw.ready();
        let entries = ready.take_entries();
        self.raw.mut_store().append(&entries);
        if let Some(hard_state) = ready.hs() {
            self.raw.mut_store().hard_state = hard_state.clone();
        }
        let (messages, bound) = (ready.take_messages(), ready.take_persisted_messages());
        #[cfg(conclave_plant)]
        let (messages, bound) = match crate::plant::is("ack-before-fsync") {
            true => ([messages, bound].concat(), Vec::new()),
            false => (messages, bound),
        };
        let committed = ready.take_committed_entries();
        let reads = ready.take_read_states();
        let prepared = Prepared {
            messages: encode(self.defer(messages, now_us)),
            unsaved: ready.must_sync().then(|| self.unsaved(&entries)),
            bound: encode(bound),
            number: ready.number(),
            committed: committed.iter().map(log_entry).collect(),
            reads: reads.iter().filter_map(|s| self.confirmed(s)).collect(),
        };
        self.raw.advance_append_async(ready);
        self.raw.advance_apply();
        prepared
    }

    /// All that was given out to be saved is durable, up to what came with this number.
    pub(crate) fn saved(&mut self, number: u64) {
        self.raw.on_persist_ready(number);
    }

    fn unsaved(&mut self, entries: &[Entry]) -> Unsaved {
        let now = plain(&self.raw.store().hard_state);
        let changed = now != self.saved;
        self.saved = now;
        Unsaved {
            hard_state: changed.then_some(now),
            entries: entries.iter().map(log_entry).collect(),
        }
    }

    /// Replaces the timeout that raft-rs drew from the system's randomness.
    fn draw_election_timeout(&mut self) {
        let drawn_for = (self.term(), self.role());
        if drawn_for == self.drawn_for {
            return;
        }
        self.drawn_for = drawn_for;
        if !self.has_state() {
            let never = usize::MAX - 1;
            return self.raw.raft.set_randomized_election_timeout(never);
        }
        let raft = &mut self.raw.raft;
        let shortest = raft.election_timeout() as u64;
        let mut bytes = [0; 25];
        bytes[..8].copy_from_slice(&self.config.seed.to_be_bytes());
        bytes[8..16].copy_from_slice(&raft.id.to_be_bytes());
        bytes[16..24].copy_from_slice(&raft.term.to_be_bytes());
        bytes[24] = drawn_for.1 as u8;
        let draw = xxhash_rust::xxh3::xxh3_64(&bytes) % shortest;
        let ticks = usize::try_from(shortest + draw).expect("a few dozen ticks");
        raft.set_randomized_election_timeout(ticks);
    }
}

fn plain(hard_state: &RaftHardState) -> HardState {
    HardState {
        term: hard_state.term,
        vote: hard_state.vote,
        commit: hard_state.commit,
    }
}
