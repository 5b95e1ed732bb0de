//! Bugs planted on purpose, so that the simulator can prove that it would find
//! them. Only in a build with `--cfg conclave_plant`, and even there nothing
//! happens before one is chosen. Each is a line or two where a mistake could
//! have been made. Other builds have their names and nothing else.

#[cfg(conclave_plant)]
pub use planted::{choose, is};
#[cfg(conclave_plant)]
pub(crate) use planted::{expiry_term, forget_a_lock, note_node_term};

/// All planted bugs.
pub const NAMES: &[&str] = &[
    "ack-before-fsync",
    "reuse-read-context",
    "renew-without-confirmation",
    "clock-over-stall",
    "grant-second",
    "accept-stale-release",
    "observe-last-only",
    "accept-stale-term",
    "forget-lock-at-recovery",
    "compact-locally",
    "skip-lock-delay",
    "one-release-frees-all",
    "acquire-counts-twice",
    "cut-behind-unsynced-checkpoint",
    "retry-runs-twice",
    "requests-left-out-of-checkpoint",
    "new-leader-keeps-old-deadlines",
    "expiry-against-node-term",
    "compare-after-own-writes",
    "compare-against-stale-state",
    "delete-range-misses-last",
    "serializable-as-linearizable",
    "resume-one-too-late",
    "tell-a-revision-in-halves",
    "progress-too-early",
    "expiry-leaves-keys",
    "time-left-as-granted",
];

#[cfg(conclave_plant)]
mod planted {
    use std::{
        cell::Cell,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use conclave_proto::internal::{
        Command, Entry, PrimitiveCommand, command::Body, primitive_command::Command as Primitive,
    };
    use prost::Message as _;

    use super::NAMES;
    use crate::{ids::Term, log::LogEntry};

    /// The chosen one: its place in the list, counted from 1.
    static CHOSEN: AtomicUsize = AtomicUsize::new(0);

    /// Chooses a bug for this process; whether there is one of that name.
    pub fn choose(name: &str) -> bool {
        let place = NAMES.iter().position(|known| *known == name);
        CHOSEN.store(place.map_or(0, |place| place + 1), Ordering::Relaxed);
        place.is_some()
    }

    /// Whether this bug is the chosen one.
    pub fn is(name: &str) -> bool {
        match CHOSEN.load(Ordering::Relaxed) {
            0 => false,
            chosen => NAMES[chosen - 1] == name,
        }
    }

    thread_local! {
        /// The current term of the node that applies.
        static NODE_TERM: Cell<Term> = const { Cell::new(0) };
    }

    /// A node of this term applies what follows on this thread.
    pub(crate) fn note_node_term(term: Term) {
        NODE_TERM.set(term);
    }

    /// The term that an expiry is compared with, which should be that of its entry.
    pub(crate) fn expiry_term(of_entry: Term) -> Term {
        match is("expiry-against-node-term") {
            true => NODE_TERM.get(),
            false => of_entry,
        }
    }

    /// Drops the newest acquire from what a log held.
    pub(crate) fn forget_a_lock(mut entries: Vec<LogEntry>) -> Vec<LogEntry> {
        if !is("forget-lock-at-recovery") {
            return entries;
        }
        for log_entry in entries.iter_mut().rev() {
            let Ok(mut entry) = Entry::decode(log_entry.data.clone()) else {
                continue;
            };
            if let Some(place) = entry.commands.iter().rposition(is_acquire) {
                entry.commands.remove(place);
                log_entry.data = entry.encode_to_vec().into();
                break;
            }
        }
        entries
    }

    fn is_acquire(command: &Command) -> bool {
        let Some(Body::Machine(bytes)) = &command.body else {
            return false;
        };
        let command = PrimitiveCommand::decode(bytes.clone()).ok();
        command.is_some_and(|command| matches!(command.command, Some(Primitive::LockAcquire(_))))
    }
}
