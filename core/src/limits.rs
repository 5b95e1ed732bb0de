//! Every limit of the service, with its reason. Relations between them are
//! checked when this compiles.

/// The longest name of a lock, in bytes.
pub const NAME_BYTES_MAX: usize = 1_024;
/// The longest owner inside a session, in bytes, before percent-encoding.
pub const OWNER_BYTES_MAX: usize = 256;
/// The longest value that a candidate proclaims through the native API, in bytes: every
/// observer gets it.
pub const ELECTION_VALUE_BYTES_MAX: usize = 64 << 10;
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
/// The shortest TTL of a lease, which is that of etcd: its clients count in seconds, and
/// renew thrice in that time.
pub const LEASE_TTL_MS_MIN: u64 = 2_000;
/// The longest TTL of a lease, which is that of etcd.
pub const LEASE_TTL_MS_MAX: u64 = 9_000_000_000_000;
/// The TTL of a session that asks for none.
pub const SESSION_TTL_MS_DEFAULT: u64 = 10_000;
/// Bytes of the secret of a session: too many to be guessed.
pub const SECRET_BYTES: usize = 16;
/// Numbered requests of a session that may be unfinished at a time: what they wait
/// for, and the answers kept for them, are in the state.
pub const REQUESTS_OPEN_MAX: usize = 4_096;
/// What a numbered request counts for beside the answer that is kept.
pub const SLOT_OVERHEAD_BYTES: u64 = 96;
/// The highest number that a client may give to a request. Above are the tags that
/// servers give to requests without one.
pub const REQUEST_NUMBER_MAX: u64 = u64::MAX >> 1;

/// The longest lock-delay: long enough for what a lost holder still does to end,
/// too short for one faulty client to keep a lock from the others.
pub const LOCK_DELAY_MS_MAX: u64 = 60_000;
/// Acquires that share one grant: each is in the value of its key.
pub const LOCK_ENTRIES_MAX: usize = 64;
/// Locks and elections that a session may hold, lead and wait for: what it has is listed,
/// handed over and ended in one go, which takes some ten milliseconds then.
pub const SESSION_LOCKS_MAX: usize = 16_384;

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
/// Operations of a transaction, in each of its lists, unless told otherwise.
pub const TXN_OPERATIONS_DEFAULT: usize = 128;
/// Compares and operations of a transaction and all inside it: some milliseconds of
/// work, but for those over ranges.
pub const TXN_OPERATIONS_MAX: usize = 4_096;
/// Records that the compares and operations over ranges of one transaction look at, unless
/// one operation is the only one over a range: a tenth of a second of work, for every
/// member.
pub const TXN_VISITS_MAX: usize = 1_000_000;
/// Transactions inside each other: a decoder takes a hundred messages inside each other,
/// and each of them is two, in an entry that is in a message of its own.
pub const TXN_DEPTH_MAX: usize = 40;
/// Keys that a read looks at in one turn before it goes on in a later one: a fraction of
/// a millisecond.
pub const READ_STEPS_MAX: usize = 4_096;
/// Keys that all reads of a turn look at, but for the last of them; those behind that
/// wait for the next one. A range comes to [`READ_STEPS_MIN`] in any case. Some
/// milliseconds.
pub const READ_STEPS_PER_TURN_MAX: usize = 65_536;
/// See [`READ_STEPS_PER_TURN_MAX`].
pub const READ_STEPS_MIN: usize = 64;
/// What any read counts for beside the keys that it looks at.
pub const READ_STEPS_EACH: usize = 8;
/// What one session, or one contender, in an answer counts for: names and values are
/// decoded and copied.
pub const READ_STEPS_LISTED: usize = 16;
/// Reads that may be answered and wait for a turn that has time for them.
pub const READABLE_MAX: usize = 65_536;
/// Timers fired by one entry, so that no entry takes long to apply.
pub const TIMERS_PER_ENTRY_MAX: usize = 1_024;
/// Changes of keys, and keys in reach of ranges, after which a turn applies no further
/// entry: some ten milliseconds of work.
pub const CHANGES_PER_TURN_MAX: usize = 4_096;
/// Keys bound to the sessions that one entry closes, or hands over to who attaches, and
/// keys in reach of its ranges, unless one command has more.
pub const ENTRY_KEYS_MAX: usize = 4_096;
/// Sessions ended by one expiry command, with their keys: less than a millisecond of
/// work, so that a turn has more time for others than for expiry, however many expire.
pub const EXPIRY_WORK_PER_COMMAND_MAX: usize = 256;
/// Between two expiry commands if the first was full: what every member applies then
/// takes a tenth of its time, and 100,000 sessions without keys end in three seconds.
pub const EXPIRY_PAUSE_US: u64 = 8_000;

/// Revisions that automatic compaction keeps.
pub const REVISIONS_KEPT: u64 = 1_000_000;
/// For how long it keeps what could be read.
pub const HISTORY_KEPT_MS: u64 = 10 * 60 * 1_000;
/// Bytes of history above which it keeps less than that.
pub const HISTORY_BYTES_KEPT: u64 = 512 << 20;
/// How often in the time that is kept the leader notes the revision.
pub const COMPACTION_SAMPLES: u64 = 600;
/// Superseded versions dropped by one entry: some milliseconds of work.
pub const SWEPT_PER_ENTRY_MAX: usize = 4_096;
/// What a version of a key counts for beside its key and value: about what it takes, as
/// a test compares it for many mixes (`primitives/tests/size.rs`). 260 if it is
/// past and others of its key are there, 410 if it is a plain key, 500 for a lock.
pub const RECORD_OVERHEAD_BYTES: u64 = 380;
/// What a session counts for beside its name, its metadata and its requests: also what
/// a leader has to know of it.
pub const SESSION_OVERHEAD_BYTES: u64 = 640;
/// The size of the state above which commands that grow it are refused, unless
/// an operator says another.
pub const QUOTA_BYTES_DEFAULT: u64 = 2 << 30;
/// Entries between two comparisons of the members' states.
pub const DIGEST_EVERY: u64 = 128;
/// Comparisons that wait for members who lag.
pub const DIGESTS_KEPT: usize = 64;

/// Commands and reads waiting for the node.
pub const QUEUED_REQUESTS_MAX: usize = 65_536;
/// Commands waiting for the node that give something back: as many again, so that
/// overload by those who want locks keeps nobody from giving theirs up.
pub const QUEUED_ENDINGS_MAX: usize = 65_536;
/// Bytes of either: long requests must not fill the memory before they are many.
pub const QUEUED_BYTES_MAX: usize = 64 << 20;
/// Renewals waiting for the node: more than other requests, so that
/// overload does not expire sessions.
pub const QUEUED_RENEWALS_MAX: usize = 262_144;
/// Commands and reads that one turn takes in, and as many that give something back:
/// some ten milliseconds of work. A member whose turns take long is late with its
/// heartbeats.
pub const REQUESTS_PER_TURN_MAX: usize = 2_048;
/// Renewals that one turn takes in: as much work.
pub const RENEWALS_PER_TURN_MAX: usize = 8_192;
/// Messages of peers waiting for the node.
pub const QUEUED_PEER_MESSAGES_MAX: usize = 65_536;
/// Bytes of those: all that six members may have in flight to this one.
pub const QUEUED_PEER_BYTES_MAX: usize = 256 << 20;
/// Commands taken and not yet applied.
pub const PENDING_COMMANDS_MAX: usize = 131_072;
/// Requests that wait at one place of a numbered request on one node. All are repetitions
/// of that by one client, who has given up the older ones.
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
/// the last one was begun, since a start reads them all; of a large state, more.
pub const CHECKPOINT_LOG_BYTES: u64 = 64 << 20;
/// Versions and sessions that one turn copies for a checkpoint: a fraction of a
/// millisecond.
pub const DRAWN_PER_TURN_MAX: usize = 2_048;
/// Parts of a checkpoint, of so many versions each, that wait to be written: with more,
/// the walk over the state waits for the disk.
pub const CHECKPOINT_PARTS_WAITING_MAX: usize = 16;
/// Bytes of values after which a turn goes on with a hash no further: as much.
pub const HASHED_BYTES_PER_TURN_MAX: usize = 4 << 20;
/// Hashes over all keys that wait at a time.
pub const HASHINGS_MAX: usize = 64;
/// For how long one waits, the ones before it included: a few seconds are enough for a
/// state at its quota, and callers do not say when they are gone.
pub const HASHING_US_MAX: u64 = 60_000_000;
/// The log is kept for members that are away up to this many bytes, unless told
/// otherwise; memory holds about as much.
pub const LOG_BYTES_MAX: u64 = 1 << 30;
/// Records of a checkpoint in one message to another member, in bytes; one larger
/// record goes alone.
pub const CHECKPOINT_CHUNK_BYTES: usize = 128 << 10;
/// Messages with records that wait for the disk of the member that gets them.
pub const CHECKPOINT_CHUNKS_QUEUED_MAX: usize = 32;

/// Bytes of events that wait for one stream of watchers; beyond it, they are left in
/// the history until the reader has caught up. The events of one revision more may
/// wait.
pub const WATCH_QUEUE_BYTES_MAX: u64 = 1 << 20;
/// Changes looked at when a watcher begins, so that one that lacks little is live at
/// once.
pub const WATCH_CHANGES_AT_ONCE: usize = 64;
/// Changes that one turn looks at for watchers that are behind, and as many for those
/// that begin: some milliseconds of work.
pub const WATCH_CHANGES_PER_TURN_MAX: usize = 8_192;
/// Those for one watcher in a row, and so the most revisions that it is told of in one
/// message.
pub const WATCH_CHANGES_PER_STEP_MAX: usize = 1_000;
/// Events that live watchers are told in one turn, each counted for everyone who is
/// told; the others are told in turns that follow, from the history. Some milliseconds of
/// work.
pub const WATCH_TELLINGS_PER_TURN_MAX: usize = 16_384;
/// Requests of watchers waiting for the node that may be refused.
pub const QUEUED_WATCHES_MAX: usize = 65_536;

/// Sessions in one answer of a list.
pub const LIST_SESSIONS_MAX: usize = 1_000;
/// Locks in one answer of a list.
pub const LIST_LOCKS_MAX: usize = 1_000;
/// Waiters shown in one answer of a list, for all its locks: some milliseconds of
/// work, and no more than clients take in one message.
pub const LIST_WAITERS_MAX: usize = 1_000;
/// Waiters beyond those shown that are counted for one answer of a list: a millisecond of
/// work. Of more, what was counted is told.
pub const LIST_COUNTED_MAX: usize = 131_072;
/// Bytes of what leaders proclaim after which an answer of a list ends.
pub const LIST_VALUES_BYTES_MAX: usize = 1 << 20;

/// How long turns go on while a save is under way, in microseconds. A disk that hangs is to
/// stop its member, so that another leads.
pub const TURNS_DURING_SAVE_US: u64 = 100_000;

/// How long a leader holds a command back that can wait for the next one: alone, it goes
/// then.
pub const UNHURRIED_WITHIN_US: u64 = 1_000;
/// Commands held back so at a time.
pub const UNHURRIED_MAX: usize = 256;

const _: () = {
    assert!(ENTRY_BYTES_MAX <= COMMAND_BYTES_MAX);
    assert!(UNCOMMITTED_BYTES_MAX > COMMAND_BYTES_MAX as u64);
    assert!(QUEUED_BYTES_MAX > COMMAND_BYTES_MAX);
    assert!(QUEUED_PEER_BYTES_MAX as u64 >= 6 * APPENDS_INFLIGHT_MAX as u64 * APPEND_BYTES_MAX);
    assert!(QUEUED_REQUESTS_MAX + QUEUED_ENDINGS_MAX <= PENDING_COMMANDS_MAX);
    // What an entry supersedes by single writes, the next one can drop.
    assert!(SWEPT_PER_ENTRY_MAX >= ENTRY_COMMANDS_MAX);
    // What two checkpoints leave in the log, twice over.
    assert!(LOG_BYTES_MAX >= 4 * CHECKPOINT_LOG_BYTES);
    // A command with the longest of everything fits.
    assert!(NAME_BYTES_MAX + 3 * OWNER_BYTES_MAX + REASON_BYTES_MAX < COMMAND_BYTES_MAX);
    assert!(NAME_BYTES_MAX + 3 * OWNER_BYTES_MAX + ELECTION_VALUE_BYTES_MAX < COMMAND_BYTES_MAX);
    assert!(SESSION_METADATA_BYTES_MAX + SESSION_NAME_BYTES_MAX < COMMAND_BYTES_MAX);
};
