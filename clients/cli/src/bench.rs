//! `conclave bench`: load on a running cluster, measured and checked.
//!
//! Everything runs on one thread, so that what a client observes has an order:
//! if a grant is seen before the holder has begun to give the lock up, two
//! held it at once.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    time::Duration,
};

use conclave_client::{Client, Error, Session, SessionOptions};
use serde_json::json;
use tokio::{
    task::LocalSet,
    time::{Instant, sleep},
};

use crate::{
    admin::connect,
    cli::{BenchArgs, BenchCommand, BenchLoad, Global},
    failure::{Failure, GENERAL},
    histogram::Histogram,
    output::{self, Format},
};

/// Connections unless told otherwise.
const CONNECTIONS: u32 = 4;
/// After an error, so that a cluster that is down is not hammered.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(10);

/// What all clients of a run share.
#[derive(Debug)]
struct Tally {
    /// What ends later does not count.
    end: Instant,
    latencies: RefCell<Histogram>,
    errors: Cell<u64>,
    violations: Cell<u64>,
}

/// What was seen of one lock.
#[derive(Debug, Default)]
struct Observed {
    last_token: Cell<u64>,
    is_held: Cell<bool>,
}

impl Tally {
    fn new(start: Instant, seconds: Duration) -> Tally {
        Tally {
            end: start + seconds,
            latencies: RefCell::new(Histogram::new()),
            errors: Cell::new(0),
            violations: Cell::new(0),
        }
    }

    fn record(&self, began: Instant) {
        let now = Instant::now();
        if now <= self.end {
            let micros = now.duration_since(began).as_micros();
            self.latencies
                .borrow_mut()
                .record(u64::try_from(micros).unwrap_or(u64::MAX));
        }
    }
}

impl Observed {
    /// A grant was answered. Whether it goes together with what was seen
    /// before.
    fn granted(&self, token: u64) -> bool {
        let is_alone = !self.is_held.replace(true);
        let grows = token > self.last_token.replace(token);
        is_alone && grows
    }

    /// The holder begins to give it up, or has lost it.
    fn given_up(&self) {
        self.is_held.set(false);
    }
}

/// Runs the benchmark and prints its figures.
pub(crate) async fn run(args: BenchArgs, global: Global) -> Result<u8, Failure> {
    let BenchCommand::Lock(load) = args.what;
    let connections = load
        .connections
        .unwrap_or_else(|| load.clients.min(CONNECTIONS));
    let mut clients = Vec::new();
    for _ in 0..connections {
        let client = connect(&global)?;
        client.find_leader().await;
        clients.push(client);
    }
    let tally = LocalSet::new().run_until(lock(&clients, &load)).await?;
    report(&load, connections, &tally, global.output)
}

/// Opens all sessions, then lets every client acquire and release until the
/// time is over.
async fn lock(clients: &[Client], load: &BenchLoad) -> Result<Rc<Tally>, Failure> {
    let mut opening = Vec::new();
    for client in clients.iter().cycle().take(load.clients as usize) {
        let client = client.clone();
        let opened = async move { client.session(SessionOptions::default()).await };
        opening.push(tokio::task::spawn_local(opened));
    }
    let mut sessions = Vec::new();
    for opened in opening {
        sessions.push(joined(opened.await)??);
    }
    let tally = Rc::new(Tally::new(Instant::now(), load.seconds));
    let hot = Rc::new(Observed::default());
    let run = format!("{:x}", sessions[0].id());
    let mut running = Vec::new();
    for (number, session) in sessions.into_iter().enumerate() {
        let (name, observed) = if load.hot {
            (format!("bench/{run}"), Rc::clone(&hot))
        } else {
            (format!("bench/{run}/{number}"), Rc::default())
        };
        let client = lock_until_end(session, name, observed, Rc::clone(&tally));
        running.push(tokio::task::spawn_local(client));
    }
    for client in running {
        joined(client.await)?;
    }
    Ok(tally)
}

async fn lock_until_end(session: Session, name: String, observed: Rc<Observed>, tally: Rc<Tally>) {
    while Instant::now() < tally.end {
        let began = Instant::now();
        match lock_once(&session, &name, &observed, &tally).await {
            Ok(()) => tally.record(began),
            Err(Error::SessionLost(_)) => {
                tally.errors.set(tally.errors.get() + 1);
                return;
            }
            Err(_) => {
                tally.errors.set(tally.errors.get() + 1);
                sleep(PAUSE_AFTER_ERROR).await;
            }
        }
    }
    if let Err(error) = session.close().await {
        tracing::debug!(%error, "the session will expire");
    }
}

async fn lock_once(
    session: &Session,
    name: &str,
    observed: &Observed,
    tally: &Tally,
) -> Result<(), Error> {
    let guard = session.lock(name).await?;
    if !observed.granted(guard.token()) {
        tally.violations.set(tally.violations.get() + 1);
    }
    observed.given_up();
    guard.release().await
}

fn report(
    load: &BenchLoad,
    connections: u32,
    tally: &Tally,
    format: Format,
) -> Result<u8, Failure> {
    let latencies = tally.latencies.borrow();
    let ops = latencies.total();
    let seconds = load.seconds.as_secs_f64();
    let ops_s = (ops as f64 / seconds).round();
    let (p50, p99, max) = (
        latencies.percentile(50),
        latencies.percentile(99),
        latencies.max(),
    );
    let (errors, violations) = (tally.errors.get(), tally.violations.get());
    match format {
        Format::Json => output::json(&json!({
            "bench": "lock",
            "hot": load.hot,
            "clients": load.clients,
            "connections": connections,
            "seconds": seconds,
            "ops": ops,
            "ops_s": ops_s,
            "p50_us": p50,
            "p99_us": p99,
            "max_us": max,
            "errors": errors,
            "violations": violations,
        }))?,
        Format::Table => output::text(&format!(
            "{ops} locks acquired and released in {seconds} s, {ops_s} a second\n\
             latency of a pair: p50 {p50} us, p99 {p99} us, max {max} us\n\
             errors {errors}, violations {violations}\n"
        ))?,
    }
    if ops > 0 && violations == 0 {
        Ok(0)
    } else {
        Ok(GENERAL)
    }
}

/// A client that panicked ends the run.
fn joined<T>(result: Result<T, tokio::task::JoinError>) -> Result<T, Failure> {
    result.map_err(|error| Failure::new(GENERAL, format!("a client ended early: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_and_a_token_that_does_not_grow_are_violations() {
        let observed = Observed::default();
        assert!(observed.granted(5));
        assert!(!observed.granted(6), "two at once");
        observed.given_up();
        assert!(observed.granted(7));
        observed.given_up();
        assert!(!observed.granted(7), "the same token again");
    }

    #[test]
    fn what_ends_after_the_time_does_not_count() {
        let start = Instant::now() - Duration::from_secs(10);
        let tally = Tally::new(start, Duration::from_secs(5));
        tally.record(start);
        assert_eq!(tally.latencies.borrow().total(), 0);
        let tally = Tally::new(start, Duration::from_secs(1_000));
        tally.record(start);
        assert_eq!(tally.latencies.borrow().total(), 1);
    }
}
