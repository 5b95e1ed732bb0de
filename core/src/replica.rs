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
//! - a command goes into the entry that this turn proposes, or, once, to the
//!   leader. It is answered when this node applies it. If the leader or the term
//!   is lost first, the answer is [`Failure::OutcomeUnknown`];
//! - a read waits for a quorum's confirmation that began after it arrived, and
//!   for this node to apply what was committed then;
//! - a renewal does the same, always on the leader, and never enters the log.
//!
//! Not done here: retries of commands. Only a client repeats, since only it can
//! say that two requests are the same.

mod admission;
mod api;
mod commands;
mod compaction;
mod divergence;
mod hashing;
mod install;
mod leadership;
mod quota;
mod reads;
mod renewals;
mod versions;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    mem,
    sync::Arc,
};

use bytes::Bytes;
use conclave_proto::internal::{
    Forward, ForwardRefused, Held, Hello, HelloReply, Origin, PeerMessage, RenewalReplies,
    RenewalReply, Renewals, command, peer_message,
};

pub use self::api::{
    Answer, AnswerBody, Begun, Config, Event, EventBody, Failure, Fatal, Finished, Input, Now,
    Query, Role, Status,
};
use self::{
    admission::Admission,
    divergence::Digests,
    hashing::Hashings,
    install::Install,
    leadership::{Leadership, Taken},
    reads::{Ask, AskBody, Reads, Renewer, Wish},
};
pub use self::{compaction::Retention, install::Fetch};
use crate::{
    checkpoint::Part,
    clock::Clock,
    consensus::{Consensus, ConsensusConfig, Unsaved, ticks_per_heartbeat},
    ids::{Attachment, Index, NodeId, RequestNumber, Revision, SessionId, Term},
    keyspace::{Filter, KeyRange, Piece, RevisionError, reach, txn},
    limits,
    log::{Batch, EntryKind, Facts, LogEntry, Recovered},
    machine::{Machine, Outcome, Place},
    session::Session,
    state::{Applied, Resolved, State},
    watch::{self, Hub, Notice},
};

/// Between two attempts to propose an entry for timers that are due.
const TIMER_RETRY_US: u64 = 1_000;

/// How long followers may not know of a commit, if no append tells them. Clients
/// of a follower who wait for a lock are granted it that much later on an idle
/// cluster; answers to their own requests are not delayed.
const TELL_COMMIT_WITHIN_US: u64 = 1_000;

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
    /// The entry behind which the log begins anew, with the batch of this turn.
    base: Option<(Index, Term)>,

    outbox: Vec<(NodeId, PeerMessage)>,
    /// Answers to other members by node and boot: one message a turn for all.
    refusals: BTreeMap<(NodeId, u64), Vec<RequestNumber>>,
    renewal_replies: BTreeMap<(NodeId, u64), Vec<RenewalReply>>,
    /// Must not leave before the batch of this turn is durable.
    outbox_durable: Vec<(NodeId, PeerMessage)>,
    facts_changed: bool,
    output: Finished<M>,
    status: Status,
    /// As of `status.members`.
    published_seen: u64,
}

#[derive(Debug)]
struct Readable<M: Machine> {
    number: RequestNumber,
    query: Query<M>,
    /// After this it is given up, by CLOCK_BOOTTIME.
    deadline_us: u64,
}

/// Commands and renewals of one turn, before it is clear who leads.
#[derive(Debug, Default)]
struct Arrived {
    commands: Vec<(RequestNumber, command::Body)>,
    forwarded: Vec<(NodeId, Forward)>,
    renewals: Vec<Wish>,
}

#[derive(Debug)]
struct Pending {
    /// The leader and term under which it was proposed or passed on.
    under: (NodeId, Term),
    deadline_us: u64,
}

#[derive(Debug)]
struct PendingRenewal {
    session: SessionId,
    under: (NodeId, Term),
    deadline_us: u64,
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
            base: None,
            outbox: Vec::new(),
            refusals: BTreeMap::new(),
            renewal_replies: BTreeMap::new(),
            outbox_durable: Vec::new(),
            facts_changed: false,
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
        let timer_us = self.leadership.as_ref().and_then(|leadership| {
            let due_us = self.state.next_due()?.saturating_mul(1_000);
            let wait_us = due_us.saturating_sub(self.clock.micros());
            let under_way = leadership.timers_entry > self.state.applied();
            (!under_way).then(|| self.now.boot_us.saturating_add(wait_us.max(TIMER_RETRY_US)))
        });
        [expiry_us, tell_us, timer_us, self.consensus.next_due_us()]
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
        self.tell_commit();
        self.ask_for_confirmation();
        let prepared = self.consensus.prepare(self.now.boot_us);
        for (sequence, index) in prepared.reads {
            self.reads.confirm(sequence, index, self.leader_and_term());
        }
        let mut messages = self.take_outbox();
        messages.extend(prepared.messages.into_iter().map(raft_message));
        Ok(Begun {
            messages,
            batch: self.batch(prepared.unsaved),
        })
    }

    /// The second half, once `Begun::batch` is durable: applies and answers.
    pub fn finish(&mut self) -> Result<Finished<M>, Fatal> {
        let advanced = self.consensus.advance(self.now.boot_us);
        self.output.messages = mem::take(&mut self.outbox_durable);
        self.output
            .messages
            .extend(advanced.messages.into_iter().map(raft_message));
        // Without a state, nobody can apply them.
        if self.consensus.has_state() {
            self.unapplied.extend(advanced.committed);
        }
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
        let messages = self.take_outbox();
        self.output.messages.extend(messages);
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

    fn receive(&mut self, from: NodeId, message: PeerMessage) -> Result<(), Fatal> {
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

    fn receive_hello(&mut self, from: NodeId, hello: &Hello) {
        if !self.facts.voters.contains(&from) || hello.incarnation == 0 {
            return;
        }
        let incarnation = hello.incarnation;
        let known = *self.facts.incarnations.entry(from).or_insert_with(|| {
            self.facts_changed = true;
            incarnation
        });
        let reply = HelloReply { incarnation, known };
        self.outbox_durable
            .push(to(from, peer_message::Message::HelloReply(reply)));
    }

    fn receive_hello_reply(&mut self, from: NodeId, reply: &HelloReply) -> Result<(), Fatal> {
        let Some(admission) = &mut self.admission else {
            return Ok(());
        };
        if reply.incarnation != self.incarnation {
            return Ok(());
        }
        if reply.known != self.incarnation {
            return Err(Fatal::Replaced {
                node: self.config.node,
            });
        }
        admission.known_by(from);
        Ok(())
    }

    /// The connection to a peer broke: what was on its way there, or the answer
    /// that was on its way back, may be lost.
    fn lose_peer(&mut self, peer: NodeId) {
        self.consensus.unreachable(peer);
        self.fail_pending(|under| under.0 == peer);
    }

    fn tick(&mut self) {
        if self.now.boot_us < self.next_tick_us {
            return;
        }
        // One tick a turn, however late: a node that stood still must first hear
        // what happened meanwhile.
        self.next_tick_us = self.now.boot_us + self.tick_us();
        self.has_ticked = true;
        let Some(admission) = &self.admission else {
            self.consensus.tick(self.facts.voters.len() == 1);
            self.tell_held();
            return;
        };
        if admission.is_complete() {
            self.admission = None;
            self.facts.admitted = true;
            self.facts_changed = true;
            return;
        }
        let hello = Hello {
            incarnation: self.incarnation,
        };
        for peer in admission.unanswered() {
            self.outbox
                .push(to(peer, peer_message::Message::Hello(hello)));
        }
    }

    /// Tells the others how much of the log nobody needs any more, if that has grown.
    fn tell_held(&mut self) {
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

    /// Makes or drops what belongs to a term of leadership.
    fn follow_role(&mut self) {
        let term = self.consensus.term();
        let leads = self.consensus.role() == Role::Leader;
        if leads
            && self
                .leadership
                .as_ref()
                .is_some_and(|leadership| leadership.term == term)
        {
            return;
        }
        if let Some(leadership) = self.leadership.take() {
            #[cfg(conclave_plant)]
            {
                self.old_liveness = leadership.liveness;
            }
            let parked = leadership.parked.into_values().flatten();
            let given_up = leadership.early.into_iter().chain(parked);
            for renewal in given_up.chain(self.reads.take_renewals()) {
                self.refuse_renewal(renewal.wish.from);
            }
        }
        if leads {
            self.clock.raise(self.state.system().log_time());
            self.leadership = Some(Leadership::new(term));
            self.taken = Taken::new(term);
        }
    }

    /// Before its first commit a leader drops the question without a word. A
    /// follower that knows of a commit in this term knows that the leader does.
    fn can_confirm(&self) -> bool {
        self.consensus.leader().is_some() && self.consensus.has_committed_in_term()
    }

    /// Tells followers of a commit when it is time and no append has.
    fn tell_commit(&mut self) {
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        if leadership
            .tell_commit_us
            .is_some_and(|at| at <= self.now.boot_us)
        {
            leadership.tell_commit_us = None;
            if self.consensus.has_untold_commit() {
                self.consensus.tell_commit();
            }
        }
    }

    fn plan_to_tell_commit(&mut self) {
        if let Some(leadership) = &mut self.leadership {
            let at = leadership
                .tell_commit_us
                .unwrap_or(self.now.boot_us + TELL_COMMIT_WITHIN_US);
            leadership.tell_commit_us = self.consensus.has_untold_commit().then_some(at);
        }
    }

    fn ask_for_confirmation(&mut self) {
        let of = self.leader_and_term();
        self.reads.renew_stale(of, self.now.boot_us);
        if let Some(of) = of
            && self.reads.has_fresh()
            && self.can_confirm()
        {
            let sequence = self.reads.ask(of, self.now.boot_us + self.election_us());
            self.consensus.confirm(sequence);
        }
    }

    fn answer_reads(&mut self) {
        for ask in self.reads.take_ready(self.state.applied()) {
            match ask.body {
                AskBody::Read { number, query } => self.may_be_read(number, query),
                AskBody::Renewal(renewal) => self.renew(renewal),
            }
        }
        self.read_steps_left = limits::READ_STEPS_PER_TURN_MAX;
        while self.read_steps_left > 0
            && let Some(Readable { number, query, .. }) = self.readable.pop_front()
        {
            if let Query::Swept(revision) = query {
                let deadline_us = self.request_deadline_us();
                self.sweeps.push((number, revision, deadline_us));
            } else {
                let body = self.query(query);
                self.answer(number, body);
            }
            self.took_steps(limits::READ_STEPS_EACH);
        }
        self.answer_sweeps();
    }

    /// A read is answered as soon as a turn has time for it.
    fn may_be_read(&mut self, number: RequestNumber, query: Query<M>) {
        if self.readable.len() >= limits::READABLE_MAX {
            return self.fail(number, Failure::Overloaded);
        }
        self.readable.push_back(Readable {
            number,
            query,
            deadline_us: self.request_deadline_us(),
        });
    }

    fn took_steps(&mut self, steps: usize) {
        self.read_steps_left = self.read_steps_left.saturating_sub(steps);
    }

    /// A sweep that is late is answered, too: what was asked for is done, only its
    /// traces are not gone yet.
    fn answer_sweeps(&mut self) {
        let (keyspace, now_us) = (self.state.keyspace(), self.now.boot_us);
        let is_over = |(_, revision, deadline_us): &(RequestNumber, Revision, u64)| {
            keyspace.is_swept(*revision) || *deadline_us <= now_us
        };
        let over: Vec<_> = self.sweeps.extract_if(.., |sweep| is_over(sweep)).collect();
        for (number, ..) in over {
            self.answer(number, AnswerBody::Done);
        }
    }

    fn range(
        &mut self,
        range: &KeyRange,
        revision: Option<Revision>,
        filter: &Filter,
        limit: usize,
    ) -> Result<Piece, RevisionError> {
        let keyspace = self.state.keyspace();
        let at = revision.unwrap_or_else(|| keyspace.revision());
        keyspace.check_readable(at)?;
        let steps = self
            .read_steps_left
            .clamp(limits::READ_STEPS_MIN, limits::READ_STEPS_MAX);
        let piece = keyspace.piece(range, at, filter, limit, steps);
        self.took_steps(piece.steps);
        Ok(piece)
    }

    fn query(&mut self, query: Query<M>) -> AnswerBody<M> {
        if let Query::Range {
            range,
            revision,
            filter,
            limit,
        } = query
        {
            return AnswerBody::Range(self.range(&range, revision, &filter, limit));
        }
        let (keyspace, sessions) = (self.state.keyspace(), self.state.sessions());
        let (body, steps) = match query {
            // A range was read above.
            Query::Barrier | Query::Swept(_) | Query::Range { .. } => (AnswerBody::Done, 0),
            Query::Compare(compares) => {
                let compared = txn::compare(keyspace, &compares);
                let steps = reach::of_compares(keyspace, &compares);
                (AnswerBody::Compared(compared), steps)
            }
            Query::Session(id) => match sessions.get(id) {
                Some(session) => {
                    let face = session.face(keyspace.keys_bound(id));
                    (AnswerBody::Session(face), limits::READ_STEPS_LISTED)
                }
                None => (self.session_ended(id), 0),
            },
            Query::Sessions { after, limit } => {
                let mut behind = sessions.behind(after);
                let listed = behind.by_ref().take(limit);
                let face = |(id, session): (SessionId, &Session)| {
                    (id, session.face(keyspace.keys_bound(id)))
                };
                let listed: Vec<_> = listed.map(face).collect();
                let steps = listed.len() * limits::READ_STEPS_LISTED;
                let body = AnswerBody::Sessions {
                    log_time_ms: self.state.system().log_time(),
                    sessions: listed,
                    more: behind.next().is_some(),
                };
                (body, steps)
            }
            Query::SessionIds => {
                let ids = sessions.iter().map(|(id, _)| id).collect();
                (AnswerBody::SessionIds(ids), sessions.len())
            }
            Query::KeysOf(id) if sessions.get(id).is_some() => {
                let keys = keyspace.keys_of(id).cloned().collect();
                (AnswerBody::Keys(keys), keyspace.keys_bound(id))
            }
            Query::KeysOf(id) => (self.session_ended(id), 0),
            Query::Alarms => {
                let raised_by = self.state.system().out_of_space();
                let raised_by = raised_by.iter().copied().collect();
                (AnswerBody::Alarms(raised_by), 0)
            }
            Query::Machine(query) => {
                let answer = self.state.machine().query(self.state.view(), query);
                let steps = M::work(&answer);
                (AnswerBody::Query(answer), steps)
            }
        };
        self.took_steps(steps);
        body
    }

    fn session_ended(&self, id: SessionId) -> AnswerBody<M> {
        AnswerBody::SessionEnded(self.state.system().end_reason(id))
    }

    /// Whether clients are told what is in this node's state: not before it is one of
    /// the members, nor while it waits for a checkpoint.
    fn may_read(&self) -> bool {
        !self.is_behind() && self.admission.is_none()
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

    /// Applies an entry; what it took, as [`Applied::work`] has it.
    fn apply(&mut self, entry: &LogEntry) -> Result<usize, Fatal> {
        if entry.kind == EntryKind::Membership {
            let what = "a change of membership".to_owned();
            return Err(Fatal::Unknown {
                index: entry.index,
                what,
            });
        }
        #[cfg(conclave_plant)]
        crate::plant::note_node_term(self.consensus.term());
        let (node, boot) = (self.config.node.0, self.config.boot);
        let is_own = |origin: &Origin| origin.node == node && origin.boot == boot;
        let applied = self
            .state
            .apply_for(entry.index, entry.term, &entry.data, is_own)?;
        self.watchers
            .advance(self.state.keyspace(), &mut self.output.notices);
        self.note_own_digest()?;
        if self.leadership.is_none() && !entry.data.is_empty() {
            self.clock.follow(self.state.system().log_time());
        }
        let Applied {
            outcomes,
            resolved,
            events,
            lives,
            work,
        } = applied;
        for (origin, outcome) in outcomes {
            if let Some(leadership) = &mut self.leadership
                && origin.node != self.config.node.0
            {
                // A client of that node waits for it to apply this.
                leadership.tell_commit_us = Some(self.now.boot_us);
            }
            if self.is_mine(&origin) && self.pending.remove(&origin.number).is_some() {
                match outcome {
                    Outcome::Done(answer) => self.output.answers.push((origin.number, Ok(answer))),
                    Outcome::Waiting(place) => {
                        self.wait_at(place, origin.number);
                    }
                }
            }
        }
        for resolved in resolved {
            self.resolve(resolved, entry.term);
        }
        self.output.events.extend(events);
        self.follow_lives(entry.term, &lives);
        Ok(work)
    }

    fn wait_at(&mut self, place: Place, number: RequestNumber) {
        // Without a number they are those of different callers, who all wait.
        let has_number = self.state.sessions().waits_at(&place).is_some();
        let waiting = self.waiting.entry(place).or_default();
        waiting.push(number);
        if has_number && waiting.len() > limits::REQUESTS_PER_PLACE_MAX {
            let oldest = waiting.remove(0);
            self.fail(oldest, Failure::OutcomeUnknown);
        }
    }

    fn resolve(&mut self, resolved: Resolved<M>, term: Term) {
        let Resolved {
            place,
            revision,
            result,
        } = resolved;
        for number in self.waiting.remove(&place).unwrap_or_default() {
            let body = AnswerBody::Machine(result.clone());
            self.output.answers.push((
                number,
                Ok(Answer {
                    revision,
                    term,
                    body,
                }),
            ));
        }
    }

    /// Commands on their way under another leader or in another term than now
    /// may or may not be applied one day; nobody will tell this node.
    fn fail_what_lost_its_leader(&mut self) {
        let now_under = self.leader_and_term();
        if now_under == self.served_under {
            return;
        }
        self.served_under = now_under;
        self.fail_pending(|under| Some(under) != now_under);
    }

    /// Gives up what is on its way under certain leaders and terms.
    fn fail_pending(&mut self, lost: impl Fn((NodeId, Term)) -> bool) {
        let commands = self
            .pending
            .extract_if(.., |_, pending| lost(pending.under));
        let renewals = self
            .renewals
            .extract_if(.., |_, renewal| lost(renewal.under));
        let numbers = commands
            .map(|(number, _)| number)
            .chain(renewals.map(|(number, _)| number));
        self.output
            .answers
            .extend(numbers.map(|number| (number, Err(Failure::OutcomeUnknown))));
    }

    fn give_up_late(&mut self) {
        self.give_up_late_hashings();
        let now_us = self.now.boot_us;
        let leader = self.consensus.leader();
        for ask in self.reads.take_late(now_us) {
            match ask.body {
                AskBody::Read { number, .. } => self.fail(number, Failure::NotLeader { leader }),
                AskBody::Renewal(renewal) => {
                    if !renewal.wish.only_asks
                        && let Some(leadership) = &mut self.leadership
                        && let Some(liveness) = &mut leadership.liveness
                    {
                        liveness.renewal_over(renewal.wish.of.session, None);
                    }
                    self.refuse_renewal(renewal.wish.from);
                }
            }
        }
        while let Some(late) = self.readable.front()
            && late.deadline_us <= now_us
        {
            let number = late.number;
            self.readable.pop_front();
            self.fail(number, Failure::Overloaded);
        }
        // Numbers grow with time, so the oldest are first. What was proposed here
        // ends with this term: a leader that reaches no quorum steps down.
        while let Some((&number, pending)) = self.pending.first_key_value()
            && pending.deadline_us <= now_us
            && pending.under.0 != self.config.node
        {
            self.pending.remove(&number);
            self.fail(number, Failure::OutcomeUnknown);
        }
        while let Some((&number, renewal)) = self.renewals.first_key_value()
            && renewal.deadline_us <= now_us
        {
            self.renewals.remove(&number);
            self.fail(number, Failure::OutcomeUnknown);
        }
    }

    fn answer(&mut self, number: RequestNumber, body: AnswerBody<M>) {
        let revision = self.state.keyspace().revision();
        let term = self.consensus.term();
        self.output.answers.push((
            number,
            Ok(Answer {
                revision,
                term,
                body,
            }),
        ));
    }

    fn fail(&mut self, number: RequestNumber, failure: Failure) {
        self.output.answers.push((number, Err(failure)));
    }

    fn batch(&mut self, unsaved: Option<Unsaved>) -> Option<Batch> {
        let facts = mem::take(&mut self.facts_changed).then(|| self.facts.clone());
        let base = self.base.take();
        if unsaved.is_none() && facts.is_none() && base.is_none() {
            return None;
        }
        let Unsaved {
            hard_state,
            entries,
        } = unsaved.unwrap_or_default();
        // With a base goes that it is committed.
        let hard_state = hard_state.or_else(|| base.map(|_| self.consensus.hard_state()));
        Some(Batch {
            hard_state,
            facts,
            base,
            entries,
        })
    }

    fn update_status(&mut self) {
        let system = self.state.system();
        if system.publications() != self.published_seen {
            self.published_seen = system.publications();
            let members = system.members().iter();
            let members =
                members.map(|(id, member)| (*id, member.name.clone(), member.client_urls.clone()));
            self.status.members = Arc::new(members.collect());
        }
        self.status.term = self.consensus.term();
        self.status.leader = self.consensus.leader();
        self.status.role = match self.admission {
            Some(_) => Role::Joining,
            None => self.consensus.role(),
        };
        self.status.applied = self.state.applied();
        self.status.committed = self.consensus.committed();
        self.status.last = self.consensus.last_index();
        self.status.revision = self.state.keyspace().revision();
        self.status.compacted = self.state.keyspace().compacted();
        self.status.sessions = self.state.sessions().len();
        self.status.keys = self.state.keyspace().len();
        self.status.state_bytes = self.state.bytes();
        self.status.watching = self.watchers.load();
        self.status.is_behind = self.is_behind();
        let out_of_space = self.state.system().out_of_space();
        self.status.out_of_space = out_of_space.iter().copied().collect();
    }

    fn take_outbox(&mut self) -> Vec<(NodeId, PeerMessage)> {
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

    fn leader_and_term(&self) -> Option<(NodeId, Term)> {
        self.consensus
            .leader()
            .map(|leader| (leader, self.consensus.term()))
    }

    fn origin(&self, number: RequestNumber) -> Origin {
        Origin {
            node: self.config.node.0,
            boot: self.config.boot,
            number,
        }
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

    /// Long enough for an election.
    fn request_deadline_us(&self) -> u64 {
        self.now.boot_us + 3 * self.election_us()
    }
}

fn to(node: NodeId, message: peer_message::Message) -> (NodeId, PeerMessage) {
    (
        node,
        PeerMessage {
            message: Some(message),
        },
    )
}

fn raft_message((node, bytes): (NodeId, Bytes)) -> (NodeId, PeerMessage) {
    to(node, peer_message::Message::Raft(bytes))
}
