//! The `conclave` binary: servers, and everything a shell needs to use them.
//!
//! In reading order: `cli` (the command line), `lock`, `elect`, `hold`, `process` and
//! `watchdog` (run a command under a lock, or while leading), `kv`, `lease`, `watch` (keys and what becomes of them), `admin` (look and interfere), `check_data` (look at a directory), `bench` and `histogram`, `serve`
//! and `dev` (servers), `output` and `failure` (what all of them say, and with
//! which exit code).

mod admin;
mod bench;
mod check_data;
mod cli;
mod dev;
mod duration;
mod elect;
mod failure;
mod histogram;
mod hold;
mod kv;
mod lease;
mod lock;
mod output;
mod process;
mod serve;
mod watch;
mod watchdog;

use std::{env, process::ExitCode};

use clap::{CommandFactory as _, Parser as _, error::ErrorKind};

use crate::{
    cli::{Cli, Command},
    failure::{Failure, USAGE},
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let result =
        serve::prepare(env::args_os().collect(), |name| env::var(name).ok()).and_then(|args| {
            match Cli::try_parse_from(args) {
                Ok(cli) => dispatch(cli),
                Err(error) => explain(&error),
            }
        });
    match result {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            output::complain(&failure.message);
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(cli: Cli) -> Result<u8, Failure> {
    let Cli { command, global } = cli;
    match command {
        Command::Serve(args) => serve::run(*args),
        Command::Dev(args) => run(dev::run(args)),
        Command::Lock(args) => run(lock::run(args, global)),
        Command::Unlock(args) => run(admin::unlock(args, global)),
        Command::Locks(args) => run(admin::locks(args, global)),
        Command::Elect(args) => run(elect::run(args, global)),
        Command::Elections(args) => run(admin::elections(args, global)),
        Command::Sessions => run(admin::sessions(global)),
        Command::Status => run(admin::status(global)),
        Command::Compact(args) => run(admin::compact(args, global)),
        Command::Disarm => run(admin::disarm(global)),
        Command::Kv(args) => run(kv::run(args, global)),
        Command::Lease(args) => run(lease::run(args, global)),
        Command::Watch(args) => run(watch::run(args, global)),
        Command::CheckData(args) => check_data::run(&args, &global),
        Command::Bench(args) => run(bench::run(args, global)),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "conclave", &mut script);
            output::bytes(&script)?;
            Ok(0)
        }
        Command::Watchdog => watchdog::run(),
    }
}

/// One thread for everything: with the servers on the same machine, a second
/// one costs more than it gives.
fn run(work: impl Future<Output = Result<u8, Failure>>) -> Result<u8, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(work)
}

/// Help goes to stdout; a wrong command line is told on stderr, exit code 64.
fn explain(error: &clap::Error) -> Result<u8, Failure> {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            output::text(&error.render().to_string())?;
            Ok(0)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            output::complain_verbatim(&error.render().to_string());
            Ok(USAGE)
        }
        _ => {
            let text = error.render().to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            Err(Failure {
                code: USAGE,
                message: text.trim_end().to_owned(),
            })
        }
    }
}
