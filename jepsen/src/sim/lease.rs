//! A client of leases: grants with chosen and made ids, renewals, revocations, times left,
//! and keys that are bound to them. It keeps some alive and lets others expire.

use bytes::Bytes;
use conclave_client::requests::Outcome;
use conclave_core::{
    ids::{Attachment, SessionId},
    replica::{Answer, AnswerBody, Query},
};
use conclave_primitives::Primitives;
use conclave_proto::internal::{
    Compare, GrantLease, Operation as TxnOperation, Put, RevokeLease, Txn, command,
    compare::{Result as Relation, Target},
    operation::Operation as Kind,
};

use super::{
    ground::{About, CallBody, Ground, Reply},
    link::{Pending, Refusal, outcome},
    pace::{Pace, Paced},
    tally::Operation as Counted,
};
use crate::checkers::leases::Call;

/// Ids that clients choose: few, so that they come again.
const CHOSEN: u64 = 6;
/// Leases that a client has at a time.
const LEASES_MAX: usize = 3;
/// The longest TTL that is asked for; the shortest that there is may be longer.
const TTL_MS_MAX: u64 = 4_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct LeaseClient {
    pace: Pace<UnderWay>,
    /// The leases that it may have.
    leases: Vec<i64>,
}

/// What a call asks.
#[derive(Clone, Copy, Debug)]
pub(crate) enum UnderWay {
    Grant { chosen: bool },
    Of(Call),
    Bind(Counted),
    KeysOf(i64),
}

impl LeaseClient {
    pub(crate) fn new(actor: usize, ground: &mut Ground) -> Self {
        Self {
            pace: Pace::new(actor, ground),
            leases: Vec::new(),
        }
    }

    fn grant(&mut self, ground: &mut Ground) {
        let chosen = ground.rng.chance(600_000);
        let session_id = match chosen {
            true => ground.rng.between(1, CHOSEN).cast_signed(),
            false => 0,
        };
        let ttl_ms = ground.rng.below(TTL_MS_MAX);
        let grant = command::Body::GrantLease(GrantLease { session_id, ttl_ms });
        let under_way = UnderWay::Grant { chosen };
        self.call(CallBody::Command(grant), under_way, ground);
    }

    fn ask(&mut self, call: Call, ground: &mut Ground) {
        let body = match call {
            Call::Renew(id) => {
                let to_another = self.pace.link.node != ground.leader.node;
                ground.checks.leases.renewing(id, to_another);
                CallBody::Renew(Attachment::present(SessionId(id)))
            }
            Call::TimeLeft(id) => CallBody::TimeLeft(SessionId(id)),
            Call::Revoke(session_id) => {
                let revoke = RevokeLease { session_id };
                CallBody::Command(command::Body::RevokeLease(revoke))
            }
        };
        self.call(body, UnderWay::Of(call), ground);
    }

    fn call(&mut self, body: CallBody, under_way: UnderWay, ground: &mut Ground) {
        let about = match under_way {
            UnderWay::Grant { .. } => About::Grant,
            UnderWay::Of(call) => About::Lease(call),
            UnderWay::Bind(_) | UnderWay::KeysOf(_) => About::Other,
        };
        self.pace.call(body, about, under_way, ground);
    }

    /// Some keys are those that clients of plain keys write.
    fn key(ground: &mut Ground) -> Bytes {
        let number = ground.rng.below(12);
        match ground.rng.chance(500_000) {
            true => format!("kv/{number:02}").into(),
            false => format!("kv/bound/{number:02}").into(),
        }
    }

    fn put(&mut self, lease: i64, ground: &mut Ground) -> Put {
        let value = self.pace.fresh_value();
        Put {
            key: Self::key(ground),
            value: value.to_string().into(),
            lease,
            ..Put::default()
        }
    }

    /// Binds a key to a lease, unless it is bound to it; then to none.
    fn txn(&mut self, id: i64, ground: &mut Ground) -> Txn {
        let bound = self.put(id, ground);
        let free = Put {
            lease: 0,
            ..bound.clone()
        };
        let operation = |put| TxnOperation {
            operation: Some(Kind::Put(put)),
        };
        let compare = Compare {
            key: bound.key.clone(),
            result: Relation::NotEqual.into(),
            target: Some(Target::Lease(id)),
            ..Compare::default()
        };
        Txn {
            compares: vec![compare],
            success: vec![operation(bound)],
            failure: vec![operation(free)],
        }
    }

    fn answered(
        &mut self,
        under_way: UnderWay,
        pending: Pending,
        answer: &Answer<Primitives>,
        ground: &mut Ground,
    ) {
        let checker = &ground.checks.serializable;
        let verdict = match (under_way, &answer.body) {
            // Answered from what a member knows of revisions.
            (UnderWay::Of(Call::Renew(_) | Call::TimeLeft(_)), _) => Ok(()),
            (UnderWay::KeysOf(id), AnswerBody::Keys(keys)) => checker
                .in_real_time(pending.newest, answer.revision)
                .and_then(|()| checker.bound(SessionId(id), answer.revision, keys)),
            _ => checker.in_real_time(pending.newest, answer.revision),
        };
        ground.checks.note(verdict);
        match (under_way, &answer.body) {
            (UnderWay::Grant { chosen }, AnswerBody::SessionOpened { session, .. }) => {
                self.leases.push(session.0);
                ground.did(match chosen {
                    true => Counted::LeaseChosen,
                    false => Counted::LeaseMade,
                });
            }
            (UnderWay::Grant { .. }, _) => ground.did(Counted::LeaseExists),
            (UnderWay::Of(Call::Renew(_)), _) => ground.did(Counted::LeaseRenewed),
            (UnderWay::Of(Call::TimeLeft(_)), _) => ground.did(Counted::TimeLeft),
            (UnderWay::Of(Call::Revoke(id)), _) => {
                self.forget(id);
                ground.did(Counted::LeaseRevoked);
            }
            (UnderWay::Bind(_), AnswerBody::Txn(Err(_)) | AnswerBody::Operation(Err(_))) => {
                ground.did(Counted::BoundTooLate);
            }
            (UnderWay::Bind(counted), _) => ground.did(counted),
            (UnderWay::KeysOf(_), _) => ground.did(Counted::KeysOfLease),
        }
    }

    fn forget(&mut self, id: i64) {
        self.leases.retain(|known| *known != id);
    }
}

impl Paced for LeaseClient {
    type Call = UnderWay;

    fn pace(&mut self) -> &mut Pace<Self::Call> {
        &mut self.pace
    }

    fn begin(&mut self, ground: &mut Ground) {
        self.pace.wander(ground);
        if !self.leases.is_empty() && ground.rng.chance(10_000) {
            // It lets one go, which will expire.
            let gone = ground.rng.index(self.leases.len());
            self.leases.swap_remove(gone);
        }
        let wants_more = self.leases.len() < LEASES_MAX && ground.rng.chance(300_000);
        if self.leases.is_empty() || wants_more {
            return self.grant(ground);
        }
        let id = self.leases[ground.rng.index(self.leases.len())];
        match ground.rng.below(100) {
            0..45 => self.ask(Call::Renew(id), ground),
            45..60 => self.ask(Call::TimeLeft(id), ground),
            60..66 => self.ask(Call::Revoke(id), ground),
            66..84 => {
                let put = command::Body::Put(self.put(id, ground));
                self.call(
                    CallBody::Command(put),
                    UnderWay::Bind(Counted::KeyBound),
                    ground,
                );
            }
            84..92 => {
                let txn = command::Body::Txn(self.txn(id, ground));
                let under_way = UnderWay::Bind(Counted::BoundInTxn);
                self.call(CallBody::Command(txn), under_way, ground);
            }
            _ => {
                let query = Query::KeysOf(SessionId(id));
                self.call(CallBody::Read(query), UnderWay::KeysOf(id), ground);
            }
        }
    }

    fn ended(&mut self, under_way: UnderWay, pending: Pending, reply: Reply, ground: &mut Ground) {
        let (outcome, hint) = outcome(reply);
        match outcome {
            Outcome::Answered(answer) => self.answered(under_way, pending, &answer, ground),
            // It is over.
            Outcome::Refused(Refusal::Rejected(_)) => {
                if let UnderWay::Of(Call::Renew(id) | Call::TimeLeft(id) | Call::Revoke(id))
                | UnderWay::KeysOf(id) = under_way
                {
                    self.forget(id);
                }
                ground.did(Counted::LeaseOver);
            }
            _ => {
                ground.did(Counted::Unknown);
                self.pace.not_served(hint, ground);
            }
        }
        self.pace.link.served(ground);
        let rest_us = ground.rng.skewed(60_000);
        self.pace.rest(rest_us, ground);
    }
}
