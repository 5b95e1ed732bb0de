//! `conclave lock`: holds a lock while a command runs.
//!
//! The command must have ended before another can hold the lock. So it gets
//! SIGTERM while there is still time for it to end, and SIGKILL a margin before
//! the client's own deadline, which lies before the cluster's.

use std::{fs, time::Duration};

use conclave_client::{Client, Error, LockGuard, LossReason, Session, SessionOptions};
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    process::Child,
    time::{Instant, sleep, timeout},
};

use crate::{
    admin::connect,
    cli::{Global, LockArgs},
    failure::{Failure, LOST, UNREACHED},
    output::{self, Format},
    process::{Signals, command, exit_code, not_started, signal_code, signal_group},
    watchdog::Watchdog,
};

/// The longest time between SIGTERM and SIGKILL.
const GRACE_MAX: Duration = Duration::from_secs(5);
/// The longest safety margin between SIGKILL and the deadline.
const MARGIN_MAX: Duration = Duration::from_millis(250);
/// How often the deadline is looked at: timers stand still while the machine
/// is suspended, the deadline does not.
const LOOK: Duration = Duration::from_millis(500);
/// How long to try to leave in good order; the TTL does the rest.
const GOODBYE: Duration = Duration::from_secs(3);
/// The same when something has gone wrong already.
const HASTY_GOODBYE: Duration = Duration::from_millis(500);

/// Runs the command under the lock, or without one holds it.
pub(crate) async fn run(args: LockArgs, global: Global) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    let client = connect(&global)?;
    let opened = tokio::select! {
        opened = open(&client, &args) => opened?,
        signal = signals.end() => return Ok(signal_code(signal.as_raw())),
    };
    let outcome = hold(&opened, &args, &global, &mut signals).await;
    let patience = if outcome == Ok(0) {
        GOODBYE
    } else {
        HASTY_GOODBYE
    };
    if let Ok(Err(error)) = timeout(patience, opened.close()).await {
        tracing::debug!(%error, "the session will expire");
    }
    outcome
}

async fn open(client: &Client, args: &LockArgs) -> Result<Session, Error> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = format!("{}/{}", host.trim(), std::process::id());
    client
        .session(SessionOptions {
            ttl: args.ttl,
            name,
            ..SessionOptions::default()
        })
        .await
}

/// Acquires the lock and holds it until the command has ended or it is lost.
async fn hold(
    session: &Session,
    args: &LockArgs,
    global: &Global,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let request = session.lock(&args.name);
    let request = match (args.try_now, args.wait) {
        (true, _) => request.try_now(),
        (false, Some(limit)) => request.wait(limit),
        (false, None) => request,
    };
    let request = match args.lock_delay {
        Some(delay) => request.lock_delay(delay),
        None => request,
    };
    let guard = tokio::select! {
        acquired = request => acquired.map_err(|error| not_acquired(&args.name, error))?,
        signal = signals.end() => return Ok(signal_code(signal.as_raw())),
    };
    if args.command.is_empty() {
        announce(&guard, global.output)?;
        return tokio::select! {
            reason = guard.lost() => Err(lost(&guard, &reason)),
            _ = signals.end() => release(guard, 0).await,
        };
    }
    supervise(guard, args, signals).await
}

fn not_acquired(name: &str, error: Error) -> Failure {
    let failure = Failure::from(error.clone());
    match error {
        Error::SessionLost(LossReason::SessionExpired) => Failure::new(
            UNREACHED,
            format!("no contact with the cluster while waiting for `{name}`"),
        ),
        _ => Failure::new(failure.code, format!("`{name}`: {error}")),
    }
}

fn announce(guard: &LockGuard, format: Format) -> Result<(), Failure> {
    let key = String::from_utf8_lossy(guard.key());
    match format {
        Format::Table => output::text(&format!("key    {key}\ntoken  {}\n", guard.token()))?,
        Format::Json => output::json(&json!({
            "lock": guard.name(),
            "key": key,
            "token": guard.token(),
            "session_id": output::session_hex(guard.session().id()),
        }))?,
    }
    Ok(())
}

/// Runs the command, and ends it if the lock is lost or about to be.
async fn supervise(
    guard: LockGuard,
    args: &LockArgs,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let watchdog = Watchdog::start().await?;
    let mut child = match start(&guard, args, &watchdog) {
        Ok(child) => child,
        Err(failure) => {
            watchdog.dismiss().await;
            release(guard, failure.code).await?;
            return Err(failure);
        }
    };
    let grace = grace(guard.session().ttl());
    let margin = margin(guard.session().ttl());
    let danger = loop {
        tokio::select! {
            status = child.wait() => {
                watchdog.dismiss().await;
                return release(guard, exit_code(status?)).await;
            }
            signal = signals.next() => signal_group(watchdog.group(), signal),
            reason = danger(&guard, grace + margin) => break reason,
        }
    };
    let reason = danger.as_ref().unwrap_or(&LossReason::SessionExpired);
    let failure = lost(&guard, reason);
    output::complain(&format!("{}; stopping the command", failure.message));
    signal_group(watchdog.group(), Signal::TERM);
    let began = Instant::now();
    let patience = || {
        let grace = grace.saturating_sub(began.elapsed());
        match danger {
            // It is lost already; only haste is left.
            Some(_) => grace,
            None => guard.remaining().saturating_sub(margin).min(grace),
        }
    };
    let ended_in_time = ends_within(&mut child, patience).await;
    // Also what the command has left behind.
    signal_group(watchdog.group(), Signal::KILL);
    if !ended_in_time {
        child.wait().await?;
    }
    watchdog.dismiss().await;
    if danger.is_none() && timeout(HASTY_GOODBYE, guard.release()).await.is_err() {
        tracing::debug!("not released, will expire");
    }
    Ok(failure.code)
}

fn start(guard: &LockGuard, args: &LockArgs, watchdog: &Watchdog) -> Result<Child, Failure> {
    command(&args.command)
        .process_group(watchdog.group().as_raw_nonzero().get())
        .env("CONCLAVE_LOCK_NAME", guard.name())
        .env(
            "CONCLAVE_LOCK_KEY",
            String::from_utf8_lossy(guard.key()).as_ref(),
        )
        .env("CONCLAVE_LOCK_TOKEN", guard.token().to_string())
        .env(
            "CONCLAVE_SESSION",
            output::session_hex(guard.session().id()),
        )
        .spawn()
        .map_err(|error| not_started(&args.command[0], &error))
}

/// Resolves when the lock is lost, with the reason, or when only `lead` is
/// left until the deadline, with none.
async fn danger(guard: &LockGuard, lead: Duration) -> Option<LossReason> {
    loop {
        let left = guard.remaining();
        let pause = left.saturating_sub(lead);
        if pause.is_zero() && !left.is_zero() {
            return None;
        }
        tokio::select! {
            biased;
            reason = guard.lost() => return Some(reason),
            () = sleep(pause.min(LOOK)) => {}
        }
    }
}

/// Whether the command ends while there is patience, looked at as in [`danger`].
async fn ends_within(child: &mut Child, patience: impl Fn() -> Duration) -> bool {
    loop {
        let left = patience();
        if timeout(left.min(LOOK), child.wait()).await.is_ok() {
            return true;
        }
        if left <= LOOK {
            return false;
        }
    }
}

/// Gives the lock up after work that ended with `code`.
async fn release(guard: LockGuard, code: u8) -> Result<u8, Failure> {
    let name = guard.name().to_owned();
    match timeout(GOODBYE, guard.release()).await {
        Ok(Ok(())) => Ok(code),
        Ok(Err(error)) => Err(Failure::new(
            LOST,
            format!("lock `{name}` was lost before the end: {error}"),
        )),
        Err(_) => {
            output::complain(&format!(
                "no server takes `{name}` back; it is free after its TTL"
            ));
            Ok(code)
        }
    }
}

fn lost(guard: &LockGuard, reason: &LossReason) -> Failure {
    Failure::new(LOST, format!("lock `{}` lost: {reason}", guard.name()))
}

/// Time for the command to end by itself.
fn grace(ttl: Duration) -> Duration {
    GRACE_MAX.min(ttl / 4)
}

fn margin(ttl: Duration) -> Duration {
    MARGIN_MAX.min(ttl / 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_grace_and_margin_after_suspicion_of_every_ttl() {
        for ttl_ms in [500, 1_000, 10_000, 60_000, 86_400_000] {
            let ttl = Duration::from_millis(ttl_ms);
            // Renewals start at a third; the deadline is at 0.85.
            assert!(grace(ttl) + margin(ttl) < ttl.mul_f64(0.85) - ttl / 3);
        }
    }
}
