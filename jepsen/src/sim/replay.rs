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
    limits,
    log::LogEntry,
    machine::Outcome,
    replica::{Answer, AnswerBody},
    state::State,
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    Command, Entry, ExpireSessions, GrantLease, NoSpace, command::Body,
};
use prost::Message as _;

use super::node::CLUSTER;
use crate::checkers::{
    STAYS_UP, Verdict, broken,
    early_expiry::Moment,
    leases::{self, Leases, NAME as LEASES},
    serializable::{Origin, Serializable},
};

/// Under what the clients of plain keys write.
pub(crate) const PLAIN: [&[u8]; 2] = [b"kv/", b"register/"];

/// The models, and when they are told something.
#[derive(Debug)]
pub(crate) struct Histories<'a> {
    pub(crate) keys: &'a mut Serializable,
    pub(crate) leases: &'a mut Leases,
    pub(crate) at: Moment,
    pub(crate) led: &'a leases::Led,
}

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
    /// Of leases that had keys.
    leases_expired: u64,
}

impl Default for Replay {
    fn default() -> Self {
        Self {
            state: State::new(CLUSTER),
            logs: BTreeMap::new(),
            log_time: 0,
            opened_at: BTreeMap::new(),
            alarms: Vec::new(),
            leases_expired: 0,
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

    /// How many leases have expired that had keys.
    pub(crate) fn leases_expired(&self) -> u64 {
        self.leases_expired
    }

    /// A node has applied its log up to an index.
    pub(crate) fn applied(
        &mut self,
        node: usize,
        upto: Index,
        histories: &mut Histories<'_>,
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
            self.apply(&entry, histories)?;
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

    fn apply(&mut self, entry: &LogEntry, histories: &mut Histories<'_>) -> Verdict {
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
            self.command(entry.term, command, answer, histories)?;
        }
        let newest = self.state.keyspace().revision();
        self.others(newest, histories);
        match histories.keys.model.revision() == newest {
            true => Ok(()),
            false => broken(
                LEASES,
                format!(
                    "keys changed that no command wrote: {:?}",
                    self.events_of(histories.keys.model.revision() + 1)
                ),
            ),
        }
    }

    fn command(
        &mut self,
        term: u64,
        command: Command,
        answer: Option<Answer<Primitives>>,
        histories: &mut Histories<'_>,
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
                    self.others(answer.revision, histories);
                }
                let model = &histories.keys.model;
                let revision = answer.map_or_else(|| model.revision(), |answer| answer.revision);
                histories
                    .keys
                    .committed(origin, &body, revision, |revision| self.events_of(revision))
            }
            Body::NoSpace(alarm) => {
                self.alarm(alarm);
                histories.keys.model.is_out_of_space = !self.alarms.is_empty();
                Ok(())
            }
            Body::OpenSession(_) => {
                if let Some(AnswerBody::SessionOpened { session, .. }) = answer.map(|a| a.body)
                    && !histories.keys.model.is_alive(session)
                {
                    self.opened_at.insert(session, self.log_time);
                    histories.keys.model.opened(session);
                }
                Ok(())
            }
            Body::GrantLease(grant) => {
                let body = answer.map(|answer| answer.body);
                self.granted(origin, grant, body, histories)
            }
            Body::CloseSession(close) => match answer.map(|answer| answer.body) {
                Some(AnswerBody::Done) => self.ended(SessionId(close.session_id), None, histories),
                _ => Ok(()),
            },
            Body::RevokeLease(revoke) => self.ended(SessionId(revoke.session_id), None, histories),
            Body::ExpireSessions(expire) if expire.term == term => self.expire(expire, histories),
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

    fn expire(&mut self, expire: &ExpireSessions, histories: &mut Histories<'_>) -> Verdict {
        for (id, opened_at) in expire.session_ids.iter().zip(&expire.opened_at_ms) {
            let id = SessionId(*id);
            if self.opened_at.get(&id) == Some(opened_at) {
                self.ended(id, Some(histories.led), histories)?;
            }
        }
        Ok(())
    }

    /// A lease is opened, if nobody has its id and there is room.
    fn granted(
        &mut self,
        origin: Option<Origin>,
        grant: &GrantLease,
        body: Option<AnswerBody<Primitives>>,
        histories: &mut Histories<'_>,
    ) -> Verdict {
        let model = &mut histories.keys.model;
        let chosen = SessionId(grant.session_id);
        let ttl_ms = grant
            .ttl_ms
            .clamp(limits::LEASE_TTL_MS_MIN, limits::LEASE_TTL_MS_MAX);
        let session = match body {
            Some(AnswerBody::SessionOpened {
                session,
                ttl_ms: given,
            }) if given == ttl_ms && !model.is_out_of_space => session,
            Some(AnswerBody::NoSpace) if model.is_out_of_space => return Ok(()),
            Some(AnswerBody::SessionExists) if model.is_alive(chosen) => return Ok(()),
            body => return broken(LEASES, format!("{grant:?} came to {body:?}")),
        };
        model.opened(session);
        self.opened_at.insert(session, self.log_time);
        histories
            .leases
            .opened(origin, (chosen.0, session.0), ttl_ms, histories.at)
    }

    /// A session has ended: with it, and in the same revision, all of its keys. `led` if
    /// it expired.
    fn ended(
        &mut self,
        session: SessionId,
        led: Option<&leases::Led>,
        histories: &mut Histories<'_>,
    ) -> Verdict {
        if self.opened_at.remove(&session).is_none() {
            return Ok(());
        }
        histories.leases.ended(session.0, histories.at, led)?;
        if !histories.keys.model.keys_of(session).is_empty() {
            self.others(self.state.keyspace().revision(), histories);
        }
        if histories.keys.model.ended(session) {
            self.leases_expired += u64::from(led.is_some());
            let events = self.events_of(histories.keys.model.revision());
            histories.keys.same_events(LEASES, events)?;
        }
        Ok(())
    }

    /// Takes revisions that no client of plain keys made, up to one.
    fn others(&self, upto: Revision, histories: &mut Histories<'_>) {
        while histories.keys.model.revision() < upto {
            let events = self.events_of(histories.keys.model.revision() + 1);
            if events.iter().any(|event| is_plain(&event.key)) {
                break;
            }
            histories.keys.model.others(events);
        }
    }

    fn events_of(&self, revision: Revision) -> Vec<Event> {
        self.state.keyspace().events_of(revision).collect()
    }
}

fn is_plain(key: &[u8]) -> bool {
    PLAIN.iter().any(|prefix| key.starts_with(prefix))
}
