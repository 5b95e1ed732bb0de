//! A naive model of plain keys: every version that any key ever had, in lists.
//!
//! It runs the commands of clients one after the other, as they were committed, and
//! keeps what each revision did. Nothing is ever compacted in here: what may not be read
//! any more is still known, to judge what was read. Keys of others, such as locks, are
//! not run but taken as they come: see [`Model::others`].

mod txn;

use std::{collections::BTreeMap, ops::Bound};

use bytes::Bytes;
use conclave_core::{
    ids::{Revision, SessionId},
    keyspace::{
        Event, REVISION_FRESH, Record, RevisionError,
        txn::{OperationReply, TxnError, TxnReply},
    },
};

use self::txn::Run;

/// What a command of a client on plain keys came to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// Of a transaction.
    Txn(Result<TxnReply, TxnError>),
    /// Of a put or a delete.
    Operation(Result<OperationReply, TxnError>),
    /// Of a compaction.
    Compacted(Result<(), RevisionError>),
    /// Refused, because there is no room.
    NoSpace,
}

/// A part of a range that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) records: Vec<Record>,
    pub(crate) count: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Model {
    revision: Revision,
    compacted: Revision,
    /// For each key what there was from each revision on that changed it.
    keys: BTreeMap<Bytes, Vec<(Revision, Option<Record>)>>,
    /// Those of each revision, by key, and a delete before a put. Of keys of others, too.
    events: BTreeMap<Revision, Vec<Event>>,
    /// The sessions that are alive, with the keys that are bound to each.
    pub(super) sessions: BTreeMap<SessionId, Vec<Bytes>>,
    /// Whether the alarm is raised.
    pub(crate) is_out_of_space: bool,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            revision: REVISION_FRESH,
            compacted: 0,
            keys: BTreeMap::new(),
            events: BTreeMap::new(),
            sessions: BTreeMap::new(),
            is_out_of_space: false,
        }
    }
}

impl Model {
    /// The newest revision.
    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    /// That of the newest compaction; 0 before the first.
    pub(crate) fn compacted(&self) -> Revision {
        self.compacted
    }

    /// What a key was at a revision.
    pub(super) fn get(&self, key: &[u8], at: Revision) -> Option<&Record> {
        let versions = self.keys.get(key)?;
        let behind = versions.partition_point(|(since, _)| *since <= at);
        versions[..behind].last()?.1.as_ref()
    }

    /// What the keys of a range were at a revision.
    pub(super) fn range(&self, start: &[u8], end: &[u8], at: Revision) -> Vec<&Record> {
        let from = (Bound::Included(start), Bound::Unbounded);
        let all = self.keys.range::<[u8], _>(from);
        let inside = all.take_while(|(key, _)| covers(key, start, end));
        inside.filter_map(|(key, _)| self.get(key, at)).collect()
    }

    /// The first `limit` keys of a range at a revision, and how many it has.
    pub(crate) fn seen(&self, start: &[u8], end: &[u8], at: Revision, limit: usize) -> Seen {
        let all = self.range(start, end, at);
        Seen {
            count: all.len() as u64,
            records: all.into_iter().take(limit).cloned().collect(),
        }
    }

    /// The events of a range from one revision to another, both included, in order.
    pub(crate) fn events(
        &self,
        (from, upto): (Revision, Revision),
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Vec<&Event> {
        if from > upto {
            return Vec::new();
        }
        let all = self.events.range(from..=upto).flat_map(|(_, all)| all);
        all.filter(|event| wanted(event)).collect()
    }

    /// The events of a revision, in order.
    pub(crate) fn events_of(&self, revision: Revision) -> &[Event] {
        self.events.get(&revision).map_or(&[], Vec::as_slice)
    }

    /// Whether a revision can be read.
    pub(super) fn readable(&self, asked: Revision) -> Result<(), RevisionError> {
        let (compacted, newest) = (self.compacted, self.revision);
        if asked < compacted {
            return Err(RevisionError::Compacted { asked, compacted });
        }
        match asked > newest {
            true => Err(RevisionError::Future { asked, newest }),
            false => Ok(()),
        }
    }

    /// Runs a compaction.
    pub(crate) fn compact(&mut self, asked: Revision) -> Outcome {
        let compacted = self.compacted;
        let outcome = match asked <= compacted {
            true => Err(RevisionError::Compacted { asked, compacted }),
            false => self.readable(asked),
        };
        if outcome.is_ok() {
            self.compacted = asked;
        }
        Outcome::Compacted(outcome)
    }

    /// A revision of commands that are not run here.
    pub(crate) fn others(&mut self, mut events: Vec<Event>) {
        in_order(&mut events);
        self.revision += 1;
        self.events.insert(self.revision, events);
    }

    /// A session begins.
    pub(crate) fn opened(&mut self, session: SessionId) {
        self.sessions.insert(session, Vec::new());
    }

    /// Whether a session is alive.
    pub(crate) fn is_alive(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    /// The keys that are bound to a session, in order.
    pub(crate) fn keys_of(&self, session: SessionId) -> Vec<Bytes> {
        self.sessions.get(&session).cloned().unwrap_or_default()
    }

    /// Those that were at a revision.
    pub(super) fn bound(&self, session: SessionId, at: Revision) -> Vec<Bytes> {
        let is_bound = |record: &&Record| record.lease == Some(session);
        let all = self.range(b"\0", b"\0", at);
        let bound = all.into_iter().filter(is_bound);
        bound.map(|record| record.key.clone()).collect()
    }

    /// A session ends, and takes its keys along; whether it had any.
    pub(crate) fn ended(&mut self, session: SessionId) -> bool {
        let mut run = Run::new(self);
        for key in self.keys_of(session) {
            run.write(key, None);
        }
        let writes = run.into_writes();
        let had_keys = !writes.is_empty();
        self.keep(writes);
        self.sessions.remove(&session);
        had_keys
    }

    /// Makes a revision of what was written, if anything was.
    fn keep(&mut self, writes: BTreeMap<Bytes, Option<Record>>) {
        if writes.is_empty() {
            return;
        }
        let (before, now) = (self.revision, self.revision + 1);
        let mut events = Vec::new();
        for (key, after) in writes {
            let old = self.get(&key, before).cloned();
            self.bind(&key, old.as_ref(), after.as_ref());
            let is_new = after.as_ref().is_none_or(|new| new.create_revision == now);
            let event = |before, after| Event {
                key: key.clone(),
                revision: now,
                before,
                after,
            };
            if old.is_some() && is_new {
                events.push(event(old.clone(), None));
            }
            if let Some(after) = &after {
                let before = old.filter(|_| !is_new);
                events.push(event(before, Some(after.clone())));
            }
            self.keys.entry(key).or_default().push((now, after));
        }
        self.revision = now;
        self.events.insert(now, events);
    }

    fn bind(&mut self, key: &Bytes, before: Option<&Record>, after: Option<&Record>) {
        let lease = |record: Option<&Record>| record.and_then(|record| record.lease);
        if let Some(keys) = lease(before).and_then(|old| self.sessions.get_mut(&old)) {
            keys.retain(|bound| bound != key);
        }
        if let Some(keys) = lease(after).and_then(|new| self.sessions.get_mut(&new)) {
            keys.push(key.clone());
            keys.sort();
        }
    }
}

/// The order of events of one revision that does not hang on how they came about.
pub(crate) fn in_order(events: &mut [Event]) {
    events.sort_by(|a, b| (&a.key, a.after.is_some()).cmp(&(&b.key, b.after.is_some())));
}

/// The wire's rule, written out.
pub(super) fn covers(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == start,
        [0] => key >= start,
        _ => key >= start && key < end,
    }
}
