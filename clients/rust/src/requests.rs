//! Numbered requests of one session, without clock or I/O: which number comes
//! next, which are over, and what follows from each outcome of an attempt. The
//! client drives it over gRPC, the simulator over its own network.
//!
//! Whatever happens to messages, an acquire ends in exactly one of: granted,
//! refused, or withdrawn with the cluster's word for it. Until then its number
//! stays below no watermark, so that the cluster goes on answering for it.

use std::collections::BTreeSet;

use bytes::Bytes;

/// The numbers of one session.
#[derive(Clone, Debug, Default)]
pub struct Requests {
    last: u64,
    in_flight: BTreeSet<u64>,
}

/// How one attempt to call the cluster ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<T, R> {
    /// The cluster did it.
    Answered(T),
    /// The cluster decided against it; repeating would change nothing.
    Refused(R),
    /// The attempt certainly had no effect (no connection, not the leader,
    /// overloaded).
    NotApplied,
    /// The attempt may have had its effect (connection lost, no answer).
    Unknown,
}

/// What follows from an [`Outcome`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next<T, R> {
    /// Send again, after a pause, perhaps to another server.
    Repeat,
    /// It is over.
    Done(Result<T, R>),
}

/// What to send for an [`Acquire`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The acquire, with its number.
    Acquire,
    /// The cancel of that number.
    Cancel,
}

/// One acquire, from its number to its end.
#[derive(Clone, Debug)]
pub struct Acquire {
    request: u64,
    withdrawn: bool,
}

/// A lock that was granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    /// The key that the grant stands for.
    pub key: Bytes,
    /// The fencing token.
    pub token: u64,
    /// The revision at which it was answered: granted then or before.
    pub revision: u64,
}

/// One release, until it is answered.
#[derive(Clone, Debug, Default)]
pub struct Release {
    may_have_applied: bool,
}

impl Requests {
    /// Takes the next number. It is in flight until [`Requests::end`].
    pub fn begin(&mut self) -> u64 {
        self.last += 1;
        self.in_flight.insert(self.last);
        self.last
    }

    /// This number is over: it will never be sent again.
    pub fn end(&mut self, request: u64) {
        self.in_flight.remove(&request);
    }

    /// Whether no number is in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// The watermark: every number up to it is over.
    pub fn acknowledged(&self) -> u64 {
        self.in_flight.first().map_or(self.last, |first| first - 1)
    }
}

impl Acquire {
    /// An acquire with a number from [`Requests::begin`].
    pub fn new(request: u64) -> Acquire {
        Acquire {
            request,
            withdrawn: false,
        }
    }

    /// Its number.
    pub fn request(&self) -> u64 {
        self.request
    }

    /// What to send now.
    pub fn message(&self) -> Message {
        if self.withdrawn {
            Message::Cancel
        } else {
            Message::Acquire
        }
    }

    /// Nobody waits for it any more: from now on only cancels are sent, until
    /// one is answered. A grant that was already made is released by that.
    pub fn withdraw(&mut self) {
        self.withdrawn = true;
    }

    /// An attempt to acquire ended. Once withdrawn, only a cancel ends it.
    pub fn acquire_ended<R>(&self, outcome: Outcome<Granted, R>) -> Next<Granted, R> {
        match outcome {
            Outcome::Answered(_) | Outcome::Refused(_) if self.withdrawn => Next::Repeat,
            Outcome::Answered(granted) => Next::Done(Ok(granted)),
            Outcome::Refused(refusal) => Next::Done(Err(refusal)),
            Outcome::NotApplied | Outcome::Unknown => Next::Repeat,
        }
    }

    /// An attempt to cancel ended. A refusal ends it too: the number is over,
    /// or the session is.
    pub fn cancel_ended<R>(&self, outcome: Outcome<(), R>) -> Next<(), R> {
        match outcome {
            Outcome::Answered(()) => Next::Done(Ok(())),
            Outcome::Refused(refusal) => Next::Done(Err(refusal)),
            Outcome::NotApplied | Outcome::Unknown => Next::Repeat,
        }
    }
}

impl Release {
    /// A release that was not sent yet.
    pub fn new() -> Release {
        Release::default()
    }

    /// An attempt to release ended. If an earlier one may have had its effect,
    /// then a refusal for not being the holder any more *is* that effect.
    pub fn ended<R>(
        &mut self,
        outcome: Outcome<(), R>,
        is_not_holder: impl FnOnce(&R) -> bool,
    ) -> Next<(), R> {
        match outcome {
            Outcome::Answered(()) => Next::Done(Ok(())),
            Outcome::Refused(refusal) if self.may_have_applied && is_not_holder(&refusal) => {
                Next::Done(Ok(()))
            }
            Outcome::Refused(refusal) => Next::Done(Err(refusal)),
            Outcome::NotApplied => Next::Repeat,
            Outcome::Unknown => {
                self.may_have_applied = true;
                Next::Repeat
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_repeated_release_that_finds_nothing_has_released() {
        let mut release = Release::new();
        let mut ended = |outcome| release.ended(outcome, |refusal| *refusal == "not holder");
        assert_eq!(ended(Outcome::NotApplied), Next::Repeat);
        let not_holder = Outcome::Refused("not holder");
        assert_eq!(ended(not_holder.clone()), Next::Done(Err("not holder")));
        assert_eq!(ended(Outcome::Unknown), Next::Repeat);
        assert_eq!(ended(Outcome::Refused("over")), Next::Done(Err("over")));
        assert_eq!(ended(not_holder), Next::Done(Ok(())));
    }

    #[test]
    fn a_withdrawn_acquire_ends_only_by_the_answer_to_its_cancel() {
        let granted = || {
            Outcome::<_, ()>::Answered(Granted {
                key: Bytes::new(),
                token: 7,
                revision: 9,
            })
        };
        let mut acquire = Acquire::new(1);
        assert_eq!(acquire.message(), Message::Acquire);
        assert!(matches!(
            acquire.acquire_ended(granted()),
            Next::Done(Ok(_))
        ));
        acquire.withdraw();
        assert_eq!(acquire.message(), Message::Cancel);
        assert_eq!(acquire.acquire_ended(granted()), Next::Repeat);
        assert_eq!(
            acquire.cancel_ended(Outcome::<_, ()>::Unknown),
            Next::Repeat
        );
        assert_eq!(
            acquire.cancel_ended(Outcome::<_, ()>::Answered(())),
            Next::Done(Ok(()))
        );
    }

    proptest! {
        #[test]
        fn the_watermark_covers_exactly_what_is_over_and_in_the_end_all(
            steps in prop::collection::vec(prop::option::of(0..8_usize), 1..200),
        ) {
            let mut requests = Requests::default();
            let mut open: Vec<u64> = Vec::new();
            let mut before = 0;
            for step in steps {
                match step {
                    Some(which) if which < open.len() => requests.end(open.swap_remove(which)),
                    _ => open.push(requests.begin()),
                }
                let watermark = requests.acknowledged();
                prop_assert!(watermark >= before, "the watermark went down");
                prop_assert!(open.iter().all(|request| *request > watermark));
                prop_assert!(open.is_empty() || open.contains(&(watermark + 1)));
                before = watermark;
            }
            let last = requests.begin();
            requests.end(last);
            open.into_iter().for_each(|request| requests.end(request));
            prop_assert_eq!(requests.acknowledged(), last);
        }
    }
}
