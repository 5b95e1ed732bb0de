//! Every limit of the service, with its reason. Relations between them are
//! checked when this compiles.

/// The longest name of a lock, in bytes.
pub const NAME_BYTES_MAX: usize = 1_024;
/// The longest owner inside a session, in bytes, before percent-encoding.
pub const OWNER_BYTES_MAX: usize = 256;
/// The longest reason of an operator, in bytes.
pub const REASON_BYTES_MAX: usize = 1_024;
/// The longest name of a session, in bytes.
pub const SESSION_NAME_BYTES_MAX: usize = 256;
/// Metadata of a session: entries, and bytes of keys and values together.
pub const SESSION_METADATA_ENTRIES_MAX: usize = 16;
/// See [`SESSION_METADATA_ENTRIES_MAX`].
pub const SESSION_METADATA_BYTES_MAX: usize = 4_096;
/// The shortest TTL: below it, a garbage collection or a leader change of a
/// healthy cluster would end sessions.
pub const SESSION_TTL_MS_MIN: u64 = 500;
/// The longest TTL: a day.
pub const SESSION_TTL_MS_MAX: u64 = 24 * 60 * 60 * 1_000;
/// The TTL of a session that asks for none.
pub const SESSION_TTL_MS_DEFAULT: u64 = 10_000;
/// Cancelled requests a session may have above its acknowledged ones.
pub const CANCELLED_REQUESTS_MAX: usize = 1_024;

/// Ended sessions whose reason is remembered.
pub const ENDED_SESSIONS_KEPT: usize = 10_000;
/// Forced releases that are remembered.
pub const FORCED_RELEASES_KEPT: usize = 1_024;

/// Commands in one Raft entry.
pub const ENTRY_COMMANDS_MAX: usize = 1_024;
/// Bytes of commands in one Raft entry; one larger command goes alone.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Bytes of one command.
pub const COMMAND_BYTES_MAX: usize = 3 << 19;
/// Timers fired by one entry, so that no entry takes long to apply.
pub const TIMERS_PER_ENTRY_MAX: usize = 1_024;
/// Sessions ended by one expiry command.
pub const EXPIRIES_PER_COMMAND_MAX: usize = 256;

/// Commands and reads waiting for the node.
pub const QUEUED_REQUESTS_MAX: usize = 65_536;
/// Renewals waiting for the node: more than other requests, so that
/// overload does not expire sessions.
pub const QUEUED_RENEWALS_MAX: usize = 262_144;
/// Messages of peers waiting for the node.
pub const QUEUED_PEER_MESSAGES_MAX: usize = 65_536;
/// Commands given to Raft and not yet applied.
pub const PENDING_COMMANDS_MAX: usize = 131_072;
/// Requests that wait at one place on one node. All are repetitions of one
/// request of one client, who has given up the older ones.
pub const REQUESTS_PER_PLACE_MAX: usize = 8;
/// Bytes of entries that the leader appends beyond the committed ones.
pub const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// Bytes of entries in one append message.
pub const APPEND_BYTES_MAX: u64 = 1 << 20;
/// Append messages in flight to one follower: few enough that all of them, each
/// as long as may be, fit into what a link queues.
pub const APPENDS_INFLIGHT_MAX: usize = 32;

/// Entries between two checkpoints, unless told otherwise.
pub const CHECKPOINT_ENTRIES: u64 = 100_000;
/// A checkpoint is also due when this many bytes were written to the log since
/// the last one was begun, since a start reads them all.
pub const CHECKPOINT_LOG_BYTES: u64 = 64 << 20;
/// The log is kept for members that are away up to this many bytes; memory holds
/// about as much.
pub const LOG_BYTES_MAX: u64 = 1 << 30;

/// Locks in one answer of a list.
pub const LIST_LOCKS_MAX: usize = 1_000;
/// Waiters shown for one lock in a list.
pub const LIST_WAITERS_MAX: usize = 1_000;

const _: () = {
    assert!(ENTRY_BYTES_MAX <= COMMAND_BYTES_MAX);
    assert!(UNCOMMITTED_BYTES_MAX > COMMAND_BYTES_MAX as u64);
    // What two checkpoints leave in the log, twice over.
    assert!(LOG_BYTES_MAX >= 4 * CHECKPOINT_LOG_BYTES);
    assert!(QUEUED_REQUESTS_MAX <= PENDING_COMMANDS_MAX);
    // A command with the longest of everything fits.
    assert!(NAME_BYTES_MAX + 3 * OWNER_BYTES_MAX + REASON_BYTES_MAX < COMMAND_BYTES_MAX);
    assert!(SESSION_METADATA_BYTES_MAX + SESSION_NAME_BYTES_MAX < COMMAND_BYTES_MAX);
};
