//! `etcdserverpb.Cluster`, `.Maintenance` and `.Auth` over real sockets.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use bytes::{Buf as _, Bytes};
use conclave_core::checkpoint::Reader;
use conclave_proto::etcd::etcdserverpb::*;
use conclave_proto::etcd::etcdserverpb::{
    auth_client::AuthClient, cluster_client::ClusterClient, kv_client::KvClient,
    lease_client::LeaseClient, maintenance_client::MaintenanceClient,
};
use harness::{Client, Directory, Node, eventually, get, three};
use sha2::{Digest as _, Sha256};
use tonic::{Code, Response, Status, transport::Channel};

fn members(client: &Client) -> ClusterClient<Channel> {
    ClusterClient::new(client.channel.clone())
}

fn maintenance(client: &Client) -> MaintenanceClient<Channel> {
    MaintenanceClient::new(client.channel.clone())
}

async fn put(client: &Client, key: &str, value: &str) -> Result<i64, Status> {
    let request = PutRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..PutRequest::default()
    };
    let mut kv = KvClient::new(client.channel.clone());
    let put = kv.put(request).await?.into_inner();
    Ok(put.header.unwrap().revision)
}

async fn hash_kv(client: &Client, revision: i64) -> Result<HashKvResponse, Status> {
    let hashed = maintenance(client)
        .hash_kv(HashKvRequest { revision })
        .await;
    hashed.map(Response::into_inner)
}

async fn status(client: &Client) -> StatusResponse {
    let status = maintenance(client).status(StatusRequest {}).await;
    status.unwrap().into_inner()
}

#[track_caller]
fn refused<T: std::fmt::Debug>(answer: Result<Response<T>, Status>, code: Code, text: &str) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert_eq!(status.message(), format!("etcdserver: {text}"));
}

async fn cluster(directory: &Directory) -> (Vec<Node>, Vec<Client>) {
    let nodes: Vec<Node> = three(directory)
        .iter()
        .map(|member| Node::start(member).unwrap())
        .collect();
    nodes.iter().for_each(Node::await_ready);
    let mut clients = vec![];
    for node in &nodes {
        clients.push(node.connect().await);
    }
    (nodes, clients)
}

#[tokio::test]
async fn members_are_listed_and_not_changed() {
    let directory = Directory::new();
    let (_nodes, clients) = cluster(&directory).await;
    let list = |client: Client| async move {
        let linearizable = true;
        let request = MemberListRequest { linearizable };
        let list = members(&client).member_list(request).await;
        list.unwrap().into_inner()
    };
    let mut listed = list(clients[0].clone()).await;
    while listed.members.iter().any(|member| member.name.is_empty()) {
        // Each tells its name and addresses when it first serves.
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        listed = list(clients[0].clone()).await;
    }
    assert_eq!(listed.header.unwrap().revision, 0);
    let mut names: Vec<_> = listed.members.iter().map(|m| m.name.clone()).collect();
    names.sort();
    assert_eq!(names, ["a", "b", "c"]);
    assert!(listed.members.is_sorted_by_key(|member| member.id));
    for member in &listed.members {
        assert!(member.id != 0 && !member.is_learner);
        assert!(member.peer_ur_ls[0].starts_with("http://127.0.0.1:"));
        assert_eq!(member.client_ur_ls.len(), 1);
    }

    let mut members = members(&clients[0]);
    let known = listed.members[0].clone();
    let add = |urls: &[&str]| MemberAddRequest {
        peer_ur_ls: urls.iter().map(|url| (*url).to_owned()).collect(),
        is_learner: false,
    };
    let fixed = "members cannot be changed in this version";
    let wrong = "given member URLs are invalid";
    let answer = members.member_add(add(&[])).await;
    refused(answer, Code::InvalidArgument, wrong);
    let answer = members.member_add(add(&[&known.peer_ur_ls[0]])).await;
    refused(answer, Code::FailedPrecondition, "Peer URLs already exists");
    let answer = members.member_add(add(&["http://127.0.0.1:1"])).await;
    refused(answer, Code::Unimplemented, fixed);
    // Of an update, etcd does not look at the addresses, only at whose they are.
    let update = |id: u64, url: &str| MemberUpdateRequest {
        id,
        peer_ur_ls: vec![url.to_owned()],
    };
    let others = &listed.members[1].peer_ur_ls[0];
    let answer = members.member_update(update(known.id, others)).await;
    refused(answer, Code::FailedPrecondition, "Peer URLs already exists");
    for url in [&known.peer_ur_ls[0], "no address"] {
        let answer = members.member_update(update(known.id, url)).await;
        refused(answer, Code::Unimplemented, fixed);
    }
    let answer = members.member_update(update(5, others)).await;
    refused(answer, Code::NotFound, "member not found");
    for (id, code, text, promoted) in [
        (5, Code::NotFound, "member not found", Code::NotFound),
        (
            known.id,
            Code::Unimplemented,
            fixed,
            Code::FailedPrecondition,
        ),
    ] {
        let answer = members.member_remove(MemberRemoveRequest { id }).await;
        refused(answer, code, text);
        let request = MemberUpdateRequest {
            id,
            peer_ur_ls: vec!["http://127.0.0.1:1".to_owned()],
        };
        refused(members.member_update(request).await, code, text);
        let answer = members.member_promote(MemberPromoteRequest { id }).await;
        assert_eq!(answer.unwrap_err().code(), promoted);
    }
}

#[tokio::test]
async fn members_hash_the_same_at_the_same_revision() {
    let directory = Directory::new();
    let (_nodes, clients) = cluster(&directory).await;
    let fresh = hash_kv(&clients[0], 0).await.unwrap();
    assert_eq!(fresh.compact_revision, -1);
    let mut last = 0;
    for number in 0..100 {
        last = put(&clients[number % 3], &format!("k{}", number % 7), "v")
            .await
            .unwrap();
    }
    let mut hashes = vec![];
    for client in &clients {
        // Up to date from here on.
        let linearizable = true;
        let request = MemberListRequest { linearizable };
        members(client).member_list(request).await.unwrap();
        hashes.push(hash_kv(client, last).await.unwrap());
        let hash = maintenance(client).hash(HashRequest {}).await.unwrap();
        assert_eq!(hash.into_inner().hash, hashes[0].hash);
    }
    for hash in &hashes {
        assert_eq!(hash.hash, hashes[0].hash);
        assert_eq!((hash.compact_revision, hash.hash_revision), (-1, last));
    }
    let earlier = hash_kv(&clients[0], last - 5).await.unwrap();
    assert_ne!(earlier.hash, hashes[0].hash);
    assert_eq!(
        hash_kv(&clients[1], last - 5).await.unwrap().hash,
        earlier.hash
    );

    let compact = conclave_proto::v1::CompactRequest {
        revision: u64::try_from(last - 2).unwrap(),
    };
    clients[1].cluster().compact(compact).await.unwrap();
    let compacted = hash_kv(&clients[1], 0).await.unwrap();
    assert_eq!(compacted.compact_revision, last - 2);
    assert_ne!(compacted.hash, hashes[0].hash);
    let gone = hash_kv(&clients[1], last - 5).await.unwrap_err();
    assert_eq!(
        gone.message(),
        "etcdserver: mvcc: required revision has been compacted"
    );
    let future = hash_kv(&clients[1], last + 1).await.unwrap_err();
    assert_eq!(
        future.message(),
        "etcdserver: mvcc: required revision is a future revision"
    );
    assert_eq!(
        (gone.code(), future.code()),
        (Code::OutOfRange, Code::OutOfRange)
    );
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one table")]
async fn status_tells_of_leader_sizes_and_alarms() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    put(&client, "k", "v").await.unwrap();
    let told = status(&client).await;
    let header = told.header.unwrap();
    assert_eq!((header.revision, told.version.as_str()), (2, "3.6.0"));
    assert_eq!(
        (told.leader, told.raft_term),
        (header.member_id, header.raft_term)
    );
    assert!(told.raft_index > 0 && told.raft_applied_index == told.raft_index);
    assert!(told.db_size > 0 && told.db_size_in_use <= told.db_size);
    assert_eq!(told.db_size_quota, 2 << 30);
    assert!(told.errors.is_empty() && !told.is_learner);

    let alarm = |action: i32, member_id, alarm: i32| AlarmRequest {
        action,
        member_id,
        alarm,
    };
    let mut maintenance = maintenance(&client);
    let mut ask = async |request| {
        let answer = maintenance.alarm(request).await.unwrap().into_inner();
        assert!(answer.header.unwrap().revision > 0);
        answer.alarms
    };
    let (own, no_space) = (header.member_id, 1);
    let raised = AlarmMember {
        member_id: own,
        alarm: no_space,
    };
    assert_eq!(ask(alarm(0, 0, 0)).await, []);
    // Each of these ends etcd 3.4, or changes nothing.
    for nothing in [
        alarm(1, 0, 0),
        alarm(1, own, 7),
        alarm(9, 0, 0),
        alarm(2, own, 1),
    ] {
        assert_eq!(ask(nothing).await, []);
    }
    for _ in 0..2 {
        assert_eq!(ask(alarm(1, own, no_space)).await, [raised]);
    }
    assert_eq!(ask(alarm(0, 0, 0)).await, [raised]);
    assert_eq!(ask(alarm(0, 0, no_space)).await, [raised]);
    assert_eq!(ask(alarm(0, 0, 2)).await, []);
    let errors = status(&client).await.errors;
    assert_eq!(errors, [format!("memberID:{own} alarm:NOSPACE ")]);
    let full = put(&client, "k", "w").await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    let grant = LeaseGrantRequest { ttl: 60, id: 0 };
    let mut leases = LeaseClient::new(client.channel.clone());
    let refusal = "mvcc: database space exceeded";
    refused(
        leases.lease_grant(grant).await,
        Code::ResourceExhausted,
        refusal,
    );
    assert_eq!(
        get(node.client(), "/health"),
        (
            503,
            r#"{"health":"false","reason":"ALARM NOSPACE"}"#.to_owned()
        )
    );
    assert_eq!(get(node.client(), "/health?exclude=NOSPACE").0, 200);
    assert_eq!(ask(alarm(2, 0, no_space)).await, []);
    assert_eq!(ask(alarm(2, own, no_space)).await, [raised]);
    assert_eq!(ask(alarm(0, 0, 0)).await, []);
    leases.lease_grant(grant).await.unwrap();

    let corrupt = maintenance.alarm(alarm(1, own, 2)).await;
    refused(
        corrupt,
        Code::Unimplemented,
        "alarm CORRUPT cannot be raised",
    );
    let stranger = maintenance.alarm(alarm(1, 5, no_space)).await;
    refused(stranger, Code::NotFound, "member not found");
}

#[tokio::test]
async fn leadership_is_moved_by_its_leader() {
    let directory = Directory::new();
    let (_nodes, clients) = cluster(&directory).await;
    let mut ids = vec![];
    for client in &clients {
        ids.push(status(client).await.header.unwrap().member_id);
    }
    let leader = status(&clients[0]).await.leader;
    let at = ids.iter().position(|id| *id == leader).unwrap();
    let target_id = ids[(at + 1) % 3];
    let ask = |at: usize, target_id| {
        let mut client = maintenance(&clients[at]);
        async move { client.move_leader(MoveLeaderRequest { target_id }).await }
    };
    let answer = ask((at + 1) % 3, target_id).await;
    refused(answer, Code::FailedPrecondition, "not leader");
    let answer = ask(at, 77).await;
    refused(answer, Code::FailedPrecondition, "bad leader transferee");
    ask(at, leader).await.unwrap();
    ask(at, target_id).await.unwrap();
    assert_eq!(status(&clients[at]).await.leader, target_id);
    put(&clients[at], "k", "v").await.unwrap();
}

#[tokio::test]
async fn a_snapshot_is_a_whole_checkpoint_in_etcds_frame() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let large = "x".repeat(100_000);
    for number in 0..20 {
        put(&client, &format!("k{number}"), &large).await.unwrap();
    }
    let index = status(&client).await.raft_applied_index;
    let blobs = maintenance(&client).snapshot(SnapshotRequest {}).await;
    let mut blobs = blobs.unwrap().into_inner();
    let (mut file, mut left) = (Vec::new(), vec![]);
    while let Some(blob) = blobs.message().await.unwrap() {
        assert!(blob.header.is_none() && blob.blob.len() <= 32 << 10);
        file.extend_from_slice(&blob.blob);
        left.push((file.len(), blob.remaining_bytes));
    }
    let sum = file.split_off(file.len() - 32);
    assert_eq!(file.len() % 512, 0);
    assert_eq!(Sha256::digest(&file)[..], sum[..]);
    for (sent, left) in &left[..left.len() - 1] {
        assert_eq!(sent + usize::try_from(*left).unwrap(), file.len());
    }
    assert_eq!(left.last().unwrap().1, 0);

    let mut file = Bytes::from(file);
    assert_eq!(file.split_to(20), "conclave snapshot 1\n");
    let mut reader = Reader::default();
    loop {
        let length = file.get_u32() as usize;
        if length == 0 {
            break;
        }
        reader.take(&file.split_to(length)).unwrap();
    }
    assert!(file.iter().all(|byte| *byte == 0));
    let image = reader.finish().unwrap();
    assert!(image.applied() >= index);
    assert_eq!(image.versions(), 20);
}

#[tokio::test]
async fn defragmenting_writes_the_state_anew() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    put(&client, "k", "v").await.unwrap();
    for _ in 0..2 {
        let answer = maintenance(&client).defragment(DefragmentRequest {}).await;
        assert!(answer.unwrap().into_inner().header.is_none());
    }
    let checkpoints = directory.0.join("alone").join("checkpoints");
    assert!(checkpoints.read_dir().unwrap().count() > 0);
    put(&client, "k", "w").await.unwrap();
}

#[tokio::test]
async fn there_is_nothing_to_downgrade_to() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let ask = |action, version: &str| DowngradeRequest {
        action,
        version: version.to_owned(),
    };
    let mut maintenance = maintenance(&client);
    for (request, code, text) in [
        (ask(0, "3.5"), Code::FailedPrecondition, "not capable"),
        (
            ask(1, "x"),
            Code::InvalidArgument,
            "wrong downgrade target version format",
        ),
        (
            ask(2, ""),
            Code::FailedPrecondition,
            "no inflight downgrade job",
        ),
        (ask(9, ""), Code::Unknown, "unknown method"),
    ] {
        refused(maintenance.downgrade(request).await, code, text);
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "one table")]
async fn authentication_is_disabled_and_nobody_is_known() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let client = node.connect().await;
    let mut auth = AuthClient::new(client.channel.clone());
    let told = auth
        .auth_status(AuthStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!((told.enabled, told.auth_revision), (false, 1));
    assert!(told.header.unwrap().revision > 0);
    auth.auth_disable(AuthDisableRequest {}).await.unwrap();
    let users = auth
        .user_list(AuthUserListRequest {})
        .await
        .unwrap()
        .into_inner();
    let roles = auth
        .role_list(AuthRoleListRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(users.users.is_empty() && roles.roles.is_empty());
    let (wrong, not_met) = (Code::InvalidArgument, Code::FailedPrecondition);
    refused(
        auth.auth_enable(AuthEnableRequest {}).await,
        not_met,
        "root user does not exist",
    );
    let off = "authentication is not enabled";
    refused(
        auth.authenticate(AuthenticateRequest::default()).await,
        not_met,
        off,
    );
    let user = |name: &str| AuthUserAddRequest {
        name: name.to_owned(),
        ..Default::default()
    };
    refused(auth.user_add(user("a")).await, not_met, off);
    refused(auth.user_add(user("")).await, wrong, "user name is empty");
    let role = |name: &str| AuthRoleAddRequest {
        name: name.to_owned(),
    };
    refused(auth.role_add(role("a")).await, not_met, off);
    refused(auth.role_add(role("")).await, wrong, "role name is empty");
    let nobody = "user name not found";
    refused(
        auth.user_get(AuthUserGetRequest::default()).await,
        not_met,
        nobody,
    );
    refused(
        auth.user_delete(AuthUserDeleteRequest::default()).await,
        not_met,
        nobody,
    );
    let request = AuthUserChangePasswordRequest::default();
    refused(auth.user_change_password(request).await, not_met, nobody);
    refused(
        auth.user_grant_role(AuthUserGrantRoleRequest::default())
            .await,
        not_met,
        nobody,
    );
    refused(
        auth.user_revoke_role(AuthUserRevokeRoleRequest::default())
            .await,
        not_met,
        nobody,
    );
    let none = "role name not found";
    refused(
        auth.role_get(AuthRoleGetRequest::default()).await,
        not_met,
        none,
    );
    refused(
        auth.role_delete(AuthRoleDeleteRequest::default()).await,
        not_met,
        none,
    );
    let request = AuthRoleRevokePermissionRequest::default();
    refused(auth.role_revoke_permission(request).await, not_met, none);
    // This one ends etcd 3.4.
    let mut grant = AuthRoleGrantPermissionRequest::default();
    let answer = auth.role_grant_permission(grant.clone()).await;
    refused(answer, wrong, "permission not given");
    grant.perm = Some(Default::default());
    refused(auth.role_grant_permission(grant).await, not_met, none);
    eventually("it serves", || get(node.client(), "/readyz").0 == 200);
}
