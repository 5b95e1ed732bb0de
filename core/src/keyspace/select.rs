//! What a range asks for beside its keys, with etcd's meaning: filters, an order, a
//! limit, a count.
//!
//! A range is read in pieces, in order of key: [`Keyspace::piece`] does bounded work.
//! A [`Selection`] takes the pieces, and knows which records of the next one it needs.
//! Where all of it can be read at once, as in a transaction, one piece has it all.
//!
//! [`Keyspace::piece`]: super::Keyspace::piece

use std::cmp::Ordering;

use bytes::Bytes;
use conclave_proto::internal::{
    Range,
    range::{By, Order},
};

use super::{Record, as_signed};

/// Which records are given. All keys are counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Bounds of the mod revision, both inclusive; 0: none.
    pub modified: (i64, i64),
    /// Of the create revision, likewise.
    pub created: (i64, i64),
}

impl Filter {
    /// Whether it passes.
    pub fn passes(&self, record: &Record) -> bool {
        let inside = |revision, (min, max)| {
            let revision = as_signed(revision);
            (min == 0 || revision >= min) && (max == 0 || revision <= max)
        };
        inside(record.mod_revision, self.modified) && inside(record.create_revision, self.created)
    }

    fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A part of a range, in order of key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// What passed the filter, up to the limit.
    pub records: Vec<Record>,
    /// How many keys there were.
    pub count: u64,
    /// How many keys were looked at: also those that were not there then.
    pub steps: usize,
    /// Where the next piece begins, if this is not the last one.
    pub next: Option<Bytes>,
}

impl Piece {
    /// Counts a key, and takes its record if it is wanted.
    pub(super) fn add(&mut self, record: &Record, filter: &Filter, limit: usize) {
        self.count += 1;
        if self.records.len() < limit && filter.passes(record) {
            self.records.push(record.clone());
        }
    }
}

/// What a range found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// In the order that was asked for; without values, if so asked.
    pub records: Vec<Record>,
    /// How many keys the range has, whatever limit and filter say.
    pub count: u64,
    /// Whether the limit left out records that passed the filter.
    pub more: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Selection {
    filter: Filter,
    /// By what, and whether the highest comes first. `None`: as they are, by key.
    order: Option<(By, bool)>,
    /// Whether all that passes is sorted. If not, records are taken as they come, and
    /// the order is that of those few: as in etcd, if nothing says which order it is.
    sorts_all: bool,
    limit: usize,
    keys_only: bool,
    count_only: bool,
    records: Vec<Record>,
    passed: usize,
    count: u64,
}

impl Selection {
    /// For a range with nothing found yet. `None` if it asks for an order that there
    /// is not.
    pub fn new(range: &Range) -> Option<Self> {
        let order = Order::try_from(range.order).ok()?;
        let by = By::try_from(range.by).ok()?;
        let filter = Filter {
            modified: (range.min_mod_revision, range.max_mod_revision),
            created: (range.min_create_revision, range.max_create_revision),
        };
        let sorted = match (by, order) {
            (By::Key, Order::None | Order::Ascend) => None,
            (by, order) => Some((by, order == Order::Descend)),
        };
        Some(Self {
            filter,
            order: sorted,
            sorts_all: sorted.is_some() && (order != Order::None || !filter.is_none()),
            limit: match usize::try_from(range.limit) {
                Ok(0) | Err(_) => usize::MAX,
                Ok(limit) => limit,
            },
            keys_only: range.keys_only,
            count_only: range.count_only,
            records: Vec::new(),
            passed: 0,
            count: 0,
        })
    }

    /// What the next piece is to be filtered with.
    pub fn filter(&self) -> Filter {
        self.filter
    }

    /// Whether records are given as they come, in order of key and without a filter.
    pub fn is_plain(&self) -> bool {
        self.order.is_none() && self.filter.is_none()
    }

    /// How many records of the next piece are needed: if they are taken as they come,
    /// one more than the limit tells that there are more.
    pub fn wanted(&self) -> usize {
        if self.count_only {
            0
        } else if self.sorts_all {
            usize::MAX
        } else {
            let enough = self.limit.saturating_add(1);
            enough.saturating_sub(self.records.len())
        }
    }

    /// Takes the next piece, which was read with [`Self::filter`] and with
    /// [`Self::wanted`] as its limit.
    pub fn add(&mut self, piece: Piece) {
        self.count += piece.count;
        self.passed += piece.records.len();
        self.records.extend(piece.records);
        if self.sorts_all && self.records.len() > self.limit {
            // So that it never holds much more than the limit.
            self.sort();
            self.records.truncate(self.limit);
        }
    }

    /// When all pieces are there.
    pub fn finish(mut self) -> Found {
        self.sort();
        self.records.truncate(self.limit);
        if self.keys_only {
            for record in &mut self.records {
                record.value = Bytes::new();
            }
        }
        Found {
            records: self.records,
            count: self.count,
            more: self.passed > self.limit,
        }
    }

    /// What is equal stays in order of key.
    fn sort(&mut self) {
        let Some((by, is_descending)) = self.order else {
            return;
        };
        self.records.sort_by(|a, b| {
            let ordering = compare(by, a, b);
            if is_descending {
                ordering.reverse()
            } else {
                ordering
            }
        });
    }
}

fn compare(by: By, a: &Record, b: &Record) -> Ordering {
    match by {
        By::Key => a.key.cmp(&b.key),
        By::Version => a.version.cmp(&b.version),
        By::Create => a.create_revision.cmp(&b.create_revision),
        By::Mod => a.mod_revision.cmp(&b.mod_revision),
        By::Value => a.value.cmp(&b.value),
    }
}
