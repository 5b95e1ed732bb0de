//! Reads that are confirmed, or need no confirmation: answered in turn from what this
//! node has applied, in each turn as many of them as its steps allow.

use conclave_proto::internal::Compare;

use super::{AnswerBody, Failure, Query, Replica, reads::AskBody};
use crate::{
    ids::{RequestNumber, Revision, SessionId},
    keyspace::{Filter, KeyRange, Piece, RevisionError, txn},
    limits,
    machine::Machine,
    session::Session,
};

/// A read whose turn has yet to come.
#[derive(Debug)]
pub(super) struct Readable<M: Machine> {
    pub(super) number: RequestNumber,
    pub(super) query: Query<M>,
    /// After this it is given up, by CLOCK_BOOTTIME.
    pub(super) deadline_us: u64,
}

impl<M: Machine> Replica<M> {
    /// Whether clients are told what is in this node's state: not before it is one of
    /// the members, nor while it waits for a checkpoint.
    pub(super) fn may_read(&self) -> bool {
        !self.is_behind() && self.admission.is_none()
    }

    /// A read is answered as soon as a turn has time for it.
    pub(super) fn may_be_read(&mut self, number: RequestNumber, query: Query<M>) {
        if self.readable.len() >= limits::READABLE_MAX {
            return self.fail(number, Failure::Overloaded);
        }
        self.readable.push_back(Readable {
            number,
            query,
            deadline_us: self.request_deadline_us(),
        });
    }

    pub(super) fn answer_reads(&mut self) {
        for ask in self.reads.take_ready(self.state.applied()) {
            match ask.body {
                AskBody::Read { number, query } => self.may_be_read(number, query),
                AskBody::Renewal(renewal) => self.renew(renewal),
            }
        }
        self.read_steps_left = limits::READ_STEPS_PER_TURN_MAX;
        while self.read_steps_left > 0
            && let Some(Readable { number, query, .. }) = self.readable.pop_front()
        {
            if let Query::Swept(revision) = query {
                let deadline_us = self.request_deadline_us();
                self.sweeps.push((number, revision, deadline_us));
            } else {
                let body = self.query(query);
                self.answer(number, body);
            }
            self.took_steps(limits::READ_STEPS_EACH);
        }
        self.answer_sweeps();
    }

    fn query(&mut self, query: Query<M>) -> AnswerBody<M> {
        if let Query::Range {
            range,
            revision,
            filter,
            limit,
        } = query
        {
            return AnswerBody::Range(self.range(&range, revision, &filter, limit));
        }
        let (keyspace, sessions) = (self.state.keyspace(), self.state.sessions());
        let (body, steps) = match query {
            // A range was read above.
            Query::Barrier | Query::Swept(_) | Query::Range { .. } => (AnswerBody::Done, 0),
            Query::Compare(compares) => {
                let steps = |compare: &Compare| match compare.end.is_empty() {
                    true => 1,
                    false => limits::READ_STEPS_MAX,
                };
                let compared = txn::compare(keyspace, &compares);
                let steps = compares.iter().map(steps).sum();
                (AnswerBody::Compared(compared), steps)
            }
            Query::Session(id) => match sessions.get(id) {
                Some(session) => {
                    let face = session.face(keyspace.keys_bound(id));
                    (AnswerBody::Session(face), limits::READ_STEPS_LISTED)
                }
                None => (self.session_ended(id), 0),
            },
            Query::Sessions { after, limit } => {
                let mut behind = sessions.behind(after);
                let listed = behind.by_ref().take(limit);
                let face = |(id, session): (SessionId, &Session)| {
                    (id, session.face(keyspace.keys_bound(id)))
                };
                let listed: Vec<_> = listed.map(face).collect();
                let steps = listed.len() * limits::READ_STEPS_LISTED;
                let body = AnswerBody::Sessions {
                    log_time_ms: self.state.system().log_time(),
                    sessions: listed,
                    more: behind.next().is_some(),
                };
                (body, steps)
            }
            Query::SessionIds => {
                let ids = sessions.iter().map(|(id, _)| id).collect();
                (AnswerBody::SessionIds(ids), sessions.len())
            }
            Query::KeysOf(id) if sessions.get(id).is_some() => {
                let keys = keyspace.keys_of(id).cloned().collect();
                (AnswerBody::Keys(keys), keyspace.keys_bound(id))
            }
            Query::KeysOf(id) => (self.session_ended(id), 0),
            Query::Alarms => {
                let raised_by = self.state.system().out_of_space();
                let raised_by = raised_by.iter().copied().collect();
                (AnswerBody::Alarms(raised_by), 0)
            }
            Query::Machine(query) => {
                let answer = self.state.machine().query(self.state.view(), query);
                let steps = M::work(&answer);
                (AnswerBody::Query(answer), steps)
            }
        };
        self.took_steps(steps);
        body
    }

    fn range(
        &mut self,
        range: &KeyRange,
        revision: Option<Revision>,
        filter: &Filter,
        limit: usize,
    ) -> Result<Piece, RevisionError> {
        let keyspace = self.state.keyspace();
        let at = revision.unwrap_or_else(|| keyspace.revision());
        keyspace.check_readable(at)?;
        let steps = self
            .read_steps_left
            .clamp(limits::READ_STEPS_MIN, limits::READ_STEPS_MAX);
        let piece = keyspace.piece(range, at, filter, limit, steps);
        self.took_steps(piece.steps);
        Ok(piece)
    }

    fn session_ended(&self, id: SessionId) -> AnswerBody<M> {
        AnswerBody::SessionEnded(self.state.system().end_reason(id))
    }

    /// A sweep that is late is answered, too: what was asked for is done, only its
    /// traces are not gone yet.
    fn answer_sweeps(&mut self) {
        let (keyspace, now_us) = (self.state.keyspace(), self.now.boot_us);
        let is_over = |(_, revision, deadline_us): &(RequestNumber, Revision, u64)| {
            keyspace.is_swept(*revision) || *deadline_us <= now_us
        };
        let over: Vec<_> = self.sweeps.extract_if(.., |sweep| is_over(sweep)).collect();
        for (number, ..) in over {
            self.answer(number, AnswerBody::Done);
        }
    }

    fn took_steps(&mut self, steps: usize) {
        self.read_steps_left = self.read_steps_left.saturating_sub(steps);
    }
}
