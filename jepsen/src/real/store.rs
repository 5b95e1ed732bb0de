//! What the locks protect: a tiny storage that takes the word of a fencing token
//! and nothing else. It refuses every token lower than the highest it has seen,
//! for reads too, since a write depends on what was read before.

use std::collections::BTreeMap;

/// The token is not the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fenced;

/// For each lock, a list that its holder may read and write.
#[derive(Debug, Default)]
pub(crate) struct Store {
    lists: BTreeMap<u64, List>,
}

#[derive(Debug, Default)]
struct List {
    highest: u64,
    elements: Vec<u64>,
}

impl Store {
    /// How many elements there are.
    pub(crate) fn length(&mut self, lock: u64, token: u64) -> Result<usize, Fenced> {
        Ok(self.list(lock, token)?.elements.len())
    }

    /// Puts an element at a place. What was there before is lost, and so is an
    /// element that another holder put there unseen.
    pub(crate) fn put(
        &mut self,
        lock: u64,
        token: u64,
        place: usize,
        element: u64,
    ) -> Result<(), Fenced> {
        let elements = &mut self.list(lock, token)?.elements;
        elements.truncate(place);
        elements.push(element);
        Ok(())
    }

    /// Everything, in the end.
    pub(crate) fn lists(&self) -> impl Iterator<Item = (u64, &[u64])> {
        self.lists
            .iter()
            .map(|(lock, list)| (*lock, list.elements.as_slice()))
    }

    fn list(&mut self, lock: u64, token: u64) -> Result<&mut List, Fenced> {
        let list = self.lists.entry(lock).or_default();
        if token < list.highest {
            return Err(Fenced);
        }
        list.highest = token;
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_token_counts() {
        let mut store = Store::default();
        assert_eq!(store.length(0, 5), Ok(0));
        assert_eq!(store.put(0, 5, 0, 50), Ok(()));
        assert_eq!(store.length(0, 6), Ok(1));
        assert_eq!(store.put(0, 5, 1, 51), Err(Fenced));
        assert_eq!(store.length(0, 5), Err(Fenced));
        assert_eq!(store.put(0, 6, 0, 60), Ok(()));
        assert_eq!(store.length(1, 5), Ok(0));
        let lists: Vec<_> = store.lists().collect();
        assert_eq!(lists, [(0, &[60][..]), (1, &[][..])]);
    }
}
