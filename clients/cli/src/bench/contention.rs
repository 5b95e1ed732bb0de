//! `conclave bench lock` and `conclave bench election`.

use std::{cell::OnceCell, rc::Rc, time::Duration};

use conclave_client::{Client, Error, LockGuard, Session, SessionOptions};
use serde_json::json;
use tokio::{
    task::{JoinHandle, LocalSet, spawn_local},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::{
    PREPARING, all, clients, close, is_lost, open,
    tally::{Figures, Observed, Tally},
};
use crate::{
    cli::{BenchElection, BenchLock, Global},
    failure::{Failure, GENERAL},
    output::{self, Format},
};

/// Connections unless told otherwise.
const CONNECTIONS: u32 = 4;
/// After an error, so that a cluster that is down is not hammered.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(10);
/// Locks that one session holds for others to work beside.
const HELD_PER_SESSION: u32 = 1_000;
/// How often it is looked whether all wait.
const LOOK_AROUND: Duration = Duration::from_millis(50);
/// What is under way at the end has this long to come to its own.
const FINISH_WITHIN: Duration = Duration::from_secs(1);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Lock,
    Election,
}

/// A load of either kind; see [`BenchLock`].
#[derive(Debug)]
pub(super) struct Load {
    kind: Kind,
    clients: u32,
    owners: u32,
    seconds: Duration,
    hot: bool,
    held: u32,
    connections: Option<u32>,
}

impl From<BenchLock> for Load {
    fn from(load: BenchLock) -> Load {
        let BenchLock {
            clients,
            owners,
            seconds,
            hot,
            held,
            connections,
        } = load;
        Load {
            kind: Kind::Lock,
            clients,
            owners,
            seconds,
            hot,
            held,
            connections,
        }
    }
}

impl From<BenchElection> for Load {
    fn from(load: BenchElection) -> Load {
        let BenchElection {
            clients,
            seconds,
            hot,
            connections,
        } = load;
        Load {
            kind: Kind::Election,
            clients,
            owners: 1,
            seconds,
            hot,
            held: 0,
            connections,
        }
    }
}

/// What a client of a run knows.
struct Worker {
    kind: Kind,
    session: Session,
    owner: String,
    name: String,
    observed: Rc<Observed>,
    /// There when the time has begun.
    tally: Rc<OnceCell<Tally>>,
}

/// Runs the benchmark and prints its figures.
pub(super) async fn run(load: Load, global: Global) -> Result<u8, Failure> {
    let connections = load
        .connections
        .unwrap_or_else(|| load.clients.min(CONNECTIONS));
    let clients = clients(&global, connections).await?;
    let work = measure(&clients, &load);
    let (tally, hot) = LocalSet::new().run_until(work).await?;
    let tally = tally.get().expect("the time has begun and is over");
    report(&load, connections, tally, &hot, global.output)
}

/// Opens all sessions, then lets every client acquire and release until the
/// time is over.
async fn measure(
    clients: &[Client],
    load: &Load,
) -> Result<(Rc<OnceCell<Tally>>, Rc<Observed>), Failure> {
    let workers = load.clients as usize;
    let owners = load.owners as usize;
    let options = SessionOptions::default();
    let sessions = open(clients, workers.div_ceil(owners), &options).await?;
    let run = format!("bench/{:x}", sessions[0].id());
    let holders = hold(clients, load.held, &run).await?;
    let tally = Rc::new(OnceCell::new());
    let hot = Rc::new(Observed::new());
    // Nobody gets a hot lock before all wait for it.
    let gate = match load.hot {
        true => Some(sessions[0].lock(run.clone()).owner("gate").await?),
        false => None,
    };
    let start = |number: usize| {
        let (name, observed) = match load.hot {
            true => (run.clone(), Rc::clone(&hot)),
            false => (format!("{run}/{number}"), Rc::new(Observed::new())),
        };
        let owner = match owners {
            1 => String::new(),
            _ => (number / sessions.len()).to_string(),
        };
        let session = sessions[number % sessions.len()].clone();
        let worker = Worker {
            kind: load.kind,
            session,
            owner,
            name,
            observed,
            tally: Rc::clone(&tally),
        };
        spawn_local(worker.work())
    };
    let begin = || tally.get_or_init(|| Tally::new(Instant::now(), load.seconds));
    let end;
    let running: Vec<JoinHandle<()>>;
    if let Some(gate) = gate {
        running = (0..workers).map(start).collect();
        until_queued(&clients[0], &run, workers).await?;
        end = begin().end();
        hot.given_up();
        gate.release().await?;
    } else {
        end = begin().end();
        running = (0..workers).map(start).collect();
    }
    sleep_until(end).await;
    let finished = timeout(FINISH_WITHIN, all(running)).await;
    // Who still waits hears that its session is over.
    close(sessions).await?;
    close(holders.iter().map(|(session, _)| session.clone()).collect()).await?;
    // Their sessions have released them; a guard that is dropped would do it again.
    std::mem::forget(holders);
    if let Ok(finished) = finished {
        finished?;
    }
    Ok((tally, hot))
}

/// Waits until so many contend behind the holder.
async fn until_queued(client: &Client, name: &str, waiters: usize) -> Result<(), Failure> {
    loop {
        let info = client.lock_info(name).await?;
        if info.is_some_and(|info| info.waiters_total >= waiters as u64) {
            return Ok(());
        }
        sleep(LOOK_AROUND).await;
    }
}

/// Has other sessions hold so many locks.
async fn hold(
    clients: &[Client],
    count: u32,
    run: &str,
) -> Result<Vec<(Session, Vec<LockGuard>)>, Failure> {
    let needed = count.div_ceil(HELD_PER_SESSION) as usize;
    let sessions = open(clients, needed, &SessionOptions::default()).await?;
    let mut holders = Vec::new();
    for (group, some) in sessions.chunks(PREPARING).enumerate() {
        let holding = some.iter().enumerate().map(|(number, session)| {
            let session = session.clone();
            let number = u32::try_from(group * PREPARING + number).expect("fewer than locks");
            let first = number * HELD_PER_SESSION;
            let locks = first..count.min(first + HELD_PER_SESSION);
            let run = run.to_owned();
            spawn_local(async move {
                let mut guards = Vec::new();
                for lock in locks {
                    guards.push(session.lock(format!("{run}-held/{lock}")).await?);
                }
                Ok::<_, Error>((session, guards))
            })
        });
        for held in all(holding.collect()).await? {
            holders.push(held?);
        }
    }
    Ok(holders)
}

impl Worker {
    fn is_over(&self) -> bool {
        self.tally.get().is_some_and(Tally::is_over)
    }

    async fn work(self) {
        while !self.is_over() {
            let began = Instant::now();
            let result = match self.kind {
                Kind::Lock => self.lock_once().await,
                Kind::Election => self.lead_once().await,
            };
            let Some(tally) = self.tally.get() else {
                // Nothing is granted before the time has begun.
                return;
            };
            match result {
                Ok(()) => tally.record(began),
                Err(_) if tally.is_over() => return,
                Err(error) => {
                    Tally::count(&tally.errors);
                    if is_lost(&error) {
                        return;
                    }
                    sleep(PAUSE_AFTER_ERROR).await;
                }
            }
        }
    }

    async fn lock_once(&self) -> Result<(), Error> {
        let request = self.session.lock(self.name.clone());
        let guard = request.owner(self.owner.clone()).await?;
        self.granted(guard.token());
        guard.release().await
    }

    async fn lead_once(&self) -> Result<(), Error> {
        let leadership = self.session.campaign(self.name.clone()).await?;
        self.granted(leadership.term());
        leadership.resign().await
    }

    /// Checks a grant, which is given up next.
    fn granted(&self, token: u64) {
        if !self.observed.granted(token)
            && let Some(tally) = self.tally.get()
        {
            Tally::count(&tally.violations);
        }
        self.observed.given_up();
    }
}

fn report(
    load: &Load,
    connections: u32,
    tally: &Tally,
    hot: &Observed,
    format: Format,
) -> Result<u8, Failure> {
    let Figures {
        ops,
        ops_s,
        ops_s_min,
        p50_us,
        p99_us,
        max_us,
    } = tally.figures();
    let seconds = load.seconds.as_secs_f64();
    let (errors, violations) = (tally.errors.get(), tally.violations.get());
    let (handoff_p50_us, handoff_p99_us) = hot.hand_offs();
    let (bench, done) = match load.kind {
        Kind::Lock => ("lock", "locks acquired and released"),
        Kind::Election => ("election", "elections won and resigned"),
    };
    match format {
        Format::Json => output::json(&json!({
            "bench": bench,
            "hot": load.hot,
            "clients": load.clients,
            "owners": load.owners,
            "held": load.held,
            "connections": connections,
            "seconds": seconds,
            "ops": ops,
            "ops_s": ops_s,
            "ops_s_min": ops_s_min,
            "p50_us": p50_us,
            "p99_us": p99_us,
            "max_us": max_us,
            // 0 unless hot.
            "handoff_p50_us": handoff_p50_us,
            "handoff_p99_us": handoff_p99_us,
            "errors": errors,
            "violations": violations,
        }))?,
        Format::Table => {
            output::text(&format!(
                "{ops} {done} in {seconds} s, {ops_s} a second, \
                 {ops_s_min} in the worst second\n\
                 latency of a pair: p50 {p50_us} us, p99 {p99_us} us, max {max_us} us\n\
                 errors {errors}, violations {violations}\n"
            ))?;
            if load.hot {
                output::text(&format!(
                    "a hand-off: p50 {handoff_p50_us} us, p99 {handoff_p99_us} us\n"
                ))?;
            }
        }
    }
    if ops > 0 && violations == 0 {
        Ok(0)
    } else {
        Ok(GENERAL)
    }
}
