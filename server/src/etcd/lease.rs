//! `etcdserverpb.Lease`: a lease is a session, and every session is a lease.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;
use conclave_core::{
    ids::{Attachment, SessionId},
    keyspace::RESERVED_PREFIX,
    limits,
    replica::{AnswerBody, Failure, Query},
};
use conclave_proto::{
    etcd::etcdserverpb::{
        LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
        LeaseLeasesRequest, LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse,
        LeaseStatus, LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, ResponseHeader,
        lease_server::Lease,
    },
    internal::{GrantLease, RevokeLease, command::Body},
};
use futures_util::stream::{FuturesOrdered, StreamExt as _};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Etcd, signed,
    status::{self, Error},
};
use crate::{
    metrics::{Counted, Method},
    status::Refusal,
};

const ANOTHER_KIND: Error = Error::Refused(Refusal::Internal("Lease"));
/// The longest TTL in seconds.
const TTL_MAX: i64 = (limits::LEASE_TTL_MS_MAX / 1_000).cast_signed();
/// Renewals of one stream that are under way at a time; no more are read meanwhile.
const RENEWALS_MAX: usize = 1_024;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct LeaseService(pub(super) Etcd);

#[async_trait]
impl Lease for LeaseService {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        let etcd = &self.0;
        let work = |request| grant(etcd, request);
        etcd.serve(Method::LeaseGrant, request, work).await
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let etcd = &self.0;
        let work = |request| revoke(etcd, request);
        etcd.serve(Method::LeaseRevoke, request, work).await
    }

    type LeaseKeepAliveStream = Counted<Renewals>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let etcd = &self.0;
        let open = |requests, wants_leader| async move {
            Ok(Renewals::new(etcd.clone(), requests, wants_leader))
        };
        etcd.stream(Method::LeaseKeepAlive, request, open).await
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let etcd = &self.0;
        let work = |request| time_to_live(etcd, request);
        etcd.serve(Method::LeaseTimeToLive, request, work).await
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let etcd = &self.0;
        let work = |_| leases(etcd);
        etcd.serve(Method::LeaseLeases, request, work).await
    }
}

async fn grant(etcd: &Etcd, request: LeaseGrantRequest) -> Result<LeaseGrantResponse, Error> {
    if request.ttl > TTL_MAX {
        return Err(Error::LeaseTtlTooLarge);
    }
    let body = Body::GrantLease(GrantLease {
        session_id: request.id,
        ttl_ms: u64::try_from(request.ttl).unwrap_or(0) * 1_000,
    });
    let answer = etcd.command(body).await?;
    match answer.body {
        AnswerBody::SessionOpened { session, ttl_ms } => Ok(LeaseGrantResponse {
            header: etcd.header(answer.revision, answer.term),
            id: session.0,
            ttl: granted_s(ttl_ms),
            error: String::new(),
        }),
        AnswerBody::SessionExists => Err(Error::LeaseExists),
        _ => Err(ANOTHER_KIND),
    }
}

async fn revoke(etcd: &Etcd, request: LeaseRevokeRequest) -> Result<LeaseRevokeResponse, Error> {
    let session_id = request.id;
    let body = Body::RevokeLease(RevokeLease { session_id });
    let answer = etcd.ending(body).await?;
    let header = etcd.header(answer.revision, answer.term);
    Ok(LeaseRevokeResponse { header })
}

async fn time_to_live(
    etcd: &Etcd,
    request: LeaseTimeToLiveRequest,
) -> Result<LeaseTimeToLiveResponse, Error> {
    let header = current_header(etcd);
    match life(etcd, &request).await {
        Ok(life) => Ok(life),
        Err(Error::Refused(Refusal::SessionEnded(_))) => Ok(LeaseTimeToLiveResponse {
            header,
            id: request.id,
            ttl: -1,
            ..LeaseTimeToLiveResponse::default()
        }),
        Err(error) => Err(error),
    }
}

/// The keys are those of a moment after that of the time that is left.
async fn life(
    etcd: &Etcd,
    request: &LeaseTimeToLiveRequest,
) -> Result<LeaseTimeToLiveResponse, Error> {
    let id = SessionId(request.id);
    let answer = etcd.time_left(id).await?;
    let AnswerBody::TimeLeft { ttl_ms, left_ms } = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let mut life = LeaseTimeToLiveResponse {
        header: etcd.header(answer.revision, answer.term),
        id: request.id,
        ttl: signed(left_ms / 1_000),
        granted_ttl: granted_s(ttl_ms),
        keys: vec![],
    };
    if request.keys {
        let answer = etcd.read(|| Query::KeysOf(id)).await?;
        let AnswerBody::Keys(keys) = answer.body else {
            return Err(ANOTHER_KIND);
        };
        life.header = etcd.header(answer.revision, answer.term);
        // Those of the service are none that a client has put.
        life.keys = keys;
        life.keys.retain(|key| !key.starts_with(RESERVED_PREFIX));
    }
    Ok(life)
}

async fn leases(etcd: &Etcd) -> Result<LeaseLeasesResponse, Error> {
    let answer = etcd.read(|| Query::SessionIds).await?;
    let AnswerBody::SessionIds(ids) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let leases = ids.into_iter().map(|id| LeaseStatus { id: id.0 });
    Ok(LeaseLeasesResponse {
        header: etcd.header(answer.revision, answer.term),
        leases: leases.collect(),
    })
}

/// In seconds, as the clients of leases count. They take 0 for the end, so a native
/// session with a shorter TTL than a second has one of them here.
fn granted_s(ttl_ms: u64) -> i64 {
    signed(ttl_ms / 1_000).max(1)
}

fn current_header(etcd: &Etcd) -> Option<ResponseHeader> {
    let status = etcd.handle.status();
    etcd.header(status.revision, status.term)
}

type Renewing = Pin<Box<dyn Future<Output = Result<LeaseKeepAliveResponse, Error>> + Send>>;
type Over = Pin<Box<dyn Future<Output = Failure> + Send>>;

/// The answers to the requests of one stream, in their order. All that has arrived is
/// renewed at once, so that renewals of one stream share a confirmation.
pub(super) struct Renewals {
    etcd: Etcd,
    /// `None` once there are no more.
    requests: Option<Streaming<LeaseKeepAliveRequest>>,
    renewing: FuturesOrdered<Renewing>,
    /// What ends the stream, whatever is under way.
    is_over: Over,
}

impl Renewals {
    fn new(etcd: Etcd, requests: Streaming<LeaseKeepAliveRequest>, wants_leader: bool) -> Self {
        Self {
            is_over: Box::pin(Arc::clone(&etcd.0).is_over(wants_leader)),
            etcd,
            requests: Some(requests),
            renewing: FuturesOrdered::new(),
        }
    }

    /// Begins what has arrived. An error ends the stream.
    fn take_requests(&mut self, context: &mut Context<'_>) -> Result<(), Status> {
        while self.renewing.len() < RENEWALS_MAX
            && let Some(requests) = &mut self.requests
            && let Poll::Ready(next) = requests.poll_next_unpin(context)
        {
            match next.transpose() {
                Ok(Some(request)) => self.begin(&request),
                Ok(None) => self.requests = None,
                Err(told) => return Err(status::too_long(&told).unwrap_or(told)),
            }
        }
        Ok(())
    }

    fn begin(&mut self, request: &LeaseKeepAliveRequest) {
        let header = current_header(&self.etcd);
        let renewing = renew(self.etcd.clone(), request.id, header);
        self.renewing.push_back(Box::pin(renewing));
    }

    fn end(&mut self, status: Status) -> Poll<Option<Result<LeaseKeepAliveResponse, Status>>> {
        self.requests = None;
        self.renewing.clear();
        Poll::Ready(Some(Err(status)))
    }
}

impl Stream for Renewals {
    type Item = Result<LeaseKeepAliveResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.requests.is_none() && this.renewing.is_empty() {
            return Poll::Ready(None);
        }
        if let Poll::Ready(failure) = this.is_over.as_mut().poll(context) {
            return this.end(Error::from(Refusal::from(failure)).into_status());
        }
        if let Err(status) = this.take_requests(context) {
            return this.end(status);
        }
        match this.renewing.poll_next_unpin(context) {
            Poll::Ready(Some(Ok(response))) => Poll::Ready(Some(Ok(response))),
            Poll::Ready(Some(Err(error))) => this.end(error.into_status()),
            Poll::Ready(None) if this.requests.is_none() => Poll::Ready(None),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

/// Renews a lease for whoever it belongs to. The header is as of when the request came,
/// so that its revision is not above that at which the lease was renewed.
async fn renew(
    etcd: Etcd,
    id: i64,
    header: Option<ResponseHeader>,
) -> Result<LeaseKeepAliveResponse, Error> {
    let ttl = match etcd.renew(Attachment::present(SessionId(id))).await {
        Ok(answer) => match answer.body {
            AnswerBody::Renewed { ttl_ms } => granted_s(ttl_ms),
            _ => return Err(ANOTHER_KIND),
        },
        // There is no such lease any more.
        Err(Error::Refused(Refusal::SessionEnded(_))) => 0,
        Err(error) => return Err(error),
    };
    Ok(LeaseKeepAliveResponse { header, id, ttl })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_of_milliseconds_never_looks_like_one_that_ended() {
        for (ms, seconds) in [(500, 1), (1_000, 1), (1_999, 1), (2_000, 2), (9_999, 9)] {
            assert_eq!(granted_s(ms), seconds);
        }
    }
}
