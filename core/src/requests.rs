//! The numbered requests of one session: each runs at most once, and has one answer.
//!
//! A client numbers its requests, and says with each which earlier ones are over
//! for it. What ran and is not over keeps its answer in a slot, where a repetition
//! finds it; what waits has a slot that names its place, and gets its answer from
//! the entry that decides it. All up to the watermark that has no slot is over,
//! and never runs (again). The watermark only grows, and slots are capped.
//!
//! Numbers belong to an attachment: whoever attaches to the session raises that, and
//! what older ones still send is refused.

use std::collections::VecDeque;

use bytes::Bytes;
use conclave_proto::internal::Request;

use crate::{ids::Revision, limits, machine::Place};

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Requests {
    pub(crate) attachment: u64,
    /// The client's word for the attempt to attach that made this attachment.
    pub(crate) nonce: u64,
    pub(crate) watermark: u64,
    /// In order of number.
    pub(crate) slots: VecDeque<(u64, Slot)>,
    /// Of the slots.
    pub(crate) bytes: u64,
}

/// What is known of a request that is not over.
#[derive(Clone, Debug, PartialEq)]
pub enum Slot {
    /// It has not arrived, and the watermark went past it.
    Expected,
    /// It waits at this place.
    Waiting(Place),
    /// It is decided.
    Answered(Answered),
}

/// The answer that a request has, now and whenever it is repeated.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    /// Of the change that decided it.
    pub revision: Revision,
    /// What was decided.
    pub reply: KeptReply,
}

/// See [`Answered`].
#[derive(Clone, Debug, PartialEq)]
pub enum KeptReply {
    /// Of the machine, in its own encoding.
    Machine(Bytes),
    /// Refused, because it would have grown a state at its quota.
    NoSpace,
}

/// How a request stands.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing<'a> {
    /// It has not run.
    New,
    /// It waits at this place.
    Waiting(&'a Place),
    /// It ran.
    Answered(&'a Answered),
    /// Its client has done with it; it does not run (again).
    Over,
}

/// Why a request was not run. Said without a trace in the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotRun {
    /// Its client has said that it is over.
    Over,
    /// It is of an older attachment to the session than the present one.
    Superseded,
    /// Too many requests of the session are not over.
    TooMany,
    /// The secret is not that of the session, or the session has none.
    WrongSecret,
    /// The attachment to be replaced is not the present one.
    Attached {
        /// The present one.
        attachment: u64,
    },
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            attachment: 1,
            nonce: 0,
            watermark: 0,
            slots: VecDeque::new(),
            bytes: 0,
        }
    }
}

impl Slot {
    fn bytes(&self) -> u64 {
        let bytes = match self {
            Self::Answered(Answered {
                reply: KeptReply::Machine(reply),
                ..
            }) => reply.len(),
            Self::Waiting(place) => place.key.len(),
            _ => 0,
        };
        limits::SLOT_OVERHEAD_BYTES + bytes as u64
    }
}

impl Requests {
    /// The number of the present attachment, from 1.
    pub fn attachment(&self) -> u64 {
        self.attachment
    }

    /// Whether what says that it is of this attachment is of an older one. 0 stands
    /// for the first.
    pub fn fences(&self, attachment: u64) -> bool {
        attachment.max(1) < self.attachment
    }

    /// The highest number known to have been given out.
    pub fn last(&self) -> u64 {
        let newest = self.slots.back().map_or(0, |(number, _)| *number);
        self.watermark.max(newest)
    }

    /// What the slots count for in the size of the state.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How a request stands.
    pub fn standing(&self, number: u64) -> Standing<'_> {
        match self.find(number).map(|at| &self.slots[at].1) {
            Ok(Slot::Expected) => Standing::New,
            Ok(Slot::Waiting(place)) => Standing::Waiting(place),
            Ok(Slot::Answered(answered)) => Standing::Answered(answered),
            Err(_) if number <= self.watermark => Standing::Over,
            Err(_) => Standing::New,
        }
    }

    /// Whether a request that is new has room for its slot.
    pub fn has_room_for(&self, number: u64) -> bool {
        self.slots.len() < limits::REQUESTS_OPEN_MAX || self.find(number).is_ok()
    }

    /// The requests that wait, each with its place.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (u64, &Place)> {
        self.slots.iter().filter_map(|(number, slot)| match slot {
            Slot::Waiting(place) => Some((*number, place)),
            _ => None,
        })
    }

    /// Takes the client's word that all up to a number are over, except the
    /// `unfinished` (in order), and except what waits, since that is not. Such words
    /// stay true, so it does not matter in which order they arrive.
    pub(crate) fn acknowledge(&mut self, request: &Request) {
        let upto = request.acknowledged;
        let unfinished = &request.unfinished;
        let passed = self.watermark;
        let is_late =
            |number: &u64| *number > passed && *number <= upto && self.find(*number).is_err();
        let late: Vec<u64> = unfinished.iter().copied().filter(is_late).collect();
        if self.slots.len() + late.len() > limits::REQUESTS_OPEN_MAX {
            return;
        }
        if self.slots.front().is_some_and(|(first, _)| *first <= upto) {
            let mut freed = 0;
            self.slots.retain(|(number, slot)| {
                let stays = *number > upto
                    || matches!(slot, Slot::Waiting(_))
                    || unfinished.binary_search(number).is_ok();
                freed += if stays { 0 } else { slot.bytes() };
                stays
            });
            self.bytes -= freed;
        }
        self.watermark = passed.max(upto);
        for number in late {
            self.set(number, Slot::Expected);
        }
    }

    /// Raises the attachment.
    pub(crate) fn attach(&mut self, nonce: u64) {
        self.attachment += 1;
        self.nonce = nonce;
    }

    pub(crate) fn set(&mut self, number: u64, slot: Slot) {
        self.bytes += slot.bytes();
        match self.find(number) {
            Ok(at) => {
                self.bytes -= self.slots[at].1.bytes();
                self.slots[at].1 = slot;
            }
            Err(at) => self.slots.insert(at, (number, slot)),
        }
    }

    fn find(&self, number: u64) -> Result<usize, usize> {
        // Mostly it is newer than all that have a slot.
        match self.slots.back() {
            Some((newest, _)) if *newest >= number => self
                .slots
                .binary_search_by_key(&number, |(number, _)| *number),
            _ => Err(self.slots.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn word(acknowledged: u64, unfinished: &[u64]) -> Request {
        Request {
            acknowledged,
            unfinished: unfinished.to_vec(),
            ..Request::default()
        }
    }

    fn answered(revision: Revision) -> Slot {
        Slot::Answered(Answered {
            revision,
            reply: KeptReply::Machine("reply".into()),
        })
    }

    #[test]
    fn what_waits_is_not_over_whatever_its_client_says() {
        let mut requests = Requests::default();
        let place = Place {
            revision: 7,
            key: "n/1".into(),
        };
        requests.set(1, Slot::Waiting(place.clone()));
        requests.set(2, answered(8));
        requests.acknowledge(&word(3, &[]));
        assert_eq!(requests.standing(1), Standing::Waiting(&place));
        assert_eq!(requests.standing(2), Standing::Over);
        assert_eq!(requests.standing(3), Standing::Over);
        assert_eq!(requests.standing(4), Standing::New);
    }

    #[test]
    fn one_that_is_late_may_run_although_later_ones_are_over() {
        let mut requests = Requests::default();
        requests.acknowledge(&word(9, &[2]));
        assert_eq!(requests.standing(2), Standing::New);
        // An older word that comes late changes nothing.
        requests.acknowledge(&word(5, &[2, 4]));
        assert_eq!(requests.standing(4), Standing::Over);
        requests.acknowledge(&word(9, &[]));
        assert_eq!(requests.standing(2), Standing::Over);
        assert_eq!(requests.bytes(), 0);
    }

    #[test]
    fn slots_are_capped() {
        let mut requests = Requests::default();
        let max = limits::REQUESTS_OPEN_MAX as u64;
        for number in 1..=max {
            assert!(requests.has_room_for(number));
            requests.set(number, answered(number));
        }
        assert!(!requests.has_room_for(max + 1));
        requests.acknowledge(&word(1, &[]));
        assert!(requests.has_room_for(max + 1));
    }

    /// What happens to a client and its requests.
    #[derive(Clone, Debug)]
    enum Step {
        /// A new request is begun.
        Begin,
        /// One that was begun arrives (again), with a word as of then or of earlier.
        Arrive { which: usize, word: usize },
        /// The client hears the answer of one.
        Hear { which: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Begin),
            (any::<usize>(), 0..6_usize).prop_map(|(which, word)| Step::Arrive { which, word }),
            any::<usize>().prop_map(|which| Step::Hear { which }),
        ]
    }

    proptest! {
        /// Against a list of all that ever ran: nothing runs twice, nothing runs
        /// that is over, and nothing that is not over is refused.
        #[test]
        fn each_request_runs_once_unless_it_is_over_and_keeps_its_answer(
            steps in prop::collection::vec(step(), 1..200),
        ) {
            let mut requests = Requests::default();
            let mut begun = 0_u64;
            let mut ran = BTreeMap::<u64, Revision>::new();
            let mut open = Vec::<u64>::new();
            let mut words = vec![word(0, &[])];
            for (now, step) in steps.into_iter().enumerate() {
                match step {
                    Step::Begin => {
                        begun += 1;
                        open.push(begun);
                    }
                    Step::Hear { which } => {
                        let known: Vec<_> = open.iter().filter(|n| ran.contains_key(n)).collect();
                        if !known.is_empty() {
                            let heard = *known[which % known.len()];
                            open.retain(|number| *number != heard);
                        }
                    }
                    Step::Arrive { which, word: ago } => {
                        if begun == 0 { continue; }
                        let number = which as u64 % begun + 1;
                        requests.acknowledge(&words[words.len() - 1 - ago.min(words.len() - 1)]);
                        match requests.standing(number) {
                            Standing::New => {
                                prop_assert!(!ran.contains_key(&number), "{number} runs twice");
                                ran.insert(number, now as u64);
                                requests.set(number, answered(now as u64));
                            }
                            Standing::Answered(answered) => {
                                prop_assert_eq!(ran.get(&number), Some(&answered.revision));
                            }
                            Standing::Over => prop_assert!(!open.contains(&number)),
                            Standing::Waiting(_) => unreachable!("none waits here"),
                        }
                    }
                }
                // Either word is true: all up to the first open one, or all but those.
                let first = open.first().copied().unwrap_or(begun + 1);
                words.push(if now % 2 == 0 { word(first - 1, &[]) } else { word(begun, &open) });
                let sizes: u64 = requests.slots.iter().map(|(_, slot)| slot.bytes()).sum();
                prop_assert_eq!(requests.bytes(), sizes);
            }
        }
    }
}
