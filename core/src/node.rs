//! A [`Replica`] with its log, its clock and an inbox: everything but the thread
//! that runs it.
//!
//! The rest of the process talks to it through a [`Handle`], which puts requests
//! into the inbox. Each turn takes all that has arrived, in this order: what peers
//! sent, renewals, what gives something back, then other work. What must be durable
//! is given out as a [`Save`], one at a time, while turns go on; so under load,
//! batches form by themselves while the disk is busy.
//!
//! Whoever runs the node does nothing but this, on one thread: wait for
//! [`Node::wait`] or until woken, [`Node::begin_turn`], have done what is to be saved,
//! [`Node::finish_turn`]; and [`Node::saved`] before a turn, once that is done.

mod checkpoints;
mod handle;
mod inbox;

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

use conclave_proto::internal::PeerMessage;
use rustix::time::{ClockId, clock_gettime};

pub use self::handle::{Handle, Sent};
use self::inbox::{Inbox, Request, Taken};
use crate::{
    checkpoint::{Schedule, Sink, Writer},
    disk::Disk,
    ids::{Index, NodeId, RequestNumber},
    log::{Batch, Log, LogError, Recovered},
    machine::Machine,
    replica::{
        Answer, Config, Event, Failure, Fatal, Fetch, Finished, Input, Now, Replica, Role, Status,
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
        written_bytes: log.written_bytes(),
        log: Some(log),
        unsaved: Vec::new(),
        handed: 0,
        received: None,
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
        give_up_us: None,
    };
    (handle, node)
}

/// What the node has in common with its handles.
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

/// One member of the cluster with its log. See the module. When it is dropped,
/// everybody who still waits is answered.
pub struct Node<M: Machine, D: Disk> {
    replica: Replica<M>,
    /// Unless it is away to be written.
    log: Option<Log<D>>,
    /// To be written when it is back.
    unsaved: Vec<Batch>,
    /// A checkpoint that has arrived, or has not, before the replica knows.
    received: Option<Option<Box<State<M>>>>,
    /// How many batches have gone there before these.
    handed: u64,
    /// As of when the log was here last.
    written_bytes: u64,
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

    /// The first half of a turn: takes in what has arrived, and sends what may leave
    /// before anything is durable. If something must be saved, and the log is here, that
    /// is given: whoever runs the node does it at once or on another thread, and gives it
    /// back to [`Node::saved`]. Meanwhile turns go on.
    pub fn begin_turn(&mut self) -> Result<Option<Save<D>>, Fatal> {
        let now = now();
        let Taken {
            inbox,
            is_more_left,
        } = self.shared.take();
        self.is_more_left = is_more_left;
        let stopping = inbox.stopping;
        let mut inputs = self.checkpoints_done()?;
        // Here, before it may be handed out: a busy log is not back before the next turn.
        self.cut()?;
        inputs.extend(self.inputs(inbox));
        if stopping && self.give_up_us.is_none() {
            self.give_up_us = Some(now.boot_us.saturating_add(self.election_us));
            inputs.push(Input::Resign);
        }
        let begun = self.replica.begin(now, inputs)?;
        let begins_anew = begun.batch.as_ref().is_some_and(Batch::begins_anew);
        self.unsaved.extend(begun.batch);
        self.send(begun.messages);
        if begins_anew {
            // The checkpoint takes its name after that.
            self.save()?;
        }
        let idle_us = now.boot_us.saturating_sub(self.last_append_us);
        let wants_mark = idle_us >= MARK_AFTER_US && self.log.as_ref().is_some_and(Log::wants_mark);
        Ok((!self.unsaved.is_empty() || wants_mark)
            .then(|| self.hand_log())
            .flatten())
    }

    fn hand_log(&mut self) -> Option<Save<D>> {
        let log = self.log.take()?;
        let batches = mem::take(&mut self.unsaved);
        self.handed += batches.len() as u64;
        Some(Save { log, batches })
    }

    /// Saves what is to be saved, if the log is here.
    fn save(&mut self) -> Result<(), Fatal> {
        if self.unsaved.is_empty() {
            return Ok(());
        }
        self.hand_log()
            .map_or(Ok(()), |save| self.saved(save.run()))
    }

    /// Whether something has arrived that the last turn did not take.
    pub fn has_arrived(&self) -> bool {
        self.is_more_left || !unpoisoned(self.shared.inbox.lock()).is_empty()
    }

    /// Takes back what was given to be saved.
    pub fn saved(&mut self, saved: Saved<D>) -> Result<(), Fatal> {
        let Saved { log, outcome } = saved;
        if outcome.map_err(storage)? {
            self.last_append_us = now().boot_us;
        }
        self.written_bytes = log.written_bytes();
        self.shared.log_bytes.store(log.bytes(), Ordering::Relaxed);
        self.log = Some(log);
        self.replica.saved(self.handed);
        Ok(())
    }

    /// The second half: applies, and answers.
    pub fn finish_turn(&mut self) -> Result<Progress, Fatal> {
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
        self.keep_checkpoints();
        let leads = self.replica.status().role == Role::Leader;
        let is_free = !leads && !self.replica.owes_answers();
        Ok(match self.give_up_us {
            Some(give_up_us) if is_free || now().boot_us >= give_up_us => Progress::Stopped,
            _ => Progress::GoOn,
        })
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

/// Batches that are to be made durable, and the log for that. The node waits for it.
#[must_use]
#[derive(Debug)]
pub struct Save<D> {
    log: Log<D>,
    batches: Vec<Batch>,
}

/// What has come of a [`Save`].
#[derive(Debug)]
pub struct Saved<D> {
    log: Log<D>,
    /// Whether there was a batch.
    outcome: Result<bool, LogError>,
}

impl<D: Disk> Save<D> {
    /// Makes them durable, with one sync for all; blocks.
    pub fn run(mut self) -> Saved<D> {
        let outcome = self.write();
        Saved {
            log: self.log,
            outcome,
        }
    }

    fn write(&mut self) -> Result<bool, LogError> {
        for batch in &self.batches {
            self.log.append(batch)?;
        }
        if self.batches.is_empty() {
            self.log.mark()?;
            return Ok(false);
        }
        self.log.sync()?;
        Ok(true)
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
