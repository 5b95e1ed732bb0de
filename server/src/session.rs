//! `conclave.v1.Session`.

use std::{pin::Pin, sync::Arc};

use async_trait::async_trait;
use conclave_core::replica::{AnswerBody, Query};
use conclave_proto::{
    internal::{CloseSession, OpenSession, command::Body},
    v1::{self, session_server::Session},
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{convert, events, gateway::Gateway, metrics::Method, status::Refusal, validate};

const ANOTHER_KIND: Refusal = Refusal::Internal("session");

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct SessionService(pub(crate) Arc<Gateway>);

#[async_trait]
impl Session for SessionService {
    async fn open(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        self.0
            .serve(Method::SessionOpen, open(&self.0, request.into_inner()))
            .await
    }

    async fn renew(
        &self,
        request: Request<v1::RenewSessionRequest>,
    ) -> Result<Response<v1::RenewSessionResponse>, Status> {
        self.0
            .serve(Method::SessionRenew, renew(&self.0, request.into_inner()))
            .await
    }

    async fn close(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        self.0
            .serve(Method::SessionClose, close(&self.0, request.into_inner()))
            .await
    }

    async fn list(
        &self,
        _request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        self.0.serve(Method::SessionList, list(&self.0)).await
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::SessionEvent, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<Streaming<v1::WatchSessionsRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.0.metrics.begin(Method::SessionWatch).end(Code::Ok);
        let events = events::follow(Arc::clone(&self.0), request.into_inner());
        Ok(Response::new(Box::pin(ReceiverStream::new(events))))
    }
}

pub(crate) async fn open(
    gateway: &Gateway,
    request: v1::OpenSessionRequest,
) -> Result<v1::OpenSessionResponse, Refusal> {
    validate::session_face(&request.name, &request.metadata)?;
    let ttl_ms = validate::ttl_ms(request.ttl_ms)?;
    let v1::OpenSessionRequest { name, metadata, .. } = request;
    let answer = gateway
        .command(Body::OpenSession(OpenSession {
            ttl_ms,
            name,
            metadata,
        }))
        .await?;
    let AnswerBody::SessionOpened { session, ttl_ms } = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::OpenSessionResponse {
        header,
        session_id: session.0,
        ttl_ms,
    })
}

pub(crate) async fn renew(
    gateway: &Gateway,
    request: v1::RenewSessionRequest,
) -> Result<v1::RenewSessionResponse, Refusal> {
    let answer = gateway
        .renew(validate::session(request.session_id)?)
        .await?;
    let AnswerBody::Renewed { ttl_ms } = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::RenewSessionResponse { header, ttl_ms })
}

pub(crate) async fn close(
    gateway: &Gateway,
    request: v1::CloseSessionRequest,
) -> Result<v1::CloseSessionResponse, Refusal> {
    let session_id = validate::session(request.session_id)?.0;
    let answer = gateway
        .ending(Body::CloseSession(CloseSession { session_id }))
        .await?;
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::CloseSessionResponse { header })
}

async fn list(gateway: &Gateway) -> Result<v1::ListSessionsResponse, Refusal> {
    let answer = gateway.read(Query::Sessions).await?;
    let AnswerBody::Sessions {
        log_time_ms,
        sessions,
    } = answer.body
    else {
        return Err(ANOTHER_KIND);
    };
    let sessions = sessions
        .into_iter()
        .map(|(id, session, keys)| convert::session_info(id, session, keys, log_time_ms))
        .collect();
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::ListSessionsResponse { header, sessions })
}
