//! The decisions of a watch, without clock or I/O: from where to go on after a broken
//! stream, and what of an answer is news. The client drives it over gRPC.
//!
//! Promise: however often the stream breaks and whichever server serves the next one,
//! every event behind the revision at which the watch began is told once, in order,
//! all of a revision together. Until it ends, and then it says from where.

use std::cmp::Ordering;

use conclave_proto::etcd::{
    etcdserverpb::{WatchCreateRequest, WatchResponse},
    mvccpb,
};

use crate::keys::Event;

/// The state of one watch. See the head of this file for what it promises.
#[derive(Clone, Debug)]
pub struct WatchState {
    request: WatchCreateRequest,
    /// The revision of the next event that has not been told; `None` before the
    /// cluster has said at which revision a watch of what is to come begins.
    next: Option<i64>,
    /// Parts of a revision, or of several, of which more are to come.
    parts: Vec<mvccpb::Event>,
    stage: Stage,
}

/// How far the server of the present stream has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Asked,
    /// It has not reached yet where the watch begins.
    Ahead,
    /// It may still be telling the past.
    Begun,
    /// It has told the past.
    CaughtUp,
}

/// In place of the name of a watch: of an answer that is about none.
const NO_WATCH: i64 = -1;
/// A server answers no questions about its progress while it tells the past. That takes
/// moments, but nobody promises how many.
const UNANSWERED_MEANWHILE: u32 = 20;

/// What follows from an answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing to tell.
    Nothing,
    /// From now on nothing is missed. Told once for each stream.
    Live,
    /// These happened, in this order; never none.
    Events(Vec<Event>),
    /// The watch is over.
    Ended(WatchEnd),
}

/// Why the cluster ended a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEnd {
    /// What happened before this revision, and was not told yet, is given up.
    Compacted {
        /// The lowest revision from which one can watch.
        compacted: i64,
    },
    /// The server refuses it, in its own words.
    Refused {
        /// Those words.
        reason: String,
    },
}

impl WatchState {
    /// A watch as asked for; the number of the watch and the progress notices are
    /// this type's own business.
    pub fn new(request: WatchCreateRequest) -> WatchState {
        let next = (request.start_revision != 0).then_some(request.start_revision);
        WatchState {
            request: WatchCreateRequest {
                watch_id: 0,
                // An idle watch learns how far it is, so that a compaction of what
                // it need not hear of does not end it.
                progress_notify: true,
                fragment: true,
                ..request
            },
            next,
            parts: Vec::new(),
            stage: Stage::Asked,
        }
    }

    /// What to ask on a new stream; what came of the one before in parts is forgotten.
    pub fn begin(&mut self) -> WatchCreateRequest {
        self.parts.clear();
        self.stage = Stage::Asked;
        WatchCreateRequest {
            start_revision: self.next.unwrap_or(0),
            ..self.request.clone()
        }
    }

    /// Everything up to this revision has been told; `None` before it is known where
    /// the watch begins.
    pub fn revision(&self) -> Option<i64> {
        self.next.map(|next| next - 1)
    }

    /// So many questions in a row about its progress may the server leave unanswered
    /// before it is taken for dead: none before it has begun, and any number before it
    /// has reached the revision at which the watch begins.
    pub fn unanswered_max(&self) -> u32 {
        match self.stage {
            Stage::Asked => 0,
            Stage::Ahead => u32::MAX,
            Stage::Begun => UNANSWERED_MEANWHILE,
            Stage::CaughtUp => 1,
        }
    }

    /// The server has answered.
    pub fn received(&mut self, answer: WatchResponse) -> Step {
        let revision = answer.header.map_or(0, |header| header.revision);
        if answer.canceled {
            return Step::Ended(end(answer));
        }
        if answer.created {
            // Of one from a given revision this says nothing: its events follow.
            let next = *self.next.get_or_insert(revision + 1);
            self.stage = match next.cmp(&(revision + 1)) {
                Ordering::Less => Stage::Begun,
                Ordering::Equal => Stage::CaughtUp,
                Ordering::Greater => Stage::Ahead,
            };
            return Step::Live;
        }
        if answer.watch_id == NO_WATCH {
            // A sign of life. Its revision is no promise: older versions of etcd give one
            // whose events are still to come.
            self.stage = Stage::CaughtUp;
            return Step::Nothing;
        }
        self.parts.extend(answer.events);
        if answer.fragment {
            return Step::Nothing;
        }
        let next = self.next.unwrap_or(0);
        let events = std::mem::take(&mut self.parts);
        let Some(last) = events.last().map(revision_of) else {
            // Of catching up, the header can be ahead of the events; without events
            // it says that all up to there were told.
            self.next = Some(next.max(revision + 1));
            return Step::Nothing;
        };
        self.next = Some(next.max(last + 1));
        let news: Vec<Event> = events
            .into_iter()
            .filter(|event| revision_of(event) >= next)
            .map(Event::from)
            .collect();
        match news.is_empty() {
            true => Step::Nothing,
            false => Step::Events(news),
        }
    }
}

fn end(answer: WatchResponse) -> WatchEnd {
    match answer {
        answer if answer.compact_revision != 0 => WatchEnd::Compacted {
            compacted: answer.compact_revision,
        },
        answer if answer.cancel_reason.is_empty() => WatchEnd::Refused {
            reason: "the server gave no reason".to_owned(),
        },
        answer => WatchEnd::Refused {
            reason: answer.cancel_reason,
        },
    }
}

fn revision_of(event: &mvccpb::Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

#[cfg(test)]
mod tests {
    use conclave_proto::etcd::etcdserverpb::ResponseHeader;
    use proptest::prelude::*;

    use super::*;

    fn answer(revision: i64) -> WatchResponse {
        WatchResponse {
            header: Some(ResponseHeader {
                revision,
                ..ResponseHeader::default()
            }),
            ..WatchResponse::default()
        }
    }

    fn created(revision: i64) -> WatchResponse {
        WatchResponse {
            created: true,
            ..answer(revision)
        }
    }

    fn event(revision: i64, sub: usize) -> mvccpb::Event {
        mvccpb::Event {
            kv: Some(mvccpb::KeyValue {
                key: vec![u8::try_from(sub).unwrap()].into(),
                mod_revision: revision,
                ..mvccpb::KeyValue::default()
            }),
            ..mvccpb::Event::default()
        }
    }

    fn state(start_revision: i64) -> WatchState {
        WatchState::new(WatchCreateRequest {
            start_revision,
            ..WatchCreateRequest::default()
        })
    }

    #[test]
    fn a_watch_of_what_is_to_come_goes_on_behind_the_revision_at_which_it_began() {
        let mut state = state(0);
        assert_eq!((state.begin().start_revision, state.revision()), (0, None));
        // Broken before it was live: nobody was promised anything.
        assert_eq!(state.begin().start_revision, 0);
        assert_eq!(state.received(created(7)), Step::Live);
        assert_eq!(state.begin().start_revision, 8);
        assert_eq!(state.received(created(20)), Step::Live);
        assert_eq!(state.begin().start_revision, 8, "20 is no promise");
        assert_eq!(state.received(answer(20)), Step::Nothing);
        assert_eq!(
            (state.begin().start_revision, state.revision()),
            (21, Some(20))
        );
    }

    #[test]
    fn a_server_that_tells_the_past_may_be_silent_for_longer() {
        let mut state = state(3);
        state.begin();
        assert_eq!(state.unanswered_max(), 0);
        state.received(created(9));
        assert!(state.unanswered_max() > 1);
        let sign_of_life = WatchResponse {
            watch_id: NO_WATCH,
            ..answer(9)
        };
        assert_eq!(state.received(sign_of_life), Step::Nothing);
        assert_eq!(state.unanswered_max(), 1);
        assert_eq!(state.begin().start_revision, 3, "9 is no promise");
        assert_eq!(state.unanswered_max(), 0);
        state.received(created(2));
        assert_eq!(state.unanswered_max(), 1, "there is no past");
        state.begin();
        state.received(created(1));
        assert_eq!(state.unanswered_max(), u32::MAX);
    }

    #[test]
    fn ends_are_told_with_what_they_say() {
        let compacted = WatchResponse {
            canceled: true,
            compact_revision: 9,
            ..answer(0)
        };
        let end = WatchEnd::Compacted { compacted: 9 };
        assert_eq!(state(3).received(compacted), Step::Ended(end));
        let refused = WatchResponse {
            created: true,
            canceled: true,
            watch_id: -1,
            cancel_reason: "no".to_owned(),
            ..answer(4)
        };
        let reason = "no".to_owned();
        let end = WatchEnd::Refused { reason };
        assert_eq!(state(3).received(refused), Step::Ended(end));
    }

    /// How one stream goes: where the server is when it begins, how many revisions it
    /// puts into one answer, how many events into one part, and after how many
    /// answers it breaks.
    #[derive(Clone, Debug)]
    struct Stream {
        behind: i64,
        batch: usize,
        part: usize,
        breaks_after: usize,
        progress: bool,
    }

    fn stream() -> impl Strategy<Value = Stream> {
        (
            0..20_i64,
            1..6_usize,
            1..4_usize,
            0..12_usize,
            any::<bool>(),
        )
            .prop_map(|(behind, batch, part, breaks_after, progress)| Stream {
                behind,
                batch,
                part,
                breaks_after,
                progress,
            })
    }

    /// What a server says on one stream, as etcd does: catching up with headers that
    /// are ahead of the events, progress only when all was told.
    fn answers(
        history: &[Vec<mvccpb::Event>],
        start: i64,
        newest: i64,
        how: &Stream,
    ) -> Vec<WatchResponse> {
        let mut answers = vec![created(newest)];
        let from = if start == 0 { newest + 1 } else { start };
        let revisions: Vec<i64> = (from..=newest)
            .filter(|revision| !history[usize::try_from(*revision).unwrap()].is_empty())
            .collect();
        for batch in revisions.chunks(how.batch) {
            let events: Vec<mvccpb::Event> = batch
                .iter()
                .flat_map(|revision| history[usize::try_from(*revision).unwrap()].clone())
                .collect();
            let parts = events.chunks(how.part);
            let count = parts.len();
            answers.extend(parts.enumerate().map(|(n, events)| WatchResponse {
                events: events.to_vec(),
                fragment: n + 1 < count,
                ..answer(newest)
            }));
        }
        if how.progress {
            answers.push(answer(newest));
        }
        answers
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_doubled_however_often_the_stream_breaks(
            sizes in prop::collection::vec(0..4_usize, 5..60),
            start in 0..20_i64,
            streams in prop::collection::vec(stream(), 1..12),
        ) {
            let history: Vec<Vec<mvccpb::Event>> = sizes
                .iter()
                .enumerate()
                .map(|(revision, size)| {
                    let revision = i64::try_from(revision).unwrap();
                    (0..*size).map(|sub| event(revision, sub)).collect()
                })
                .collect();
            let newest = i64::try_from(history.len()).unwrap() - 1;
            let mut state = state(start.min(newest));
            let mut told: Vec<Event> = Vec::new();
            // The last stream comes through to the end.
            let last = Stream { behind: 0, batch: 3, part: 2, breaks_after: 1_000, progress: true };
            for how in streams.iter().chain([&last]) {
                let request = state.begin();
                prop_assert!(request.fragment && request.progress_notify);
                let at = (newest - how.behind).max(0);
                let said = answers(&history, request.start_revision, at, how);
                for answer in said.into_iter().take(how.breaks_after) {
                    let before = state.revision();
                    match state.received(answer) {
                        Step::Events(events) => told.extend(events),
                        Step::Ended(end) => prop_assert!(false, "{end:?}"),
                        Step::Nothing | Step::Live => {}
                    }
                    prop_assert!(before <= state.revision(), "never goes back");
                }
            }
            let begin = match start.min(newest) {
                // Where it began was told by the first stream that lived so long.
                0 => streams
                    .iter()
                    .find(|how| how.breaks_after > 0)
                    .map_or(newest, |how| (newest - how.behind).max(0)) + 1,
                start => start,
            };
            let expected: Vec<Event> = history
                .iter()
                .skip(usize::try_from(begin).unwrap())
                .flatten()
                .cloned()
                .map(Event::from)
                .collect();
            prop_assert_eq!(told, expected);
            prop_assert_eq!(state.revision(), Some(newest.max(begin - 1)));
        }
    }
}
