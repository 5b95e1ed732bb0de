//! Where Conclave answers otherwise than the reference, and means to. What users
//! should know of it is in `docs/etcd.md`.

use conclave_proto::etcd::etcdserverpb::{RangeRequest, TxnRequest, request_op::Request};

use crate::{side::Side, step::Step};

/// A difference that is meant, with its reason.
pub struct Known {
    pub name: &'static str,
    pub reason: &'static str,
    pub seen: Seen,
}

/// How a difference is recognized.
pub enum Seen {
    /// By two answers, of the reference and of ours, that differ by it and by nothing
    /// else. Without a request, they are what has come of watches.
    InAnswers(After, fn(Option<&Step>, &str, &str) -> bool),
    /// Not by what it does, which may be anything. A case ends before a step that may
    /// bring it about on the reference.
    Beforehand(fn(&Side, &Step) -> bool),
}

/// Whether the two servers still hold the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum After {
    TheSame,
    Apart,
}

/// All of them. One that occurs no more makes the test fail: it is to be removed.
pub const KNOWN: &[Known] = &[
    Known {
        name: "an undefined sort order",
        reason: "3.4 takes it for none; since 3.5 it is refused, as an undefined target is, \
                 which kills 3.4",
        seen: Seen::InAnswers(After::Apart, |step, _, ours| {
            format!("{step:?}").contains("sort_order: 7")
                && ours == "InvalidArgument: etcdserver: invalid sort option"
        }),
    },
    Known {
        name: "names of locks and elections",
        reason: "ours have 1 to 1,024 bytes of UTF-8; etcd takes any, and none",
        seen: Seen::InAnswers(After::Apart, |_, _, ours| {
            ours.contains("etcdserver: a name has 1 to 1024 bytes of UTF-8")
        }),
    },
    Known {
        name: "a lease with a lock and a campaign of one name",
        reason: "there is one key for both",
        seen: Seen::InAnswers(After::Apart, |_, _, ours| {
            ours.contains("the lease contends for a lock and an election of one name")
        }),
    },
    Known {
        name: "keys of the service in counts",
        reason: "what a waiting call needs lies under `_conclave/`, and is counted",
        seen: Seen::Beforehand(counts_service_keys),
    },
    Known {
        name: "a contender whose key is deleted",
        reason: "etcd tells it that it is elected, or has the lock, if all in front of it goes \
                 with it",
        seen: Seen::InAnswers(After::Apart, |_, theirs, ours| {
            let (theirs, ours) = (theirs.split_once("and call"), ours.split_once("and call"));
            let granted =
                |call: &str| ["CampaignResponse", "LockResponse"].map(|r| call.contains(r));
            theirs.is_some_and(|(_, theirs)| granted(theirs).contains(&true))
                && ours.is_some_and(|(_, ours)| ours.contains("mutex: session is expired"))
        }),
    },
    Known {
        name: "the header of a campaign",
        reason: "ours is of when it was won, or its value proclaimed; etcd's of when it began",
        seen: Seen::InAnswers(After::TheSame, |_, theirs, ours| {
            theirs.contains("CampaignResponse")
                && without_all(ours, "revision") == without_all(theirs, "revision")
        }),
    },
    Known {
        name: "a second call that waits",
        reason: "ours notes whose call is the newest, which takes a revision: so that a call \
                 that is dropped leaves the place to it",
        seen: Seen::Beforehand(waits_twice),
    },
    Known {
        name: "a put undone by its own transaction",
        reason: "watches are told what the revision left; etcd tells the put and the delete",
        seen: Seen::Beforehand(may_undo_what_is_watched),
    },
    Known {
        name: "the revision of a hash",
        reason: "HashKV tells it since 3.6",
        seen: Seen::InAnswers(After::TheSame, |step, theirs, ours| {
            matches!(step, Some(Step::HashKv { .. })) && without(ours, "hash_revision") == theirs
        }),
    },
    Known {
        name: "a hash at the compacted revision",
        reason: "3.4 refuses it, newer ones answer",
        seen: Seen::InAnswers(After::TheSame, |step, theirs, ours| {
            matches!(step, Some(Step::HashKv { .. }))
                && theirs.ends_with("mvcc: required revision has been compacted")
                && ours.starts_with("HashKvResponse")
        }),
    },
    Known {
        name: "a hash at a negative revision",
        reason: "etcd answers with the hash of nothing",
        seen: Seen::InAnswers(After::TheSame, |step, theirs, ours| {
            matches!(step, Some(Step::HashKv { revision }) if *revision < 0)
                && theirs.starts_with("HashKvResponse")
                && ours.ends_with("mvcc: required revision has been compacted")
        }),
    },
    Known {
        name: "a header of alarms",
        reason: "it has one since 3.5",
        seen: Seen::InAnswers(After::TheSame, |step, theirs, ours| {
            matches!(step, Some(Step::Alarms))
                && theirs.starts_with("AlarmResponse")
                && ours.starts_with("AlarmResponse { header: Some(")
        }),
    },
    Known {
        name: "AuthStatus",
        reason: "since 3.5",
        seen: Seen::InAnswers(After::TheSame, |step, theirs, ours| {
            matches!(step, Some(Step::AuthStatus))
                && theirs.starts_with("Unimplemented")
                && ours.starts_with("AuthStatusResponse")
        }),
    },
    Known {
        name: "versions and sizes in Status",
        reason: "ours are 3.6.0, with fields that 3.4 has not",
        seen: Seen::InAnswers(After::TheSame, |step, theirs, ours| {
            matches!(step, Some(Step::Status))
                && theirs.starts_with("StatusResponse")
                && ours.starts_with("StatusResponse")
                && ours.contains("version: \"3.6.0\"")
        }),
    },
    Known {
        name: "a watch from below zero",
        reason: "3.4 creates it and cancels it then; newer ones refuse it at once",
        seen: Seen::InAnswers(After::Apart, |step, theirs, ours| {
            let below = |step: &Step| matches!(step, Step::Watch { create, .. } if create.start_revision < 0);
            step.is_some_and(below)
                && theirs.contains("created: true")
                && ours.contains("watch_id: -1, created: true, canceled: true")
        }),
    },
];

/// Of calls that wait: the same lease waits for this lock already.
fn waits_twice(side: &Side, step: &Step) -> bool {
    match step {
        Step::Lock { name, lease } | Step::Campaign { name, lease, .. } => {
            side.contending.waits(name, *lease)
        }
        _ => false,
    }
}

/// A range that the service's keys are in, while there may be some.
fn counts_service_keys(side: &Side, step: &Step) -> bool {
    let in_it = |range: &RangeRequest| {
        let service = b"_conclave/".as_slice();
        let end = range.range_end.as_ref();
        range.key.as_ref() < service && (end == b"\0" || end > service)
    };
    matches!(step, Step::Range(range) if side.contending.has_any() && in_it(range))
}

/// A transaction that may delete what it put, with somebody watching.
fn may_undo_what_is_watched(side: &Side, step: &Step) -> bool {
    matches!(step, Step::Txn(txn) if side.streams.iter().any(Option::is_some) && may_undo(txn))
}

/// Whether a transaction may delete a key that it put. Most that would are refused.
fn may_undo(txn: &TxnRequest) -> bool {
    let ops = txn.success.iter().chain(&txn.failure);
    let requests = ops.filter_map(|op| op.request.as_ref());
    let (mut puts, mut deletes, mut nested) = (false, false, false);
    for request in requests {
        match request {
            Request::RequestPut(_) => puts = true,
            Request::RequestDeleteRange(delete) => {
                deletes |= delete.range_end.as_ref() == b"\0";
            }
            Request::RequestTxn(_) => nested = true,
            Request::RequestRange(_) => {}
        }
    }
    nested || puts && deletes
}

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
