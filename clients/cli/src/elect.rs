//! `conclave elect`: leads while a command runs, or observes who does.

use std::pin::pin;

use conclave_client::Observed;
use serde_json::json;

use crate::{
    admin::{self, connect},
    cli::{ElectArgs, Global},
    failure::Failure,
    hold::{self, Held},
    kv::show,
    output::{self, Format, session_hex},
    process::{Signals, signal_code},
};

/// Runs the command while leading, or without one leads.
pub(crate) async fn run(args: ElectArgs, global: Global) -> Result<u8, Failure> {
    if args.observe {
        return observe(&args.name, &global).await;
    }
    let value = args.value.clone().unwrap_or_default();
    hold::run(&global, args.ttl, &args.name, &args.command, |session| {
        let campaign = session.campaign(&args.name).value(value);
        let campaign = match (args.try_now, args.wait) {
            (true, _) => campaign.try_now(),
            (false, Some(limit)) => campaign.wait(limit),
            (false, None) => campaign,
        };
        async move {
            let granted = campaign.await.map(Held::Leadership);
            granted.map_err(|error| hold::in_time(args.try_now, error))
        }
    })
    .await
}

/// Prints one line for each change, until a signal, or until nobody reads them.
async fn observe(name: &str, global: &Global) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    let mut observer = connect(global)?.observe(name);
    let mut unread = pin!(output::unread());
    let mut was_told = false;
    loop {
        tokio::select! {
            observed = observer.next() => match observed {
                Ok(observed) => {
                    show(&observed, global.output)?;
                    was_told = true;
                }
                // It goes on where it was, when there is a cluster again.
                Err(error) if was_told && error.is_retryable() => {
                    output::complain(&error.to_string());
                }
                Err(error) => return Err(error.into()),
            },
            () = &mut unread => return Ok(0),
            signal = signals.end() => return Ok(signal_code(signal.as_raw())),
        }
    }
}

fn show(observed: &Observed, format: Format) -> Result<(), Failure> {
    let Observed {
        revision,
        leader,
        missed,
    } = observed;
    match (format, leader) {
        (Format::Json, leader) => output::json(&json!({
            "revision": revision,
            "leader": leader.as_ref().map(admin::leader),
            "missed": missed,
        }))?,
        (Format::Table, Some(leader)) => {
            let value = show::shown(&leader.value);
            let session = session_hex(leader.session_id);
            let term = leader.term;
            let gap = gap(*missed);
            output::text(&format!("term {term}  session {session}  {value}{gap}\n"))?;
        }
        (Format::Table, None) => output::text(&format!("no leader{}\n", gap(*missed)))?,
    }
    Ok(())
}

/// What people are told if something may have happened since the line before.
fn gap(missed: bool) -> &'static str {
    match missed {
        true => "  (changes before this were missed)",
        false => "",
    }
}
