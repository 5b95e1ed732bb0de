//! `conclave.v1.Cluster`.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_core::replica::{AnswerBody, Role, Status as NodeStatus};
use conclave_proto::{
    internal::{Compact, NoSpace, command::Body},
    v1::{self, cluster_server::Cluster},
};
use tonic::{Request, Response, Status};

use crate::{gateway::Gateway, metrics::Method, options::Member, status::Refusal};

const ANOTHER_KIND: Refusal = Refusal::Internal("cluster");

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct ClusterService(pub(crate) Arc<Gateway>);

#[async_trait]
impl Cluster for ClusterService {
    async fn status(
        &self,
        _request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let gateway = &self.0;
        gateway
            .serve(Method::ClusterStatus, async { Ok(status(gateway)) })
            .await
    }

    async fn compact(
        &self,
        request: Request<v1::CompactRequest>,
    ) -> Result<Response<v1::CompactResponse>, Status> {
        let gateway = &self.0;
        let work = compact(gateway, request.into_inner());
        gateway.serve(Method::ClusterCompact, work).await
    }

    async fn disarm(
        &self,
        _request: Request<v1::DisarmRequest>,
    ) -> Result<Response<v1::DisarmResponse>, Status> {
        let gateway = &self.0;
        let work = disarm(gateway);
        gateway.serve(Method::ClusterDisarm, work).await
    }
}

async fn compact(
    gateway: &Gateway,
    request: v1::CompactRequest,
) -> Result<v1::CompactResponse, Refusal> {
    let revision = request.revision;
    tracing::info!(revision, "history is to be compacted");
    let body = Body::Compact(Compact { revision });
    let answer = gateway.command(body).await?;
    let AnswerBody::Compacted(Ok(())) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::CompactResponse { header })
}

async fn disarm(gateway: &Gateway) -> Result<v1::DisarmResponse, Refusal> {
    tracing::info!("alarms are to be cleared");
    let body = Body::NoSpace(NoSpace {
        raised: false,
        member: 0,
    });
    let answer = gateway.command(body).await?;
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::DisarmResponse { header })
}

fn status(gateway: &Gateway) -> v1::StatusResponse {
    let settings = &gateway.settings;
    let status = gateway.handle.status();
    v1::StatusResponse {
        header: gateway.header(status.revision, status.term),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        member_name: settings.name.clone(),
        role: role_name(status.role).to_owned(),
        applied_index: status.applied,
        committed_index: status.committed,
        log_bytes: gateway.handle.log_bytes(),
        sessions: status.sessions as u64,
        keys: status.keys as u64,
        members: settings
            .topology
            .members()
            .iter()
            .map(|member| describe(member, &status))
            .collect(),
        compacted_revision: status.compacted,
        state_bytes: status.state_bytes,
        alarms: status
            .is_out_of_space()
            .then(|| "NOSPACE".to_owned())
            .into_iter()
            .collect(),
    }
}

fn describe(member: &Member, status: &NodeStatus) -> v1::Member {
    let told = status.members.iter().find(|(id, _, _)| *id == member.id);
    v1::Member {
        id: member.id.0,
        name: member.name.clone(),
        peer_urls: vec![member.peer_url.to_string()],
        client_urls: told.map(|(_, _, urls)| urls.clone()).unwrap_or_default(),
    }
}

/// As in the schema.
pub(crate) fn role_name(role: Role) -> &'static str {
    match role {
        Role::Joining => "joining",
        Role::Follower => "follower",
        Role::Candidate => "candidate",
        Role::Leader => "leader",
    }
}
