//! How many keys a request looks at for its ranges, told before it runs: it is to be
//! known whether there is time for it.

use bytes::Bytes;
use conclave_proto::internal::{Compare, Txn, command::Body, operation::Operation as Kind};

use super::{KeyRange, Keyspace};
use crate::limits;

/// Of a command, with all parts of a transaction that may run. Counts no further than to
/// one more than an entry may have, so that it takes no time itself.
pub(crate) fn of_command(keyspace: &Keyspace, body: &Body) -> usize {
    const FAR: usize = limits::ENTRY_KEYS_MAX + 1;
    let mut walk = Walk {
        keyspace,
        left: FAR,
    };
    match body {
        Body::Txn(txn) => walk.txn(txn),
        Body::DeleteRange(delete) => walk.range(&delete.key, &delete.end),
        _ => {}
    }
    FAR - walk.left
}

struct Walk<'a> {
    keyspace: &'a Keyspace,
    left: usize,
}

impl Walk<'_> {
    fn txn(&mut self, txn: &Txn) {
        for compare in &txn.compares {
            self.range(&compare.key, &compare.end);
        }
        for operation in txn.success.iter().chain(&txn.failure) {
            match &operation.operation {
                Some(Kind::Range(range)) => self.range(&range.key, &range.end),
                Some(Kind::DeleteRange(delete)) => self.range(&delete.key, &delete.end),
                Some(Kind::Txn(txn)) => self.txn(txn),
                Some(Kind::Put(_)) | None => {}
            }
        }
    }

    fn range(&mut self, key: &Bytes, end: &Bytes) {
        if !end.is_empty() && self.left > 0 {
            let range = KeyRange::new(key.clone(), end.clone());
            self.left -= self.keyspace.range(&range, None).take(self.left).count();
        }
    }
}

/// Of compares that are made together; a single key counts, too.
pub(crate) fn of_compares(keyspace: &Keyspace, compares: &[Compare]) -> usize {
    let wide = compares.iter().filter(|compare| !compare.end.is_empty());
    let wide = wide.count();
    let visits = wide.saturating_mul(keyspace.len());
    compares.len() - wide + visits.min(limits::TXN_VISITS_MAX)
}

#[cfg(test)]
mod tests {
    use conclave_proto::internal::{DeleteRange, Operation, Put, Range};

    use super::*;

    const KEYS: usize = 50;

    fn keyspace() -> Keyspace {
        let mut keyspace = Keyspace::new();
        let mut overlay = keyspace.overlay();
        for number in 0..KEYS {
            overlay.put(format!("k{number}").into(), Bytes::new(), None);
        }
        let writes = overlay.into_writes();
        keyspace.keep(writes);
        keyspace
    }

    fn compare(end: &'static str) -> Compare {
        Compare {
            key: "k1".into(),
            end: end.into(),
            ..Compare::default()
        }
    }

    fn delete(end: &'static str) -> DeleteRange {
        DeleteRange {
            key: "k1".into(),
            end: end.into(),
            previous: false,
        }
    }

    fn inside(kind: Kind) -> Operation {
        Operation {
            operation: Some(kind),
        }
    }

    #[test]
    fn each_range_of_a_command_counts_as_far_as_it_matters() {
        let keyspace = keyspace();
        let of = |body| of_command(&keyspace, &body);
        assert_eq!(of(Body::DeleteRange(delete(""))), 0);
        // k1, and k10 to k19.
        assert_eq!(of(Body::DeleteRange(delete("k2"))), 11);
        let range = Range {
            key: "k1".into(),
            end: "k2".into(),
            ..Range::default()
        };
        let nested = Txn {
            compares: vec![compare("k2")],
            failure: vec![inside(Kind::Range(range))],
            ..Txn::default()
        };
        let txn = Txn {
            compares: vec![compare("k2"), compare("")],
            success: vec![inside(Kind::Put(Put::default()))],
            failure: vec![inside(Kind::Txn(nested))],
        };
        assert_eq!(of(Body::Txn(txn)), 33);
        assert_eq!(of(Body::Txn(Txn::default())), 0);
        let many = vec![compare("k2"); limits::ENTRY_KEYS_MAX];
        let txn = Txn {
            compares: many,
            ..Txn::default()
        };
        assert_eq!(of(Body::Txn(txn)), limits::ENTRY_KEYS_MAX + 1);
    }

    #[test]
    fn compares_look_at_no_more_than_they_may() {
        let keyspace = keyspace();
        let of = |wide, narrow| {
            let compares = [vec![compare("k2"); wide], vec![compare(""); narrow]];
            of_compares(&keyspace, &compares.concat())
        };
        assert_eq!(of(0, 3), 3);
        assert_eq!(of(2, 3), 2 * KEYS + 3);
        let many = limits::TXN_VISITS_MAX / KEYS + 1;
        assert_eq!(of(many, 0), limits::TXN_VISITS_MAX);
    }
}
