//! `conclave bench sessions`.

use std::{thread, time::Duration};

use conclave_client::{Client, Session, SessionOptions, Status};
use serde_json::json;
use tokio::{
    runtime::Builder,
    sync::oneshot,
    task::LocalSet,
    time::{Instant, sleep, sleep_until},
};

use super::{clients, close, open};
use crate::{
    cli::{BenchSessions, Global},
    failure::{Failure, GENERAL},
    output::{self, Format},
};

/// How late after their TTL the last session may end.
const EXPIRED_WITHIN: Duration = Duration::from_secs(5);
/// How long it is waited for that.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_AROUND: Duration = Duration::from_millis(200);

/// What became of the sessions while their client was there.
#[derive(Clone, Copy, Debug)]
struct Kept {
    opened_in: Duration,
    lost: usize,
    /// Not lost, but not renewed in the last two thirds of the TTL.
    suspect: usize,
    left_at: Instant,
}

/// Runs the benchmark and prints its figures.
pub(super) async fn run(load: BenchSessions, global: Global) -> Result<u8, Failure> {
    // To be told apart from the sessions of others.
    let name = format!("bench {}", std::process::id());
    let kept = match load.vanish {
        false => {
            LocalSet::new()
                .run_until(async {
                    let clients = clients(&global, load.connections).await?;
                    let (sessions, kept) = keep(&clients, &load, &name).await?;
                    close(sessions).await?;
                    Ok::<_, Failure>(kept)
                })
                .await?
        }
        true => vanish(&load, &global, &name).await?,
    };
    let expired_in = match load.vanish {
        true => expired(&global, &name, kept.left_at, &load).await?,
        false => None,
    };
    report(&load, &kept, expired_in, global.output)
}

/// Opens the sessions and keeps them.
async fn keep(
    clients: &[Client],
    load: &BenchSessions,
    name: &str,
) -> Result<(Vec<Session>, Kept), Failure> {
    let began = Instant::now();
    let options = SessionOptions {
        ttl: load.ttl,
        name: name.to_owned(),
        ..SessionOptions::default()
    };
    let sessions = open(clients, load.sessions as usize, &options).await?;
    let opened_in = began.elapsed();
    sleep(load.seconds).await;
    let (mut lost, mut suspect) = (0, 0);
    for session in &sessions {
        match session.status() {
            Status::Active => {}
            Status::Suspect { .. } => suspect += 1,
            Status::Lost(_) => lost += 1,
        }
    }
    let left_at = Instant::now();
    let kept = Kept {
        opened_in,
        lost,
        suspect,
        left_at,
    };
    Ok((sessions, kept))
}

/// Keeps the sessions on a thread that ends in the middle of everything, as a
/// machine does that loses its power, but for the connections: those are reset.
async fn vanish(load: &BenchSessions, global: &Global, name: &str) -> Result<Kept, Failure> {
    let (done, result) = oneshot::channel();
    let (load, global, name) = (load.clone(), global.clone(), name.to_owned());
    thread::spawn(move || {
        let kept = (|| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let local = LocalSet::new();
            local.block_on(&runtime, async {
                let clients = clients(&global, load.connections).await?;
                let (sessions, kept) = keep(&clients, &load, &name).await?;
                // Dropped, they would be closed.
                std::mem::forget(sessions);
                Ok::<_, Failure>(kept)
            })
        })();
        // Nobody listens any more if the run was given up.
        done.send(kept).ok();
    });
    result
        .await
        .map_err(|_| Failure::new(GENERAL, "the client of the sessions ended early"))?
}

/// How long after their client left all sessions had ended, if they did.
async fn expired(
    global: &Global,
    name: &str,
    left_at: Instant,
    load: &BenchSessions,
) -> Result<Option<Duration>, Failure> {
    let watcher = clients(global, 1).await?.remove(0);
    // Looking at them all is work for the cluster: not before they can be over.
    sleep_until(left_at + load.ttl).await;
    while left_at.elapsed() < load.ttl + PATIENCE {
        let sessions = watcher.sessions().await?;
        if sessions.iter().all(|session| session.name != name) {
            return Ok(Some(left_at.elapsed()));
        }
        sleep(LOOK_AROUND).await;
    }
    Ok(None)
}

fn report(
    load: &BenchSessions,
    kept: &Kept,
    expired_in: Option<Duration>,
    format: Format,
) -> Result<u8, Failure> {
    let Kept {
        opened_in,
        lost,
        suspect,
        ..
    } = *kept;
    let expired_ms = expired_in.map(|time| time.as_millis());
    match format {
        Format::Json => output::json(&json!({
            "bench": "sessions",
            "sessions": load.sessions,
            "connections": load.connections,
            "ttl_ms": load.ttl.as_millis(),
            "seconds": load.seconds.as_secs_f64(),
            "opened_ms": opened_in.as_millis(),
            "lost": lost,
            "suspect": suspect,
            "vanished": load.vanish,
            "expired_ms": expired_ms,
        }))?,
        Format::Table => {
            output::text(&format!(
                "{} sessions opened in {:.1} s, kept for {} s: lost {lost}, suspect {suspect}\n",
                load.sessions,
                opened_in.as_secs_f64(),
                load.seconds.as_secs_f64(),
            ))?;
            if load.vanish {
                output::text(&match expired_in {
                    Some(time) => format!("vanished; all expired within {:?}\n", time),
                    None => "vanished; they did not all expire\n".to_owned(),
                })?;
            }
        }
    }
    let is_expired = expired_in.is_some_and(|time| time <= load.ttl + EXPIRED_WITHIN);
    if lost == 0 && (is_expired || !load.vanish) {
        Ok(0)
    } else {
        Ok(GENERAL)
    }
}
