//! The compares of a transaction: what its branch hangs on. They see the state before
//! it, and nothing that it writes.

use conclave_proto::internal::{
    Compare,
    compare::{Result as Relation, Target},
};

use super::{
    TxnError,
    visits::{Visits, is_wide},
};
use crate::keyspace::{KeyRange, Keyspace, Record, as_signed};

/// Whether all compares hold, each as [`execute`](super::execute) has it.
pub fn compare(keyspace: &Keyspace, compares: &[Compare]) -> Result<bool, TxnError> {
    let wide = compares.iter().filter(|compare| is_wide(compare));
    all_hold(keyspace, compares, &mut Visits::of(wide.count()))
}

pub(super) fn all_hold(
    keyspace: &Keyspace,
    compares: &[Compare],
    visits: &mut Visits,
) -> Result<bool, TxnError> {
    for compare in compares {
        if !holds(keyspace, compare, visits)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a compare holds for every key there is; if there is none, for a key that is
/// all zeros, except that no compare of values holds then.
fn holds(keyspace: &Keyspace, compare: &Compare, visits: &mut Visits) -> Result<bool, TxnError> {
    let relation =
        Relation::try_from(compare.result).map_err(|_unknown| TxnError::UnknownOperation)?;
    if !is_wide(compare) {
        #[cfg(conclave_plant)]
        if crate::plant::is("compare-against-stale-state")
            && let stale = keyspace.revision() - 1
            && keyspace.check_readable(stale).is_ok()
        {
            let range = KeyRange::single(compare.key.clone());
            let record = keyspace.range(&range, Some(stale)).next();
            return Ok(holds_for(record, relation, compare));
        }
        return Ok(holds_for(keyspace.get(&compare.key), relation, compare));
    }
    let range = KeyRange::new(compare.key.clone(), compare.end.clone());
    let mut is_empty = true;
    for record in keyspace.range(&range, None) {
        is_empty = false;
        visits.one()?;
        if !holds_for(Some(record), relation, compare) {
            return Ok(false);
        }
    }
    Ok(!is_empty || holds_for(None, relation, compare))
}

pub(super) fn holds_for(record: Option<&Record>, relation: Relation, compare: &Compare) -> bool {
    let number = |of: fn(&Record) -> u64, wanted: i64| as_signed(record.map_or(0, of)).cmp(&wanted);
    let ordering = match &compare.target {
        None => number(|record| record.version, 0),
        Some(Target::Version(wanted)) => number(|record| record.version, *wanted),
        Some(Target::CreateRevision(wanted)) => number(|record| record.create_revision, *wanted),
        Some(Target::ModRevision(wanted)) => number(|record| record.mod_revision, *wanted),
        Some(Target::Lease(wanted)) => record
            .and_then(|record| record.lease)
            .map_or(0, |session| session.0)
            .cmp(wanted),
        Some(Target::Value(wanted)) => match record {
            Some(record) => record.value.cmp(wanted),
            None => return false,
        },
    };
    match relation {
        Relation::Equal => ordering.is_eq(),
        Relation::NotEqual => ordering.is_ne(),
        Relation::Greater => ordering.is_gt(),
        Relation::Less => ordering.is_lt(),
    }
}
