//! Four kinds of clients contend for one lock: `etcdctl lock`, `conclave lock`, the
//! Lock call, and a transaction as etcd's libraries make it.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bytes::Bytes;
use conclave_proto::etcd::{
    etcdserverpb::{
        Compare, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp, TxnRequest,
        compare::TargetUnion, kv_client::KvClient, lease_client::LeaseClient, request_op::Request,
    },
    v3lockpb::{LockRequest, UnlockRequest, lock_client::LockClient},
};
use tonic::transport::Channel;

use crate::{
    reference::{installed, serving},
    support::{Cluster, Process, eventually},
};

const NAME: &str = "door";
const TTL_SECONDS: i64 = 60;

/// Who holds, from when to when: a line each.
struct Journal(PathBuf);

impl Journal {
    fn note(&self, line: &str) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(&self.0)
            .unwrap();
        writeln!(file, "{line}").unwrap();
    }

    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// A command that holds for a while.
    fn job(&self, who: &str) -> String {
        let journal = self.0.display();
        format!("echo {who} begins >> {journal}; sleep 0.2; echo {who} ends >> {journal}")
    }
}

async fn lease(channel: &Channel) -> i64 {
    let grant = LeaseGrantRequest {
        ttl: TTL_SECONDS,
        id: 0,
    };
    let granted = LeaseClient::new(channel.clone()).lease_grant(grant).await;
    granted.unwrap().into_inner().id
}

/// The Lock call, again if the way to the leader broke: the place stays the lease's.
async fn locked(channel: Channel, lease: i64) -> Bytes {
    eventually("the Lock call", || async {
        let request = LockRequest {
            name: NAME.into(),
            lease,
        };
        let locked = LockClient::new(channel.clone()).lock(request).await;
        locked.ok().map(|response| response.into_inner().key)
    })
    .await
}

async fn unlocked(channel: &Channel, key: &Bytes) {
    eventually("Unlock", || async {
        let request = UnlockRequest { key: key.clone() };
        LockClient::new(channel.clone()).unlock(request).await.ok()
    })
    .await;
}

/// A place as etcd's libraries take it, with the revision that orders it.
async fn placed(channel: &Channel, lease: i64) -> (Bytes, i64) {
    let key = Bytes::from(format!("{NAME}/{lease:x}"));
    let absent = Compare {
        target: 1,
        key: key.clone(),
        target_union: Some(TargetUnion::CreateRevision(0)),
        ..Compare::default()
    };
    let put = PutRequest {
        key: key.clone(),
        lease,
        ..PutRequest::default()
    };
    let txn = TxnRequest {
        compare: vec![absent],
        success: vec![RequestOp {
            request: Some(Request::RequestPut(put)),
        }],
        failure: Vec::new(),
    };
    let done = KvClient::new(channel.clone())
        .txn(txn)
        .await
        .unwrap()
        .into_inner();
    assert!(done.succeeded);
    (key, done.header.unwrap().revision)
}

/// Waits until no older key is there.
async fn oldest(channel: &Channel, revision: i64) {
    eventually("to be the oldest", || async {
        let older = RangeRequest {
            key: format!("{NAME}/").into(),
            range_end: format!("{NAME}0").into(),
            max_create_revision: revision - 1,
            limit: 1,
            ..RangeRequest::default()
        };
        let range = KvClient::new(channel.clone()).range(older).await.ok()?;
        range.into_inner().kvs.is_empty().then_some(())
    })
    .await;
}

fn etcdctl_lock(cluster: &Cluster, directory: &Path, job: &str) -> Process {
    let mut command = Command::new("etcdctl");
    command
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &cluster.endpoints().join(",")])
        .args(["lock", NAME, &format!("--ttl={TTL_SECONDS}"), "--"])
        .args(["sh", "-c", job])
        .stdin(Stdio::null());
    Process::start(directory, &mut command)
}

#[tokio::test]
async fn all_kinds_of_clients_take_turns_while_leaders_are_killed() {
    if !installed() {
        return;
    }
    let mut cluster = Cluster::start("etcd-contend", 3);
    for round in 0..2 {
        let leader = cluster.leader().await;
        let staying = cluster.endpoints().remove((leader + 1) % 3);
        let channel = serving(&staying).await;
        let journal = Journal(cluster.directory().join(format!("journal{round}")));
        let [first, third, fourth] = [
            lease(&channel).await,
            lease(&channel).await,
            lease(&channel).await,
        ];

        let held = locked(channel.clone(), first).await;
        let one = etcdctl_lock(&cluster, cluster.directory(), &journal.job("etcdctl"));
        cluster.waiters(NAME, 1).await;
        let two = cluster.begin(["lock", NAME, "--", "sh", "-c", &journal.job("conclave")]);
        cluster.waiters(NAME, 2).await;
        let three = tokio::spawn(locked(channel.clone(), third));
        cluster.waiters(NAME, 3).await;
        let (key, revision) = placed(&channel, fourth).await;
        cluster.waiters(NAME, 4).await;

        cluster.kill(leader);
        cluster.leader().await;
        assert!(journal.lines().is_empty(), "{:?}", journal.lines());
        unlocked(&channel, &held).await;
        let called = three.await.unwrap();
        journal.note("call begins");
        assert!(journal.lines().len() == 5, "{:?}", journal.lines());
        journal.note("call ends");
        unlocked(&channel, &called).await;
        oldest(&channel, revision).await;
        journal.note("transaction begins");
        journal.note("transaction ends");
        unlocked(&channel, &key).await;

        assert_eq!(one.ended().await.code, 0);
        assert_eq!(two.ended().await.code, 0);
        let turns = ["etcdctl", "conclave", "call", "transaction"];
        let turns = turns.map(|who| [format!("{who} begins"), format!("{who} ends")]);
        assert_eq!(journal.lines(), turns.concat());
        cluster.spawn(leader);
    }
}
