//! The Python package `etcd3` (Debian: python3-etcd3), on both.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    reference::{Reference, installed, serving},
    support::{Cluster, Directory, Process},
};

/// Debian's packages are for this one.
const PYTHON: &str = "/usr/bin/python3";
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/etcd/python_etcd3.py");

fn has_etcd3() -> bool {
    let mut command = Command::new(PYTHON);
    let command = command.args(["-c", "import etcd3"]).stdin(Stdio::null());
    let has = command.output().is_ok_and(|output| output.status.success());
    if !has {
        #[expect(clippy::print_stderr, reason = "a test says that it is skipped")]
        {
            eprintln!("skipped: {PYTHON} has no etcd3 (Debian: python3-etcd3)");
        }
    }
    has
}

async fn script(directory: &Path, endpoint: &str) {
    serving(endpoint).await;
    let mut command = Command::new(PYTHON);
    command
        .args([SCRIPT, endpoint])
        .arg(directory.join("snapshot"))
        .stdin(Stdio::null());
    let ended = Process::start(directory, &mut command).ended().await;
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (0, "done\n"),
        "{ended:?}"
    );
}

/// The script itself: what it wants is what the reference does.
#[tokio::test]
async fn python_finds_the_reference_right() {
    if !installed() || !has_etcd3() {
        return;
    }
    let reference = Reference::start("python-reference", 1);
    let directory = Directory::new("python-reference-client");
    script(directory.path(), &reference.endpoints()[0]).await;
}

#[tokio::test]
async fn python_finds_conclave_right() {
    if !has_etcd3() {
        return;
    }
    let cluster = Cluster::start("python", 1);
    script(cluster.directory(), &cluster.endpoints()[0]).await;
}
