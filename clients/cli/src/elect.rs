//! `conclave elect`: leads while a command runs, or observes who does.

use crate::{
    cli::{ElectArgs, Global},
    failure::Failure,
    hold::{self, Held},
};

/// Runs the command while leading, or without one leads.
pub(crate) async fn run(args: ElectArgs, global: Global) -> Result<u8, Failure> {
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
