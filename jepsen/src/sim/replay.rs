//! What was committed, applied once more: by a state of its own, which runs every entry
//! when the first node has, and tells the models of plain keys and of leases what each
//! command did.
//!
//! Models run only what they know. Locks, elections and native sessions write keys too,
//! and those take revisions; they are told apart by their names, since the clients of
//! plain keys write under [`PLAIN`] alone.

use std::collections::BTreeMap;

use conclave_core::{
    ids::{Index, Revision, SessionId},
    keyspace::Event,
    log::LogEntry,
    machine::Outcome,
    replica::{Answer, AnswerBody},
    state::State,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{Command, Entry, ExpireSessions, NoSpace, command::Body};
use prost::Message as _;

use super::node::CLUSTER;
use crate::checkers::{STAYS_UP, Verdict, broken, serializable::Serializable};

/// Under what the clients of plain keys write.
pub(crate) const PLAIN: [&[u8]; 2] = [b"kv/", b"register/"];

const LEASES: &str = "leases";

/// See the module.
#[derive(Debug)]
pub(crate) struct Replay {
    state: State<Primitives>,
    /// What each node has in its log and nobody has applied, durable or not.
    logs: BTreeMap<usize, BTreeMap<Index, LogEntry>>,
    log_time: u64,
    /// When each session was opened, in log time.
    opened_at: BTreeMap<SessionId, u64>,
    /// Who raised the alarm.
    alarms: Vec<u64>,
}

impl Default for Replay {
    fn default() -> Self {
        Self {
            state: State::new(CLUSTER),
            logs: BTreeMap::new(),
            log_time: 0,
            opened_at: BTreeMap::new(),
            alarms: Vec::new(),
        }
    }
}

impl Replay {
    /// A node starts with this log.
    pub(crate) fn starts(&mut self, node: usize, entries: &[LogEntry]) {
        self.logs.remove(&node);
        self.logs(node, entries);
    }

    /// A node adds entries to its log, in place of those it had from the first of them
    /// on.
    pub(crate) fn logs(&mut self, node: usize, entries: &[LogEntry]) {
        let log = self.logs.entry(node).or_default();
        if let Some(first) = entries.first() {
            log.split_off(&first.index);
        }
        let applied = self.state.applied();
        let new = entries.iter().filter(|entry| entry.index > applied);
        log.extend(new.map(|entry| (entry.index, entry.clone())));
    }

    /// A node has applied its log up to an index.
    pub(crate) fn applied(
        &mut self,
        node: usize,
        upto: Index,
        checker: &mut Serializable,
        mut digest: impl FnMut(Index, u64) -> Verdict,
    ) -> Verdict {
        if upto <= self.state.applied() {
            return Ok(());
        }
        while self.state.applied() < upto {
            let index = self.state.applied() + 1;
            let log = self.logs.get_mut(&node);
            let Some(entry) = log.and_then(|log| log.remove(&index)) else {
                let what = format!("node {node} has applied {index}, and never had it");
                return broken(STAYS_UP, what);
            };
            self.apply(&entry, checker)?;
            digest(index, self.state.digest())?;
        }
        for log in self.logs.values_mut() {
            while log
                .first_key_value()
                .is_some_and(|(index, _)| *index <= upto)
            {
                log.pop_first();
            }
        }
        Ok(())
    }

    fn apply(&mut self, entry: &LogEntry, checker: &mut Serializable) -> Verdict {
        let data = &entry.data;
        let applied = self
            .state
            .apply_for(entry.index, entry.term, data, |_| false);
        let applied = match applied {
            Ok(applied) => applied,
            Err(fatal) => return broken(STAYS_UP, format!("nobody can apply this: {fatal}")),
        };
        let decoded = Entry::decode(data.clone()).unwrap_or_default();
        let stamp = decoded.stamp.unwrap_or_default();
        self.log_time = self.log_time.max(stamp.log_time_ms);
        let mut outcomes = applied.outcomes.into_iter();
        for command in decoded.commands {
            let outcome = command.origin.and_then(|_| outcomes.next());
            let answer = match outcome {
                Some((_, Outcome::Done(answer))) => Some(answer),
                _ => None,
            };
            self.command(entry.term, command, answer, checker)?;
        }
        let newest = self.state.keyspace().revision();
        self.others(newest, checker);
        match checker.model.revision() == newest {
            true => Ok(()),
            false => broken(
                LEASES,
                format!(
                    "keys changed that no command wrote: {:?}",
                    self.events_of(checker.model.revision() + 1)
                ),
            ),
        }
    }

    fn command(
        &mut self,
        term: u64,
        command: Command,
        answer: Option<Answer<Primitives>>,
        checker: &mut Serializable,
    ) -> Verdict {
        let Some(body) = command.body else {
            return Ok(());
        };
        let origin = command
            .origin
            .map(|origin| (origin.node, origin.boot, origin.number));
        match &body {
            Body::Txn(_) | Body::Put(_) | Body::DeleteRange(_) | Body::Compact(_) => {
                if let Some(answer) = &answer {
                    self.others(answer.revision, checker);
                }
                let model = &checker.model;
                let revision = answer.map_or_else(|| model.revision(), |answer| answer.revision);
                checker.committed(origin, &body, revision, |revision| self.events_of(revision))
            }
            Body::NoSpace(alarm) => {
                self.alarm(alarm);
                checker.model.is_out_of_space = !self.alarms.is_empty();
                Ok(())
            }
            Body::OpenSession(_) | Body::GrantLease(_) => {
                if let Some(AnswerBody::SessionOpened { session, .. }) = answer.map(|a| a.body)
                    && !checker.model.is_alive(session)
                {
                    self.opened_at.insert(session, self.log_time);
                    checker.model.opened(session);
                }
                Ok(())
            }
            Body::CloseSession(close) => match answer.map(|answer| answer.body) {
                Some(AnswerBody::Done) => self.ended(SessionId(close.session_id), checker),
                _ => Ok(()),
            },
            Body::RevokeLease(revoke) => self.ended(SessionId(revoke.session_id), checker),
            Body::ExpireSessions(expire) if expire.term == term => self.expire(expire, checker),
            _ => Ok(()),
        }
    }

    fn alarm(&mut self, alarm: &NoSpace) {
        match alarm.raised {
            true => self.alarms.push(alarm.member),
            false => self
                .alarms
                .retain(|member| alarm.member != 0 && *member != alarm.member),
        }
    }

    fn expire(&mut self, expire: &ExpireSessions, checker: &mut Serializable) -> Verdict {
        for (id, opened_at) in expire.session_ids.iter().zip(&expire.opened_at_ms) {
            let id = SessionId(*id);
            if self.opened_at.get(&id) == Some(opened_at) {
                self.ended(id, checker)?;
            }
        }
        Ok(())
    }

    /// A session has ended: with it, and in the same revision, all of its keys.
    fn ended(&mut self, session: SessionId, checker: &mut Serializable) -> Verdict {
        self.opened_at.remove(&session);
        if !checker.model.keys_of(session).is_empty() {
            self.others(self.state.keyspace().revision(), checker);
        }
        if checker.model.ended(session) {
            let events = self.events_of(checker.model.revision());
            checker.same_events(LEASES, events)?;
        }
        Ok(())
    }

    /// Takes revisions that no client of plain keys made, up to one.
    fn others(&self, upto: Revision, checker: &mut Serializable) {
        while checker.model.revision() < upto {
            let events = self.events_of(checker.model.revision() + 1);
            if events.iter().any(|event| is_plain(&event.key)) {
                break;
            }
            checker.model.others(events);
        }
    }

    fn events_of(&self, revision: Revision) -> Vec<Event> {
        self.state.keyspace().events_of(revision).collect()
    }
}

fn is_plain(key: &[u8]) -> bool {
    PLAIN.iter().any(|prefix| key.starts_with(prefix))
}
