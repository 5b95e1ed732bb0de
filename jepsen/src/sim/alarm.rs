//! The one alarm of a node or a client: when it wants to do something next.

use super::ground::{Event, Ground};

/// Whose alarm it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Node(usize),
    Actor(usize),
}

/// See the module. An alarm that is set anew, as most are, leaves its old place
/// in the queue for the next one that comes after it.
#[derive(Debug)]
pub(crate) struct Alarm {
    owner: Owner,
    wanted_us: u64,
    /// Places in the queue, the earliest at the end.
    places: Vec<u64>,
}

impl Alarm {
    pub(crate) fn new(owner: Owner) -> Self {
        Self {
            owner,
            wanted_us: u64::MAX,
            places: Vec::new(),
        }
    }

    /// Rings at this time, or earlier.
    pub(crate) fn set(&mut self, at_us: u64, ground: &mut Ground) {
        let at_us = at_us.max(ground.now_us);
        self.wanted_us = self.wanted_us.min(at_us);
        if at_us != u64::MAX && self.places.last().is_none_or(|first| at_us < *first) {
            self.places.push(at_us);
            ground.schedule(at_us, Event::Alarm { owner: self.owner });
        }
    }

    /// Called when a place in the queue is reached: whether the alarm rings.
    pub(crate) fn rings(&mut self, ground: &mut Ground) -> bool {
        let place = self.places.pop();
        assert_eq!(place, Some(ground.now_us), "places are reached in order");
        if self.wanted_us <= ground.now_us {
            self.wanted_us = u64::MAX;
            return true;
        }
        self.set(self.wanted_us, ground);
        false
    }

    /// It need not ring.
    pub(crate) fn stop(&mut self) {
        self.wanted_us = u64::MAX;
    }
}
