//! Where Conclave answers otherwise than the reference, and means to. What users
//! should know of it is in `docs/etcd.md`.

use crate::step::Step;

/// A difference that is meant, with its reason.
pub struct Known {
    pub name: &'static str,
    pub reason: &'static str,
    /// Whether these two answers, of the reference and of ours, differ by it and by
    /// nothing else. Without a request, they are what has come of watches.
    pub explains: fn(Option<&Step>, &str, &str) -> bool,
    /// Whether the two hold different things from then on.
    pub ends_case: bool,
}

/// A lock that a call of the same lease waits for already.
pub const SECOND_WAIT: &str = "a second call that waits";
/// A limit on what is sorted, without an order.
pub const CUT_FIRST: &str = "a limit on what is sorted";
/// A range over the keys of the service while there are some.
pub const SERVICE_KEYS: &str = "keys of the service in counts";
/// A transaction that may delete what it put, with somebody watching.
pub const UNDONE: &str = "a put undone by its own transaction";

/// All of them. One that occurs no more makes the test fail: it is to be removed.
pub const KNOWN: &[Known] = &[
    Known {
        name: "an undefined sort order",
        reason: "3.4 takes it for none; since 3.5 it is refused, as an undefined target is, \
                 which kills 3.4",
        explains: |step, _, ours| {
            format!("{step:?}").contains("sort_order: 7")
                && ours == "InvalidArgument: etcdserver: invalid sort option"
        },
        ends_case: true,
    },
    Known {
        name: "names of locks and elections",
        reason: "ours have 1 to 1,024 bytes of UTF-8; etcd takes any, and none",
        explains: |_, _, ours| ours.contains("etcdserver: a name has 1 to 1024 bytes of UTF-8"),
        ends_case: true,
    },
    Known {
        name: "a lease with a lock and a campaign of one name",
        reason: "there is one key for both",
        explains: |_, _, ours| {
            ours.contains("the lease contends for a lock and an election of one name")
        },
        ends_case: true,
    },
    Known {
        name: CUT_FIRST,
        reason: "without an order etcd sorts only the first keys, one more than the limit",
        explains: |_, _, _| false,
        ends_case: true,
    },
    Known {
        name: SERVICE_KEYS,
        reason: "what a waiting call needs lies under `_conclave/`, and is counted",
        explains: |_, _, _| false,
        ends_case: true,
    },
    Known {
        name: "a contender whose key is deleted",
        reason: "etcd tells it that it is elected, or has the lock, if all in front of it goes \
                 with it",
        explains: |_, theirs, ours| {
            let (theirs, ours) = (theirs.split_once("and call"), ours.split_once("and call"));
            let granted =
                |call: &str| ["CampaignResponse", "LockResponse"].map(|r| call.contains(r));
            theirs.is_some_and(|(_, theirs)| granted(theirs).contains(&true))
                && ours.is_some_and(|(_, ours)| ours.contains("mutex: session is expired"))
        },
        ends_case: true,
    },
    Known {
        name: "the header of a campaign",
        reason: "ours is of when it was won, or its value proclaimed; etcd's of when it began",
        explains: |_, theirs, ours| {
            theirs.contains("CampaignResponse")
                && without_all(ours, "revision") == without_all(theirs, "revision")
        },
        ends_case: false,
    },
    Known {
        name: SECOND_WAIT,
        reason: "ours notes whose call is the newest, which takes a revision: so that a call \
                 that is dropped leaves the place to it",
        explains: |_, _, _| false,
        ends_case: true,
    },
    Known {
        name: UNDONE,
        reason: "watches are told what the revision left; etcd tells the put and the delete",
        explains: |_, _, _| false,
        ends_case: true,
    },
    Known {
        name: "the revision of a hash",
        reason: "HashKV tells it since 3.6",
        explains: |step, theirs, ours| {
            matches!(step, Some(Step::HashKv { .. })) && without(ours, "hash_revision") == theirs
        },
        ends_case: false,
    },
    Known {
        name: "a hash at the compacted revision",
        reason: "3.4 refuses it, newer ones answer",
        explains: |step, theirs, ours| {
            matches!(step, Some(Step::HashKv { .. }))
                && theirs.ends_with("mvcc: required revision has been compacted")
                && ours.starts_with("HashKvResponse")
        },
        ends_case: false,
    },
    Known {
        name: "a hash at a negative revision",
        reason: "etcd answers with the hash of nothing",
        explains: |step, theirs, ours| {
            matches!(step, Some(Step::HashKv { revision }) if *revision < 0)
                && theirs.starts_with("HashKvResponse")
                && ours.ends_with("mvcc: required revision has been compacted")
        },
        ends_case: false,
    },
    Known {
        name: "a header of alarms",
        reason: "it has one since 3.5",
        explains: |step, theirs, ours| {
            matches!(step, Some(Step::Alarms))
                && theirs.starts_with("AlarmResponse")
                && ours.starts_with("AlarmResponse { header: Some(")
        },
        ends_case: false,
    },
    Known {
        name: "AuthStatus",
        reason: "since 3.5",
        explains: |step, theirs, ours| {
            matches!(step, Some(Step::AuthStatus))
                && theirs.starts_with("Unimplemented")
                && ours.starts_with("AuthStatusResponse")
        },
        ends_case: false,
    },
    Known {
        name: "versions and sizes in Status",
        reason: "ours are 3.6.0, with fields that 3.4 has not",
        explains: |step, theirs, ours| {
            matches!(step, Some(Step::Status))
                && theirs.starts_with("StatusResponse")
                && ours.starts_with("StatusResponse")
                && ours.contains("version: \"3.6.0\"")
        },
        ends_case: false,
    },
    Known {
        name: "a watch from below zero",
        reason: "3.4 creates it and cancels it then; newer ones refuse it at once",
        explains: |step, theirs, ours| {
            let below = |step: &Step| matches!(step, Step::Watch { create, .. } if create.start_revision < 0);
            step.is_some_and(below)
                && theirs.contains("created: true")
                && ours.contains("watch_id: -1, created: true, canceled: true")
        },
        ends_case: true,
    },
];

/// A debug print without any of the fields of this name, which are numbers.
fn without_all(text: &str, field: &str) -> String {
    let less = without(text, field);
    if less == text {
        less
    } else {
        without_all(&less, field)
    }
}

/// A debug print without one field, which is a number.
fn without(text: &str, field: &str) -> String {
    let start = format!(", {field}: ");
    match text.split_once(&start) {
        Some((before, after)) => {
            let rest = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
            format!("{before}{rest}")
        }
        None => text.to_owned(),
    }
}
