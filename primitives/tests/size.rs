//! What the state counts for is about what it takes: the quota is on the one, and the
//! machine has the other.
//!
//! A process with one test, so that all that is allocated is the state's. Allocators
//! round up, by some percent.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

use std::alloc::System;

use bytes::Bytes;
use cap::Cap;
use conclave_core::{
    machine::Outcome,
    replica::{Answer, AnswerBody},
    state::State,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    Command, DeleteRange, Entry, LockAcquire, LockRelease, OpenSession, Operation, Origin, Put,
    Request, Stamp, Txn, command::Body, operation::Operation as Kind,
    primitive_command::Command as Primitive,
};
use prost::Message as _;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// How much more it may take than it counts for.
const OVER_PERCENT_MAX: u64 = 25;
/// How much less: that fills the quota early, and no machine.
const UNDER_PERCENT_MAX: u64 = 40;
/// Commands in one entry.
const LOT: usize = 256;

type Done = Answer<Primitives>;

struct Made {
    state: State<Primitives>,
}

impl Made {
    fn new() -> Self {
        Self {
            state: State::new(7),
        }
    }

    /// Applies commands, many an entry, as they come from a log; what each came to.
    fn run(&mut self, commands: impl IntoIterator<Item = Body>) -> Vec<Outcome<Done>> {
        let mut commands = commands.into_iter().peekable();
        let mut outcomes = Vec::new();
        while commands.peek().is_some() {
            let lot = commands.by_ref().take(LOT).map(|body| Command {
                origin: Some(Origin::default()),
                body: Some(body),
            });
            let entry = Entry {
                stamp: Some(Stamp::default()),
                commands: lot.collect(),
            };
            let data: Bytes = entry.encode_to_vec().into();
            let index = self.state.applied() + 1;
            let applied = self.state.apply(index, 1, &data).unwrap();
            let each = applied.outcomes.into_iter().map(|(_, outcome)| outcome);
            outcomes.extend(each);
        }
        outcomes
    }

    fn open(&mut self, count: u64) -> Vec<i64> {
        let opened = self.run((0..count).map(|number| {
            Body::OpenSession(OpenSession {
                ttl_ms: 10_000,
                name: format!("worker-{number}"),
                metadata: Default::default(),
                secret: secret(number).into(),
            })
        }));
        let ids = opened.into_iter().map(|outcome| match outcome {
            Outcome::Done(Done {
                body: AnswerBody::SessionOpened { session, .. },
                ..
            }) => session.0,
            other => panic!("{other:?}"),
        });
        ids.collect()
    }
}

/// A secret like no other.
fn secret(number: u64) -> Vec<u8> {
    let spread = u128::from(number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835);
    spread.to_le_bytes().to_vec()
}

fn acquire(name: String, session_id: i64, number: u64) -> Body {
    conclave_primitives::command(Primitive::LockAcquire(LockAcquire {
        name,
        session_id,
        request: Some(Request {
            number,
            // Its client has heard of the ones before.
            acknowledged: number - 1,
            ..Request::default()
        }),
        ..LockAcquire::default()
    }))
}

fn put(key: String, value_bytes: usize) -> Body {
    write(Kind::Put(Put {
        key: key.into(),
        value: vec![7; value_bytes].into(),
        ..Put::default()
    }))
}

fn write(kind: Kind) -> Body {
    Body::Txn(Txn {
        compares: Vec::new(),
        success: vec![Operation {
            operation: Some(kind),
        }],
        failure: Vec::new(),
    })
}

fn plain_keys() -> Made {
    let mut made = Made::new();
    made.run((0..60_000).map(|number| put(format!("config/service/{number:08}"), 60)));
    made
}

fn versions_of_few_keys() -> Made {
    let mut made = Made::new();
    made.run((0..60_000).map(|number| put(format!("config/service/{:08}", number % 5_000), 60)));
    made
}

fn deleted_keys() -> Made {
    let mut made = Made::new();
    for round in 0..60 {
        made.run((0..1_000).map(|number| put(format!("job/{round}/{number}"), 60)));
        let (key, end) = (format!("job/{round}/"), format!("job/{round}0"));
        made.run([write(Kind::DeleteRange(DeleteRange {
            key: key.into(),
            end: end.into(),
            previous: false,
        }))]);
    }
    made
}

fn large_values() -> Made {
    let mut made = Made::new();
    made.run((0..1_000).map(|number| put(format!("blob/{number}"), 20_000)));
    made
}

fn held_locks() -> Made {
    let mut made = Made::new();
    let sessions = made.open(60);
    for number in 0..1_000 {
        let at = sessions.iter().enumerate();
        made.run(at.map(|(at, id)| acquire(format!("bench-{at}-{number}"), *id, number + 1)));
    }
    made
}

fn sessions_with_a_lock_each() -> Made {
    let mut made = Made::new();
    let sessions = made.open(30_000);
    let each = (0..).zip(&sessions);
    made.run(each.map(|(number, id)| acquire(format!("shard/{number}"), *id, 1)));
    made
}

fn waiters() -> Made {
    let mut made = Made::new();
    let sessions = made.open(30_000);
    made.run(sessions.iter().map(|id| acquire("hot".to_owned(), *id, 1)));
    made
}

fn released_locks() -> Made {
    let mut made = Made::new();
    let sessions = made.open(60);
    for number in 0..1_000 {
        let name = |at: usize| format!("bench-{at}");
        let at = sessions.iter().enumerate();
        let held = made.run(at.map(|(at, id)| acquire(name(at), *id, number + 1)));
        // Granted in the same entry, at the place where it would wait.
        let tokens = held.into_iter().map(|outcome| match outcome {
            Outcome::Waiting(place) => place.revision,
            other => panic!("{other:?}"),
        });
        let tokens: Vec<_> = tokens.collect();
        made.run(tokens.into_iter().enumerate().map(|(at, token)| {
            conclave_primitives::command(Primitive::LockRelease(LockRelease {
                name: name(at),
                session_id: sessions[at],
                token,
                ..LockRelease::default()
            }))
        }));
    }
    made
}

#[test]
fn the_size_is_about_what_the_state_takes() {
    type Make = fn() -> Made;
    let mixes: [(&str, Make); 8] = [
        ("plain keys", plain_keys),
        ("versions of few keys", versions_of_few_keys),
        ("deleted keys", deleted_keys),
        ("large values", large_values),
        ("held locks", held_locks),
        ("released locks", released_locks),
        ("sessions with a lock each", sessions_with_a_lock_each),
        ("waiters", waiters),
    ];
    let (mut measured, mut is_off) = (Vec::new(), false);
    for (name, make) in mixes {
        let before = ALLOCATOR.allocated();
        let made = make();
        let takes = (ALLOCATOR.allocated() - before) as u64;
        let counts = made.state.bytes();
        measured.push(format!("{name}: takes {takes} bytes, counts for {counts}"));
        is_off |= takes.saturating_sub(counts) * 100 > takes * OVER_PERCENT_MAX;
        is_off |= counts.saturating_sub(takes) * 100 > takes * UNDER_PERCENT_MAX;
    }
    assert!(!is_off, "{measured:#?}");
}
