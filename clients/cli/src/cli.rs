//! The command line. Help is for learning: each command says what it is for,
//! shows examples, and lists its exit codes where scripts need them.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::{
    duration,
    kv::args::{KvArgs, LeaseArgs, WATCH_HELP, WatchArgs},
    output::Format,
    serve::ServeArgs,
};

/// Where a cluster is looked for if nothing says otherwise.
pub(crate) const DEFAULT_ENDPOINT: &str = "127.0.0.1:2379";

/// Locks, elections and sessions for programs on many machines.
#[derive(Debug, Parser)]
#[command(
    name = "conclave",
    version,
    after_help = "Try it:\n  conclave dev                          a cluster of three servers on this machine\n  conclave lock deploy -- ./deploy.sh   run a command under a lock\n  conclave locks                        who holds what, and who waits\n  conclave elect primary $HOST -- ./serve   run a command while leading"
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) global: Global,
}

/// What every client command takes.
#[derive(Clone, Debug, Args)]
pub(crate) struct Global {
    /// Servers of the cluster, as host:port; one is enough, several survive
    /// the loss of some.
    #[arg(
        long,
        global = true,
        env = "CONCLAVE_ENDPOINTS",
        value_delimiter = ',',
        default_value = DEFAULT_ENDPOINT,
        value_name = "A,B,C"
    )]
    pub(crate) endpoints: Vec<String>,
    /// How to print results.
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub(crate) output: Format,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run one server of a cluster.
    Serve(Box<ServeArgs>),
    /// Start a cluster on this machine, for trying things and for tests.
    #[command(after_help = DEV_HELP)]
    Dev(DevArgs),
    /// Run a command while holding a lock.
    #[command(after_help = LOCK_HELP)]
    Lock(LockArgs),
    /// Take a lock away from its holder.
    #[command(after_help = UNLOCK_HELP)]
    Unlock(UnlockArgs),
    /// List locks, who holds them and who waits.
    #[command(after_help = LOCKS_HELP)]
    Locks(LocksArgs),
    /// Run a command while leading, or observe who leads.
    #[command(after_help = ELECT_HELP)]
    Elect(ElectArgs),
    /// List elections, who leads and who stands by.
    #[command(after_help = ELECTIONS_HELP)]
    Elections(ElectionsArgs),
    /// List the live sessions.
    #[command(after_help = SESSIONS_HELP)]
    Sessions,
    /// Ask each server how it is.
    #[command(after_help = STATUS_HELP)]
    Status,
    /// Give up history, to make room.
    #[command(after_help = COMPACT_HELP)]
    Compact(CompactArgs),
    /// Clear all alarms.
    #[command(after_help = DISARM_HELP)]
    Disarm,
    /// Read, write and watch keys.
    Kv(KvArgs),
    /// Run a command for each change of a key.
    #[command(after_help = WATCH_HELP)]
    Watch(WatchArgs),
    /// Grant, renew, list and end leases.
    Lease(LeaseArgs),
    /// Look at the data directory of a server that does not run.
    #[command(after_help = CHECK_DATA_HELP)]
    CheckData(CheckDataArgs),
    /// Measure a running cluster.
    #[command(after_help = "Example:\n  conclave bench lock --clients 16 --seconds 5")]
    Bench(BenchArgs),
    /// Print completions for a shell.
    #[command(
        after_help = "Example:\n  conclave completions bash > ~/.local/share/bash-completion/completions/conclave"
    )]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Kills its process group when its stdin ends; used by `lock`.
    #[command(hide = true)]
    Watchdog,
}

const LOCK_HELP: &str = "\
The command finds in its environment:
  CONCLAVE_LOCK_NAME   the lock
  CONCLAVE_LOCK_KEY    the key that stands for the grant
  CONCLAVE_LOCK_TOKEN  the fencing token: give it to whatever the lock protects,
                       and let that refuse lower ones
  CONCLAVE_SESSION     the session, in hexadecimal

If the lock is lost, the command gets SIGTERM, and SIGKILL in time before another
can hold the lock. It is killed, too, when `conclave lock` itself is killed.
It has a process group of its own, and so cannot read from a terminal: for
questions to people, acquire the lock without a command.
Without a command, the key and the token are printed, and the lock is held until
SIGINT or SIGTERM.

Examples:
  conclave lock deploy -- ./deploy.sh
  conclave lock nightly --try -- ./report.sh      leave at once if another runs
  conclave lock db --ttl 3s --wait 1m -- make migrate

Exit codes:
  the command's own, or 128+n if signal n ended it
  64 usage   69 no cluster reached   73 held (--try)   75 lost
  124 not acquired in time (--wait)  126, 127 the command cannot be run, or found";

const UNLOCK_HELP: &str = "\
The holder is told the reason and loses the lock at once; the next in line gets
it. What the holder does until it notices is stopped only by the fencing token.

Example:
  conclave unlock deploy --force --reason 'host is being replaced'";

const LOCKS_HELP: &str = "\
Place 0 holds the lock, the others wait in this order. The token of a place is the
one that its grant will have. `delay 4.2s` instead of `holder`: the holder is lost,
and nobody gets the lock for so long.

Examples:
  conclave locks
  conclave locks deploy
  conclave locks -o json | jq '.locks[] | select(.waiters_total > 0) | .name'";

const ELECT_HELP: &str = "\
Of all who run this with one NAME, one leads at a time. The others stand by, and lead
after it in the order in which they came. VALUE is what everyone sees of the leader:
mostly where it can be reached.

The command finds in its environment:
  CONCLAVE_ELECTION_NAME  the election
  CONCLAVE_ELECTION_KEY   the key that stands for leadership
  CONCLAVE_ELECTION_TERM  the term, which is a fencing token: give it to whatever the
                          leader works on, and let that refuse lower ones
  CONCLAVE_SESSION        the session, in hexadecimal

If leadership is lost, the command gets SIGTERM, and SIGKILL in time before another
can lead; see `conclave lock` for all else that holds here, too. To lead again after
that, or after the command has ended, run this in a loop.
Without a command, the key and the term are printed, and this leads until SIGINT or
SIGTERM. `conclave unlock NAME --force --reason ...` deposes a leader.

Examples:
  conclave elect primary 10.0.0.7:5432 -- ./serve
  conclave elect nightly $HOSTNAME --try -- ./report.sh     leave at once if another leads
  conclave elect --observe primary
  conclave elect --observe primary -o json | jq -r '.leader.value // \"nobody\"'

Exit codes:
  the command's own, or 128+n if signal n ended it
  64 usage   69 no cluster reached   73 another leads (--try)   75 lost
  124 not elected in time (--wait)   126, 127 the command cannot be run, or found";

const ELECTIONS_HELP: &str = "\
Place 0 leads, the others follow in this order. An election whose candidates are all
etcd clients is shown when it is named. `no leader`: a lock of the same name is held.

Examples:
  conclave elections
  conclave elections primary
  conclave elections -o json | jq -r '.elections[] | [.name, .leader.value] | @tsv'";

const SESSIONS_HELP: &str = "\
A session ends when it was not renewed for its TTL, and its locks end with it.
KEYS counts the keys that are bound to it: locks that it holds or waits for, elections,
and all that was put with it as a lease.

Examples:
  conclave sessions
  conclave sessions -o json | jq '.sessions[].session_id'";

const STATUS_HELP: &str = "\
Exit code 0 if any server answers, 69 if none does. Whether the cluster serves
shows on /readyz of each server.

Examples:
  conclave status --endpoints 10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379
  conclave status -o json | jq '.servers[] | select(.role == \"leader\") | .endpoint'";

const COMPACT_HELP: &str = "\
Reads of revisions below this one are refused from then on; what is there now
stays. Without a revision, all history is given up. The leader compacts by
itself, too: see --auto-compaction-mode of the server.

Examples:
  conclave compact
  conclave compact 100000";

const DISARM_HELP: &str = "\
The alarm NOSPACE is raised when the state has reached its quota, and refuses what
would let it grow. Make room first (compact, close sessions) or raise the quota:
while its cause lasts, the alarm is raised again at once. `conclave status` shows
alarms.

Example:
  conclave compact && conclave disarm";

const CHECK_DATA_HELP: &str = "\
Says what the directory holds, whether it verifies, and whether a server would
start from it. Nothing in it is changed. Servers are kept out meanwhile, and one
that uses it must be stopped first. Each checkpoint is verified in a copy below
$TMPDIR (default /tmp), one at a time: leave space for the largest.

Damage to the bytes that are shown as not attested cannot be told from a write
that a crash interrupted; a majority of the members has what they acknowledged.
Nor can be told that a file is an old copy of itself, with all that follows it.

Example:
  conclave check-data /var/lib/conclave
  conclave check-data /var/lib/conclave -o json | jq .start

Exit codes:
  0 everything is whole
  1 a start would be refused, or the directory cannot be looked at
  2 something is damaged, and a start succeeds all the same
  64 usage";

const DEV_HELP: &str = "\
The servers are real processes with real logs on disk; kill them as you like.
Clients connect to ports PORT, PORT+20000, PORT+30000; one above each is for the
servers among themselves. Without --data-dir everything is removed at the end.

Examples:
  conclave dev
  conclave dev --nodes 1 --data-dir ./data
  conclave dev -- ./integration-tests.sh    (CONCLAVE_ENDPOINTS is set for it)";

#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// How many servers; at most 6, since there are no ports for more.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=6))]
    pub(crate) nodes: u16,
    /// Keep the data here, and go on with what is there.
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// The first server's port for clients.
    #[arg(long, default_value_t = 2379, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) port: u16,
    /// Run this with the cluster, then stop and exit with its code.
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct LockArgs {
    /// The lock; any name of 1 to 1,024 bytes.
    pub(crate) name: String,
    /// How long the lock outlives this program if it dies; from 500ms to 24h.
    #[arg(long, default_value = "10s", value_parser = duration::parse)]
    pub(crate) ttl: Duration,
    /// Give up if the lock is not acquired in this time.
    #[arg(long, value_parser = duration::parse, conflicts_with = "try_now")]
    pub(crate) wait: Option<Duration>,
    /// Give up at once if the lock is held.
    #[arg(long = "try")]
    pub(crate) try_now: bool,
    /// If the lock is lost and not released, nobody gets it for this long; at
    /// most 1m.
    #[arg(long, value_parser = duration::parse, value_name = "TIME")]
    pub(crate) lock_delay: Option<Duration>,
    /// What to run.
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct UnlockArgs {
    /// The lock.
    pub(crate) name: String,
    /// Says that you know that the holder may still be at work.
    #[arg(long, required = true)]
    pub(crate) force: bool,
    /// What the holder is told.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: String,
    /// Free the lock at once: no lock-delay follows, and one that runs ends.
    #[arg(long)]
    pub(crate) skip_delay: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LocksArgs {
    /// Only this lock.
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ElectArgs {
    /// The election; any name of 1 to 1,024 bytes.
    pub(crate) name: String,
    /// What the leader proclaims; at most 64 KiB.
    #[arg(required_unless_present = "observe")]
    pub(crate) value: Option<String>,
    /// Take no part: print a line for who leads, and for each change.
    #[arg(long, conflicts_with_all = ["value", "ttl", "wait", "try_now", "command"])]
    pub(crate) observe: bool,
    /// How long leadership outlives this program if it dies; from 500ms to 24h.
    #[arg(long, default_value = "10s", value_parser = duration::parse)]
    pub(crate) ttl: Duration,
    /// Give up if not elected in this time.
    #[arg(long, value_parser = duration::parse, conflicts_with = "try_now")]
    pub(crate) wait: Option<Duration>,
    /// Give up at once if another leads.
    #[arg(long = "try")]
    pub(crate) try_now: bool,
    /// What to run.
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct ElectionsArgs {
    /// Only this election.
    pub(crate) name: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct CompactArgs {
    /// Becomes the lowest revision that can be read; default: the present one.
    pub(crate) revision: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct CheckDataArgs {
    /// What the server was given as --data-dir.
    #[arg(value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) what: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Acquire and release locks.
    #[command(
        after_help = "One operation is an acquire and a release, both acknowledged. Checked meanwhile:\ntokens grow, and nobody else holds. Exit 0 only if ops > 0 and violations = 0.\n\nExamples:\n  conclave bench lock --clients 64 --seconds 10 --hot -o json\n  conclave bench lock --clients 100000 --owners 100 --hot     (a hundred thousand wait)\n  conclave bench lock --held 1000000                (while others hold a million)"
    )]
    Lock(BenchLock),
    /// Campaign and resign.
    #[command(
        after_help = "One operation is a campaign that is won and a resignation, both acknowledged. Checked\nmeanwhile: terms grow, and nobody else leads. Exit 0 only if ops > 0 and\nviolations = 0.\n\nExample:\n  conclave bench election --clients 64 --seconds 10 --hot -o json"
    )]
    Election(BenchElection),
    /// Keep sessions alive, and perhaps vanish.
    #[command(
        after_help = "Counts the sessions that were lost. Exit 0 only if none was and, with --vanish, all\nhad ended in the cluster within their TTL and 5 s.\n\nExample:\n  conclave bench sessions --sessions 100000 --connections 16 --seconds 300 --vanish"
    )]
    Sessions(BenchSessions),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchLock {
    /// Clients, each with one request in flight, and its own session unless there are
    /// owners.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) clients: u32,
    /// Clients that share a session, each as an owner of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub(crate) owners: u32,
    /// For how long.
    #[arg(long, default_value = "10", value_parser = duration::parse)]
    pub(crate) seconds: Duration,
    /// All on one lock, so that each operation is a hand-off. The time begins when
    /// all wait.
    #[arg(long)]
    pub(crate) hot: bool,
    /// Locks that others hold meanwhile.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=10_000_000))]
    pub(crate) held: u32,
    /// Connections that the clients share; by default 4, or fewer for fewer
    /// clients.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) connections: Option<u32>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchElection {
    /// Clients, each with its own session and one request in flight.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) clients: u32,
    /// For how long.
    #[arg(long, default_value = "10", value_parser = duration::parse)]
    pub(crate) seconds: Duration,
    /// All in one election, so that each operation is a hand-off. The time begins when
    /// all are candidates.
    #[arg(long)]
    pub(crate) hot: bool,
    /// Connections that the clients share; by default 4, or fewer for fewer
    /// clients.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) connections: Option<u32>,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchSessions {
    /// How many sessions.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) sessions: u32,
    /// Their TTL.
    #[arg(long, default_value = "10s", value_parser = duration::parse)]
    pub(crate) ttl: Duration,
    /// For how long they are kept.
    #[arg(long, default_value = "10", value_parser = duration::parse)]
    pub(crate) seconds: Duration,
    /// Connections that they share.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) connections: u32,
    /// Leave without a word then, and watch them expire.
    #[arg(long)]
    pub(crate) vanish: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn good_command_lines() {
        for line in [
            "lock deploy",
            "lock deploy --ttl 500ms --wait 5 -- sh -c true",
            "lock deploy --try -- true --try",
            "--endpoints a:1,http://b:2 locks",
            "locks deploy -o json --endpoints a",
            "sessions -o table",
            "status",
            "check-data /var/lib/conclave -o json",
            "compact",
            "compact 17 -o json",
            "disarm",
            "unlock deploy --force --reason maintenance",
            "unlock deploy --force --reason maintenance --skip-delay",
            "lock deploy --lock-delay 5s -- true",
            "elect primary 10.0.0.7:5432 --ttl 3s --try -- ./serve",
            "elect primary here",
            "elect --observe primary -o json",
            "elections",
            "elections primary -o json",
            "bench election --clients 64 --seconds 10 --hot --connections 4 -o json",
            "dev",
            "dev --nodes 5 --port 4000 --data-dir /tmp/x -- make test",
            "bench lock --clients 64 --seconds 10 --hot --connections 4 -o json",
            "bench lock --clients 100000 --owners 100 --hot --held 1000000",
            "bench sessions --sessions 100000 --ttl 10s --connections 16 --seconds 300 --vanish",
            "completions zsh",
            "kv put a b --lease 1f --prev",
            "kv put a - --keep-lease",
            "kv put a -1",
            "kv get a --prefix --rev 7 --limit 3 --sort mod --descend -o json",
            "kv get a b --keys-only",
            "kv del a --from --prev",
            "kv txn --if mod(a)=1 --then put --else get",
            "kv watch a --prefix --rev 3 --events 1",
            "kv compact 17 --physical",
            "watch a --prefix --latest --fail-fast -- sh -c true",
            "lease grant 10s --id ffffffffffffffff",
            "lease keep-alive 1f --once",
            "lease ttl 1f --keys",
            "lease list",
        ] {
            let args = std::iter::once("conclave").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(args) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn bad_command_lines() {
        for line in [
            "",
            "lock",
            "lock deploy true",
            "elect",
            "elect primary",
            "elect primary a b",
            "elect --observe primary here",
            "bench election --held 5",
            "lock deploy --wait 5s --try",
            "lock deploy --ttl never",
            "unlock deploy",
            "unlock deploy --force",
            "unlock deploy --reason maintenance",
            "dev --nodes 0",
            "dev --nodes 7",
            "dev --port 70000",
            "check-data",
            "compact all",
            "bench",
            "bench lock --clients 0",
            "locks -o yaml",
            "fly",
        ] {
            let args = std::iter::once("conclave").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(args).is_err(), "{line}");
        }
    }

    #[test]
    fn endpoints_are_split_and_the_rest_is_the_command() {
        let line = "conclave lock x --endpoints a,b -o json -- c -o d";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        assert_eq!(cli.global.endpoints, ["a", "b"]);
        assert_eq!(cli.global.output, Format::Json);
        let Command::Lock(lock) = cli.command else {
            panic!("not lock")
        };
        assert_eq!(lock.command, ["c", "-o", "d"]);
    }
}
