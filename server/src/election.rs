//! `conclave.v1.Election`.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_core::ids::SessionId;
use conclave_primitives::{self as primitives, Reply, name::contender_key, observer::Observation};
use conclave_proto::{
    internal::{ElectCampaign, ElectProclaim, ElectResign, primitive_command::Command},
    v1::{self, election_server::Election},
};
use futures_util::stream::{BoxStream, StreamExt as _};
use tonic::{Request, Response, Status};

use crate::{
    convert,
    gateway::Gateway,
    lock::{ANOTHER_REQUEST, cancel, query, run, run_unnumbered},
    metrics::Method,
    observe,
    status::Refusal,
    validate,
};

const ANOTHER_KIND: Refusal = Refusal::Internal("election");

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct ElectionService(pub(crate) Arc<Gateway>);

#[async_trait]
impl Election for ElectionService {
    type ObserveStream = BoxStream<'static, Result<v1::ObserveResponse, Status>>;

    async fn campaign(
        &self,
        request: Request<v1::CampaignRequest>,
    ) -> Result<Response<v1::CampaignResponse>, Status> {
        let work = campaign(&self.0, request.into_inner());
        self.0.serve(Method::ElectionCampaign, work).await
    }

    async fn proclaim(
        &self,
        request: Request<v1::ProclaimRequest>,
    ) -> Result<Response<v1::ProclaimResponse>, Status> {
        let work = proclaim(&self.0, request.into_inner());
        self.0.serve(Method::ElectionProclaim, work).await
    }

    async fn resign(
        &self,
        request: Request<v1::ResignRequest>,
    ) -> Result<Response<v1::ResignResponse>, Status> {
        let work = resign(&self.0, request.into_inner());
        self.0.serve(Method::ElectionResign, work).await
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        let work = cancel(&self.0, request.into_inner());
        self.0.serve(Method::ElectionCancel, work).await
    }

    async fn leader(
        &self,
        request: Request<v1::LeaderRequest>,
    ) -> Result<Response<v1::LeaderResponse>, Status> {
        let work = leader(&self.0, request.into_inner());
        self.0.serve(Method::ElectionLeader, work).await
    }

    async fn observe(
        &self,
        request: Request<v1::ObserveRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let work = observe(Arc::clone(&self.0), request.into_inner());
        self.0.serve(Method::ElectionObserve, work).await
    }

    async fn list(
        &self,
        request: Request<v1::ListElectionsRequest>,
    ) -> Result<Response<v1::ListElectionsResponse>, Status> {
        let work = list(&self.0, request.into_inner());
        self.0.serve(Method::ElectionList, work).await
    }
}

pub(crate) async fn campaign(
    gateway: &Arc<Gateway>,
    request: v1::CampaignRequest,
) -> Result<v1::CampaignResponse, Refusal> {
    validate::contender(&request.name, request.session_id, &request.owner)?;
    validate::election_value(&request.value)?;
    let number = validate::number(request.number)?;
    let is_numbered = number.number != 0;
    let candidate = (
        request.name.clone(),
        request.session_id,
        request.owner.clone(),
    );
    let command = ElectCampaign {
        name: request.name,
        session_id: request.session_id,
        owner: request.owner,
        request: Some(number),
        tag: 0,
        wait_ms: request.wait_ms,
        value: request.value,
        plain: false,
    };
    let (name, session_id, owner) = candidate.clone();
    let (header, reply) = if is_numbered {
        run(gateway, Command::ElectCampaign(command)).await?
    } else {
        let tagged = |tag| Command::ElectCampaign(ElectCampaign { tag, ..command });
        run_unnumbered(gateway, candidate, tagged).await?
    };
    match reply {
        Reply::Granted { key, token }
            if contender_key(&name, SessionId(session_id), &owner).as_ref() == Ok(&key) =>
        {
            let term = token;
            Ok(v1::CampaignResponse { header, key, term })
        }
        _ => Err(ANOTHER_REQUEST.into()),
    }
}

pub(crate) async fn proclaim(
    gateway: &Gateway,
    request: v1::ProclaimRequest,
) -> Result<v1::ProclaimResponse, Refusal> {
    validate::contender(&request.name, request.session_id, &request.owner)?;
    validate::election_value(&request.value)?;
    let v1::ProclaimRequest {
        name,
        session_id,
        owner,
        term: token,
        value,
        number,
    } = request;
    let command = Command::ElectProclaim(ElectProclaim {
        name,
        session_id,
        owner,
        token,
        value,
        request: Some(validate::number(number)?),
    });
    match run(gateway, command).await? {
        (header, Reply::Proclaimed) => Ok(v1::ProclaimResponse { header }),
        _ => Err(ANOTHER_REQUEST.into()),
    }
}

pub(crate) async fn resign(
    gateway: &Gateway,
    request: v1::ResignRequest,
) -> Result<v1::ResignResponse, Refusal> {
    validate::contender(&request.name, request.session_id, &request.owner)?;
    let v1::ResignRequest {
        name,
        session_id,
        owner,
        term: token,
        number,
    } = request;
    let command = Command::ElectResign(ElectResign {
        name,
        session_id,
        owner,
        token,
        request: Some(validate::number(number)?),
    });
    match run(gateway, command).await? {
        (header, Reply::Resigned) => Ok(v1::ResignResponse { header }),
        _ => Err(ANOTHER_REQUEST.into()),
    }
}

async fn leader(
    gateway: &Gateway,
    request: v1::LeaderRequest,
) -> Result<v1::LeaderResponse, Refusal> {
    let v1::LeaderRequest { name } = request;
    validate::lock_name(&name)?;
    let (header, found) = query(gateway, primitives::Query::Leader { name }).await?;
    let primitives::Answer::Leader(leader) = found else {
        return Err(ANOTHER_KIND);
    };
    let leader = leader.map(convert::leader);
    Ok(v1::LeaderResponse { header, leader })
}

async fn observe(
    gateway: Arc<Gateway>,
    request: v1::ObserveRequest,
) -> Result<BoxStream<'static, Result<v1::ObserveResponse, Status>>, Refusal> {
    let v1::ObserveRequest {
        name,
        after_revision,
    } = request;
    validate::lock_name(&name)?;
    let observations = observe::observe(&gateway, &name, after_revision, true).await?;
    let told = move |observation: Result<Observation, Refusal>| {
        let Observation { revision, leader } =
            observation.map_err(|refusal| gateway.status_of(refusal))?;
        Ok(v1::ObserveResponse {
            header: gateway.header(revision, gateway.handle.status().term),
            revision,
            leader: leader.map(convert::leader),
        })
    };
    Ok(observations.map(told).boxed())
}

async fn list(
    gateway: &Gateway,
    request: v1::ListElectionsRequest,
) -> Result<v1::ListElectionsResponse, Refusal> {
    let v1::ListElectionsRequest { name, limit, after } = request;
    let name = validate::listed(name, &after)?;
    // The primitive bounds it, and takes 0 for as many as there may be.
    let limit = limit as usize;
    let question = primitives::Query::Elections { name, after, limit };
    let (header, found) = query(gateway, question).await?;
    let primitives::Answer::Elections { elections, more } = found else {
        return Err(ANOTHER_KIND);
    };
    let elections = elections.into_iter().map(convert::election).collect();
    Ok(v1::ListElectionsResponse {
        header,
        elections,
        more,
    })
}
