//! What is made for etcd in Python, with a script for each: on the reference, which says
//! that the script wants no more than etcd does, and on Conclave.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    reference::{Reference, installed, serving},
    support::{Cluster, Directory, Process},
};

struct Package {
    /// The Python that has it.
    python: &'static str,
    module: &'static str,
    script: &'static str,
    /// Where it is from.
    source: &'static str,
}

const ETCD3: Package = Package {
    python: "/usr/bin/python3",
    module: "etcd3",
    script: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/etcd/python_etcd3.py"),
    source: "Debian: python3-etcd3",
};

/// Its access to etcd alone: nothing here needs a PostgreSQL.
const PATRONI: Package = Package {
    python: concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../target/tools/patroni/bin/python3"
    ),
    module: "patroni.dcs.etcd3",
    script: concat!(env!("CARGO_MANIFEST_DIR"), "/tests/etcd/python_patroni.py"),
    source: "a venv in target/tools/patroni, with patroni[etcd3]",
};

impl Package {
    fn is_here(&self) -> bool {
        let import = format!("import {}", self.module);
        let mut command = Command::new(self.python);
        let command = command.args(["-c", &import]).stdin(Stdio::null());
        let is_here = command.output().is_ok_and(|output| output.status.success());
        if !is_here {
            #[expect(clippy::print_stderr, reason = "a test says that it is skipped")]
            {
                let Self { python, module, .. } = self;
                eprintln!("skipped: {python} has no {module} ({})", self.source);
            }
        }
        is_here
    }

    async fn run(&self, directory: &Path, endpoints: &[String]) {
        for endpoint in endpoints {
            serving(endpoint).await;
        }
        let mut command = Command::new(self.python);
        command
            .arg(self.script)
            .arg(endpoints.join(","))
            .arg(directory.join("saved"))
            .stdin(Stdio::null());
        let ended = Process::start(directory, &mut command).ended().await;
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (0, "done\n"),
            "{ended:?}"
        );
    }

    async fn finds_the_reference_right(&self, size: usize) {
        if !installed() || !self.is_here() {
            return;
        }
        let reference = Reference::start("python-reference", size);
        let directory = Directory::new("python-reference-client");
        self.run(directory.path(), reference.endpoints()).await;
    }

    async fn finds_conclave_right(&self, size: usize) {
        if !self.is_here() {
            return;
        }
        let cluster = Cluster::start("python", size);
        self.run(cluster.directory(), &cluster.endpoints()).await;
    }
}

#[tokio::test]
async fn python_etcd3_finds_the_reference_right() {
    ETCD3.finds_the_reference_right(1).await;
}

#[tokio::test]
async fn python_etcd3_finds_conclave_right() {
    ETCD3.finds_conclave_right(1).await;
}

#[tokio::test]
async fn patroni_finds_the_reference_right() {
    PATRONI.finds_the_reference_right(3).await;
}

#[tokio::test]
async fn patroni_finds_conclave_right() {
    PATRONI.finds_conclave_right(3).await;
}
