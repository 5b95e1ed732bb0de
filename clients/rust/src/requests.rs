//! Numbered requests of one session, without clock or I/O: which number comes
//! next, which are over, and what follows from each outcome of an attempt. The
//! client drives it over gRPC, the simulator over its own network.
//!
//! Whatever happens to messages, a request ends in exactly one of: answered,
//! refused, or, an acquire, withdrawn with the cluster's word for it. Until then its
//! number is never acknowledged, so that the cluster goes on answering for it, with
//! the first answer.

use std::collections::BTreeSet;

use bytes::Bytes;
use conclave_proto::v1::RequestNumber;

/// So many numbers may be over that an older one keeps from being acknowledged by a
/// watermark alone, before the unfinished ones are listed.
const OVER_MAX: usize = 64;
/// As many unfinished numbers as the cluster takes.
const UNFINISHED_MAX: usize = 4_096;

/// The numbers of one session.
#[derive(Clone, Debug)]
pub struct Requests {
    attachment: u64,
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

impl Default for Requests {
    /// Those of a session that this client opened.
    fn default() -> Requests {
        Requests::attached(1, 0)
    }
}

impl Requests {
    /// Those of an attachment to a session whose numbers were used up to `last`.
    pub fn attached(attachment: u64, last: u64) -> Requests {
        Requests {
            attachment,
            last,
            in_flight: BTreeSet::new(),
        }
    }

    /// Which attachment to the session they belong to.
    pub fn attachment(&self) -> u64 {
        self.attachment
    }

    /// Takes the next number. It is in flight until [`Requests::end`].
    pub fn begin(&mut self) -> u64 {
        self.last += 1;
        self.in_flight.insert(self.last);
        self.last
    }

    /// A number of the attachment before goes on: it is in flight again.
    pub fn resume(&mut self, request: u64) {
        self.in_flight.insert(request);
    }

    /// This number is over: it will never be sent again.
    pub fn end(&mut self, request: u64) {
        self.in_flight.remove(&request);
    }

    /// Whether no number is in flight.
    pub fn is_idle(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// What is sent with a request: its number, and the word for those that are over,
    /// which costs next to nothing as long as no request stays behind for long.
    pub fn number(&self, request: u64) -> RequestNumber {
        let watermark = self.in_flight.first().map_or(self.last, |first| first - 1);
        let open = self.in_flight.len();
        let over = usize::try_from(self.last - watermark).map_or(usize::MAX, |all| all - open);
        let mut number = RequestNumber {
            attachment: self.attachment,
            request,
            acknowledged: watermark,
            unfinished: Vec::new(),
        };
        if over > OVER_MAX.max(open) {
            let beyond = self.in_flight.iter().nth(UNFINISHED_MAX);
            number.acknowledged = beyond.map_or(self.last, |beyond| beyond - 1);
            let unfinished = self.in_flight.iter().take(UNFINISHED_MAX);
            number.unfinished = unfinished.copied().collect();
        }
        number
    }
}

impl<T, R> Outcome<T, R> {
    /// What follows for a numbered request, which may always be sent again.
    pub fn next(self) -> Next<T, R> {
        match self {
            Outcome::Answered(answer) => Next::Done(Ok(answer)),
            Outcome::Refused(refusal) => Next::Done(Err(refusal)),
            Outcome::NotApplied | Outcome::Unknown => Next::Repeat,
        }
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
            _ if self.withdrawn => Next::Repeat,
            outcome => outcome.next(),
        }
    }

    /// An attempt to cancel ended. A refusal ends it too: the number is over,
    /// or the session is.
    pub fn cancel_ended<R>(&self, outcome: Outcome<(), R>) -> Next<(), R> {
        outcome.next()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whatever_may_not_have_been_done_is_sent_again() {
        assert_eq!(Outcome::<(), ()>::NotApplied.next(), Next::Repeat);
        assert_eq!(Outcome::<(), ()>::Unknown.next(), Next::Repeat);
        assert_eq!(Outcome::<_, ()>::Answered(1).next(), Next::Done(Ok(1)));
        assert_eq!(Outcome::<(), _>::Refused(1).next(), Next::Done(Err(1)));
    }

    #[test]
    fn one_long_request_does_not_keep_all_others_from_being_over() {
        let mut requests = Requests::default();
        let long = requests.begin();
        for _ in 0..OVER_MAX {
            let short = requests.begin();
            assert_eq!(requests.number(short).acknowledged, 0);
            requests.end(short);
        }
        let next = requests.begin();
        assert_eq!(requests.number(next).unfinished, []);
        requests.end(next);
        let next = requests.begin();
        let number = requests.number(next);
        assert_eq!(number.acknowledged, next);
        assert_eq!(number.unfinished, [long, next]);
    }

    #[test]
    fn an_attachment_goes_on_where_the_one_before_was() {
        let mut requests = Requests::attached(3, 7);
        requests.resume(5);
        let next = requests.begin();
        let number = requests.number(next);
        assert_eq!((number.attachment, number.request), (3, 8));
        assert_eq!(number.acknowledged, 4);
        requests.end(5);
        assert_eq!(requests.number(next).acknowledged, 7);
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
        fn what_is_acknowledged_is_over_and_in_the_end_all_is(
            steps in prop::collection::vec(prop::option::of(0..90_usize), 1..400),
        ) {
            let mut requests = Requests::default();
            let mut open: Vec<u64> = Vec::new();
            let mut kept = BTreeSet::new();
            for step in steps {
                match step {
                    Some(which) if which < open.len() => requests.end(open.swap_remove(which)),
                    _ => open.push(requests.begin()),
                }
                let number = requests.number(requests.last);
                let is_over = |request: &u64| {
                    *request <= number.acknowledged && !number.unfinished.contains(request)
                };
                prop_assert!(!open.iter().any(is_over));
                prop_assert!(number.unfinished.is_sorted());
                kept.extend(1..=requests.last);
                kept.retain(|request| !is_over(request));
                prop_assert!(kept.len() <= 2 * open.len() + OVER_MAX + 1);
            }
            let last = requests.begin();
            requests.end(last);
            open.into_iter().for_each(|request| requests.end(request));
            prop_assert_eq!(requests.number(0).acknowledged, last);
        }
    }
}
