//! `v3electionpb.Election`, on the queue of native elections.
//!
//! The key of a candidate is `NAME/LEASE`, with the lease in lowercase hex; its value is
//! what it proclaims. As with etcd, any candidate may proclaim, by the revision of its
//! key; and unlike with etcd, one whose lease is dead never comes to lead.

use async_trait::async_trait;
use conclave_core::replica::{AnswerBody, Query};
use conclave_primitives::{self as primitives, observer::Observation};
use conclave_proto::{
    etcd::{
        mvccpb::KeyValue,
        v3electionpb::{
            CampaignRequest, CampaignResponse, LeaderKey, LeaderRequest, LeaderResponse,
            ProclaimRequest, ProclaimResponse, ResignRequest, ResignResponse,
            election_server::Election,
        },
    },
    internal::{
        DeleteRange, ElectCampaign, Put, operation::Operation as Kind, primitive_command::Command,
    },
};
use futures_util::stream::{BoxStream, StreamExt as _};
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::{
    Etcd,
    contention::{contend, if_made_at, name_of, renewed_once},
    signed,
    status::Error,
};
use crate::{
    metrics::{Counted, Method},
    observe,
    status::Refusal,
};

const ANOTHER_KIND: Error = Error::Refused(Refusal::Internal("election"));

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct ElectionService(pub(super) Etcd);

#[async_trait]
impl Election for ElectionService {
    type ObserveStream = Counted<BoxStream<'static, Result<LeaderResponse, Status>>>;

    async fn campaign(
        &self,
        request: Request<CampaignRequest>,
    ) -> Result<Response<CampaignResponse>, Status> {
        let etcd = &self.0;
        let work = |request| async { campaign(etcd, request).await.map_err(Error::in_recipe) };
        etcd.serve(Method::V3Campaign, request, work).await
    }

    async fn proclaim(
        &self,
        request: Request<ProclaimRequest>,
    ) -> Result<Response<ProclaimResponse>, Status> {
        let etcd = &self.0;
        let work = |request| async { proclaim(etcd, request).await.map_err(Error::in_recipe) };
        etcd.serve(Method::V3Proclaim, request, work).await
    }

    async fn leader(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<LeaderResponse>, Status> {
        let etcd = &self.0;
        let work = |request| async { leader(etcd, request).await.map_err(Error::in_recipe) };
        etcd.serve(Method::V3Leader, request, work).await
    }

    async fn observe(
        &self,
        request: Request<LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let etcd = &self.0;
        let open = async |request, wants_leader| {
            let observed = observe(etcd, request, wants_leader).await;
            observed.map_err(Error::in_recipe)
        };
        etcd.stream(Method::V3Observe, request, open).await
    }

    async fn resign(
        &self,
        request: Request<ResignRequest>,
    ) -> Result<Response<ResignResponse>, Status> {
        let etcd = &self.0;
        let work = |request| async { resign(etcd, request).await.map_err(Error::in_recipe) };
        etcd.serve(Method::V3Resign, request, work).await
    }
}

async fn campaign(etcd: &Etcd, request: CampaignRequest) -> Result<CampaignResponse, Error> {
    etcd.check_size(request.encoded_len())?;
    let CampaignRequest { name, lease, value } = request;
    let text = name_of(&name)?;
    let command = |session_id, tag| {
        Command::ElectCampaign(ElectCampaign {
            name: text.clone(),
            session_id,
            tag,
            value: value.clone(),
            plain: true,
            ..ElectCampaign::default()
        })
    };
    let granted = contend(etcd, text.clone(), lease, command).await?;
    let leader = LeaderKey {
        name,
        key: granted.key,
        rev: signed(granted.revision),
        lease: granted.lease,
    };
    Ok(CampaignResponse {
        header: granted.header,
        leader: Some(leader),
    })
}

/// Whose lease is not said keeps it.
async fn proclaim(etcd: &Etcd, request: ProclaimRequest) -> Result<ProclaimResponse, Error> {
    let ProclaimRequest { leader, value } = request;
    let LeaderKey {
        key, rev, lease, ..
    } = leader.ok_or(Error::LeaderMissing)?;
    let put = Put {
        key: key.clone(),
        value,
        lease,
        ignore_lease: lease == 0,
        ..Put::default()
    };
    let proclaims = if_made_at(etcd, key, rev, Kind::Put(put));
    match renewed_once(etcd, lease, proclaims).await.0? {
        (header, true) => Ok(ProclaimResponse { header }),
        (_, false) => Err(Error::NotElected),
    }
}

/// Of a candidate that is none any more, nothing happens.
async fn resign(etcd: &Etcd, request: ResignRequest) -> Result<ResignResponse, Error> {
    let LeaderKey {
        key, rev, lease, ..
    } = request.leader.ok_or(Error::LeaderMissing)?;
    let delete = DeleteRange {
        key: key.clone(),
        ..DeleteRange::default()
    };
    let resigns = if_made_at(etcd, key, rev, Kind::DeleteRange(delete));
    let (header, _) = renewed_once(etcd, lease, resigns).await.0?;
    Ok(ResignResponse { header })
}

async fn leader(etcd: &Etcd, request: LeaderRequest) -> Result<LeaderResponse, Error> {
    let name = name_of(&request.name)?;
    let question = || Query::Machine(primitives::Query::Leader { name: name.clone() });
    let answer = etcd.read(question).await?;
    let AnswerBody::Query(primitives::Answer::Leader(leader)) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    Ok(LeaderResponse {
        header: etcd.header(answer.revision, answer.term),
        kv: Some(key_value(leader.ok_or(Error::NobodyElected)?)),
    })
}

/// Tells who leads and what it proclaims, and says nothing while nobody leads.
async fn observe(
    etcd: &Etcd,
    request: LeaderRequest,
    wants_leader: bool,
) -> Result<BoxStream<'static, Result<LeaderResponse, Status>>, Error> {
    let name = name_of(&request.name)?;
    let observations = observe::observe(&etcd.0, &name, 0, wants_leader).await?;
    let told = etcd.clone();
    let told = observations.filter_map(move |observation| {
        let response = match observation {
            Ok(Observation { revision, leader }) => leader.map(|leader| {
                Ok(LeaderResponse {
                    header: told.header(revision, told.handle.status().term),
                    kv: Some(key_value(leader)),
                })
            }),
            Err(refusal) => Some(Err(Error::from(refusal).in_recipe().into_status())),
        };
        async { response }
    });
    Ok(told.boxed())
}

/// The key of a leader as the wire has it.
fn key_value(leader: primitives::Leader) -> KeyValue {
    KeyValue {
        key: leader.key,
        create_revision: signed(leader.term),
        mod_revision: signed(leader.proclaimed),
        version: signed(leader.version),
        value: leader.value,
        lease: leader.session.map_or(0, |session| session.0),
    }
}
