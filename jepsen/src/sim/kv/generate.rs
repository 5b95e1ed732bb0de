//! What the client of plain keys asks next.

use bytes::Bytes;
use conclave_core::{
    ids::Revision,
    keyspace::{Filter, KeyRange},
    replica::Query,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    Compact, Compare, DeleteRange, Operation, Put, Range, Txn, command,
    compare::{Result as Relation, Target},
    operation::Operation as Kind,
    range::{By, Order},
};

use crate::{checkers::serializable::Asked, rng::Rng, sim::tally::Operation as Counted};

/// How many keys there are: few, so that clients meet.
const KEYS: u64 = 12;

/// What to ask.
#[derive(Debug)]
pub(super) enum Drawn {
    Command(command::Body, Counted),
    Range {
        asked: Asked,
        is_local: bool,
        in_pieces: bool,
    },
    Compare {
        compares: Vec<Compare>,
        is_local: bool,
    },
}

/// `value` is what it writes; `newest` is a revision from which the past is counted.
pub(super) fn draw(rng: &mut Rng, value: u64, newest: Revision) -> Drawn {
    let mut draw = Draw {
        rng,
        value,
        newest,
        unused: (0..KEYS).collect(),
    };
    match draw.rng.below(100) {
        0..18 => {
            let put = draw.put();
            Drawn::Command(command::Body::Put(put), Counted::KeyPut)
        }
        18..24 => {
            let delete = draw.delete_one();
            Drawn::Command(command::Body::DeleteRange(delete), Counted::KeyDeleted)
        }
        24..28 => {
            let delete = draw.delete_range();
            Drawn::Command(command::Body::DeleteRange(delete), Counted::RangeDeleted)
        }
        28..42 => draw.swap(),
        42..52 => {
            let txn = draw.txn(0);
            Drawn::Command(command::Body::Txn(txn), Counted::Txn)
        }
        52..60 => {
            let txn = draw.nested();
            Drawn::Command(command::Body::Txn(txn), Counted::TxnInTxn)
        }
        60..61 => {
            let revision = draw.newest.saturating_sub(draw.rng.below(200));
            let compact = command::Body::Compact(Compact { revision });
            Drawn::Command(compact, Counted::KeysCompacted)
        }
        61..65 => Drawn::Compare {
            compares: draw.compares(2),
            is_local: draw.rng.chance(300_000),
        },
        65..85 => draw.range(None, false),
        85..92 => {
            let at = Some(draw.past());
            draw.range(at, false)
        }
        _ => {
            let at = draw.rng.chance(200_000).then(|| draw.past());
            draw.range(at, true)
        }
    }
}

/// The query that asks this.
pub(super) fn query(asked: &Asked) -> Query<Primitives> {
    Query::Range {
        range: KeyRange::new(asked.start.clone(), asked.end.clone()),
        revision: asked.at,
        filter: Filter::default(),
        limit: asked.limit,
    }
}

fn key(number: u64) -> Bytes {
    format!("kv/{number:02}").into()
}

/// Behind all keys.
fn end() -> Bytes {
    Bytes::from_static(b"kv0")
}

struct Draw<'a> {
    rng: &'a mut Rng,
    value: u64,
    newest: Revision,
    /// A transaction writes no key twice.
    unused: Vec<u64>,
}

impl Draw<'_> {
    fn key(&mut self) -> Bytes {
        key(self.rng.below(KEYS))
    }

    fn unused_key(&mut self) -> Bytes {
        match self.unused.is_empty() {
            true => self.key(),
            false => key(self.unused.swap_remove(self.rng.index(self.unused.len()))),
        }
    }

    /// Mostly one that can be read.
    fn past(&mut self) -> Revision {
        match self.rng.below(20) {
            0 => self.newest + self.rng.below(3),
            1..3 => self.newest.saturating_sub(self.rng.below(1_000)).max(1),
            _ => self.newest.saturating_sub(self.rng.below(60)).max(1),
        }
    }

    /// One key, some, or all.
    fn span(&mut self) -> (Bytes, Bytes) {
        let first = self.rng.below(KEYS);
        match self.rng.below(4) {
            0 => (key(first), Bytes::new()),
            1 => (key(0), end()),
            _ => {
                let last = first + self.rng.below(KEYS - first);
                (key(first), key(last + 1))
            }
        }
    }

    fn range(&mut self, at: Option<Revision>, is_local: bool) -> Drawn {
        let (start, end) = self.span();
        let in_pieces = !is_local && self.rng.chance(250_000);
        let limit = match in_pieces || self.rng.chance(200_000) {
            true => self.rng.between(1, 4) as usize,
            false => usize::MAX,
        };
        let asked = Asked {
            start,
            end,
            at,
            limit,
        };
        Drawn::Range {
            asked,
            is_local,
            in_pieces,
        }
    }

    fn put(&mut self) -> Put {
        let ignore_value = self.rng.chance(50_000);
        Put {
            key: self.unused_key(),
            value: match ignore_value {
                true => Bytes::new(),
                false => self.value.to_string().into(),
            },
            ignore_value,
            ignore_lease: self.rng.chance(30_000),
            previous: self.rng.chance(500_000),
            lease: 0,
        }
    }

    fn delete_one(&mut self) -> DeleteRange {
        DeleteRange {
            key: self.unused_key(),
            end: Bytes::new(),
            previous: self.rng.chance(500_000),
        }
    }

    fn delete_range(&mut self) -> DeleteRange {
        let first = self.rng.below(KEYS - 2);
        DeleteRange {
            key: key(first),
            end: key(first + self.rng.between(1, 4)),
            previous: self.rng.chance(500_000),
        }
    }

    fn inner_range(&mut self) -> Range {
        let (key, end) = self.span();
        let is_past = self.rng.chance(300_000);
        let order = [Order::None, Order::Ascend, Order::Descend][self.rng.index(3)];
        let by = [By::Key, By::Version, By::Create, By::Mod, By::Value][self.rng.index(5)];
        Range {
            key,
            end,
            revision: match is_past {
                true => self.past().cast_signed(),
                false => 0,
            },
            limit: self.rng.below(4).cast_signed(),
            order: order.into(),
            by: by.into(),
            keys_only: self.rng.chance(100_000),
            count_only: self.rng.chance(100_000),
            ..Range::default()
        }
    }

    fn compares(&mut self, max: u64) -> Vec<Compare> {
        (0..self.rng.between(1, max))
            .map(|_| self.compare())
            .collect()
    }

    fn compare(&mut self) -> Compare {
        let (key, end) = match self.rng.chance(800_000) {
            true => (self.key(), Bytes::new()),
            false => self.span(),
        };
        let revision = self.newest.saturating_sub(self.rng.below(30)).cast_signed();
        let target = match self.rng.below(5) {
            0 => Target::Version(self.rng.below(4).cast_signed()),
            1 => Target::CreateRevision(revision),
            2 => Target::ModRevision(revision),
            3 => Target::Value(
                self.value
                    .saturating_sub(self.rng.below(3))
                    .to_string()
                    .into(),
            ),
            _ => Target::Lease(0),
        };
        let relations = [
            Relation::Equal,
            Relation::NotEqual,
            Relation::Greater,
            Relation::Less,
        ];
        Compare {
            key,
            end,
            result: relations[self.rng.index(4)].into(),
            target: Some(target),
        }
    }

    /// Makes a key, changes it, or takes it away, if it is as it is thought to be; else
    /// reads it.
    fn swap(&mut self) -> Drawn {
        let key = self.key();
        let is_new = self.rng.chance(500_000);
        let compare = Compare {
            key: key.clone(),
            result: match is_new {
                true => Relation::Equal,
                false => Relation::Greater,
            }
            .into(),
            target: Some(Target::CreateRevision(0)),
            ..Compare::default()
        };
        let write = match is_new || self.rng.chance(700_000) {
            true => Kind::Put(Put {
                key: key.clone(),
                value: self.value.to_string().into(),
                ..Put::default()
            }),
            false => Kind::DeleteRange(DeleteRange {
                key: key.clone(),
                ..DeleteRange::default()
            }),
        };
        let range = Range {
            key,
            ..Range::default()
        };
        let txn = Txn {
            compares: vec![compare],
            success: vec![operation(write)],
            failure: vec![operation(Kind::Range(range))],
        };
        Drawn::Command(command::Body::Txn(txn), Counted::KeySwapped)
    }

    fn txn(&mut self, depth: u32) -> Txn {
        let compares = match self.rng.chance(600_000) {
            true => self.compares(2),
            false => Vec::new(),
        };
        let mut branch = || match depth == 0 && self.rng.chance(100_000) {
            // It would meet what is put beside it.
            true => {
                let delete = self.delete_range();
                vec![operation(Kind::DeleteRange(delete))]
            }
            false => {
                let length = self.rng.between(1, 3);
                (0..length).map(|_| self.operation()).collect()
            }
        };
        Txn {
            compares,
            success: branch(),
            failure: branch(),
        }
    }

    fn operation(&mut self) -> Operation {
        operation(match self.rng.below(10) {
            _ if self.unused.is_empty() => Kind::Range(self.inner_range()),
            0..5 => Kind::Put(self.put()),
            5..7 => Kind::DeleteRange(self.delete_one()),
            _ => Kind::Range(self.inner_range()),
        })
    }

    /// With transactions inside, whose compares do not see what is written before them.
    fn nested(&mut self) -> Txn {
        let mut txn = self.txn(1);
        for _ in 0..self.rng.between(1, 2) {
            let mut inner = self.txn(1);
            if self.rng.chance(200_000) {
                let innermost = self.txn(2);
                inner.success.push(operation(Kind::Txn(innermost)));
            }
            let branch = match self.rng.chance(500_000) {
                true => &mut txn.success,
                false => &mut txn.failure,
            };
            branch.push(operation(Kind::Txn(inner)));
        }
        txn
    }
}

fn operation(kind: Kind) -> Operation {
    Operation {
        operation: Some(kind),
    }
}
