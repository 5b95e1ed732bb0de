//! `conclave serve` with what operators get wrong: told in one line, with the
//! right exit code, and nothing that is there is touched.

use std::{collections::BTreeMap, fs, net::TcpListener, path::Path};

use rustix::process::Signal;

use crate::support::{Cluster, Directory, Ended, Process, conclave, eventually, free_ports};

/// Everything below a directory.
fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        }
        let bytes = fs::read(&path).unwrap_or_default();
        found.insert(path.display().to_string(), bytes);
    }
    found
}

/// Runs a server that must not come to serve.
async fn refused(directory: &Directory, arguments: &[&str]) -> Ended {
    let mut command = conclave();
    command
        .arg("serve")
        .args(arguments)
        .current_dir(directory.path());
    Process::start(directory.path(), &mut command).ended().await
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

#[tokio::test]
async fn wrong_flags_are_usage_errors_and_make_nothing() {
    let directory = Directory::new("serve-flags");
    let cases: [(&[&str], &str); 16] = [
        (&["--no-such-flag"], "--no-such-flag"),
        (&["-no-such-flag"], "--no-such-flag"),
        (
            &[
                "--name",
                "x",
                "--initial-cluster",
                "a=http://h:1,b=http://i:1",
            ],
            "`x`",
        ),
        (&["--name", ""], "name"),
        (
            &["--listen-client-urls", "127.0.0.1:1"],
            "--listen-client-urls",
        ),
        (&["--listen-client-urls", "http://127.0.0.1"], "no port"),
        (
            &["--listen-peer-urls", "http://127.0.0.1:99999"],
            "--listen-peer-urls",
        ),
        (&["--listen-peer-urls", "https://127.0.0.1:1"], "TLS"),
        (
            &["--listen-client-urls", "http://0.0.0.0:1"],
            "--advertise-client-urls",
        ),
        (&["--initial-cluster", "default"], "name=url"),
        (
            &["--initial-cluster", "default=http://h:1,default=http://i:1"],
            "twice",
        ),
        (&["--heartbeat-interval", "200"], "--election-timeout"),
        (&["--max-request-bytes", "1"], "--max-request-bytes"),
        (
            &["--initial-cluster-state", "joined"],
            "--initial-cluster-state",
        ),
        (&["--cert-file", "x"], "--cert-file"),
        (&["--log-level", "="], "--log-level"),
    ];
    for (arguments, told) in cases {
        let ended = refused(&directory, arguments).await;
        assert_eq!(ended.code, 64, "{arguments:?} {ended:?}");
        assert!(ended.stderr.starts_with("conclave: "), "{ended:?}");
        assert!(ended.stderr.contains(told), "{arguments:?} {ended:?}");
        assert!(!ended.stderr.contains("panicked"), "{ended:?}");
    }
    let made = contents(directory.path());
    assert!(
        made.keys().all(|path| path.contains(".std")),
        "{:?}",
        made.keys()
    );
}

#[tokio::test]
async fn one_dash_and_the_environment_are_as_good() {
    let directory = Directory::new("serve-env");
    let ports = free_ports(2);
    let mut command = conclave();
    command
        .arg("serve")
        .args([
            "-data-dir",
            "data",
            &format!("-listen-client-urls={}", url(ports[0])),
        ])
        .env("ETCD_NAME", "theirs")
        .env("CONCLAVE_NAME", "ours")
        .env("ETCD_LISTEN_PEER_URLS", url(ports[1]))
        .env("ETCD_QUOTA_BACKEND_BYTES", "1")
        .env("ETCD_INITIAL_CLUSTER", "")
        .current_dir(directory.path());
    let _server = Process::start(directory.path(), &mut command);
    let status = eventually("a server", || async {
        let endpoint = format!("127.0.0.1:{}", ports[0]);
        let mut status = conclave();
        status.args(["status", "-o", "json", "--endpoints", &endpoint]);
        let ended = Process::start(directory.path(), &mut status).ended().await;
        (ended.code == 0).then(|| ended.json())
    })
    .await;
    let server = &status["servers"][0];
    assert_eq!(server["member_name"], "ours");
    assert_eq!(server["members"][0]["peer_urls"][0], url(ports[1]));
    assert!(directory.path().join("data").is_dir());
}

#[tokio::test]
async fn a_port_or_directory_in_use_is_named() {
    let mut cluster = Cluster::start("serve-use", 1);
    cluster.leader().await;
    let directory = Directory::new("serve-port");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = url(taken.local_addr().unwrap().port());
    let free = free_ports(2);
    for (client, peer) in [(&taken, &url(free[1])), (&url(free[0]), &taken)] {
        let line = ["--listen-client-urls", client, "--listen-peer-urls", peer];
        let ended = refused(&directory, &line).await;
        assert_eq!(ended.code, 1);
        assert_eq!(
            ended.complaint(),
            format!("{taken} is in use by another process")
        );
        assert!(!directory.path().join("default.conclave").exists());
    }

    let data = cluster.data_dir(0);
    let before = contents(&data);
    let line = [
        "--listen-client-urls",
        &url(free[0]),
        "--listen-peer-urls",
        &url(free[1]),
    ];
    let line = [&line[..], &["--data-dir", data.to_str().unwrap()]].concat();
    let ended = refused(&directory, &line).await;
    assert_eq!(ended.code, 1);
    assert!(ended.complaint().contains("in use by another process"));
    assert!(contents(&data).keys().eq(before.keys()));
    assert!(cluster.is_running(0));
    assert_eq!(cluster.run(["lock", "x", "--", "true"]).await.code, 0);
}

#[tokio::test]
async fn a_directory_of_another_cluster_is_left_alone() {
    let mut cluster = Cluster::start("serve-other", 3);
    cluster.leader().await;
    for node in 0..3 {
        cluster.stop(node).await;
    }
    let before = contents(&cluster.data_dir(0));
    let data = cluster.data_dir(0);
    let members = cluster.initial_cluster();
    let cases: [(&[&str], &str); 4] = [
        // Another token: another cluster.
        (
            &["--name", "n0", "--initial-cluster-token", "other"],
            "another cluster",
        ),
        // The directory of another member.
        (&["--name", "n1"], "another member"),
        // Members that were not there.
        (
            &["--name", "n0", "--initial-cluster"],
            "another --initial-cluster",
        ),
        // A cluster of its own.
        (&["--name", "default"], "another cluster"),
    ];
    let fourth = format!("{members},n3={}", url(free_ports(1)[0]));
    for (arguments, told) in cases {
        let mut line = vec!["--data-dir", data.to_str().unwrap()];
        line.extend(arguments);
        if arguments.last() == Some(&"--initial-cluster") {
            line.push(&fourth);
        } else if told != "another cluster" || arguments.len() > 2 {
            line.extend(["--initial-cluster", &members]);
        }
        let ended = refused(cluster.own_directory(), &line).await;
        assert_eq!(ended.code, 1, "{arguments:?} {ended:?}");
        assert!(ended.complaint().contains(told), "{arguments:?} {ended:?}");
        assert!(ended.complaint().contains(data.to_str().unwrap()));
    }
    assert_eq!(contents(&data), before);
    // It is as good as before.
    for node in 0..3 {
        cluster.spawn(node);
    }
    cluster.leader().await;
}

#[tokio::test]
async fn an_emptied_directory_does_not_take_part() {
    let mut cluster = Cluster::start("serve-emptied", 3);
    let holder = {
        cluster.leader().await;
        let holder = cluster.begin(["lock", "held"]);
        holder.printed("token").await;
        holder
    };
    let leader = cluster.leader().await;
    let emptied = (leader + 1) % 3;
    let other = (leader + 2) % 3;
    cluster.kill(emptied);
    fs::remove_dir_all(cluster.data_dir(emptied)).unwrap();
    cluster.spawn(emptied);
    let told = |cluster: &Cluster| {
        let log = cluster.log(emptied);
        let last = log.lines().last().unwrap_or_default().to_owned();
        assert!(last.starts_with("conclave: member "), "{last}");
        assert!(last.contains("another data directory"), "{last}");
    };
    assert_eq!(cluster.ended(emptied).await, 1);
    told(&cluster);
    // With one of the two others it would be a majority: it must not vote.
    cluster.kill(leader);
    cluster.spawn(emptied);
    assert_eq!(cluster.ended(emptied).await, 1);
    told(&cluster);
    cluster.spawn(leader);
    cluster.leader_of(&[leader, other]).await;
    holder.signal(Signal::TERM);
    assert_eq!(
        holder.ended().await.code,
        0,
        "it held the lock all the time"
    );
}

#[tokio::test]
async fn members_that_disagree_do_not_form_a_cluster() {
    let directory = Directory::new("serve-disagree");
    let ports = free_ports(6);
    let list = |token: usize| {
        let members = (0..3).map(|n| format!("n{n}={}", url(ports[2 * n + 1])));
        // The third believes in a fourth.
        let extra = (token == 2).then(|| "n3=http://127.0.0.1:1".to_owned());
        members.chain(extra).collect::<Vec<_>>().join(",")
    };
    let servers: Vec<Process> = (0..3)
        .map(|n| {
            let mut command = conclave();
            command
                .args([
                    "serve",
                    "--name",
                    &format!("n{n}"),
                    "--initial-cluster",
                    &list(n),
                ])
                .args(["--listen-client-urls", &url(ports[2 * n])])
                .args(["--listen-peer-urls", &url(ports[2 * n + 1])])
                .current_dir(directory.path());
            Process::start(directory.path(), &mut command)
        })
        .collect();
    for server in &servers {
        eventually("a refusal in the log", || async {
            server
                .stderr()
                .contains("--initial-cluster or --initial-cluster-token differ")
                .then_some(())
        })
        .await;
    }
}
