//! The machine under test as core runs it: one state, one command an entry.

use bytes::Bytes;
use conclave_core::{
    checkpoint::{Reader, records},
    ids::{LogTime, SessionId},
    machine::{Machine as _, Outcome},
    replica::{Answer, AnswerBody},
    state::{Applied, State},
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    Command, Entry, ExpireSessions, OpenSession, Origin, Stamp, command,
};
use prost::Message as _;

const TERM: u64 = 1;

/// Applies commands. After each one the index must equal the one made from the
/// keys alone, and the state the one read back from a checkpoint, with which it
/// goes on.
pub(crate) struct Driver {
    pub(crate) state: State<Primitives>,
    pub(crate) now: LogTime,
}

/// What one command led to.
pub(crate) struct Step {
    pub(crate) outcome: Outcome<Answer<Primitives>>,
    pub(crate) applied: Applied<Primitives>,
}

impl Driver {
    pub(crate) fn new() -> Self {
        Self {
            state: State::new(1),
            now: 0,
        }
    }

    pub(crate) fn run(&mut self, body: command::Body) -> Step {
        let origin = Origin {
            node: 1,
            boot: 1,
            number: self.state.applied(),
        };
        let command = Command {
            origin: Some(origin),
            body: Some(body),
        };
        let mut applied = self.apply(vec![command]);
        let (_, outcome) = applied.outcomes.pop().expect("each command has an outcome");
        Step { outcome, applied }
    }

    /// Lets log time pass.
    pub(crate) fn pass(&mut self, ms: u64) -> Applied<Primitives> {
        self.now += ms;
        self.apply(Vec::new())
    }

    /// Opens a session, and says which.
    pub(crate) fn open(&mut self, name: &str, secret: Bytes) -> Option<SessionId> {
        match self.open_with(name, secret).outcome {
            Outcome::Done(Answer {
                body: AnswerBody::SessionOpened { session, .. },
                ..
            }) => Some(session),
            _ => None,
        }
    }

    fn open_with(&mut self, name: &str, secret: Bytes) -> Step {
        self.run(command::Body::OpenSession(OpenSession {
            ttl_ms: 10_000,
            name: name.to_owned(),
            secret,
            ..OpenSession::default()
        }))
    }

    pub(crate) fn expire(&mut self, session: SessionId) -> Step {
        self.run(command::Body::ExpireSessions(ExpireSessions {
            term: TERM,
            session_ids: vec![session.0],
            opened_at_ms: vec![
                self.state
                    .sessions()
                    .get(session)
                    .map_or(0, |live| live.opened_at),
            ],
        }))
    }

    fn apply(&mut self, commands: Vec<Command>) -> Applied<Primitives> {
        let stamp = Stamp {
            log_time_ms: self.now,
            date_ms: 0,
        };
        let entry = Entry {
            stamp: Some(stamp),
            commands,
        };
        let data = Bytes::from(entry.encode_to_vec());
        let applied = self
            .state
            .apply(self.state.applied() + 1, TERM, &data)
            .expect("this version knows all of its own commands");
        assert_eq!(
            *self.state.machine(),
            Primitives::rebuild(self.state.keyspace()),
            "the index must follow from the keys alone"
        );
        self.restart();
        applied
    }

    /// Goes on from a checkpoint of the state.
    fn restart(&mut self) {
        let mut reader = Reader::default();
        self.state.begin_image();
        let whole = self.state.draw_part(usize::MAX);
        for record in records(whole.into_iter()) {
            reader.take(&record).expect("it was just written");
        }
        let image = reader.finish().expect("it is whole");
        let restored = State::restore(image);
        assert_eq!(restored, self.state, "a checkpoint holds everything");
        self.state = restored;
    }
}
