//! A server that was away for so long that the others have cut the log it would need.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use conclave_client::{Client, SessionOptions};
use tokio::{sync::Notify, task::JoinSet};

use crate::support::{Cluster, eventually};

/// Of a log that is cut by whole segments of 16 MiB.
const FLAGS: &[&str] = &[
    "--snapshot-count",
    "300",
    "--log-retention-bytes",
    "20000000",
];
const WRITERS: usize = 48;

/// Opens and closes sessions that say much about themselves, until told to stop.
async fn write(client: Client, stop: Arc<Notify>) {
    let options = SessionOptions {
        ttl: Duration::from_secs(60),
        metadata: BTreeMap::from([("about".to_owned(), "x".repeat(4_000))]),
        ..SessionOptions::default()
    };
    let work = async {
        loop {
            // Also while a leader changes.
            drop(client.session(options.clone()).await);
        }
    };
    tokio::select! {
        () = work => {}
        () = stop.notified() => {}
    }
}

async fn serves(cluster: &Cluster, lock: &str) {
    let session = cluster
        .session(&cluster.client(), Duration::from_secs(10))
        .await;
    let guard = session.lock(lock).await.expect("it is served");
    guard.release().await.unwrap();
}

#[tokio::test]
async fn a_server_that_was_away_for_too_long_gets_a_checkpoint_and_takes_part() {
    let mut cluster = Cluster::start_with("install", 3, FLAGS);
    let client = cluster.client();
    let session = cluster.session(&client, Duration::from_secs(60)).await;
    let held = session.lock("held").await.unwrap();
    let leader = cluster.leader().await;
    let away = (leader + 1) % 3;
    let other = (leader + 2) % 3;
    cluster.kill(away);

    let stop = Arc::new(Notify::new());
    let mut writers = JoinSet::new();
    for _ in 0..WRITERS {
        writers.spawn(write(cluster.client(), Arc::clone(&stop)));
    }
    eventually("a log that is cut", || async {
        let is_cut = |node| cluster.log(node).contains("cut the log");
        (is_cut(leader) && is_cut(other)).then_some(())
    })
    .await;

    // While the others go on writing.
    cluster.spawn(away);
    eventually("an installed checkpoint", || async {
        let log = cluster.log(away);
        log.contains("keeps a checkpoint of another member")
            .then_some(())
    })
    .await;
    stop.notify_waiters();
    writers.abort_all();
    while writers.join_next().await.is_some() {}

    for down in [leader, other] {
        // Both servers that are left are needed.
        cluster.kill(down);
        serves(&cluster, "any").await;
        assert!(client.check("held", held.token()).await.unwrap());
        cluster.spawn(down);
        serves(&cluster, "any").await;
    }

    // It starts from what it was sent.
    cluster.kill(away);
    cluster.spawn(away);
    serves(&cluster, "any").await;
    cluster.kill(other);
    serves(&cluster, "any").await;
    held.release().await.expect("the holder holds it still");
}
