//! A [`Replica`] with its log, its clock and an inbox: everything but the thread
//! that runs it.
//!
//! The rest of the process talks to it through a [`Handle`], which puts requests
//! into the inbox. Each turn takes all that has arrived, in this order: what peers
//! sent, renewals, what gives something back, then other work; so under load,
//! batches form by themselves while the disk is busy. There is one sync a turn at
//! most, between the two halves of the turn.
//!
//! Whoever runs the node does nothing but this, on one thread: wait for
//! [`Node::wait`] or until woken, [`Node::begin_turn`], let leave what was sent,
//! [`Node::finish_turn`].

use std::{
    collections::BTreeMap,
    error::Error as _,
    fmt, mem,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use conclave_proto::internal::{PeerMessage, command};
use prost::Message as _;
use rustix::time::{ClockId, clock_gettime};

use crate::{
    checkpoint::{Done, Schedule, Sink, Writer},
    disk::Disk,
    ids::{Attachment, Index, NodeId, RequestNumber, Revision, SessionId},
    limits,
    log::{Batch, Log, LogError, Recovered},
    machine::Machine,
    replica::{
        Answer, Config, Event, Failure, Fatal, Fetch, Finished, Input, Now, Query, Replica, Role,
        Status,
    },
    state::State,
    watch,
};

/// How often it looks whether the disk takes more of a checkpoint.
const ROOM_EVERY: Duration = Duration::from_millis(2);
/// How long nothing is written before the newest batch gets a mark behind it.
const MARK_AFTER_US: u64 = 50_000;

/// Called once with the outcome of a request, on the node's thread; must not
/// block.
pub type Responder<M> = Box<dyn FnOnce(Result<Answer<M>, Failure>) + Send>;

/// Called on the node's thread with what leaves it; must not block.
pub type Outlet<T> = Box<dyn FnMut(Vec<T>) + Send>;

/// Where the node sends what leaves it.
pub struct Outlets<M: Machine> {
    /// Wakes the node's thread, from any thread: something has arrived. A wake
    /// while it does not wait must end its next wait at once.
    pub wake: Box<dyn Fn() + Send + Sync>,
    /// Told after the answers of a turn were given to their responders, so that
    /// threads which wait for several are woken once.
    pub answered: Box<dyn FnMut() + Send>,
    /// Sends to peers; may drop what it cannot send.
    pub send: Outlet<(NodeId, PeerMessage)>,
    /// Tells sessions; each call brings events in order, after the answers of the
    /// same turn have been given.
    pub publish: Outlet<Event<M::Event>>,
    /// Told that sessions have missed events, before later ones are published.
    pub missed: Box<dyn FnMut() + Send>,
    /// Tells readers of events, in order.
    pub notify: Outlet<(watch::StreamId, watch::Notice)>,
    /// Gets a checkpoint from another member, record by record, into the sink; dropping
    /// that ends the attempt.
    pub fetch: Box<dyn FnMut(Fetch, Sink) + Send>,
}

impl<M: Machine> fmt::Debug for Outlets<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlets").finish_non_exhaustive()
    }
}

/// How the rest of the process talks to the node. Cheap to clone.
pub struct Handle<M: Machine> {
    shared: Arc<Shared<M>>,
}

impl<M: Machine> Clone for Handle<M> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<M: Machine> fmt::Debug for Handle<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

/// What a node goes on from, and where it keeps what it must not forget.
#[derive(Debug)]
pub struct Stores<M: Machine, D> {
    /// The log.
    pub log: Log<D>,
    /// What it held.
    pub recovered: Recovered,
    /// The state of a checkpoint from which the log goes on; see
    /// [`checkpoint::restore`](crate::checkpoint::restore).
    pub state: Option<State<M>>,
    /// Writes checkpoints.
    pub checkpoints: Writer<M>,
    /// Entries between two checkpoints.
    pub checkpoint_every: Index,
    /// Bytes of log that are kept for members who are away.
    pub log_bytes_max: u64,
}

/// A node over its stores, and the way to talk to it.
pub fn open<M: Machine + Send + 'static, D: Disk>(
    config: Config,
    stores: Stores<M, D>,
    outlets: Outlets<M>,
) -> (Handle<M>, Node<M, D>) {
    let Stores {
        log,
        recovered,
        state,
        checkpoints,
        checkpoint_every,
        log_bytes_max,
    } = stores;
    let Outlets {
        wake,
        answered,
        send,
        publish,
        missed,
        notify,
        fetch,
    } = outlets;
    let newest = state.as_ref().map_or(0, State::applied);
    let shared = Arc::new(Shared {
        inbox: Mutex::new(Inbox::default()),
        wake,
        status: Mutex::default(),
        log_bytes: AtomicU64::new(log.bytes()),
        checkpoint: AtomicU64::new(newest),
        wanted: AtomicU64::new(0),
        installs: AtomicU64::new(0),
        sent: Arc::default(),
    });
    let handle = Handle {
        shared: Arc::clone(&shared),
    };
    let now = now();
    let node = Node {
        election_us: config.election_ms * 1_000,
        schedule: Schedule::new(checkpoint_every, log_bytes_max, newest),
        replica: Replica::new(config, recovered, state, now),
        log,
        checkpoints,
        is_warned: false,
        answered,
        send,
        publish,
        missed,
        notify,
        fetch,
        is_fetch_refused: false,
        shared,
        responders: BTreeMap::new(),
        last_number: 0,
        last_append_us: now.boot_us,
        is_more_left: false,
        unsaved: None,
        give_up_us: None,
    };
    (handle, node)
}

impl<M: Machine> Handle<M> {
    /// Hands a command over. `respond` is called exactly once, on the node's thread.
    ///
    /// # Errors
    ///
    /// If the queue is full or the node is stopping; then `respond` is not called.
    pub fn command(&self, body: command::Body, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Command(body), respond)
    }

    /// Hands over a command that gives something back: a release, a cancel, the end
    /// of a session. It goes ahead of other work that has arrived, and overload with
    /// that does not refuse it; otherwise as [`Handle::command`].
    pub fn ending(&self, body: command::Body, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Ending(body), respond)
    }

    /// Asks a linearizable question; otherwise as [`Handle::command`].
    pub fn read(&self, query: Query<M>, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Read(query), respond)
    }

    /// Asks what this node has applied, without a word to others; otherwise as
    /// [`Handle::command`].
    pub fn read_local(&self, query: Query<M>, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::LocalRead(query), respond)
    }

    /// Renews a session for one of its attachments; otherwise as [`Handle::command`].
    pub fn renew(&self, of: Attachment, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Renew(of), respond)
    }

    /// Hands over what a reader of events asks for; it is told by notices.
    ///
    /// # Errors
    ///
    /// If a new watcher or a question is too much at the moment, or the node is
    /// stopping.
    pub fn watch(&self, request: watch::Request) -> Result<(), Failure> {
        self.shared.watch(request)
    }

    /// Asks how long a session has left, which only the leader knows; otherwise as
    /// [`Handle::command`].
    pub fn time_left(&self, session: SessionId, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::TimeLeft(session), respond)
    }

    /// Asks for a hash over all keys as this node has them, at a revision or now;
    /// otherwise as [`Handle::command`].
    pub fn hash(&self, at: Option<Revision>, respond: Responder<M>) -> Result<(), Failure> {
        self.shared.request(Request::Hash(at), respond)
    }

    /// Has leadership handed over to a member, if this one has it. Whether it comes to
    /// that is seen by [`Handle::status`], after one election timeout at most.
    pub fn hand_over(&self, to: NodeId) {
        unpoisoned(self.shared.inbox.lock()).hand_over = Some(to);
        (self.shared.wake)();
    }

    /// Hands over what a peer sent, in one go, so that one turn takes it all.
    /// Dropped if too much is waiting, as a network would.
    pub fn peer(&self, from: NodeId, messages: impl IntoIterator<Item = PeerMessage>) {
        let inputs = messages.into_iter();
        self.shared
            .peer(inputs.map(|message| Input::Peer { from, message }));
    }

    /// Says that the connection to a peer broke.
    pub fn peer_lost(&self, peer: NodeId) {
        self.shared.peer([Input::PeerLost { peer }]);
    }

    /// What the node knows of itself, as of its last turn.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&*unpoisoned(self.shared.status.lock()))
    }

    /// How many checkpoints of other members this one has gone on from, since its start.
    pub fn installs(&self) -> u64 {
        self.shared.installs.load(Ordering::Relaxed)
    }

    /// Bytes of the log on disk.
    pub fn log_bytes(&self) -> u64 {
        self.shared.log_bytes.load(Ordering::Relaxed)
    }

    /// The newest checkpoint that is durable; 0 for none.
    pub fn checkpoint(&self) -> Index {
        self.shared.checkpoint.load(Ordering::Relaxed)
    }

    /// Asks that a checkpoint be made which reaches up to this entry, once that can be.
    pub fn want_checkpoint(&self, at_least: Index) {
        self.shared.wanted.fetch_max(at_least, Ordering::Relaxed);
    }

    /// While what this gives is there, the log is kept behind a checkpoint: another
    /// member is sent it, and will need what follows.
    pub fn keep_log_behind(&self, at: Index) -> Sent {
        let all = Arc::clone(&self.shared.sent);
        unpoisoned(all.lock()).push(at);
        Sent { all, at }
    }

    /// Refuses new work, hands leadership over if this node has it, waits for answers
    /// to what is under way, but for locks, and then stops; after one election timeout
    /// at most.
    pub fn stop(&self) {
        unpoisoned(self.shared.inbox.lock()).stopping = true;
        (self.shared.wake)();
    }
}

struct Shared<M: Machine> {
    inbox: Mutex<Inbox<M>>,
    wake: Box<dyn Fn() + Send + Sync>,
    status: Mutex<Arc<Status>>,
    log_bytes: AtomicU64,
    /// The newest that is durable.
    checkpoint: AtomicU64,
    /// Some member needs one that reaches up to here.
    wanted: AtomicU64,
    installs: AtomicU64,
    /// Those that are being sent.
    sent: Arc<Mutex<Vec<Index>>>,
}

/// A checkpoint that another member is sent; see [`Handle::keep_log_behind`].
#[derive(Debug)]
pub struct Sent {
    all: Arc<Mutex<Vec<Index>>>,
    at: Index,
}

impl Drop for Sent {
    fn drop(&mut self) {
        let mut sent = unpoisoned(self.all.lock());
        if let Some(place) = sent.iter().position(|at| *at == self.at) {
            sent.swap_remove(place);
        }
    }
}

/// What has arrived, by urgency.
struct Inbox<M: Machine> {
    peers: Vec<Input<M>>,
    peer_bytes: usize,
    renewals: Queue<Attachment, Responder<M>>,
    endings: Queue<command::Body, Responder<M>>,
    work: Queue<Request<M>, Responder<M>>,
    watches: Queue<watch::Request, ()>,
    hand_over: Option<NodeId>,
    stopping: bool,
}

/// Requests that wait, the oldest first, within bounds on their number and bytes; each
/// with whom to answer.
struct Queue<T, R> {
    waiting: Vec<(T, usize, R)>,
    bytes: usize,
}

enum Request<M: Machine> {
    Command(command::Body),
    Ending(command::Body),
    Read(Query<M>),
    LocalRead(Query<M>),
    Renew(Attachment),
    TimeLeft(SessionId),
    Hash(Option<Revision>),
}

impl<M: Machine> Default for Inbox<M> {
    fn default() -> Self {
        Self {
            peers: Vec::new(),
            peer_bytes: 0,
            renewals: Queue::default(),
            endings: Queue::default(),
            work: Queue::default(),
            watches: Queue::default(),
            hand_over: None,
            stopping: false,
        }
    }
}

impl<T, R> Default for Queue<T, R> {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            bytes: 0,
        }
    }
}

impl<T, R> Queue<T, R> {
    /// Adds a request of so many bytes, if there is room: for `max` in all.
    fn put(&mut self, request: T, bytes: usize, respond: R, max: usize) -> Result<(), Failure> {
        if self.waiting.len() >= max || self.bytes + bytes > limits::QUEUED_BYTES_MAX {
            return Err(Failure::Overloaded);
        }
        self.bytes += bytes;
        self.waiting.push((request, bytes, respond));
        Ok(())
    }

    /// Splits the first `max` off.
    fn take(&mut self, max: usize) -> Self {
        let rest = self.waiting.split_off(max.min(self.waiting.len()));
        let waiting = mem::replace(&mut self.waiting, rest);
        let bytes = waiting.iter().map(|(_, bytes, _)| bytes).sum();
        self.bytes -= bytes;
        Self { waiting, bytes }
    }

    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn into_iter(self) -> impl Iterator<Item = (T, R)> {
        let waiting = self.waiting.into_iter();
        waiting.map(|(request, _, respond)| (request, respond))
    }
}

impl<M: Machine> Inbox<M> {
    fn is_empty(&self) -> bool {
        self.peers.is_empty()
            && self.renewals.is_empty()
            && self.endings.is_empty()
            && self.work.is_empty()
            && self.watches.is_empty()
    }
}

impl<M: Machine> Shared<M> {
    fn request(&self, request: Request<M>, respond: Responder<M>) -> Result<(), Failure> {
        let mut inbox = unpoisoned(self.inbox.lock());
        if inbox.stopping {
            return Err(Failure::ShuttingDown);
        }
        let was_empty = inbox.is_empty();
        let bytes = match &request {
            Request::Command(body) | Request::Ending(body) => body.encoded_len(),
            Request::Read(_)
            | Request::LocalRead(_)
            | Request::Renew(_)
            | Request::TimeLeft(_)
            | Request::Hash(_) => 0,
        };
        match request {
            Request::Renew(of) => {
                let max = limits::QUEUED_RENEWALS_MAX;
                inbox.renewals.put(of, bytes, respond, max)?;
            }
            Request::Ending(body) => {
                let max = limits::QUEUED_ENDINGS_MAX;
                inbox.endings.put(body, bytes, respond, max)?;
            }
            Request::Command(_)
            | Request::Read(_)
            | Request::LocalRead(_)
            | Request::TimeLeft(_)
            | Request::Hash(_) => {
                let max = limits::QUEUED_REQUESTS_MAX;
                inbox.work.put(request, bytes, respond, max)?;
            }
        }
        drop(inbox);
        self.wake_if(was_empty);
        Ok(())
    }

    fn watch(&self, request: watch::Request) -> Result<(), Failure> {
        let mut inbox = unpoisoned(self.inbox.lock());
        if inbox.stopping {
            return Err(Failure::ShuttingDown);
        }
        let was_empty = inbox.is_empty();
        let (bytes, max) = match &request {
            watch::Request::Create { of, .. } => (of.range.bytes(), limits::QUEUED_WATCHES_MAX),
            watch::Request::Progress { .. } | watch::Request::ProgressOf { .. } => {
                (0, limits::QUEUED_WATCHES_MAX)
            }
            // They give something back, and are no more than there are of the others.
            watch::Request::Cancel { .. }
            | watch::Request::Consumed { .. }
            | watch::Request::Close { .. } => (0, usize::MAX),
        };
        inbox.watches.put(request, bytes, (), max)?;
        drop(inbox);
        self.wake_if(was_empty);
        Ok(())
    }

    fn peer(&self, inputs: impl IntoIterator<Item = Input<M>>) {
        let mut inbox = unpoisoned(self.inbox.lock());
        let was_empty = inbox.is_empty();
        for input in inputs {
            let bytes = match &input {
                Input::Peer { message, .. } => message.encoded_len(),
                _ => 0,
            };
            if inbox.peers.len() < limits::QUEUED_PEER_MESSAGES_MAX
                && inbox.peer_bytes + bytes <= limits::QUEUED_PEER_BYTES_MAX
            {
                inbox.peer_bytes += bytes;
                inbox.peers.push(input);
            }
        }
        drop(inbox);
        self.wake_if(was_empty);
    }

    /// Only the first that arrives after a turn began wakes, and after the lock is
    /// free, or the node would run into it.
    fn wake_if(&self, was_empty: bool) {
        if was_empty {
            (self.wake)();
        }
    }

    /// Takes what there is, as much of it as one turn bears. The oldest of what is
    /// left stays the first.
    fn take(&self) -> Taken<M> {
        let mut inbox = unpoisoned(self.inbox.lock());
        let stopping = inbox.stopping;
        let taken = Inbox {
            peers: mem::take(&mut inbox.peers),
            peer_bytes: mem::take(&mut inbox.peer_bytes),
            renewals: inbox.renewals.take(limits::RENEWALS_PER_TURN_MAX),
            endings: inbox.endings.take(limits::REQUESTS_PER_TURN_MAX),
            work: inbox.work.take(limits::REQUESTS_PER_TURN_MAX),
            watches: inbox.watches.take(limits::REQUESTS_PER_TURN_MAX),
            hand_over: inbox.hand_over.take(),
            stopping,
        };
        Taken {
            inbox: taken,
            is_more_left: !inbox.is_empty(),
        }
    }

    /// Takes everything, and lets nothing in any more.
    fn close(&self) -> Inbox<M> {
        let mut inbox = unpoisoned(self.inbox.lock());
        let rest = mem::take(&mut *inbox);
        inbox.stopping = true;
        rest
    }
}

/// What one turn took.
struct Taken<M: Machine> {
    inbox: Inbox<M>,
    /// The next turn is to follow at once: nobody wakes for what lies there already.
    is_more_left: bool,
}

/// One member of the cluster with its log. See the module. When it is dropped,
/// everybody who still waits is answered.
pub struct Node<M: Machine, D: Disk> {
    replica: Replica<M>,
    log: Log<D>,
    checkpoints: Writer<M>,
    schedule: Schedule,
    /// Whether it was said that the log is cut although a member needs it.
    is_warned: bool,
    answered: Box<dyn FnMut() + Send>,
    send: Outlet<(NodeId, PeerMessage)>,
    publish: Outlet<Event<M::Event>>,
    missed: Box<dyn FnMut() + Send>,
    notify: Outlet<(watch::StreamId, watch::Notice)>,
    fetch: Box<dyn FnMut(Fetch, Sink) + Send>,
    /// A checkpoint of its own is being written: it must ask again.
    is_fetch_refused: bool,
    shared: Arc<Shared<M>>,
    responders: BTreeMap<RequestNumber, Responder<M>>,
    last_number: RequestNumber,
    election_us: u64,
    last_append_us: u64,
    /// More has arrived than the last turn took.
    is_more_left: bool,
    /// Between the halves of a turn.
    unsaved: Option<Batch>,
    /// Once it is to stop: when it does so at the latest.
    give_up_us: Option<u64>,
}

/// Whether a node goes on after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Another turn is to follow.
    GoOn,
    /// It was asked to stop, and has.
    Stopped,
}

impl<M: Machine, D: Disk> fmt::Debug for Node<M, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("replica", &self.replica.status())
            .finish_non_exhaustive()
    }
}

impl<M: Machine + Send + 'static, D: Disk> Node<M, D> {
    /// How long until the next turn is due although nothing arrives.
    pub fn wait(&self) -> Duration {
        let is_drawing = self.replica.state().is_drawing();
        if self.is_more_left || is_drawing && self.checkpoints.has_room() {
            return Duration::ZERO;
        }
        let wait_us = self.replica.next_turn_us().saturating_sub(now().boot_us);
        let wait = Duration::from_micros(wait_us);
        if is_drawing {
            wait.min(ROOM_EVERY)
        } else {
            wait
        }
    }

    /// The first half of a turn: takes in what has arrived, and sends what may
    /// leave before anything is durable. Whether something was sent, and something
    /// must be synced: then the one should be on its way before the other blocks in
    /// [`Node::finish_turn`].
    pub fn begin_turn(&mut self) -> Result<bool, Fatal> {
        let now = now();
        let Taken {
            inbox,
            is_more_left,
        } = self.shared.take();
        self.is_more_left = is_more_left;
        let stopping = inbox.stopping;
        let mut inputs = self.checkpoints_done()?;
        inputs.extend(self.inputs(inbox));
        if stopping && self.give_up_us.is_none() {
            self.give_up_us = Some(now.boot_us.saturating_add(self.election_us));
            inputs.push(Input::Resign);
        }
        let begun = self.replica.begin(now, inputs)?;
        self.unsaved = begun.batch;
        let is_sent_early = self.unsaved.is_some() && !begun.messages.is_empty();
        self.send(begun.messages);
        Ok(is_sent_early)
    }

    /// The second half: makes durable what must be, applies, and answers.
    pub fn finish_turn(&mut self) -> Result<Progress, Fatal> {
        self.save().map_err(storage)?;
        let Finished {
            messages,
            answers,
            events,
            notices,
            fetch,
            installed,
        } = self.replica.finish()?;
        // First, so that nobody who has an answer sees what was before it.
        self.publish_status();
        self.send(messages);
        let is_any_answered = !answers.is_empty();
        for (number, answer) in answers {
            if let Some(respond) = self.responders.remove(&number) {
                respond(answer);
            }
        }
        if is_any_answered {
            (self.answered)();
        }
        if let Some(at) = installed {
            (self.missed)();
            self.installed(at);
        }
        if !events.is_empty() {
            (self.publish)(events);
        }
        if !notices.is_empty() {
            (self.notify)(notices);
        }
        match fetch {
            Some(_) if self.schedule.is_busy() => self.is_fetch_refused = true,
            Some(fetch) => {
                self.schedule.receive();
                (self.fetch)(fetch, self.checkpoints.receive());
            }
            None => {}
        }
        self.keep_checkpoints()?;
        let leads = self.replica.status().role == Role::Leader;
        let is_free = !leads && !self.replica.owes_answers();
        Ok(match self.give_up_us {
            Some(give_up_us) if is_free || now().boot_us >= give_up_us => Progress::Stopped,
            _ => Progress::GoOn,
        })
    }

    fn save(&mut self) -> Result<(), LogError> {
        let now_us = now().boot_us;
        if let Some(batch) = self.unsaved.take() {
            self.log.append(&batch)?;
            self.log.sync()?;
            self.last_append_us = now_us;
            self.shared
                .log_bytes
                .store(self.log.bytes(), Ordering::Relaxed);
        } else if self.log.wants_mark() && now_us - self.last_append_us >= MARK_AFTER_US {
            self.log.mark()?;
        }
        Ok(())
    }

    /// Takes note of what the writer has done.
    fn checkpoints_done(&mut self) -> Result<Vec<Input<M>>, Fatal> {
        let mut inputs = Vec::new();
        if mem::take(&mut self.is_fetch_refused) {
            inputs.push(Input::Fetched(None));
        }
        while let Some(done) = self.checkpoints.poll() {
            match done.map_err(|error| Fatal::Storage(error.to_string()))? {
                Done::Written(at) => {
                    self.schedule.complete(at);
                    self.checkpointed(at);
                }
                Done::Received(received) => {
                    self.schedule.discard();
                    if let Err(reason) = &received {
                        tracing::warn!(%reason, "a checkpoint of another member did not arrive");
                    }
                    inputs.push(Input::Fetched(received.ok()));
                }
                Done::Adopted(at) => self.checkpointed(at),
            }
        }
        Ok(inputs)
    }

    fn checkpointed(&mut self, at: Index) {
        self.replica.checkpointed(at);
        self.shared.checkpoint.store(at, Ordering::Relaxed);
    }

    /// The state of another member's checkpoint is that of this one.
    fn installed(&mut self, at: Index) {
        self.shared.installs.fetch_add(1, Ordering::Relaxed);
        self.schedule.install(at);
        self.checkpoints.adopt(at);
    }

    /// Orders a checkpoint when one is due, and cuts the log.
    fn keep_checkpoints(&mut self) -> Result<(), Fatal> {
        self.schedule
            .want(self.shared.wanted.load(Ordering::Relaxed));
        let written_bytes = self.log.written_bytes();
        let state = self.replica.state();
        let (applied, state_bytes) = (state.applied(), state.bytes());
        if self.schedule.is_due(applied, written_bytes, state_bytes) {
            self.schedule.begin(applied, written_bytes);
            self.replica.begin_image();
            self.checkpoints.begin(applied, self.schedule.newest());
        }
        if self.checkpoints.has_room()
            && let Some(part) = self.replica.draw_part(limits::DRAWN_PER_TURN_MAX)
        {
            self.checkpoints.take(part);
        }
        self.cut()
    }

    fn cut(&mut self) -> Result<(), Fatal> {
        let held = self.replica.held_by_all();
        let sent = unpoisoned(self.shared.sent.lock()).iter().min().copied();
        let upto = self.schedule.cut(held, sent, self.log.bytes());
        if upto > held && !self.is_warned {
            let reason = "the log is too long to keep it for a member that is away";
            tracing::info!(upto, held, reason, "that member will get a checkpoint");
        }
        self.is_warned = upto > held;
        // Before its base a log holds nothing.
        if self.log.cut(upto.max(self.log.base())).map_err(storage)? {
            self.replica.cut(upto);
            let bytes = self.log.bytes();
            tracing::info!(upto, bytes, "cut the log");
            self.shared.log_bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    fn inputs(&mut self, inbox: Inbox<M>) -> Vec<Input<M>> {
        let mut inputs = inbox.peers;
        for (of, respond) in inbox.renewals.into_iter() {
            let number = self.expect_answer(respond);
            inputs.push(Input::Renew { number, of });
        }
        for (body, respond) in inbox.endings.into_iter() {
            let number = self.expect_answer(respond);
            inputs.push(Input::Command { number, body });
        }
        for (request, respond) in inbox.work.into_iter() {
            let number = self.expect_answer(respond);
            inputs.push(match request {
                Request::Command(body) | Request::Ending(body) => Input::Command { number, body },
                Request::Read(query) => Input::Read { number, query },
                Request::LocalRead(query) => Input::LocalRead { number, query },
                Request::Renew(of) => Input::Renew { number, of },
                Request::TimeLeft(session) => Input::TimeLeft { number, session },
                Request::Hash(revision) => Input::Hash { number, revision },
            });
        }
        let watches = inbox.watches.into_iter();
        inputs.extend(watches.map(|(request, ())| Input::Watch(request)));
        inputs.extend(inbox.hand_over.map(Input::HandOver));
        inputs
    }

    fn expect_answer(&mut self, respond: Responder<M>) -> RequestNumber {
        self.last_number += 1;
        self.responders.insert(self.last_number, respond);
        self.last_number
    }

    fn send(&mut self, messages: Vec<(NodeId, PeerMessage)>) {
        if !messages.is_empty() {
            (self.send)(messages);
        }
    }

    fn publish_status(&self) {
        let mut published = unpoisoned(self.shared.status.lock());
        if **published != *self.replica.status() {
            *published = Arc::new(self.replica.status().clone());
        }
    }
}

impl<M: Machine, D: Disk> Drop for Node<M, D> {
    fn drop(&mut self) {
        let rest = self.shared.close();
        let renewals = rest.renewals.into_iter().map(|(_, respond)| respond);
        let endings = rest.endings.into_iter().map(|(_, respond)| respond);
        let work = rest.work.into_iter().map(|(_, respond)| respond);
        for respond in renewals.chain(endings).chain(work) {
            respond(Err(Failure::ShuttingDown));
        }
        // What was begun may or may not come to pass.
        for respond in mem::take(&mut self.responders).into_values() {
            respond(Err(Failure::OutcomeUnknown));
        }
        (self.answered)();
    }
}

/// With the cause, since who reads it must mend the disk.
fn storage(error: LogError) -> Fatal {
    let cause = error.source().map(|cause| format!(": {cause}"));
    Fatal::Storage(format!("{error}{}", cause.unwrap_or_default()))
}

/// A lock is poisoned only by a panic, which ends the process in a release.
fn unpoisoned<T>(result: Result<T, PoisonError<T>>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}

/// The only clock of this crate.
#[expect(
    clippy::disallowed_methods,
    reason = "the driver reads the clock for the replica"
)]
fn now() -> Now {
    let boot = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(boot.tv_sec).unwrap_or_default();
    let nanos = u64::try_from(boot.tv_nsec).unwrap_or_default();
    let date = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Now {
        boot_us: seconds * 1_000_000 + nanos / 1_000,
        date_ms: u64::try_from(date.as_millis()).unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_is_full_by_number_or_by_bytes_until_some_are_taken() {
        let mut queue = Queue::default();
        let half = limits::QUEUED_BYTES_MAX / 2;
        queue.put(1, half, (), 3).unwrap();
        queue.put(2, half, (), 3).unwrap();
        assert_eq!(queue.put(3, 1, (), 3), Err(Failure::Overloaded));
        assert!(queue.take(1).into_iter().eq([(1, ())]));
        queue.put(3, 1, (), 3).unwrap();
        queue.put(4, 1, (), 3).unwrap();
        assert_eq!(queue.put(5, 1, (), 3), Err(Failure::Overloaded));
        assert!(queue.take(9).into_iter().eq([(2, ()), (3, ()), (4, ())]));
        assert_eq!(queue.bytes, 0);
    }
}
