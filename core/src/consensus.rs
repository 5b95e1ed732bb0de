//! raft-rs behind one door: the only module that knows its types.
//!
//! What this adds to `RawNode`:
//! - election timeouts that depend on nothing but seed, node, term and role;
//! - a check of every message from a peer before raft-rs sees it, since it
//!   panics on some that a correct peer never sends;
//! - appends to followers that make no quorum faster wait a little (`deferral`);
//! - quorum-confirmed reads only (`ReadOnlyOption::Safe`). raft-rs' lease-based
//!   reads are stale under partitions even with perfect clocks.

mod deferral;

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use bytes::Bytes;
use protobuf::Message as _;
use raft::{
    Config as RaftConfig, GetEntriesContext, RaftState, RawNode, Ready, StateRole, Storage,
    StorageError,
    eraftpb::{
        ConfState, Entry, EntryType, HardState as RaftHardState, Message, MessageType, Snapshot,
    },
};
use slog::{Discard, Logger, o};

use self::deferral::Deferral;
use crate::{
    ids::{Index, NodeId, Term},
    limits,
    log::{EntryKind, HardState, LogEntry},
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
    /// The entry that the state holds already, and its term; (0, 0) for none.
    pub(crate) applied: (Index, Term),
}

/// How many ticks make one heartbeat interval.
pub(crate) const fn ticks_per_heartbeat() -> u64 {
    HEARTBEAT_TICKS as u64
}

/// One member's part in Raft.
pub(crate) struct Consensus {
    raw: RawNode<MemoryLog>,
    /// Between `ready` and `advance`.
    ready: Option<Ready>,
    boot: u64,
    seed: u64,
    /// The term and role for which the election timeout was last drawn.
    drawn_for: (Term, Role),
    /// As last given out for the log.
    saved: HardState,
    /// How far each follower has been told of commits, while this node leads.
    told: BTreeMap<u64, Index>,
    deferral: Deferral,
}

/// What must be made durable.
#[derive(Debug, Default)]
pub(crate) struct Unsaved {
    pub(crate) hard_state: Option<HardState>,
    pub(crate) entries: Vec<LogEntry>,
}

/// The first half of a step: what may leave at once, what must be durable first.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    /// Encoded messages and their receivers.
    pub(crate) messages: Vec<(NodeId, Bytes)>,
    pub(crate) unsaved: Option<Unsaved>,
    /// Confirmed reads: the sequence given, and the index to wait for.
    pub(crate) reads: Vec<(u64, Index)>,
}

/// The second half of a step.
#[derive(Debug, Default)]
pub(crate) struct Advanced {
    pub(crate) messages: Vec<(NodeId, Bytes)>,
    pub(crate) committed: Vec<LogEntry>,
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
        config: &ConsensusConfig,
        hard_state: HardState,
        entries: Vec<LogEntry>,
    ) -> Self {
        let election_tick = config.heartbeats_per_election * HEARTBEAT_TICKS;
        let raft_config = RaftConfig {
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
            applied: config.applied.0,
            ..RaftConfig::default()
        };
        let log = MemoryLog::new(&config.voters, config.applied, hard_state, entries);
        let logger = Logger::root(Discard, o!());
        let raw = RawNode::new(&raft_config, log, &logger)
            .expect("the configuration and a recovered log are valid");
        let mut consensus = Self {
            raw,
            ready: None,
            boot: config.boot,
            seed: config.seed,
            drawn_for: (0, Role::Joining),
            saved: hard_state,
            told: BTreeMap::new(),
            deferral: Deferral::default(),
        };
        consensus.draw_election_timeout();
        consensus
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
        self.draw_election_timeout();
    }

    /// The connection to a peer broke: messages to it may be lost.
    pub(crate) fn unreachable(&mut self, peer: NodeId) {
        self.raw.report_unreachable(peer.0);
    }

    /// Takes a message from a peer. One that no correct peer sends is dropped,
    /// with the reason.
    pub(crate) fn step(
        &mut self,
        from: NodeId,
        bytes: &Bytes,
        now_us: u64,
    ) -> Result<(), &'static str> {
        let message = Message::parse_from_carllerche_bytes(bytes)
            .map_err(|_| "does not decode as a Raft message")?;
        self.check(from, &message)?;
        if message.msg_type == MessageType::MsgReadIndex {
            self.serves(from, now_us);
        }
        // An error here says that the message does not matter any more.
        self.raw.step(message).ok();
        self.draw_election_timeout();
        Ok(())
    }

    /// Appends an entry to the log of this leader; false if it cannot now.
    pub(crate) fn propose(&mut self, data: Vec<u8>) -> bool {
        self.raw.raft.state == StateRole::Leader && self.raw.propose(Vec::new(), data).is_ok()
    }

    /// Whether a follower has acknowledged what is committed, and nothing that was sent
    /// to it or is about to be says so. Before that, a heartbeat could not tell it: that
    /// says no more than the follower has acknowledged.
    pub(crate) fn has_untold_commit(&self) -> bool {
        let raft = &self.raw.raft;
        let is_untold = |id: u64, matched: Index| {
            let told = self.told.get(&id).copied().unwrap_or(0);
            told < matched.min(raft.raft_log.committed) && !self.deferral.holds(id)
        };
        let mut followers = raft.prs().iter().filter(|(id, _)| **id != raft.id);
        raft.state == StateRole::Leader && followers.any(|(id, p)| is_untold(*id, p.matched))
    }

    /// Tells followers how much is committed, without waiting for an append that
    /// would say it in passing. Under load that is what happens, and it halves the
    /// messages and turns that an entry costs.
    pub(crate) fn tell_commit(&mut self) {
        self.raw.ping();
    }

    /// Asks for a confirmation that this group's leader still leads. `sequence`
    /// must never have been used before in this start of the process: a late
    /// answer to an earlier one would confirm this one on a deposed leader (etcd
    /// issue 20418). Node and boot make it unique in the cluster.
    pub(crate) fn confirm(&mut self, sequence: u64) {
        let mut context = self.context_prefix();
        context.extend_from_slice(&sequence.to_be_bytes());
        self.raw.read_index(context);
    }

    fn context_prefix(&self) -> Vec<u8> {
        let mut prefix = Vec::with_capacity(24);
        prefix.extend_from_slice(&self.raw.raft.id.to_be_bytes());
        prefix.extend_from_slice(&self.boot.to_be_bytes());
        prefix
    }

    fn confirmed(&self, state: &raft::ReadState) -> Option<(u64, Index)> {
        let sequence = state
            .request_ctx
            .strip_prefix(self.context_prefix().as_slice())?;
        Some((u64::from_be_bytes(sequence.try_into().ok()?), state.index))
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

    /// The first half of a step. `advance` must follow before anything else.
    pub(crate) fn prepare(&mut self, now_us: u64) -> Prepared {
        assert!(self.ready.is_none(), "prepare without advance");
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
        let messages = ready.take_messages();
        #[cfg(conclave_plant)]
        let messages = match crate::plant::is("ack-before-fsync") {
            true => [messages, ready.take_persisted_messages()].concat(),
            false => messages,
        };
        let prepared = Prepared {
            messages: encode(self.defer(messages, now_us)),
            unsaved: ready.must_sync().then(|| self.unsaved(&entries)),
            reads: ready
                .take_read_states()
                .iter()
                .filter_map(|s| self.confirmed(s))
                .collect(),
        };
        self.ready = Some(ready);
        prepared
    }

    /// What may leave now of these messages and of earlier ones.
    fn defer(&mut self, messages: Vec<Message>, now_us: u64) -> Vec<Message> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            self.deferral.forget();
            self.told.clear();
            return messages;
        }
        let others = raft.prs().iter().filter(|(id, _)| **id != raft.id);
        let matched = others.map(|(id, progress)| (*id, progress.matched));
        self.deferral.choose(matched, now_us);
        let mut leaving = self.deferral.pass(messages, now_us);
        for message in &mut leaving {
            self.note_told(message);
        }
        leaving
    }

    /// Notes what a message tells its receiver of commits: an append, no more than up to
    /// its last entry. One that was held back gets the newest that is known.
    fn note_told(&mut self, message: &mut Message) {
        let commit = match message.msg_type {
            MessageType::MsgAppend => {
                message.commit = message.commit.max(self.raw.raft.raft_log.committed);
                let last = message.index + message.entries.len() as u64;
                message.commit.min(last)
            }
            MessageType::MsgHeartbeat => message.commit,
            _ => return,
        };
        let told = self.told.entry(message.to).or_default();
        *told = commit.max(*told);
    }

    /// The second half, after what `prepare` gave out is durable.
    pub(crate) fn advance(&mut self, now_us: u64) -> Advanced {
        let Some(mut ready) = self.ready.take() else {
            return Advanced::default();
        };
        let mut messages = ready.take_persisted_messages();
        let mut committed = ready.take_committed_entries();
        let mut light = self.raw.advance_append(ready);
        messages.extend(light.take_messages());
        committed.extend(light.take_committed_entries());
        if let Some(commit) = light.commit_index() {
            self.raw.mut_store().hard_state.commit = commit;
        }
        self.raw.advance_apply();
        Advanced {
            messages: encode(self.defer(messages, now_us)),
            committed: committed.iter().map(log_entry).collect(),
        }
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
        let raft = &mut self.raw.raft;
        let shortest = raft.election_timeout() as u64;
        let mut bytes = [0; 25];
        bytes[..8].copy_from_slice(&self.seed.to_be_bytes());
        bytes[8..16].copy_from_slice(&raft.id.to_be_bytes());
        bytes[16..24].copy_from_slice(&raft.term.to_be_bytes());
        bytes[24] = drawn_for.1 as u8;
        let draw = xxhash_rust::xxh3::xxh3_64(&bytes) % shortest;
        let ticks = usize::try_from(shortest + draw).expect("a few dozen ticks");
        raft.set_randomized_election_timeout(ticks);
    }

    /// Shapes that raft-rs trusts a peer to keep.
    fn check(&self, from: NodeId, message: &Message) -> Result<(), &'static str> {
        use MessageType::{
            MsgAppend, MsgAppendResponse, MsgHeartbeat, MsgHeartbeatResponse, MsgReadIndex,
            MsgReadIndexResp, MsgRequestPreVote, MsgRequestPreVoteResponse, MsgRequestVote,
            MsgRequestVoteResponse, MsgTimeoutNow,
        };
        let last = self.last_index();
        if message.from != from.0 || message.to != self.raw.raft.id {
            return Err("names another sender or receiver");
        }
        if !self.raw.store().voters.contains(&from.0) {
            return Err("comes from no member");
        }
        if (message.term == 0) != (message.msg_type == MsgReadIndex) {
            return Err("has no term, or should have none");
        }
        match message.msg_type {
            MsgAppend => self.check_append(message),
            MsgHeartbeat if message.term >= self.term() && message.commit > last => {
                Err("commits more than this log holds")
            }
            MsgAppendResponse if message.reject && message.reject_hint > message.index => {
                Err("rejects something else than was sent")
            }
            MsgAppendResponse
                if !message.reject && message.term == self.term() && message.index > last =>
            {
                Err("acknowledges more than was sent")
            }
            MsgReadIndex | MsgReadIndexResp if message.entries.len() != 1 => {
                Err("asks for a read without a context")
            }
            MsgHeartbeat
            | MsgAppendResponse
            | MsgReadIndex
            | MsgReadIndexResp
            | MsgHeartbeatResponse
            | MsgRequestPreVote
            | MsgRequestPreVoteResponse
            | MsgRequestVote
            | MsgRequestVoteResponse
            | MsgTimeoutNow => Ok(()),
            _ => Err("has a type that members do not exchange"),
        }
    }

    fn check_append(&self, message: &Message) -> Result<(), &'static str> {
        let mut before = (message.index, message.log_term);
        if before.0 > 0 && before.1 == 0 {
            // raft-rs takes 0 for the term of everything behind the log.
            return Err("appends behind an entry without a term");
        }
        for entry in message.entries.iter() {
            if Some(entry.index) != before.0.checked_add(1)
                || entry.term < before.1
                || entry.term > message.term
            {
                return Err("appends entries out of order");
            }
            before = (entry.index, entry.term);
            // What was cut off cannot be compared, and raft-rs does not look at it.
            let replaces_committed = entry.index <= self.committed()
                && entry.index > self.raw.store().cut.0
                && self.raw.raft.raft_log.term(entry.index).ok() != Some(entry.term);
            if replaces_committed && message.term >= self.term() {
                return Err("replaces committed entries");
            }
        }
        Ok(())
    }
}

/// Raft's log in memory, as raft-rs reads it: what lies behind the newest entry
/// that was cut off.
struct MemoryLog {
    hard_state: RaftHardState,
    voters: Vec<u64>,
    /// The newest entry that is not held, and its term; (0, 0) if all are.
    cut: (Index, Term),
    /// The entry at index i is at i - 1 - the index of `cut`.
    entries: VecDeque<Entry>,
}

impl MemoryLog {
    fn new(
        voters: &[NodeId],
        applied: (Index, Term),
        hard_state: HardState,
        entries: Vec<LogEntry>,
    ) -> Self {
        let mut entries: VecDeque<Entry> = entries.into_iter().map(raft_entry).collect();
        // Of the entry before the first, only the term is needed; where the log
        // does not hold that one any more, its first one stands in for it.
        let cut = match entries.front().map(|first| (first.index, first.term)) {
            None => applied,
            Some((1, _)) => (0, 0),
            Some((first, _)) if first > applied.0 => applied,
            Some(first) => {
                entries.pop_front();
                first
            }
        };
        let last = cut.0 + entries.len() as u64;
        let hard_state = RaftHardState {
            term: hard_state.term,
            vote: hard_state.vote,
            commit: hard_state.commit.min(last).max(applied.0),
            ..RaftHardState::default()
        };
        Self {
            hard_state,
            voters: voters.iter().map(|node| node.0).collect(),
            cut,
            entries,
        }
    }

    fn append(&mut self, entries: &[Entry]) {
        if let Some(first) = entries.first() {
            let place = self.place(first.index).expect("committed entries stay");
            self.entries.truncate(place);
            assert_eq!(self.entries.len(), place, "a gap in the log");
            self.entries.extend(entries.iter().cloned());
        }
    }

    /// Forgets entries up to an index that is held.
    fn cut(&mut self, upto: Index) {
        if let Some(place) = self.place(upto)
            && let Some(newest) = self.entries.drain(..=place).next_back()
        {
            self.cut = (newest.index, newest.term);
        }
    }

    fn last(&self) -> Index {
        self.cut.0 + self.entries.len() as u64
    }

    /// Where an entry is or will be; `None` if it was cut off.
    fn place(&self, index: Index) -> Option<usize> {
        let place = index.checked_sub(self.cut.0 + 1)?;
        Some(usize::try_from(place).expect("indexes fit in memory"))
    }
}

impl Storage for MemoryLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let conf_state = ConfState::from((self.voters.clone(), Vec::new()));
        Ok(RaftState::new(self.hard_state.clone(), conf_state))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        assert!(
            high <= self.last() + 1,
            "raft asks for entries it has not appended"
        );
        let compacted = raft::Error::Store(StorageError::Compacted);
        let (Some(low), Some(high)) = (self.place(low), self.place(high)) else {
            return Err(compacted);
        };
        let entries = self.entries.range(low..high);
        let count = fitting(entries.clone(), max_size.into().unwrap_or(u64::MAX));
        Ok(entries.take(count).cloned().collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.cut.0 {
            return Ok(self.cut.1);
        }
        let place = self
            .place(index)
            .ok_or(raft::Error::Store(StorageError::Compacted))?;
        self.entries
            .get(place)
            .map(|entry| entry.term)
            .ok_or(raft::Error::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.cut.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, _: u64, _: u64) -> raft::Result<Snapshot> {
        // Checkpoints are not sent yet: a follower that needs one gets nothing.
        Err(raft::Error::Store(
            StorageError::SnapshotTemporarilyUnavailable,
        ))
    }
}

/// How many entries fit into so many bytes; the first always does.
fn fitting<'a>(entries: impl ExactSizeIterator<Item = &'a Entry>, bytes_max: u64) -> usize {
    let count = entries.len();
    let mut bytes = 0;
    let mut entries = entries;
    let over = entries.position(|entry| {
        bytes += u64::from(entry.compute_size());
        bytes > bytes_max
    });
    over.map_or(count, |over| over.max(1))
}

fn encode(messages: Vec<Message>) -> Vec<(NodeId, Bytes)> {
    messages
        .into_iter()
        .flat_map(split)
        .map(|message| {
            let bytes = message
                .write_to_bytes()
                .expect("writing to memory does not fail");
            (NodeId(message.to), Bytes::from(bytes))
        })
        .collect()
}

/// raft-rs joins all appends of a turn to one receiver, without limit; a follower
/// that is far behind would get everything at once. Several in a row say the same.
fn split(mut message: Message) -> Vec<Message> {
    if fitting(message.entries.iter(), limits::APPEND_BYTES_MAX) == message.entries.len() {
        return vec![message];
    }
    let mut entries: Vec<_> = message.take_entries().into();
    let mut parts = Vec::new();
    loop {
        let rest = entries.split_off(fitting(entries.iter(), limits::APPEND_BYTES_MAX));
        let mut part = message.clone();
        if let Some(last) = entries.last() {
            (message.index, message.log_term) = (last.index, last.term);
        }
        part.set_entries(entries.into());
        parts.push(part);
        if rest.is_empty() {
            return parts;
        }
        entries = rest;
    }
}

fn plain(hard_state: &RaftHardState) -> HardState {
    HardState {
        term: hard_state.term,
        vote: hard_state.vote,
        commit: hard_state.commit,
    }
}

fn log_entry(entry: &Entry) -> LogEntry {
    let kind = match entry.entry_type {
        EntryType::EntryNormal => EntryKind::Normal,
        EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => EntryKind::Membership,
    };
    LogEntry {
        index: entry.index,
        term: entry.term,
        kind,
        data: entry.data.clone(),
    }
}

fn raft_entry(entry: LogEntry) -> Entry {
    Entry {
        index: entry.index,
        term: entry.term,
        data: entry.data,
        entry_type: match entry.kind {
            EntryKind::Normal => EntryType::EntryNormal,
            EntryKind::Membership => EntryType::EntryConfChangeV2,
        },
        ..Entry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(sizes: &[usize]) -> Vec<Entry> {
        let entry = |(index, size): (u64, &usize)| Entry {
            index,
            term: index,
            data: vec![0; *size].into(),
            ..Entry::default()
        };
        (1..).zip(sizes).map(entry).collect()
    }

    #[test]
    fn the_first_entry_always_fits() {
        let entries = entries(&[100, 10, 10, 100]);
        assert_eq!(
            [1, 130, 1_000].map(|max| fitting(entries.iter(), max)),
            [1, 2, 4]
        );
        assert_eq!(fitting([].iter(), 1), 0);
    }

    #[test]
    fn a_long_append_goes_in_parts_that_join() {
        let mib = 1 << 20;
        let whole = entries(&[10, mib, 10, mib + 10, mib - 100, 20]);
        let mut message = Message::default();
        message.set_entries(whole.clone().into());
        let parts = split(message);
        let lengths: Vec<_> = parts.iter().map(|part| part.entries.len()).collect();
        assert_eq!(lengths, [1, 1, 1, 1, 2]);
        let before: Vec<_> = parts.iter().map(|p| (p.index, p.log_term)).collect();
        assert_eq!(before, [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4)]);
        let joined: Vec<_> = parts.iter().flat_map(|p| p.entries.to_vec()).collect();
        assert_eq!(joined, whole);
        assert_eq!(split(Message::default()).len(), 1);
    }

    fn log_entries(indexes: std::ops::Range<u64>) -> Vec<LogEntry> {
        let entry = |index| LogEntry {
            index,
            term: index / 10 + 1,
            kind: EntryKind::Normal,
            data: Bytes::new(),
        };
        indexes.map(entry).collect()
    }

    fn memory_log(applied: Index, indexes: std::ops::Range<u64>) -> MemoryLog {
        let hard_state = HardState {
            commit: 7,
            ..HardState::default()
        };
        let applied = (applied, applied / 10 + 1);
        MemoryLog::new(&[NodeId(1)], applied, hard_state, log_entries(indexes))
    }

    #[test]
    fn a_log_goes_on_where_a_checkpoint_ends() {
        // Behind it, from the entry after it, and from one before it.
        for (first, expected) in [(26, 26), (20, 21)] {
            let log = memory_log(25, first..31);
            assert_eq!(log.first_index().unwrap(), expected);
            assert_eq!(log.last_index().unwrap(), 30);
            assert_eq!(log.term(expected - 1).unwrap(), 3);
            assert_eq!(log.hard_state.commit, 25);
            assert!(log.term(expected - 2).is_err());
        }
        let nothing = memory_log(25, 26..26);
        assert_eq!((nothing.first_index().unwrap(), nothing.last()), (26, 25));
        assert_eq!(nothing.term(25).unwrap(), 3);
    }

    #[test]
    fn a_log_that_was_cut_keeps_the_term_before_its_first_entry() {
        let mut log = memory_log(0, 1..31);
        log.cut(0);
        assert_eq!(log.first_index().unwrap(), 1);
        log.cut(19);
        log.cut(12);
        assert_eq!(log.first_index().unwrap(), 20);
        assert_eq!((log.term(19).unwrap(), log.term(20).unwrap()), (2, 3));
        let context = || GetEntriesContext::empty(false);
        let entries = log.entries(20, 31, None, context()).unwrap();
        assert_eq!(entries.len(), 11);
        assert!(log.entries(19, 31, None, context()).is_err());
        log.append(&entries[5..6]);
        assert_eq!(log.last(), 25);
        log.cut(25);
        assert_eq!((log.first_index().unwrap(), log.last()), (26, 25));
    }
}
