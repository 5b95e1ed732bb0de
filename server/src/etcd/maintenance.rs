//! `etcdserverpb.Maintenance`.

use std::time::Duration;

use async_trait::async_trait;
use conclave_core::{
    ids::{NodeId, Revision},
    keyspace::Hashed,
    replica::{AnswerBody, Query, Role},
};
use conclave_proto::{
    etcd::etcdserverpb::{
        AlarmMember, AlarmRequest, AlarmResponse, AlarmType, DefragmentRequest, DefragmentResponse,
        DowngradeInfo, DowngradeRequest, DowngradeResponse, HashKvRequest, HashKvResponse,
        HashRequest, HashResponse, MoveLeaderRequest, MoveLeaderResponse, SnapshotRequest,
        StatusRequest, StatusResponse, alarm_request::AlarmAction,
        downgrade_request::DowngradeAction, maintenance_server::Maintenance,
    },
    internal::{NoSpace, command::Body},
};
use tokio::time;
use tonic::{Request, Response, Status};

use super::{Etcd, VERSION, cluster, signed, snapshot, status::Error};
use crate::{
    metrics::{Counted, Method},
    status::Refusal,
};

const ANOTHER_KIND: Error = Error::Refused(Refusal::Internal("Maintenance"));
/// How often it is looked whether something has happened.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct MaintenanceService(pub(super) Etcd);

#[async_trait]
impl Maintenance for MaintenanceService {
    async fn alarm(
        &self,
        request: Request<AlarmRequest>,
    ) -> Result<Response<AlarmResponse>, Status> {
        let etcd = &self.0;
        let work = |request| alarm(etcd, request);
        etcd.serve(Method::Alarm, request, work).await
    }

    async fn status(
        &self,
        request: Request<StatusRequest>,
    ) -> Result<Response<StatusResponse>, Status> {
        let etcd = &self.0;
        let work = async |_| Ok(status(etcd));
        etcd.serve(Method::MemberStatus, request, work).await
    }

    async fn defragment(
        &self,
        request: Request<DefragmentRequest>,
    ) -> Result<Response<DefragmentResponse>, Status> {
        let etcd = &self.0;
        let work = |_| defragment(etcd);
        etcd.serve(Method::Defragment, request, work).await
    }

    async fn hash(&self, request: Request<HashRequest>) -> Result<Response<HashResponse>, Status> {
        let etcd = &self.0;
        let work = |_| hash(etcd);
        etcd.serve(Method::Hash, request, work).await
    }

    async fn hash_kv(
        &self,
        request: Request<HashKvRequest>,
    ) -> Result<Response<HashKvResponse>, Status> {
        let etcd = &self.0;
        let work = |request| hash_kv(etcd, request);
        etcd.serve(Method::HashKv, request, work).await
    }

    type SnapshotStream = Counted<snapshot::Blobs>;

    async fn snapshot(
        &self,
        request: Request<SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let etcd = &self.0;
        let open = async |_, _| Ok(snapshot::begin(etcd));
        etcd.stream(Method::Snapshot, request, open).await
    }

    async fn move_leader(
        &self,
        request: Request<MoveLeaderRequest>,
    ) -> Result<Response<MoveLeaderResponse>, Status> {
        let etcd = &self.0;
        let work = |request| move_leader(etcd, request);
        etcd.serve(Method::MoveLeader, request, work).await
    }

    async fn downgrade(
        &self,
        request: Request<DowngradeRequest>,
    ) -> Result<Response<DowngradeResponse>, Status> {
        let etcd = &self.0;
        let work = async |request| Err(downgrade(&request));
        etcd.serve(Method::Downgrade, request, work).await
    }
}

/// What is no change, and what is not known, is answered with no alarm, as by etcd.
async fn alarm(etcd: &Etcd, request: AlarmRequest) -> Result<AlarmResponse, Error> {
    let AlarmRequest {
        action,
        member_id,
        alarm,
    } = request;
    let alarm = AlarmType::try_from(alarm).ok();
    let none = Err(|| Query::Alarms);
    let change = match (AlarmAction::try_from(action), alarm) {
        (Ok(AlarmAction::Activate), Some(AlarmType::Corrupt)) => return Err(Error::NoSuchAlarm),
        (Ok(AlarmAction::Activate), Some(AlarmType::Nospace)) => {
            if !cluster::is_member(etcd, member_id) {
                return Err(Error::MemberNotFound);
            }
            Ok(true)
        }
        (Ok(AlarmAction::Deactivate), Some(AlarmType::Nospace)) if member_id != 0 => Ok(false),
        _ => none,
    };
    let is_shown = match AlarmAction::try_from(action) {
        Ok(AlarmAction::Get) => matches!(alarm, Some(AlarmType::None | AlarmType::Nospace)),
        _ => change.is_ok(),
    };
    let answer = match change {
        Ok(raised) => {
            tracing::info!(
                member = format_args!("{member_id:x}"),
                raised,
                "alarm NOSPACE"
            );
            let member = member_id;
            etcd.command(Body::NoSpace(NoSpace { raised, member }))
                .await?
        }
        Err(query) => etcd.read(query).await?,
    };
    let AnswerBody::Alarms(members) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let members = members.into_iter().filter(|_| is_shown);
    Ok(AlarmResponse {
        header: etcd.header(answer.revision, answer.term),
        alarms: members.map(no_space).collect(),
    })
}

fn no_space(member: NodeId) -> AlarmMember {
    AlarmMember {
        member_id: member.0,
        alarm: AlarmType::Nospace.into(),
    }
}

/// What this member knows of itself. Sizes are those of the state, which the quota is
/// on.
fn status(etcd: &Etcd) -> StatusResponse {
    let status = etcd.handle.status();
    let size = signed(status.state_bytes);
    let no_leader = status.leader.is_none().then(|| {
        let status = Error::NoLeader.into_status();
        status.message().to_owned()
    });
    let alarms = status.out_of_space.iter();
    let alarms = alarms.map(|member| format!("memberID:{} alarm:NOSPACE ", member.0));
    StatusResponse {
        header: etcd.header(status.revision, status.term),
        version: VERSION.to_owned(),
        db_size: size,
        leader: status.leader.map_or(0, |leader| leader.0),
        raft_index: status.committed,
        raft_term: status.term,
        raft_applied_index: status.applied,
        errors: no_leader.into_iter().chain(alarms).collect(),
        db_size_in_use: size,
        is_learner: false,
        storage_version: VERSION.to_owned(),
        db_size_quota: signed(etcd.settings.quota_bytes),
        downgrade_info: Some(DowngradeInfo::default()),
    }
}

/// There are no pages to put in order: a checkpoint writes the state anew, and what of
/// the log and of older checkpoints is not needed any more goes with it.
async fn defragment(etcd: &Etcd) -> Result<DefragmentResponse, Error> {
    let at = checkpoint(etcd).await?;
    tracing::info!(checkpoint = at, "defragmented");
    Ok(DefragmentResponse::default())
}

/// Waits for a checkpoint that holds all that was acknowledged before this call.
pub(super) async fn checkpoint(etcd: &Etcd) -> Result<u64, Error> {
    etcd.read(|| Query::Barrier).await?;
    let at_least = etcd.handle.status().applied;
    etcd.handle.want_checkpoint(at_least);
    let written = async {
        while etcd.handle.checkpoint() < at_least {
            time::sleep(LOOK_EVERY).await;
        }
        etcd.handle.checkpoint()
    };
    tokio::select! {
        at = written => Ok(at),
        () = etcd.hub.closed() => Err(Error::Stopped),
    }
}

/// Of all keys and their history: sessions are not among what etcd hashes here, but
/// members compare those by themselves.
async fn hash(etcd: &Etcd) -> Result<HashResponse, Error> {
    let (header, hashed) = hashed(etcd, None).await?;
    Ok(HashResponse {
        header,
        hash: hashed.hash,
    })
}

async fn hash_kv(etcd: &Etcd, request: HashKvRequest) -> Result<HashKvResponse, Error> {
    let Ok(revision) = u64::try_from(request.revision) else {
        return Err(Error::Revision(etcd.below_compaction()));
    };
    let revision = Some(revision).filter(|at| *at > 0);
    let (header, hashed) = hashed(etcd, revision).await?;
    Ok(HashKvResponse {
        header,
        hash: hashed.hash,
        compact_revision: match hashed.compacted {
            // As etcd says that nothing was.
            0 => -1,
            compacted => signed(compacted),
        },
        hash_revision: signed(hashed.revision),
    })
}

async fn hashed(
    etcd: &Etcd,
    revision: Option<Revision>,
) -> Result<(Option<super::ResponseHeader>, Hashed), Error> {
    let answer = etcd.hash(revision).await?;
    let AnswerBody::Hashed(hashed) = answer.body else {
        return Err(ANOTHER_KIND);
    };
    let hashed = hashed.map_err(Refusal::Revision)?;
    Ok((etcd.header(answer.revision, answer.term), hashed))
}

async fn move_leader(etcd: &Etcd, request: MoveLeaderRequest) -> Result<MoveLeaderResponse, Error> {
    let target = request.target_id;
    if etcd.handle.status().role != Role::Leader {
        return Err(Error::NotLeader);
    }
    if !cluster::is_member(etcd, target) {
        return Err(Error::BadTransferee);
    }
    let target = NodeId(target);
    if target == etcd.settings.topology.own().id {
        return Ok(MoveLeaderResponse::default());
    }
    tracing::info!(to = %target, "leadership is to be handed over");
    etcd.handle.hand_over(target);
    let handed_over = async {
        while etcd.handle.status().leader != Some(target) {
            time::sleep(LOOK_EVERY).await;
        }
    };
    // Raft gives up after one.
    let patience = 2 * Duration::from_millis(etcd.settings.election_ms);
    match time::timeout(patience, handed_over).await {
        Ok(()) => Ok(MoveLeaderResponse::default()),
        Err(_) => Err(Error::TransferTimedOut),
    }
}

/// There is no version to go back to.
fn downgrade(request: &DowngradeRequest) -> Error {
    match DowngradeAction::try_from(request.action) {
        Ok(DowngradeAction::Cancel) => Error::NoDowngrade,
        Ok(_) if !is_version(&request.version) => Error::DowngradeVersionFormat,
        Ok(_) => Error::NotCapable,
        Err(_) => Error::UnknownAction,
    }
}

/// Whether it has the form `X.Y`.
fn is_version(version: &str) -> bool {
    let is_number =
        |part: &str| !part.is_empty() && part.bytes().all(|digit| digit.is_ascii_digit());
    version
        .split_once('.')
        .is_some_and(|(major, minor)| is_number(major) && is_number(minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_downgrade_is_refused_for_its_reason() {
        let ask = |action: i32, version: &str| {
            downgrade(&DowngradeRequest {
                action,
                version: version.to_owned(),
            })
        };
        assert_eq!(ask(0, "3.5"), Error::NotCapable);
        assert_eq!(ask(1, "3.5.1"), Error::DowngradeVersionFormat);
        assert_eq!(ask(0, ""), Error::DowngradeVersionFormat);
        assert_eq!(ask(2, ""), Error::NoDowngrade);
        assert_eq!(ask(9, "3.5"), Error::UnknownAction);
    }
}
