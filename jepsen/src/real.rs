//! The black box: the built binary, as several real processes with real disks and
//! sockets, real clients, and everything between them in our hands.
//!
//! In reading order: [`cluster`] is the processes, [`proxy`] every connection of
//! them, [`shim`] their disks and clocks, [`nemesis`] what goes wrong, [`client`]
//! who uses them, [`store`] what locks protect, [`history`] what is written down,
//! and [`world`] what the checkers are told.
//!
//! First everything goes wrong for a while; then all faults stop, and every client
//! must be served again within a bound; then clients finish, nothing may be left
//! over, and all that was recorded is checked. The checkers are those of the
//! simulator. A lock is checked as a register that holds the token of its holder.
//!
//! A seed draws the faults and what clients do; when it happens is up to the
//! machine, so a run cannot be repeated exactly. The history and the logs of the
//! servers are what an analysis begins with.

mod client;
mod cluster;
mod history;
mod nemesis;
mod proxy;
mod shim;
mod store;
mod world;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use conclave_client::Client;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use self::{
    client::Caller,
    cluster::{Cluster, name},
    history::History,
    nemesis::{Fault, Plan, Tally},
    world::World,
};
use crate::{
    checkers::{STAYS_UP, Verdict, Violation, broken},
    rng::Rng,
    runner::{say, warn},
};

pub(crate) const HELP: &str = "\
Three or five servers run as processes of the built binary. All their connections
and those of clients go through proxies that delay, hold, lose and cut, also one
way; a preloaded library makes their syncs slow or fail, their disks full, their
dates wrong and their clocks drift by up to 5 %; they are killed, stopped and
restarted, one, the leader, or all. Without a C compiler `cc`, disks and clocks are
left alone, and the run says so.

Afterwards every client must be served again within 20 s, nothing may be left over,
and the history is checked: locks and sessions are linearizable, one holder at a
time, tokens grow, and what the locks protect has lost nothing.

The directory of a run keeps history.edn (for Jepsen and people), the servers'
logs, and after a violation their data. A seed draws faults and clients, but when
things happen is up to the machine.

Examples:
  conclave-jepsen real --minutes 5
  conclave-jepsen real --minutes 120 --nodes 5 --dir /tmp/long
  conclave-jepsen real --minutes 1 --seed 7 --binary target/release/conclave
  conclave-jepsen real --minutes 1 --faults kill,pause-leader,split
  conclave-jepsen real --minutes 2 --drift 900   (must find something: a control)

Exit codes:
  0 no violation   1 violation   2 usage
  3 the harness failed, a fault never took place, or a search found no end";

/// From the end of faults until every client was served. Longer than in the
/// simulator: servers start again first, and others may use the machine.
const RECOVERY: Duration = Duration::from_secs(20);
/// For a first start, and for the end of everything.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a condition is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(200);
/// Between two words on progress.
const PROGRESS: Duration = Duration::from_secs(60);

/// What to run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How long faults go on; recovery and checks come on top. If it is too short
    /// for all kinds, the exit code is 3.
    #[arg(long, default_value_t = 5.0, value_parser = minutes)]
    minutes: f64,
    /// How many servers.
    #[arg(long, default_value_t = 3, value_parser = nodes)]
    nodes: usize,
    /// Only these faults, as the list at the end of a run names them.
    #[arg(long, value_delimiter = ',', value_name = "A,B,C")]
    faults: Vec<Fault>,
    /// How wrong the rates of the servers' clocks are at most, in percent. The
    /// promises about sessions end at 5; far beyond, the checkers must find it.
    #[arg(long, default_value_t = 5, value_name = "PERCENT", value_parser = clap::value_parser!(u16).range(1..=1_000))]
    drift: u16,
    /// How many clients.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(8..=1_000))]
    clients: u16,
    /// How many locks they want at a time.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    locks: u16,
    /// Draws faults and clients; otherwise the date does.
    #[arg(long)]
    seed: Option<u64>,
    /// The binary; otherwise cargo builds it.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Where to keep the run; otherwise a new one among temporary files.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

fn nodes(text: &str) -> Result<usize, String> {
    match text {
        "3" => Ok(3),
        "5" => Ok(5),
        _ => Err("neither 3 nor 5".to_owned()),
    }
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if minutes > 0.0 && minutes <= 10_000.0 {
        Ok(minutes)
    } else {
        Err("not between 0 and 10000".to_owned())
    }
}

/// What came out.
#[derive(Debug)]
struct Report {
    tally: Tally,
    violation: Option<Violation>,
    undecided: Vec<u64>,
}

/// The command `real`.
pub(crate) fn run(options: &Options) -> ExitCode {
    let seed = options.seed.unwrap_or_else(seed_of_date);
    match prepare_and_run(options, seed) {
        Ok(code) => code,
        Err(trouble) => {
            say(&format!("the harness failed: {trouble}\n"));
            ExitCode::from(3)
        }
    }
}

fn prepare_and_run(options: &Options, seed: u64) -> io::Result<ExitCode> {
    let directory = options
        .dir
        .clone()
        .unwrap_or_else(|| std::env::temp_dir().join(format!("conclave-real-{seed}")));
    if directory.exists() {
        let what = format!("{} is there already", directory.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
    }
    fs::create_dir_all(&directory)?;
    let directory = directory.canonicalize()?;
    let binary = match &options.binary {
        Some(path) => path.canonicalize()?,
        None => build()?,
    };
    say(&format!("seed={seed} directory={}\n", directory.display()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let history = History::create(&directory.join("history.edn"))?;
    runtime.block_on(async {
        let library = shim::compile(&directory);
        let library = library
            .inspect_err(|why| say(&format!("SKIPPED: faults of disks and clocks: {why}\n")))
            .ok();
        let mut cluster =
            Cluster::new(binary, &directory, options.nodes, library.as_deref()).await?;
        let locks = u64::from(options.locks);
        let world = Arc::new(World::new(history, cluster.endpoints(), locks));
        let report = rehearse(options, seed, &mut cluster, &world).await?;
        if report.violation.is_none() {
            cluster.remove_data()?;
        }
        Ok(conclude(options, seed, &directory, &world, &report))
    })
}

/// All phases of a run.
async fn rehearse(
    options: &Options,
    seed: u64,
    cluster: &mut Cluster,
    world: &Arc<World>,
) -> io::Result<Report> {
    let mut rng = Rng::new(seed);
    first_start(cluster).await?;
    let clients = usize::from(options.clients);
    let mut callers = JoinSet::new();
    for index in 0..clients {
        let rng = Rng::new(rng.next());
        let caller = Caller::new(world, index, clients, rng).map_err(io::Error::other)?;
        callers.spawn(caller.work());
    }
    let progress = tokio::spawn(tell_progress(Arc::clone(world)));
    let plan = Plan {
        only: options.faults.clone(),
        length: Duration::from_secs_f64(options.minutes * 60.0),
        drift_ppm: u64::from(options.drift) * 10_000,
    };
    let tally = nemesis::trouble(cluster, world, &mut rng, &plan).await?;
    nemesis::heal(cluster)?;
    world.history.fault("heal", "nil");
    world.healed();
    if !world.is_broken() {
        recover(cluster, world, &mut callers).await?;
    }
    callers.shutdown().await;
    progress.abort();
    world.history.close()?;
    let (violation, undecided) = world.conclude();
    Ok(Report {
        tally,
        violation,
        undecided,
    })
}

/// After the end of faults: everybody is served, and nothing is left over.
async fn recover(
    cluster: &mut Cluster,
    world: &World,
    callers: &mut JoinSet<()>,
) -> io::Result<()> {
    let (clients, within_us) = (callers.len(), RECOVERY.as_micros());
    let within_us = u64::try_from(within_us).expect("a few seconds");
    let recovered = until(RECOVERY, async || world.recovered(clients, within_us)).await;
    world.note(recovered);
    world.stop();
    let ended = async { while callers.join_next().await.is_some() {} };
    if timeout(PATIENCE, ended).await.is_err() {
        world.note(broken("liveness", "a client does not end".to_owned()));
    }
    let client = Client::connect(&world.endpoints).map_err(io::Error::other)?;
    let drained = until(PATIENCE, async || drained(cluster, &client, world).await).await;
    world.note(drained);
    world.note(cluster.all_run()?);
    for node in 0..cluster.size() {
        if !cluster.stop(node).await? {
            let what = format!("{} does not stop when asked to", name(node));
            world.note(broken(STAYS_UP, what));
        }
    }
    Ok(())
}

async fn first_start(cluster: &mut Cluster) -> io::Result<()> {
    for node in 0..cluster.size() {
        cluster.start(node)?;
    }
    let observer = cluster.observer();
    let began = Instant::now();
    while observer.leader().await.is_none() {
        if began.elapsed() > PATIENCE {
            return Err(io::Error::other("no server leads after the first start"));
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// The first good verdict, or the last bad one.
async fn until(patience: Duration, verdict: impl AsyncFn() -> Verdict) -> Verdict {
    let began = Instant::now();
    loop {
        let now = verdict().await;
        if now.is_ok() || began.elapsed() > patience {
            return now;
        }
        sleep(LOOK).await;
    }
}

/// Whether no lock is held any more, and all servers are equally far.
async fn drained(cluster: &Cluster, client: &Client, world: &World) -> Verdict {
    let locks = match client.locks().await {
        Ok(locks) => locks,
        Err(error) => return broken("liveness", format!("no list of locks: {error}")),
    };
    let contenders: Vec<String> = locks.into_iter().map(|lock| lock.name).collect();
    let observer = cluster.observer();
    let mut applied = Vec::new();
    for node in 0..cluster.size() {
        let status = observer.status(node).await;
        applied.push(status.map(|status| status.applied_index));
    }
    world.drained(&contenders, &applied)
}

async fn tell_progress(world: Arc<World>) {
    let began = Instant::now();
    loop {
        sleep(PROGRESS).await;
        let (operations, unknown, _) = world.counts();
        let minutes = began.elapsed().as_secs() / 60;
        warn(&format!(
            "{minutes} min, {operations} operations, {unknown} unknown\n"
        ));
    }
}

fn conclude(
    options: &Options,
    seed: u64,
    directory: &Path,
    world: &World,
    report: &Report,
) -> ExitCode {
    let (operations, unknown, kinds) = world.counts();
    let faults = report.tally.counts();
    let faults: Vec<String> = faults
        .map(|(word, count)| format!("{word}={count}"))
        .collect();
    say(&format!(
        "faults {}\noperations {kinds}\n",
        faults.join(" ")
    ));
    let missing = report.tally.missing();
    if let Some(violation) = &report.violation {
        say(&format!(
            "violation seed={seed} checker={} {}\nhistory, logs and data: {}\n",
            violation.checker,
            violation.what,
            directory.display()
        ));
    } else if !missing.is_empty() {
        say(&format!("never took place: {}\n", missing.join(" ")));
    }
    if !report.undecided.is_empty() {
        say(&format!("not decided: keys {:?}\n", report.undecided));
    }
    say(&format!(
        "minutes={} ops={operations} faults={} unknown={unknown} violations={}\n",
        options.minutes,
        report.tally.total(),
        u8::from(report.violation.is_some())
    ));
    if report.violation.is_some() {
        ExitCode::from(1)
    } else if missing.is_empty() && report.undecided.is_empty() && report.tally.total() > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    }
}

/// Builds the binary as this harness is built; says where it is.
fn build() -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let profile = own.parent().ok_or_else(|| io::Error::other("no folder"))?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    warn("building the binary, if it is not up to date\n");
    let mut command = Command::new(cargo);
    command
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .args(["build", "--quiet", "-p", "conclave", "--target-dir"])
        .arg(profile.join(".."))
        .stdin(Stdio::null());
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    if command.status()?.success() {
        return Ok(profile.join("conclave"));
    }
    Err(io::Error::other("the binary cannot be built"))
}

fn seed_of_date() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}
