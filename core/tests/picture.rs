//! A picture shows the state at which it was begun, whatever is applied while it is
//! being taken, and taking it changes nothing. The machine does nothing, but its
//! commands are numbered, so that sessions change, too.

use bytes::Bytes;
use conclave_core::{
    checkpoint::{Reader, records},
    ids::{LogTime, SessionId},
    keyspace::{Change, Event, Interest, KeyRange, Keyspace, Overlay, Record},
    machine::{Cause, Context, Executed, Machine, Outcome, Settled, View},
    session::EndReason,
    state::State,
};
use conclave_proto::internal::{
    CloseSession, Command, Compact, DeleteRange, Entry, ExpireSessions, OpenSession, Operation,
    Put, Request, Stamp, Txn, command, operation,
};
use proptest::prelude::*;
use prost::Message as _;

const TERM: u64 = 1;

#[derive(Debug, PartialEq)]
struct Notes;

impl Machine for Notes {
    /// A session and a request of it: even ones acknowledge all before them.
    type Command = (SessionId, Request);
    type Reply = ();
    type Rejection = ();
    type Note = ();
    type Event = ();
    type Query = ();
    type Answer = ();

    fn rebuild(_: &Keyspace) -> Self {
        Self
    }

    fn decode(bytes: Bytes) -> Option<Self::Command> {
        let (session, request) = bytes.split_first_chunk()?;
        let number = u64::from_be_bytes(request.try_into().ok()?);
        let request = Request {
            number,
            acknowledged: if number % 2 == 0 { number - 1 } else { 0 },
            ..Request::default()
        };
        Some((SessionId(i64::from_be_bytes(*session)), request))
    }

    fn request((session, request): &Self::Command) -> Option<(SessionId, &Request)> {
        Some((*session, request))
    }

    fn keep(_: &Result<(), ()>) -> Bytes {
        Bytes::new()
    }

    fn recall(_: &Bytes) -> Result<(), ()> {
        Ok(())
    }

    fn withdraw(&self, _: &mut Context<'_>, _: SessionId, _: &[u64]) {}

    fn follow(&self, _: &mut Overlay<'_>) {}

    fn holdings(&self, _: View<'_>, _: SessionId) {}

    fn execute(&self, _: &mut Context<'_>, _: Self::Command) -> Result<Executed<Self>, ()> {
        let outcome = Outcome::Done(());
        Ok(Executed { outcome, note: () })
    }

    fn next_due(&self) -> Option<LogTime> {
        None
    }

    fn fire(&self, _: &mut Context<'_>) {}

    fn outlives(&self, _: &Record, _: EndReason, _: LogTime) -> Option<Bytes> {
        None
    }

    fn settle(&mut self, _: &[Change], _: Cause<'_, ()>) -> Settled<Self> {
        Settled::default()
    }

    fn query(&self, _: View<'_>, (): ()) {}

    fn work((): &()) -> usize {
        0
    }
}

#[derive(Clone, Debug)]
enum Step {
    Open,
    Close(usize),
    Expire(usize),
    Note(usize, u64),
    Put(&'static str, Option<usize>),
    Delete(&'static str, &'static str),
    /// Compacts so many revisions below the newest.
    Compact(u64),
}

fn key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["a", "a/1", "a/2", "b", "b/1", "c", "d"])
}

fn step() -> impl Strategy<Value = Step> {
    let which = || 0..6usize;
    prop_oneof![
        2 => Just(Step::Open),
        1 => which().prop_map(Step::Close),
        1 => which().prop_map(Step::Expire),
        3 => (which(), 1..12u64).prop_map(|(session, request)| Step::Note(session, request)),
        6 => (key(), prop::option::of(which())).prop_map(|(key, lease)| Step::Put(key, lease)),
        3 => (key(), prop::sample::select(vec!["", "\0", "b", "c"]))
            .prop_map(|(key, end)| Step::Delete(key, end)),
        2 => (0..8u64).prop_map(Step::Compact),
    ]
}

/// Steps before the picture is begun, and steps while it is taken, each with how much
/// of it is drawn then.
fn steps() -> impl Strategy<Value = (Vec<Step>, Vec<(Step, usize)>)> {
    (
        prop::collection::vec(step(), 0..40),
        prop::collection::vec((step(), 0..3usize), 0..60),
    )
}

fn body(state: &State<Notes>, step: &Step) -> Option<command::Body> {
    let session = |which: usize| {
        let count = state.sessions().len();
        let (id, _) = state.sessions().iter().nth(which % count.max(1))?;
        Some(id)
    };
    Some(match step {
        Step::Open => command::Body::OpenSession(OpenSession {
            ttl_ms: 1_000,
            name: "name".to_owned(),
            ..OpenSession::default()
        }),
        Step::Close(which) => command::Body::CloseSession(CloseSession {
            session_id: session(*which)?.0,
            attachment: 0,
        }),
        Step::Expire(which) => {
            let id = session(*which)?;
            command::Body::ExpireSessions(ExpireSessions {
                term: TERM,
                session_ids: vec![id.0],
                opened_at_ms: vec![state.sessions().get(id)?.opened_at],
            })
        }
        Step::Note(which, request) => {
            let session = session(*which)?.0.to_be_bytes();
            command::Body::Machine([session, request.to_be_bytes()].concat().into())
        }
        Step::Put(key, lease) => {
            let lease = lease.and_then(session).map_or(0, |id| id.0);
            let value = Bytes::from_static(b"value");
            let key = Bytes::from_static(key.as_bytes());
            txn(operation::Operation::Put(Put {
                key,
                value,
                lease,
                ..Put::default()
            }))
        }
        Step::Delete(key, end) => {
            let (key, end) = (key.as_bytes().into(), end.as_bytes().into());
            txn(operation::Operation::DeleteRange(DeleteRange {
                key,
                end,
                previous: false,
            }))
        }
        Step::Compact(back) => command::Body::Compact(Compact {
            revision: state.keyspace().revision().saturating_sub(*back),
        }),
    })
}

fn txn(operation: operation::Operation) -> command::Body {
    let operation = Operation {
        operation: Some(operation),
    };
    command::Body::Txn(Txn {
        success: vec![operation],
        ..Txn::default()
    })
}

fn entry(state: &State<Notes>, step: &Step) -> Bytes {
    let command = body(state, step).map(|body| Command {
        origin: None,
        body: Some(body),
    });
    let entry = Entry {
        stamp: Some(Stamp {
            log_time_ms: state.applied(),
            date_ms: 0,
        }),
        commands: command.into_iter().collect(),
    };
    entry.encode_to_vec().into()
}

/// All events from a revision on, those of one revision in order of key.
fn events(keyspace: &Keyspace, from: u64) -> Vec<Event> {
    let all = Interest {
        range: KeyRange::prefix(b""),
        puts: true,
        deletes: true,
    };
    let mut events = keyspace
        .events_since(&all, from, usize::MAX, u64::MAX)
        .events;
    // Stable: of one key, what was deleted comes before what was made.
    events.sort_by(|a, b| (a.revision, &a.key).cmp(&(b.revision, &b.key)));
    events
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_picture_is_of_the_state_at_which_it_was_begun((before, meanwhile) in steps()) {
        let mut state = State::<Notes>::new(7);
        // What was there then, and what is there if no picture is taken.
        let (mut then, mut undisturbed) = (State::<Notes>::new(7), State::<Notes>::new(7));
        for step in &before {
            let entry = entry(&state, step);
            for state in [&mut state, &mut then, &mut undisturbed] {
                state.apply(state.applied() + 1, TERM, &entry).unwrap();
            }
        }
        state.begin_image();
        let mut parts = Vec::new();
        for (step, draw) in &meanwhile {
            let entry = entry(&state, step);
            for state in [&mut state, &mut undisturbed] {
                state.apply(state.applied() + 1, TERM, &entry).unwrap();
            }
            parts.extend(state.draw_part(*draw));
        }
        parts.extend(state.draw_part(usize::MAX));
        prop_assert!(!state.is_drawing());
        let mut reader = Reader::default();
        for record in records(parts.into_iter()) {
            reader.take(&record).unwrap();
        }
        let image = reader.finish().unwrap();
        prop_assert_eq!(image.applied(), then.applied());
        let restored = State::<Notes>::restore(image);
        let complete_from = restored.keyspace().complete_from();
        prop_assert!(complete_from <= then.keyspace().compacted() + 1);
        prop_assert_eq!(
            events(restored.keyspace(), complete_from),
            events(then.keyspace(), complete_from)
        );
        prop_assert_eq!(restored, then);
        prop_assert_eq!(state, undisturbed);
    }
}
