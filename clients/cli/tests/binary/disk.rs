//! Servers over a disk that hangs, lies, fails or is full: a shim stands between them
//! and `fdatasync`. A page cache survives kill -9, so killing alone does not show
//! that an answer waits for the disk.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use conclave_client::{Error, LockGuard, Session, SessionOptions};
use tokio::{task::JoinSet, time::timeout};

use crate::support::{Cluster, Directory, PATIENCE, eventually};

/// How long syncs are held: enough for thousands of answers.
const HELD: Duration = Duration::from_secs(2);

/// A cluster of three, each with the shim and a file that switches it.
struct Shimmed {
    cluster: Cluster,
}

impl Shimmed {
    /// None without a C compiler.
    fn start(name: &str, mode: &'static str) -> Option<Shimmed> {
        Self::start_on(name, mode, 3, "")
    }

    /// The same with so many servers. With the mode `full`, only writes to files
    /// with this in their path fail.
    fn start_on(
        name: &str,
        mode: &'static str,
        size: usize,
        full: &'static str,
    ) -> Option<Shimmed> {
        let directory = Directory::new(name);
        let path = directory.path().to_owned();
        let shim = compile(&path)?;
        let environment = move |node: usize, command: &mut Command| {
            command
                .env("LD_PRELOAD", &shim)
                .env("SYNC_CONTROL", control(&path, node))
                .env("SYNC_MODE", mode)
                .env("SYNC_PATH", full);
            if !full.is_empty() {
                command.args(["--snapshot-count", "50"]);
            }
        };
        let cluster = Cluster::start_in(directory, size, Box::new(environment));
        Some(Shimmed { cluster })
    }

    fn disturb(&self, node: usize) {
        fs::write(control(self.cluster.directory(), node), "").unwrap();
    }

    /// Waits until a server has ended by itself, and has said this.
    async fn ended(&mut self, node: usize, says: &str) {
        assert_eq!(self.cluster.ended(node).await, 1);
        let log = self.cluster.log(node);
        let last = log.lines().last().unwrap();
        assert!(last.starts_with("conclave: "), "{last}");
        assert!(last.contains(says), "{last}");
    }

    fn restore(&self, node: usize) {
        fs::remove_file(control(self.cluster.directory(), node)).unwrap();
    }
}

fn control(directory: &Path, node: usize) -> PathBuf {
    directory.join(format!("n{node}.disturbed"))
}

fn compile(directory: &Path) -> Option<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/binary/hold_sync.c");
    let shim = directory.join("hold_sync.so");
    let compiler = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror", "-o"])
        .arg(&shim)
        .arg(source)
        .status();
    match compiler {
        Ok(status) => {
            assert!(status.success(), "the shim does not compile");
            Some(shim)
        }
        Err(error) => {
            skipped(&format!("no C compiler: {error}"));
            None
        }
    }
}

#[expect(clippy::print_stderr, reason = "who runs the tests must see it")]
fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// What was acknowledged to a client.
enum Acknowledged {
    Grant(LockGuard),
    Session(Session),
}

/// A lock through each server, and a session.
fn ask_for_everything(
    cluster: &Cluster,
    sessions: &[Session],
) -> JoinSet<Result<Acknowledged, Error>> {
    let mut asked = JoinSet::new();
    for (number, session) in sessions.iter().enumerate() {
        let request = session.lock(format!("asked/{number}"));
        asked.spawn(async move { request.await.map(Acknowledged::Grant) });
    }
    let client = cluster.client();
    asked.spawn(async move {
        let options = SessionOptions {
            ttl: Duration::from_secs(60),
            ..SessionOptions::default()
        };
        client.session(options).await.map(Acknowledged::Session)
    });
    asked
}

/// A session through each server alone.
async fn sessions(cluster: &Cluster) -> Vec<Session> {
    let mut sessions = Vec::new();
    for endpoint in cluster.endpoints() {
        let client = conclave_client::Client::connect([endpoint]).unwrap();
        sessions.push(cluster.session(&client, Duration::from_secs(60)).await);
    }
    sessions
}

/// Waits for all answers, and looks whether what they say is there.
async fn check(cluster: &Cluster, mut asked: JoinSet<Result<Acknowledged, Error>>) {
    let client = cluster.client();
    let mut grants = Vec::new();
    let mut opened = Vec::new();
    while let Some(answer) = timeout(PATIENCE, asked.join_next()).await.unwrap() {
        match answer.unwrap().unwrap() {
            Acknowledged::Grant(guard) => grants.push(guard),
            Acknowledged::Session(session) => opened.push(session),
        }
    }
    assert_eq!((grants.len(), opened.len()), (3, 1));
    for guard in grants {
        assert!(client.check(guard.name(), guard.token()).await.unwrap());
        guard.release().await.unwrap();
    }
    let listed = client.sessions().await.unwrap();
    assert!(
        listed
            .iter()
            .any(|listed| listed.session_id == opened[0].id())
    );
}

#[tokio::test]
async fn no_acknowledgement_leaves_while_syncs_are_held() {
    let Some(mut shimmed) = Shimmed::start("hold", "hold") else {
        return;
    };
    let sessions = sessions(&shimmed.cluster).await;
    let before = sessions[0].lock("before").await.unwrap();

    (0..3).for_each(|node| shimmed.disturb(node));
    let mut asked = ask_for_everything(&shimmed.cluster, &sessions);
    let answered = timeout(HELD, asked.join_next()).await;
    assert!(answered.is_err(), "answered before anything was synced");
    assert!((0..3).all(|node| shimmed.cluster.is_running(node)));
    (0..3).for_each(|node| shimmed.restore(node));

    check(&shimmed.cluster, asked).await;
    let client = shimmed.cluster.client();
    assert!(client.check("before", before.token()).await.unwrap());
}

/// That nothing is answered while syncs are held proves something only if they
/// are what an answer waits for.
#[tokio::test]
async fn acknowledgements_leave_while_syncs_are_skipped() {
    let Some(shimmed) = Shimmed::start("lie", "lie") else {
        return;
    };
    let sessions = sessions(&shimmed.cluster).await;
    (0..3).for_each(|node| shimmed.disturb(node));
    let asked = ask_for_everything(&shimmed.cluster, &sessions);
    check(&shimmed.cluster, asked).await;
}

#[tokio::test]
async fn a_leader_whose_disk_hangs_is_replaced() {
    let Some(shimmed) = Shimmed::start("hang", "hold") else {
        return;
    };
    let client = shimmed.cluster.client();
    let session = shimmed
        .cluster
        .session(&client, Duration::from_secs(5))
        .await;
    let held = session.lock("held").await.unwrap();
    let old = shimmed.cluster.leader().await;

    shimmed.disturb(old);
    let others = [(old + 1) % 3, (old + 2) % 3];
    // Neither this nor the session, which is short, is lost with the old leader.
    let guard = session.lock("meanwhile").await.unwrap();
    assert_ne!(shimmed.cluster.leader_of(&others).await, old);
    assert!(client.check("held", held.token()).await.unwrap());

    shimmed.restore(old);
    shimmed.cluster.leader().await;
    assert!(client.check("meanwhile", guard.token()).await.unwrap());
    held.release().await.unwrap();
}

#[tokio::test]
async fn a_server_whose_sync_fails_ends_and_the_others_go_on() {
    if let Some(shimmed) = Shimmed::start("fail", "fail") {
        ends_and_comes_back(shimmed, "os error 5").await;
    }
}

#[tokio::test]
async fn a_server_whose_disk_is_full_ends_and_comes_back_with_space() {
    if let Some(shimmed) = Shimmed::start_on("full", "full", 3, "/log/") {
        ends_and_comes_back(shimmed, "the disk is full; make space and start again").await;
    }
}

/// The disk of the leader fails, so that it ends and says why, and again when it is
/// started on that disk. The others go on; when the disk is well, so does it.
async fn ends_and_comes_back(mut shimmed: Shimmed, says: &str) {
    let client = shimmed.cluster.client();
    let session = shimmed
        .cluster
        .session(&client, Duration::from_secs(60))
        .await;
    let held = session.lock("held").await.unwrap();
    let leader = shimmed.cluster.leader().await;

    shimmed.disturb(leader);
    let guard = session.lock("meanwhile").await.unwrap();
    shimmed.ended(leader, says).await;
    assert_ne!(shimmed.cluster.leader().await, leader);
    assert!(client.check("held", held.token()).await.unwrap());
    shimmed.cluster.spawn(leader);
    shimmed.ended(leader, says).await;

    shimmed.restore(leader);
    shimmed.cluster.spawn(leader);
    shimmed.cluster.leader().await;
    eventually("what the others did meanwhile", || async {
        let client = conclave_client::Client::connect([&shimmed.cluster.endpoints()[leader]]);
        client
            .unwrap()
            .check("meanwhile", guard.token())
            .await
            .ok()?
            .then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_disk_that_is_full_under_a_checkpoint_ends_the_server_and_nothing_is_lost() {
    let Some(mut shimmed) = Shimmed::start_on("full-checkpoint", "full", 1, "/checkpoints/") else {
        return;
    };
    let client = shimmed.cluster.client();
    let ttl = Duration::from_secs(600);
    let session = shimmed.cluster.session(&client, ttl).await;
    shimmed.disturb(0);
    let mut held = Vec::new();
    while shimmed.cluster.is_running(0) {
        let request = session.lock(format!("held/{}", held.len()));
        if let Ok(Ok(guard)) = timeout(Duration::from_secs(2), request).await {
            held.push(guard);
        }
        assert!(held.len() < 1_000, "it goes on without checkpoints");
    }
    shimmed
        .ended(
            0,
            "writing a checkpoint failed: the disk is full; make space",
        )
        .await;
    assert!(held.len() > 10, "{}", held.len());
    let path = shimmed.cluster.data_dir(0);
    let checked = shimmed.cluster.run(["check-data", path.to_str().unwrap()]);
    let checked = checked.await;
    assert_eq!(checked.code, 0, "{checked:?}");

    shimmed.restore(0);
    shimmed.cluster.spawn(0);
    shimmed.cluster.leader().await;
    for guard in &held {
        assert!(client.check(guard.name(), guard.token()).await.unwrap());
    }
    eventually("a checkpoint", || async {
        let more = session.lock("more").await.ok()?;
        more.release().await.ok()?;
        let shown = fs::read_dir(path.join("checkpoints")).unwrap();
        let named = shown.filter(|entry| entry.as_ref().unwrap().file_name() != "unfinished");
        (named.count() > 0).then_some(())
    })
    .await;
}
