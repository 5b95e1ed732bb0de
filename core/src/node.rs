//! The loop thread that drives a [`Replica`]: it alone touches the state, the
//! log and the clock.
//!
//! The rest of the process talks to it through a [`Handle`], which puts requests
//! into an inbox. Each turn takes all that has arrived, in this order: what peers
//! sent, renewals, then work; so under load, batches form by themselves while the
//! disk is busy. There is one sync a turn at most, between the two halves of the
//! turn.

use std::{
    collections::BTreeMap,
    error::Error as _,
    fmt, io, mem,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use conclave_proto::internal::{PeerMessage, command};
use rustix::time::{ClockId, clock_gettime};

use crate::{
    disk::Disk,
    ids::{NodeId, RequestNumber, SessionId},
    limits,
    log::{Log, LogError, Recovered},
    machine::Machine,
    replica::{
        Answer, Config, Event, Failure, Fatal, Finished, Input, Now, Query, Replica, Role, Status,
    },
};

/// Called once with the outcome of a request, on the loop thread; must not block.
pub type Responder<M> = Box<dyn FnOnce(Result<Answer<M>, Failure>) + Send>;

/// Joins to why the loop ended.
pub type LoopThread = JoinHandle<Result<(), Fatal>>;

/// Called on the loop thread with what leaves it; must not block.
pub type Outlet<T> = Box<dyn FnMut(Vec<T>) + Send>;

/// Where the loop thread sends what leaves it.
pub struct Outlets<M: Machine> {
    /// Sends to peers; may drop what it cannot send.
    pub send: Outlet<(NodeId, PeerMessage)>,
    /// Tells sessions; each call brings events in order, after the answers of the
    /// same turn have been given.
    pub publish: Outlet<Event<M::Event>>,
}

impl<M: Machine> fmt::Debug for Outlets<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outlets").finish_non_exhaustive()
    }
}

/// How the rest of the process talks to the loop thread. Cheap to clone.
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

/// Starts the loop thread over an open log. The thread ends after
/// [`Handle::stop`], or with the reason why it cannot go on.
///
/// # Errors
///
/// If the system refuses another thread.
pub fn start<M, D>(
    config: Config,
    log: Log<D>,
    recovered: Recovered,
    outlets: Outlets<M>,
) -> io::Result<(Handle<M>, LoopThread)>
where
    M: Machine + Send + 'static,
    M::Command: Send,
    M::Query: Send,
    D: Disk + Send + 'static,
{
    let shared = Arc::new(Shared {
        inbox: Mutex::new(Inbox::default()),
        arrived: Condvar::new(),
        status: Mutex::default(),
        log_bytes: AtomicU64::new(log.bytes()),
    });
    let handle = Handle {
        shared: Arc::clone(&shared),
    };
    let election = Duration::from_millis(config.election_ms);
    let driver = move || {
        let replica = Replica::new(config, recovered, now());
        let responders = BTreeMap::new();
        Driver {
            replica,
            log,
            outlets,
            shared,
            responders,
            last_number: 0,
            election,
        }
        .run()
    };
    let thread = thread::Builder::new()
        .name("conclave-loop".to_owned())
        .spawn(driver)?;
    Ok((handle, thread))
}

impl<M: Machine> Handle<M> {
    /// Hands a command over. `respond` is called exactly once; at once if the
    /// queue is full or the node is stopping.
    pub fn command(&self, body: command::Body, respond: Responder<M>) {
        self.shared.request(Request::Command(body), respond);
    }

    /// Asks a linearizable question; `respond` as for [`Handle::command`].
    pub fn read(&self, query: Query<M>, respond: Responder<M>) {
        self.shared.request(Request::Read(query), respond);
    }

    /// Renews a session; `respond` as for [`Handle::command`].
    pub fn renew(&self, session: SessionId, respond: Responder<M>) {
        self.shared.request(Request::Renew(session), respond);
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

    /// Bytes of the log on disk.
    pub fn log_bytes(&self) -> u64 {
        self.shared.log_bytes.load(Ordering::Relaxed)
    }

    /// Refuses new work, hands leadership over if this node has it, and ends the
    /// loop, after one election timeout at most.
    pub fn stop(&self) {
        let mut inbox = unpoisoned(self.shared.inbox.lock());
        inbox.stopping = true;
        self.shared.wake(inbox);
    }
}

struct Shared<M: Machine> {
    inbox: Mutex<Inbox<M>>,
    arrived: Condvar,
    status: Mutex<Arc<Status>>,
    log_bytes: AtomicU64,
}

/// What has arrived, by urgency.
struct Inbox<M: Machine> {
    peers: Vec<Input<M>>,
    renewals: Vec<(SessionId, Responder<M>)>,
    work: Vec<(Request<M>, Responder<M>)>,
    /// The loop sleeps and must be woken.
    asleep: bool,
    stopping: bool,
}

enum Request<M: Machine> {
    Command(command::Body),
    Read(Query<M>),
    Renew(SessionId),
}

impl<M: Machine> Default for Inbox<M> {
    fn default() -> Self {
        Self {
            peers: Vec::new(),
            renewals: Vec::new(),
            work: Vec::new(),
            asleep: false,
            stopping: false,
        }
    }
}

impl<M: Machine> Inbox<M> {
    fn is_empty(&self) -> bool {
        self.peers.is_empty() && self.renewals.is_empty() && self.work.is_empty()
    }
}

impl<M: Machine> Shared<M> {
    fn request(&self, request: Request<M>, respond: Responder<M>) {
        let mut inbox = unpoisoned(self.inbox.lock());
        let refusal = if inbox.stopping {
            Failure::ShuttingDown
        } else {
            match request {
                Request::Renew(session) if inbox.renewals.len() < limits::QUEUED_RENEWALS_MAX => {
                    inbox.renewals.push((session, respond));
                    return self.wake(inbox);
                }
                Request::Command(_) | Request::Read(_)
                    if inbox.work.len() < limits::QUEUED_REQUESTS_MAX =>
                {
                    inbox.work.push((request, respond));
                    return self.wake(inbox);
                }
                _ => Failure::Overloaded,
            }
        };
        drop(inbox);
        respond(Err(refusal));
    }

    fn peer(&self, inputs: impl IntoIterator<Item = Input<M>>) {
        let mut inbox = unpoisoned(self.inbox.lock());
        let room = limits::QUEUED_PEER_MESSAGES_MAX.saturating_sub(inbox.peers.len());
        inbox.peers.extend(inputs.into_iter().take(room));
        self.wake(inbox);
    }

    /// Wakes the loop after the lock is free, or it would run into it.
    fn wake(&self, mut inbox: MutexGuard<'_, Inbox<M>>) {
        let asleep = mem::take(&mut inbox.asleep);
        drop(inbox);
        if asleep {
            self.arrived.notify_one();
        }
    }

    /// Waits until something arrives, or until `next_turn_us`; takes what there
    /// is. Second: whether the node is to stop.
    fn take(&self, next_turn_us: u64, was_stopping: bool) -> (Inbox<M>, bool) {
        let mut inbox = unpoisoned(self.inbox.lock());
        let wait_us = next_turn_us.saturating_sub(now().boot_us);
        if inbox.is_empty() && inbox.stopping == was_stopping && wait_us > 0 {
            inbox.asleep = true;
            let wait = Duration::from_micros(wait_us);
            inbox = match self.arrived.wait_timeout(inbox, wait) {
                Ok((inbox, _)) => inbox,
                Err(poisoned) => poisoned.into_inner().0,
            };
            inbox.asleep = false;
        }
        let stopping = inbox.stopping;
        let taken = mem::take(&mut *inbox);
        inbox.stopping = stopping;
        (taken, stopping)
    }
}

struct Driver<M: Machine, D> {
    replica: Replica<M>,
    log: Log<D>,
    outlets: Outlets<M>,
    shared: Arc<Shared<M>>,
    responders: BTreeMap<RequestNumber, Responder<M>>,
    last_number: RequestNumber,
    election: Duration,
}

impl<M: Machine, D: Disk> Driver<M, D> {
    fn run(mut self) -> Result<(), Fatal> {
        let ended = self.turns();
        // Whoever still waits is told that nobody knows.
        unpoisoned(self.shared.inbox.lock()).stopping = true;
        let (rest, _) = self.shared.take(0, true);
        let renewals = rest.renewals.into_iter().map(|(_, respond)| respond);
        let work = rest.work.into_iter().map(|(_, respond)| respond);
        for respond in renewals.chain(work).chain(self.responders.into_values()) {
            respond(Err(Failure::OutcomeUnknown));
        }
        ended
    }

    fn turns(&mut self) -> Result<(), Fatal> {
        let mut give_up_us = None;
        loop {
            let was_stopping = give_up_us.is_some();
            let (inbox, stopping) = self.shared.take(self.replica.next_turn_us(), was_stopping);
            let mut inputs = self.inputs(inbox);
            if stopping && !was_stopping {
                let election_us = u64::try_from(self.election.as_micros()).unwrap_or(u64::MAX);
                give_up_us = Some(now().boot_us.saturating_add(election_us));
                inputs.push(Input::Resign);
            }
            self.turn(inputs)?;
            if let Some(give_up_us) = give_up_us
                && (self.replica.status().role != Role::Leader || now().boot_us >= give_up_us)
            {
                return Ok(());
            }
        }
    }

    fn inputs(&mut self, inbox: Inbox<M>) -> Vec<Input<M>> {
        let mut inputs = inbox.peers;
        for (session, respond) in inbox.renewals {
            let number = self.expect_answer(respond);
            inputs.push(Input::Renew { number, session });
        }
        for (request, respond) in inbox.work {
            let number = self.expect_answer(respond);
            inputs.push(match request {
                Request::Command(body) => Input::Command { number, body },
                Request::Read(query) => Input::Read { number, query },
                Request::Renew(session) => Input::Renew { number, session },
            });
        }
        inputs
    }

    fn expect_answer(&mut self, respond: Responder<M>) -> RequestNumber {
        self.last_number += 1;
        self.responders.insert(self.last_number, respond);
        self.last_number
    }

    fn turn(&mut self, inputs: Vec<Input<M>>) -> Result<(), Fatal> {
        let idle = inputs.is_empty();
        let begun = self.replica.begin(now(), inputs)?;
        self.send(begun.messages);
        if let Some(batch) = begun.batch {
            self.log.append(&batch).map_err(storage)?;
            self.log.sync().map_err(storage)?;
            self.shared
                .log_bytes
                .store(self.log.bytes(), Ordering::Relaxed);
        } else if idle && self.log.wants_mark() {
            self.log.mark().map_err(storage)?;
        }
        let Finished {
            messages,
            answers,
            events,
        } = self.replica.finish()?;
        self.send(messages);
        for (number, answer) in answers {
            if let Some(respond) = self.responders.remove(&number) {
                respond(answer);
            }
        }
        if !events.is_empty() {
            (self.outlets.publish)(events);
        }
        self.publish_status();
        Ok(())
    }

    fn send(&mut self, messages: Vec<(NodeId, PeerMessage)>) {
        if !messages.is_empty() {
            (self.outlets.send)(messages);
        }
    }

    fn publish_status(&self) {
        let mut published = unpoisoned(self.shared.status.lock());
        if **published != *self.replica.status() {
            *published = Arc::new(self.replica.status().clone());
        }
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
