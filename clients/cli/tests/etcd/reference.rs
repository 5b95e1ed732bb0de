//! The reference: etcd as Debian packages it.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use conclave_proto::etcd::etcdserverpb::{RangeRequest, kv_client::KvClient};
use tonic::transport::{Channel, Endpoint};

use crate::support::{Directory, Process, eventually, free_ports};

/// The first words of `etcd --version`, for which the known differences hold.
const VERSION: &str = "etcd Version: 3.4.";

/// Whether the reference is installed; says so if it is not.
pub fn installed() -> bool {
    for program in ["etcd", "etcdctl"] {
        let told = Command::new(program)
            .env("ETCDCTL_API", "3")
            .arg(if program == "etcd" {
                "--version"
            } else {
                "version"
            })
            .stdin(Stdio::null())
            .output();
        let told = told.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let known = told
            .as_ref()
            .is_ok_and(|told| program != "etcd" || told.starts_with(VERSION));
        if !known {
            #[expect(clippy::print_stderr, reason = "a test says that it is skipped")]
            {
                eprintln!("skipped: no {program} 3.4 (Debian: etcd-server, etcd-client): {told:?}");
            }
            return false;
        }
    }
    true
}

/// Members named n0, n1, ..., as ours are. Killed when this value goes.
pub struct Reference {
    endpoints: Vec<String>,
    _members: Vec<Process>,
    // Goes last.
    _directory: Directory,
}

impl Reference {
    /// Starts a cluster of so many; does not wait for it.
    pub fn start(name: &str, size: usize) -> Self {
        let directory = Directory::new(name);
        let ports = free_ports(2 * size);
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let cluster: Vec<_> = (0..size)
            .map(|n| format!("n{n}={}", url(ports[2 * n + 1])))
            .collect();
        let members = (0..size)
            .map(|n| {
                let (client, peer) = (url(ports[2 * n]), url(ports[2 * n + 1]));
                let data = directory.path().join(format!("n{n}.etcd"));
                let mut command = etcd(&data);
                command
                    .args(["--name", &format!("n{n}")])
                    .args(["--listen-client-urls", &client])
                    .args(["--advertise-client-urls", &client])
                    .args(["--listen-peer-urls", &peer])
                    .args(["--initial-advertise-peer-urls", &peer])
                    .args(["--initial-cluster", &cluster.join(",")])
                    .args(["--log-level", "error"]);
                Process::start(directory.path(), &mut command)
            })
            .collect();
        let endpoints = (0..size)
            .map(|n| format!("127.0.0.1:{}", ports[2 * n]))
            .collect();
        Self {
            endpoints,
            _members: members,
            _directory: directory,
        }
    }

    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }
}

fn etcd(data: &Path) -> Command {
    let mut command = Command::new("etcd");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("ETCD") {
            command.env_remove(name);
        }
    }
    command.arg("--data-dir").arg(data).stdin(Stdio::null());
    command
}

/// A connection to a server that answers reads.
pub async fn serving(endpoint: &str) -> Channel {
    let channel = Endpoint::from_shared(format!("http://{endpoint}"))
        .unwrap()
        .tcp_nodelay(true)
        .connect_lazy();
    eventually("a server that serves", || async {
        let range = RangeRequest {
            key: "a".into(),
            ..RangeRequest::default()
        };
        KvClient::new(channel.clone()).range(range).await.ok()
    })
    .await;
    channel
}
