//! Replicas in one process, without network, disk or clock: what a turn does,
//! step by step. The machine is a register whose only command appends a letter.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

#[path = "replica/install.rs"]
mod install;
#[path = "replica/leases.rs"]
mod leases;
#[path = "replica/watch.rs"]
mod watch;

use std::{
    cell::Cell,
    collections::{BTreeMap, VecDeque},
    sync::mpsc,
    thread,
};

use bytes::{Buf as _, Bytes};
use conclave_core::{
    APPLY_VERSION,
    checkpoint::{Part, SimCheckpoints, Writer},
    disk::SimDisk,
    ids::{Attachment, Index, LogTime, NodeId, RequestNumber, SessionId, Term},
    keyspace::{Change, Filter, KeyRange, Keyspace, Overlay, Record},
    limits,
    log::{Facts, HardState, Identity, Log, LogEntry, Recovered},
    machine::{Cause, Context, Executed, Machine, Outcome, Place, Settled, View},
    node::{self, Outlets, Responder, Stores},
    replica::{
        Answer, AnswerBody, Config, EventBody, Failure, Fatal, Fetch, Finished, Input, Now, Query,
        Replica, Role,
    },
    session::EndReason,
    state::State,
    watch::Notice,
};
use conclave_proto::internal::{
    AttachSession, CloseSession, Command, Compact, Compare, Forward, Held, Hello, NoSpace,
    OpenSession, Operation, Origin, PeerMessage, Put, Request, StateDigest, Txn, command, compare,
    operation, peer_message,
};
use prost::Message as _;
use protobuf::Message as _;
use raft::eraftpb::{Entry, MessageType};

/// Appends letters to the key `register`. Who appends `?` waits, all at one
/// place, until somebody appends `.`; and `~` sets a timer for the end of time. It
/// has a defect: member 3 takes `#` for another letter. A letter may be a request of
/// a session: its id and the number follow.
#[derive(Debug, PartialEq)]
struct Register {
    is_timed: bool,
}

impl Machine for Register {
    type Command = (Bytes, Option<(SessionId, Request)>);
    type Reply = Bytes;
    type Rejection = &'static str;
    type Note = ();
    type Event = ();
    type Query = ();
    type Answer = Bytes;

    fn rebuild(_: &Keyspace) -> Self {
        Self { is_timed: false }
    }

    fn decode(mut bytes: Bytes) -> Option<Self::Command> {
        let letter = bytes.split_to(bytes.len().min(1));
        let of = match bytes.len() {
            0 => None,
            _ => {
                let session = SessionId(bytes.try_get_i64().ok()?);
                let number = bytes.try_get_u64().ok()?;
                let request = Request {
                    number,
                    ..Request::default()
                };
                Some((session, request))
            }
        };
        (letter.len() == 1 && bytes.is_empty()).then_some((letter, of))
    }

    fn request((_, of): &Self::Command) -> Option<(SessionId, &Request)> {
        of.as_ref().map(|(session, request)| (*session, request))
    }

    fn keep(answer: &Result<Bytes, &'static str>) -> Bytes {
        answer.clone().unwrap_or_default()
    }

    fn recall(kept: &Bytes) -> Result<Bytes, &'static str> {
        Some(kept.clone())
            .filter(|kept| !kept.is_empty())
            .ok_or("not a letter")
    }

    fn execute(
        &self,
        context: &mut Context<'_>,
        (letter, _): Self::Command,
    ) -> Result<Executed<Self>, &'static str> {
        if letter == "!" {
            return Err("not a letter");
        }
        let letter = match &letter[..] {
            b"#" if TURN_OF.get() == NodeId(3) => Bytes::from_static(b"%"),
            _ => letter,
        };
        let old = context
            .overlay
            .get(b"register")
            .map_or(Bytes::new(), |r| r.value.clone());
        let new = Bytes::from([&old[..], &letter[..]].concat());
        context
            .overlay
            .put(Bytes::from_static(b"register"), new.clone(), None);
        let outcome = if letter == "?" {
            Outcome::Waiting(PLACE)
        } else {
            Outcome::Done(new)
        };
        Ok(Executed { outcome, note: () })
    }

    fn can_wait(&self, _: View<'_>, (letter, _): &Self::Command) -> bool {
        letter == "z"
    }

    fn next_due(&self) -> Option<LogTime> {
        self.is_timed.then_some(LogTime::MAX)
    }

    fn fire(&self, _: &mut Context<'_>) {}

    fn outlives(&self, _: &Record, _: EndReason, _: LogTime) -> Option<Bytes> {
        None
    }

    fn withdraw(&self, _: &mut Context<'_>, _: SessionId, _: &[u64]) {}

    fn follow(&self, _: &mut Overlay<'_>) {}

    fn holdings(&self, state: View<'_>, _: SessionId) -> Bytes {
        self.query(state, ())
    }

    fn settle(&mut self, changes: &[Change], _: Cause<'_, ()>) -> Settled<Self> {
        let mut settled = Settled::default();
        for value in changes.iter().filter_map(|change| change.after.as_ref()) {
            let value = value.value.clone();
            self.is_timed |= value.ends_with(b"~");
            if value.ends_with(b".") {
                settled.resolved.push((PLACE, Ok(value)));
            }
        }
        settled
    }

    fn query(&self, state: View<'_>, (): ()) -> Bytes {
        state
            .keyspace
            .get(b"register")
            .map_or(Bytes::new(), |r| r.value.clone())
    }

    fn work(_: &Bytes) -> usize {
        1
    }
}

const PLACE: Place = Place {
    revision: 7,
    key: Bytes::from_static(b"register"),
};

thread_local! {
    /// For the defect of [`Register`] alone.
    static TURN_OF: Cell<NodeId> = const { Cell::new(NodeId(0)) };
}

type Outcomes = BTreeMap<RequestNumber, Result<AnswerBody<Register>, Failure>>;

/// One member with its durable log and what its clients were told.
struct Node {
    replica: Replica<Register>,
    log: Recovered,
    /// How many batches it was given to save.
    batches: u64,
    /// Saves take long: none ends, while turns go on.
    is_slow: bool,
    inbox: VecDeque<Input<Register>>,
    outcomes: Outcomes,
    events: Vec<(SessionId, EventBody<()>)>,
    /// The checkpoint that it asks for.
    fetch: Option<Fetch>,
    /// The last that it has installed.
    installed: Option<Index>,
    fatal: Option<Fatal>,
    notices: Vec<Notice>,
}

/// Nodes 1 to n, with a common clock.
struct Cluster {
    nodes: BTreeMap<NodeId, Node>,
    boot_us: u64,
    /// Nobody hears these, and they hear nobody.
    cut: Vec<NodeId>,
    /// What the first says does not reach the second.
    mute: Vec<(NodeId, NodeId)>,
    /// What was said, by sender and receiver: how many messages, and the bytes
    /// of the longest.
    traffic: BTreeMap<(NodeId, NodeId), (usize, usize)>,
    last_number: RequestNumber,
}

/// Tests of other things stay below it.
const QUOTA_BYTES: u64 = 8 << 20;
const HEARTBEAT_MS: u64 = 100;
const ELECTION_MS: u64 = 500;

fn fresh(node: NodeId, size: u64, incarnation: u64) -> Recovered {
    Recovered {
        identity: Identity {
            cluster: 7,
            node,
            incarnation,
        },
        hard_state: HardState::default(),
        facts: Facts {
            voters: (1..=size).map(NodeId).collect(),
            ..Facts::default()
        },
        first: 1,
        base: (0, 0),
        entries: Vec::new(),
    }
}

fn config(log: &Recovered, boot: u64) -> Config {
    Config {
        node: log.identity.node,
        boot,
        seed: 1,
        heartbeat_ms: HEARTBEAT_MS,
        election_ms: ELECTION_MS,
        name: format!("n{}", log.identity.node),
        client_urls: vec![format!("http://n{}", log.identity.node)],
        retention: None,
        quota_bytes: QUOTA_BYTES,
        watch_queue_bytes: limits::WATCH_QUEUE_BYTES_MAX,
    }
}

fn replica(log: &Recovered, boot: u64, boot_us: u64) -> Replica<Register> {
    restored(log, Some(State::new(log.identity.cluster)), boot, boot_us)
}

fn restored(
    log: &Recovered,
    state: Option<State<Register>>,
    boot: u64,
    boot_us: u64,
) -> Replica<Register> {
    Replica::new(
        config(log, boot),
        log.clone(),
        state,
        Now {
            boot_us,
            date_ms: 0,
        },
    )
}

impl Cluster {
    fn new(size: u64) -> Self {
        let nodes = (1..=size).map(NodeId).map(|id| {
            let log = fresh(id, size, 100 + id.0);
            (id, Node::new(log, 1, 0))
        });
        Self {
            nodes: nodes.collect(),
            boot_us: 0,
            cut: Vec::new(),
            mute: Vec::new(),
            traffic: BTreeMap::new(),
            last_number: 0,
        }
    }

    /// A cluster that has a leader which has committed in its term.
    fn ready(size: u64) -> Self {
        let mut cluster = Self::new(size);
        cluster.run_ms(3_000);
        cluster.leader();
        cluster
    }

    fn leader(&self) -> NodeId {
        let leads = |node: &&NodeId| {
            !self.cut.contains(node) && self.nodes[*node].replica.status().role == Role::Leader
        };
        *self.nodes.keys().find(leads).expect("a leader")
    }

    fn follower(&self) -> NodeId {
        let leader = self.leader();
        *self
            .nodes
            .keys()
            .find(|id| **id != leader && !self.cut.contains(id))
            .unwrap()
    }

    fn run_ms(&mut self, ms: u64) {
        for _ in 0..ms / 10 {
            self.boot_us += 10_000;
            self.settle();
        }
    }

    /// Turns until nothing moves at this instant.
    fn settle(&mut self) {
        for _ in 0..1_000 {
            let mut moved = false;
            for id in self.nodes.keys().copied().collect::<Vec<_>>() {
                moved |= self.turn(id);
            }
            if !moved {
                return;
            }
        }
        panic!("the cluster does not come to rest");
    }

    fn turn(&mut self, id: NodeId) -> bool {
        let now = Now {
            boot_us: self.boot_us,
            date_ms: 0,
        };
        let node = self.nodes.get_mut(&id).unwrap();
        let due = node.replica.next_turn_us() <= self.boot_us;
        if node.fatal.is_some() || (node.inbox.is_empty() && !due) {
            return false;
        }
        TURN_OF.set(id);
        match node.turn(now) {
            Ok(messages) => self.deliver(id, messages),
            Err(fatal) => self.nodes.get_mut(&id).unwrap().fatal = Some(fatal),
        }
        true
    }

    fn deliver(&mut self, from: NodeId, messages: Vec<(NodeId, PeerMessage)>) {
        for (to, message) in messages {
            let (count, longest) = self.traffic.entry((from, to)).or_default();
            *count += 1;
            *longest = message.encoded_len().max(*longest);
            let is_cut = self.cut.contains(&from) || self.cut.contains(&to);
            if !is_cut && !self.mute.contains(&(from, to)) {
                self.input(to, Input::Peer { from, message });
            }
        }
    }

    fn input(&mut self, node: NodeId, input: Input<Register>) {
        self.nodes.get_mut(&node).unwrap().inbox.push_back(input);
    }

    fn send(&mut self, node: NodeId, body: command::Body) -> RequestNumber {
        self.last_number += 1;
        self.input(
            node,
            Input::Command {
                number: self.last_number,
                body,
            },
        );
        self.last_number
    }

    fn append(&mut self, node: NodeId, letter: &'static str) -> RequestNumber {
        self.send(
            node,
            command::Body::Machine(Bytes::from_static(letter.as_bytes())),
        )
    }

    /// The same, as a numbered request of a session.
    fn append_once(
        &mut self,
        node: NodeId,
        letter: &'static str,
        (session, number): (SessionId, u64),
    ) -> RequestNumber {
        let (session, number) = (session.0.to_be_bytes(), number.to_be_bytes());
        let command = [letter.as_bytes(), &session, &number].concat();
        self.send(node, command::Body::Machine(command.into()))
    }

    /// Puts a value of this size.
    fn put(&mut self, node: NodeId, bytes: usize) -> RequestNumber {
        let put = Operation {
            operation: Some(operation::Operation::Put(Put {
                key: Bytes::from_static(b"key"),
                value: vec![0; bytes].into(),
                ..Put::default()
            })),
        };
        let txn = Txn {
            success: vec![put],
            ..Txn::default()
        };
        self.send(node, command::Body::Txn(txn))
    }

    fn say(&mut self, from: NodeId, to: NodeId, message: peer_message::Message) {
        let message = Some(message);
        let message = PeerMessage { message };
        self.input(to, Input::Peer { from, message });
    }

    /// A Raft message of the present term, to be changed.
    fn raft(&self, from: NodeId, to: NodeId, msg_type: MessageType) -> raft::eraftpb::Message {
        raft::eraftpb::Message {
            msg_type,
            from: from.0,
            to: to.0,
            term: self.term(),
            ..Default::default()
        }
    }

    fn say_raft(&mut self, message: &raft::eraftpb::Message) {
        let (from, to) = (NodeId(message.from), NodeId(message.to));
        let bytes = message.write_to_bytes().unwrap();
        self.say(from, to, peer_message::Message::Raft(bytes.into()));
    }

    fn term(&self) -> Term {
        self.nodes[&self.leader()].replica.status().term
    }

    /// The commands that wait in the inbox of a node.
    fn forwards(&self, node: NodeId) -> Vec<PeerMessage> {
        let forward = |input: &Input<Register>| match input {
            Input::Peer { message, .. } => match message.message {
                Some(peer_message::Message::Forward(_)) => Some(message.clone()),
                _ => None,
            },
            _ => None,
        };
        self.nodes[&node].inbox.iter().filter_map(forward).collect()
    }

    fn register(&self, node: NodeId) -> Bytes {
        let state = self.nodes[&node].replica.state();
        state.machine().query(state.view(), ())
    }

    fn read(&mut self, node: NodeId) -> RequestNumber {
        self.last_number += 1;
        self.input(
            node,
            Input::Read {
                number: self.last_number,
                query: Query::Machine(()),
            },
        );
        self.last_number
    }

    fn renew(&mut self, node: NodeId, session: SessionId) -> RequestNumber {
        self.renew_for(node, session, 0)
    }

    fn renew_for(&mut self, node: NodeId, session: SessionId, attachment: u64) -> RequestNumber {
        self.last_number += 1;
        let of = Attachment {
            session,
            number: attachment,
        };
        let number = self.last_number;
        self.input(node, Input::Renew { number, of });
        number
    }

    fn outcome(&mut self, node: NodeId, number: RequestNumber) -> String {
        let outcome = self.nodes.get_mut(&node).unwrap().outcomes.remove(&number);
        outcome.map_or_else(|| "none".to_owned(), |outcome| format!("{outcome:?}"))
    }

    fn open(&mut self, node: NodeId, ttl_ms: u64) -> SessionId {
        let open = OpenSession {
            ttl_ms,
            ..OpenSession::default()
        };
        let number = self.send(node, command::Body::OpenSession(open));
        self.settle();
        match self.nodes.get_mut(&node).unwrap().outcomes.remove(&number) {
            Some(Ok(AnswerBody::SessionOpened { session, .. })) => session,
            other => panic!("{other:?}"),
        }
    }

    /// The process of a node dies and starts again over its log.
    fn restart(&mut self, id: NodeId, boot: u64) {
        let log = self.nodes[&id].log.clone();
        self.nodes.insert(id, Node::new(log, boot, self.boot_us));
    }

    /// The same, over a checkpoint of now and a log of which only the newest
    /// entries are left.
    fn restart_from_checkpoint(&mut self, id: NodeId, boot: u64, left: u64) {
        let node = self.nodes.get_mut(&id).unwrap();
        node.replica.begin_image();
        let image = node
            .replica
            .draw_part(usize::MAX)
            .and_then(Part::rest)
            .unwrap();
        let mut log = node.log.clone();
        log.first = image.applied() + 1 - left;
        log.entries.retain(|entry| entry.index >= log.first);
        let replica = restored(&log, Some(State::restore(image)), boot, self.boot_us);
        self.nodes.insert(id, Node::with(replica, log));
    }

    fn append_some(&mut self, node: NodeId, count: u64) {
        for _ in 0..count {
            self.append(node, "a");
            self.settle();
        }
    }

    fn assert_equal_states(&self) {
        let digests: Vec<_> = self
            .nodes
            .values()
            .map(|node| {
                (
                    node.replica.state().applied(),
                    node.replica.state().digest(),
                )
            })
            .collect();
        assert!(
            digests.windows(2).all(|pair| pair[0] == pair[1]),
            "{digests:?}"
        );
    }
}

impl Node {
    fn new(log: Recovered, boot: u64, boot_us: u64) -> Self {
        let replica = replica(&log, boot, boot_us);
        Self::with(replica, log)
    }

    fn with(replica: Replica<Register>, log: Recovered) -> Self {
        Self {
            replica,
            log,
            batches: 0,
            is_slow: false,
            inbox: VecDeque::new(),
            outcomes: BTreeMap::new(),
            events: Vec::new(),
            notices: Vec::new(),
            fetch: None,
            installed: None,
            fatal: None,
        }
    }

    fn turn(&mut self, now: Now) -> Result<Vec<(NodeId, PeerMessage)>, Fatal> {
        let begun = self.replica.begin(now, self.inbox.drain(..))?;
        if let Some(batch) = begun.batch {
            self.log.hard_state = batch.hard_state.unwrap_or(self.log.hard_state);
            if let Some(facts) = batch.facts {
                self.log.facts = facts;
            }
            if let Some(base) = batch.base {
                self.log.base = base;
                self.log.first = base.0 + 1;
                self.log.entries.clear();
            }
            for entry in batch.entries {
                self.log
                    .entries
                    .retain(|earlier| earlier.index < entry.index);
                self.log.entries.push(entry);
            }
            self.batches += 1;
        }
        if !self.is_slow {
            self.replica.saved(self.batches);
        }
        let Finished {
            messages,
            answers,
            events,
            notices,
            fetch,
            installed,
        } = self.replica.finish()?;
        self.notices
            .extend(notices.into_iter().map(|(_, notice)| notice));
        assert!(self.fetch.is_none() || fetch.is_none(), "asks twice");
        self.fetch = self.fetch.or(fetch);
        self.installed = installed.or(self.installed);
        for (number, answer) in answers {
            let before = self
                .outcomes
                .insert(number, answer.map(|Answer { body, .. }| body));
            assert!(before.is_none(), "request {number} is answered twice");
        }
        self.events
            .extend(events.into_iter().map(|event| (event.session, event.body)));
        Ok([begun.messages, messages].concat())
    }
}

#[test]
fn a_sole_member_serves_at_once() {
    let mut cluster = Cluster::new(1);
    cluster.run_ms(200);
    let number = cluster.append(NodeId(1), "a");
    cluster.settle();
    assert_eq!(
        cluster.outcome(NodeId(1), number),
        r#"Ok(Machine(Ok(b"a")))"#
    );
}

#[test]
fn nothing_is_committed_before_a_quorum_has_saved_it_and_turns_go_on_meanwhile() {
    let mut cluster = Cluster::ready(3);
    let leader = cluster.leader();
    let slow = |cluster: &mut Cluster, is_slow: &dyn Fn(NodeId) -> bool| {
        for (id, node) in cluster.nodes.iter_mut() {
            node.is_slow = is_slow(*id);
        }
    };
    slow(&mut cluster, &|id| id != leader);
    let first = cluster.append(leader, "a");
    cluster.run_ms(300);
    assert!(!cluster.nodes[&leader].outcomes.contains_key(&first));

    // The followers are enough for a commit; the leader answers when it has saved it, too.
    slow(&mut cluster, &|id| id == leader);
    let second = cluster.append(leader, "b");
    cluster.run_ms(500);
    assert_eq!(cluster.outcome(leader, first), r#"Ok(Machine(Ok(b"a")))"#);
    assert!(!cluster.nodes[&leader].outcomes.contains_key(&second));
    let applied = |cluster: &Cluster, id| cluster.nodes[&id].replica.state().applied();
    let follower = cluster.follower();
    assert!(applied(&cluster, follower) > applied(&cluster, leader));

    slow(&mut cluster, &|_| false);
    cluster.run_ms(100);
    assert_eq!(cluster.outcome(leader, second), r#"Ok(Machine(Ok(b"ab")))"#);
}

#[test]
fn a_follower_that_saves_last_hears_at_once_what_its_client_waits_for() {
    let mut cluster = Cluster::ready(3);
    let follower = cluster.follower();
    let slow = |cluster: &mut Cluster, is_slow| {
        cluster.nodes.get_mut(&follower).unwrap().is_slow = is_slow;
    };
    slow(&mut cluster, true);
    let number = cluster.append(follower, "a");
    cluster.settle();
    assert!(!cluster.nodes[&follower].outcomes.contains_key(&number));
    slow(&mut cluster, false);
    // Any turn.
    let query = Query::Machine(());
    cluster.input(follower, Input::LocalRead { number: 99, query });
    cluster.settle();
    assert_eq!(
        cluster.outcome(follower, number),
        r#"Ok(Machine(Ok(b"a")))"#
    );
}

#[test]
fn a_command_that_can_wait_goes_with_the_next_in_its_place() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let last = |cluster: &Cluster| cluster.nodes[&leader].replica.status().last;
    let before = last(&cluster);
    let waits = [follower, leader].map(|node| {
        let number = cluster.append(node, "z");
        cluster.settle();
        assert_eq!(last(&cluster), before);
        (node, number)
    });
    let hastens = cluster.append(leader, "a");
    cluster.settle();
    assert_eq!(last(&cluster), before + 1);
    let values = ["z", "zz", "zza"];
    for ((node, number), value) in waits.into_iter().chain([(leader, hastens)]).zip(values) {
        let outcome = format!("Ok(Machine(Ok(b{value:?})))");
        assert_eq!(cluster.outcome(node, number), outcome);
    }

    // Alone, it goes when it is due.
    let alone = cluster.append(follower, "z");
    cluster.settle();
    assert_eq!(last(&cluster), before + 1);
    cluster.run_ms(10);
    let outcome = r#"Ok(Machine(Ok(b"zzaz")))"#;
    assert_eq!(cluster.outcome(follower, alone), outcome);
    // So many do not wait for more.
    let many: Vec<_> = (0..limits::UNHURRIED_MAX)
        .map(|_| cluster.append(leader, "z"))
        .collect();
    cluster.settle();
    assert!(
        many.iter()
            .all(|number| cluster.nodes[&leader].outcomes.contains_key(number))
    );
}

#[test]
fn a_command_that_waits_for_others_is_refused_untouched_when_its_leader_goes() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let (here, there) = (cluster.append(leader, "z"), cluster.append(follower, "z"));
    for id in [follower, leader] {
        cluster.turn(id);
    }
    cluster.input(leader, Input::Resign);
    cluster.settle();
    let outcome = cluster.outcome(leader, here);
    assert!(outcome.starts_with("Err(NotLeader"), "{outcome}");
    // That one may have heard of the next leader first.
    let outcome = cluster.outcome(follower, there);
    assert!(outcome.starts_with("Err"), "{outcome}");
    cluster.run_ms(500);
    let number = cluster.append(follower, "a");
    cluster.settle();
    assert_eq!(
        cluster.outcome(follower, number),
        r#"Ok(Machine(Ok(b"a")))"#
    );
}

#[test]
fn three_members_elect_a_leader_and_agree() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let first = cluster.append(leader, "a");
    cluster.settle();
    let second = cluster.append(follower, "b");
    let third = cluster.append(follower, "!");
    cluster.settle();
    assert_eq!(cluster.outcome(leader, first), r#"Ok(Machine(Ok(b"a")))"#);
    assert_eq!(
        cluster.outcome(follower, second),
        r#"Ok(Machine(Ok(b"ab")))"#
    );
    assert_eq!(
        cluster.outcome(follower, third),
        r#"Ok(Machine(Err("not a letter")))"#
    );
    cluster.run_ms(300);
    cluster.assert_equal_states();
    let status = cluster.nodes[&follower].replica.status();
    assert_eq!(status.leader, Some(leader));
    assert_eq!(status.members.len(), 3, "all have published themselves");
}

#[test]
fn a_read_on_any_member_sees_what_was_acknowledged() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.append(leader, "a");
    cluster.settle();
    for node in [leader, follower] {
        let number = cluster.read(node);
        cluster.settle();
        assert_eq!(cluster.outcome(node, number), r#"Ok(Query(b"a"))"#);
    }
}

#[test]
fn a_leader_cut_off_answers_no_reads_and_does_not_know_what_became_of_writes() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    cluster.cut.push(old);
    let (write, read) = (cluster.append(old, "x"), cluster.read(old));
    cluster.run_ms(4_000);
    assert_eq!(cluster.outcome(old, write), "Err(OutcomeUnknown)");
    assert_eq!(
        cluster.outcome(old, read),
        "Err(NotLeader { leader: None })"
    );
    let new = cluster.leader();
    let number = cluster.append(new, "b");
    cluster.settle();
    assert_eq!(cluster.outcome(new, number), r#"Ok(Machine(Ok(b"b")))"#);
    cluster.cut.clear();
    cluster.run_ms(2_000);
    cluster.assert_equal_states();
}

#[test]
fn without_a_leader_a_command_is_refused_as_certainly_not_applied() {
    let mut cluster = Cluster::new(3);
    let number = cluster.append(NodeId(1), "a");
    cluster.settle();
    assert_eq!(
        cluster.outcome(NodeId(1), number),
        "Err(NotLeader { leader: None })"
    );
}

#[test]
fn everything_acknowledged_survives_a_restart_of_all() {
    let mut cluster = Cluster::ready(3);
    let leader = cluster.leader();
    cluster.append(leader, "a");
    let session = cluster.open(leader, 60_000);
    for id in 1..=3 {
        cluster.restart(NodeId(id), 2);
    }
    cluster.run_ms(3_000);
    let node = cluster.follower();
    let number = cluster.read(node);
    cluster.settle();
    assert_eq!(cluster.outcome(node, number), r#"Ok(Query(b"a"))"#);
    assert!(
        cluster.nodes[&node]
            .replica
            .state()
            .sessions()
            .get(session)
            .is_some()
    );
}

#[test]
fn a_session_lives_by_renewals_on_any_member_and_expires_without() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let session = cluster.open(follower, 1_000);
    for node in [leader, follower, leader, follower] {
        cluster.run_ms(700);
        let number = cluster.renew(node, session);
        cluster.settle();
        assert_eq!(
            cluster.outcome(node, number),
            "Ok(Renewed { ttl_ms: 1000 })"
        );
    }
    cluster.run_ms(1_200);
    assert!(cluster.nodes[&leader].replica.state().sessions().is_empty());
    let expired = (session, EventBody::SessionEnded(EndReason::Expired));
    assert_eq!(cluster.nodes[&follower].events, [expired]);
    let number = cluster.renew(follower, session);
    cluster.settle();
    assert_eq!(
        cluster.outcome(follower, number),
        "Ok(SessionEnded(Expired))"
    );
}

#[test]
fn an_attachment_that_was_replaced_renews_nothing() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let secret = Bytes::from_static(&[7; limits::SECRET_BYTES]);
    let open = command::Body::OpenSession(OpenSession {
        ttl_ms: 2_000,
        secret: secret.clone(),
        ..OpenSession::default()
    });
    let opened = |cluster: &mut Cluster, node| {
        let number = cluster.send(node, open.clone());
        cluster.settle();
        match cluster
            .nodes
            .get_mut(&node)
            .unwrap()
            .outcomes
            .remove(&number)
        {
            Some(Ok(AnswerBody::SessionOpened { session, .. })) => session,
            other => panic!("{other:?}"),
        }
    };
    let session = opened(&mut cluster, follower);
    assert_eq!(opened(&mut cluster, leader), session, "it is repeated");
    let attach = command::Body::AttachSession(AttachSession {
        session_id: session.0,
        secret,
        replaces: 1,
        nonce: 5,
        wanted: vec![],
    });
    let number = cluster.send(follower, attach);
    cluster.settle();
    let attached = cluster.outcome(follower, number);
    assert!(attached.contains("attachment: 2"), "{attached}");
    let told = (session, EventBody::SessionAttached { attachment: 2 });
    assert_eq!(cluster.nodes[&leader].events, [told]);
    for _ in 0..2 {
        cluster.run_ms(900);
        for (node, attachment) in [(leader, 0), (follower, 1)] {
            let number = cluster.renew_for(node, session, attachment);
            cluster.settle();
            assert_eq!(cluster.outcome(node, number), "Ok(NotRun(Superseded))");
        }
    }
    cluster.run_ms(900);
    let number = cluster.renew_for(follower, session, 2);
    cluster.settle();
    assert_eq!(
        cluster.outcome(follower, number),
        "Ok(SessionEnded(Expired))"
    );
}

#[test]
fn a_renewal_on_a_leader_cut_off_is_not_acknowledged() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    let session = cluster.open(old, 60_000);
    cluster.cut.push(old);
    let number = cluster.renew(old, session);
    cluster.run_ms(2_000);
    assert_eq!(
        cluster.outcome(old, number),
        "Err(NotLeader { leader: None })"
    );
}

#[test]
fn a_new_leader_gives_every_session_its_full_ttl() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    let session = cluster.open(old, 2_000);
    cluster.run_ms(1_500);
    cluster.cut.push(old);
    cluster.run_ms(1_500);
    let new = cluster.leader();
    assert!(
        cluster.nodes[&new]
            .replica
            .state()
            .sessions()
            .get(session)
            .is_some()
    );
    cluster.run_ms(2_500);
    assert!(
        cluster.nodes[&new]
            .replica
            .state()
            .sessions()
            .get(session)
            .is_none()
    );
}

#[test]
fn a_stall_of_the_leader_expires_nobody() {
    let mut cluster = Cluster::ready(1);
    let session = cluster.open(NodeId(1), 2_000);
    cluster.boot_us += 60_000_000;
    cluster.settle();
    assert!(
        cluster.nodes[&NodeId(1)]
            .replica
            .state()
            .sessions()
            .get(session)
            .is_some()
    );
    cluster.run_ms(2_000);
    assert!(
        cluster.nodes[&NodeId(1)]
            .replica
            .state()
            .sessions()
            .get(session)
            .is_none()
    );
}

/// The shortest TTL there is, and the longest stall that such a session can have seen
/// the beginning of: its client has renewed in time, but the leader has yet to read that.
#[test]
fn who_has_renewed_during_a_stall_of_the_leader_is_not_expired() {
    let (one, ttl_ms) = (NodeId(1), limits::SESSION_TTL_MS_MIN);
    for stall_ms in (150..900).step_by(50) {
        let mut cluster = Cluster::ready(1);
        let session = cluster.open(one, ttl_ms);
        cluster.run_ms(ttl_ms / 3);
        cluster.boot_us += stall_ms * 1_000;
        // Turns before the renewal is read.
        cluster.settle();
        cluster.run_ms(30);
        let number = cluster.renew(one, session);
        cluster.settle();
        let renewed = format!("Ok(Renewed {{ ttl_ms: {ttl_ms} }})");
        assert_eq!(cluster.outcome(one, number), renewed, "{stall_ms}");
        cluster.run_ms(ttl_ms + 100);
        let state = cluster.nodes[&one].replica.state();
        assert!(state.sessions().is_empty(), "it has ended without renewals");
    }
}

/// No turn is in time on such a disk, and yet time goes on.
#[test]
fn sessions_expire_while_every_turn_takes_long() {
    let mut cluster = Cluster::ready(1);
    cluster.open(NodeId(1), 1_000);
    for _ in 0..20 {
        cluster.boot_us += 3 * HEARTBEAT_MS * 1_000;
        cluster.turn(NodeId(1));
    }
    let state = cluster.nodes[&NodeId(1)].replica.state();
    assert!(state.sessions().is_empty());
}

#[test]
fn many_sessions_expire_by_and_by() {
    let mut cluster = Cluster::ready(1);
    let full = limits::EXPIRY_WORK_PER_COMMAND_MAX;
    for _ in 0..2 * full + 1 {
        cluster.open(NodeId(1), 1_000);
    }
    let left = |cluster: &Cluster| cluster.nodes[&NodeId(1)].replica.state().sessions().len();
    let mut seen = Vec::new();
    for _ in 0..150 {
        cluster.run_ms(10);
        seen.push(left(&cluster));
    }
    seen.dedup();
    assert_eq!(seen, [2 * full + 1, full + 1, 1, 0]);
}

#[test]
fn closing_an_ended_session_says_how_it_ended() {
    let mut cluster = Cluster::ready(1);
    let session = cluster.open(NodeId(1), 2_000);
    let close = command::Body::CloseSession(CloseSession {
        session_id: session.0,
        attachment: 0,
    });
    let (first, second) = (
        cluster.send(NodeId(1), close.clone()),
        cluster.send(NodeId(1), close),
    );
    cluster.settle();
    assert_eq!(cluster.outcome(NodeId(1), first), "Ok(Done)");
    assert_eq!(
        cluster.outcome(NodeId(1), second),
        "Ok(SessionEnded(Closed))"
    );
}

#[test]
fn a_leader_that_resigns_hands_over_without_an_election_timeout() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    cluster.input(old, Input::Resign);
    cluster.run_ms(100);
    assert_ne!(cluster.leader(), old);
}

#[test]
fn a_new_cluster_waits_for_all_three_once() {
    let mut cluster = Cluster::new(3);
    cluster.cut.push(NodeId(3));
    cluster.run_ms(3_000);
    assert_eq!(
        cluster.nodes[&NodeId(1)].replica.status().role,
        Role::Joining
    );
    cluster.cut.clear();
    cluster.run_ms(3_000);
    cluster.cut.push(cluster.follower());
    let leader = cluster.leader();
    let number = cluster.append(leader, "a");
    cluster.settle();
    assert_eq!(cluster.outcome(leader, number), r#"Ok(Machine(Ok(b"a")))"#);
}

#[test]
fn an_emptied_directory_under_a_known_id_is_refused() {
    let mut cluster = Cluster::ready(3);
    let victim = cluster.follower();
    let emptied = fresh(victim, 3, 999);
    cluster
        .nodes
        .insert(victim, Node::new(emptied, 2, cluster.boot_us));
    cluster.run_ms(500);
    let fatal = cluster.nodes[&victim]
        .fatal
        .as_ref()
        .map(ToString::to_string);
    assert!(fatal.expect("it stops").contains("another data directory"));
    assert_eq!(
        cluster.nodes[&victim].log.hard_state,
        HardState::default(),
        "it never voted"
    );
}

#[test]
fn malformed_messages_of_peers_change_nothing() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let raft = |bytes: &'static [u8]| peer_message::Message::Raft(Bytes::from_static(bytes));
    let messages = [
        None,
        Some(raft(b"")),
        Some(raft(b"garbage")),
        // MsgPropose without entries; it names no sender.
        Some(raft(&[0x08, 0x02])),
        Some(peer_message::Message::Hello(Hello { incarnation: 0 })),
        Some(peer_message::Message::Hello(Hello { incarnation: 5 })),
        Some(forward(follower, 1, 1_000, 1, "two letters")),
    ];
    for message in messages {
        let message = PeerMessage { message };
        cluster.input(
            leader,
            Input::Peer {
                from: follower,
                message: message.clone(),
            },
        );
        cluster.input(
            leader,
            Input::Peer {
                from: NodeId(99),
                message,
            },
        );
    }
    cluster.run_ms(100);
    let number = cluster.append(leader, "a");
    cluster.settle();
    assert_eq!(cluster.outcome(leader, number), r#"Ok(Machine(Ok(b"a")))"#);
}

fn forward(
    from: NodeId,
    boot: u64,
    number: RequestNumber,
    term: Term,
    letter: &'static str,
) -> peer_message::Message {
    let origin = Some(Origin {
        node: from.0,
        boot,
        number,
    });
    let body = Some(command::Body::Machine(Bytes::from_static(
        letter.as_bytes(),
    )));
    peer_message::Message::Forward(Forward {
        boot,
        term,
        commands: vec![Command { origin, body }],
    })
}

#[test]
fn an_entry_of_a_newer_version_stops_the_node() {
    let mut log = fresh(NodeId(1), 1, 100);
    log.facts.admitted = true;
    log.hard_state = HardState {
        term: 1,
        vote: 1,
        commit: 1,
    };
    // Field 15 of an entry is unknown to this version.
    let data = Bytes::from_static(&[0x7a, 0x00]);
    let kind = conclave_core::log::EntryKind::Normal;
    log.entries = vec![LogEntry {
        index: 1,
        term: 1,
        kind,
        data,
    }];
    let mut cluster = Cluster::new(1);
    cluster.nodes.insert(NodeId(1), Node::new(log, 2, 0));
    cluster.run_ms(100);
    let fatal = cluster.nodes[&NodeId(1)]
        .fatal
        .as_ref()
        .map(ToString::to_string);
    assert!(fatal.expect("it stops").contains("newer version"));
}

#[test]
fn a_command_that_was_taken_is_never_refused_when_a_copy_comes_late() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let number = cluster.append(follower, "a");
    cluster.turn(follower);
    let copies = cluster.forwards(leader);
    assert_eq!(copies.len(), 1);
    cluster.turn(leader);
    // It is proposed. Then the leader hears of a higher term, and then again of
    // the command.
    let mut news = cluster.raft(follower, leader, MessageType::MsgHeartbeatResponse);
    news.term += 1;
    cluster.say_raft(&news);
    for message in copies {
        cluster.input(
            leader,
            Input::Peer {
                from: follower,
                message,
            },
        );
    }
    cluster.turn(leader);
    cluster.run_ms(3_000);
    assert_eq!(cluster.register(follower), "a");
    assert_eq!(cluster.outcome(follower, number), "Err(OutcomeUnknown)");
}

#[test]
fn a_command_that_comes_after_leadership_was_lost_is_refused_as_not_applied() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let number = cluster.append(follower, "a");
    let mut news = cluster.raft(follower, leader, MessageType::MsgHeartbeatResponse);
    news.term += 1;
    cluster.say_raft(&news);
    cluster.turn(leader);
    cluster.turn(follower);
    cluster.turn(leader);
    cluster.turn(follower);
    assert!(
        cluster
            .outcome(follower, number)
            .starts_with("Err(NotLeader")
    );
    cluster.run_ms(3_000);
    assert_eq!(cluster.register(follower), "");
}

#[test]
fn a_copy_from_before_a_restart_of_its_sender_is_not_run_again() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower, term) = (cluster.leader(), cluster.follower(), cluster.term());
    let first = forward(follower, 8, 1, term, "a");
    let second = forward(follower, 9, 1, term, "b");
    for message in [&first, &second, &first, &second] {
        cluster.say(follower, leader, message.clone());
        cluster.settle();
    }
    assert_eq!(cluster.register(leader), "ab");
}

#[test]
fn log_time_does_not_jump_to_the_clock_of_a_new_leader() {
    let mut cluster = Cluster::ready(3);
    // The last member, to whom leadership goes, runs on while the others start
    // again and lose the time between.
    let third = NodeId(3);
    cluster.cut.push(third);
    cluster.run_ms(60_000);
    cluster.restart(NodeId(1), 2);
    cluster.restart(NodeId(2), 2);
    cluster.run_ms(3_000);
    let old = cluster.leader();
    cluster.cut.clear();
    cluster.append(old, "a");
    cluster.run_ms(1_000);
    let before_ms = cluster.nodes[&old].replica.state().system().log_time();
    cluster.input(old, Input::Resign);
    cluster.run_ms(1_000);
    assert_eq!(cluster.leader(), third);
    cluster.append(third, "b");
    cluster.settle();
    let after_ms = cluster.nodes[&third].replica.state().system().log_time();
    assert!(
        (before_ms..=before_ms + 3_000).contains(&after_ms),
        "from {before_ms} to {after_ms}"
    );
}

#[test]
fn log_time_goes_on_while_nothing_is_proposed() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    cluster.append(old, "a");
    cluster.settle();
    let before_ms = cluster.nodes[&old].replica.state().system().log_time();
    cluster.run_ms(60_000);
    cluster.input(old, Input::Resign);
    cluster.run_ms(1_000);
    let new = cluster.leader();
    assert_ne!(new, old);
    cluster.append(new, "b");
    cluster.settle();
    let after_ms = cluster.nodes[&new].replica.state().system().log_time();
    assert!(
        (before_ms + 60_000..=before_ms + 61_000).contains(&after_ms),
        "from {before_ms} to {after_ms}"
    );
}

#[test]
fn no_message_outgrows_a_frame() {
    const MIB: usize = 1 << 20;
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let away = NodeId(6 - leader.0 - follower.0);
    cluster.cut.push(away);
    for node in [leader, follower] {
        for _ in 0..20 {
            cluster.put(node, MIB - 1_000);
        }
        cluster.run_ms(100);
    }
    cluster.cut.clear();
    cluster.run_ms(1_000);
    cluster.assert_equal_states();
    for ((from, to), (_, longest)) in &cluster.traffic {
        assert!(*longest < 4 * MIB, "{from} sent {longest} bytes to {to}");
    }
}

#[test]
fn a_read_whose_question_does_not_reach_the_leader_is_answered() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.mute.push((follower, leader));
    let number = cluster.read(follower);
    cluster.run_ms(2_000);
    assert_eq!(cluster.leader(), leader, "the follower hears it");
    let refused = format!("Err(NotLeader {{ leader: Some({leader:?}) }})");
    assert_eq!(cluster.outcome(follower, number), refused);
}

#[test]
fn messages_that_raft_would_panic_on_are_dropped() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let mut messages = Vec::new();
    for index in [50, u64::MAX] {
        let mut append = cluster.raft(leader, follower, MessageType::MsgAppend);
        append.index = index;
        append.commit = index;
        messages.push(append.clone());
        append.entries.push(Entry {
            index: index.wrapping_add(1),
            term: append.term,
            ..Entry::default()
        });
        messages.push(append);
        let mut heartbeat = cluster.raft(leader, follower, MessageType::MsgHeartbeat);
        heartbeat.commit = index;
        messages.push(heartbeat);
        let mut rejection = cluster.raft(follower, leader, MessageType::MsgAppendResponse);
        rejection.reject = true;
        rejection.reject_hint = index;
        messages.push(rejection);
    }
    let mut read = cluster.raft(leader, follower, MessageType::MsgReadIndex);
    read.entries.push(Entry::default());
    messages.push(read);
    for message in messages {
        cluster.say_raft(&message);
        cluster.settle();
    }
    let number = cluster.append(leader, "a");
    cluster.settle();
    assert_eq!(cluster.outcome(leader, number), r#"Ok(Machine(Ok(b"a")))"#);
}

#[test]
fn renewals_of_a_turn_are_answered_in_one_message() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let session = cluster.open(follower, 60_000);
    cluster.traffic.clear();
    let numbers: Vec<_> = (0..100).map(|_| cluster.renew(follower, session)).collect();
    cluster.settle();
    for number in numbers {
        assert_eq!(
            cluster.outcome(follower, number),
            "Ok(Renewed { ttl_ms: 60000 })"
        );
    }
    let (count, _) = cluster.traffic[&(leader, follower)];
    assert!(count < 10, "{count} messages");
}

#[test]
fn a_leader_that_hands_over_says_that_it_leads_no_more() {
    let mut cluster = Cluster::ready(3);
    let old = cluster.leader();
    cluster.input(old, Input::Resign);
    let number = cluster.append(old, "a");
    cluster.turn(old);
    assert_eq!(
        cluster.outcome(old, number),
        "Err(NotLeader { leader: None })"
    );
}

#[test]
fn a_timer_at_the_end_of_time_wakes_nobody() {
    let mut cluster = Cluster::ready(1);
    cluster.restart(NodeId(1), 2);
    cluster.run_ms(200);
    cluster.append(NodeId(1), "~");
    cluster.run_ms(200);
    assert!(cluster.nodes[&NodeId(1)].replica.next_turn_us() > cluster.boot_us);
}

#[test]
fn of_the_copies_of_a_waiting_request_the_newest_wait() {
    let mut cluster = Cluster::ready(1);
    let node = NodeId(1);
    let session = cluster.open(node, 10_000);
    let first = cluster.append_once(node, "?", (session, 1));
    let others: Vec<_> = (0..limits::REQUESTS_PER_PLACE_MAX)
        .map(|_| cluster.append_once(node, "?", (session, 1)))
        .collect();
    cluster.settle();
    assert_eq!(cluster.outcome(node, first), "Err(OutcomeUnknown)");
    cluster.append(node, ".");
    cluster.settle();
    for number in others {
        assert!(cluster.outcome(node, number).starts_with("Ok(Machine(Ok("));
    }
}

#[test]
fn of_requests_without_a_number_all_wait_at_one_place() {
    let mut cluster = Cluster::ready(1);
    let node = NodeId(1);
    let all: Vec<_> = (0..3 * limits::REQUESTS_PER_PLACE_MAX)
        .map(|_| cluster.append(node, "?"))
        .collect();
    cluster.settle();
    cluster.append(node, ".");
    cluster.settle();
    for number in all {
        assert!(cluster.outcome(node, number).starts_with("Ok(Machine(Ok("));
    }
}

#[test]
fn clusters_of_any_size_come_together_although_members_restart() {
    for size in [1, 2, 3, 4, 5] {
        let mut cluster = Cluster::new(size);
        for (boot, id) in (2..).zip((1..=size).cycle().take(20)) {
            // One turn of each member at a time, in the middle of admission.
            cluster.boot_us += 10_000;
            for node in (1..=size).map(NodeId) {
                cluster.turn(node);
            }
            cluster.restart(NodeId(id), boot);
        }
        cluster.run_ms(3_000);
        let (leader, last) = (cluster.leader(), NodeId(size));
        let number = cluster.append(last, "a");
        cluster.settle();
        assert_eq!(cluster.outcome(last, number), r#"Ok(Machine(Ok(b"a")))"#);
        cluster.run_ms(300);
        cluster.assert_equal_states();
        assert_eq!(
            cluster.nodes[&leader].replica.status().members.len() as u64,
            size
        );
    }
}

fn compact(revision: u64) -> command::Body {
    command::Body::Compact(Compact { revision })
}

#[test]
fn a_compaction_asked_of_a_follower_holds_on_every_member() {
    let mut cluster = Cluster::ready(3);
    let follower = cluster.follower();
    for _ in 0..5 {
        cluster.append(follower, "a");
        cluster.settle();
    }
    let number = cluster.send(follower, compact(4));
    cluster.settle();
    assert_eq!(cluster.outcome(follower, number), "Ok(Compacted(Ok(())))");
    // Nobody writes, and yet what it left is dropped.
    cluster.run_ms(500);
    cluster.assert_equal_states();
    for node in cluster.nodes.values() {
        let keyspace = node.replica.state().keyspace();
        assert_eq!(
            (keyspace.compacted(), keyspace.has_superseded()),
            (4, false)
        );
    }
    cluster.last_number += 1;
    let number = cluster.last_number;
    let query = Query::Range {
        range: KeyRange::prefix(b""),
        revision: Some(3),
        filter: Filter::default(),
        limit: 1,
    };
    cluster.input(follower, Input::Read { number, query });
    cluster.settle();
    let refused = "Ok(Range(Err(Compacted { asked: 3, compacted: 4 })))";
    assert_eq!(cluster.outcome(follower, number), refused);
}

#[test]
fn above_the_quota_what_grows_is_refused_until_there_is_space_and_an_operator_says_so() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let session = cluster.open(follower, 60_000);
    for _ in 0..9 {
        cluster.put(leader, 1_000_000);
        cluster.settle();
    }
    cluster.run_ms(200);
    let open = || command::Body::OpenSession(OpenSession::default());
    for body in [command::Body::Machine(Bytes::from_static(b"a")), open()] {
        let number = cluster.send(follower, body);
        cluster.settle();
        assert_eq!(cluster.outcome(follower, number), "Ok(NoSpace)");
    }
    let session_id = session.0;
    let close = command::Body::CloseSession(CloseSession {
        session_id,
        attachment: 0,
    });
    let number = cluster.send(follower, close);
    cluster.settle();
    assert_eq!(cluster.outcome(follower, number), "Ok(Done)");

    let disarm = || {
        command::Body::NoSpace(NoSpace {
            raised: false,
            member: 0,
        })
    };
    let is_raised = |cluster: &Cluster| cluster.nodes[&leader].replica.status().is_out_of_space();
    cluster.send(follower, disarm());
    cluster.run_ms(200);
    assert!(is_raised(&cluster), "raised again while there is too much");
    let newest = cluster.nodes[&leader].replica.status().revision;
    cluster.send(follower, compact(newest));
    cluster.run_ms(200);
    cluster.send(follower, disarm());
    cluster.run_ms(200);
    assert!(!is_raised(&cluster));
    let number = cluster.send(follower, open());
    cluster.settle();
    assert!(cluster.outcome(follower, number).contains("SessionOpened"));
    cluster.run_ms(200);
    cluster.assert_equal_states();
}

#[test]
fn a_member_whose_state_went_astray_stops_and_the_others_go_on() {
    let mut cluster = Cluster::ready(3);
    let node = NodeId(1);
    // What one member says of entries that nobody has does not hide it.
    for ahead in 1..=2 * limits::DIGESTS_KEPT as u64 {
        let index = (1 << 32) + ahead * limits::DIGEST_EVERY;
        let digest = StateDigest { index, digest: 1 };
        let message = peer_message::Message::StateDigest(digest);
        cluster.say(node, NodeId(3), message);
    }
    cluster.append(node, "#");
    cluster.run_ms(100);
    let mut index = 0;
    while index < 3 * limits::DIGEST_EVERY {
        cluster.append(node, "a");
        cluster.run_ms(10);
        index = cluster.nodes[&node].replica.status().applied;
    }
    let fatal = cluster.nodes[&NodeId(3)]
        .fatal
        .as_ref()
        .expect("it stopped");
    let Fatal::Diverged {
        node: NodeId(3),
        index,
    } = fatal
    else {
        panic!("{fatal:?}");
    };
    assert!(index.is_multiple_of(limits::DIGEST_EVERY), "at {index}");
    cluster.run_ms(3_000);
    let number = cluster.append(node, "z");
    cluster.run_ms(100);
    assert!(cluster.outcome(node, number).ends_with("z\")))"));
    assert!(cluster.nodes[&node].fatal.is_none() && cluster.nodes[&NodeId(2)].fatal.is_none());
}

#[test]
fn nobody_holds_more_of_the_log_than_there_is() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    let last = cluster.nodes[&follower].replica.status().last;
    let held = |index| peer_message::Message::Held(Held { index });
    cluster.say(leader, follower, held(last + 1_000));
    cluster.say(leader, follower, held(u64::MAX));
    cluster.settle();
    assert!(cluster.nodes[&follower].replica.held_by_all() <= last);
    cluster.say(leader, follower, held(last));
    cluster.settle();
    assert!(cluster.nodes[&follower].replica.held_by_all() >= last);
}

#[test]
fn the_apply_version_is_raised_when_every_member_has_said_that_it_supports_it() {
    let mut cluster = Cluster::new(3);
    // All must have met before any may vote.
    cluster.run_ms(100);
    cluster.cut.push(NodeId(2));
    cluster.run_ms(3_000);
    let leader = cluster.leader();
    let version = |cluster: &Cluster| {
        let state = cluster.nodes[&leader].replica.state();
        (
            state.system().members().len(),
            state.system().apply_version(),
        )
    };
    assert_eq!(version(&cluster), (2, 0));
    cluster.cut.clear();
    cluster.run_ms(4_000);
    assert_eq!(version(&cluster), (3, APPLY_VERSION));
    cluster.assert_equal_states();
}

/// With everything but a thread, since the order is that of its inbox.
/// A member over a disk, as a process runs it, and what it has sent.
struct Member {
    handle: node::Handle<Register>,
    node: node::Node<Register, SimDisk>,
    sent: mpsc::Receiver<(NodeId, PeerMessage)>,
    is_stopped: bool,
}

/// Makes responders, and gives what these are told, which must be answers.
fn responders() -> (
    impl Fn() -> Responder<Register>,
    mpsc::Receiver<AnswerBody<Register>>,
) {
    let (told, answers) = mpsc::channel();
    let respond = move || -> Responder<Register> {
        let told = told.clone();
        Box::new(move |answer| told.send(answer.unwrap().body).unwrap())
    };
    (respond, answers)
}

impl Member {
    /// A sole member, once it leads and serves.
    fn leading() -> Self {
        let mut member = Self::open(NodeId(1), 1, ELECTION_MS);
        while !(member.serves() && member.handle.status().role == Role::Leader) {
            member.turn();
            thread::yield_now();
        }
        member
    }

    fn open(id: NodeId, size: u64, election_ms: u64) -> Self {
        let recovered = fresh(id, size, 100 + id.0);
        let log = Log::create(
            SimDisk::new(),
            recovered.identity.clone(),
            recovered.facts.clone(),
        )
        .unwrap();
        let (send, sent) = mpsc::channel();
        let outlets = Outlets {
            wake: Box::new(|| ()),
            answered: Box::new(|| ()),
            send: Box::new(move |messages| {
                for message in messages {
                    send.send(message).ok();
                }
            }),
            publish: Box::new(|_| ()),
            missed: Box::new(|| ()),
            notify: Box::new(|_| ()),
            fetch: Box::new(|_, _| ()),
        };
        let config = Config {
            election_ms,
            ..config(&recovered, 1)
        };
        let stores = Stores {
            log,
            state: Some(State::<Register>::new(recovered.identity.cluster)),
            recovered,
            checkpoints: Writer::start(SimCheckpoints::new()).unwrap(),
            checkpoint_every: Index::MAX,
            log_bytes_max: limits::LOG_BYTES_MAX,
        };
        let (handle, node) = node::open(config, stores, outlets);
        Self {
            handle,
            node,
            sent,
            is_stopped: false,
        }
    }

    fn turn(&mut self) {
        if !self.is_stopped {
            if let Some(save) = self.node.begin_turn().unwrap() {
                self.node.saved(save.run()).unwrap();
            }
            self.is_stopped = self.node.finish_turn().unwrap() == node::Progress::Stopped;
        }
    }

    /// Whether it leads or follows, and has applied what there is.
    fn serves(&self) -> bool {
        let status = self.handle.status();
        status.leader.is_some() && status.applied > 0 && status.applied == status.last
    }
}

fn letter(letter: &'static [u8]) -> command::Body {
    command::Body::Machine(letter.into())
}

#[test]
fn a_follower_that_stops_answers_what_is_under_way() {
    let mut members: Vec<Member> = (1..=3)
        .map(|id| Member::open(NodeId(id), 3, 2_000))
        .collect();
    let turn = |members: &mut Vec<Member>| {
        for from in 0..members.len() {
            members[from].turn();
            let sent: Vec<_> = members[from].sent.try_iter().collect();
            for (to, message) in sent {
                let to = usize::try_from(to.0 - 1).unwrap();
                members[to].handle.peer(NodeId(from as u64 + 1), [message]);
            }
        }
        thread::yield_now();
    };
    while !members.iter().all(Member::serves) {
        turn(&mut members);
    }
    let follows = |member: &Member| member.handle.status().role == Role::Follower;
    let follower = members.iter().position(follows).unwrap();
    let handle = members[follower].handle.clone();
    let (told, answers) = mpsc::channel();
    let respond = || -> Responder<Register> {
        let told = told.clone();
        Box::new(move |answer| drop(told.send(answer.map(|answer| answer.body))))
    };
    handle.command(letter(b"a"), respond()).unwrap();
    handle.read(Query::Barrier, respond()).unwrap();
    // Nobody knows when this one is answered.
    handle.command(letter(b"?"), respond()).unwrap();
    handle.stop();
    while !members[follower].is_stopped {
        turn(&mut members);
    }
    let told: Vec<_> = answers.try_iter().collect();
    assert!(matches!(told[..], [Ok(_), Ok(_)]), "{told:?}");
    let refused = handle.command(letter(b"b"), respond());
    assert_eq!(refused, Err(Failure::ShuttingDown));
}

#[test]
fn what_gives_something_back_goes_ahead_of_other_work() {
    let mut member = Member::leading();
    let handle = member.handle.clone();
    let (respond, answers) = responders();
    handle.command(letter(b"a"), respond()).unwrap();
    handle.command(letter(b"b"), respond()).unwrap();
    handle.ending(letter(b"c"), respond()).unwrap();
    for _ in 0..3 {
        member.turn();
    }
    let told: Vec<_> = answers.try_iter().map(|body| format!("{body:?}")).collect();
    let expected = ["c", "ca", "cab"]
        .map(|text| format!("{:?}", AnswerBody::<Register>::Machine(Ok(text.into()))));
    assert_eq!(told, expected);
}

#[test]
fn who_waits_on_an_idle_follower_does_not_wait_for_a_heartbeat() {
    let mut cluster = Cluster::ready(3);
    let leader = cluster.leader();
    let others = || (1..=3).map(NodeId).filter(|id| *id != leader);
    let waiting: Vec<_> = others().map(|id| cluster.append(id, "?")).collect();
    // Long enough for both to count as idle, and then until a heartbeat has just been.
    cluster.run_ms(500);
    let said = |cluster: &Cluster| cluster.traffic[&(leader, cluster.follower())].0;
    let before = said(&cluster);
    while said(&cluster) == before {
        cluster.run_ms(10);
    }
    cluster.append(leader, ".");
    cluster.turn(leader);
    let is_told = |cluster: &Cluster, id: &NodeId| !cluster.nodes[id].inbox.is_empty();
    let late = others().find(|id| !is_told(&cluster, id)).unwrap();
    let fast = others().find(|id| *id != late).unwrap();
    // What is held back leaves before the entry is committed, and the word that it is
    // before the late one has acknowledged it.
    cluster.boot_us += 2_000;
    cluster.turn(leader);
    cluster.turn(fast);
    cluster.turn(leader);
    cluster.turn(leader);
    let inbox = &mut cluster.nodes.get_mut(&late).unwrap().inbox;
    assert_eq!(inbox.len(), 2, "the entry, and that it is committed");
    let word = inbox.pop_back().unwrap();
    cluster.turn(late);
    cluster.input(late, word);
    cluster.settle();
    for (id, number) in others().zip(waiting) {
        let outcome = cluster.outcome(id, number);
        assert!(outcome.starts_with("Ok("), "{id}: {outcome}");
    }
}

#[test]
fn what_is_kept_does_not_hold_on_to_the_entry_it_came_in() {
    let mut cluster = Cluster::ready(1);
    let leader = cluster.leader();
    cluster.put(leader, 10);
    cluster.run_ms(10);
    let node = &cluster.nodes[&leader];
    let entry = node.log.entries.iter().map(|entry| &entry.data);
    let inside = |bytes: &Bytes| {
        let mut entries = entry.clone();
        entries.any(|entry| entry.as_ptr_range().contains(&bytes.as_ptr()))
    };
    let record = node.replica.state().keyspace().get(b"key").unwrap();
    assert!(!inside(&record.key) && !inside(&record.value));
}

#[test]
fn members_go_on_from_checkpoints() {
    let mut cluster = Cluster::ready(3);
    let (leader, follower) = (cluster.leader(), cluster.follower());
    cluster.open(leader, 60_000);
    cluster.append_some(follower, 5);
    cluster.run_ms(300);
    for (boot, id) in (2..).zip([1, 2, 3]) {
        cluster.restart_from_checkpoint(NodeId(id), boot, id - 1);
        cluster.run_ms(3_000);
        let leader = cluster.leader();
        cluster.append_some(leader, 2);
        // So that nobody needs what the next one has cut off.
        cluster.run_ms(300);
    }
    cluster.assert_equal_states();
    assert_eq!(cluster.register(follower), "a".repeat(11));
    let sessions = cluster.nodes[&leader].replica.state().sessions();
    assert_eq!(sessions.len(), 1);
}

#[test]
fn the_log_is_kept_for_who_is_away() {
    let mut cluster = Cluster::ready(3);
    let (leader, away) = (cluster.leader(), cluster.follower());
    let held = |cluster: &Cluster| {
        let nodes = cluster.nodes.values();
        nodes.map(|node| node.replica.held_by_all()).max().unwrap()
    };
    cluster.cut.push(away);
    cluster.run_ms(100);
    let before = held(&cluster);
    let reached = cluster.nodes[&away].replica.status().last;
    assert!(before <= reached);
    cluster.append_some(leader, 10);
    cluster.run_ms(100);
    assert!(held(&cluster) <= reached, "it may need all behind that");
    cluster.cut.clear();
    cluster.run_ms(1_000);
    for node in cluster.nodes.values() {
        let status = node.replica.status();
        assert_eq!(node.replica.held_by_all(), status.last);
    }
}

#[test]
fn who_is_behind_a_log_that_was_cut_harms_nobody() {
    let mut cluster = Cluster::ready(3);
    let (leader, away) = (cluster.leader(), cluster.follower());
    cluster.append_some(leader, 3);
    cluster.cut.push(away);
    cluster.run_ms(100);
    let reached = cluster.nodes[&away].replica.state().applied();
    cluster.append_some(leader, 10);
    for node in cluster.nodes.values_mut() {
        // More than is applied is never cut.
        node.replica.cut(u64::MAX);
    }
    cluster.cut.clear();
    cluster.run_ms(3_000);
    let leader = cluster.leader();
    let number = cluster.append(leader, "b");
    cluster.run_ms(1_000);
    assert!(cluster.outcome(leader, number).starts_with("Ok("));
    assert!(cluster.nodes.values().all(|node| node.fatal.is_none()));
    assert_eq!(cluster.nodes[&away].replica.state().applied(), reached);
}

#[test]
fn a_turn_takes_no_more_than_it_bears_and_the_next_follows_at_once() {
    let mut member = Member::leading();
    let handle = member.handle.clone();
    let asked = 2 * limits::REQUESTS_PER_TURN_MAX + 1;
    let (told, answers) = mpsc::channel();
    for number in 0..asked {
        let told = told.clone();
        let respond: Responder<Register> =
            Box::new(move |answer| told.send((number, answer.is_ok())).unwrap());
        handle.read(Query::Barrier, respond).unwrap();
    }
    let mut turns = 0;
    let mut told = Vec::new();
    while told.len() < asked {
        member.turn();
        turns += 1;
        told.extend(answers.try_iter());
        assert!(told.len() <= turns * limits::REQUESTS_PER_TURN_MAX);
        if turns < 3 {
            assert!(member.node.wait().is_zero());
        }
    }
    assert!(told.into_iter().eq((0..asked).map(|number| (number, true))));
}

#[test]
fn a_turn_applies_no_more_than_it_bears_and_the_next_follows_at_once() {
    let mut member = Member::leading();
    let handle = member.handle.clone();
    let (respond, answers) = responders();
    let mut sessions = Vec::new();
    for _ in 0..3 {
        let open = command::Body::OpenSession(OpenSession::default());
        handle.command(open, respond()).unwrap();
    }
    while sessions.len() < 3 {
        member.turn();
        for body in answers.try_iter() {
            match body {
                AnswerBody::SessionOpened { session, .. } => sessions.push(session),
                other => panic!("{other:?}"),
            }
        }
    }
    // Two of them take more than a turn.
    let keys = limits::CHANGES_PER_TURN_MAX * 3 / 4;
    for session in &sessions {
        let put = |number: usize| Operation {
            operation: Some(operation::Operation::Put(Put {
                key: format!("{session}/{number}").into(),
                value: Bytes::new(),
                lease: session.0,
                ..Put::default()
            })),
        };
        let txn = Txn {
            success: (0..keys).map(put).collect(),
            ..Txn::default()
        };
        handle.command(command::Body::Txn(txn), respond()).unwrap();
    }
    let mut bound = 0;
    while bound < 3 {
        member.turn();
        bound += answers.try_iter().count();
    }
    for session in &sessions {
        let session_id = session.0;
        let close = command::Body::CloseSession(CloseSession {
            session_id,
            attachment: 0,
        });
        handle.ending(close, respond()).unwrap();
    }
    let mut closed = Vec::new();
    while closed.iter().sum::<usize>() < 3 {
        member.turn();
        closed.push(answers.try_iter().count());
        if closed.ends_with(&[2]) {
            assert!(member.node.wait().is_zero());
        }
    }
    closed.retain(|answers| *answers > 0);
    assert_eq!(closed, [2, 1]);
}

#[test]
fn what_looks_at_many_keys_is_applied_in_turns_of_its_own() {
    let mut member = Member::leading();
    let handle = member.handle.clone();
    let (respond, answers) = responders();
    let put = |number: usize| Operation {
        operation: Some(operation::Operation::Put(Put {
            key: format!("k{number}").into(),
            ..Put::default()
        })),
    };
    let keys = limits::CHANGES_PER_TURN_MAX;
    for numbers in [0..keys / 2, keys / 2..keys] {
        let txn = Txn {
            success: numbers.map(put).collect(),
            ..Txn::default()
        };
        handle.command(command::Body::Txn(txn), respond()).unwrap();
    }
    let mut are_there = 0;
    while are_there < 2 {
        member.turn();
        are_there += answers.try_iter().count();
    }
    // One that looks at a single key shares its entry with the one before it.
    for end in ["l", "l", "", "l"] {
        let there = Compare {
            key: "k".into(),
            end: end.into(),
            target: Some(compare::Target::Version(1)),
            ..Compare::default()
        };
        let txn = Txn {
            compares: vec![there],
            ..Txn::default()
        };
        handle.command(command::Body::Txn(txn), respond()).unwrap();
    }
    let mut answered = Vec::new();
    while answered.iter().sum::<usize>() < 4 {
        member.turn();
        answered.push(answers.try_iter().count());
    }
    answered.retain(|answers| *answers > 0);
    assert_eq!(answered, [1, 2, 1]);
}
