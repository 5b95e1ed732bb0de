//! Holding a lock or leading, while a command runs: what `conclave lock` and
//! `conclave elect` have in common.
//!
//! The command must have ended before another can hold the lock. So it gets
//! SIGTERM while there is still time for it to end, and SIGKILL a margin before
//! the client's own deadline, which lies before the cluster's.

use std::{ffi::OsString, fs, time::Duration};

use conclave_client::{Client, Error, Leadership, LockGuard, LossReason, Session, SessionOptions};
use rustix::process::Signal;
use serde_json::json;
use tokio::{
    process::Child,
    time::{Instant, sleep, timeout},
};

use crate::{
    admin::connect,
    cli::Global,
    failure::{Failure, LOST, UNREACHED},
    kv::show,
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

/// What is held.
pub(crate) enum Held {
    /// A lock.
    Lock(LockGuard),
    /// Leadership.
    Leadership(Leadership),
}

impl Held {
    /// What it is and its name, for people.
    fn described(&self) -> String {
        match self {
            Self::Lock(guard) => format!("lock `{}`", guard.name()),
            Self::Leadership(leadership) => format!("leadership of `{}`", leadership.name()),
        }
    }

    fn session(&self) -> &Session {
        match self {
            Self::Lock(guard) => guard.session(),
            Self::Leadership(leadership) => leadership.session(),
        }
    }

    fn remaining(&self) -> Duration {
        match self {
            Self::Lock(guard) => guard.remaining(),
            Self::Leadership(leadership) => leadership.remaining(),
        }
    }

    async fn lost(&self) -> LossReason {
        match self {
            Self::Lock(guard) => guard.lost().await,
            Self::Leadership(leadership) => leadership.lost().await,
        }
    }

    async fn give_up(self) -> Result<(), Error> {
        match self {
            Self::Lock(guard) => guard.release().await,
            Self::Leadership(leadership) => leadership.resign().await,
        }
    }

    fn announce(&self, format: Format) -> Result<(), Failure> {
        let session = output::session_hex(self.session().id());
        let (key, number) = match self {
            Self::Lock(guard) => (guard.key(), guard.token()),
            Self::Leadership(leadership) => (leadership.key(), leadership.term()),
        };
        let text = show::shown(key);
        match (self, format) {
            (Self::Lock(_), Format::Table) => {
                output::text(&format!("key    {text}\ntoken  {number}\n"))?;
            }
            (Self::Leadership(_), Format::Table) => {
                output::text(&format!("key   {text}\nterm  {number}\n"))?;
            }
            (Self::Lock(guard), Format::Json) => {
                let mut shown = json!({
                    "lock": guard.name(),
                    "token": number,
                    "session_id": session,
                });
                show::put_bytes(&mut shown, "key", key);
                output::json(&shown)?;
            }
            (Self::Leadership(leadership), Format::Json) => {
                let mut shown = json!({
                    "election": leadership.name(),
                    "term": number,
                    "session_id": session,
                });
                show::put_bytes(&mut shown, "key", key);
                output::json(&shown)?;
            }
        }
        Ok(())
    }

    /// What the command finds in its environment.
    fn environment(&self) -> Vec<(&'static str, String)> {
        let text = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
        let session = ("CONCLAVE_SESSION", output::session_hex(self.session().id()));
        match self {
            Self::Lock(guard) => vec![
                ("CONCLAVE_LOCK_NAME", guard.name().to_owned()),
                ("CONCLAVE_LOCK_KEY", text(guard.key())),
                ("CONCLAVE_LOCK_TOKEN", guard.token().to_string()),
                session,
            ],
            Self::Leadership(leadership) => vec![
                ("CONCLAVE_ELECTION_NAME", leadership.name().to_owned()),
                ("CONCLAVE_ELECTION_KEY", text(leadership.key())),
                ("CONCLAVE_ELECTION_TERM", leadership.term().to_string()),
                session,
            ],
        }
    }
}

/// Opens a session, asks for what is to be held, and runs the command while it is; or
/// holds it without one.
pub(crate) async fn run<F>(
    global: &Global,
    ttl: Duration,
    name: &str,
    args: &[OsString],
    request: impl FnOnce(&Session) -> F,
) -> Result<u8, Failure>
where
    F: Future<Output = Result<Held, Error>>,
{
    let mut signals = Signals::new()?;
    let client = connect(global)?;
    let opened = tokio::select! {
        opened = open(&client, ttl) => opened?,
        signal = signals.end() => return Ok(signal_code(signal.as_raw())),
    };
    let outcome = async {
        let held = tokio::select! {
            granted = request(&opened) => granted.map_err(|error| not_acquired(name, error))?,
            signal = signals.end() => return Ok(signal_code(signal.as_raw())),
        };
        hold(held, args, global, &mut signals).await
    };
    let outcome = outcome.await;
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

async fn open(client: &Client, ttl: Duration) -> Result<Session, Error> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = format!("{}/{}", host.trim(), std::process::id());
    client
        .session(SessionOptions {
            ttl,
            name,
            ..SessionOptions::default()
        })
        .await
}

/// Holds it until the command has ended or it is lost.
async fn hold(
    held: Held,
    args: &[OsString],
    global: &Global,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    if !args.is_empty() {
        return supervise(held, args, signals).await;
    }
    held.announce(global.output)?;
    tokio::select! {
        reason = held.lost() => Err(lost(&held, &reason)),
        _ = signals.end() => give_up(held, 0).await,
    }
}

/// What a request fails with: one that may wait for no time at all comes too late where
/// one that would not wait is refused.
pub(crate) fn in_time(try_now: bool, error: Error) -> Error {
    match error {
        Error::LockHeld if !try_now => Error::WaitTimedOut,
        error => error,
    }
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

/// Runs the command, and ends it if the lock is lost or about to be.
async fn supervise(held: Held, args: &[OsString], signals: &mut Signals) -> Result<u8, Failure> {
    let watchdog = Watchdog::start().await?;
    let mut child = match start(&held, args, &watchdog) {
        Ok(child) => child,
        Err(failure) => {
            watchdog.dismiss().await;
            give_up(held, failure.code).await?;
            return Err(failure);
        }
    };
    let grace = grace(held.session().ttl());
    let margin = margin(held.session().ttl());
    let danger = loop {
        tokio::select! {
            status = child.wait() => {
                watchdog.dismiss().await;
                return give_up(held, exit_code(status?)).await;
            }
            signal = signals.next() => signal_group(watchdog.group(), signal),
            reason = danger(&held, grace + margin) => break reason,
        }
    };
    let reason = danger.as_ref().unwrap_or(&LossReason::SessionExpired);
    let failure = lost(&held, reason);
    output::complain(&format!("{}; stopping the command", failure.message));
    signal_group(watchdog.group(), Signal::TERM);
    let began = Instant::now();
    let patience = || {
        let grace = grace.saturating_sub(began.elapsed());
        match danger {
            // It is lost already; only haste is left.
            Some(_) => grace,
            None => held.remaining().saturating_sub(margin).min(grace),
        }
    };
    let ended_in_time = ends_within(&mut child, patience).await;
    // Also what the command has left behind.
    signal_group(watchdog.group(), Signal::KILL);
    if !ended_in_time {
        child.wait().await?;
    }
    watchdog.dismiss().await;
    if danger.is_none() && timeout(HASTY_GOODBYE, held.give_up()).await.is_err() {
        tracing::debug!("not released, will expire");
    }
    Ok(failure.code)
}

fn start(held: &Held, args: &[OsString], watchdog: &Watchdog) -> Result<Child, Failure> {
    command(args)
        .process_group(watchdog.group().as_raw_nonzero().get())
        .envs(held.environment())
        .spawn()
        .map_err(|error| not_started(&args[0], &error))
}

/// Resolves when the lock is lost, with the reason, or when only `lead` is
/// left until the deadline, with none.
async fn danger(held: &Held, lead: Duration) -> Option<LossReason> {
    loop {
        let left = held.remaining();
        let pause = left.saturating_sub(lead);
        if pause.is_zero() && !left.is_zero() {
            return None;
        }
        tokio::select! {
            biased;
            reason = held.lost() => return Some(reason),
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

/// Gives it up after work that ended with `code`.
async fn give_up(held: Held, code: u8) -> Result<u8, Failure> {
    let described = held.described();
    match timeout(GOODBYE, held.give_up()).await {
        Ok(Ok(())) => Ok(code),
        Ok(Err(error)) => Err(Failure::new(
            LOST,
            format!("{described} was lost before the end: {error}"),
        )),
        Err(_) => {
            output::complain(&format!(
                "no server takes the {described} back; it is free after its TTL"
            ));
            Ok(code)
        }
    }
}

fn lost(held: &Held, reason: &LossReason) -> Failure {
    Failure::new(LOST, format!("{} lost: {reason}", held.described()))
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
    fn a_wait_of_no_time_is_no_try() {
        let code = |try_now| Failure::from(in_time(try_now, Error::LockHeld)).code;
        assert_eq!((code(true), code(false)), (73, 124));
    }

    #[test]
    fn there_is_room_for_grace_and_margin_after_suspicion_of_every_ttl() {
        for ttl_ms in [500, 1_000, 10_000, 60_000, 86_400_000] {
            let ttl = Duration::from_millis(ttl_ms);
            // Renewals start at a third; the deadline is at 0.85.
            assert!(grace(ttl) + margin(ttl) < ttl.mul_f64(0.85) - ttl / 3);
        }
    }
}
