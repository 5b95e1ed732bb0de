//! More than a cluster can carry, and clients that do not behave: everyone is
//! answered, and nobody who renews in time loses anything.

use std::{
    fs,
    io::Write as _,
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use conclave_proto::v1::{
    AcquireRequest, OpenSessionRequest, ReleaseRequest, WatchSessionsRequest,
    lock_client::LockClient, session_client::SessionClient,
};
use rustix::process::Signal;
use tokio::{task::JoinSet, time::timeout};
use tonic::{
    Code,
    codegen::tokio_stream,
    transport::{Channel, Endpoint},
};

use crate::support::{Cluster, PATIENCE, Process, eventually, running};

/// Calls at once: far more than are needed to keep the cluster busy.
const CALLS: usize = 6_000;
/// For how long there are so many.
const FLOOD: Duration = Duration::from_secs(6);

async fn channel(cluster: &Cluster, node: usize) -> Channel {
    let endpoint = format!("http://{}", cluster.endpoints()[node]);
    let endpoint = Endpoint::from_shared(endpoint).unwrap();
    endpoint.connect().await.unwrap()
}

/// A session without a renewal, which lives longer than any test.
async fn open(channel: &Channel) -> i64 {
    let request = OpenSessionRequest {
        ttl_ms: 600_000,
        ..OpenSessionRequest::default()
    };
    let opened = SessionClient::new(channel.clone()).open(request).await;
    opened.unwrap().into_inner().session_id
}

fn acquire(name: &str, session_id: i64, wait_ms: Option<u64>) -> AcquireRequest {
    AcquireRequest {
        name: name.to_owned(),
        session_id,
        wait_ms,
        ..AcquireRequest::default()
    }
}

/// Holds the lock `held` in a process of its own, with a TTL that forgives little.
async fn holder(cluster: &Cluster) -> Process {
    let holder = cluster.begin(["lock", "held", "--ttl", "3s"]);
    holder.printed("token").await;
    holder
}

/// The holder has never lost its lock, and the cluster serves.
async fn all_is_well(cluster: &mut Cluster, holder: Process) {
    let other = cluster.run(["lock", "other", "--", "true"]).await;
    assert_eq!(other.code, 0, "{other:?}");
    holder.signal(Signal::TERM);
    let ended = holder.ended().await;
    assert_eq!(ended.code, 0, "{ended:?}");
    for node in 0..3 {
        assert!(cluster.is_running(node));
        assert!(!cluster.log(node).contains("panicked"), "n{node}");
    }
}

/// Files that a server has open.
fn open_files(cluster: &Cluster, node: usize) -> usize {
    let directory = cluster.data_dir(node);
    let server = running(&directory.to_string_lossy())[0];
    fs::read_dir(format!("/proc/{server}/fd")).unwrap().count()
}

/// Acquires and releases one lock after the other; how often that succeeded. Every
/// call is answered, and a failure says that another attempt may succeed.
async fn work(channel: Channel, session: i64, name: String, stop: Arc<AtomicBool>) -> usize {
    let mut locks = LockClient::new(channel);
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        let acquired = timeout(PATIENCE, locks.acquire(acquire(&name, session, Some(0))));
        let acquired = acquired.await.expect("an acquire without an answer");
        let token = match acquired {
            Ok(granted) => granted.into_inner().token,
            Err(status) => {
                let may_retry = [Code::ResourceExhausted, Code::Unavailable];
                assert!(may_retry.contains(&status.code()), "{status:?}");
                break;
            }
        };
        let request = ReleaseRequest {
            name: name.clone(),
            session_id: session,
            token,
            ..ReleaseRequest::default()
        };
        let released = timeout(PATIENCE, locks.release(request)).await;
        let released = released.expect("a release without an answer");
        if released.is_err() {
            break;
        }
        done += 1;
    }
    done
}

#[tokio::test]
async fn far_more_calls_than_it_can_carry_are_all_answered_and_no_session_expires() {
    let mut cluster = Cluster::start("flood", 3);
    cluster.leader().await;
    let holder = holder(&cluster).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for node in 0..3 {
        let channel = channel(&cluster, node).await;
        let session = open(&channel).await;
        for worker in 0..CALLS / 3 {
            let name = format!("flood/{node}/{worker}");
            workers.spawn(work(channel.clone(), session, name, Arc::clone(&stop)));
        }
    }
    tokio::time::sleep(FLOOD).await;
    stop.store(true, Ordering::Relaxed);
    let mut done = 0;
    while let Some(worker) = workers.join_next().await {
        done += worker.unwrap();
    }
    assert!(done > 0, "nobody was served");
    all_is_well(&mut cluster, holder).await;
}

#[tokio::test]
async fn connections_that_come_and_go_leave_nothing_behind() {
    let mut cluster = Cluster::start("drops", 3);
    cluster.leader().await;
    let holder = holder(&cluster).await;
    let session = open(&channel(&cluster, 0).await).await;
    let before: Vec<usize> = (0..3).map(|node| open_files(&cluster, node)).collect();
    let count = AtomicUsize::new(0);
    for round in 0..60 {
        let node = round % 3;
        let mut calls = JoinSet::new();
        let channel = channel(&cluster, node).await;
        for _ in 0..5 {
            let owner = count.fetch_add(1, Ordering::Relaxed).to_string();
            let mut locks = LockClient::new(channel.clone());
            let request = AcquireRequest {
                owner,
                ..acquire("held", session, None)
            };
            calls.spawn(async move { locks.acquire(request).await.map(|_| ()) });
        }
        // Some arrive before the connection goes, some do not.
        tokio::time::sleep(Duration::from_millis(round as u64 % 8)).await;
        drop((calls, channel));
        let port = cluster.ports(node).0;
        for _ in 0..10 {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.write_all(b"PRI * HTTP/2.0").unwrap();
        }
    }
    cluster.waiters("held", 0).await;
    eventually("connections to be closed", || async {
        let after = (0..3).map(|node| open_files(&cluster, node));
        let settled = |(after, before): (usize, &usize)| after <= before + 10;
        after.zip(&before).all(settled).then_some(())
    })
    .await;
    all_is_well(&mut cluster, holder).await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_disturbs_nobody() {
    let mut cluster = Cluster::start("unread", 3);
    let leader = cluster.leader().await;
    let holder = holder(&cluster).await;
    let channel = channel(&cluster, leader).await;
    let session = open(&channel).await;
    let requests = tokio_stream::iter([WatchSessionsRequest {
        session_id: session,
        attachment: 0,
    }]);
    let mut sessions = SessionClient::new(channel.clone());
    let unread = sessions.watch(requests).await.unwrap();
    let client = cluster.client();
    // Each of these tells the stream, with a reason as long as may be.
    let reason = "x".repeat(1_024);
    for round in 0..4 {
        let mut forced = JoinSet::new();
        for lock in 0..500 {
            let (client, reason) = (client.clone(), reason.clone());
            let mut locks = LockClient::new(channel.clone());
            forced.spawn(async move {
                let name = format!("unread/{round}/{lock}");
                let granted = locks.acquire(acquire(&name, session, Some(0))).await;
                let token = granted.unwrap().into_inner().token;
                client.force_release(&name, &reason, Some(token)).await
            });
        }
        while let Some(released) = forced.join_next().await {
            released.unwrap().unwrap();
        }
    }
    all_is_well(&mut cluster, holder).await;
    drop(unread);
}
