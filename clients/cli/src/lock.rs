//! `conclave lock`: holds a lock while a command runs.

use crate::{
    cli::{Global, LockArgs},
    failure::Failure,
    hold::{self, Held},
};

/// Runs the command under the lock, or without one holds it.
pub(crate) async fn run(args: LockArgs, global: Global) -> Result<u8, Failure> {
    hold::run(&global, args.ttl, &args.name, &args.command, |session| {
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
        async move {
            let granted = request.await.map(Held::Lock);
            granted.map_err(|error| hold::in_time(args.try_now, error))
        }
    })
    .await
}
