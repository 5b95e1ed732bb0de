//! A queue that allocates and frees in chunks: nothing that is in it ever moves.

use std::collections::VecDeque;

/// Items that are allocated, and freed, together.
const CHUNK: usize = 512;

/// See the module. A plain ring would move millions of items at once to grow.
#[derive(Clone, Debug)]
pub(super) struct Chunks<T>(VecDeque<VecDeque<T>>);

impl<T> Chunks<T> {
    pub(super) fn push(&mut self, item: T) {
        if self.0.back().is_none_or(|last| last.len() == CHUNK) {
            self.0.push_back(VecDeque::with_capacity(CHUNK));
        }
        let last = self.0.back_mut().expect("there is one now");
        last.push_back(item);
    }

    pub(super) fn first(&self) -> Option<&T> {
        self.0.front()?.front()
    }

    pub(super) fn pop_first(&mut self) -> Option<T> {
        let chunk = self.0.front_mut()?;
        let first = chunk.pop_front();
        if chunk.is_empty() {
            self.0.pop_front();
        }
        first
    }

    /// All from the first that is not before a place. Those that are must be in front.
    pub(super) fn since(&self, is_before: impl Fn(&T) -> bool) -> impl Iterator<Item = &T> {
        let chunk = self
            .0
            .partition_point(|chunk| chunk.back().is_some_and(&is_before));
        let skipped = self
            .0
            .get(chunk)
            .map_or(0, |chunk| chunk.partition_point(is_before));
        self.0.range(chunk..).flatten().skip(skipped)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().flatten()
    }
}

impl<T> Default for Chunks<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<T> FromIterator<T> for Chunks<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut chunks = Self::default();
        items.into_iter().for_each(|item| chunks.push(item));
        chunks
    }
}

impl<T: PartialEq> PartialEq for Chunks<T> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_out_what_it_took_whatever_chunk_that_is_in() {
        let mut chunks: Chunks<usize> = (0..4 * CHUNK + 1).collect();
        for from in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 4 * CHUNK + 1] {
            let since: Vec<_> = chunks.since(|item| *item < from).copied().collect();
            assert_eq!(since, (from..4 * CHUNK + 1).collect::<Vec<_>>());
        }
        for expected in 0..CHUNK + 7 {
            assert_eq!(chunks.first(), Some(&expected));
            assert_eq!(chunks.pop_first(), Some(expected));
        }
        chunks.push(4 * CHUNK + 1);
        // Equal whatever was in front of it once.
        let same: Chunks<usize> = (CHUNK + 7..4 * CHUNK + 2).collect();
        assert_eq!(chunks, same);
        while chunks.pop_first().is_some() {}
        assert_eq!((chunks.first(), chunks.iter().count()), (None, 0));
    }
}
