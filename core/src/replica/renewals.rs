//! Renewals: passed on to the leader, who answers them from memory once a quorum
//! has confirmed that it leads.

use std::mem;

use conclave_proto::internal::{
    Renewal, RenewalReplies, RenewalReply, Renewals, peer_message, renewal_reply,
};

use super::{
    AnswerBody, Failure, Replica,
    peers::to,
    reads::{Ask, AskBody, RenewalAsk, Renewer, Wish},
    waiting::PendingRenewal,
};
use crate::{
    ids::{NodeId, RequestNumber, Term},
    liveness::Liveness,
    machine::Machine,
    requests::NotRun,
    state::Life,
};

impl<M: Machine> Replica<M> {
    pub(super) fn receive_renewal_replies(&mut self, replies: RenewalReplies) {
        use renewal_reply::Outcome;
        if replies.boot != self.config.boot {
            return;
        }
        for reply in replies.replies {
            let RenewalReply {
                number, applied, ..
            } = reply;
            match Outcome::try_from(reply.outcome) {
                Ok(Outcome::Ended) if self.renewals.contains_key(&number) => {
                    self.renewals_ended.insert((applied, number));
                }
                Ok(_) if self.renewals.remove(&number).is_some() => {
                    self.settle_renewal(number, &reply);
                }
                // Not waited for any more, or of a newer version.
                _ => {}
            }
        }
    }

    /// Answers a renewal of this node's client.
    fn settle_renewal(&mut self, number: RequestNumber, reply: &RenewalReply) {
        use renewal_reply::Outcome;
        match reply.outcome() {
            Outcome::Renewed => {
                let ttl_ms = reply.ttl_ms;
                self.answer(number, AnswerBody::Renewed { ttl_ms });
            }
            Outcome::Lives => {
                let RenewalReply {
                    ttl_ms, left_ms, ..
                } = *reply;
                self.answer(number, AnswerBody::TimeLeft { ttl_ms, left_ms });
            }
            Outcome::Superseded => {
                self.answer(number, AnswerBody::NotRun(NotRun::Superseded));
            }
            Outcome::Refused | Outcome::Ended => {
                let leader = self.consensus.leader();
                self.fail(number, Failure::NotLeader { leader });
            }
        }
    }

    /// A leader takes a renewal.
    pub(super) fn take_renewal(&mut self, wish: Wish) {
        let arrived_us = self.clock.micros();
        let deadline_us = self.request_deadline_us();
        let renewal = RenewalAsk { wish, arrived_us };
        let leadership = self
            .leadership
            .as_mut()
            .expect("only a leader takes renewals");
        match &mut leadership.liveness {
            Some(liveness) => {
                if !wish.only_asks {
                    liveness.renewal_arrived(wish.of.session);
                }
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

    pub(super) fn forward_renewals(&mut self, leader: NodeId, arrived: Vec<Wish>) {
        let deadline_us = self.request_deadline_us();
        let mut renewals = Vec::new();
        for wish in arrived {
            let Wish {
                of,
                from,
                only_asks,
            } = wish;
            match from {
                Renewer::Here(number) => {
                    let under = (leader, self.consensus.term());
                    let renewal = PendingRenewal {
                        session: of.session,
                        under,
                        deadline_us,
                    };
                    self.renewals.insert(number, renewal);
                    renewals.push(Renewal {
                        number,
                        session_id: of.session.0,
                        attachment: of.number,
                        only_asks,
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
            return self.refuse_renewal(renewal.wish.from);
        };
        let liveness = leadership.liveness.as_mut().expect("renewals wait for it");
        let Wish {
            of,
            from,
            only_asks,
        } = renewal.wish;
        let id = of.session;
        if liveness.is_expiring(id) {
            leadership.parked.entry(id).or_default().push(renewal);
            return;
        }
        match self.state.sessions().get(id) {
            Some(session) if only_asks => {
                let left_us = liveness.left_us(id, self.clock.micros());
                #[cfg(conclave_plant)]
                let left_us = match crate::plant::is("time-left-as-granted") {
                    true => session.ttl_ms * 1_000,
                    false => left_us,
                };
                let reply = lives(session.ttl_ms, left_us / 1_000);
                self.reply_renewal(from, reply);
            }
            Some(session) if session.requests.fences(of.number) => {
                liveness.renewal_over(id, None);
                self.reply_renewal(from, superseded());
            }
            Some(session) => {
                liveness.renewal_over(id, Some(renewal.arrived_us));
                let ttl_ms = session.ttl_ms;
                self.reply_renewal(from, renewed(ttl_ms));
            }
            None => self.renewal_ended(&renewal),
        }
    }

    fn renewal_ended(&mut self, renewal: &RenewalAsk) {
        match renewal.wish.from {
            Renewer::Here(number) => {
                let reason = self.state.system().end_reason(renewal.wish.of.session);
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
                self.reply_renewal(renewal.wish.from, reply);
            }
        }
    }

    /// Certainly not renewed by this request.
    pub(super) fn refuse_renewal(&mut self, from: Renewer) {
        self.reply_renewal(from, refused());
    }

    pub(super) fn reply_renewal(&mut self, from: Renewer, reply: RenewalReply) {
        match from {
            Renewer::Here(number) => self.settle_renewal(number, &reply),
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
        // In their order: the id of one that ended may be given to the next.
        let mut parked = Vec::new();
        for life in lives {
            match *life {
                Life::Opened { session, ttl_ms } => liveness.opened(session, ttl_ms, now_us),
                Life::Ended(session) => {
                    liveness.ended(session);
                    parked.extend(leadership.parked.remove(&session).unwrap_or_default());
                }
            }
        }
        for renewal in parked {
            self.renewal_ended(&renewal);
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
            self.take_renewal(renewal.wish);
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

fn superseded() -> RenewalReply {
    RenewalReply {
        outcome: renewal_reply::Outcome::Superseded.into(),
        ..RenewalReply::default()
    }
}

fn lives(ttl_ms: u64, left_ms: u64) -> RenewalReply {
    RenewalReply {
        outcome: renewal_reply::Outcome::Lives.into(),
        ttl_ms,
        left_ms,
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
