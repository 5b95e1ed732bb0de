//! Clients: each a task with its own connections and session, which does one
//! thing after the other, as long as the world does not stop.

use std::{sync::Arc, time::Duration};

use conclave_client::{Client, Error, LockGuard, Session, SessionOptions};
use tokio::time::{sleep, timeout};

use super::{
    history::Ending,
    world::{Belief, World},
};
use crate::rng::Rng;

/// A lock is in use for so long, then another takes its place: what has an
/// unknown outcome is a handful for each.
const LOCK_US: u64 = 20_000_000;
/// Lists of sessions that a session's client asks for.
const LISTS: u64 = 3;

/// What kind of client one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// Takes locks and writes what they protect.
    Worker,
    /// Opens, lists and closes sessions.
    Visitor,
    /// Lists locks.
    Reader,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Caller {
    world: Arc<World>,
    /// Its place among all.
    index: usize,
    /// How many there are.
    count: usize,
    /// Its number in the history, which changes with each unknown outcome.
    process: u64,
    rng: Rng,
    client: Client,
    session: Option<Session>,
    /// Elements written so far.
    elements: u64,
}

/// An operation under way.
#[derive(Clone, Copy, Debug)]
struct Call {
    operation: &'static str,
    called_us: u64,
}

/// A lock of a moment.
#[derive(Clone, Debug)]
struct Lock {
    key: u64,
    name: String,
}

impl Caller {
    /// One of so many clients, with chance of its own.
    pub(crate) fn new(
        world: &Arc<World>,
        index: usize,
        count: usize,
        rng: Rng,
    ) -> Result<Self, Error> {
        Ok(Self {
            world: Arc::clone(world),
            index,
            count,
            process: index as u64,
            rng,
            client: Client::connect(&world.endpoints)?,
            session: None,
            elements: 0,
        })
    }

    /// Works until the world stops, and cleans up.
    pub(crate) async fn work(mut self) {
        let role = match self.index % 8 {
            0 => Role::Visitor,
            1 => Role::Reader,
            _ => Role::Worker,
        };
        while !self.world.is_stopping() {
            self.world.begins(self.index);
            let is_done = match role {
                Role::Worker => self.take_lock().await,
                Role::Visitor => self.visit().await,
                Role::Reader => self.read().await,
            };
            self.world.ends(self.index, is_done);
            sleep(Duration::from_micros(self.rng.skewed(10_000))).await;
        }
        if let Some(session) = self.session.take() {
            // If nobody answers, it expires.
            session.close().await.ok();
        }
    }

    fn call(&self, operation: &'static str, value: &str) -> Call {
        let called_us = self.world.history.invoke(self.process, operation, value);
        Call {
            operation,
            called_us,
        }
    }

    /// The times of a call, which is over.
    fn returned(
        &mut self,
        call: Call,
        ending: Ending,
        how: &'static str,
        value: &str,
    ) -> (u64, u64) {
        let now_us = self.world.history.now_us();
        let Call {
            operation,
            called_us,
        } = call;
        self.world
            .history
            .complete(self.process, ending, operation, value, now_us);
        self.world.completed(operation, how, ending);
        if ending == Ending::Info {
            self.process += self.count as u64;
        }
        (called_us, now_us)
    }

    /// The session, or a new one.
    async fn session(&mut self) -> Option<Session> {
        let alive = self
            .session
            .take()
            .filter(|session| !session.remaining().is_zero());
        if alive.is_none() {
            self.session = self.open().await.map(|(session, _)| session);
        } else {
            self.session = alive;
        }
        self.session.clone()
    }

    async fn open(&mut self) -> Option<(Session, (u64, u64))> {
        if self.rng.chance(300_000) {
            // New connections, as a new process has them.
            self.client = Client::connect(&self.world.endpoints).ok()?;
        }
        let ttl = Duration::from_millis(self.rng.between(1_000, 4_000));
        let options = SessionOptions {
            ttl,
            name: format!("client {}", self.index),
            ..SessionOptions::default()
        };
        let call = self.call("open", "nil");
        match self.client.session(options).await {
            Ok(session) => {
                let value = format!("\"{:x}\"", session.id());
                let when = self.returned(call, Ending::Ok, "ok", &value);
                Some((session, when))
            }
            Err(error) => {
                self.failed(call, &error, "nil");
                None
            }
        }
    }

    fn failed(&mut self, call: Call, error: &Error, value: &str) -> (u64, u64) {
        let (ending, how) = match error {
            Error::LockHeld => (Ending::Fail, "held"),
            Error::WaitTimedOut => (Ending::Fail, "timed-out"),
            Error::SessionLost(_) => (Ending::Info, "session-lost"),
            Error::OutcomeUnknown { .. } => (Ending::Info, "unknown"),
            Error::PlaceLost { .. } | Error::NotHolder { .. } => (Ending::Info, "lost"),
            _ => (Ending::Fail, "failed"),
        };
        self.returned(call, ending, how, value)
    }

    fn lock(&mut self) -> Lock {
        let epoch = self.world.history.now_us() / LOCK_US;
        let index = self.rng.below(self.world.locks);
        Lock {
            key: epoch * self.world.locks + index,
            name: lock_name(epoch, index),
        }
    }

    /// One lock, from acquire to release. Whether it was served.
    async fn take_lock(&mut self) -> bool {
        let Some(session) = self.session().await else {
            return false;
        };
        let lock = self.lock();
        let call = self.call("acquire", &format!("[\"{}\" nil]", lock.name));
        let request = session.lock(&lock.name);
        let patience = Duration::from_millis(self.rng.between(50, 3_000));
        let result = match self.rng.below(100) {
            0..20 => Some(request.try_now().await),
            20..60 => Some(request.wait(patience).await),
            _ => timeout(patience, request).await.ok(),
        };
        let value = format!("[\"{}\" nil]", lock.name);
        match result {
            Some(Ok(guard)) => {
                let value = format!("[\"{}\" {}]", lock.name, guard.token());
                let when = self.returned(call, Ending::Ok, "granted", &value);
                self.world
                    .granted(lock.key, session.id(), guard.token(), when);
                self.hold(&lock, guard, when.1).await
            }
            Some(Err(error)) => {
                self.world
                    .not_granted(lock.key, session.id(), call.called_us);
                self.failed(call, &error, &value);
                // A wait ends in time even if no server lives.
                matches!(error, Error::LockHeld)
            }
            None => {
                self.world
                    .not_granted(lock.key, session.id(), call.called_us);
                self.returned(call, Ending::Info, "withdrawn", &value);
                false
            }
        }
    }

    /// Whether the lock was given up in order.
    async fn hold(&mut self, lock: &Lock, guard: LockGuard, since_us: u64) -> bool {
        if guard.remaining().is_zero() {
            // The answer came too late to be believed.
            self.world.abandoned(lock.key, guard.token(), since_us);
            return false;
        }
        let mut belief = Belief {
            lock: lock.key,
            client: self.index,
            token: guard.token(),
            since_us,
            until_us: since_us,
        };
        for _ in 0..self.rng.between(1, 3) {
            self.write(lock, &guard).await;
            self.believe(&mut belief, &guard);
        }
        if self.rng.chance(300_000) {
            self.check(lock, &guard, belief.until_us).await;
            self.believe(&mut belief, &guard);
        }
        self.world.believed(belief);
        match self.rng.below(100) {
            // Dropped: released in the background.
            0..5 => {
                self.world
                    .abandoned(lock.key, guard.token(), belief.until_us);
                true
            }
            // The session ends with it.
            5..10 => {
                self.world
                    .abandoned(lock.key, guard.token(), belief.until_us);
                match self.session.take() {
                    Some(session) => session.close().await.is_ok(),
                    None => true,
                }
            }
            _ => self.release(lock, guard, belief.until_us).await,
        }
    }

    /// Looks whether the lock is still held, and until when it is known to be.
    fn believe(&self, belief: &mut Belief, guard: &LockGuard) {
        let now_us = self.world.history.now_us();
        if !guard.remaining().is_zero() {
            belief.until_us = now_us;
        }
    }

    /// Reads what the lock protects, and writes what follows from it.
    async fn write(&mut self, lock: &Lock, guard: &LockGuard) {
        self.elements += 1;
        let element = (self.index as u64) << 32 | self.elements;
        let value = format!("[\"{}\" {} {element}]", lock.name, guard.token());
        let call = self.call("add", &value);
        let token = guard.token();
        let length = self.world.length(lock.key, token, self.index);
        let long = self.rng.chance(10_000);
        let pause_us = self.rng.below(if long { 1_500_000 } else { 8_000 });
        sleep(Duration::from_micros(pause_us)).await;
        let put = length.and_then(|length| {
            let what = (length, element);
            self.world.put(lock.key, token, self.index, what)
        });
        if put.is_ok() {
            self.returned(call, Ending::Ok, "ok", &value);
        } else {
            let trusts = !guard.remaining().is_zero();
            self.world.refused(lock.key, token, trusts);
            self.returned(call, Ending::Fail, "fenced", &value);
        }
    }

    async fn check(&mut self, lock: &Lock, guard: &LockGuard, trusted_us: u64) {
        let token = guard.token();
        let call = self.call("check", &format!("[\"{}\" {token} nil]", lock.name));
        match self.client.check(&lock.name, token).await {
            Ok(holds) => {
                let value = format!("[\"{}\" {token} {holds}]", lock.name);
                let when = self.returned(call, Ending::Ok, "ok", &value);
                if holds {
                    self.world.holds(lock.key, token, when);
                } else if !guard.remaining().is_zero() {
                    let how = format!("a check says no (trusted at {trusted_us} us)");
                    self.world.denied(token, &how);
                }
            }
            Err(error) => {
                self.failed(call, &error, "nil");
            }
        }
    }

    async fn release(&mut self, lock: &Lock, guard: LockGuard, trusted_us: u64) -> bool {
        let token = guard.token();
        let session = guard.session().clone();
        let value = format!("[\"{}\" {token}]", lock.name);
        let call = self.call("release", &value);
        match guard.release().await {
            Ok(()) => {
                let when = self.returned(call, Ending::Ok, "ok", &value);
                self.world.released(lock.key, token, when);
                true
            }
            Err(error) => {
                self.world.abandoned(lock.key, token, trusted_us);
                self.failed(call, &error, &value);
                let is_denied = matches!(error, Error::NotHolder { .. });
                if is_denied && !session.remaining().is_zero() {
                    self.world.denied(token, "a release says no");
                }
                false
            }
        }
    }

    /// A session from its opening to its close, as lists see it.
    async fn visit(&mut self) -> bool {
        let Some((session, opened)) = self.open().await else {
            return false;
        };
        let id = session.id();
        self.world.opened(id, opened);
        let mut trusted_us = opened.0;
        for _ in 0..self.rng.between(1, LISTS) {
            self.look_for(id).await;
            let now_us = self.world.history.now_us();
            if !session.remaining().is_zero() {
                trusted_us = now_us;
            }
        }
        let value = format!("\"{id:x}\"");
        let call = self.call("close", &value);
        let was_alive = !session.remaining().is_zero();
        let is_closed = match session.close().await {
            Ok(()) if was_alive => {
                let when = self.returned(call, Ending::Ok, "ok", &value);
                self.world.closed(id, when);
                true
            }
            Ok(()) => {
                self.returned(call, Ending::Info, "session-lost", &value);
                self.world.left(id, trusted_us);
                false
            }
            Err(error) => {
                self.failed(call, &error, &value);
                self.world.left(id, trusted_us);
                false
            }
        };
        self.look_for(id).await;
        is_closed
    }

    async fn look_for(&mut self, id: i64) {
        let call = self.call("sessions", &format!("[\"{id:x}\" nil]"));
        match self.client.sessions().await {
            Ok(sessions) => {
                let is_there = sessions.iter().any(|session| session.session_id == id);
                let value = format!("[\"{id:x}\" {is_there}]");
                let when = self.returned(call, Ending::Ok, "ok", &value);
                self.world.saw(id, is_there, when);
            }
            Err(error) => {
                self.failed(call, &error, "nil");
            }
        }
    }

    /// Reads who holds what: one lock, or all.
    async fn read(&mut self) -> bool {
        let one = self.lock();
        let epoch = one.key / self.world.locks;
        if self.rng.chance(500_000) {
            let call = self.call("holder", &format!("[\"{}\" nil]", one.name));
            let result = self.client.lock_info(&one.name).await;
            let result = result.map(|lock| lock.into_iter().collect());
            return self.saw_locks(call, result, vec![one]);
        }
        let call = self.call("holders", "nil");
        let result = self.client.locks().await;
        let locks = (0..self.world.locks).map(|index| Lock {
            key: epoch * self.world.locks + index,
            name: lock_name(epoch, index),
        });
        self.saw_locks(call, result, locks.collect())
    }

    fn saw_locks(
        &mut self,
        call: Call,
        result: Result<Vec<conclave_client::LockInfo>, Error>,
        locks: Vec<Lock>,
    ) -> bool {
        let found = match result {
            Ok(found) => found,
            Err(error) => {
                self.failed(call, &error, "nil");
                return false;
            }
        };
        let holders: Vec<Option<(u64, i64)>> = locks
            .iter()
            .map(|lock| {
                let info = found.iter().find(|info| info.name == lock.name)?;
                let holder = info.holder.as_ref()?;
                Some((holder.token, holder.session_id))
            })
            .collect();
        let pairs: Vec<String> = locks
            .iter()
            .zip(&holders)
            .map(|(lock, holder)| match holder {
                Some((token, _)) => format!("[\"{}\" {token}]", lock.name),
                None => format!("[\"{}\" nil]", lock.name),
            })
            .collect();
        let value = format!("[{}]", pairs.join(" "));
        let when = self.returned(call, Ending::Ok, "ok", &value);
        for (lock, holder) in locks.iter().zip(holders) {
            self.world.listed(lock.key, holder, when);
        }
        true
    }
}

fn lock_name(epoch: u64, index: u64) -> String {
    format!("lock/{index}/{epoch}")
}
