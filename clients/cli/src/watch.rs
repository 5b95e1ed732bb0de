//! `conclave watch`: a command for each change of a key.

use std::{
    collections::{HashSet, VecDeque},
    ffi::OsStr,
    os::unix::ffi::OsStrExt as _,
    process::Stdio,
    time::Duration,
};

use conclave_client::{Event, Watching};
use rustix::process::Signal;
use tokio::{io::AsyncWriteExt as _, process::Child, time::timeout};

use crate::{
    admin::connect,
    cli::Global,
    failure::Failure,
    kv::{args::WatchArgs, gone, show, watch_of},
    output::{self, session_hex},
    process::{Signals, command, exit_code, not_started, signal_code, signal_group},
    watchdog::Watchdog,
};

/// What is longer does not go into the environment of a command: systems refuse it.
const VARIABLE_BYTES_MAX: usize = 64 << 10;

/// Runs the command for each change, one after the other.
pub(crate) async fn run(args: WatchArgs, global: Global) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    let client = connect(&global)?;
    let mut watching = tokio::select! {
        begun = client.watch(watch_of(&args.watched)) => begun?,
        signal = signals.end() => return Ok(signal_code(signal.as_raw())),
    };
    let watchdog = Watchdog::start().await?;
    let outcome = serve(&mut watching, &args, &watchdog, &mut signals).await;
    watchdog.dismiss().await;
    outcome
}

async fn serve(
    watching: &mut Watching,
    args: &WatchArgs,
    watchdog: &Watchdog,
    signals: &mut Signals,
) -> Result<u8, Failure> {
    let mut left = args.watched.events.unwrap_or(u64::MAX);
    let mut waiting: VecDeque<Event> = VecDeque::new();
    while left > 0 {
        if waiting.is_empty() {
            tokio::select! {
                events = watching.next() => waiting.extend(events.map_err(gone)?),
                signal = signals.end() => return Ok(signal_code(signal.as_raw())),
            }
        }
        if args.latest {
            // All that has come already, without waiting.
            while let Ok(events) = timeout(Duration::ZERO, watching.next()).await {
                waiting.extend(events.map_err(gone)?);
            }
            waiting = latest(waiting);
        }
        let event = waiting.pop_front().expect("there was one");
        let mut child = start(&event, args, watchdog)?;
        let (code, ended_by) = finish(&mut child, &event, watchdog, signals).await?;
        if let Some(signal) = ended_by {
            return Ok(signal_code(signal.as_raw()));
        }
        if code != 0 && args.fail_fast {
            return Ok(code);
        }
        if code != 0 {
            let (kind, key) = (show::kind(&event), show::shown(&event.kv.key));
            output::complain(&format!("exit code {code} for the {kind} of `{key}`"));
        }
        left -= 1;
    }
    Ok(0)
}

/// The last change of each key, in order.
fn latest(events: VecDeque<Event>) -> VecDeque<Event> {
    let mut seen = HashSet::new();
    let mut kept = VecDeque::new();
    for event in events.into_iter().rev() {
        if seen.insert(event.kv.key.clone()) {
            kept.push_front(event);
        }
    }
    kept
}

fn start(event: &Event, args: &WatchArgs, watchdog: &Watchdog) -> Result<Child, Failure> {
    let mut command = command(&args.command);
    command
        .process_group(watchdog.group().as_raw_nonzero().get())
        .stdin(Stdio::piped())
        .env("CONCLAVE_EVENT", show::kind(event))
        .env("CONCLAVE_REVISION", event.kv.mod_revision.to_string())
        .env(
            "CONCLAVE_CREATE_REVISION",
            event.kv.create_revision.to_string(),
        )
        .env("CONCLAVE_VERSION", event.kv.version.to_string());
    let mut set = |name: &str, bytes: Option<&[u8]>| {
        let fits = |bytes: &&[u8]| bytes.len() <= VARIABLE_BYTES_MAX && !bytes.contains(&0);
        match bytes.filter(fits) {
            Some(bytes) => command.env(name, OsStr::from_bytes(bytes)),
            None => command.env_remove(name),
        };
    };
    set("CONCLAVE_KEY", Some(&event.kv.key));
    set("CONCLAVE_VALUE", Some(&event.kv.value));
    let previous = event.previous.as_ref();
    set("CONCLAVE_PREV_VALUE", previous.map(|kv| &kv.value[..]));
    let lease = (event.kv.lease != 0).then(|| session_hex(event.kv.lease));
    set("CONCLAVE_LEASE", lease.as_deref().map(str::as_bytes));
    command
        .spawn()
        .map_err(|error| not_started(&args.command[0], &error))
}

/// Waits for the command, which gets the value on its stdin and all signals. Its exit
/// code, and the signal that asks to end.
async fn finish(
    child: &mut Child,
    event: &Event,
    watchdog: &Watchdog,
    signals: &mut Signals,
) -> Result<(u8, Option<Signal>), Failure> {
    let mut stdin = child.stdin.take().expect("its stdin is a pipe");
    let value = event.kv.value.clone();
    let feed = tokio::spawn(async move {
        if let Err(error) = stdin.write_all(&value).await {
            tracing::debug!(%error, "the command does not read its value");
        }
    });
    let mut end = None;
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            signal = signals.next() => {
                signal_group(watchdog.group(), signal);
                if signal != Signal::USR1 && signal != Signal::USR2 {
                    end = Some(signal);
                }
            }
        }
    };
    // What the command left behind may still have the other end.
    feed.abort();
    Ok((exit_code(status), end))
}

#[cfg(test)]
mod tests {
    use conclave_client::{EventKind, KeyValue};

    use super::*;

    #[test]
    fn of_each_key_the_last_change_is_kept_in_order() {
        let event = |key: &'static str, mod_revision| Event {
            kind: EventKind::Put,
            kv: KeyValue {
                key: key.into(),
                mod_revision,
                ..KeyValue::default()
            },
            previous: None,
        };
        let events = [("a", 1), ("b", 2), ("a", 3), ("c", 4), ("b", 5)];
        let kept = latest(events.into_iter().map(|(key, at)| event(key, at)).collect());
        let revisions: Vec<i64> = kept.iter().map(|event| event.kv.mod_revision).collect();
        assert_eq!(revisions, [3, 4, 5]);
    }
}
