//! Planted bugs: proof that the checkers would notice.
//!
//! Each bug is a line of the real code that is there only in a build with
//! `--cfg conclave_plant`, and does something only when chosen by name.

use std::{
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

use conclave_core::plant::NAMES;

use crate::runner::{say, warn};

/// How to look for them.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How many seeds to try for each.
    #[arg(long, default_value_t = 2_000)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    start: u64,
    /// Threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    jobs: u64,
    /// Only this one.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Plants a bug in this process.
#[cfg(conclave_plant)]
pub(crate) fn plant(name: &str) -> Result<(), String> {
    if conclave_core::plant::choose(name) {
        return Ok(());
    }
    Err(format!(
        "there is no planted bug `{name}`; there are {}",
        NAMES.join(", ")
    ))
}

/// Says that this build has none.
#[cfg(not(conclave_plant))]
pub(crate) fn plant(name: &str) -> Result<(), String> {
    let known = if NAMES.contains(&name) {
        ""
    } else {
        " (and none has that name)"
    };
    Err(format!(
        "this build has no planted bugs{known}; build with RUSTFLAGS=\"--cfg conclave_plant\", \
         or run `plants`"
    ))
}

/// The command `plants`.
pub(crate) fn run(options: &Options) -> ExitCode {
    if let Some(only) = &options.only
        && !NAMES.contains(&only.as_str())
    {
        say(&format!(
            "there is no planted bug `{only}`; there are {}\n",
            NAMES.join(", ")
        ));
        return ExitCode::from(2);
    }
    let mut missed = Vec::new();
    let mut found = 0;
    for name in NAMES
        .iter()
        .filter(|name| options.only.as_deref().is_none_or(|only| only == **name))
    {
        let started = Instant::now();
        let output = match simulate(options, name) {
            Ok(output) => output,
            Err(problem) => {
                say(&format!("{problem}\n"));
                return ExitCode::from(3);
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        match output
            .lines()
            .find_map(|line| line.strip_prefix("violation "))
        {
            Some(violation) => {
                found += 1;
                say(&format!("plant={name} {violation} real_s={seconds:.1}\n"));
            }
            None => {
                missed.push(*name);
                say(&format!(
                    "plant={name} not found in {} seeds, {seconds:.1} s\n",
                    options.seeds
                ));
            }
        }
    }
    say(&format!(
        "plants={} found={found} missed={}\n",
        found + missed.len(),
        missed.len()
    ));
    if missed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    }
}

/// Runs the command `sim` with a bug, in a build that has them: this one, or
/// else one that cargo makes beside it.
fn simulate(options: &Options, name: &str) -> Result<String, String> {
    let seeds = options.seeds.to_string();
    let start = options.start.to_string();
    let jobs = options.jobs.to_string();
    let arguments = [
        "sim", "--plant", name, "--seeds", &seeds, "--start", &start, "--jobs", &jobs,
    ];
    let mut command = if cfg!(conclave_plant) {
        let myself = std::env::current_exe().map_err(|error| format!("who am I: {error}"))?;
        Command::new(myself)
    } else {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        cargo
            .current_dir(root)
            .env("RUSTFLAGS", "--cfg conclave_plant");
        cargo.args(["run", "--release", "--quiet", "-p", "conclave-jepsen"]);
        cargo.args(["--target-dir", "target/plants", "--"]);
        cargo
    };
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit());
    warn(&format!("looking for {name}\n"));
    let output = command
        .output()
        .map_err(|error| format!("cannot start {command:?}: {error}"))?;
    match output.status.code() {
        Some(0 | 1 | 3) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        _ => Err(format!("{command:?} ended with {}", output.status)),
    }
}
