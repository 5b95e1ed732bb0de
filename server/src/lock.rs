//! `conclave.v1.Lock`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use conclave_core::{
    limits,
    replica::{AnswerBody, Failure, Query},
};
use conclave_primitives::{self as primitives, Reply};
use conclave_proto::{
    internal::{
        self, LockAcquire, LockCancel, LockForceRelease, LockRelease, primitive_command::Command,
    },
    v1::{self, lock_server::Lock},
};
use tokio::time::{self, Instant};
use tonic::{Request, Response, Status};

use crate::{
    convert,
    gateway::Gateway,
    metrics::Method,
    status::Refusal,
    validate::{self, Invalid},
};

/// For how long the withdrawal of an abandoned call is tried. After that its
/// place stays until the session ends.
const WITHDRAW_FOR: Duration = Duration::from_secs(60);
/// Between two tries.
const WITHDRAW_PAUSE: Duration = Duration::from_millis(500);

const ANOTHER_KIND: Refusal = Refusal::Internal("lock");
/// A number has been used before, for something else.
pub(crate) const ANOTHER_REQUEST: Invalid =
    Invalid::Argument("number: it is that of another request");

pub(crate) type Header = Option<v1::ResponseHeader>;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct LockService(pub(crate) Arc<Gateway>);

#[async_trait]
impl Lock for LockService {
    async fn acquire(
        &self,
        request: Request<v1::AcquireRequest>,
    ) -> Result<Response<v1::AcquireResponse>, Status> {
        self.0
            .serve(Method::LockAcquire, acquire(&self.0, request.into_inner()))
            .await
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.0
            .serve(Method::LockRelease, release(&self.0, request.into_inner()))
            .await
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        self.0
            .serve(Method::LockCancel, cancel(&self.0, request.into_inner()))
            .await
    }

    async fn force_release(
        &self,
        request: Request<v1::ForceReleaseRequest>,
    ) -> Result<Response<v1::ForceReleaseResponse>, Status> {
        self.0
            .serve(
                Method::LockForceRelease,
                force_release(&self.0, request.into_inner()),
            )
            .await
    }

    async fn list(
        &self,
        request: Request<v1::ListLocksRequest>,
    ) -> Result<Response<v1::ListLocksResponse>, Status> {
        self.0
            .serve(Method::LockList, list(&self.0, request.into_inner()))
            .await
    }

    async fn check(
        &self,
        request: Request<v1::CheckRequest>,
    ) -> Result<Response<v1::CheckResponse>, Status> {
        self.0
            .serve(Method::LockCheck, check(&self.0, request.into_inner()))
            .await
    }
}

pub(crate) async fn acquire(
    gateway: &Arc<Gateway>,
    request: v1::AcquireRequest,
) -> Result<v1::AcquireResponse, Refusal> {
    validate::contender(&request.name, request.session_id, &request.owner)?;
    validate::lock_delay(request.lock_delay_ms)?;
    let number = validate::number(request.number)?;
    let is_numbered = number.number != 0;
    let command = LockAcquire {
        name: request.name,
        session_id: request.session_id,
        owner: request.owner,
        request: Some(number),
        tag: 0,
        wait_ms: request.wait_ms,
        delay_ms: request.lock_delay_ms,
        reentrant: request.reentrant,
        plain: false,
    };
    let (header, reply) = if is_numbered {
        run(gateway, Command::LockAcquire(command)).await?
    } else {
        let contender = (
            command.name.clone(),
            command.session_id,
            command.owner.clone(),
        );
        let tagged = |tag| Command::LockAcquire(LockAcquire { tag, ..command });
        run_unnumbered(gateway, contender, tagged).await?
    };
    let Reply::Granted { key, token } = reply else {
        return Err(ANOTHER_REQUEST.into());
    };
    Ok(v1::AcquireResponse { header, key, token })
}

/// A client that gave no number cannot cancel, so its call is withdrawn for it
/// when it is dropped, or when its outcome is not known. The tag that makes this
/// possible is given here.
pub(crate) async fn run_unnumbered(
    gateway: &Arc<Gateway>,
    (name, session_id, owner): (String, i64, String),
    tagged: impl FnOnce(u64) -> Command,
) -> Result<(Header, Reply), Refusal> {
    let tag = gateway.tag();
    let mut abandoned = Abandoned {
        gateway: Arc::clone(gateway),
        cancel: Some(LockCancel {
            name,
            session_id,
            owner,
            entry: tag,
            request: None,
        }),
    };
    let outcome = run(gateway, tagged(tag)).await;
    if outcome != Err(Failure::OutcomeUnknown.into()) {
        abandoned.cancel = None;
    }
    outcome
}

/// Withdraws a call in the background, unless disarmed before it is dropped.
struct Abandoned {
    gateway: Arc<Gateway>,
    cancel: Option<LockCancel>,
}

impl Drop for Abandoned {
    fn drop(&mut self) {
        if let Some(cancel) = self.cancel.take() {
            tokio::spawn(withdraw(Arc::clone(&self.gateway), cancel));
        }
    }
}

/// Repeats a cancellation until it is answered. It must not overtake the call, as a
/// cancel of a numbered one may: so it goes the way of the call, in the same queue, and
/// this member hands both to the leader in order.
async fn withdraw(gateway: Arc<Gateway>, cancel: LockCancel) {
    let until = Instant::now() + WITHDRAW_FOR;
    while Instant::now() < until {
        let body = primitives::command(Command::LockCancel(cancel.clone()));
        match gateway.command(body).await {
            Err(Refusal::Failed(Failure::ShuttingDown)) => return,
            Err(Refusal::Failed(_)) => time::sleep(WITHDRAW_PAUSE).await,
            Ok(_) | Err(_) => return,
        }
    }
    tracing::warn!(lock = cancel.name, session = %format_args!("{:x}", cancel.session_id),
        "an abandoned call could not be withdrawn");
}

pub(crate) async fn release(
    gateway: &Gateway,
    request: v1::ReleaseRequest,
) -> Result<v1::ReleaseResponse, Refusal> {
    validate::contender(&request.name, request.session_id, &request.owner)?;
    let v1::ReleaseRequest {
        name,
        session_id,
        owner,
        token,
        entry,
        number,
    } = request;
    let command = Command::LockRelease(LockRelease {
        name,
        session_id,
        owner,
        token,
        entry,
        request: number
            .map(|number| validate::number(Some(number)))
            .transpose()?,
    });
    match run(gateway, command).await? {
        (header, Reply::Released) => Ok(v1::ReleaseResponse { header }),
        _ => Err(ANOTHER_REQUEST.into()),
    }
}

pub(crate) async fn cancel(
    gateway: &Gateway,
    request: v1::CancelRequest,
) -> Result<v1::CancelResponse, Refusal> {
    validate::contender(&request.name, request.session_id, &request.owner)?;
    if !(1..=limits::REQUEST_NUMBER_MAX).contains(&request.request) {
        return Err(Invalid::Argument("request: it must be the number of an Acquire").into());
    }
    let v1::CancelRequest {
        name,
        session_id,
        owner,
        request: entry,
        attachment,
    } = request;
    let command = Command::LockCancel(LockCancel {
        name,
        session_id,
        owner,
        entry,
        request: Some(internal::Request {
            attachment,
            ..internal::Request::default()
        }),
    });
    let (header, _) = run(gateway, command).await?;
    Ok(v1::CancelResponse { header })
}

async fn force_release(
    gateway: &Gateway,
    request: v1::ForceReleaseRequest,
) -> Result<v1::ForceReleaseResponse, Refusal> {
    validate::lock_name(&request.name)?;
    validate::reason(&request.reason)?;
    let v1::ForceReleaseRequest {
        name,
        reason,
        token,
        skip_delay,
    } = request;
    tracing::info!(
        lock = name,
        reason,
        token,
        skip_delay,
        "a lock is to be released by force"
    );
    let command = Command::LockForceRelease(LockForceRelease {
        name,
        reason,
        token,
        skip_delay,
    });
    let (header, reply) = run(gateway, command).await?;
    let Reply::ForceReleased(released) = reply else {
        return Err(ANOTHER_KIND);
    };
    Ok(v1::ForceReleaseResponse {
        header,
        released: Some(convert::contender(released)),
    })
}

async fn list(
    gateway: &Gateway,
    request: v1::ListLocksRequest,
) -> Result<v1::ListLocksResponse, Refusal> {
    let v1::ListLocksRequest { name, limit, after } = request;
    let name = validate::listed(name, &after)?;
    // The primitive bounds it, and takes 0 for as many as there may be.
    let limit = limit as usize;
    let (header, found) = query(gateway, primitives::Query::Locks { name, after, limit }).await?;
    let primitives::Answer::Locks { locks, more } = found else {
        return Err(ANOTHER_KIND);
    };
    let locks = locks.into_iter().map(convert::lock).collect();
    Ok(v1::ListLocksResponse {
        header,
        locks,
        more,
    })
}

async fn check(gateway: &Gateway, request: v1::CheckRequest) -> Result<v1::CheckResponse, Refusal> {
    validate::lock_name(&request.name)?;
    let v1::CheckRequest { name, token } = request;
    let (header, found) = query(gateway, primitives::Query::Check { name, token }).await?;
    let primitives::Answer::Checked(held) = found else {
        return Err(ANOTHER_KIND);
    };
    Ok(v1::CheckResponse { header, held })
}

/// Has a command replicated; what gives a lock or place back goes ahead of what
/// wants one.
pub(crate) async fn run(gateway: &Gateway, command: Command) -> Result<(Header, Reply), Refusal> {
    let wants = matches!(
        command,
        Command::LockAcquire(_) | Command::ElectCampaign(_) | Command::ElectProclaim(_)
    );
    let body = primitives::command(command);
    let answer = match wants {
        true => gateway.command(body).await?,
        false => gateway.ending(body).await?,
    };
    let AnswerBody::Machine(Ok(reply)) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    Ok((gateway.header(answer.revision, answer.term), reply))
}

/// Asks a linearizable question.
pub(crate) async fn query(
    gateway: &Gateway,
    query: primitives::Query,
) -> Result<(Header, primitives::Answer), Refusal> {
    let answer = gateway.read(Query::Machine(query)).await?;
    let AnswerBody::Query(found) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    Ok((gateway.header(answer.revision, answer.term), found))
}
