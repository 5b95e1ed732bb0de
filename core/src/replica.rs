//! One member of the cluster as a step function: [`Replica`].
//!
//! Everything happens in turns. A turn takes in what has arrived, and has two
//! halves. [`Replica::begin`] hands it to consensus; what may leave before
//! anything is durable leaves with it, and so does the batch that must be made
//! durable. [`Replica::finish`], called when that is done, applies what is
//! committed and gives out the answers. No clock, no disk, no network and no
//! randomness in here: the loop thread ([`crate::node`]) and the simulator drive
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
mod leadership;
mod reads;

use std::{collections::BTreeMap, mem, sync::Arc};

use bytes::Bytes;
use conclave_proto::internal::{
    Command, Entry, ExpireSessions, Forward, ForwardRefused, Hello, HelloReply, Origin,
    PeerMessage, PublishMember, Renewal, RenewalReplies, RenewalReply, Renewals, Stamp, command,
    peer_message, renewal_reply,
};
use prost::Message as _;

pub use self::api::{
    Answer, AnswerBody, Begun, Config, Event, EventBody, Failure, Fatal, Finished, Input, Now,
    Query, Role, Status,
};
use self::{
    admission::Admission,
    leadership::Leadership,
    reads::{Ask, AskBody, Reads, RenewalAsk, Renewer},
};
use crate::{
    APPLY_VERSION,
    clock::Clock,
    consensus::{Consensus, ConsensusConfig, Unsaved, ticks_per_heartbeat},
    ids::{Index, NodeId, RequestNumber, SessionId, Term},
    limits,
    liveness::Liveness,
    log::{Batch, EntryKind, Facts, LogEntry, Recovered},
    machine::{Machine, Outcome, Place},
    state::{Applied, Life, Resolved, State},
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
    next_publish_us: u64,

    /// While this directory is new.
    admission: Option<Admission>,
    /// While this node leads.
    leadership: Option<Leadership>,
    /// The leader and term at the end of the last turn.
    served_under: Option<(NodeId, Term)>,

    /// What arrived in this turn.
    arrived: Arrived,
    /// Commands of this node's clients on their way.
    pending: BTreeMap<RequestNumber, Pending>,
    /// Requests of this node's clients that have a place in a queue.
    waiting: BTreeMap<Place, Vec<RequestNumber>>,
    reads: Reads<M>,
    /// Renewals of this node's clients on their way to the leader.
    renewals: BTreeMap<RequestNumber, PendingRenewal>,

    outbox: Vec<(NodeId, PeerMessage)>,
    /// Must not leave before the batch of this turn is durable.
    outbox_durable: Vec<(NodeId, PeerMessage)>,
    facts_changed: bool,
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
    renewals: Vec<(Renewer, SessionId)>,
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
    /// The leader said that the session ended; why is in this node's state once
    /// it has applied this entry.
    ended_by: Option<Index>,
}

impl<M: Machine> Replica<M> {
    /// A replica over what its log held. Entries are applied as they are learnt
    /// to be committed.
    pub fn new(config: Config, recovered: Recovered, now: Now) -> Self {
        let Recovered {
            identity,
            hard_state,
            facts,
            entries,
        } = recovered;
        let consensus_config = ConsensusConfig {
            node: config.node,
            voters: facts.voters.clone(),
            boot: config.boot,
            seed: config.seed,
            heartbeats_per_election: usize::try_from(config.election_ms / config.heartbeat_ms)
                .expect("validated to be a small number"),
        };
        let admission = (!facts.admitted).then(|| Admission::new(config.node, &facts.voters));
        Self {
            consensus: Consensus::new(&consensus_config, hard_state, entries),
            clock: Clock::new(now, config.election_ms * 1_000),
            state: State::new(identity.cluster),
            incarnation: identity.incarnation,
            facts,
            config,
            now,
            next_tick_us: now.boot_us,
            next_publish_us: now.boot_us,
            admission,
            leadership: None,
            served_under: None,
            arrived: Arrived::default(),
            pending: BTreeMap::new(),
            waiting: BTreeMap::new(),
            reads: Reads::default(),
            renewals: BTreeMap::new(),
            outbox: Vec::new(),
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

    /// What this node knows, as of the end of its last turn.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// When the next turn is due although nothing arrives, by CLOCK_BOOTTIME in
    /// microseconds.
    pub fn next_turn_us(&self) -> u64 {
        if self.consensus.has_ready() || (self.reads.has_fresh() && self.can_confirm()) {
            return self.now.boot_us;
        }
        let timer_us = self.leadership.as_ref().and_then(|leadership| {
            let due_us = self.state.machine().next_due()?.saturating_mul(1_000);
            let wait_us = due_us.saturating_sub(self.clock.micros());
            let under_way = leadership.timers_entry > self.state.applied();
            (!under_way).then(|| self.now.boot_us + wait_us.max(TIMER_RETRY_US))
        });
        timer_us.map_or(self.next_tick_us, |timer_us| {
            timer_us.min(self.next_tick_us)
        })
    }

    /// The first half of a turn: takes in what has arrived.
    pub fn begin(
        &mut self,
        now: Now,
        inputs: impl IntoIterator<Item = Input<M>>,
    ) -> Result<Begun, Fatal> {
        self.now = now;
        self.clock.advance(now);
        for input in inputs {
            self.take(input)?;
        }
        self.tick();
        self.follow_role();
        self.dispatch();
        self.ask_for_confirmation();
        let prepared = self.consensus.prepare();
        for (sequence, index) in prepared.reads {
            self.reads.confirm(sequence, index, self.leader_and_term());
        }
        let mut messages = mem::take(&mut self.outbox);
        messages.extend(prepared.messages.into_iter().map(raft_message));
        Ok(Begun {
            messages,
            batch: self.batch(prepared.unsaved),
        })
    }

    /// The second half, once `Begun::batch` is durable: applies and answers.
    pub fn finish(&mut self) -> Result<Finished<M>, Fatal> {
        let advanced = self.consensus.advance();
        self.output.messages = mem::take(&mut self.outbox_durable);
        self.output
            .messages
            .extend(advanced.messages.into_iter().map(raft_message));
        for entry in advanced.committed {
            self.apply(&entry)?;
        }
        self.follow_role();
        self.fail_what_lost_its_leader();
        self.answer_reads();
        self.give_up_late();
        self.output.messages.append(&mut self.outbox);
        self.update_status();
        Ok(mem::take(&mut self.output))
    }

    // --- taking in -------------------------------------------------------

    fn take(&mut self, input: Input<M>) -> Result<(), Fatal> {
        match input {
            Input::Peer { from, message } => return self.receive(from, message),
            Input::PeerLost { peer } => self.lose_peer(peer),
            Input::Command { number, body } => self.arrived.commands.push((number, body)),
            Input::Read { number, query } => self.reads.add(Ask {
                deadline_us: self.request_deadline_us(),
                body: AskBody::Read { number, query },
            }),
            Input::Renew { number, session } => {
                self.arrived.renewals.push((Renewer::Here(number), session));
            }
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
            Message::Raft(bytes) => {
                if let Err(why) = self.consensus.step(from, &bytes) {
                    tracing::warn!(peer = %from, why, "dropped a malformed message");
                }
            }
            Message::Forward(forward) => self.arrived.forwarded.push((from, forward)),
            Message::ForwardRefused(refused) => self.receive_refusal(&refused),
            Message::Renewals(renewals) => {
                let Renewals { boot, renewals } = renewals;
                self.arrived
                    .renewals
                    .extend(renewals.into_iter().map(|renewal| {
                        let number = renewal.number;
                        (
                            Renewer::There {
                                node: from,
                                boot,
                                number,
                            },
                            SessionId(renewal.session_id),
                        )
                    }));
            }
            Message::RenewalReplies(replies) => self.receive_renewal_replies(replies),
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

    fn receive_refusal(&mut self, refused: &ForwardRefused) {
        if refused.boot != self.config.boot {
            return;
        }
        let leader = self.consensus.leader();
        for number in &refused.numbers {
            if self.pending.remove(number).is_some() {
                self.fail(*number, Failure::NotLeader { leader });
            }
        }
    }

    fn receive_renewal_replies(&mut self, replies: RenewalReplies) {
        use renewal_reply::Outcome;
        if replies.boot != self.config.boot {
            return;
        }
        for RenewalReply {
            number,
            outcome,
            ttl_ms,
            applied,
        } in replies.replies
        {
            match Outcome::try_from(outcome) {
                Ok(Outcome::Renewed) if self.renewals.remove(&number).is_some() => {
                    self.answer(number, AnswerBody::Renewed { ttl_ms });
                }
                Ok(Outcome::Refused) if self.renewals.remove(&number).is_some() => {
                    let leader = self.consensus.leader();
                    self.fail(number, Failure::NotLeader { leader });
                }
                Ok(Outcome::Ended) => {
                    if let Some(renewal) = self.renewals.get_mut(&number) {
                        renewal.ended_by = Some(applied);
                    }
                }
                // Not waited for any more, or of a newer version.
                Ok(Outcome::Renewed | Outcome::Refused) | Err(_) => {}
            }
        }
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
        let Some(admission) = &self.admission else {
            self.consensus.tick(self.facts.voters.len() == 1);
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
                .push(to(peer, peer_message::Message::Hello(hello.clone())));
        }
    }

    // --- leading and following -------------------------------------------

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
            let given_up = leadership.early.into_iter().chain(leadership.parked);
            for renewal in given_up.chain(self.reads.take_renewals()) {
                self.refuse_renewal(&renewal);
            }
        }
        if leads {
            self.clock.raise(self.state.system().log_time());
            self.leadership = Some(Leadership::new(term));
        }
    }

    /// Sends commands and renewals of this turn where they belong.
    fn dispatch(&mut self) {
        let arrived = mem::take(&mut self.arrived);
        if self.leadership.is_some() {
            self.lead(arrived);
        } else {
            let Arrived {
                commands,
                forwarded,
                renewals,
            } = arrived;
            self.refuse_forwarded(forwarded);
            match self.consensus.leader() {
                Some(leader) if leader != self.config.node => {
                    self.forward(leader, commands);
                    self.forward_renewals(leader, renewals);
                }
                _ => self.refuse(commands, renewals),
            }
        }
    }

    fn lead(&mut self, arrived: Arrived) {
        let mut commands = Vec::new();
        for (number, body) in arrived.commands {
            if self.admit(number, self.config.node) {
                let origin = self.origin(number);
                commands.push(Command {
                    origin: Some(origin),
                    body: Some(body),
                });
            }
        }
        for (from, forward) in arrived.forwarded {
            self.take_forwarded(from, forward, &mut commands);
        }
        for (from, session) in arrived.renewals {
            self.take_renewal(from, session);
        }
        self.propose_all(commands);
        self.expire();
        self.publish_self();
        self.propose_due_timers();
    }

    fn take_forwarded(&mut self, from: NodeId, forward: Forward, accepted: &mut Vec<Command>) {
        let Forward {
            boot,
            term,
            commands,
        } = forward;
        if term != self.consensus.term() {
            self.refuse_forwarded(vec![(
                from,
                Forward {
                    boot,
                    term,
                    commands,
                },
            )]);
            return;
        }
        let leadership = self
            .leadership
            .as_mut()
            .expect("only a leader takes commands");
        for command in commands {
            if !may_be_forwarded::<M>(from, boot, &command) {
                tracing::warn!(peer = %from, "dropped a malformed command");
                continue;
            }
            let number = command.origin.as_ref().map(|origin| origin.number);
            if number.is_none_or(|number| leadership.take(from, boot, number)) {
                accepted.push(command);
            }
        }
    }

    /// Packs commands into entries and proposes them.
    fn propose_all(&mut self, commands: Vec<Command>) {
        let mut entry = Vec::new();
        let mut bytes = 0;
        for command in commands {
            let size = command.encoded_len();
            let full =
                entry.len() == limits::ENTRY_COMMANDS_MAX || bytes + size > limits::ENTRY_BYTES_MAX;
            if full && !entry.is_empty() {
                self.propose(mem::take(&mut entry));
                bytes = 0;
            }
            bytes += size;
            entry.push(command);
        }
        if !entry.is_empty() {
            self.propose(entry);
        }
    }

    /// Proposes one entry; whether raft took it. If not, its commands are
    /// refused.
    fn propose(&mut self, commands: Vec<Command>) -> bool {
        self.clock.raise(self.state.system().log_time());
        let stamp = Stamp {
            log_time_ms: self.clock.log_time(),
            date_ms: self.now.date_ms,
        };
        let entry = Entry {
            stamp: Some(stamp),
            commands,
        };
        if self.consensus.propose(entry.encode_to_vec()) {
            return true;
        }
        for origin in entry
            .commands
            .into_iter()
            .filter_map(|command| command.origin)
        {
            self.refuse_command(&origin);
        }
        false
    }

    fn expire(&mut self) {
        let now_us = self.clock.micros();
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        let Some(liveness) = &mut leadership.liveness else {
            return;
        };
        let due = liveness.expire(now_us, limits::EXPIRIES_PER_COMMAND_MAX);
        if due.is_empty() {
            return;
        }
        let session_ids = due.iter().map(|id| id.0).collect();
        let expire = ExpireSessions {
            term: leadership.term,
            session_ids,
        };
        let body = Some(command::Body::ExpireSessions(expire));
        if !self.propose(vec![Command { origin: None, body }])
            && let Some(leadership) = &mut self.leadership
            && let Some(liveness) = &mut leadership.liveness
        {
            liveness.expiry_dropped(&due);
        }
    }

    /// Proposes an entry for timers that are due; applying it fires them.
    fn propose_due_timers(&mut self) {
        let Some(leadership) = &self.leadership else {
            return;
        };
        let under_way = leadership.timers_entry > self.state.applied();
        if !under_way && self.state.has_due(self.clock.log_time()) && self.propose(Vec::new()) {
            let entry = self.consensus.last_index();
            if let Some(leadership) = &mut self.leadership {
                leadership.timers_entry = entry;
            }
        }
    }

    /// Tells the cluster this member's name and addresses, until it knows.
    fn publish_self(&mut self) {
        if self.now.boot_us < self.next_publish_us || self.is_published() {
            return;
        }
        self.next_publish_us = self.now.boot_us + 2 * self.election_us();
        let member = PublishMember {
            node: self.config.node.0,
            name: self.config.name.clone(),
            client_urls: self.config.client_urls.clone(),
            apply_version: APPLY_VERSION,
        };
        let body = Some(command::Body::PublishMember(member));
        let command = Command { origin: None, body };
        match self.consensus.leader() {
            _ if self.leadership.is_some() => {
                self.propose(vec![command]);
            }
            Some(leader) => self.send_forward(leader, vec![command]),
            None => {}
        }
    }

    fn is_published(&self) -> bool {
        self.state
            .system()
            .members()
            .get(&self.config.node)
            .is_some_and(|member| {
                member.name == self.config.name
                    && member.client_urls == self.config.client_urls
                    && member.apply_version == APPLY_VERSION
            })
    }

    fn forward(&mut self, leader: NodeId, arrived: Vec<(RequestNumber, command::Body)>) {
        let mut commands = Vec::new();
        for (number, body) in arrived {
            if self.admit(number, leader) {
                let origin = self.origin(number);
                commands.push(Command {
                    origin: Some(origin),
                    body: Some(body),
                });
            }
        }
        if !commands.is_empty() {
            self.send_forward(leader, commands);
        }
        self.publish_self();
    }

    fn send_forward(&mut self, leader: NodeId, commands: Vec<Command>) {
        let forward = Forward {
            boot: self.config.boot,
            term: self.consensus.term(),
            commands,
        };
        self.outbox
            .push(to(leader, peer_message::Message::Forward(forward)));
    }

    fn forward_renewals(&mut self, leader: NodeId, arrived: Vec<(Renewer, SessionId)>) {
        let deadline_us = self.request_deadline_us();
        let mut renewals = Vec::new();
        for (from, session) in arrived {
            match from {
                Renewer::Here(number) => {
                    let under = (leader, self.consensus.term());
                    let renewal = PendingRenewal {
                        session,
                        under,
                        deadline_us,
                        ended_by: None,
                    };
                    self.renewals.insert(number, renewal);
                    renewals.push(Renewal {
                        number,
                        session_id: session.0,
                    });
                }
                Renewer::There { .. } => self.reply_renewal(from, refused()),
            }
        }
        if !renewals.is_empty() {
            let renewals = Renewals {
                boot: self.config.boot,
                renewals,
            };
            self.outbox
                .push(to(leader, peer_message::Message::Renewals(renewals)));
        }
    }

    /// Nobody leads, as far as this node knows.
    fn refuse(
        &mut self,
        commands: Vec<(RequestNumber, command::Body)>,
        renewals: Vec<(Renewer, SessionId)>,
    ) {
        let failure = Failure::NotLeader { leader: None };
        for (number, _) in commands {
            self.fail(number, failure);
        }
        for (from, _) in renewals {
            match from {
                Renewer::Here(number) => self.fail(number, failure),
                Renewer::There { .. } => self.reply_renewal(from, refused()),
            }
        }
    }

    fn refuse_forwarded(&mut self, forwarded: Vec<(NodeId, Forward)>) {
        for (from, Forward { boot, commands, .. }) in forwarded {
            let origins = commands.into_iter().filter_map(|command| command.origin);
            let numbers: Vec<_> = origins.map(|origin| origin.number).collect();
            if !numbers.is_empty() {
                let refused = ForwardRefused { boot, numbers };
                self.outbox
                    .push(to(from, peer_message::Message::ForwardRefused(refused)));
            }
        }
    }

    /// A command that was taken and could not be proposed.
    fn refuse_command(&mut self, origin: &Origin) {
        if self.is_mine(origin) {
            self.pending.remove(&origin.number);
            self.fail(origin.number, Failure::Overloaded);
        } else {
            let refused = ForwardRefused {
                boot: origin.boot,
                numbers: vec![origin.number],
            };
            let message = peer_message::Message::ForwardRefused(refused);
            self.outbox.push(to(NodeId(origin.node), message));
        }
    }

    /// Notes a command as on its way; false if too many are.
    fn admit(&mut self, number: RequestNumber, leader: NodeId) -> bool {
        if self.pending.len() >= limits::PENDING_COMMANDS_MAX {
            self.fail(number, Failure::Overloaded);
            return false;
        }
        let deadline_us = self.request_deadline_us();
        let under = (leader, self.consensus.term());
        self.pending.insert(number, Pending { under, deadline_us });
        true
    }

    // --- reads and renewals ----------------------------------------------

    fn can_confirm(&self) -> bool {
        match &self.leadership {
            Some(_) => self.consensus.has_committed_in_term(),
            None => self.consensus.leader().is_some(),
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
                AskBody::Read { number, query } => {
                    let body = self.query(query);
                    self.answer(number, body);
                }
                AskBody::Renewal(renewal) => self.renew(renewal),
            }
        }
    }

    fn query(&self, query: Query<M>) -> AnswerBody<M> {
        let (keyspace, sessions) = (self.state.keyspace(), self.state.sessions());
        match query {
            Query::Barrier => AnswerBody::Done,
            Query::Session(id) => match sessions.get(id) {
                Some(session) => AnswerBody::Session {
                    session: session.clone(),
                    keys: keyspace.keys_bound(id),
                },
                None => AnswerBody::SessionEnded(self.state.system().end_reason(id)),
            },
            Query::Sessions => AnswerBody::Sessions {
                log_time_ms: self.state.system().log_time(),
                sessions: sessions
                    .iter()
                    .map(|(id, session)| (id, session.clone(), keyspace.keys_bound(id)))
                    .collect(),
            },
            Query::Range {
                range,
                revision,
                limit,
            } => AnswerBody::Range(
                keyspace
                    .range(&range, revision)
                    .take(limit)
                    .cloned()
                    .collect(),
            ),
            Query::Machine(query) => {
                AnswerBody::Query(self.state.machine().query(self.state.view(), query))
            }
        }
    }

    /// A leader takes a renewal.
    fn take_renewal(&mut self, from: Renewer, session: SessionId) {
        let arrived_us = self.clock.micros();
        let deadline_us = self.request_deadline_us();
        let renewal = RenewalAsk {
            session,
            from,
            arrived_us,
        };
        let leadership = self
            .leadership
            .as_mut()
            .expect("only a leader takes renewals");
        match &mut leadership.liveness {
            Some(liveness) => {
                liveness.renewal_arrived(session);
                self.reads.add(Ask {
                    deadline_us,
                    body: AskBody::Renewal(renewal),
                });
            }
            None => leadership.early.push(renewal),
        }
    }

    /// A quorum has confirmed this leader since the renewal arrived.
    fn renew(&mut self, renewal: RenewalAsk) {
        let Some(leadership) = &mut self.leadership else {
            return self.refuse_renewal(&renewal);
        };
        let liveness = leadership.liveness.as_mut().expect("renewals wait for it");
        if liveness.is_expiring(renewal.session) {
            leadership.parked.push(renewal);
            return;
        }
        match self.state.sessions().get(renewal.session) {
            Some(session) => {
                liveness.renewal_over(renewal.session, Some(renewal.arrived_us));
                let ttl_ms = session.ttl_ms;
                self.reply_renewal(renewal.from, renewed(ttl_ms));
            }
            None => self.renewal_ended(&renewal),
        }
    }

    fn renewal_ended(&mut self, renewal: &RenewalAsk) {
        match renewal.from {
            Renewer::Here(number) => {
                let reason = self.state.system().end_reason(renewal.session);
                self.answer(number, AnswerBody::SessionEnded(reason));
            }
            Renewer::There { .. } => {
                let applied = self.state.applied();
                let outcome = renewal_reply::Outcome::Ended.into();
                let reply = RenewalReply {
                    outcome,
                    applied,
                    ..RenewalReply::default()
                };
                self.reply_renewal(renewal.from, reply);
            }
        }
    }

    fn refuse_renewal(&mut self, renewal: &RenewalAsk) {
        self.reply_renewal(renewal.from, refused());
    }

    fn reply_renewal(&mut self, from: Renewer, reply: RenewalReply) {
        match from {
            Renewer::Here(number) if reply.outcome() == renewal_reply::Outcome::Renewed => {
                self.answer(
                    number,
                    AnswerBody::Renewed {
                        ttl_ms: reply.ttl_ms,
                    },
                );
            }
            Renewer::Here(number) => {
                let leader = self.consensus.leader();
                self.fail(number, Failure::NotLeader { leader });
            }
            Renewer::There { node, boot, number } => {
                let replies = vec![RenewalReply { number, ..reply }];
                let replies = RenewalReplies { boot, replies };
                self.outbox
                    .push(to(node, peer_message::Message::RenewalReplies(replies)));
            }
        }
    }

    // --- applying ---------------------------------------------------------

    fn apply(&mut self, entry: &LogEntry) -> Result<(), Fatal> {
        if entry.kind == EntryKind::Membership {
            let what = "a change of membership".to_owned();
            return Err(Fatal::Unknown {
                index: entry.index,
                what,
            });
        }
        let applied = self.state.apply(entry.index, entry.term, &entry.data)?;
        let Applied {
            outcomes,
            resolved,
            events,
            lives,
        } = applied;
        for (origin, outcome) in outcomes {
            if self.is_mine(&origin) && self.pending.remove(&origin.number).is_some() {
                match outcome {
                    Outcome::Done(answer) => self.output.answers.push((origin.number, Ok(answer))),
                    Outcome::Waiting(place) => {
                        self.waiting.entry(place).or_default().push(origin.number);
                    }
                }
            }
        }
        for resolved in resolved {
            self.resolve(resolved, entry.term);
        }
        self.output.events.extend(events);
        self.follow_lives(entry.term, &lives);
        Ok(())
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

    /// Keeps the leader's deadlines in step with the sessions that there are.
    fn follow_lives(&mut self, term: Term, lives: &[Life]) {
        let now_us = self.clock.micros();
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        let Some(liveness) = &mut leadership.liveness else {
            if leadership.term == term {
                self.begin_liveness();
            }
            return;
        };
        let mut ended = Vec::new();
        for life in lives {
            match *life {
                Life::Opened { session, ttl_ms } => liveness.opened(session, ttl_ms, now_us),
                Life::Ended(session) => ended.push(session),
            }
        }
        for session in ended {
            let parked = self
                .leadership
                .as_mut()
                .map(|leadership| leadership.ended(session));
            for renewal in parked.unwrap_or_default() {
                self.renewal_ended(&renewal);
            }
        }
    }

    /// The first entry of this leader's term is applied: it knows every session.
    fn begin_liveness(&mut self) {
        self.clock.raise(self.state.system().log_time());
        let liveness = Liveness::new(self.state.sessions(), self.clock.micros());
        let leadership = self.leadership.as_mut().expect("called by a leader");
        leadership.liveness = Some(liveness);
        for renewal in mem::take(&mut leadership.early) {
            self.take_renewal(renewal.from, renewal.session);
        }
    }

    // --- giving up --------------------------------------------------------

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
        let now_us = self.now.boot_us;
        let leader = self.consensus.leader();
        for ask in self.reads.take_late(now_us) {
            match ask.body {
                AskBody::Read { number, .. } => self.fail(number, Failure::NotLeader { leader }),
                AskBody::Renewal(renewal) => {
                    if let Some(leadership) = &mut self.leadership
                        && let Some(liveness) = &mut leadership.liveness
                    {
                        liveness.renewal_over(renewal.session, None);
                    }
                    self.refuse_renewal(&renewal);
                }
            }
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
        self.answer_forwarded_renewals(now_us);
    }

    fn answer_forwarded_renewals(&mut self, now_us: u64) {
        let applied = self.state.applied();
        let is_over = |_: &RequestNumber, renewal: &mut PendingRenewal| {
            renewal.deadline_us <= now_us || renewal.ended_by.is_some_and(|by| by <= applied)
        };
        let over: Vec<_> = self.renewals.extract_if(.., is_over).collect();
        for (number, renewal) in over {
            if renewal.ended_by.is_some_and(|by| by <= applied) {
                let reason = self.state.system().end_reason(renewal.session);
                self.answer(number, AnswerBody::SessionEnded(reason));
            } else {
                self.fail(number, Failure::OutcomeUnknown);
            }
        }
    }

    // --- small things -----------------------------------------------------

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
        if unsaved.is_none() && facts.is_none() {
            return None;
        }
        let Unsaved {
            hard_state,
            entries,
        } = unsaved.unwrap_or_default();
        Some(Batch {
            hard_state,
            facts,
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
        self.status.sessions = self.state.sessions().len();
        self.status.keys = self.state.keyspace().len();
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

/// What only a leader may propose, or what this version does not know, is not
/// taken from another member: in the log it would stop every node.
fn may_be_forwarded<M: Machine>(from: NodeId, boot: u64, command: &Command) -> bool {
    let from_sender =
        |origin: &Origin| NodeId(origin.node) == from && origin.boot == boot && origin.number > 0;
    match &command.body {
        Some(command::Body::PublishMember(member)) => member.node == from.0,
        Some(
            command::Body::OpenSession(_) | command::Body::CloseSession(_) | command::Body::Txn(_),
        ) => command.origin.as_ref().is_some_and(from_sender),
        Some(command::Body::Machine(bytes)) => {
            command.origin.as_ref().is_some_and(from_sender) && M::decode(bytes.clone()).is_some()
        }
        Some(command::Body::ExpireSessions(_)) | None => false,
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

fn refused() -> RenewalReply {
    RenewalReply {
        outcome: renewal_reply::Outcome::Refused.into(),
        ..RenewalReply::default()
    }
}

fn renewed(ttl_ms: u64) -> RenewalReply {
    let outcome = renewal_reply::Outcome::Renewed.into();
    RenewalReply {
        outcome,
        ttl_ms,
        ..RenewalReply::default()
    }
}
