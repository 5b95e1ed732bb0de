//! This node's clients who wait for an answer. Each of them gets one, once: when what
//! they asked for is decided, when this node cannot learn of that any more, or, but for
//! those with a place in a queue, when it takes too long.

use super::{Answer, AnswerBody, Failure, Replica, reads::AskBody};
use crate::{
    ids::{NodeId, RequestNumber, Revision, SessionId, Term},
    limits,
    machine::{Machine, Place},
    state::Resolved,
};

/// A command that was proposed or soon will be, or was passed on.
#[derive(Debug)]
pub(super) struct Pending {
    /// The leader and term under which it was proposed or passed on.
    pub(super) under: (NodeId, Term),
    pub(super) deadline_us: u64,
}

/// A renewal that was passed on.
#[derive(Debug)]
pub(super) struct PendingRenewal {
    pub(super) session: SessionId,
    pub(super) under: (NodeId, Term),
    pub(super) deadline_us: u64,
}

impl<M: Machine> Replica<M> {
    pub(super) fn wait_at(&mut self, place: Place, number: RequestNumber) {
        // Without a number they are those of different callers, who all wait.
        let has_number = self.state.sessions().waits_at(&place).is_some();
        let waiting = self.waiting.entry(place).or_default();
        waiting.push(number);
        if has_number && waiting.len() > limits::REQUESTS_PER_PLACE_MAX {
            let oldest = waiting.remove(0);
            self.fail(oldest, Failure::OutcomeUnknown);
        }
    }

    /// A wait has ended; whether any client of this node knows of it.
    pub(super) fn resolve(&mut self, resolved: Resolved<M>, term: Term) -> bool {
        let Resolved {
            place,
            revision,
            result,
        } = resolved;
        let waiting = self.waiting.remove(&place);
        let is_here = waiting.is_some();
        for number in waiting.unwrap_or_default() {
            let body = AnswerBody::Machine(result.clone());
            self.answer_as_of(number, (revision, term), body);
        }
        is_here
    }

    pub(super) fn answer(&mut self, number: RequestNumber, body: AnswerBody<M>) {
        let revision = self.state.keyspace().revision();
        let term = self.consensus.term();
        self.answer_as_of(number, (revision, term), body);
    }

    fn answer_as_of(
        &mut self,
        number: RequestNumber,
        (revision, term): (Revision, Term),
        body: AnswerBody<M>,
    ) {
        let answer = Answer {
            revision,
            term,
            body,
        };
        self.output.answers.push((number, Ok(answer)));
    }

    pub(super) fn fail(&mut self, number: RequestNumber, failure: Failure) {
        self.output.answers.push((number, Err(failure)));
    }

    /// Commands on their way under another leader or in another term than now
    /// may or may not be applied one day; nobody will tell this node.
    pub(super) fn fail_what_lost_its_leader(&mut self) {
        let now_under = self.leader_and_term();
        if now_under == self.served_under {
            return;
        }
        self.served_under = now_under;
        self.fail_pending(|under| Some(under) != now_under);
    }

    /// Gives up what is on its way under certain leaders and terms.
    pub(super) fn fail_pending(&mut self, lost: impl Fn((NodeId, Term)) -> bool) {
        let commands = self
            .pending
            .extract_if(.., |_, pending| lost(pending.under));
        let renewals = self
            .renewals
            .extract_if(.., |_, renewal| lost(renewal.under));
        let numbers = commands
            .map(|(number, _)| number)
            .chain(renewals.map(|(number, _)| number));
        self.output
            .answers
            .extend(numbers.map(|number| (number, Err(Failure::OutcomeUnknown))));
    }

    pub(super) fn give_up_late(&mut self) {
        self.give_up_late_hashings();
        let now_us = self.now.boot_us;
        let leader = self.consensus.leader();
        for ask in self.reads.take_late(now_us) {
            match ask.body {
                AskBody::Read { number, .. } => self.fail(number, Failure::NotLeader { leader }),
                AskBody::Renewal(renewal) => {
                    if !renewal.wish.only_asks
                        && let Some(leadership) = &mut self.leadership
                        && let Some(liveness) = &mut leadership.liveness
                    {
                        liveness.renewal_over(renewal.wish.of.session, None);
                    }
                    self.refuse_renewal(renewal.wish.from);
                }
            }
        }
        while let Some(late) = self.readable.front()
            && late.deadline_us <= now_us
        {
            let number = late.number;
            self.readable.pop_front();
            self.fail(number, Failure::Overloaded);
        }
        // Numbers grow with time, so the oldest are first. What was proposed here
        // ends with this term: a leader that reaches no quorum steps down.
        while let Some((&number, pending)) = self.pending.first_key_value()
            && pending.deadline_us <= now_us
            && pending.under.0 != self.config.node
        {
            self.pending.remove(&number);
            self.fail(number, Failure::OutcomeUnknown);
        }
        while let Some((&number, renewal)) = self.renewals.first_key_value()
            && renewal.deadline_us <= now_us
        {
            self.renewals.remove(&number);
            self.fail(number, Failure::OutcomeUnknown);
        }
    }

    /// Long enough for an election.
    pub(super) fn request_deadline_us(&self) -> u64 {
        self.now.boot_us + 3 * self.election_us()
    }
}
