//! `conclave bench`: load on a running cluster, measured and checked.
//!
//! Everything runs on one thread, so that what a client observes has an order:
//! if a grant is seen before the holder has begun to give the lock up, two
//! held it at once.

mod contention;
mod sessions;
mod tally;

use conclave_client::{Client, Error, Session, SessionOptions};
use tokio::task::{JoinError, JoinHandle, spawn_local};

use crate::{
    admin::connect,
    cli::{BenchArgs, BenchCommand, Global},
    failure::{Failure, GENERAL},
};

/// Calls under way at once while a run is prepared.
const PREPARING: usize = 1_024;

/// Runs the benchmark and prints its figures.
pub(crate) async fn run(args: BenchArgs, global: Global) -> Result<u8, Failure> {
    match args.what {
        BenchCommand::Lock(load) => contention::run(load.into(), global).await,
        BenchCommand::Election(load) => contention::run(load.into(), global).await,
        BenchCommand::Sessions(load) => sessions::run(load, global).await,
    }
}

/// Clients of the cluster, each with a connection of its own.
async fn clients(global: &Global, connections: u32) -> Result<Vec<Client>, Failure> {
    let mut clients = Vec::new();
    for _ in 0..connections {
        let client = connect(global)?;
        client.find_leader().await;
        clients.push(client);
    }
    Ok(clients)
}

/// Opens sessions, spread over the clients.
async fn open(
    clients: &[Client],
    count: usize,
    options: &SessionOptions,
) -> Result<Vec<Session>, Failure> {
    let clients: Vec<&Client> = clients.iter().cycle().take(count).collect();
    let mut sessions = Vec::with_capacity(count);
    for some in clients.chunks(PREPARING) {
        let opening = some.iter().map(|client| {
            let client = Client::clone(client);
            let options = options.clone();
            spawn_local(async move { client.session(options).await })
        });
        for opened in all(opening.collect()).await? {
            sessions.push(opened?);
        }
    }
    Ok(sessions)
}

/// Closes sessions; those that cannot be closed expire.
async fn close(sessions: Vec<Session>) -> Result<(), Failure> {
    let mut sessions = sessions.into_iter().peekable();
    while sessions.peek().is_some() {
        let closing = sessions.by_ref().take(PREPARING).map(|session| {
            spawn_local(async move {
                if let Err(error) = session.close().await {
                    tracing::debug!(%error, "the session will expire");
                }
            })
        });
        all(closing.collect()).await?;
    }
    Ok(())
}

/// What all of them come to.
async fn all<T>(running: Vec<JoinHandle<T>>) -> Result<Vec<T>, Failure> {
    let mut results = Vec::with_capacity(running.len());
    for task in running {
        results.push(joined(task.await)?);
    }
    Ok(results)
}

/// A client that panicked ends the run.
fn joined<T>(result: Result<T, JoinError>) -> Result<T, Failure> {
    result.map_err(|error| Failure::new(GENERAL, format!("a client ended early: {error}")))
}

/// Whether the session is over.
fn is_lost(error: &Error) -> bool {
    matches!(error, Error::SessionLost(_))
}
