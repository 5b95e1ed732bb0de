//! The requests of a case, as both servers get them.
//!
//! A case is written once and runs against any server: its revisions and leases are
//! relative, and each side puts its own in (see [`crate::names::Names`]). A revision
//! from 1 to 999 counts from the beginning of the case, which is 10; everything else
//! is sent as it is. A lease is a number of the case, and 0 is none.

use std::fmt::Write as _;

use bytes::Bytes;
use conclave_proto::etcd::etcdserverpb::{
    CompactionRequest, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
    WatchCreateRequest, request_op::Request,
};

/// The revision of a case's beginning, in the case's own count.
pub const BEGINNING: i64 = 10;

#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    Range(RangeRequest),
    Put(PutRequest),
    Delete(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    /// `id` 0: the server makes one.
    Grant {
        lease: i64,
        id: i64,
        ttl: i64,
    },
    Revoke {
        lease: i64,
    },
    /// All on one stream.
    KeepAlive {
        leases: Vec<i64>,
    },
    TimeToLive {
        lease: i64,
        keys: bool,
    },
    Leases,
    Watch {
        stream: usize,
        create: WatchCreateRequest,
    },
    Cancel {
        stream: usize,
        id: i64,
    },
    Progress {
        stream: usize,
    },
    Lock {
        name: Bytes,
        lease: i64,
    },
    /// Of the key that a lock of this name has with this lease.
    Unlock {
        name: Bytes,
        lease: i64,
    },
    Campaign {
        name: Bytes,
        lease: i64,
        value: Bytes,
    },
    /// With the leader key of the campaign before, its revision increased.
    Proclaim {
        name: Bytes,
        lease: i64,
        later: i64,
        value: Bytes,
    },
    Resign {
        name: Bytes,
        lease: i64,
        later: i64,
    },
    Leader {
        name: Bytes,
    },
    /// The first answer of the stream, if there is a leader to be observed.
    Observe {
        name: Bytes,
    },
    HashKv {
        revision: i64,
    },
    Alarms,
    Members,
    Status,
    AuthStatus,
}

impl Step {
    /// Whether it needs every event of the steps before to have arrived, so that
    /// its effect on them does not depend on time.
    pub fn waits_for_events(&self) -> bool {
        matches!(
            self,
            Self::Compact(_) | Self::Watch { .. } | Self::Cancel { .. } | Self::Progress { .. }
        )
    }

    /// The same one revision earlier, for a case that has a write less.
    pub fn earlier(&mut self) {
        let revision = match self {
            Self::Compact(compact) => &mut compact.revision,
            Self::Range(range) => &mut range.revision,
            Self::Watch { create, .. } => &mut create.start_revision,
            _ => return,
        };
        if (2..1000).contains(revision) {
            *revision -= 1;
        }
    }

    /// What kind of request it is.
    pub fn name(&self) -> String {
        let debug = format!("{self:?}");
        let name = debug.split(|c: char| !c.is_alphanumeric()).next();
        name.unwrap_or_default().to_owned()
    }

    /// The same with one part less, in every way there is.
    pub fn simpler(&self) -> Vec<Self> {
        match self {
            Self::Txn(txn) => simpler_txns(txn).into_iter().map(Self::Txn).collect(),
            Self::Range(range) => simpler_ranges(range).into_iter().map(Self::Range).collect(),
            _ => Vec::new(),
        }
    }
}

fn simpler_ranges(range: &RangeRequest) -> Vec<RangeRequest> {
    let plain: [fn(&mut RangeRequest); 10] = [
        |range| range.limit = 0,
        |range| range.revision = 0,
        |range| range.sort_order = 0,
        |range| range.sort_target = 0,
        |range| range.serializable = false,
        |range| range.keys_only = false,
        |range| range.min_mod_revision = 0,
        |range| range.max_mod_revision = 0,
        |range| range.min_create_revision = 0,
        |range| range.max_create_revision = 0,
    ];
    let simpler = plain.iter().map(|change| {
        let mut range = range.clone();
        change(&mut range);
        range
    });
    simpler.filter(|simple| simple != range).collect()
}

fn simpler_txns(txn: &TxnRequest) -> Vec<TxnRequest> {
    let mut simpler = Vec::new();
    for at in 0..txn.compare.len() {
        let mut less = txn.clone();
        less.compare.remove(at);
        simpler.push(less);
    }
    let lists: [fn(&mut TxnRequest) -> &mut Vec<RequestOp>; 2] =
        [|txn| &mut txn.success, |txn| &mut txn.failure];
    for list in lists {
        let ops = list(&mut txn.clone()).clone();
        for (at, op) in ops.iter().enumerate() {
            let mut less = txn.clone();
            list(&mut less).remove(at);
            simpler.push(less);
            for op in simpler_ops(op) {
                let mut less = txn.clone();
                list(&mut less)[at] = op;
                simpler.push(less);
            }
        }
    }
    simpler
}

fn simpler_ops(op: &RequestOp) -> Vec<RequestOp> {
    let requests: Vec<_> = match &op.request {
        Some(Request::RequestTxn(nested)) => {
            let simpler = simpler_txns(nested).into_iter();
            simpler.map(Request::RequestTxn).collect()
        }
        Some(Request::RequestRange(range)) => {
            let simpler = simpler_ranges(range).into_iter();
            simpler.map(Request::RequestRange).collect()
        }
        _ => Vec::new(),
    };
    let op = |request| RequestOp {
        request: Some(request),
    };
    requests.into_iter().map(op).collect()
}

/// A case for people to read: one request a line.
pub fn script(steps: &[Step]) -> String {
    let mut text = String::new();
    for step in steps {
        writeln!(text, "    {}", terse(&format!("{step:?}"))).unwrap();
    }
    text
}

/// A debug print without the fields that have their default.
pub fn terse(debug: &str) -> String {
    const DEFAULTS: [&str; 5] = ["0", "false", "b\"\"", "[]", "None"];
    let mut text = debug.to_owned();
    for default in DEFAULTS {
        for end in [" }", ", "] {
            let value = format!(": {default}{end}");
            while let Some(at) = text.find(&value) {
                let name = text[..at].rfind([' ', '{']).map_or(0, |space| space + 1);
                let kept = if end == " }" {
                    at + value.len() - 2
                } else {
                    at + value.len()
                };
                text.replace_range(name..kept, "");
            }
        }
    }
    while text.contains(",  }") || text.contains(", }") {
        text = text.replace(",  }", " }").replace(", }", " }");
    }
    text
}
