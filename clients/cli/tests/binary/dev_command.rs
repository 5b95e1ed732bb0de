//! `conclave dev`: a cluster that comes and goes with its command.

use std::{env, fs, net::TcpListener, path::Path};

use rustix::process::Signal;

use crate::support::{
    Directory, Ended, Process, conclave, eventually, free_ports, is_free, running,
};

/// The first port of three servers: those that go with it are free, too, and not
/// given to another test.
fn port() -> u16 {
    loop {
        let ports = free_ports(2);
        let port = ports[0];
        let above = [port + 20_000, port + 30_000];
        let are_free = above.iter().all(|port| is_free(*port) && is_free(port + 1));
        if ports[1] == port + 1 && are_free {
            return port;
        }
    }
}

/// Starts `conclave dev` with a place of its own for temporary files.
fn dev(directory: &Directory, arguments: &[&str]) -> Process {
    let temporary = directory.path().join("temporary");
    fs::create_dir_all(&temporary).unwrap();
    let mut command = conclave();
    command.arg("dev").args(arguments).env("TMPDIR", &temporary);
    // That the binary is found by its name is for `dev` to see to.
    command.env("PATH", env::var_os("PATH").unwrap());
    Process::start(directory.path(), &mut command)
}

/// The servers say in their command line where their data are.
fn servers(directory: &Directory) -> Vec<u32> {
    running(directory.path().to_str().unwrap())
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

#[tokio::test]
async fn it_ends_with_its_command_and_leaves_nothing() {
    let directory = Directory::new("dev");
    let port = port();
    let script = "echo \"$CONCLAVE_ENDPOINTS\"; \
                  conclave lock x -- sh -c 'echo \"token $CONCLAVE_LOCK_TOKEN\"'; exit 7";
    let text = port.to_string();
    let line = ["--port", &text, "--", "sh", "-c", script];
    let ended = dev(&directory, &line).ended().await;
    assert_eq!(ended.code, 7, "{ended:?}");
    let endpoints = format!(
        "127.0.0.1:{port},127.0.0.1:{},127.0.0.1:{}",
        port + 20_000,
        port + 30_000
    );
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert_eq!(lines[0], format!("ready endpoints={endpoints}"));
    assert_eq!(lines[1], endpoints);
    assert!(lines[2].starts_with("token "), "{ended:?}");
    assert!(servers(&directory).is_empty());
    assert!(is_empty(&directory.path().join("temporary")));
    assert!(is_free(port));
}

#[tokio::test]
async fn a_signal_ends_it_and_its_command_or_servers() {
    let directory = Directory::new("dev-signals");
    let port = port().to_string();
    let process = dev(&directory, &["--nodes", "1", "--port", &port]);
    process.printed("Ctrl-C").await;
    process.signal(Signal::INT);
    assert_eq!(process.ended().await.code, 0);

    let line = ["--nodes", "1", "--port", &port, "--", "sleep", "60"];
    let process = dev(&directory, &line);
    process.printed("ready").await;
    process.signal(Signal::TERM);
    assert_eq!(process.ended().await.code, 143);
    assert!(servers(&directory).is_empty());
    assert!(is_empty(&directory.path().join("temporary")));

    let line = ["--nodes", "1", "--port", &port, "--", "./no-such-command"];
    let ended = dev(&directory, &line).ended().await;
    assert_eq!(ended.code, 127, "{ended:?}");
    assert!(ended.complaint().contains("no-such-command"));
}

#[tokio::test]
async fn no_server_outlives_it() {
    let directory = Directory::new("dev-killed");
    let process = dev(&directory, &["--port", &port().to_string()]);
    process.printed("ready").await;
    assert_eq!(servers(&directory).len(), 3);
    process.signal(Signal::KILL);
    assert_eq!(process.ended().await.code, 137);
    eventually("the end of the servers", || async {
        servers(&directory).is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let directory = Directory::new("dev-port");
    let port = port();
    let _taken = TcpListener::bind(("127.0.0.1", port + 20_001)).unwrap();
    let ended = dev(&directory, &["--port", &port.to_string()])
        .ended()
        .await;
    assert_eq!(ended.code, 1);
    let taken = (port + 20_001).to_string();
    assert!(ended.complaint().contains(&taken), "{ended:?}");
    assert_eq!(ended.stdout, "");
    assert!(is_empty(&directory.path().join("temporary")));
    let ended = dev(&directory, &["--port", "65000"]).ended().await;
    assert_eq!(ended.code, 64, "{ended:?}");
}

#[tokio::test]
async fn data_that_were_asked_for_stay() {
    let directory = Directory::new("dev-data");
    let data = directory.path().join("data");
    let port = port().to_string();
    let script = "conclave lock x -- sh -c 'echo \"token $CONCLAVE_LOCK_TOKEN\"'";
    let kept = data.to_str().unwrap();
    let line = ["--nodes", "1", "--port", &port, "--data-dir", kept];
    let line = [&line[..], &["--", "sh", "-c", script]].concat();
    let token = |ended: Ended| -> u64 {
        assert_eq!(ended.code, 0, "{ended:?}");
        let (_, token) = ended.stdout.split_once("token ").unwrap();
        token.trim().parse().unwrap()
    };
    let first = token(dev(&directory, &line).ended().await);
    let second = token(dev(&directory, &line).ended().await);
    assert!(second > first, "{second} after {first}");
    assert!(!is_empty(&data));
}

#[tokio::test]
async fn any_server_that_cannot_start_is_told_of_at_once() {
    let directory = Directory::new("dev-ends");
    let data = directory.path().join("data");
    fs::create_dir_all(&data).unwrap();
    // The others would wait for it.
    fs::write(data.join("node2"), "no directory").unwrap();
    let (port, data) = (port().to_string(), data.display().to_string());
    let ended = dev(&directory, &["--port", &port, "--data-dir", &data]);
    let ended = ended.ended().await;
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stderr.contains("server node2 ended"), "{ended:?}");
    assert!(servers(&directory).is_empty());
}
