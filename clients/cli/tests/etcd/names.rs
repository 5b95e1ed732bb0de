//! What differs between two servers that behave the same: ids, terms, and where
//! revisions begin. Both ways: a case's numbers become a server's in requests, and a
//! server's become the case's in answers.

use std::collections::BTreeMap;

use bytes::Bytes;
use conclave_proto::etcd::{
    etcdserverpb::{
        AlarmResponse, AuthStatusResponse, CompactionResponse, Compare, DeleteRangeResponse,
        HashKvResponse, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse,
        LeaseRevokeResponse, LeaseTimeToLiveResponse, MemberListResponse, PutResponse,
        RangeRequest, RangeResponse, RequestOp, ResponseHeader, ResponseOp, StatusResponse,
        TxnRequest, TxnResponse, WatchResponse, compare::TargetUnion, request_op::Request,
        response_op::Response,
    },
    mvccpb::{Event, KeyValue},
    v3electionpb::{CampaignResponse, LeaderKey, LeaderResponse, ProclaimResponse, ResignResponse},
    v3lockpb::{LockResponse, UnlockResponse},
};

use crate::step::BEGINNING;

/// Shown for a lease that the case has no number for.
const UNKNOWN: i64 = -1;

/// What one server calls the things of a case.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// Its revision at the beginning of the case.
    pub beginning: i64,
    /// Leases of the case, with the server's ids.
    pub leases: BTreeMap<i64, i64>,
}

impl Names {
    /// A revision for a request.
    pub fn revision(&self, revision: i64) -> i64 {
        if (1..1000).contains(&revision) {
            self.beginning + revision - BEGINNING
        } else {
            revision
        }
    }

    /// A lease for a request: one never granted has an id that no server makes.
    pub fn lease(&self, lease: i64) -> i64 {
        const NOBODYS: i64 = 0x1234_0000;
        match lease {
            0 => 0,
            _ => *self.leases.get(&lease).unwrap_or(&(NOBODYS + lease)),
        }
    }

    /// The key that a contender has: etcd prints ids as Go does, with a sign.
    pub fn contender(&self, name: &[u8], lease: i64) -> Bytes {
        let id = self.lease(lease);
        let sign = if id < 0 { "-" } else { "" };
        let session = format!("/{sign}{:x}", id.unsigned_abs());
        [name, session.as_bytes()].concat().into()
    }

    fn shown_revision(&self, revision: &mut i64) {
        if *revision > 0 {
            *revision += BEGINNING - self.beginning;
        }
    }

    fn shown_lease(&self, id: &mut i64) {
        if *id == 0 {
            return;
        }
        let known = self.leases.iter().find(|(_, known)| *known == id);
        *id = known.map_or(UNKNOWN, |(lease, _)| *lease);
    }

    /// A contender's key has its lease's id in it.
    fn shown_key(&self, key: &mut Bytes) {
        const SHORTEST_MADE: usize = 12;
        let text = String::from_utf8_lossy(key);
        let Some((name, session)) = text.rsplit_once('/') else {
            return;
        };
        let Ok(mut id) = i64::from_str_radix(session, 16) else {
            return;
        };
        let made = session.len() >= SHORTEST_MADE;
        self.shown_lease(&mut id);
        if made {
            *key = format!("{name}/lease {id}").into();
        }
    }

    /// A request that carries revisions or leases.
    pub fn range(&self, request: &mut RangeRequest) {
        for revision in [
            &mut request.revision,
            &mut request.min_mod_revision,
            &mut request.max_mod_revision,
            &mut request.min_create_revision,
            &mut request.max_create_revision,
        ] {
            *revision = self.revision(*revision);
        }
    }

    pub fn txn(&self, request: &mut TxnRequest) {
        for compare in &mut request.compare {
            self.compare(compare);
        }
        for op in request.success.iter_mut().chain(&mut request.failure) {
            self.op(op);
        }
    }

    fn compare(&self, compare: &mut Compare) {
        match &mut compare.target_union {
            Some(TargetUnion::CreateRevision(revision) | TargetUnion::ModRevision(revision)) => {
                *revision = self.revision(*revision);
            }
            Some(TargetUnion::Lease(lease)) => *lease = self.lease(*lease),
            _ => {}
        }
    }

    fn op(&self, op: &mut RequestOp) {
        match &mut op.request {
            Some(Request::RequestRange(range)) => self.range(range),
            Some(Request::RequestPut(put)) => put.lease = self.lease(put.lease),
            Some(Request::RequestTxn(txn)) => self.txn(txn),
            Some(Request::RequestDeleteRange(_)) | None => {}
        }
    }
}

/// An answer in which only that is left in which servers may not differ.
pub trait Shown {
    fn shown(&mut self, names: &Names);
}

impl<T: Shown> Shown for Option<T> {
    fn shown(&mut self, names: &Names) {
        if let Some(inner) = self {
            inner.shown(names);
        }
    }
}

impl<T: Shown> Shown for Vec<T> {
    fn shown(&mut self, names: &Names) {
        for inner in self {
            inner.shown(names);
        }
    }
}

impl Shown for ResponseHeader {
    fn shown(&mut self, names: &Names) {
        // Only whether they are there.
        self.cluster_id = self.cluster_id.min(1);
        self.member_id = self.member_id.min(1);
        self.raft_term = self.raft_term.min(1);
        names.shown_revision(&mut self.revision);
    }
}

impl Shown for KeyValue {
    fn shown(&mut self, names: &Names) {
        names.shown_key(&mut self.key);
        names.shown_revision(&mut self.create_revision);
        names.shown_revision(&mut self.mod_revision);
        names.shown_lease(&mut self.lease);
    }
}

impl Shown for Event {
    fn shown(&mut self, names: &Names) {
        self.kv.shown(names);
        self.prev_kv.shown(names);
    }
}

impl Shown for ResponseOp {
    fn shown(&mut self, names: &Names) {
        match &mut self.response {
            Some(Response::ResponseRange(inner)) => inner.shown(names),
            Some(Response::ResponsePut(inner)) => inner.shown(names),
            Some(Response::ResponseDeleteRange(inner)) => inner.shown(names),
            Some(Response::ResponseTxn(inner)) => inner.shown(names),
            None => {}
        }
    }
}

/// Answers of which the header and some parts are shown like that.
macro_rules! shown {
    ($($answer:ty: $($part:ident),*;)*) => {
        $(impl Shown for $answer {
            fn shown(&mut self, names: &Names) {
                self.header.shown(names);
                $(self.$part.shown(names);)*
            }
        })*
    };
}

shown! {
    RangeResponse: kvs;
    PutResponse: prev_kv;
    DeleteRangeResponse: prev_kvs;
    TxnResponse: responses;
    CompactionResponse: ;
    LeaseRevokeResponse: ;
    UnlockResponse: ;
    CampaignResponse: leader;
    ProclaimResponse: ;
    ResignResponse: ;
    LeaderResponse: kv;
    AlarmResponse: ;
    AuthStatusResponse: ;
}

impl Shown for WatchResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        names.shown_revision(&mut self.compact_revision);
        self.events.shown(names);
    }
}

impl Shown for LeaseGrantResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        names.shown_lease(&mut self.id);
    }
}

impl Shown for LeaseKeepAliveResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        names.shown_lease(&mut self.id);
    }
}

impl Shown for LeaseTimeToLiveResponse {
    fn shown(&mut self, names: &Names) {
        /// How much of a lease may be over, in seconds, since the case began.
        const OVER: i64 = 60;
        self.header.shown(names);
        names.shown_lease(&mut self.id);
        if self.ttl > 0 && (self.granted_ttl - OVER..=self.granted_ttl).contains(&self.ttl) {
            self.ttl = self.granted_ttl;
        }
        for key in &mut self.keys {
            names.shown_key(key);
        }
        // In no order.
        self.keys.sort();
    }
}

impl Shown for LeaseLeasesResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        for lease in &mut self.leases {
            names.shown_lease(&mut lease.id);
        }
        // By the time that is left, which two servers do not share.
        self.leases.sort_by_key(|lease| lease.id);
    }
}

impl Shown for LockResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        names.shown_key(&mut self.key);
    }
}

impl Shown for LeaderKey {
    fn shown(&mut self, names: &Names) {
        names.shown_key(&mut self.key);
        names.shown_revision(&mut self.rev);
        names.shown_lease(&mut self.lease);
    }
}

impl Shown for HashKvResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        // Over each server's own storage: members compare it with each other.
        self.hash = self.hash.min(1);
        names.shown_revision(&mut self.compact_revision);
        names.shown_revision(&mut self.hash_revision);
    }
}

impl Shown for MemberListResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        for member in &mut self.members {
            member.id = member.id.min(1);
            member.name = "name".to_owned();
            for url in member.peer_ur_ls.iter_mut().chain(&mut member.client_ur_ls) {
                *url = "url".to_owned();
            }
        }
    }
}

impl Shown for StatusResponse {
    fn shown(&mut self, names: &Names) {
        self.header.shown(names);
        self.leader = self.leader.min(1);
        self.raft_index = self.raft_index.min(1);
        self.raft_term = self.raft_term.min(1);
        self.raft_applied_index = self.raft_applied_index.min(1);
        self.db_size = self.db_size.min(1);
        self.db_size_in_use = self.db_size_in_use.min(1);
    }
}
