//! How many keys a request looks at for its ranges, at most: told before it runs, by what
//! it asks for and how many keys there are. Most look at far fewer, but only the walk
//! would tell, and it is to be known whether there is time for one.

use conclave_proto::internal::{Compare, command::Body};

use super::{Keyspace, txn};
use crate::limits;

/// Of a command.
pub(crate) fn of_command(keyspace: &Keyspace, body: &Body) -> usize {
    match body {
        Body::Txn(txn) => txn::wide_parts(txn).saturating_mul(keyspace.len()),
        Body::DeleteRange(delete) if !delete.end.is_empty() => keyspace.len(),
        _ => 0,
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
    use bytes::Bytes;
    use conclave_proto::internal::{
        DeleteRange, Operation, Put, Range, Txn, operation::Operation as Kind,
    };

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
    fn each_range_of_a_command_may_be_over_all_keys() {
        let keyspace = keyspace();
        let of = |body| of_command(&keyspace, &body);
        assert_eq!(of(Body::DeleteRange(delete(""))), 0);
        assert_eq!(of(Body::DeleteRange(delete("k2"))), KEYS);
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
        assert_eq!(of(Body::Txn(txn)), 3 * KEYS);
        assert_eq!(of(Body::Txn(Txn::default())), 0);
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
