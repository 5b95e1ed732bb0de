//! The replicated state, and the one way to change it: [`State::apply`].
//!
//! Apply does no I/O, reads no clock and cannot fail because of its
//! surroundings. What a command may not do is a result like any other; an entry
//! that this version does not understand stops the node.

mod once;
mod sessions;

use bytes::Bytes;
use conclave_proto::internal::{Command, Entry, NoSpace, Origin, PublishMember, Stamp, command};
use prost::Message as _;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::{
    APPLY_VERSION,
    checkpoint::{Image, Part},
    ids::{Index, LogTime, NodeId, Revision, SessionId, Term},
    keyspace::{
        Change, Hashed, Keyspace, Overlay, RevisionError, Writes, reach,
        txn::{self, TxnError},
    },
    limits,
    machine::{Cause, Context, Machine, Outcome, Place, Settled, Staged, View},
    picture::UnderWay,
    replica::{Answer, AnswerBody, Event, EventBody, Fatal},
    requests::{Answered, KeptReply, Slot},
    session::Sessions,
    system::{PublishedMember, System},
};

/// Everything that is replicated.
#[derive(Debug, PartialEq)]
pub struct State<M: Machine> {
    cluster: u64,
    applied: Index,
    /// Of the newest entry.
    term: Term,
    digest: u64,
    keyspace: Keyspace,
    sessions: Sessions,
    system: System,
    machine: M,
    drawing: UnderWay<Drawing>,
}

/// The parts of a picture that are there at once, and those that take their time
/// as they come: see [`State::draw_part`].
#[derive(Debug)]
struct Drawing {
    applied: Index,
    term: Term,
    digest: u64,
    system: System,
    sessions: Option<Sessions>,
}

/// What applying one entry led to.
#[derive(Debug)]
pub struct Applied<M: Machine> {
    /// One for each command that names its origin, in order.
    pub outcomes: Vec<(Origin, Outcome<Answer<M>>)>,
    /// Requests that wait no longer.
    pub resolved: Vec<Resolved<M>>,
    /// What sessions are told, in order.
    pub events: Vec<Event<M::Event>>,
    /// Sessions that began or ended, in order.
    pub lives: Vec<Life>,
    /// How many keys were written or deleted, or in reach of ranges: what it took.
    pub work: usize,
}

/// The end of a wait.
#[derive(Debug)]
pub struct Resolved<M: Machine> {
    /// Which place.
    pub place: Place,
    /// The revision of the change that ended it.
    pub revision: Revision,
    /// What came of it.
    pub result: Result<M::Reply, M::Rejection>,
}

/// See [`Applied::lives`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It was opened.
    Opened {
        /// Which.
        session: SessionId,
        /// How long it lives without a renewal.
        ttl_ms: u64,
    },
    /// It ended.
    Ended(SessionId),
}

impl<M: Machine> Default for Applied<M> {
    fn default() -> Self {
        Self {
            outcomes: Vec::new(),
            resolved: Vec::new(),
            events: Vec::new(),
            lives: Vec::new(),
            work: 0,
        }
    }
}

impl<M: Machine> State<M> {
    /// The state before the first entry.
    pub fn new(cluster: u64) -> Self {
        let keyspace = Keyspace::new();
        Self {
            cluster,
            applied: 0,
            term: 0,
            digest: cluster,
            machine: M::rebuild(&keyspace),
            keyspace,
            sessions: Sessions::default(),
            system: System::default(),
            drawing: UnderWay::default(),
        }
    }

    /// Begins a picture of everything as it is now. One that was under way is given
    /// up.
    pub fn begin_image(&mut self) {
        self.keyspace.begin_picture();
        self.sessions.begin_picture();
        self.drawing = UnderWay(Some(Drawing {
            applied: self.applied,
            term: self.term,
            digest: self.digest,
            system: self.system.clone(),
            sessions: None,
        }));
    }

    /// Whether a picture is under way.
    pub fn is_drawing(&self) -> bool {
        self.drawing.0.is_some()
    }

    /// Goes on with the picture, by `max` versions of keys and sessions, and gives out the
    /// versions that it came by; at the end the rest. Together they show the state at
    /// which it was begun, whatever was applied since. Copies handles, not the bytes of
    /// keys and values. `None` if no picture is under way.
    pub fn draw_part(&mut self, max: usize) -> Option<Part> {
        if let Some(image) = self.draw_rest(max) {
            return Some(Part::Rest(Box::new(image)));
        }
        self.keyspace.take_drawn().map(Part::Versions)
    }

    /// What was not given out before, once the picture is whole.
    fn draw_rest(&mut self, max: usize) -> Option<Image> {
        let drawing = self.drawing.0.as_mut()?;
        let mut left = max;
        if drawing.sessions.is_none() {
            drawing.sessions = Some(self.sessions.draw_picture(&mut left)?);
        }
        let keyspace = self.keyspace.draw_picture(left)?;
        let Drawing {
            applied,
            term,
            digest,
            system,
            sessions,
        } = self.drawing.0.take()?;
        Some(Image {
            cluster: self.cluster,
            applied,
            term,
            digest,
            keyspace,
            sessions: sessions.expect("they are drawn before"),
            system,
        })
    }

    /// Begins a hash over all keys as of a revision; `None`: the newest. One that was
    /// under way is given up.
    pub(crate) fn begin_hash(&mut self, revision: Option<Revision>) -> Result<(), RevisionError> {
        self.keyspace.begin_hash(revision)
    }

    /// Goes on with the hash over `max` versions, or so many as have `max_bytes` of
    /// values; gives it out when it is whole.
    pub(crate) fn go_on_hashing(&mut self, max: usize, max_bytes: usize) -> Option<Hashed> {
        self.keyspace.go_on_hashing(max, max_bytes)
    }

    /// Gives up the hash that is under way.
    pub(crate) fn give_up_hash(&mut self) {
        self.keyspace.give_up_hash();
    }

    /// The state of a picture. Whoever restores it applies the entry behind
    /// [`State::applied`] next.
    pub fn restore(image: Image) -> Self {
        let Image {
            cluster,
            applied,
            term,
            digest,
            keyspace,
            sessions,
            system,
        } = image;
        let keyspace = Keyspace::restore(keyspace);
        Self {
            cluster,
            applied,
            term,
            digest,
            machine: M::rebuild(&keyspace),
            keyspace,
            sessions,
            system,
            drawing: UnderWay::default(),
        }
    }

    /// The cluster it belongs to.
    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// The term of the newest entry applied; 0 before the first.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Up to where entries are applied.
    pub fn applied(&self) -> Index {
        self.applied
    }

    /// A hash of the history: of every change of keys, and of what each entry led
    /// to. Equal on all nodes that applied the same entries; members compare it.
    /// What goes into it changes only with the apply version.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// The size of everything in it, as the same number on every node: keys,
    /// values, history, sessions, with a flat rate for what maps around them take.
    pub fn bytes(&self) -> u64 {
        self.keyspace.bytes() + self.sessions.bytes()
    }

    /// The keys.
    pub fn keyspace(&self) -> &Keyspace {
        &self.keyspace
    }

    /// The live sessions.
    pub fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// The system table.
    pub fn system(&self) -> &System {
        &self.system
    }

    /// The index of the machine.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// What queries see.
    pub fn view(&self) -> View<'_> {
        View {
            keyspace: &self.keyspace,
            sessions: &self.sessions,
            system: &self.system,
        }
    }

    /// When an entry is due although nobody asks for one: for the next timer, or
    /// at once while a compaction has left something to drop.
    pub fn next_due(&self) -> Option<LogTime> {
        if self.keyspace.has_superseded() {
            return Some(0);
        }
        self.machine.next_due()
    }

    /// Applies the entry at `index`, which must be the next one. An empty entry
    /// changes nothing.
    pub fn apply(&mut self, index: Index, term: Term, data: &Bytes) -> Result<Applied<M>, Fatal> {
        self.apply_for(index, term, data, |_| true)
    }

    /// Applies an entry; of a command that is not `own`, nobody here sees what its
    /// operations read, so that is left out of its outcome.
    pub fn apply_for(
        &mut self,
        index: Index,
        term: Term,
        data: &Bytes,
        own: impl Fn(&Origin) -> bool,
    ) -> Result<Applied<M>, Fatal> {
        assert_eq!(index, self.applied + 1, "entries are applied in order");
        let mut applied = Applied::default();
        if !data.is_empty() {
            let entry = decode(index, data)?;
            let Stamp {
                log_time_ms,
                date_ms,
            } = entry.stamp.unwrap_or_default();
            self.system.stamp(log_time_ms, date_ms);
            self.keyspace.sweep(limits::SWEPT_PER_ENTRY_MAX);
            self.fire_timers(&mut applied);
            for command in entry.commands {
                let answers = command.origin.as_ref().is_some_and(&own);
                self.apply_command(index, term, command, answers, &mut applied)?;
            }
        }
        self.applied = index;
        self.term = term;
        self.update_digest(term, &applied);
        Ok(applied)
    }

    fn fire_timers(&mut self, applied: &mut Applied<M>) {
        for _ in 0..limits::TIMERS_PER_ENTRY_MAX {
            let now = self.system.log_time();
            if self.machine.next_due().is_none_or(|due| due > now) {
                break;
            }
            let mut context = self.context();
            let note = self.machine.fire(&mut context);
            let (writes, staged) = context.into_parts();
            let changes = self.keyspace.keep(writes);
            self.keep_staged(staged);
            self.settle(&changes, Cause::Machine(&note), applied);
        }
    }

    fn apply_command(
        &mut self,
        index: Index,
        term: Term,
        command: Command,
        answers: bool,
        applied: &mut Applied<M>,
    ) -> Result<(), Fatal> {
        let unknown = |what: &str| Fatal::Unknown {
            index,
            what: what.to_owned(),
        };
        let body = command
            .body
            .ok_or_else(|| unknown("a command of an unknown kind"))?;
        applied.work += reach::of_command(&self.keyspace, &body);
        let outcome = match body {
            command::Body::Machine(bytes) => {
                let command =
                    M::decode(bytes).ok_or_else(|| unknown("an unknown command of the machine"))?;
                self.execute_once(term, command, applied)
            }
            command::Body::Txn(txn) => {
                let reply = self.write_keys(applied, |overlay, sessions| {
                    txn::execute(overlay, sessions, txn, answers)
                });
                Outcome::Done(self.answer(term, reply.map_or(AnswerBody::NoSpace, AnswerBody::Txn)))
            }
            command::Body::Put(put) => {
                let reply = self.write_keys(applied, |overlay, sessions| {
                    txn::execute_put(overlay, sessions, put)
                });
                let body = reply.map_or(AnswerBody::NoSpace, AnswerBody::Operation);
                Outcome::Done(self.answer(term, body))
            }
            command::Body::DeleteRange(delete) => {
                let reply = self.write_keys(applied, |overlay, _| {
                    txn::execute_delete(overlay, delete, answers)
                });
                let body = reply.map_or(AnswerBody::NoSpace, AnswerBody::Operation);
                Outcome::Done(self.answer(term, body))
            }
            body => {
                let body = self.execute_own(body, term, &unknown, applied)?;
                Outcome::Done(self.answer(term, body))
            }
        };
        if let Some(origin) = command.origin {
            applied.outcomes.push((origin, outcome));
        }
        Ok(())
    }

    /// Runs a command that means the same for every machine.
    fn execute_own(
        &mut self,
        body: command::Body,
        term: Term,
        unknown: &impl Fn(&str) -> Fatal,
        applied: &mut Applied<M>,
    ) -> Result<AnswerBody<M>, Fatal> {
        Ok(match body {
            command::Body::OpenSession(open) => self.open_session(open, applied),
            command::Body::AttachSession(attach) => self.attach_session(&attach, applied),
            command::Body::CloseSession(close) => self.close_session(&close, applied),
            command::Body::GrantLease(grant) => self.grant_lease(&grant, applied),
            command::Body::RevokeLease(revoke) => self.revoke_lease(&revoke, applied),
            command::Body::ExpireSessions(expire) => self.expire_sessions(&expire, term, applied),
            command::Body::PublishMember(member) => self.publish_member(member),
            command::Body::Compact(compact) => {
                AnswerBody::Compacted(self.keyspace.compact(compact.revision))
            }
            command::Body::NoSpace(alarm) => AnswerBody::Alarms(self.no_space(&alarm)),
            command::Body::RaiseApplyVersion(raise) => {
                if raise.version > APPLY_VERSION {
                    return Err(unknown(&format!("apply version {}", raise.version)));
                }
                self.system.raise_apply_version(raise.version);
                AnswerBody::Done
            }
            command::Body::Machine(_)
            | command::Body::Txn(_)
            | command::Body::Put(_)
            | command::Body::DeleteRange(_) => return Err(unknown("a command of another kind")),
        })
    }

    /// Runs what a client writes to plain keys. `None`: refused for lack of space.
    fn write_keys<R>(
        &mut self,
        applied: &mut Applied<M>,
        work: impl FnOnce(&mut Overlay<'_>, &Sessions) -> Result<R, TxnError>,
    ) -> Option<Result<R, TxnError>> {
        let mut overlay = self.keyspace.overlay();
        let reply = match work(&mut overlay, &self.sessions) {
            Ok(reply) => reply,
            Err(error) => return Some(Err(error)),
        };
        self.machine.follow(&mut overlay);
        let writes = overlay.into_writes();
        if self.lacks_space_for(&writes) {
            return None;
        }
        let changes = self.keyspace.keep(writes);
        self.settle(&changes, Cause::Txn, applied);
        Some(Ok(reply))
    }

    /// Raises or clears the alarm; for which members.
    fn no_space(&mut self, alarm: &NoSpace) -> Vec<NodeId> {
        let member = NodeId(alarm.member);
        if alarm.raised {
            self.system.raise_out_of_space(member);
            return vec![member];
        }
        let only = (alarm.member != 0).then_some(member);
        self.system.clear_out_of_space(only)
    }

    /// A mistake: nobody else hears of it.
    #[cfg(conclave_plant)]
    pub(crate) fn compact_locally(&mut self, revision: Revision) {
        let refused = self.keyspace.compact(revision).is_err();
        tracing::debug!(revision, refused, "compacted without the log");
    }

    fn publish_member(&mut self, member: PublishMember) -> AnswerBody<M> {
        let PublishMember {
            node,
            name,
            client_urls,
            apply_version,
        } = member;
        self.system.publish(
            NodeId(node),
            PublishedMember {
                name,
                client_urls,
                apply_version,
            },
        );
        AnswerBody::Done
    }

    /// Runs a command of the machine; `numbered` names the request of a live session
    /// that it is, if it has a number.
    fn execute(
        &mut self,
        command: M::Command,
        numbered: Option<(SessionId, u64)>,
        applied: &mut Applied<M>,
    ) -> Outcome<AnswerBody<M>> {
        let mut context = self.context();
        match self.machine.execute(&mut context, command) {
            Ok(executed) => {
                let (writes, staged) = context.into_parts();
                if !staged.gives_back && self.lacks_space_for(&writes) {
                    return Outcome::Done(AnswerBody::NoSpace);
                }
                let changes = self.keyspace.keep(writes);
                self.keep_staged(staged);
                if let (Some((id, number)), Outcome::Waiting(place)) = (numbered, &executed.outcome)
                {
                    // Before it settles, which may decide it already.
                    self.sessions.wait(id, number, place.clone());
                }
                self.settle(&changes, Cause::Machine(&executed.note), applied);
                match executed.outcome {
                    Outcome::Done(reply) => Outcome::Done(AnswerBody::Machine(Ok(reply))),
                    Outcome::Waiting(place) => Outcome::Waiting(place),
                }
            }
            Err(rejection) => Outcome::Done(AnswerBody::Machine(Err(rejection))),
        }
    }

    /// Whether the alarm forbids these writes. What only deletes passes, so that
    /// releases, ends of sessions and waits go on.
    fn lacks_space_for(&self, writes: &Writes) -> bool {
        self.system.is_out_of_space() && writes.has_puts()
    }

    fn context(&self) -> Context<'_> {
        Context::new(self.view())
    }

    fn keep_staged(&mut self, staged: Staged) {
        if let Some((id, number, answer)) = staged.answered {
            let answered = self.answered_now(KeptReply::Machine(answer));
            self.sessions.change(id, |requests| {
                requests.set(number, Slot::Answered(answered));
            });
        }
        if let Some(record) = staged.forced {
            self.system.record_forced(record);
        }
    }

    fn settle(&mut self, changes: &[Change], cause: Cause<'_, M::Note>, applied: &mut Applied<M>) {
        if changes.is_empty() {
            return;
        }
        applied.work += changes.len();
        let Settled { resolved, events } = self.machine.settle(changes, cause);
        let revision = self.keyspace.revision();
        for (place, result) in &resolved {
            if self.sessions.waits_at(place).is_some() {
                let answered = self.answered_now(KeptReply::Machine(M::keep(result)));
                self.sessions.resolve(place, answered);
            }
        }
        let resolved = resolved.into_iter();
        applied
            .resolved
            .extend(resolved.map(|(place, result)| Resolved {
                place,
                revision,
                result,
            }));
        applied
            .events
            .extend(events.into_iter().map(|(session, event)| Event {
                session,
                revision,
                body: EventBody::Machine(event),
            }));
    }

    fn answered_now(&self, reply: KeptReply) -> Answered {
        let revision = self.keyspace.revision();
        Answered { revision, reply }
    }

    fn answer(&self, term: Term, body: AnswerBody<M>) -> Answer<M> {
        Answer {
            revision: self.keyspace.revision(),
            term,
            body,
        }
    }

    fn update_digest(&mut self, term: Term, applied: &Applied<M>) {
        let parts = [
            self.applied,
            term,
            self.keyspace.digest(),
            self.keyspace.revision(),
            self.keyspace.compacted(),
            self.bytes(),
            self.sessions.len() as u64,
            self.system.log_time(),
            u64::from(self.system.is_out_of_space()),
            u64::from(self.system.apply_version()),
            applied.fingerprint(),
        ];
        let mut bytes = [0; 88];
        for (chunk, part) in bytes.chunks_exact_mut(8).zip(parts) {
            chunk.copy_from_slice(&part.to_be_bytes());
        }
        self.digest = xxh3_64_with_seed(&bytes, self.digest);
    }
}

impl<M: Machine> Applied<M> {
    /// A number made of what each command came to: which of them wait and where,
    /// which were refused, whose wait ended how, who lived and ended.
    fn fingerprint(&self) -> u64 {
        let outcomes = self.outcomes.iter().map(|(_, outcome)| match outcome {
            Outcome::Waiting(place) => place.fingerprint(),
            Outcome::Done(answer) => u64::from(answer.body.is_refusal()),
        });
        let resolved = self.resolved.iter();
        let resolved =
            resolved.map(|end| end.place.fingerprint() << 1 | u64::from(end.result.is_ok()));
        let events = self
            .events
            .iter()
            .map(|event| event.session.0.cast_unsigned());
        let lives = self.lives.iter().map(|life| match life {
            Life::Opened { session, .. } | Life::Ended(session) => session.0.cast_unsigned(),
        });
        let all = outcomes.chain(resolved).chain(events).chain(lives);
        // Each step is a bijection of the number before, so that order counts.
        all.fold(0, |number, part| {
            (number ^ part)
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left(29)
        })
    }
}

/// Decodes an entry in full: what this version would drop on the way is unknown
/// to it.
fn decode(index: Index, data: &Bytes) -> Result<Entry, Fatal> {
    let unknown = |what: &str| Fatal::Unknown {
        index,
        what: what.to_owned(),
    };
    let entry = Entry::decode(data.clone()).map_err(|_| unknown("it does not decode"))?;
    if entry.encoded_len() == data.len() {
        Ok(entry)
    } else {
        Err(unknown("it has unknown fields"))
    }
}
