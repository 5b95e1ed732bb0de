//! Runs seeds, on several threads if wanted, and reports.

use std::{
    cell::Cell,
    io::Write as _,
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    checkers::STAYS_UP,
    plants,
    sim::{Outcome, Tally, World},
};

/// From so many seeds on, every fault and operation must have occurred.
const COMPLETE_FROM_SEEDS: u64 = 20;
/// Between two words on progress.
const PROGRESS: Duration = Duration::from_secs(10);

thread_local! {
    /// The seed that this thread simulates.
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// What to simulate.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How many seeds.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    pub(crate) start: u64,
    /// Simulated seconds for each seed; the last 15 are for recovery.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(25..))]
    pub(crate) sim_seconds: u64,
    /// Threads.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) jobs: u64,
    /// Plants a bug; only in a build with `--cfg conclave_plant`.
    #[arg(long, value_name = "NAME")]
    pub(crate) plant: Option<String>,
    /// Prints everything that happens.
    #[arg(long)]
    pub(crate) trace: bool,
}

#[derive(Debug, Default)]
struct Report {
    seeds: u64,
    violations: u64,
    tally: Tally,
}

/// The command `sim`.
pub(crate) fn run(options: &Options) -> ExitCode {
    if let Some(name) = &options.plant
        && let Err(problem) = plants::plant(name)
    {
        say(&format!("{problem}\n"));
        return ExitCode::from(2);
    }
    report_panics(options.clone());
    let started = Instant::now();
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let report = Mutex::new(Report::default());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.min(options.seeds) {
            scope.spawn(|| simulate(options, &next, &stop, &report));
        }
        scope.spawn(|| tell_progress(options, &stop, &report, started));
    });
    let report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    conclude(options, &report, started)
}

fn simulate(options: &Options, next: &AtomicU64, stop: &AtomicBool, report: &Mutex<Report>) {
    while !stop.load(Ordering::Relaxed) {
        let place = next.fetch_add(1, Ordering::Relaxed);
        if place >= options.seeds {
            break;
        }
        let seed = options.start + place;
        SEED.set(Some(seed));
        let outcome = World::new(seed, options.sim_seconds, options.trace).run();
        SEED.set(None);
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        report.seeds += 1;
        report.tally.add(&outcome.tally);
        if !outcome.trace.is_empty() {
            say(&outcome.trace);
        }
        if outcome.violation.is_some() {
            report.violations += 1;
            stop.store(true, Ordering::Relaxed);
            say(&found(options, seed, &outcome));
        }
        if report.seeds == options.seeds {
            stop.store(true, Ordering::Relaxed);
        }
    }
}

fn found(options: &Options, seed: u64, outcome: &Outcome) -> String {
    let violation = outcome
        .violation
        .as_ref()
        .expect("asked only if there is one");
    let at_ms = outcome.violation_us / 1_000;
    format!(
        "violation seed={seed} checker={} at_ms={at_ms} {}\n{}",
        violation.checker,
        violation.what,
        replay(options, seed)
    )
}

fn replay(options: &Options, seed: u64) -> String {
    let plant = options
        .plant
        .as_ref()
        .map(|name| format!(" --plant {name}"))
        .unwrap_or_default();
    format!(
        "replay: cargo run --release -p conclave-jepsen -- sim --seeds 1 --start {seed} \
         --sim-seconds {}{plant} --trace\n",
        options.sim_seconds
    )
}

/// A panic in a node is a broken promise like any other. The process cannot go
/// on after it.
fn report_panics(options: Options) {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        usual(info);
        if let Some(seed) = SEED.get() {
            let what = info.to_string().replace('\n', " ");
            say(&format!(
                "violation seed={seed} checker={STAYS_UP} {what}\n{}",
                replay(&options, seed)
            ));
            std::process::exit(1);
        }
    }));
}

fn tell_progress(options: &Options, stop: &AtomicBool, report: &Mutex<Report>, started: Instant) {
    let mut told = started;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(20));
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            let seeds = report.lock().unwrap_or_else(PoisonError::into_inner).seeds;
            let speed = speed(seeds * options.sim_seconds, options, started);
            warn(&format!("{seeds} of {} seeds, {speed}\n", options.seeds));
        }
    }
}

fn speed(sim_s: u64, options: &Options, started: Instant) -> String {
    let real_s = started.elapsed().as_secs_f64();
    let per_core = sim_s as f64 / real_s / options.jobs as f64;
    format!("{real_s:.0} s, {per_core:.0} simulated seconds a second and core")
}

fn conclude(options: &Options, report: &Report, started: Instant) -> ExitCode {
    let sim_s = report.seeds * options.sim_seconds;
    warn(&format!("{}\n", speed(sim_s, options, started)));
    say(&format!("occurred{}\n", report.tally));
    let missing = report.tally.missing();
    let incomplete = options.seeds >= COMPLETE_FROM_SEEDS && !missing.is_empty();
    if incomplete && report.violations == 0 {
        say(&format!("never occurred: {}\n", missing.join(" ")));
    }
    say(&format!(
        "seeds={} sim_s={sim_s} ops={} faults={} violations={}\n",
        report.seeds,
        report.tally.operations(),
        report.tally.faults(),
        report.violations
    ));
    match (report.violations, incomplete) {
        (0, false) => ExitCode::SUCCESS,
        (0, true) => ExitCode::from(3),
        _ => ExitCode::from(1),
    }
}

/// To standard output. Who closed it does not want to know.
pub(crate) fn say(text: &str) {
    std::io::stdout().lock().write_all(text.as_bytes()).ok();
}

/// To standard error.
pub(crate) fn warn(text: &str) {
    std::io::stderr().lock().write_all(text.as_bytes()).ok();
}
