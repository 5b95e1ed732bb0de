//! `conclave serve`: one server, started with etcd's flags.
//!
//! The raw command line is prepared before clap sees it: one dash becomes two,
//! the environment fills in what the command line leaves out, and flags of etcd
//! that have no counterpart are sorted into those that only tune (a warning)
//! and those that change safety (a refusal).

use std::{
    error::Error as _,
    ffi::OsString,
    io::{self, IsTerminal as _},
    path::PathBuf,
    thread,
    time::Duration,
};

use clap::{Args, ValueEnum};
use conclave_server::{ClusterState, Options, ServerError, Shutdown, options::CompactionMode};
use rustix::process::{Signal, getpid, kill_process};
use tracing_subscriber::EnvFilter;

use crate::{
    duration,
    failure::{Failure, GENERAL, USAGE},
    output,
};

/// Own flags with etcd's names. They are also taken from the environment, as
/// `CONCLAVE_X`, else `ETCD_X`.
const OWN: &[&str] = &[
    "name",
    "data-dir",
    "listen-client-urls",
    "advertise-client-urls",
    "listen-peer-urls",
    "initial-advertise-peer-urls",
    "initial-cluster",
    "initial-cluster-state",
    "initial-cluster-token",
    "heartbeat-interval",
    "election-timeout",
    "max-request-bytes",
    "max-txn-ops",
    "auto-compaction-mode",
    "auto-compaction-retention",
    "quota-backend-bytes",
    "snapshot-count",
    "log-retention-bytes",
    "watch-progress-notify-interval",
    "listen-metrics-urls",
    "log-level",
    "log-format",
];

/// Flags of etcd that tune or describe: they are ignored with a warning.
const TUNING: &[&str] = &[
    "snapshot-catchup-entries",
    "listen-client-http-urls",
    "max-snapshots",
    "max-wals",
    "wal-dir",
    "max-concurrent-streams",
    "backend-bbolt-freelist-type",
    "backend-batch-interval",
    "backend-batch-limit",
    "grpc-keepalive-min-time",
    "grpc-keepalive-interval",
    "grpc-keepalive-timeout",
    "socket-reuse-port",
    "socket-reuse-address",
    "raft-read-timeout",
    "raft-write-timeout",
    "initial-election-tick-advance",
    "pre-vote",
    "strict-reconfig-check",
    "logger",
    "log-outputs",
    "enable-log-rotation",
    "log-rotation-config-json",
    "metrics",
    "enable-pprof",
    "enable-v2",
    "enable-grpc-gateway",
    "cors",
    "host-whitelist",
    "warning-apply-duration",
    "warning-unary-request-duration",
    "memory-mlock",
    "compaction-batch-limit",
    "compaction-sleep-interval",
    "downgrade-check-time",
    "max-learners",
    "v2-deprecation",
];

/// Flags of etcd that change what is safe or who may do what: a server that
/// ignored them would not be what its operator believes.
const SAFETY: &[&str] = &[
    "cert-file",
    "key-file",
    "client-cert-file",
    "client-key-file",
    "client-cert-auth",
    "client-crl-file",
    "client-cert-allowed-hostname",
    "trusted-ca-file",
    "auto-tls",
    "peer-cert-file",
    "peer-key-file",
    "peer-client-cert-file",
    "peer-client-key-file",
    "peer-client-cert-auth",
    "peer-trusted-ca-file",
    "peer-auto-tls",
    "peer-cert-allowed-cn",
    "peer-cert-allowed-hostname",
    "peer-crl-file",
    "peer-skip-client-san-verification",
    "self-signed-cert-validity",
    "tls-min-version",
    "tls-max-version",
    "cipher-suites",
    "auth-token",
    "auth-token-ttl",
    "bcrypt-cost",
    "force-new-cluster",
    "unsafe-no-fsync",
    "discovery",
    "discovery-endpoints",
    "discovery-token",
    "discovery-fallback",
    "discovery-proxy",
    "discovery-srv",
    "discovery-srv-name",
    "proxy",
    "config-file",
];

/// Flags of etcd without a value, which never take the next word.
const SWITCHES: &[&str] = &[
    "client-cert-auth",
    "auto-tls",
    "peer-client-cert-auth",
    "peer-auto-tls",
    "peer-skip-client-san-verification",
    "force-new-cluster",
    "unsafe-no-fsync",
    "socket-reuse-port",
    "socket-reuse-address",
    "initial-election-tick-advance",
    "pre-vote",
    "strict-reconfig-check",
    "enable-log-rotation",
    "enable-pprof",
    "enable-v2",
    "enable-grpc-gateway",
    "memory-mlock",
];

const HELP: &str = "\
Flags have etcd's names and meanings, with one dash or two. What the command line
leaves out is taken from the environment: CONCLAVE_DATA_DIR, else ETCD_DATA_DIR,
and so on; empty ones count as none. Other flags of etcd that only tune are
ignored with a warning; those for TLS, auth and disaster recovery are refused
until they exist.

Example, one of three:
  conclave serve --name a --data-dir /var/lib/conclave \\
    --listen-client-urls http://10.0.0.1:2379 --listen-peer-urls http://10.0.0.1:2380 \\
    --initial-cluster a=http://10.0.0.1:2380,b=http://10.0.0.2:2380,c=http://10.0.0.3:2380";

/// The flags of a server.
#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct ServeArgs {
    /// This member's name, as in --initial-cluster.
    #[arg(long, default_value = "default")]
    pub(crate) name: String,
    /// Where this member keeps its data; by default NAME.conclave.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Where to listen for clients; by default http://localhost:2379.
    #[arg(long, value_delimiter = ',', value_name = "URLS")]
    pub(crate) listen_client_urls: Vec<String>,
    /// What clients are told to dial; by default where this member listens.
    #[arg(long, value_delimiter = ',', value_name = "URLS")]
    pub(crate) advertise_client_urls: Vec<String>,
    /// Where to listen for other members; by default http://localhost:2380.
    #[arg(long, value_delimiter = ',', value_name = "URLS")]
    pub(crate) listen_peer_urls: Vec<String>,
    /// What other members dial; by default this member's in --initial-cluster.
    #[arg(long, value_delimiter = ',', value_name = "URL")]
    pub(crate) initial_advertise_peer_urls: Vec<String>,
    /// All members; the same on each of them.
    #[arg(long, value_delimiter = ',', value_name = "NAME=URL,...")]
    pub(crate) initial_cluster: Vec<String>,
    /// Whether an empty data directory may start a new cluster.
    #[arg(long, default_value = "new", value_parser = ["new", "existing"], value_name = "STATE")]
    pub(crate) initial_cluster_state: String,
    /// Keeps apart clusters that have the same members.
    #[arg(long, default_value = "conclave-cluster", value_name = "TOKEN")]
    pub(crate) initial_cluster_token: String,
    /// Between two heartbeats of the leader, in milliseconds.
    #[arg(long, default_value_t = 100, value_name = "MS")]
    pub(crate) heartbeat_interval: u64,
    /// Without a heartbeat for this long a member campaigns, in milliseconds.
    #[arg(long, default_value_t = 500, value_name = "MS")]
    pub(crate) election_timeout: u64,
    /// The largest request of a client.
    #[arg(long, default_value_t = 1_572_864, value_name = "BYTES")]
    pub(crate) max_request_bytes: usize,
    /// Operations that a transaction may have in each of its lists.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub(crate) max_txn_ops: usize,
    /// What --auto-compaction-retention counts.
    #[arg(long, default_value = "periodic", value_parser = ["periodic", "revision"], value_name = "MODE")]
    pub(crate) auto_compaction_mode: String,
    /// History to keep: a time such as 30m (a bare number is hours), or a number
    /// of revisions; 0 keeps all. By default 1,000,000 revisions and 10 minutes.
    #[arg(long, value_name = "AMOUNT")]
    pub(crate) auto_compaction_retention: Option<String>,
    /// The size of the state above which it may not grow; 0: 2 GiB; below 0: none.
    #[arg(
        long,
        default_value_t = 0,
        value_name = "BYTES",
        allow_negative_numbers = true
    )]
    pub(crate) quota_backend_bytes: i64,
    /// Entries of the log between two checkpoints of the state.
    #[arg(long, default_value_t = 100_000, value_name = "ENTRIES")]
    pub(crate) snapshot_count: u64,
    /// Bytes of log kept for members who are away; who needs more gets a checkpoint.
    #[arg(long, default_value_t = 1 << 30, value_name = "BYTES")]
    pub(crate) log_retention_bytes: u64,
    /// How often a watcher of the etcd API that asked for it hears how far it has come,
    /// although nothing happens.
    #[arg(long, default_value = "10m", value_parser = duration::parse, value_name = "TIME")]
    pub(crate) watch_progress_notify_interval: Duration,
    /// Where to serve metrics and health in addition to the client addresses.
    #[arg(long, value_delimiter = ',', value_name = "URLS")]
    pub(crate) listen_metrics_urls: Vec<String>,
    /// debug, info, warn or error.
    #[arg(long, default_value = "info", value_name = "LEVEL")]
    pub(crate) log_level: String,
    /// How to write the log, which goes to stderr.
    #[arg(long, value_enum, default_value = "console", value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Stop when stdin ends; for programs that start servers.
    #[arg(long, hide = true)]
    pub(crate) stop_on_stdin_eof: bool,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people.
    Console,
    /// An object a line.
    Json,
}

/// Makes the command line of `conclave serve` one that clap understands;
/// leaves all others alone. `env` looks a variable up.
pub(crate) fn prepare(
    args: Vec<OsString>,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Vec<OsString>, Failure> {
    if args.get(1).is_none_or(|command| command != "serve") {
        return Ok(args);
    }
    let given = args.iter().skip(2).map(two_dashes).collect::<Vec<_>>();
    let mut prepared: Vec<OsString> = args.into_iter().take(2).collect();
    let mut seen: Vec<String> = Vec::new();
    let mut rest = given.into_iter();
    while let Some(arg) = rest.next() {
        let Some((flag, value)) = split_flag(&arg) else {
            prepared.push(arg);
            continue;
        };
        seen.push(flag.clone());
        if OWN.contains(&flag.as_str()) || !is_foreign(&flag) {
            prepared.push(arg);
            // Its value is not to be taken for a flag.
            if value.is_none() && OWN.contains(&flag.as_str()) {
                prepared.extend(rest.next());
            }
            continue;
        }
        if value.is_none() && !SWITCHES.contains(&flag.as_str()) {
            rest.next();
        }
        foreign(&flag, value.as_deref())?;
    }
    for flag in OWN
        .iter()
        .chain(TUNING)
        .chain(SAFETY)
        .filter(|flag| !seen.iter().any(|s| s == *flag))
    {
        let variable = flag.to_uppercase().replace('-', "_");
        let value = ["CONCLAVE_", "ETCD_"]
            .iter()
            .find_map(|prefix| env(&format!("{prefix}{variable}")).filter(|v| !v.is_empty()));
        match value {
            Some(value) if is_foreign(flag) => foreign(flag, Some(&value))?,
            Some(value) => prepared.push(format!("--{flag}={value}").into()),
            None => {}
        }
    }
    Ok(prepared)
}

/// Runs the server until it is stopped.
pub(crate) fn run(args: ServeArgs) -> Result<u8, Failure> {
    start_logging(&args)?;
    if args.stop_on_stdin_eof {
        thread::spawn(stop_on_stdin_eof);
    }
    conclave_server::run(&args.into(), Shutdown::on_signals()).map_err(|error| {
        let code = match error {
            ServerError::Options(_) => USAGE,
            _ => GENERAL,
        };
        Failure::new(code, chain(&error))
    })?;
    Ok(0)
}

impl From<ServeArgs> for Options {
    fn from(args: ServeArgs) -> Options {
        Options {
            name: args.name,
            data_dir: args.data_dir,
            listen_client_urls: args.listen_client_urls,
            advertise_client_urls: args.advertise_client_urls,
            listen_peer_urls: args.listen_peer_urls,
            initial_advertise_peer_urls: args.initial_advertise_peer_urls,
            initial_cluster: args.initial_cluster,
            initial_cluster_state: match args.initial_cluster_state.as_str() {
                "existing" => ClusterState::Existing,
                _ => ClusterState::New,
            },
            initial_cluster_token: args.initial_cluster_token,
            heartbeat_interval_ms: args.heartbeat_interval,
            election_timeout_ms: args.election_timeout,
            listen_metrics_urls: args.listen_metrics_urls,
            max_request_bytes: args.max_request_bytes,
            max_txn_ops: args.max_txn_ops,
            auto_compaction_mode: match args.auto_compaction_mode.as_str() {
                "revision" => CompactionMode::Revision,
                _ => CompactionMode::Periodic,
            },
            auto_compaction_retention: args.auto_compaction_retention,
            quota_backend_bytes: args.quota_backend_bytes,
            snapshot_count: args.snapshot_count,
            log_retention_bytes: args.log_retention_bytes,
            watch_progress_notify_interval_ms: u64::try_from(
                args.watch_progress_notify_interval.as_millis(),
            )
            .unwrap_or(u64::MAX),
            io_threads: None,
        }
    }
}

/// Logs to stderr.
fn start_logging(args: &ServeArgs) -> Result<(), Failure> {
    // Etcd's levels above error have no counterpart.
    let level = match args.log_level.as_str() {
        "panic" | "fatal" | "dpanic" => "error",
        level => level,
    };
    let filter = EnvFilter::try_new(level)
        .map_err(|error| Failure::new(USAGE, format!("--log-level `{level}`: {error}")))?;
    let logging = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Console => logging.init(),
        LogFormat::Json => logging.json().init(),
    }
    Ok(())
}

/// Asks this process to stop when stdin ends: the program that started it is
/// gone.
fn stop_on_stdin_eof() {
    let ended = io::copy(&mut io::stdin(), &mut io::sink());
    tracing::info!(?ended, "stdin has ended; stopping");
    if let Err(error) = kill_process(getpid(), Signal::TERM) {
        tracing::error!(%error, "cannot stop");
    }
}

/// An error with its causes.
fn chain(error: &ServerError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// `-name` as `--name`; single letters stay.
fn two_dashes(arg: &OsString) -> OsString {
    match arg.to_str().and_then(|arg| arg.strip_prefix('-')) {
        Some(flag) if flag.len() > 1 && !flag.starts_with('-') => format!("--{flag}").into(),
        _ => arg.clone(),
    }
}

/// The name of a flag, and its value if that is in the same word.
fn split_flag(arg: &OsString) -> Option<(String, Option<String>)> {
    let flag = arg.to_str()?.strip_prefix("--")?;
    match flag.split_once('=') {
        Some((flag, value)) => Some((flag.to_owned(), Some(value.to_owned()))),
        None => Some((flag.to_owned(), None)),
    }
}

fn is_foreign(flag: &str) -> bool {
    TUNING.contains(&flag) || SAFETY.contains(&flag) || flag.starts_with("experimental-")
}

/// A flag of etcd that this server does not have.
fn foreign(flag: &str, value: Option<&str>) -> Result<(), Failure> {
    // What is off in etcd, too, asks for nothing.
    let is_off = SWITCHES.contains(&flag) && value == Some("false");
    let is_default = matches!(
        (flag, value),
        ("auth-token", Some("simple" | "")) | ("proxy", Some("off"))
    );
    if !SAFETY.contains(&flag) || is_off || is_default {
        if !is_off && !is_default {
            output::complain(&format!("--{flag} has no effect here; going on without it"));
        }
        return Ok(());
    }
    Err(Failure::new(
        USAGE,
        format!("--{flag} is not supported yet, and ignoring it would not be safe"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(line: &str, env: &[(&str, &str)]) -> Result<String, Failure> {
        let args = line.split(' ').map(OsString::from).collect();
        let look_up = |name: &str| {
            env.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        let args = prepare(args, look_up)?;
        Ok(args
            .iter()
            .map(|arg| arg.to_str().unwrap())
            .collect::<Vec<_>>()
            .join(" "))
    }

    #[test]
    fn one_dash_is_as_good_as_two_and_only_for_serve() {
        let expected = "conclave serve --name a --data-dir=/x -h";
        assert_eq!(
            prepared("conclave serve -name a -data-dir=/x -h", &[]).unwrap(),
            expected
        );
        let other = "conclave lock x -o json -- ls -la";
        assert_eq!(prepared(other, &[]).unwrap(), other);
    }

    #[test]
    fn a_value_is_no_flag() {
        let line = "conclave serve --name -force-new-cluster";
        let expected = "conclave serve --name --force-new-cluster";
        assert_eq!(prepared(line, &[]).unwrap(), expected);
    }

    #[test]
    fn the_environment_fills_in_and_ours_comes_first() {
        let env = [
            ("ETCD_NAME", "etcd"),
            ("CONCLAVE_NAME", "ours"),
            ("CONCLAVE_DATA_DIR", ""),
            ("ETCD_DATA_DIR", "/d"),
            ("ETCD_INITIAL_CLUSTER", ""),
        ];
        let expected = "conclave serve --name=ours --data-dir=/d";
        assert_eq!(prepared("conclave serve", &env).unwrap(), expected);
        let expected = "conclave serve --name given --data-dir=/d";
        assert_eq!(
            prepared("conclave serve --name given", &env).unwrap(),
            expected
        );
    }

    #[test]
    fn tuning_is_dropped_and_safety_refused() {
        let line = "conclave serve --max-wals 5 --pre-vote --name a --experimental-x=1";
        assert_eq!(prepared(line, &[]).unwrap(), "conclave serve --name a");
        for unsafe_line in [
            "conclave serve -cert-file x",
            "conclave serve --force-new-cluster",
            "conclave serve --peer-auto-tls=true",
            "conclave serve --auth-token jwt",
        ] {
            assert_eq!(
                prepared(unsafe_line, &[]).unwrap_err().code,
                USAGE,
                "{unsafe_line}"
            );
        }
        assert!(prepared("conclave serve", &[("ETCD_TRUSTED_CA_FILE", "/ca")]).is_err());
        let off = "conclave serve --force-new-cluster=false --auth-token=simple";
        assert_eq!(prepared(off, &[]).unwrap(), "conclave serve");
    }

    #[test]
    fn every_flag_of_serve_has_its_variable() {
        let serve = ServeArgs::augment_args(clap::Command::new("serve"));
        let mut flags: Vec<&str> = serve.get_arguments().filter_map(|a| a.get_long()).collect();
        // For programs, which set no variables.
        flags.retain(|flag| *flag != "stop-on-stdin-eof");
        assert_eq!(flags, OWN);
    }

    #[test]
    fn flags_are_in_one_list_only() {
        let all: Vec<&&str> = OWN.iter().chain(TUNING).chain(SAFETY).collect();
        let mut sorted = all.clone();
        sorted.sort();
        sorted.dedup();
        assert_eq!(sorted.len(), all.len());
        assert!(SWITCHES.iter().all(|switch| is_foreign(switch)));
    }
}
