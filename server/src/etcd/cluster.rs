//! `etcdserverpb.Cluster`. Members cannot be changed yet: a request that etcd would
//! refuse is refused as by etcd, and the others with [`Error::MembersFixed`].

use async_trait::async_trait;
use conclave_core::replica::{Query, Status as NodeStatus};
use conclave_proto::etcd::etcdserverpb::{
    Member, MemberAddRequest, MemberAddResponse, MemberListRequest, MemberListResponse,
    MemberPromoteRequest, MemberPromoteResponse, MemberRemoveRequest, MemberRemoveResponse,
    MemberUpdateRequest, MemberUpdateResponse, cluster_server::Cluster,
};
use tonic::{Request, Response, Status};

use super::{Etcd, status::Error};
use crate::{metrics::Method, options};

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct ClusterService(pub(super) Etcd);

#[async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<MemberAddRequest>,
    ) -> Result<Response<MemberAddResponse>, Status> {
        let etcd = &self.0;
        let work = async |request| Err(add(etcd, &request));
        etcd.serve(Method::MemberAdd, request, work).await
    }

    async fn member_remove(
        &self,
        request: Request<MemberRemoveRequest>,
    ) -> Result<Response<MemberRemoveResponse>, Status> {
        let etcd = &self.0;
        let work = async |request: MemberRemoveRequest| Err(change(etcd, request.id));
        etcd.serve(Method::MemberRemove, request, work).await
    }

    async fn member_update(
        &self,
        request: Request<MemberUpdateRequest>,
    ) -> Result<Response<MemberUpdateResponse>, Status> {
        let etcd = &self.0;
        let work = async |request| Err(update(etcd, &request));
        etcd.serve(Method::MemberUpdate, request, work).await
    }

    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        let etcd = &self.0;
        let work = |request| list(etcd, request);
        etcd.serve(Method::MemberList, request, work).await
    }

    async fn member_promote(
        &self,
        request: Request<MemberPromoteRequest>,
    ) -> Result<Response<MemberPromoteResponse>, Status> {
        let etcd = &self.0;
        let work = async |request: MemberPromoteRequest| Err(promote(etcd, request.id));
        etcd.serve(Method::MemberPromote, request, work).await
    }
}

async fn list(etcd: &Etcd, request: MemberListRequest) -> Result<MemberListResponse, Error> {
    if request.linearizable {
        etcd.read(|| Query::Barrier).await?;
    }
    let status = etcd.handle.status();
    let members = etcd.settings.topology.members().iter();
    let mut members: Vec<_> = members.map(|member| described(member, &status)).collect();
    members.sort_by_key(|member| member.id);
    let header = etcd.header(0, status.term);
    Ok(MemberListResponse { header, members })
}

/// As etcd does, one that has never served has neither a name nor addresses.
fn described(member: &options::Member, status: &NodeStatus) -> Member {
    let told = status.members.iter().find(|(id, _, _)| *id == member.id);
    let (name, client_urls) = told
        .map(|(_, name, urls)| (name.clone(), urls.clone()))
        .unwrap_or_default();
    Member {
        id: member.id.0,
        name,
        peer_ur_ls: vec![member.peer_url.to_string()],
        client_ur_ls: client_urls,
        is_learner: false,
    }
}

fn add(etcd: &Etcd, request: &MemberAddRequest) -> Error {
    if !are_urls(&request.peer_ur_ls) {
        return Error::InvalidMemberUrls;
    }
    if are_known(etcd, &request.peer_ur_ls, None) {
        return Error::PeerUrlsExist;
    }
    Error::MembersFixed
}

/// As in etcd, what is given need not be addresses.
fn update(etcd: &Etcd, request: &MemberUpdateRequest) -> Error {
    if is_member(etcd, request.id) && are_known(etcd, &request.peer_ur_ls, Some(request.id)) {
        return Error::PeerUrlsExist;
    }
    change(etcd, request.id)
}

/// Whether one of them is that of a member, but for this one.
fn are_known(etcd: &Etcd, urls: &[String], but_for: Option<u64>) -> bool {
    let mut members = etcd.settings.topology.members().iter();
    members
        .any(|member| Some(member.id.0) != but_for && urls.contains(&member.peer_url.to_string()))
}

fn change(etcd: &Etcd, id: u64) -> Error {
    if is_member(etcd, id) {
        Error::MembersFixed
    } else {
        Error::MemberNotFound
    }
}

fn promote(etcd: &Etcd, id: u64) -> Error {
    if is_member(etcd, id) {
        Error::NoLearner
    } else {
        Error::MemberNotFound
    }
}

pub(super) fn is_member(etcd: &Etcd, id: u64) -> bool {
    let members = etcd.settings.topology.members();
    members.iter().any(|member| member.id.0 == id)
}

/// Whether there are any, and all are of a scheme that etcd knows, with a host and a
/// port, and nothing behind them.
fn are_urls(urls: &[String]) -> bool {
    !urls.is_empty() && urls.iter().all(|url| is_url(url))
}

fn is_url(url: &str) -> bool {
    let Some((scheme, address)) = url.trim().split_once("://") else {
        return false;
    };
    let has_port = address
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.bytes().all(|digit| digit.is_ascii_digit()));
    matches!(scheme, "http" | "https" | "unix" | "unixs") && has_port && !address.contains('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_told_from_what_is_none() {
        let one = |url: &str| are_urls(&[url.to_owned()]);
        assert!(one("http://a:2380") && one("https://[::1]:1") && one("unix://a:1"));
        for wrong in [
            "",
            "a:1",
            "ftp://a:1",
            "http://a",
            "http://a:b",
            "http://a:1/b",
        ] {
            assert!(!one(wrong), "{wrong}");
        }
        assert!(!are_urls(&[]));
    }
}
