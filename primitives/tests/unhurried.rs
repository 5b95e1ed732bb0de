//! Which requests can wait for the next, and at which places any may wait at all.

use conclave_core::{
    ids::SessionId,
    machine::{Machine as _, Outcome, Place},
    replica::AnswerBody,
    state::State,
};
use conclave_primitives::{Primitives, command};
use conclave_proto::internal::{
    Command, ElectCampaign, Entry, LockAcquire, LockRelease, OpenSession, Origin, Stamp,
    command::Body, primitive_command::Command as Primitive,
};
use prost::Message as _;

fn run(state: &mut State<Primitives>, body: Body) -> Outcome<AnswerBody<Primitives>> {
    let entry = Entry {
        stamp: Some(Stamp::default()),
        commands: vec![Command {
            origin: Some(Origin::default()),
            body: Some(body),
        }],
    };
    let data = entry.encode_to_vec().into();
    let applied = state.apply(state.applied() + 1, 1, &data);
    let mut outcomes = applied.expect("it is known").outcomes;
    match outcomes.pop().expect("one for each command").1 {
        Outcome::Done(answer) => Outcome::Done(answer.body),
        Outcome::Waiting(place) => Outcome::Waiting(place),
    }
}

fn open(state: &mut State<Primitives>) -> SessionId {
    match run(state, Body::OpenSession(OpenSession::default())) {
        Outcome::Done(AnswerBody::SessionOpened { session, .. }) => session,
        other => panic!("{other:?}"),
    }
}

fn acquire(session: SessionId, plain: bool, wait_ms: Option<u64>) -> Primitive {
    Primitive::LockAcquire(LockAcquire {
        name: "it".to_owned(),
        session_id: session.0,
        wait_ms,
        plain,
        ..LockAcquire::default()
    })
}

fn campaign(session: SessionId, wait_ms: Option<u64>) -> Primitive {
    Primitive::ElectCampaign(ElectCampaign {
        name: "it".to_owned(),
        session_id: session.0,
        wait_ms,
        ..ElectCampaign::default()
    })
}

#[test]
fn who_is_third_can_wait_and_who_is_second_or_there_or_only_tries_cannot() {
    let mut state = State::new(1);
    let [first, second, third] = [(); 3].map(|()| open(&mut state));
    let can_wait =
        |state: &State<Primitives>, command| state.machine().can_wait(state.view(), &command);
    assert!(!can_wait(&state, acquire(first, false, None)));
    run(&mut state, command(acquire(first, false, None)));
    assert!(!can_wait(&state, acquire(second, true, None)));
    run(&mut state, command(campaign(second, None)));
    for wait_ms in [None, Some(5_000)] {
        assert!(can_wait(&state, acquire(third, false, wait_ms)));
        assert!(can_wait(&state, acquire(third, true, wait_ms)));
        assert!(can_wait(&state, campaign(third, wait_ms)));
    }
    assert!(!can_wait(&state, acquire(third, false, Some(0))));
    assert!(!can_wait(&state, campaign(third, Some(0))));
    for there in [first, second] {
        assert!(!can_wait(&state, acquire(there, true, None)));
    }
    let release = Primitive::LockRelease(LockRelease::default());
    assert!(!can_wait(&state, release));
    let nobody = LockAcquire::default();
    assert!(!can_wait(&state, Primitive::LockAcquire(nobody)));
}

#[test]
fn nobody_waits_at_a_key_without_a_session_in_its_name() {
    let may_be_awaited = |key: &'static str| {
        Primitives::may_be_awaited(&Place {
            revision: 7,
            key: key.into(),
        })
    };
    assert!(may_be_awaited("it/2a"));
    assert!(may_be_awaited("it/2a:owner"));
    assert!(!may_be_awaited("registry/pods/web"));
}
