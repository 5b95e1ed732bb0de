//! What one session can have is bounded, since it is listed, handed over and ended in
//! one go.

use conclave_core::{
    ids::SessionId,
    limits,
    machine::Outcome,
    replica::{Answer, AnswerBody},
    state::State,
};
use conclave_primitives::{Primitives, Rejection, command};
use conclave_proto::internal::{
    Command, DeleteRange, ElectCampaign, Entry, LockAcquire, LockRelease, OpenSession, Origin, Put,
    Stamp, command::Body, primitive_command::Command as Primitive,
};
use prost::Message as _;

/// Applies commands in one entry.
fn run(
    state: &mut State<Primitives>,
    bodies: impl Iterator<Item = Body>,
) -> Vec<Outcome<Answer<Primitives>>> {
    let command = |body| Command {
        origin: Some(Origin::default()),
        body: Some(body),
    };
    let entry = Entry {
        stamp: Some(Stamp::default()),
        commands: bodies.map(command).collect(),
    };
    let data = entry.encode_to_vec().into();
    let applied = state.apply(state.applied() + 1, 1, &data);
    let outcomes = applied.expect("all of them are known").outcomes.into_iter();
    outcomes.map(|(_, outcome)| outcome).collect()
}

fn open(state: &mut State<Primitives>) -> i64 {
    let open = Body::OpenSession(OpenSession::default());
    match run(state, std::iter::once(open)).pop() {
        Some(Outcome::Done(Answer {
            body: AnswerBody::SessionOpened { session, .. },
            ..
        })) => session.0,
        other => panic!("{other:?}"),
    }
}

/// The places of those that are let in.
fn acquire(
    state: &mut State<Primitives>,
    session_id: i64,
    numbers: std::ops::Range<usize>,
) -> Vec<u64> {
    let acquire = |number| {
        command(Primitive::LockAcquire(LockAcquire {
            name: format!("l{number}"),
            session_id,
            ..LockAcquire::default()
        }))
    };
    places(run(state, numbers.map(acquire)))
}

/// The same for elections.
fn campaign(
    state: &mut State<Primitives>,
    session_id: i64,
    numbers: std::ops::Range<usize>,
) -> Vec<u64> {
    let campaign = |number| {
        command(Primitive::ElectCampaign(ElectCampaign {
            name: format!("e{number}"),
            session_id,
            ..ElectCampaign::default()
        }))
    };
    places(run(state, numbers.map(campaign)))
}

fn places(outcomes: Vec<Outcome<Answer<Primitives>>>) -> Vec<u64> {
    let places = outcomes.into_iter().filter_map(|outcome| match outcome {
        Outcome::Waiting(place) => Some(place.revision),
        Outcome::Done(Answer {
            body: AnswerBody::Machine(Err(Rejection::TooManyLocks)),
            ..
        }) => None,
        other => panic!("{other:?}"),
    });
    places.collect()
}

#[test]
fn a_session_contends_for_so_many_locks_and_for_another_when_it_has_given_one_up() {
    let mut state = State::new(1);
    let (one, other) = (open(&mut state), open(&mut state));
    let max = limits::SESSION_LOCKS_MAX;
    let places = acquire(&mut state, one, 0..max + 3);
    assert_eq!(places.len(), max);
    assert_eq!(acquire(&mut state, other, max..max + 3).len(), 3);
    let release = LockRelease {
        name: "l0".to_owned(),
        session_id: one,
        token: places[0],
        ..LockRelease::default()
    };
    let release = command(Primitive::LockRelease(release));
    run(&mut state, std::iter::once(release));
    assert_eq!(acquire(&mut state, one, max..max + 3).len(), 1);
}

#[test]
fn elections_count_as_locks_do() {
    let mut state = State::new(1);
    let session = open(&mut state);
    let max = limits::SESSION_LOCKS_MAX;
    assert_eq!(acquire(&mut state, session, 0..1).len(), 1);
    assert_eq!(campaign(&mut state, session, 0..max).len(), max - 1);
    assert_eq!(acquire(&mut state, session, 1..2), [0; 0]);
    // An etcd client takes one away.
    let delete = DeleteRange {
        key: "e0/".into(),
        end: "e00".into(),
        previous: false,
    };
    run(&mut state, std::iter::once(Body::DeleteRange(delete)));
    assert_eq!(acquire(&mut state, session, 1..3).len(), 1);
}

#[test]
fn keys_of_a_session_that_are_no_contenders_of_its_do_not_count() {
    let mut state = State::new(1);
    let (one, other) = (open(&mut state), open(&mut state));
    let max = limits::SESSION_LOCKS_MAX;
    let put = |number| {
        Body::Put(Put {
            // Also what has the form of a contender, but of another session.
            key: match number % 2 {
                0 => format!("services/web/{number}"),
                _ => format!("l{number}/{}", SessionId(other)),
            }
            .into(),
            lease: one,
            ..Put::default()
        })
    };
    run(&mut state, (0..max + 1).map(put));
    assert_eq!(state.keyspace().keys_bound(SessionId(one)), max + 1);
    assert_eq!(acquire(&mut state, one, max + 1..max + 4).len(), 3);
}
