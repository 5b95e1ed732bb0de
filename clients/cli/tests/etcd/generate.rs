//! Cases: requests drawn from a seed. The same seed gives the same case.
//!
//! Few keys, leases and names, so that requests meet each other; every field takes
//! its default, a sensible value and a bad one.

use bytes::Bytes;
use conclave_proto::etcd::etcdserverpb::{
    CompactionRequest, Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp,
    TxnRequest, WatchCreateRequest, compare::TargetUnion, request_op::Request,
};

use crate::step::{BEGINNING, Step};

/// The longest case.
const STEPS: u64 = 30;
const KEYS: [&[u8]; 9] = [
    b"a", b"ab", b"b", b"c", b"\0", b"\xff", b"m/x", b"m", b"e/1",
];
const VALUES: [&[u8]; 5] = [b"", b"1", b"2", b"10", b"\0\xff"];
const NAMES: [&[u8]; 4] = [b"m", b"e", b"", b"deep/er"];
/// An enum's number that nobody has defined.
const UNDEFINED: i32 = 7;
/// How many cases a server has seen before the first that counts.
pub const HISTORY: u64 = 8;
/// What a transaction may have of operations.
const OPERATIONS: usize = 128;

/// Numbers that depend on the seed alone (splitmix64).
pub struct Draw {
    state: u64,
    /// Whether the case has a lock without a lease of its own.
    anonymous: bool,
}

impl Draw {
    pub fn new(seed: u64) -> Self {
        Self {
            state: seed,
            anonymous: false,
        }
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True this often in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let at = self.below(from.len() as u64);
        from[usize::try_from(at).unwrap()]
    }

    fn up_to(&mut self, most: u64) -> usize {
        usize::try_from(self.below(most + 1)).unwrap()
    }

    fn key(&mut self) -> Bytes {
        if self.chance(2) {
            return Bytes::new();
        }
        Bytes::from_static(self.pick(&KEYS))
    }

    fn value(&mut self) -> Bytes {
        Bytes::from_static(self.pick(&VALUES))
    }

    /// A key and the end of a range.
    fn range(&mut self) -> (Bytes, Bytes) {
        let key = self.key();
        let end = match self.below(12) {
            0..=4 => Bytes::new(),
            5 => Bytes::from_static(b"\0"),
            6 => return (Bytes::from_static(b"\0"), Bytes::from_static(b"\0")),
            7 | 8 => return (Bytes::from_static(b"a"), Bytes::from_static(b"n")),
            9 => [&key[..], b"\0"].concat().into(),
            // Often an empty one.
            _ => self.key(),
        };
        (key, end)
    }

    /// 0, negative, compacted, of the case, of the future.
    fn revision(&mut self, percent: u64) -> i64 {
        if !self.chance(percent) {
            return 0;
        }
        match self.below(20) {
            0 => -1,
            1 => i64::MAX,
            2 => i64::MIN,
            3 => 1_000_000_000,
            4..=6 => BEGINNING - 2 + self.pick(&[0, 1, 2]),
            _ => BEGINNING + self.pick(&[1, 1, 2, 2, 3, 3, 4, 5, 6, 8, 12]),
        }
    }

    /// Of the leases 1 to 4, which may be granted or not, and sometimes none.
    fn lease(&mut self) -> i64 {
        self.pick(&[0, 1, 1, 2, 2, 3, 4])
    }

    fn get(&mut self) -> RangeRequest {
        let (key, range_end) = self.range();
        RangeRequest {
            key,
            range_end,
            limit: if self.chance(35) {
                self.pick(&[-1, 1, 1, 2, 3, i64::MAX])
            } else {
                0
            },
            revision: self.revision(30),
            sort_order: if self.chance(1) {
                UNDEFINED
            } else {
                self.pick(&[0, 0, 1, 2])
            },
            // An undefined one kills the reference.
            sort_target: self.pick(&[0, 0, 0, 1, 2, 3, 4]),
            serializable: self.chance(20),
            keys_only: self.chance(15),
            count_only: self.chance(10),
            min_mod_revision: self.revision(8),
            max_mod_revision: self.revision(8),
            min_create_revision: self.revision(8),
            max_create_revision: self.revision(8),
        }
    }

    fn put(&mut self) -> PutRequest {
        let (ignore_value, ignore_lease) = (self.chance(10), self.chance(10));
        // Rightly used most of the time.
        let value = if ignore_value && self.chance(80) {
            Bytes::new()
        } else {
            self.value()
        };
        let attach = self.chance(30) && !(ignore_lease && self.chance(80));
        PutRequest {
            key: self.key(),
            value,
            lease: if attach { self.lease() } else { 0 },
            prev_kv: self.chance(40),
            ignore_value,
            ignore_lease,
        }
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        let (key, range_end) = self.range();
        DeleteRangeRequest {
            key,
            range_end,
            prev_kv: self.chance(50),
        }
    }

    fn compare(&mut self) -> Compare {
        let target = self.pick(&[0, 1, 2, 3, 4]);
        // Sometimes not what the target says.
        let union = if self.chance(4) {
            self.pick(&[0, 1, 2, 3, 4, UNDEFINED])
        } else {
            target
        };
        let number = self.pick(&[0, 0, 1, 2, -1]);
        let target_union = match union {
            0 => Some(TargetUnion::Version(number)),
            1 => Some(TargetUnion::CreateRevision(self.revision(60))),
            2 => Some(TargetUnion::ModRevision(self.revision(60))),
            3 => Some(TargetUnion::Value(self.value())),
            4 => Some(TargetUnion::Lease(self.lease())),
            _ => None,
        };
        let (key, range_end) = if self.chance(25) {
            self.range()
        } else {
            (self.key(), Bytes::new())
        };
        Compare {
            result: self.pick(&[0, 0, 1, 2, 3]),
            target,
            key,
            range_end,
            target_union,
        }
    }

    fn op(&mut self, depth: u64) -> RequestOp {
        let request = match self.below(20) {
            0 if self.chance(30) => None,
            0..=6 => Some(Request::RequestRange(self.get())),
            7..=12 => Some(Request::RequestPut(self.put())),
            13..=16 => Some(Request::RequestDeleteRange(self.delete())),
            _ if depth == 0 => Some(Request::RequestPut(self.put())),
            _ => Some(Request::RequestTxn(self.txn(depth - 1))),
        };
        RequestOp { request }
    }

    fn ops(&mut self, depth: u64) -> Vec<RequestOp> {
        if depth > 0 && self.chance(1) {
            // At the limit, and one above it.
            let count = OPERATIONS - 1 + self.up_to(2);
            let read = RequestOp {
                request: Some(Request::RequestRange(RangeRequest {
                    key: Bytes::from_static(b"a"),
                    ..RangeRequest::default()
                })),
            };
            let mut ops = vec![read; count];
            ops[0] = self.op(depth);
            return ops;
        }
        (0..self.up_to(3)).map(|_| self.op(depth)).collect()
    }

    fn txn(&mut self, depth: u64) -> TxnRequest {
        TxnRequest {
            compare: (0..self.pick(&[0, 1, 1, 1, 2, 3]))
                .map(|_| self.compare())
                .collect(),
            success: self.ops(depth),
            failure: self.ops(depth),
        }
    }

    fn watch(&mut self) -> WatchCreateRequest {
        let (key, range_end) = self.range();
        WatchCreateRequest {
            key,
            range_end,
            // The distant future is no watch that progress waits for.
            start_revision: self.revision(60).min(BEGINNING + 40),
            progress_notify: self.chance(20),
            filters: match self.below(10) {
                0 => vec![0],
                1 => vec![1],
                2 => vec![0, 1],
                _ => Vec::new(),
            },
            prev_kv: self.chance(40),
            watch_id: if self.chance(30) {
                self.pick(&[1, 2, 5, -3])
            } else {
                0
            },
            fragment: self.chance(20),
        }
    }

    fn lease_step(&mut self) -> Step {
        let lease = self.pick(&[1, 1, 2, 2, 3, 4]);
        match self.below(12) {
            // The ids are those of no other case's leases, which are gone by then.
            0..=4 => Step::Grant {
                lease,
                id: match lease {
                    1 => 0x6c01,
                    2 => 0x6c02_0000_0000,
                    3 => -0x6c03,
                    _ => 0,
                },
                ttl: self.pick(&[60, 600, 9_000_000_000, 9_000_000_001, i64::MAX]),
            },
            5 | 6 => Step::Revoke {
                lease: self.lease(),
            },
            7 | 8 => Step::KeepAlive {
                leases: (0..=self.up_to(2)).map(|_| self.lease()).collect(),
            },
            9 | 10 => Step::TimeToLive {
                lease: self.lease(),
                keys: self.chance(70),
            },
            _ => Step::Leases,
        }
    }

    fn contest_step(&mut self) -> Step {
        // Locks and campaigns of few names and leases, so that they go on from each
        // other; sometimes of the other's.
        let locks = self.chance(50);
        let name = match self.below(10) {
            0..=6 => if locks { "m" } else { "e" }.into(),
            _ => Bytes::from_static(self.pick(&NAMES)),
        };
        // Of ids that are chosen: keys have them in their names, and an order.
        let lease = self.pick(&[1, 1, 1, 2, 2, 2, 3]);
        let value = self.value();
        let later = self.pick(&[0, 0, 0, 0, 1, -1]);
        match self.below(12) {
            // The server makes its lease; one in a case, for the order again.
            0 if locks && !std::mem::replace(&mut self.anonymous, true) => Step::Lock {
                name: "anonymous".into(),
                lease: 0,
            },
            1 if locks && self.anonymous => Step::Unlock {
                name: "anonymous".into(),
                lease: 0,
            },
            // A leader that is nobody.
            7 if !locks && self.chance(10) => Step::Resign {
                name,
                lease: 0,
                later,
            },
            0..=5 if locks => Step::Lock { name, lease },
            6..=9 if locks => Step::Unlock { name, lease },
            0..=3 => Step::Campaign { name, lease, value },
            4..=7 => Step::Proclaim {
                name,
                lease,
                later,
                value,
            },
            8 | 9 => Step::Resign { name, lease, later },
            10 => Step::Leader { name },
            _ => Step::Observe { name },
        }
    }

    fn status_step(&mut self) -> Step {
        match self.below(6) {
            0..=1 => Step::HashKv {
                revision: self.revision(60),
            },
            2 => Step::Alarms,
            3 => Step::Members,
            4 => Step::Status,
            _ => Step::AuthStatus,
        }
    }

    fn step(&mut self, kind: Kind) -> Step {
        let stream = self.up_to(1);
        // Every case has its emphasis, and something of the rest.
        let kind = if self.chance(70) {
            kind
        } else {
            self.pick(&Kind::ALL)
        };
        let dice = self.below(20);
        match kind {
            Kind::Lease if dice < 10 => self.lease_step(),
            Kind::Contest if dice < 13 => self.contest_step(),
            Kind::Contest if dice < 16 => self.lease_step(),
            Kind::Watch if dice < 7 => Step::Watch {
                stream,
                create: self.watch(),
            },
            Kind::Watch if dice < 9 => Step::Cancel {
                stream,
                id: self.pick(&[0, 0, 0, 1, 1, 2, 5, -1]),
            },
            Kind::Watch if dice < 10 => Step::Progress { stream },
            Kind::Txn if dice < 12 => Step::Txn(self.txn(2)),
            _ => self.kv_step(),
        }
    }

    fn kv_step(&mut self) -> Step {
        match self.below(20) {
            0..=5 => Step::Range(self.get()),
            6..=12 => Step::Put(self.put()),
            13..=15 => Step::Delete(self.delete()),
            16 => Step::Compact(CompactionRequest {
                revision: self.revision(95),
                physical: self.chance(10),
            }),
            17 => self.status_step(),
            _ => Step::Txn(self.txn(1)),
        }
    }
}

/// What a case is mostly about.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Kv,
    Txn,
    Lease,
    Watch,
    Contest,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Kv, Self::Txn, Self::Lease, Self::Watch, Self::Contest];
}

/// The case of a seed.
pub fn case(seed: u64) -> Vec<Step> {
    let mut draw = Draw::new(seed);
    let kind = draw.pick(&Kind::ALL);
    let mut steps = Vec::new();
    if matches!(kind, Kind::Lease | Kind::Contest) {
        // Leases to work with.
        for (lease, id) in [(1, 0x6c01), (2, 0x6c02_0000_0000), (4, 0)] {
            steps.push(Step::Grant {
                lease,
                id,
                ttl: 600,
            });
        }
    }
    let count = 1 + draw.below(STEPS);
    steps.extend((0..count).map(|_| draw.step(kind)));
    steps
}
