//! `conclave check-data`, on directories that real servers made.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use crate::support::{Cluster, Ended, eventually};

/// Every file below a directory, with what would show that it was written to.
fn files(path: &Path, found: &mut BTreeMap<PathBuf, (SystemTime, Vec<u8>)>) {
    for entry in fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            let changed = fs::metadata(&path).unwrap().modified().unwrap();
            found.insert(path.clone(), (changed, fs::read(&path).unwrap()));
        }
    }
}

/// Looks at a directory, and sees to it that nothing in it is changed.
async fn check(cluster: &Cluster, path: &Path) -> Ended {
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    files(path, &mut before);
    let path_given = path.to_str().unwrap();
    let ended = cluster.run(["check-data", path_given, "-o", "json"]).await;
    files(path, &mut after);
    assert!(before == after, "looking changed something");
    ended
}

/// A server with its checkpoints, oldest first, stopped by force.
async fn stopped_server() -> (Cluster, Vec<PathBuf>) {
    let mut cluster = Cluster::start_with("check-data", 1, &["--snapshot-count", "20"]);
    let session = cluster
        .session(&cluster.client(), Duration::from_secs(60))
        .await;
    let directory = cluster.data_dir(0).join("checkpoints");
    let list = || {
        let entries = fs::read_dir(&directory).unwrap();
        let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| !path.ends_with("unfinished"));
        paths.sort();
        paths
    };
    let mut round = 0;
    eventually("two checkpoints", || {
        round += 1;
        let lock = session.lock(format!("lock/{round}"));
        async {
            lock.await.ok()?.release().await.ok()?;
            (list().len() >= 2).then_some(())
        }
    })
    .await;
    cluster.kill(0);
    let checkpoints = list();
    (cluster, checkpoints)
}

#[tokio::test]
async fn a_directory_is_shown_as_it_is() {
    let (mut cluster, checkpoints) = stopped_server().await;
    let path = cluster.data_dir(0);
    let whole = check(&cluster, &path).await.json();
    assert_eq!(whole["whole"], true, "{whole}");
    assert_eq!(whole["log"]["first_index"], 1);
    assert_eq!(whole["log"]["term"], 1);
    assert_eq!(whole["log"]["voters"].as_array().unwrap().len(), 1);
    assert_eq!(whole["checkpoints"][0]["ok"], true, "{whole}");
    assert_eq!(whole["checkpoints"][0]["sessions"], 1, "{whole}");
    let path = path.to_str().unwrap();
    let table = cluster.run(["check-data", path]).await;
    assert_eq!(table.code, 0, "{table:?}");
    for word in ["identity", "incarnation", "attested", "segment", "start"] {
        assert!(table.stdout.contains(word), "{table:?}");
    }

    // One damaged checkpoint is one that can be done without.
    let newest = checkpoints.last().unwrap().join("keyspaces/1/tables/0");
    let mut bytes = fs::read(&newest).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    fs::write(&newest, bytes).unwrap();
    let damaged = check(&cluster, Path::new(path)).await;
    assert_eq!(damaged.code, 2, "{damaged:?}");
    let shown: serde_json::Value = serde_json::from_str(&damaged.stdout).unwrap();
    let count = shown["checkpoints"].as_array().unwrap().len();
    assert_eq!(shown["checkpoints"][count - 1]["ok"], false, "{shown}");
    assert_eq!(shown["start"]["ok"], true, "{shown}");

    // A server that runs is in the way.
    cluster.spawn(0);
    cluster.leader().await;
    let used = cluster.run(["check-data", path]).await;
    assert_eq!(used.code, 1, "{used:?}");
    assert!(used.complaint().contains("in use"), "{used:?}");
    assert_eq!(cluster.stop(0).await, 0);

    // The log cannot be done without.
    let segment = cluster.data_dir(0).join("log/log-00000000000000000001");
    let mut bytes = fs::read(&segment).unwrap();
    bytes[60] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let refused = check(&cluster, Path::new(path)).await;
    assert_eq!(refused.code, 1, "{refused:?}");
    let why = refused.complaint();
    assert!(why.contains("a start would be refused"), "{why}");
    assert!(
        why.contains("log-00000000000000000001` is damaged"),
        "{why}"
    );
}

#[tokio::test]
async fn what_is_no_data_directory_is_said_to_be_none() {
    let cluster = Cluster::start("check-none", 1);
    let missing = cluster.directory().join("missing");
    let ended = cluster.run(["check-data", missing.to_str().unwrap()]).await;
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.complaint().contains("missing"), "{ended:?}");
    assert!(!missing.exists());
    fs::create_dir(&missing).unwrap();
    let empty = check(&cluster, &missing).await.json();
    assert_eq!(empty["whole"], true);
    assert!(empty["log"].is_null());
}
