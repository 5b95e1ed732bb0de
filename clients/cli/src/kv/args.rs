//! The command line of `conclave kv`, `conclave watch` and `conclave lease`.

use std::{ffi::OsString, time::Duration};

use clap::{Args, Subcommand, ValueEnum};

use crate::duration;

#[derive(Debug, Args)]
pub(crate) struct KvArgs {
    #[command(subcommand)]
    pub(crate) what: KvCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KvCommand {
    /// Write a key.
    #[command(after_help = PUT_HELP)]
    Put(PutArgs),
    /// Read keys.
    #[command(after_help = GET_HELP)]
    Get(GetArgs),
    /// Delete keys.
    #[command(after_help = DEL_HELP)]
    Del(DelArgs),
    /// Do several things at once, if what is there is as expected.
    #[command(after_help = TXN_HELP)]
    Txn(TxnArgs),
    /// Print the changes of keys as they happen.
    #[command(after_help = KV_WATCH_HELP)]
    Watch(KvWatchArgs),
    /// Give up history below a revision.
    #[command(after_help = KV_COMPACT_HELP)]
    Compact(CompactKvArgs),
}

const PUT_HELP: &str = "\
Without a VALUE, or with `-`, the value is read from stdin, to its end, byte for byte.

Examples:
  conclave kv put config/color green
  conclave kv put config/site - < site.json
  conclave kv put online/a 10.0.0.7 --lease 3a91bc   it goes when the lease does";

const GET_HELP: &str = "\
Exit code 1 if a single key is asked for and is not there.
In tables bytes that are no text are shown as \\xff; in JSON, a key or value that is no
text is in base64 and called key_base64, value_base64.

Examples:
  conclave kv get config/color
  conclave kv get config/ --prefix --keys-only
  conclave kv get a m                          all keys from a on, before m
  conclave kv get config/color --rev 17        as it was at revision 17
  conclave kv get jobs/ --prefix --sort mod --descend --limit 10
  color=$(conclave kv get config/color --value-only)
  conclave kv get config/ --prefix -o json | jq -r '.kvs[].key'";

const DEL_HELP: &str = "\
That there was nothing to delete is no error.

Examples:
  conclave kv del config/color
  conclave kv del config/ --prefix --prev      and show what was there";

const TXN_HELP: &str = "\
Conditions: WHAT(KEY) OP VALUE, where WHAT is value, version, create, mod (the
revisions of its creation and last write) or lease, and OP is =, !=, < or >.
Of a key that is not there, all numbers are 0. All conditions must hold.
Operations: put KEY VALUE, get KEY [END], del KEY [END], with the options of these
commands. They are done in order, at one revision, all or none.
Words with spaces go in quotes; in double quotes \\n, \\t, \\\", \\\\ and \\xff are bytes.
Without --if, --then and --else, lines are read from stdin: conditions, an empty
line, operations, an empty line, operations else.

Exit code 0 also if the conditions did not hold: the output says so.

Examples:
  conclave kv txn --if 'create(leader) = 0' --then 'put leader me' --else 'get leader'
  conclave kv txn --if 'mod(balance) = 17' --then 'put balance 90' --then 'put log \"-10\"'
  printf 'value(\"color\") = \"green\"\\n\\nput color blue\\n\\nget color\\n' | conclave kv txn";

const KV_WATCH_HELP: &str = "\
Goes on until it is interrupted, also while servers fail: no change is missed or told
twice. If it was away for so long that history was given up, it ends with exit code 1
and says so. To run a command for each change: conclave watch KEY -- COMMAND.

Examples:
  conclave kv watch config/ --prefix
  conclave kv watch config/color --rev 17      also what happened since revision 17
  conclave kv watch jobs/ --prefix --events 1  leave after one
  conclave kv watch config/ --prefix -o json | jq -c '[.type, .key]'";

const KV_COMPACT_HELP: &str = "\
Reads of revisions below this one are refused from then on; what is there now stays.
`conclave compact` does the same without knowing a revision.

Example:
  conclave kv compact 100000";

/// Which keys.
#[derive(Clone, Debug, Args)]
pub(crate) struct Keys {
    /// The key, or the first of a range.
    pub(crate) key: OsString,
    /// All keys before this one.
    #[arg(conflicts_with_all = ["prefix", "from"])]
    pub(crate) end: Option<OsString>,
    /// All keys that begin so.
    #[arg(long)]
    pub(crate) prefix: bool,
    /// All keys from this one on.
    #[arg(long, conflicts_with = "prefix")]
    pub(crate) from: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PutArgs {
    /// The key.
    pub(crate) key: OsString,
    /// The value; `-` for stdin.
    #[arg(allow_hyphen_values = true)]
    pub(crate) value: Option<OsString>,
    /// Bind the key to this lease, in hexadecimal.
    #[arg(long, value_name = "ID", value_parser = lease_id, conflicts_with = "keep_lease")]
    pub(crate) lease: Option<i64>,
    /// Keep the lease that the key has.
    #[arg(long)]
    pub(crate) keep_lease: bool,
    /// Keep the value that the key has, to change its lease alone.
    #[arg(long, conflicts_with = "value")]
    pub(crate) keep_value: bool,
    /// Show what was there before.
    #[arg(long)]
    pub(crate) prev: bool,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    pub(crate) keys: Keys,
    /// As of this revision.
    #[arg(long, value_name = "REVISION")]
    pub(crate) rev: Option<i64>,
    /// At most so many keys.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub(crate) limit: i64,
    /// The order.
    #[arg(long, value_enum, value_name = "BY")]
    pub(crate) sort: Option<Sort>,
    /// The other way round.
    #[arg(long)]
    pub(crate) descend: bool,
    /// Without values.
    #[arg(long)]
    pub(crate) keys_only: bool,
    /// Only how many there are.
    #[arg(long, conflicts_with_all = ["keys_only", "value_only"])]
    pub(crate) count_only: bool,
    /// Only the values, byte for byte, with newlines between them.
    #[arg(long, conflicts_with = "keys_only")]
    pub(crate) value_only: bool,
    /// What the server that is asked knows, which may be of a while ago.
    #[arg(long)]
    pub(crate) serializable: bool,
}

/// By what keys are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// By key.
    Key,
    /// By how often each was written.
    Version,
    /// By the revision of creation.
    Create,
    /// By the revision of the last write.
    Mod,
    /// By value.
    Value,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct DelArgs {
    #[command(flatten)]
    pub(crate) keys: Keys,
    /// Show what was there.
    #[arg(long)]
    pub(crate) prev: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TxnArgs {
    /// A condition; may be given several times.
    #[arg(long = "if", value_name = "CONDITION")]
    pub(crate) conditions: Vec<OsString>,
    /// An operation if all conditions hold; may be given several times.
    #[arg(long, value_name = "OPERATION")]
    pub(crate) then: Vec<OsString>,
    /// An operation if not; may be given several times.
    #[arg(long = "else", value_name = "OPERATION")]
    pub(crate) otherwise: Vec<OsString>,
}

/// What to watch.
#[derive(Clone, Debug, Args)]
pub(crate) struct Watched {
    #[command(flatten)]
    pub(crate) keys: Keys,
    /// Begin at this revision; default: with what is to come.
    #[arg(long, value_name = "REVISION", value_parser = clap::value_parser!(i64).range(1..))]
    pub(crate) rev: Option<i64>,
    /// With what was there before each change.
    #[arg(long)]
    pub(crate) prev: bool,
    /// Only writes.
    #[arg(long, conflicts_with = "deletes_only")]
    pub(crate) puts_only: bool,
    /// Only deletions.
    #[arg(long)]
    pub(crate) deletes_only: bool,
    /// Leave after so many changes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) events: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct KvWatchArgs {
    #[command(flatten)]
    pub(crate) watched: Watched,
}

#[derive(Debug, Args)]
pub(crate) struct CompactKvArgs {
    /// Becomes the lowest revision that can be read.
    pub(crate) revision: i64,
    /// Wait until the server has let go of what is given up.
    #[arg(long)]
    pub(crate) physical: bool,
}

pub(crate) const WATCH_HELP: &str = "\
The command runs once for each change, one after the other, in order. Changes that
happen while it runs wait for their turn; none is left out, however long it takes, as
long as the servers have the history (else: exit code 1). With --latest, only the last
change of each key that happened meanwhile gets its turn: right for commands that
bring something up to date.
The value is on the command's stdin, byte for byte. In its environment are:
  CONCLAVE_EVENT       put or delete
  CONCLAVE_KEY, CONCLAVE_VALUE
                       not set if they have zero bytes or more than 64 KiB
  CONCLAVE_REVISION    of the change
  CONCLAVE_CREATE_REVISION, CONCLAVE_VERSION
                       of the key; 0 if it was deleted
  CONCLAVE_LEASE       that the key is bound to, in hexadecimal; not set if to none
  CONCLAVE_PREV_VALUE  what was there before, with --prev
A command that fails is told of on stderr, and the next change gets its turn; with
--fail-fast it ends all. It has a process group of its own, gets the signals that
`conclave watch` gets, and is killed with it.

Examples:
  conclave watch config/site -- ./reload.sh
  conclave watch config/ --prefix --latest --puts-only -- sh -c 'cat > /etc/app/${CONCLAVE_KEY##*/}'
  conclave watch jobs/ --prefix --puts-only --fail-fast -- ./work.sh

Exit codes:
  1 history is given up, or another error   64 usage   69 no cluster reached
  with --fail-fast the command's own, or 128+n if signal n ended it
  126, 127 the command cannot be run, or found";

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    #[command(flatten)]
    pub(crate) watched: Watched,
    /// Of what happens while the command runs, only the last change of each key.
    #[arg(long)]
    pub(crate) latest: bool,
    /// End when the command fails, with its exit code.
    #[arg(long)]
    pub(crate) fail_fast: bool,
    /// What to run for each change.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct LeaseArgs {
    #[command(subcommand)]
    pub(crate) what: LeaseCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// Get a new lease.
    #[command(
        after_help = "Its id is printed in hexadecimal, as all commands take it. Keys are bound to it with\n`conclave kv put KEY VALUE --lease ID`. It ends when it was not renewed for its TTL,\nand its keys with it.\n\nExample:\n  id=$(conclave lease grant 60s -o json | jq -r .lease_id)"
    )]
    Grant(GrantArgs),
    /// End a lease, and delete its keys.
    #[command(after_help = "Example:\n  conclave lease revoke 3a91bc")]
    Revoke(LeaseId),
    /// Renew a lease until interrupted.
    #[command(
        after_help = "A line is printed for each change: active, suspect (renewals fail), lost.\nExit code 75 if the lease is lost.\n\nExamples:\n  conclave lease keep-alive 3a91bc\n  conclave lease keep-alive 3a91bc --once"
    )]
    KeepAlive(KeepAliveArgs),
    /// How long a lease still has.
    #[command(
        after_help = "Exit code 1 if there is no such lease.\n\nExample:\n  conclave lease ttl 3a91bc --keys"
    )]
    Ttl(TtlArgs),
    /// List all leases.
    #[command(
        after_help = "Sessions are leases, too; `conclave sessions` says more of them.\n\nExample:\n  conclave lease list -o json | jq -r '.leases[].lease_id'"
    )]
    List,
}

#[derive(Debug, Args)]
pub(crate) struct GrantArgs {
    /// How long it lasts without renewal; whole seconds, and at least what the
    /// cluster allows.
    #[arg(value_parser = duration::parse)]
    pub(crate) ttl: Duration,
    /// Its id, in hexadecimal; default: one is chosen.
    #[arg(long, value_name = "ID", value_parser = lease_id)]
    pub(crate) id: Option<i64>,
}

#[derive(Debug, Args)]
pub(crate) struct LeaseId {
    /// The lease, in hexadecimal.
    #[arg(value_parser = lease_id)]
    pub(crate) id: i64,
}

#[derive(Debug, Args)]
pub(crate) struct KeepAliveArgs {
    #[command(flatten)]
    pub(crate) lease: LeaseId,
    /// Renew it once, and leave.
    #[arg(long)]
    pub(crate) once: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TtlArgs {
    #[command(flatten)]
    pub(crate) lease: LeaseId,
    /// With the keys that are bound to it.
    #[arg(long)]
    pub(crate) keys: bool,
}

/// A lease as people see it: 64 bits in hexadecimal.
fn lease_id(text: &str) -> Result<i64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let id = u64::from_str_radix(digits, 16);
    id.map(u64::cast_signed)
        .map_err(|_| "a lease is up to 16 hexadecimal digits".to_owned())
}
