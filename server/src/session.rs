//! `conclave.v1.Session`.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_core::{
    ids::{Attachment, SessionId},
    limits,
    replica::{AnswerBody, Query},
};
use conclave_primitives as primitives;
use conclave_proto::{
    internal::{AttachSession, CloseSession, OpenSession, command::Body},
    v1::{self, session_server::Session},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    convert, events,
    gateway::Gateway,
    metrics::{Counted, Method},
    status::Refusal,
    validate::{self, Invalid},
};

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

    async fn attach(
        &self,
        request: Request<v1::AttachSessionRequest>,
    ) -> Result<Response<v1::AttachSessionResponse>, Status> {
        self.0
            .serve(Method::SessionAttach, attach(&self.0, request.into_inner()))
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
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let work = list(&self.0, request.into_inner());
        self.0.serve(Method::SessionList, work).await
    }

    type WatchStream = Counted<ReceiverStream<Result<v1::SessionEvent, Status>>>;

    async fn watch(
        &self,
        request: Request<Streaming<v1::WatchSessionsRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let follow = async {
            let events = events::follow(Arc::clone(&self.0), request.into_inner());
            Ok(ReceiverStream::new(events))
        };
        self.0.stream(Method::SessionWatch, follow).await
    }
}

pub(crate) async fn open(
    gateway: &Gateway,
    request: v1::OpenSessionRequest,
) -> Result<v1::OpenSessionResponse, Refusal> {
    validate::session_face(&request.name, &request.metadata)?;
    let ttl_ms = validate::ttl_ms(request.ttl_ms)?;
    validate::secret(&request.secret)?;
    let v1::OpenSessionRequest {
        name,
        metadata,
        secret,
        ..
    } = request;
    let answer = gateway
        .command(Body::OpenSession(OpenSession {
            ttl_ms,
            name,
            metadata,
            secret,
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

/// Attaches to a session; rare, so in no frame of a channel.
async fn attach(
    gateway: &Gateway,
    request: v1::AttachSessionRequest,
) -> Result<v1::AttachSessionResponse, Refusal> {
    validate::secret(&request.secret)?;
    let session_id = validate::session(request.session_id)?.0;
    let v1::AttachSessionRequest {
        secret,
        replaces,
        nonce,
        wanted,
        ..
    } = request;
    if wanted.len() > limits::REQUESTS_OPEN_MAX {
        return Err(Invalid::Argument("wanted: there are too many").into());
    }
    let attach = Body::AttachSession(AttachSession {
        session_id,
        secret,
        replaces,
        nonce,
        wanted,
    });
    let answer = gateway.ending(attach).await?;
    let AnswerBody::SessionAttached {
        attachment,
        last_request,
        ttl_ms,
        holdings: primitives::Answer::Grants {
            grants, waiting, ..
        },
    } = answer.body
    else {
        return Err(ANOTHER_KIND);
    };
    Ok(v1::AttachSessionResponse {
        header: gateway.header(answer.revision, answer.term),
        attachment,
        last_request,
        ttl_ms,
        grants: grants.into_iter().map(convert::held).collect(),
        places: waiting.into_iter().map(convert::place).collect(),
    })
}

pub(crate) async fn renew(
    gateway: &Gateway,
    request: v1::RenewSessionRequest,
) -> Result<v1::RenewSessionResponse, Refusal> {
    let of = Attachment {
        session: validate::session(request.session_id)?,
        number: request.attachment,
    };
    let answer = gateway.renew(of).await?;
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
        .ending(Body::CloseSession(CloseSession {
            session_id,
            attachment: request.attachment,
        }))
        .await?;
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::CloseSessionResponse { header })
}

async fn list(
    gateway: &Gateway,
    request: v1::ListSessionsRequest,
) -> Result<v1::ListSessionsResponse, Refusal> {
    let limit = match request.limit as usize {
        0 => limits::LIST_SESSIONS_MAX,
        limit => limit.min(limits::LIST_SESSIONS_MAX),
    };
    let after = (request.after != 0).then_some(SessionId(request.after));
    let answer = gateway.read(Query::Sessions { after, limit }).await?;
    let AnswerBody::Sessions {
        log_time_ms,
        sessions,
        more,
    } = answer.body
    else {
        return Err(ANOTHER_KIND);
    };
    let sessions = sessions
        .into_iter()
        .map(|(id, session)| convert::session_info(id, session, log_time_ms))
        .collect();
    let header = gateway.header(answer.revision, answer.term);
    Ok(v1::ListSessionsResponse {
        header,
        sessions,
        more,
    })
}
