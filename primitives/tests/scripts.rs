//! Golden scripts: `scripts/<behaviour>.txt` says what happens, step by step.
//!
//! A line `> COMMAND` is applied as one entry; the lines under it are what came
//! of it: the outcome, then `PLACE: ...` for each wait that ended, then
//! `to SESSION: ...` for what sessions are told. `<NAME>` stands for the id of the
//! session of that name. Run with `UPDATE_SCRIPTS=1` to write what is true now.
//!
//! ```text
//! open SESSION [secret=TEXT] | close SESSION [attachment=N] | expire SESSION | pass MS
//! attach SESSION [secret=TEXT] replaces=N nonce=N [wanted=N,...]
//! acquire SESSION LOCK [owner=O] [REQUEST] [tag=N] [wait=MS] [delay=MS] [reentrant=1]
//!   [plain=1]
//! release SESSION LOCK token=N [owner=O] [entry=N] [REQUEST]
//! cancel SESSION LOCK [owner=O] entry=N [REQUEST]
//! campaign SESSION ELECTION [owner=O] [REQUEST] [tag=N] [wait=MS] [value=TEXT] [plain=1]
//! proclaim SESSION ELECTION token=N [owner=O] [value=TEXT] [REQUEST]
//! resign SESSION ELECTION token=N [owner=O] [REQUEST]
//!   REQUEST: [request=N] [acknowledged=N] [unfinished=N,...] [attachment=N]
//! force LOCK [token=N] [skip_delay=1] reason=TEXT
//! put KEY... [value=TEXT] [lease=SESSION] | delete KEY...
//! locks [LOCK] [after=LOCK] [limit=N] | check LOCK token=N | grants SESSION
//! elections [ELECTION] [after=ELECTION] [limit=N] | leader ELECTION
//! keys
//! ```

#![expect(
    clippy::unwrap_used,
    reason = "a script that cannot be read is a failed test"
)]

mod harness;

use std::{collections::BTreeMap, env, fmt::Write as _, fs, path::Path};

use bytes::Bytes;
use conclave_core::{
    ids::SessionId,
    keyspace::KeyRange,
    limits,
    machine::{Machine as _, Outcome, Place},
    replica::{AnswerBody, EventBody},
    requests::NotRun,
    session::EndReason,
    state::Applied,
};
use conclave_primitives::{
    Answer as Found, Contender, Event, Held, Leader, LossReason, Primitives, Query, Rejection,
    Reply, Waiting, command,
};
use conclave_proto::internal::{
    AttachSession, CloseSession, DeleteRange, ElectCampaign, ElectProclaim, ElectResign,
    LockAcquire, LockCancel, LockForceRelease, LockRelease, NoSpace, Operation, Put, Request, Txn,
    command::Body, operation, primitive_command::Command,
};
use harness::{Driver, Step};

/// Too long for a script: more waiters than one answer shows.
#[test]
fn a_list_shows_a_bounded_number_of_waiters_and_counts_the_rest() {
    let mut driver = Driver::new();
    let put = |key: String| Operation {
        operation: Some(operation::Operation::Put(Put {
            key: key.into(),
            ..Put::default()
        })),
    };
    let waiters = limits::LIST_WAITERS_MAX / 2 + 1;
    for lock in ["a", "b", "c"] {
        let contenders = (0..=waiters).map(|number| format!("{lock}/{number}"));
        let success = contenders.map(put).collect();
        driver.run(Body::Txn(Txn {
            success,
            ..Txn::default()
        }));
    }
    let query = Query::Locks {
        name: None,
        after: String::new(),
        limit: 0,
    };
    let state = &driver.state;
    let Found::Locks { locks, .. } = state.machine().query(state.view(), query) else {
        panic!("not a list of locks");
    };
    let counts: Vec<_> = locks
        .iter()
        .map(|lock| (lock.waiters.len(), lock.waiters_total))
        .collect();
    assert_eq!(
        counts,
        [(waiters, waiters), (waiters - 2, waiters), (0, waiters)]
    );
}

/// Too long for a script: a session with as many unfinished requests as it may have.
#[test]
fn a_place_is_given_up_even_if_no_more_requests_can_be_noted() {
    let mut driver = Driver::new();
    let id = driver.open("a", Bytes::new()).unwrap().0;
    let name = || "deploy".to_owned();
    let acquire = |number| {
        let request = Request {
            number,
            ..Request::default()
        };
        command(Command::LockAcquire(LockAcquire {
            name: name(),
            session_id: id,
            request: Some(request),
            ..LockAcquire::default()
        }))
    };
    let cancel = |entry| {
        command(Command::LockCancel(LockCancel {
            name: name(),
            session_id: id,
            entry,
            ..LockCancel::default()
        }))
    };
    let last = limits::REQUESTS_OPEN_MAX as u64;
    for number in 1..last {
        driver.run(cancel(number));
    }
    driver.run(acquire(last));
    let refused = driver.run(acquire(last + 1));
    let Outcome::Done(refused) = refused.outcome else {
        panic!("it waits");
    };
    assert!(matches!(refused.body, AnswerBody::NotRun(NotRun::TooMany)));
    assert_eq!(
        outcome(driver.run(cancel(last + 1))),
        Err(Rejection::TooManyRequests),
        "nothing is there to be given up"
    );
    assert_eq!(outcome(driver.run(cancel(last))), Ok(Reply::Cancelled));
    let other = driver.open("b", Bytes::new()).unwrap().0;
    let again = driver.run(command(Command::LockAcquire(LockAcquire {
        name: name(),
        session_id: other,
        wait_ms: Some(0),
        ..LockAcquire::default()
    })));
    assert!(matches!(again.outcome, Outcome::Waiting(_)), "it is free");
}

/// Not in a script, since no command of the mutex raises the alarm.
#[test]
fn above_the_quota_a_shared_grant_is_given_back_and_taken_by_force() {
    let mut driver = Driver::new();
    let session_id = driver.open("a", Bytes::new()).unwrap().0;
    let name = || "deploy".to_owned();
    let acquire = |tag| {
        command(Command::LockAcquire(LockAcquire {
            name: name(),
            session_id,
            tag,
            delay_ms: 100,
            reentrant: true,
            ..LockAcquire::default()
        }))
    };
    driver.run(acquire(1));
    driver.run(acquire(2));
    driver.run(Body::NoSpace(NoSpace {
        raised: true,
        member: 0,
    }));
    let refused = driver.run(acquire(3)).outcome;
    let Outcome::Done(refused) = refused else {
        panic!("it waits");
    };
    assert!(matches!(refused.body, AnswerBody::NoSpace));
    let release = LockRelease {
        name: name(),
        session_id,
        token: 2,
        ..LockRelease::default()
    };
    let released = driver.run(command(Command::LockRelease(release)));
    assert_eq!(outcome(released), Ok(Reply::Released));
    let force = LockForceRelease {
        name: name(),
        reason: "stuck".to_owned(),
        ..LockForceRelease::default()
    };
    let forced = driver.run(command(Command::LockForceRelease(force)));
    assert!(matches!(outcome(forced), Ok(Reply::ForceReleased(_))));
}

fn outcome(step: Step) -> Result<Reply, Rejection> {
    match step.outcome {
        Outcome::Done(answer) => match answer.body {
            AnswerBody::Machine(result) => result,
            other => panic!("no answer of the mutex: {other:?}"),
        },
        Outcome::Waiting(place) => panic!("waits at {place:?}"),
    }
}

#[test]
fn every_script_tells_the_truth() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let update = env::var_os("UPDATE_SCRIPTS").is_some();
    let mut wrong = Vec::new();
    let mut count = 0;
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let told = fs::read_to_string(&path).unwrap();
        let true_now = Script::new().run(&told);
        count += 1;
        if told == true_now {
            continue;
        }
        if update {
            fs::write(&path, &true_now).unwrap();
        } else {
            wrong.push(format!("{}, which is now:\n{true_now}", path.display()));
        }
    }
    assert!(count > 0, "there are no scripts");
    assert!(wrong.is_empty(), "wrong:\n{}", wrong.join("\n"));
}

struct Script {
    driver: Driver,
    sessions: BTreeMap<String, SessionId>,
}

/// The words of a command: plain ones, and `name=value`.
struct Words<'a> {
    plain: Vec<&'a str>,
    named: BTreeMap<&'a str, &'a str>,
}

impl<'a> Words<'a> {
    fn new(line: &'a str) -> Self {
        // A reason takes the rest of its line.
        let (line, reason) = match line.split_once(" reason=") {
            Some((line, reason)) => (line, Some(("reason", reason))),
            None => (line, None),
        };
        let (named, plain): (Vec<&str>, _) =
            line.split_whitespace().partition(|word| word.contains('='));
        let named = named.into_iter().filter_map(|word| word.split_once('='));
        Self {
            plain,
            named: named.chain(reason).collect(),
        }
    }

    fn text(&self, name: &str) -> String {
        self.named.get(name).copied().unwrap_or_default().to_owned()
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.named.get(name).map(|number| number.parse().unwrap())
    }

    fn numbers(&self, name: &str) -> Vec<u64> {
        let list = self.named.get(name).copied().unwrap_or_default();
        let numbers = list.split(',').filter(|number| !number.is_empty());
        numbers.map(|number| number.parse().unwrap()).collect()
    }
}

impl Script {
    fn new() -> Self {
        Self {
            driver: Driver::new(),
            sessions: BTreeMap::new(),
        }
    }

    /// The script with the outputs that its commands have.
    fn run(&mut self, script: &str) -> String {
        let mut out = String::new();
        let mut in_output = false;
        for line in script.lines() {
            if let Some(command) = line.strip_prefix("> ") {
                writeln!(out, "{line}").unwrap();
                out.push_str(&self.execute(command));
                in_output = true;
            } else if line.is_empty() || line.starts_with('#') || !in_output {
                writeln!(out, "{line}").unwrap();
                in_output = false;
            }
        }
        out
    }

    fn execute(&mut self, line: &str) -> String {
        let words = Words::new(line);
        let mut plain = words.plain.iter().copied();
        let verb = plain.next().unwrap();
        let rest: Vec<&str> = plain.collect();
        let first = rest.first().copied().unwrap_or_default();
        match verb {
            "open" => {
                let Some(id) = self.driver.open(first, secret(&words)) else {
                    return "refused: it has ended\n".to_owned();
                };
                self.sessions.insert(first.to_owned(), id);
                String::new()
            }
            "close" => {
                let close = CloseSession {
                    session_id: self.session(first).0,
                    attachment: words.number("attachment").unwrap_or_default(),
                };
                let step = self.driver.run(Body::CloseSession(close));
                self.report(step)
            }
            "attach" => {
                let attach = AttachSession {
                    session_id: self.session(first).0,
                    secret: secret(&words),
                    replaces: words.number("replaces").unwrap_or_default(),
                    nonce: words.number("nonce").unwrap_or_default(),
                    wanted: words.numbers("wanted"),
                };
                let step = self.driver.run(Body::AttachSession(attach));
                self.report(step)
            }
            "expire" => {
                let step = self.driver.expire(self.session(first));
                self.report(step)
            }
            "pass" => {
                let applied = self.driver.pass(first.parse().unwrap());
                self.follow_up(applied)
            }
            "put" | "delete" => {
                let body = self.txn(verb == "put", &rest, &words);
                let step = self.driver.run(body);
                self.report(step)
            }
            "locks" | "check" | "grants" | "leader" | "elections" => self.ask(verb, first, &words),
            "keys" => self.keys(),
            _ => {
                let body = command(self.lock_command(verb, &rest, &words));
                let step = self.driver.run(body);
                self.report(step)
            }
        }
    }

    fn lock_command(&self, verb: &str, rest: &[&str], words: &Words<'_>) -> Command {
        if verb == "force" {
            return Command::LockForceRelease(LockForceRelease {
                name: rest[0].to_owned(),
                reason: words.text("reason"),
                token: words.number("token").unwrap_or_default(),
                skip_delay: words.named.contains_key("skip_delay"),
            });
        }
        let session_id = self.session(rest[0]).0;
        let name = rest[1].to_owned();
        let owner = words.text("owner");
        let number = |name| words.number(name).unwrap_or_default();
        let request = Request {
            attachment: number("attachment"),
            number: number("request"),
            acknowledged: number("acknowledged"),
            unfinished: words.numbers("unfinished"),
        };
        match verb {
            "acquire" => Command::LockAcquire(LockAcquire {
                name,
                session_id,
                owner,
                request: Some(request),
                tag: number("tag"),
                wait_ms: words.number("wait"),
                delay_ms: number("delay"),
                reentrant: words.named.contains_key("reentrant"),
                plain: words.named.contains_key("plain"),
            }),
            _ => self.election_command(verb, rest, words, request),
        }
    }

    fn election_command(
        &self,
        verb: &str,
        rest: &[&str],
        words: &Words<'_>,
        request: Request,
    ) -> Command {
        let session_id = self.session(rest[0]).0;
        let name = rest[1].to_owned();
        let owner = words.text("owner");
        let number = |name| words.number(name).unwrap_or_default();
        match verb {
            "campaign" => Command::ElectCampaign(ElectCampaign {
                name,
                session_id,
                owner,
                request: Some(request),
                tag: number("tag"),
                wait_ms: words.number("wait"),
                value: words.text("value").into(),
                plain: words.named.contains_key("plain"),
            }),
            "proclaim" => Command::ElectProclaim(ElectProclaim {
                name,
                session_id,
                owner,
                token: number("token"),
                value: words.text("value").into(),
                request: Some(request),
            }),
            "resign" => Command::ElectResign(ElectResign {
                name,
                session_id,
                owner,
                token: number("token"),
                request: Some(request),
            }),
            "release" => Command::LockRelease(LockRelease {
                name,
                session_id,
                owner,
                token: number("token"),
                entry: number("entry"),
                request: Some(request),
            }),
            "cancel" => Command::LockCancel(LockCancel {
                name,
                session_id,
                owner,
                entry: number("entry"),
                request: Some(request),
            }),
            unknown => panic!("no such command: {unknown}"),
        }
    }

    fn txn(&self, put: bool, keys: &[&str], words: &Words<'_>) -> Body {
        let lease = words
            .named
            .get("lease")
            .map_or(0, |name| self.session(name).0);
        let operation = |key: &&str| {
            let key = self.with_ids(key);
            let value = Bytes::from(words.text("value"));
            let end = Bytes::new();
            let operation = if put {
                operation::Operation::Put(Put {
                    key,
                    value,
                    lease,
                    ..Put::default()
                })
            } else {
                operation::Operation::DeleteRange(DeleteRange {
                    key,
                    end,
                    previous: false,
                })
            };
            Operation {
                operation: Some(operation),
            }
        };
        Body::Txn(Txn {
            success: keys.iter().map(operation).collect(),
            ..Txn::default()
        })
    }

    fn ask(&self, verb: &str, first: &str, words: &Words<'_>) -> String {
        let name = (!first.is_empty()).then(|| first.to_owned());
        let after = words.text("after");
        let limit = usize::try_from(words.number("limit").unwrap_or_default()).unwrap();
        let query = match verb {
            "locks" => Query::Locks { name, after, limit },
            "elections" => Query::Elections { name, after, limit },
            "leader" => Query::Leader {
                name: first.to_owned(),
            },
            "check" => Query::Check {
                name: first.to_owned(),
                token: words.number("token").unwrap(),
            },
            _ => Query::GrantsOf(self.session(first)),
        };
        let state = &self.driver.state;
        self.found(state.machine().query(state.view(), query))
    }

    /// Every key with its value, but for those that locks wrote.
    fn keys(&self) -> String {
        let mut out = String::new();
        let everything = KeyRange::prefix(b"");
        for record in self.driver.state.keyspace().range(&everything, None) {
            let key = self.with_names(&record.key);
            let lease = record
                .lease
                .map_or_else(|| "no session".to_owned(), |id| self.name(id));
            writeln!(out, "{key} of {lease}: {:?}", record.value).unwrap();
        }
        out
    }

    fn leader(&self, leader: Option<&Leader>) -> String {
        let Some(leader) = leader else {
            return "no leader".to_owned();
        };
        let key = self.with_names(&leader.key);
        let session = leader
            .session
            .map_or_else(|| "no session".to_owned(), |id| self.name(id));
        let owner = with_owner(&leader.owner);
        let (term, value, proclaimed) = (leader.term, &leader.value, leader.proclaimed);
        format!("{key} of {session}{owner}, term {term}, says {value:?} since {proclaimed}")
    }

    fn found(&self, found: Found) -> String {
        let mut out = String::new();
        match found {
            Found::Locks { locks, more } => {
                for lock in locks {
                    writeln!(out, "{}, {} waiting", lock.name, lock.waiters_total).unwrap();
                    for contender in [lock.holder].iter().chain(&lock.waiters) {
                        writeln!(out, "  {}", self.contender(contender)).unwrap();
                    }
                }
                if more {
                    out.push_str("and more\n");
                }
            }
            Found::Checked(held) => writeln!(out, "{held}").unwrap(),
            Found::Leader(leader) => writeln!(out, "{}", self.leader(leader.as_ref())).unwrap(),
            Found::Elections { elections, more } => {
                for election in elections {
                    let leader = self.leader(election.leader.as_ref());
                    let total = election.candidates_total;
                    writeln!(out, "{}, {total} in it: {leader}", election.name).unwrap();
                    for candidate in &election.candidates {
                        writeln!(out, "  {}", self.contender(candidate)).unwrap();
                    }
                }
                if more {
                    out.push_str("and more\n");
                }
            }
            Found::Grants {
                grants,
                waiting,
                forced,
            } => {
                for Held { grant, entries } in grants {
                    let owner = with_owner(&grant.owner);
                    let verb = if grant.is_candidate { "leads" } else { "holds" };
                    write!(out, "{verb} {}{owner}, token {}", grant.lock, grant.token).unwrap();
                    match &entries[..] {
                        [_] => writeln!(out).unwrap(),
                        shared => writeln!(out, ", shared by {shared:?}").unwrap(),
                    }
                }
                for Waiting { contends, request } in waiting {
                    let owner = with_owner(&contends.owner);
                    let (lock, token) = (contends.lock, contends.token);
                    let verb = match contends.is_candidate {
                        true => "campaigns for",
                        false => "waits for",
                    };
                    writeln!(
                        out,
                        "{verb} {lock}{owner}, token {token}, request {request}"
                    )
                    .unwrap();
                }
                for forced in forced {
                    let owner = with_owner(&forced.owner);
                    let (lock, token, reason) = (forced.lock, forced.token, forced.reason);
                    writeln!(
                        out,
                        "was forced out of {lock}{owner}, token {token}: {reason}"
                    )
                    .unwrap();
                }
            }
        }
        out
    }

    fn report(&self, step: Step) -> String {
        let outcome = match step.outcome {
            Outcome::Waiting(place) => format!("waits at {}\n", place.revision),
            Outcome::Done(answer) => match answer.body {
                AnswerBody::Machine(result) => format!("{}\n", self.result(result)),
                AnswerBody::SessionEnded(reason) => format!("session {}\n", ended(reason)),
                AnswerBody::SessionAttached {
                    attachment,
                    last_request,
                    holdings,
                    ..
                } => format!(
                    "attachment {attachment}, last request {last_request}\n{}",
                    self.found(holdings)
                ),
                AnswerBody::NotRun(why) => format!("not run: {}\n", not_run(why)),
                AnswerBody::Done | AnswerBody::Txn(Ok(_)) => String::new(),
                other => format!("{other:?}\n"),
            },
        };
        outcome + &self.follow_up(step.applied)
    }

    fn follow_up(&self, applied: Applied<Primitives>) -> String {
        let mut out = String::new();
        for resolved in applied.resolved {
            let Place { revision, key } = resolved.place;
            if let Ok(Reply::Granted {
                key: granted,
                token,
            }) = &resolved.result
            {
                assert_eq!((granted, *token), (&key, revision));
            }
            writeln!(out, "{revision}: {}", self.result(resolved.result)).unwrap();
        }
        for event in applied.events {
            let name = self.name(event.session);
            let what = match event.body {
                EventBody::SessionEnded(reason) => format!("session {}", ended(reason)),
                EventBody::SessionAttached { attachment } => format!("attachment {attachment}"),
                EventBody::Machine(Event::GrantLost { grant, reason }) => {
                    let owner = with_owner(&grant.owner);
                    let (lock, token, why) = (grant.lock, grant.token, loss(reason));
                    let what = if grant.is_candidate {
                        "leadership of "
                    } else {
                        ""
                    };
                    format!("lost {what}{lock}{owner}, token {token}: {why}")
                }
            };
            writeln!(out, "to {name}: {what}").unwrap();
        }
        out
    }

    fn result(&self, result: Result<Reply, Rejection>) -> String {
        match result {
            Ok(Reply::Granted { key, token }) => {
                format!("granted {}, token {token}", self.with_names(&key))
            }
            Ok(Reply::Released) => "released".to_owned(),
            Ok(Reply::Proclaimed) => "proclaimed".to_owned(),
            Ok(Reply::Resigned) => "resigned".to_owned(),
            Ok(Reply::Cancelled) => "cancelled".to_owned(),
            Ok(Reply::ForceReleased(released)) => {
                format!("taken from {}", self.contender(&released))
            }
            Err(rejection) => format!("refused: {}", refusal(rejection)),
        }
    }

    fn contender(&self, contender: &Contender) -> String {
        let Contender {
            key,
            session,
            session_name,
            owner,
            token,
            since_ms,
            place,
            delay_left_ms,
            entries,
            is_candidate,
        } = contender;
        if delay_left_ms.is_none() {
            assert_eq!(
                session.map(|id| self.name(id)).unwrap_or_default(),
                *session_name
            );
        }
        let key = self.with_names(key);
        let owner = with_owner(owner);
        let session = session.map_or_else(|| "no session".to_owned(), |id| self.name(id));
        let mut out =
            format!("{place}. {key} of {session}{owner}, token {token}, since {since_ms} ms");
        if let Some(left_ms) = delay_left_ms {
            write!(out, ", lost, delay of {left_ms} ms more").unwrap();
        }
        if *entries != 1 {
            write!(out, ", {entries} times").unwrap();
        }
        if *is_candidate {
            out.push_str(", candidate");
        }
        out
    }

    fn session(&self, name: &str) -> SessionId {
        self.sessions.get(name).copied().unwrap_or(SessionId(1))
    }

    fn name(&self, id: SessionId) -> String {
        let named = self.sessions.iter().find(|(_, session)| **session == id);
        named.map_or_else(|| id.to_string(), |(name, _)| name.clone())
    }

    fn with_ids(&self, text: &str) -> Bytes {
        let sessions = self.sessions.iter();
        let replace = |text: String, (name, id): (&String, &SessionId)| {
            text.replace(&format!("<{name}>"), &id.to_string())
        };
        sessions.fold(text.to_owned(), replace).into()
    }

    fn with_names(&self, key: &Bytes) -> String {
        let key = String::from_utf8_lossy(key).into_owned();
        let sessions = self.sessions.iter();
        sessions.fold(key, |key, (name, id)| {
            key.replace(&id.to_string(), &format!("<{name}>"))
        })
    }
}

fn with_owner(owner: &str) -> String {
    if owner.is_empty() {
        String::new()
    } else {
        format!(" for `{owner}`")
    }
}

fn ended(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Expired => "expired",
        EndReason::Closed => "closed",
        EndReason::Revoked => "revoked",
        EndReason::Unknown => "unknown",
    }
}

fn not_run(why: NotRun) -> String {
    match why {
        NotRun::Over => "over".to_owned(),
        NotRun::Superseded => "superseded".to_owned(),
        NotRun::TooMany => "too many requests".to_owned(),
        NotRun::WrongSecret => "wrong secret".to_owned(),
        NotRun::Attached { attachment } => format!("attachment {attachment} is present"),
    }
}

/// The text, filled up to the length of a secret; none is none.
fn secret(words: &Words<'_>) -> Bytes {
    let mut secret = words.text("secret").into_bytes();
    if !secret.is_empty() {
        secret.resize(limits::SECRET_BYTES, b'.');
    }
    secret.into()
}

fn loss(reason: LossReason) -> String {
    match reason {
        LossReason::SessionEnded(reason) => format!("session {}", ended(reason)),
        LossReason::Forced(reason) => format!("forced: {reason}"),
        LossReason::KeyDeleted => "key deleted".to_owned(),
    }
}

fn refusal(rejection: Rejection) -> String {
    match rejection {
        Rejection::Invalid(invalid) => invalid.to_string(),
        Rejection::SessionEnded(reason) => format!("session {}", ended(reason)),
        Rejection::Held => "held".to_owned(),
        Rejection::WaitTimedOut => "wait timed out".to_owned(),
        Rejection::Cancelled => "cancelled".to_owned(),
        Rejection::PlaceLost(reason) => format!("place lost: {}", loss(reason)),
        Rejection::AlreadyContending { token } => format!("already contending at {token}"),
        Rejection::NotHolder { forced: None } => "not the holder".to_owned(),
        Rejection::NotHolder {
            forced: Some(forced),
        } => format!("not the holder, forced: {}", forced.reason),
        Rejection::NotHeld => "not held".to_owned(),
        Rejection::TooManyRequests => "too many requests".to_owned(),
        Rejection::TooManyEntries => "too many entries".to_owned(),
        Rejection::TooManyLocks => "too many locks".to_owned(),
    }
}
