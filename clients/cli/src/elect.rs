//! `conclave elect`: leads while a command runs, or observes who does.

use conclave_client::Observed;
use serde_json::json;

use crate::{
    admin::{self, connect},
    cli::{ElectArgs, Global},
    failure::Failure,
    hold::{self, Held},
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
        async { campaign.await.map(Held::Leadership) }
    })
    .await
}

/// Prints one line for each change, until a signal.
async fn observe(name: &str, global: &Global) -> Result<u8, Failure> {
    let mut signals = Signals::new()?;
    let mut observer = connect(global)?.observe(name);
    loop {
        tokio::select! {
            observed = observer.next() => show(&observed?, global.output)?,
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
    match format {
        Format::Json => output::json(&json!({
            "revision": revision,
            "leader": leader.as_ref().map(admin::leader),
            "missed": missed,
        }))?,
        Format::Table => {
            let told = match leader {
                Some(leader) => {
                    let value = String::from_utf8_lossy(&leader.value);
                    let session = session_hex(leader.session_id);
                    format!(
                        "term {}  session {session}  {}",
                        leader.term,
                        output::plain(&value)
                    )
                }
                None => "no leader".to_owned(),
            };
            output::text(&format!("{told}\n"))?;
        }
    }
    Ok(())
}
