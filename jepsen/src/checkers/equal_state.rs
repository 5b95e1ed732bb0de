//! Equal state at equal index: two nodes that have applied the same entries
//! hold the same, and an index derived from keys equals the one kept up to date.

use std::{collections::BTreeMap, fmt};

use super::{Verdict, broken};

const NAME: &str = "equal_state";

/// Positions remembered for nodes that lag.
const REMEMBERED: usize = 200_000;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct EqualState {
    /// By applied index: who was there first, and the digest of its state.
    digests: BTreeMap<u64, (usize, u64)>,
}

impl EqualState {
    /// A node has applied up to `index` and its state has this digest.
    pub(crate) fn applied(&mut self, node: usize, index: u64, digest: u64) -> Verdict {
        let (first, expected) = *self.digests.entry(index).or_insert((node, digest));
        if self.digests.len() > REMEMBERED {
            self.digests.pop_first();
        }
        if digest == expected {
            return Ok(());
        }
        broken(
            NAME,
            format!("nodes {first} and {node} differ at index {index}"),
        )
    }
}

/// Two values that must be equal, such as an index and the same rebuilt.
pub(crate) fn same<T: PartialEq + fmt::Debug>(what: &str, left: &T, right: &T) -> Verdict {
    if left == right {
        return Ok(());
    }
    broken(NAME, format!("{what} differ: {left:?} and {right:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_nodes_that_differ() {
        let mut checker = EqualState::default();
        checker.applied(0, 5, 0xA).unwrap();
        checker.applied(1, 6, 0xB).unwrap();
        checker.applied(1, 5, 0xA).unwrap();
        assert_eq!(
            checker.applied(2, 6, 0xC).unwrap_err().checker,
            "equal_state"
        );
    }

    #[test]
    fn finds_an_index_that_is_not_what_keys_say() {
        same("indexes", &vec![1, 2], &vec![1, 2]).unwrap();
        assert!(same("indexes", &vec![1, 2], &vec![1]).is_err());
    }
}
