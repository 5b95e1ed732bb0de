//! The etcd v3 API, on the same keyspace, sessions and locks as the native one.
//! `docs/etcd.md` says what differs from etcd, and why.
//!
//! In reading order:
//!
//! - here: what all of its services share;
//! - `kv`: keys, transactions, compaction;
//! - `lock`, `election`: the services of these names, over `contention`, on native locks
//!   and elections;
//! - `watch`: events of keys;
//! - `lease`: sessions as leases;
//! - `cluster`, `maintenance` with `snapshot`, `auth`: what operators ask;
//! - `json`: all services over HTTP and JSON, too;
//! - `replies`: what tonic says by itself, in etcd's words;
//! - `status`: every error, with etcd's code and text.
//!
//! A service asks for what etcd asks, in etcd's order, then takes the way of the
//! native services: through the [`Gateway`] to the replica and back.

mod auth;
mod cluster;
mod contention;
mod election;
pub(crate) mod json;
mod kv;
mod lease;
mod lock;
mod maintenance;
mod replies;
mod snapshot;
pub(crate) mod status;
mod watch;

use std::{future::Future, ops::Deref, sync::Arc, time::Duration};

use conclave_core::{
    ids::{Attachment, Revision, SessionId, Term},
    keyspace::RevisionError,
    replica::{Failure, Query},
};
use conclave_primitives::Primitives;
use conclave_proto::{
    etcd::{
        etcdserverpb::{
            ResponseHeader, auth_server::AuthServer, cluster_server::ClusterServer,
            kv_server::KvServer, lease_server::LeaseServer, maintenance_server::MaintenanceServer,
            watch_server::WatchServer,
        },
        v3electionpb::election_server::ElectionServer,
        v3lockpb::lock_server::LockServer,
    },
    internal::command::Body,
};
use tokio::time::{self, Instant};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap, service::Routes};

pub(crate) use self::snapshot::Source as Snapshots;
use self::{
    auth::AuthService, cluster::ClusterService, election::ElectionService, kv::KvService,
    lease::LeaseService, lock::LockService, maintenance::MaintenanceService, replies::Replies,
    status::Error, watch::WatchService,
};
use crate::{
    gateway::{Answer, Gateway},
    metrics::{Counted, Method},
    routes::REQUEST_OVERHEAD_BYTES,
    status::Refusal,
};

/// The version of etcd whose API this is: clients choose by it what they ask for.
pub(crate) const VERSION: &str = "3.6.0";
/// What etcd's log puts around a request, and counts against the limit of its size.
const ENTRY_OVERHEAD_BYTES: usize = 18;
/// How long a request waits for a leader, as long as with etcd.
const LEADER_WITHIN: Duration = Duration::from_secs(7);
/// Between two attempts to reach it.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// The way to the replica, with what only this API needs.
#[derive(Clone, Debug)]
pub(crate) struct Etcd(Arc<Gateway>);

impl Deref for Etcd {
    type Target = Gateway;

    fn deref(&self) -> &Gateway {
        &self.0
    }
}

/// Adds the services of this API.
pub(crate) fn add_services(routes: Routes, gateway: &Arc<Gateway>) -> Routes {
    let etcd = Etcd(Arc::clone(gateway));
    let bytes_max = etcd.settings.max_request_bytes + REQUEST_OVERHEAD_BYTES;
    let kv = KvServer::new(KvService(etcd.clone()));
    let watch = WatchServer::new(WatchService(etcd.clone()));
    let lease = LeaseServer::new(LeaseService(etcd.clone()));
    let cluster = ClusterServer::new(ClusterService(etcd.clone()));
    let maintenance = MaintenanceServer::new(MaintenanceService(etcd.clone()));
    let lock = LockServer::new(LockService(etcd.clone()));
    let election = ElectionServer::new(ElectionService(etcd.clone()));
    let auth = AuthServer::new(AuthService(etcd));
    routes
        .add_service(Replies(kv.max_decoding_message_size(bytes_max)))
        .add_service(Replies(watch.max_decoding_message_size(bytes_max)))
        .add_service(Replies(lease.max_decoding_message_size(bytes_max)))
        .add_service(Replies(cluster.max_decoding_message_size(bytes_max)))
        .add_service(Replies(maintenance.max_decoding_message_size(bytes_max)))
        .add_service(Replies(lock.max_decoding_message_size(bytes_max)))
        .add_service(Replies(election.max_decoding_message_size(bytes_max)))
        .add_service(Replies(auth.max_decoding_message_size(bytes_max)))
}

/// Requests to the replica: as those of the [`Gateway`], but each waits for a leader. So
/// clients, which repeat no write, do not see elections and hand-overs.
impl Etcd {
    /// Has a command replicated.
    async fn command(&self, body: Body) -> Result<Answer, Error> {
        patiently(is_untaken, || self.0.command(body.clone())).await
    }

    /// Has a command replicated that gives something back, ahead of others.
    async fn ending(&self, body: Body) -> Result<Answer, Error> {
        patiently(is_untaken, || self.0.ending(body.clone())).await
    }

    /// Asks a linearizable question.
    async fn read(&self, query: impl Fn() -> Query<Primitives>) -> Result<Answer, Error> {
        patiently(is_unanswered, || self.0.read(query())).await
    }

    /// Asks how long a session has left.
    async fn time_left(&self, session: SessionId) -> Result<Answer, Error> {
        patiently(is_unanswered, || self.0.time_left(session)).await
    }

    /// Renews a session. A renewal counts from when it last set out.
    async fn renew(&self, of: Attachment) -> Result<Answer, Error> {
        patiently(is_unanswered, || self.0.renew(of)).await
    }
}

/// Repeats what fails like this until there is a leader. An attempt takes the time that
/// it takes: what was taken is not given up.
async fn patiently<T, F>(
    may_repeat: fn(&Refusal) -> bool,
    attempt: impl Fn() -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Refusal>>,
{
    let until = Instant::now() + LEADER_WITHIN;
    loop {
        match attempt().await {
            Err(refusal) if may_repeat(&refusal) => {
                if Instant::now() >= until {
                    return Err(Error::TimedOut);
                }
                time::sleep(RETRY_AFTER).await;
            }
            outcome => return Ok(outcome?),
        }
    }
}

/// Whether no member has taken it, nor ever will.
fn is_untaken(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Failed(Failure::NotLeader { .. }))
}

/// Whether there is no answer: enough to ask again for what changes nothing.
fn is_unanswered(refusal: &Refusal) -> bool {
    is_untaken(refusal) || matches!(refusal, Refusal::Failed(Failure::OutcomeUnknown))
}

impl Etcd {
    /// The header of an answer made at this revision and term.
    pub(crate) fn header(&self, revision: Revision, term: Term) -> Option<ResponseHeader> {
        let topology = &self.settings.topology;
        Some(ResponseHeader {
            cluster_id: topology.cluster,
            member_id: topology.own().id.0,
            revision: signed(revision),
            raft_term: term,
        })
    }

    /// Runs a call: checks what came with it, counts it, and tells the client why it
    /// failed.
    pub(crate) async fn serve<A, T, F>(
        &self,
        method: Method,
        request: Request<A>,
        work: impl FnOnce(A) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let call = self.metrics.begin(method);
        let (metadata, _, request) = request.into_parts();
        let outcome = match self.admit(&metadata) {
            Ok(_) => work(request).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(response) => {
                call.end(Code::Ok);
                Ok(Response::new(response))
            }
            Err(error) => {
                let status = error.into_status();
                call.end(status.code());
                Err(status)
            }
        }
    }

    /// Opens a stream: checks what came with the call, and counts it until the stream
    /// ends. `open` learns whether the client wants a leader to be known so long.
    pub(crate) async fn stream<A, S, F>(
        &self,
        method: Method,
        request: Request<A>,
        open: impl FnOnce(A, bool) -> F,
    ) -> Result<Response<Counted<S>>, Status>
    where
        F: Future<Output = Result<S, Error>>,
    {
        let call = self.metrics.begin(method);
        let (metadata, _, request) = request.into_parts();
        let opened = match self.admit(&metadata) {
            Ok(wants_leader) => open(request, wants_leader).await,
            Err(error) => Err(error),
        };
        match opened {
            Ok(stream) => Ok(Response::new(call.stream(stream))),
            Err(error) => {
                let status = error.into_status();
                call.end(status.code());
                Err(status)
            }
        }
    }

    /// Refuses a call that this member must not serve by what came with it; else says
    /// whether the client wants a leader to be known as long as the call lasts. A stream
    /// then ends when [`Gateway::is_over`] does.
    pub(crate) fn admit(&self, metadata: &MetadataMap) -> Result<bool, Error> {
        if let Some(version) = metadata.get("client-api-version")
            && str::from_utf8(version.as_encoded_bytes()).is_err()
        {
            return Err(Error::InvalidClientVersion);
        }
        let wants_leader = metadata
            .get("hasleader")
            .is_some_and(|wanted| wanted == "true");
        if wants_leader && self.handle.status().leader.is_none() {
            return Err(Error::NoLeader);
        }
        Ok(wants_leader)
    }

    /// How a revision is refused that is below every compaction.
    pub(crate) fn below_compaction(&self) -> RevisionError {
        RevisionError::Compacted {
            asked: 0,
            compacted: self.handle.status().compacted,
        }
    }

    /// Refuses what is too large for the log; `bytes` is the size of the request.
    pub(crate) fn check_size(&self, bytes: usize) -> Result<(), Error> {
        if bytes + ENTRY_OVERHEAD_BYTES > self.settings.max_request_bytes {
            return Err(Error::RequestTooLarge);
        }
        Ok(())
    }
}

/// As the wire has it. A revision, a version or a count never gets near the limit.
pub(crate) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
