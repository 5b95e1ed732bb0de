//! Three server processes that are killed while clients hold locks.

use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use conclave_client::{Client, Error, LockGuard, LossReason, SessionOptions};
use tokio::{task::JoinSet, time::sleep};

use crate::support::{Cluster, eventually};

const LOCKS: [&str; 2] = ["left", "right"];
const CLIENTS: usize = 6;

/// What the clients of one run share.
struct Workers {
    directory: PathBuf,
    stop: AtomicBool,
    /// Releases that were acknowledged: lock and token.
    released: Mutex<Vec<(&'static str, u64)>>,
}

/// Takes locks in turn and appends to the file of each while it holds it.
async fn work(worker: usize, client: Client, workers: Arc<Workers>) {
    let options = SessionOptions {
        ttl: Duration::from_secs(5),
        ..SessionOptions::default()
    };
    let mut session = None;
    for round in worker.. {
        if workers.stop.load(Ordering::Relaxed) {
            return;
        }
        let lock = LOCKS[round % LOCKS.len()];
        let current = match session.take() {
            Some(session) => session,
            None => match client.session(options.clone()).await {
                Ok(session) => session,
                Err(_) => continue,
            },
        };
        // An error here means that the session is over.
        if let Ok(guard) = current.lock(lock).await {
            let token = guard.token();
            if !guard.remaining().is_zero() {
                append(&workers.directory.join(lock), token, worker);
            }
            if guard.release().await.is_ok() {
                workers.released.lock().unwrap().push((lock, token));
            }
            session = Some(current);
        }
    }
}

fn append(file: &Path, token: u64, worker: usize) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .unwrap();
    file.write_all(format!("{token} {worker}\n").as_bytes())
        .unwrap();
}

fn tokens(file: &Path) -> Vec<u64> {
    let lines = fs::read_to_string(file).unwrap();
    lines
        .lines()
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect()
}

/// Clients that work until they are stopped.
struct Load {
    workers: Arc<Workers>,
    tasks: JoinSet<()>,
}

impl Load {
    fn start(cluster: &Cluster) -> Self {
        let workers = Arc::new(Workers {
            directory: cluster.directory().to_owned(),
            stop: AtomicBool::new(false),
            released: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        for worker in 0..CLIENTS {
            tasks.spawn(work(worker, cluster.client(), Arc::clone(&workers)));
        }
        Self { workers, tasks }
    }

    fn releases(&self) -> usize {
        self.workers.released.lock().unwrap().len()
    }

    /// Waits until this many more releases are acknowledged.
    async fn goes_on(&self, more: usize) {
        let before = self.releases();
        eventually("releases", || async {
            (self.releases() > before + more).then_some(())
        })
        .await;
    }

    /// Stops the clients, and shows on a cluster that serves again that tokens only
    /// grew and no acknowledged release was lost.
    async fn stop_and_check(mut self, cluster: &Cluster) {
        self.workers.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        let client = cluster.client();
        let session = cluster.session(&client, Duration::from_secs(5)).await;
        let mut newest = BTreeMap::new();
        for lock in LOCKS {
            let tokens = tokens(&self.workers.directory.join(lock));
            assert!(
                tokens.is_sorted_by(|one, next| one < next),
                "tokens of {lock} do not grow"
            );
            let guard = session.lock(lock).await.expect("it is served again");
            assert!(guard.token() > *tokens.last().unwrap());
            newest.insert(lock, guard.token());
            guard.release().await.unwrap();
        }
        let released = self.workers.released.lock().unwrap().clone();
        for (lock, token) in released {
            assert!(token < newest[lock]);
            assert!(
                !client.check(lock, token).await.unwrap(),
                "a release of {lock} was lost"
            );
        }
    }
}

#[tokio::test]
async fn tokens_only_grow_and_nothing_acknowledged_is_lost_while_servers_are_killed() {
    let mut cluster = Cluster::start("kills", 3);
    drop(
        cluster
            .session(&cluster.client(), Duration::from_secs(5))
            .await,
    );
    let load = Load::start(&cluster);
    for kill_leader in [true, false, true, false] {
        sleep(Duration::from_millis(500)).await;
        let leader = cluster.leader().await;
        let victim = if kill_leader {
            leader
        } else {
            (leader + 1) % 3
        };
        cluster.kill(victim);
        // Two of three go on by themselves.
        load.goes_on(20).await;
        cluster.spawn(victim);
    }
    load.stop_and_check(&cluster).await;
}

#[tokio::test]
async fn what_was_acknowledged_survives_the_death_of_all_under_load() {
    let mut cluster = Cluster::start("all", 3);
    let client = cluster.client();
    let session = cluster.session(&client, Duration::from_secs(60)).await;
    let held = session.lock("held").await.unwrap();
    let given_up = session.lock("given up").await.unwrap();
    let given_up_token = given_up.token();
    given_up.release().await.unwrap();

    let load = Load::start(&cluster);
    load.goes_on(100).await;
    for node in 0..3 {
        cluster.kill(node);
    }
    for node in 0..3 {
        cluster.spawn(node);
    }
    load.goes_on(100).await;
    load.stop_and_check(&cluster).await;

    let listed = eventually("a list", || async { client.sessions().await.ok() }).await;
    assert!(
        listed
            .iter()
            .any(|listed| listed.session_id == session.id())
    );
    assert!(client.check("held", held.token()).await.unwrap());
    assert!(!client.check("given up", given_up_token).await.unwrap());
    held.release().await.expect("the holder holds it still");
    let again = session.lock("held").await.unwrap();
    assert!(again.token() > given_up_token);
}

/// A lock whose grants are counted: one that nobody had asked for again would be seen
/// as a holder that no client knows, and so nobody else would ever be granted it.
#[tokio::test]
async fn nothing_runs_twice_while_leaders_are_killed_and_clients_repeat() {
    let mut cluster = Cluster::start("once", 3);
    let ready = cluster
        .session(&cluster.client(), Duration::from_secs(5))
        .await;
    ready.close().await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for worker in 0..CLIENTS {
        tasks.spawn(count(worker, cluster.client(), Arc::clone(&stop)));
    }
    for _ in 0..4 {
        sleep(Duration::from_millis(700)).await;
        let leader = cluster.leader().await;
        cluster.kill(leader);
        sleep(Duration::from_millis(700)).await;
        cluster.spawn(leader);
    }
    stop.store(true, Ordering::Relaxed);
    let mut done = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        done.push(ended.unwrap());
    }
    let client = cluster.client();
    let sessions = eventually("a list", || async { client.sessions().await.ok() }).await;
    assert!(
        sessions.is_empty(),
        "each session was opened once and closed: {sessions:?}"
    );
    for (worker, pairs) in done.into_iter().enumerate() {
        assert!(pairs > 20, "worker {worker} did {pairs} pairs only");
    }
}

/// Takes and gives up a lock of its own in one session, until it is told to stop. A
/// second run of an acquire would say that the session contends already, and one of a
/// release that it does not hold.
async fn count(worker: usize, client: Client, stop: Arc<AtomicBool>) -> usize {
    let options = SessionOptions {
        ttl: Duration::from_secs(60),
        name: format!("worker-{worker}"),
        ..SessionOptions::default()
    };
    let session = client.session(options).await.unwrap();
    let lock = format!("of-{worker}");
    let mut newest = 0;
    for pairs in 0.. {
        if stop.load(Ordering::Relaxed) {
            eventually("a close", || async { session.clone().close().await.ok() }).await;
            return pairs;
        }
        let guard = session.lock(&lock).await.expect("nobody else wants it");
        assert!(guard.token() > newest, "an old grant came back");
        newest = guard.token();
        guard.release().await.expect("it was held");
    }
    unreachable!("there are more numbers than time")
}

#[tokio::test]
async fn a_program_that_was_started_again_goes_on_with_its_session() {
    let mut cluster = Cluster::start("resume", 3);
    let client = cluster.client();
    let session = cluster.session(&client, Duration::from_secs(60)).await;
    let credentials = session.credentials().to_string();
    let held = session.lock("held").reentrant().await.unwrap();
    let shared = session.lock("held").reentrant().await.unwrap();
    let other = cluster.session(&client, Duration::from_secs(60)).await;
    let busy = other.lock("busy").await.unwrap();
    let waits = |owner: &'static str| {
        let request = session.lock("busy").owner(owner);
        tokio::spawn(async move { request.await })
    };
    let (kept, dropped) = (waits("kept"), waits("dropped"));
    eventually("two who wait", || async {
        let busy = client.lock_info("busy").await.ok()??;
        (busy.waiters.len() == 2).then_some(())
    })
    .await;
    let leader = cluster.leader().await;
    cluster.kill(leader);

    // As another process would.
    let again = cluster.client();
    let credentials = credentials.parse().unwrap();
    let resumed = eventually("to resume", || async {
        again
            .resume(&credentials, |_, owner| owner == "kept")
            .await
            .ok()
    })
    .await;
    assert_eq!(resumed.session.id(), session.id());
    let tokens: Vec<_> = resumed.guards.iter().map(LockGuard::token).collect();
    assert_eq!(tokens, [held.token(), shared.token()]);
    assert_eq!(session.lost().await, LossReason::Superseded);
    assert!(kept.await.unwrap().is_err() && dropped.await.unwrap().is_err());
    let fenced = held.release().await.unwrap_err();
    assert!(matches!(fenced, Error::SessionLost(LossReason::Superseded)));

    cluster.spawn(leader);
    let [waiting] = <[_; 1]>::try_from(resumed.waiting).unwrap();
    busy.release().await.unwrap();
    let granted = waiting.await.unwrap();
    assert!(client.check("busy", granted.token()).await.unwrap());
    granted.release().await.unwrap();
    // Free only when both acquires are undone, and then it is.
    let [held, shared] = <[_; 2]>::try_from(resumed.guards).unwrap();
    let token = held.token();
    held.release().await.unwrap();
    assert!(client.check("held", token).await.unwrap());
    shared.release().await.unwrap();
    assert!(!client.check("held", token).await.unwrap());
    assert!(
        session.close().await.is_err(),
        "it is not this one's any more"
    );
    resumed.session.close().await.unwrap();
    other.close().await.unwrap();
}
