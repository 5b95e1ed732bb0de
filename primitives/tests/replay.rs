//! The logs of earlier versions lead to the state that they led to then.
//!
//! A fixture is what a member of that version had in its log: for each entry its
//! term (8 bytes), the length of its data (4 bytes), both little-endian, and the
//! data. Beside it is the digest of the state in the end, which covers every
//! change of a key and what each entry led to.
//!
//! `log-v1` is made by [`history`], with `UPDATE_FIXTURES=1`. Once a version is
//! released its fixture never changes again: what would make this test fail needs
//! a higher apply version, and a fixture of its own. Before the first release it was
//! renewed when the size of the state, which is part of the digest, came to count what
//! memory takes.

#![expect(
    clippy::unwrap_used,
    reason = "a test stops where something is missing"
)]

use std::{env, fs, path::PathBuf};

use bytes::{Buf as _, Bytes};
use conclave_core::{ids::SessionId, machine::Outcome, replica::AnswerBody, state::State};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    AttachSession, CloseSession, Command, Compact, Compare, DeleteRange, Entry, ExpireSessions,
    LockAcquire, LockCancel, LockForceRelease, LockRelease, NoSpace, OpenSession, Operation,
    Origin, PublishMember, Put, RaiseApplyVersion, Range, Request, Stamp, Txn, command, compare,
    operation::Operation as Kind, primitive_command::Command as Primitive,
};
use prost::Message as _;

const CLUSTER: u64 = 7;

/// Applies entries and notes them.
struct Recorder {
    state: State<Primitives>,
    term: u64,
    now: u64,
    fixture: Vec<u8>,
}

impl Recorder {
    fn entry(&mut self, data: &Bytes) -> Option<AnswerBody<Primitives>> {
        self.fixture.extend(self.term.to_le_bytes());
        let length = u32::try_from(data.len()).unwrap();
        self.fixture.extend(length.to_le_bytes());
        self.fixture.extend(data);
        let index = self.state.applied() + 1;
        let mut applied = self.state.apply(index, self.term, data).unwrap();
        match applied.outcomes.pop() {
            Some((_, Outcome::Done(answer))) => Some(answer.body),
            _ => None,
        }
    }

    fn run(&mut self, body: command::Body) -> Option<AnswerBody<Primitives>> {
        self.now += 100;
        let origin = Origin {
            node: 1,
            boot: 2,
            number: self.state.applied(),
        };
        let stamp = Stamp {
            log_time_ms: self.now,
            date_ms: 1_800_000_000_000 + self.now,
        };
        let command = Command {
            origin: Some(origin),
            body: Some(body),
        };
        let entry = Entry {
            stamp: Some(stamp),
            commands: vec![command],
        };
        self.entry(&entry.encode_to_vec().into())
    }

    /// What a leader proposes when its term begins.
    fn begin_term(&mut self) {
        self.term += 1;
        self.entry(&Bytes::new());
    }

    fn open(&mut self, name: &str) -> i64 {
        let open = OpenSession {
            ttl_ms: 10_000,
            name: name.to_owned(),
            metadata: [("host".to_owned(), name.to_owned())].into(),
            secret: secret_of(name),
        };
        match self.run(command::Body::OpenSession(open)) {
            Some(AnswerBody::SessionOpened { session, .. }) => session.0,
            other => panic!("{other:?}"),
        }
    }

    fn acquire(&mut self, session_id: i64, owner: &str, request: u64, wait_ms: Option<u64>) {
        self.lock(Primitive::LockAcquire(LockAcquire {
            name: "lock".to_owned(),
            session_id,
            owner: owner.to_owned(),
            request: Some(Request {
                number: request,
                acknowledged: request.saturating_sub(2),
                ..Request::default()
            }),
            wait_ms,
            ..LockAcquire::default()
        }));
    }

    fn release(&mut self, session_id: i64, token: u64) {
        self.lock(Primitive::LockRelease(LockRelease {
            name: "lock".to_owned(),
            session_id,
            token,
            ..LockRelease::default()
        }));
    }

    fn lock(&mut self, command: Primitive) {
        self.run(conclave_primitives::command(command));
    }

    fn txn(&mut self, compares: Vec<Compare>, success: Vec<Kind>) {
        let operation = |kind| Operation {
            operation: Some(kind),
        };
        let success = success.into_iter().map(operation).collect();
        let txn = Txn {
            compares,
            success,
            failure: Vec::new(),
        };
        self.run(command::Body::Txn(txn));
    }

    fn no_space(&mut self, raised: bool) {
        self.run(command::Body::NoSpace(NoSpace { raised, member: 0 }));
    }
}

fn put(key: &'static str, value: &'static str, lease: i64) -> Kind {
    Kind::Put(Put {
        key: key.into(),
        value: value.into(),
        lease,
        ..Put::default()
    })
}

fn delete(key: &'static str, end: &'static str) -> Kind {
    Kind::DeleteRange(DeleteRange {
        key: key.into(),
        end: end.into(),
        previous: false,
    })
}

fn range(revision: i64) -> Kind {
    Kind::Range(Range {
        key: "a".into(),
        end: "\0".into(),
        revision,
        limit: 2,
        ..Range::default()
    })
}

/// Every command of version 1, most of them both taken and refused.
fn history() -> Recorder {
    let mut recorder = Recorder {
        state: State::new(CLUSTER),
        term: 0,
        now: 0,
        fixture: Vec::new(),
    };
    let r = &mut recorder;
    r.begin_term();
    r.run(command::Body::PublishMember(PublishMember {
        node: 1,
        name: "a".to_owned(),
        client_urls: vec!["http://a:2379".to_owned()],
        apply_version: 1,
    }));
    let raise = RaiseApplyVersion { version: 1 };
    r.run(command::Body::RaiseApplyVersion(raise));
    let sessions = ["one", "two", "three"].map(|name| r.open(name));
    record_locks(r, sessions);
    record_delays(r, sessions);
    record_shared(r, sessions);
    record_keys(r, sessions);
    record_requests(r, sessions);
    r.begin_term();
    // Of another term than that of its entry, then of the same.
    for term in [1, 2] {
        let live = r.state.sessions().get(SessionId(sessions[1]));
        r.run(command::Body::ExpireSessions(ExpireSessions {
            term,
            session_ids: vec![sessions[1]],
            opened_at_ms: live.iter().map(|live| live.opened_at).collect(),
        }));
    }
    for session_id in sessions {
        r.run(command::Body::CloseSession(CloseSession {
            session_id,
            attachment: 2,
        }));
    }
    recorder
}

fn record_locks(r: &mut Recorder, [one, two, three]: [i64; 3]) {
    let name = || "lock".to_owned();
    r.acquire(one, "", 1, None);
    let token = r.state.keyspace().revision();
    r.acquire(two, "", 1, Some(0));
    r.acquire(two, "", 2, Some(150));
    r.acquire(three, "x", 1, None);
    r.acquire(one, "", 1, None);
    r.acquire(one, "", 2, None);
    // The wait of `two` ends by its deadline.
    r.acquire(two, "", 3, None);
    r.release(one, token + 9);
    r.release(one, token);
    let force = |token| {
        Primitive::LockForceRelease(LockForceRelease {
            name: name(),
            reason: "stuck".to_owned(),
            token,
            ..LockForceRelease::default()
        })
    };
    r.lock(force(1));
    r.lock(force(0));
    r.acquire(three, "", 5, None);
    r.lock(Primitive::LockCancel(LockCancel {
        name: name(),
        session_id: three,
        entry: 5,
        ..LockCancel::default()
    }));
    r.acquire(three, "", 5, None);
    r.acquire(three, "y", 0, None);
}

/// The delay of a lost holder: begun by force, not begun again, cut short, and begun
/// by the expiry at the end.
fn record_delays(r: &mut Recorder, [one, two, three]: [i64; 3]) {
    let acquire = |session_id, number, delay_ms| {
        Primitive::LockAcquire(LockAcquire {
            name: "delayed".to_owned(),
            session_id,
            request: numbered(number),
            delay_ms,
            ..LockAcquire::default()
        })
    };
    let force = |skip_delay| {
        Primitive::LockForceRelease(LockForceRelease {
            name: "delayed".to_owned(),
            reason: "stuck".to_owned(),
            skip_delay,
            ..LockForceRelease::default()
        })
    };
    r.lock(acquire(one, 40, 250));
    r.lock(acquire(three, 40, 10_000));
    r.lock(acquire(two, 40, 60_000));
    for skip_delay in [false, false] {
        r.lock(force(skip_delay));
    }
    r.lock(acquire(one, 41, 0));
    // By now the delay is over, and `three` holds.
    for skip_delay in [false, true] {
        r.lock(force(skip_delay));
    }
    // `two` holds until it expires.
}

/// Acquires that share one grant.
fn record_shared(r: &mut Recorder, [one, two, _]: [i64; 3]) {
    let acquire = |session_id, number, reentrant| {
        Primitive::LockAcquire(LockAcquire {
            name: "shared".to_owned(),
            session_id,
            owner: "o".to_owned(),
            request: numbered(number),
            reentrant,
            ..LockAcquire::default()
        })
    };
    r.lock(acquire(one, 50, true));
    let token = r.state.keyspace().revision();
    for request in 51..=54 {
        r.lock(acquire(one, request, request < 54));
    }
    r.lock(acquire(two, 50, true));
    r.lock(Primitive::LockCancel(LockCancel {
        name: "shared".to_owned(),
        session_id: one,
        owner: "o".to_owned(),
        entry: 51,
        request: None,
    }));
    for entry in [52, 52, 0, 50, 50] {
        r.lock(Primitive::LockRelease(LockRelease {
            name: "shared".to_owned(),
            session_id: one,
            owner: "o".to_owned(),
            token,
            entry,
            request: None,
        }));
    }
}

/// A number alone.
fn numbered(number: u64) -> Option<Request> {
    Some(Request {
        number,
        ..Request::default()
    })
}

/// Attachments, and numbered requests that are repeated, over, superseded or forestalled.
fn record_requests(r: &mut Recorder, [one, two, _]: [i64; 3]) {
    let secret = secret_of("one");
    for (replaces, nonce, secret) in [
        (0, 1, secret.clone()),
        (2, 1, secret.clone()),
        (1, 1, Bytes::new()),
        (1, 1, secret.clone()),
        (1, 1, secret),
    ] {
        r.run(command::Body::AttachSession(AttachSession {
            session_id: one,
            secret,
            replaces,
            nonce,
            wanted: vec![2],
        }));
    }
    r.open("one");
    r.acquire(one, "", 12, None);
    r.acquire(two, "", 12, None);
    let release = |number, unfinished| {
        Primitive::LockRelease(LockRelease {
            name: "lock".to_owned(),
            session_id: two,
            token: r.state.keyspace().revision(),
            request: Some(Request {
                number,
                acknowledged: 14,
                unfinished,
                ..Request::default()
            }),
            ..LockRelease::default()
        })
    };
    let releases = [
        release(15, vec![13]),
        release(15, vec![]),
        release(13, vec![]),
    ];
    for release in releases {
        r.lock(release);
    }
    r.lock(Primitive::LockCancel(LockCancel {
        name: "lock".to_owned(),
        session_id: two,
        entry: 16,
        ..LockCancel::default()
    }));
    r.acquire(two, "", 16, None);
}

fn secret_of(name: &str) -> Bytes {
    let mut secret = name.as_bytes().to_vec();
    secret.resize(16, b'.');
    secret.into()
}

fn record_keys(r: &mut Recorder, [one, two, _]: [i64; 3]) {
    r.txn(Vec::new(), vec![put("a", "1", one), put("b", "1", two)]);
    r.txn(Vec::new(), vec![put("a", "2", 0), put("a", "3", 0)]);
    let compare = Compare {
        key: "a".into(),
        result: compare::Result::Equal.into(),
        target: Some(compare::Target::Value("1".into())),
        ..Compare::default()
    };
    r.txn(vec![compare], vec![put("a", "2", one), range(0), range(3)]);
    r.txn(Vec::new(), vec![put("c", "1", 0), delete("b", "c")]);
    r.txn(Vec::new(), vec![delete("lock/", "lock0")]);
    let newest = r.state.keyspace().revision();
    for revision in [newest - 2, newest - 3, newest + 1] {
        r.run(command::Body::Compact(Compact { revision }));
    }
    r.txn(Vec::new(), vec![range(newest.cast_signed() - 3)]);
    r.no_space(true);
    r.txn(Vec::new(), vec![put("d", "1", 0)]);
    r.txn(Vec::new(), vec![delete("c", "")]);
    r.acquire(one, "z", 9, None);
    let open = command::Body::OpenSession(OpenSession::default());
    r.run(open);
    r.no_space(false);
    r.acquire(one, "z", 9, None);
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

#[test]
fn the_log_of_version_1_leads_to_the_same_state_as_ever() {
    if env::var_os("UPDATE_FIXTURES").is_some() {
        let made = history();
        fs::write(fixture("log-v1.bin"), &made.fixture).unwrap();
        let digest = format!("{:016x}\n", made.state.digest());
        fs::write(fixture("log-v1.digest"), digest).unwrap();
    }
    let mut log = Bytes::from(fs::read(fixture("log-v1.bin")).unwrap());
    let mut state = State::<Primitives>::new(CLUSTER);
    while log.has_remaining() {
        let term = log.get_u64_le();
        let length = log.get_u32_le();
        let data = log.split_to(usize::try_from(length).unwrap());
        state.apply(state.applied() + 1, term, &data).unwrap();
    }
    let digest = fs::read_to_string(fixture("log-v1.digest")).unwrap();
    assert_eq!(format!("{:016x}", state.digest()), digest.trim());
    assert_eq!(state.system().apply_version(), 1);
    assert!(state.sessions().is_empty());
}
