//! Renewals: passed on to the leader, who answers them from memory once a quorum
//! has confirmed that it leads.

use std::mem;

use conclave_proto::internal::{
    Renewal, RenewalReplies, RenewalReply, Renewals, peer_message, renewal_reply,
};

use super::{
    AnswerBody, Failure, PendingRenewal, Replica,
    reads::{Ask, AskBody, RenewalAsk, Renewer},
    to,
};
use crate::{
    ids::{NodeId, SessionId, Term},
    liveness::Liveness,
    machine::Machine,
    state::Life,
};

impl<M: Machine> Replica<M> {
    pub(super) fn receive_renewal_replies(&mut self, replies: RenewalReplies) {
        use renewal_reply::Outcome;
        if replies.boot != self.config.boot {
            return;
        }
        for RenewalReply {
            number,
            outcome,
            ttl_ms,
            applied,
        } in replies.replies
        {
            match Outcome::try_from(outcome) {
                Ok(Outcome::Renewed) if self.renewals.remove(&number).is_some() => {
                    self.answer(number, AnswerBody::Renewed { ttl_ms });
                }
                Ok(Outcome::Refused) if self.renewals.remove(&number).is_some() => {
                    let leader = self.consensus.leader();
                    self.fail(number, Failure::NotLeader { leader });
                }
                Ok(Outcome::Ended) if self.renewals.contains_key(&number) => {
                    self.renewals_ended.insert((applied, number));
                }
                // Not waited for any more, or of a newer version.
                _ => {}
            }
        }
    }

    /// A leader takes a renewal.
    pub(super) fn take_renewal(&mut self, from: Renewer, session: SessionId) {
        let arrived_us = self.clock.micros();
        let deadline_us = self.request_deadline_us();
        let renewal = RenewalAsk {
            session,
            from,
            arrived_us,
        };
        let leadership = self
            .leadership
            .as_mut()
            .expect("only a leader takes renewals");
        match &mut leadership.liveness {
            Some(liveness) => {
                liveness.renewal_arrived(session);
                #[cfg(conclave_plant)]
                if crate::plant::is("renew-without-confirmation") {
                    return self.renew(renewal);
                }
                self.reads.add(Ask {
                    deadline_us,
                    body: AskBody::Renewal(renewal),
                });
            }
            None => leadership.early.push(renewal),
        }
    }

    pub(super) fn forward_renewals(&mut self, leader: NodeId, arrived: Vec<(Renewer, SessionId)>) {
        let deadline_us = self.request_deadline_us();
        let mut renewals = Vec::new();
        for (from, session) in arrived {
            match from {
                Renewer::Here(number) => {
                    let under = (leader, self.consensus.term());
                    let renewal = PendingRenewal {
                        session,
                        under,
                        deadline_us,
                    };
                    self.renewals.insert(number, renewal);
                    renewals.push(Renewal {
                        number,
                        session_id: session.0,
                    });
                }
                Renewer::There { .. } => self.refuse_renewal(from),
            }
        }
        if !renewals.is_empty() {
            let renewals = Renewals {
                boot: self.config.boot,
                renewals,
            };
            self.outbox
                .push(to(leader, peer_message::Message::Renewals(renewals)));
        }
    }

    /// A quorum has confirmed this leader since the renewal arrived.
    pub(super) fn renew(&mut self, renewal: RenewalAsk) {
        let Some(leadership) = &mut self.leadership else {
            return self.refuse_renewal(renewal.from);
        };
        let liveness = leadership.liveness.as_mut().expect("renewals wait for it");
        if liveness.is_expiring(renewal.session) {
            let parked = leadership.parked.entry(renewal.session).or_default();
            parked.push(renewal);
            return;
        }
        match self.state.sessions().get(renewal.session) {
            Some(session) => {
                liveness.renewal_over(renewal.session, Some(renewal.arrived_us));
                let ttl_ms = session.ttl_ms;
                self.reply_renewal(renewal.from, renewed(ttl_ms));
            }
            None => self.renewal_ended(&renewal),
        }
    }

    fn renewal_ended(&mut self, renewal: &RenewalAsk) {
        match renewal.from {
            Renewer::Here(number) => {
                let reason = self.state.system().end_reason(renewal.session);
                self.answer(number, AnswerBody::SessionEnded(reason));
            }
            Renewer::There { .. } => {
                let applied = self.state.applied();
                let outcome = renewal_reply::Outcome::Ended.into();
                let reply = RenewalReply {
                    outcome,
                    applied,
                    ..RenewalReply::default()
                };
                self.reply_renewal(renewal.from, reply);
            }
        }
    }

    /// Certainly not renewed by this request.
    pub(super) fn refuse_renewal(&mut self, from: Renewer) {
        self.reply_renewal(from, refused());
    }

    pub(super) fn reply_renewal(&mut self, from: Renewer, reply: RenewalReply) {
        match from {
            Renewer::Here(number) if reply.outcome() == renewal_reply::Outcome::Renewed => {
                self.answer(
                    number,
                    AnswerBody::Renewed {
                        ttl_ms: reply.ttl_ms,
                    },
                );
            }
            Renewer::Here(number) => {
                let leader = self.consensus.leader();
                self.fail(number, Failure::NotLeader { leader });
            }
            Renewer::There { node, boot, number } => {
                let replies = self.renewal_replies.entry((node, boot)).or_default();
                replies.push(RenewalReply { number, ..reply });
            }
        }
    }

    /// Keeps the leader's deadlines in step with the sessions that there are.
    pub(super) fn follow_lives(&mut self, term: Term, lives: &[Life]) {
        let now_us = self.clock.micros();
        let Some(leadership) = &mut self.leadership else {
            return;
        };
        let Some(liveness) = &mut leadership.liveness else {
            if leadership.term == term {
                self.begin_liveness();
            }
            return;
        };
        let mut ended = Vec::new();
        for life in lives {
            match *life {
                Life::Opened { session, ttl_ms } => liveness.opened(session, ttl_ms, now_us),
                Life::Ended(session) => ended.push(session),
            }
        }
        for session in ended {
            let parked = self
                .leadership
                .as_mut()
                .map(|leadership| leadership.ended(session));
            for renewal in parked.unwrap_or_default() {
                self.renewal_ended(&renewal);
            }
        }
    }

    /// The first entry of this leader's term is applied: it knows every session.
    fn begin_liveness(&mut self) {
        self.clock.raise(self.state.system().log_time());
        let liveness = Liveness::new(self.state.sessions(), self.clock.micros());
        #[cfg(conclave_plant)]
        let liveness = match self.old_liveness.take() {
            Some(old) if crate::plant::is("new-leader-keeps-old-deadlines") => liveness.as_in(&old),
            _ => liveness,
        };
        let leadership = self.leadership.as_mut().expect("called by a leader");
        leadership.liveness = Some(liveness);
        for renewal in mem::take(&mut leadership.early) {
            self.take_renewal(renewal.from, renewal.session);
        }
    }

    /// Says why sessions ended, once this node's state does.
    pub(super) fn answer_ended_renewals(&mut self) {
        let applied = self.state.applied();
        while let Some(&(by, number)) = self.renewals_ended.first()
            && by <= applied
        {
            self.renewals_ended.pop_first();
            // Else it is answered already.
            if let Some(renewal) = self.renewals.remove(&number) {
                let reason = self.state.system().end_reason(renewal.session);
                self.answer(number, AnswerBody::SessionEnded(reason));
            }
        }
    }
}

fn refused() -> RenewalReply {
    RenewalReply {
        outcome: renewal_reply::Outcome::Refused.into(),
        ..RenewalReply::default()
    }
}

fn renewed(ttl_ms: u64) -> RenewalReply {
    let outcome = renewal_reply::Outcome::Renewed.into();
    RenewalReply {
        outcome,
        ttl_ms,
        ..RenewalReply::default()
    }
}
