//! `etcdctl` against real servers, for what operators do with it. Says that it is
//! skipped where `etcdctl` is not installed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod harness;

use std::{
    fs,
    io::ErrorKind,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use harness::{Directory, Node, PATIENCE, eventually, get, three};
use serde_json::Value;

/// The tool with the endpoints that it talks to.
struct Tool {
    endpoints: String,
}

impl Tool {
    /// `None`, and a word about it, where it is not installed.
    #[expect(clippy::print_stderr, reason = "a test says that it is skipped")]
    fn for_nodes<'a>(nodes: impl IntoIterator<Item = &'a Node>) -> Option<Self> {
        match Command::new("etcdctl").arg("version").output() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                eprintln!("SKIPPED: etcdctl is not installed");
                return None;
            }
            found => assert!(found.unwrap().status.success()),
        }
        let endpoints = nodes.into_iter().map(|node| node.client().to_string());
        let endpoints = endpoints.collect::<Vec<_>>().join(",");
        Some(Self { endpoints })
    }

    fn output(&self, command: &str, args: &[&str]) -> Output {
        let mut child = Command::new("etcdctl")
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints])
            .args(["--command-timeout=15s", "--dial-timeout=5s"])
            .args(command.split(' '))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let until = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > until {
                child.kill().unwrap();
                panic!("{command}: did not end");
            }
            thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().unwrap()
    }

    /// What it prints when it succeeds.
    fn run(&self, command: &str, args: &[&str]) -> String {
        let output = self.output(command, args);
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, command: &str) -> Value {
        serde_json::from_str(&self.run(command, &["--write-out=json"])).unwrap()
    }

    /// What it complains of.
    fn fails(&self, command: &str) -> String {
        let output = self.output(command, &[]);
        assert!(!output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

fn start(directory: &Directory) -> Vec<Node> {
    let nodes: Vec<Node> = three(directory)
        .iter()
        .map(|member| Node::start(member).unwrap())
        .collect();
    nodes.iter().for_each(Node::await_ready);
    nodes
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value
        .pointer(path)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn number(value: &Value, path: &str) -> u64 {
    value
        .pointer(path)
        .and_then(Value::as_u64)
        .unwrap_or_default()
}

#[test]
fn endpoints_and_members_are_shown() {
    let directory = Directory::new();
    let nodes = start(&directory);
    let Some(tool) = Tool::for_nodes(&nodes) else {
        return;
    };
    eventually("all have told their names", || {
        let list = tool.json("member list");
        let members = list["members"].as_array().unwrap();
        members.len() == 3 && members.iter().all(|member| member.get("name").is_some())
    });
    let health = tool.output("endpoint health", &[]);
    assert!(health.status.success());
    let told = [health.stdout, health.stderr].concat();
    let told = String::from_utf8(told).unwrap();
    assert_eq!(told.matches("is healthy").count(), 3, "{told}");

    tool.run("put", &["k", "v"]);
    let status = tool.json("endpoint status");
    let leader = number(&status, "/0/Status/leader");
    for at in 0..3 {
        assert_eq!(text(&status, &format!("/{at}/Status/version")), "3.6.0");
        assert_eq!(number(&status, &format!("/{at}/Status/leader")), leader);
        assert!(number(&status, &format!("/{at}/Status/dbSize")) > 0);
    }
    eventually("members hash the same", || {
        let hashes = tool.json("endpoint hashkv");
        let hash = |at| number(&hashes, &format!("/{at}/HashKV/hash"));
        let revision = |at| number(&hashes, &format!("/{at}/HashKV/header/revision"));
        assert!((1..3).all(|at| revision(at) != revision(0) || hash(at) == hash(0)));
        (0..3).all(|at| revision(at) == 2)
    });
    let added = tool.fails("member add d --peer-urls=http://127.0.0.1:1");
    assert!(
        added.contains("members cannot be changed in this version"),
        "{added}"
    );
    let removed = tool.fails("member remove 5");
    assert!(
        removed.contains("etcdserver: member not found"),
        "{removed}"
    );
}

#[test]
fn leadership_moves() {
    let directory = Directory::new();
    let nodes = start(&directory);
    let Some(tool) = Tool::for_nodes(&nodes) else {
        return;
    };
    let status = tool.json("endpoint status");
    let leader = number(&status, "/0/Status/leader");
    let ids = (0..3).map(|at| number(&status, &format!("/{at}/Status/header/member_id")));
    let other = ids.into_iter().find(|id| *id != leader).unwrap();
    let told = tool.run("move-leader", &[&format!("{other:x}")]);
    assert!(told.contains("Leadership transferred"), "{told}");
    eventually("everyone knows", || {
        let status = tool.json("endpoint status");
        (0..3).all(|at| number(&status, &format!("/{at}/Status/leader")) == other)
    });
}

#[test]
fn leases_live_and_end() {
    let directory = Directory::new();
    let nodes = start(&directory);
    let Some(tool) = Tool::for_nodes(&nodes) else {
        return;
    };
    let granted = tool.run("lease grant", &["60"]);
    let id = granted.split(' ').nth(1).unwrap();
    assert_eq!(granted, format!("lease {id} granted with TTL(60s)\n"));
    tool.run("put", &["k", "v", "--lease", id]);
    let life = tool.run("lease timetolive", &[id, "--keys"]);
    let prefix = format!("lease {id} granted with TTL(60s), remaining(");
    assert!(
        life.starts_with(&prefix) && life.ends_with("attached keys([k])\n"),
        "{life}"
    );
    assert_eq!(
        tool.run("lease list", &[]),
        format!("found 1 leases\n{id}\n")
    );
    let kept = tool.run("lease keep-alive", &["--once", id]);
    assert_eq!(kept, format!("lease {id} keepalived with TTL(60)\n"));
    assert_eq!(
        tool.run("lease revoke", &[id]),
        format!("lease {id} revoked\n")
    );
    assert_eq!(tool.run("get", &["k"]), "");
    assert_eq!(
        tool.run("lease timetolive", &[id]),
        format!("lease {id} already expired\n")
    );
    assert!(
        tool.fails("lease revoke 0")
            .contains("requested lease not found")
    );
}

#[test]
fn what_maintains_a_server_works() {
    let directory = Directory::new();
    let node = Node::alone(&directory);
    let Some(tool) = Tool::for_nodes([&node]) else {
        return;
    };
    tool.run("put", &["k", "v"]);
    assert_eq!(tool.run("alarm list", &[]), "");
    assert_eq!(tool.run("alarm disarm", &[]), "");
    let defragmented = tool.run("defrag", &[]);
    assert!(
        defragmented.contains("Finished defragmenting"),
        "{defragmented}"
    );
    let path = directory.0.join("snapshot");
    tool.run("snapshot save", &[path.to_str().unwrap()]);
    assert_is_snapshot(&path);
    assert!(
        tool.fails("auth enable")
            .contains("root user does not exist")
    );
    assert_eq!(tool.run("user list", &[]), "");
    assert_eq!(get(node.client(), "/readyz").0, 200);
}

fn assert_is_snapshot(path: &Path) {
    let bytes = fs::read(path).unwrap();
    assert!(bytes.starts_with(b"conclave snapshot 1\n"));
    assert_eq!(bytes.len() % 512, 32);
}
