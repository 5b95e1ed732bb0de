//! What happens next, in order of time, then of scheduling.

use std::{cmp::Reverse, collections::BinaryHeap};

/// See the module. Things stay where they are while their places are sorted.
#[derive(Debug)]
pub(crate) struct Queue<T> {
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    things: Vec<Option<T>>,
    free: Vec<usize>,
    scheduled: u64,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            heap: BinaryHeap::new(),
            things: Vec::new(),
            free: Vec::new(),
            scheduled: 0,
        }
    }
}

impl<T> Queue<T> {
    pub(crate) fn push(&mut self, at_us: u64, thing: T) {
        let place = self.free.pop().unwrap_or(self.things.len());
        if place == self.things.len() {
            self.things.push(None);
        }
        self.things[place] = Some(thing);
        self.heap.push(Reverse((at_us, self.scheduled, place)));
        self.scheduled += 1;
    }

    pub(crate) fn pop(&mut self) -> Option<(u64, T)> {
        let Reverse((at_us, _, place)) = self.heap.pop()?;
        self.free.push(place);
        let thing = self.things[place]
            .take()
            .expect("a place in the heap is taken");
        Some((at_us, thing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_things_in_order_of_time_then_of_scheduling() {
        let mut queue = Queue::default();
        for (at_us, name) in [(5, 'a'), (3, 'b'), (5, 'c'), (1, 'd')] {
            queue.push(at_us, name);
        }
        assert_eq!(queue.pop(), Some((1, 'd')));
        queue.push(3, 'e');
        let rest: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(rest, [(3, 'b'), (3, 'e'), (5, 'a'), (5, 'c')]);
    }
}
