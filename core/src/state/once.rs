//! Numbered commands run at most once: the way of a machine's command past the slots
//! of its session.

use std::ops::ControlFlow;

use conclave_proto::internal::Request;

use super::{Applied, State};
use crate::{
    ids::{SessionId, Term},
    machine::{Machine, Outcome},
    replica::{Answer, AnswerBody},
    requests::{Answered, KeptReply, NotRun, Slot, Standing},
};

impl<M: Machine> State<M> {
    /// Runs a command, unless it is of a live session and has run before, is over,
    /// or is of an older attachment. A session that has ended has no numbers any
    /// more; the machine decides then, as for commands without one.
    pub(super) fn execute_once(
        &mut self,
        term: Term,
        command: M::Command,
        applied: &mut Applied<M>,
    ) -> Outcome<Answer<M>> {
        let numbered = match M::request(&command) {
            Some((id, request)) if self.sessions.get(id).is_some() => {
                match self.admit(term, id, request) {
                    ControlFlow::Continue(number) => (number != 0).then_some((id, number)),
                    ControlFlow::Break(known) => return known,
                }
            }
            _ => None,
        };
        let outcome = self.execute(command, numbered, applied);
        let body = match outcome {
            Outcome::Waiting(place) => return Outcome::Waiting(place),
            Outcome::Done(body) => body,
        };
        if let Some((id, number)) = numbered
            && let Some(reply) = kept::<M>(&body)
        {
            let answered = self.answered_now(reply);
            self.sessions.change(id, |requests| {
                requests.set(number, Slot::Answered(answered));
            });
        }
        Outcome::Done(self.answer(term, body))
    }

    /// What a numbered request that was waiting comes to by this state; `None` if
    /// nobody can tell any more.
    pub(crate) fn outcome_of(&self, id: SessionId, number: u64) -> Option<Outcome<Answer<M>>> {
        match self.sessions.get(id)?.requests.standing(number) {
            Standing::Waiting(place) => Some(Outcome::Waiting(place.clone())),
            Standing::Answered(answered) => Some(Outcome::Done(answer_again(self.term, answered))),
            Standing::New | Standing::Over => None,
        }
    }

    /// Takes note of what a request of a live session says. Its number, if the
    /// command is to run; else what it comes to without.
    fn admit(
        &mut self,
        term: Term,
        id: SessionId,
        request: &Request,
    ) -> ControlFlow<Outcome<Answer<M>>, u64> {
        let refused = |state: &Self, why| {
            let answer = state.answer(term, AnswerBody::NotRun(why));
            ControlFlow::Break(Outcome::Done(answer))
        };
        let session = self.sessions.get(id);
        if session.is_some_and(|session| session.requests.fences(request.attachment)) {
            return refused(self, NotRun::Superseded);
        }
        self.sessions
            .change(id, |requests| requests.acknowledge(request));
        let number = request.number;
        let Some(session) = self.sessions.get(id).filter(|_| number != 0) else {
            return ControlFlow::Continue(number);
        };
        #[cfg(conclave_plant)]
        if crate::plant::is("retry-runs-twice") {
            return ControlFlow::Continue(number);
        }
        match session.requests.standing(number) {
            Standing::New if session.requests.has_room_for(number) => ControlFlow::Continue(number),
            Standing::New => refused(self, NotRun::TooMany),
            Standing::Over => refused(self, NotRun::Over),
            Standing::Waiting(place) => ControlFlow::Break(Outcome::Waiting(place.clone())),
            Standing::Answered(answered) => {
                ControlFlow::Break(Outcome::Done(answer_again(term, answered)))
            }
        }
    }
}

/// The first answer, as of then.
fn answer_again<M: Machine>(term: Term, answered: &Answered) -> Answer<M> {
    let body = match &answered.reply {
        KeptReply::Machine(kept) => AnswerBody::Machine(M::recall(kept)),
        KeptReply::NoSpace => AnswerBody::NoSpace,
    };
    Answer {
        revision: answered.revision,
        term,
        body,
    }
}

/// What is kept of an answer to a machine's command.
fn kept<M: Machine>(body: &AnswerBody<M>) -> Option<KeptReply> {
    match body {
        AnswerBody::Machine(result) => Some(KeptReply::Machine(M::keep(result))),
        AnswerBody::NoSpace => Some(KeptReply::NoSpace),
        _ => None,
    }
}
