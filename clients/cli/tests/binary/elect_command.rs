//! `conclave elect` and `conclave elections` as scripts see them.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
};

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Cluster, PATIENCE, Process, eventually, runs};

/// A cluster of one that serves.
async fn one(name: &str) -> Cluster {
    let cluster = Cluster::start(name, 1);
    cluster.leader().await;
    cluster
}

/// A candidate that leads until told, and writes down its terms.
fn candidate(cluster: &Cluster, name: &str) -> Process {
    let directory = cluster.directory().display();
    let script = format!(
        "cd {directory}; echo {name} $CONCLAVE_ELECTION_TERM >> terms; i=0; \
         while [ $((i += 1)) -le 3000 ]; do [ -e {name}.enough ] && break; sleep 0.02; done"
    );
    cluster.begin([
        "elect", "db", name, "--ttl", "3s", "--", "sh", "-c", &script,
    ])
}

fn enough(cluster: &Cluster, name: &str) {
    fs::write(cluster.directory().join(format!("{name}.enough")), "").unwrap();
}

/// Who has led, with the term.
fn terms(cluster: &Cluster) -> Vec<(String, u64)> {
    let terms = fs::read_to_string(cluster.directory().join("terms")).unwrap_or_default();
    let terms = terms.lines().filter_map(|line| line.split_once(' '));
    terms
        .map(|(name, term)| (name.to_owned(), term.parse().unwrap()))
        .collect()
}

async fn leads(cluster: &Cluster, name: &str) {
    eventually(name, || async {
        let terms = terms(cluster);
        terms.last().filter(|(last, _)| last == name).map(drop)
    })
    .await;
}

async fn election(cluster: &Cluster) -> Value {
    let listed = cluster.run(["elections", "db", "-o", "json"]).await.json();
    listed["elections"][0].clone()
}

async fn candidates(cluster: &Cluster, count: u64) {
    eventually("candidates", || async {
        let total = election(cluster).await["candidates_total"].as_u64();
        (total == Some(count)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn one_leads_at_a_time_and_observers_see_each_of_them() {
    let cluster = one("elect").await;
    let observer = cluster.begin(["elect", "--observe", "db", "-o", "json"]);
    observer.printed("\"leader\":null").await;
    let first = candidate(&cluster, "first");
    leads(&cluster, "first").await;
    let second = candidate(&cluster, "second");
    candidates(&cluster, 2).await;
    let listed = election(&cluster).await;
    assert_eq!(listed["leader"]["value"], "first");
    assert_eq!(listed["leader"]["term"], terms(&cluster)[0].1);
    let held = cluster
        .run(["elect", "db", "x", "--try", "--", "true"])
        .await;
    assert_eq!(held.code, 73, "{held:?}");
    let late = cluster
        .run(["elect", "db", "x", "--wait", "100ms", "--", "true"])
        .await;
    assert_eq!(late.code, 124, "{late:?}");

    enough(&cluster, "first");
    leads(&cluster, "second").await;
    assert_eq!(first.ended().await.code, 0);
    // Deposed, the command ends, and whoever runs it hears why.
    let unlock = ["unlock", "db", "--force", "--reason", "maintenance"];
    assert_eq!(cluster.run(unlock).await.code, 0);
    let second = second.ended().await;
    assert_eq!(second.code, 75, "{second:?}");
    assert!(second.stderr.contains("maintenance"), "{second:?}");
    candidates_gone(&cluster).await;

    let terms = terms(&cluster);
    assert!(terms[0].1 < terms[1].1, "{terms:?}");
    observer.printed(&format!("\"term\":{}", terms[1].1)).await;
    eventually("the end", || async {
        let told = observer.stdout();
        let last = told.lines().last().unwrap_or_default();
        last.contains("\"leader\":null").then_some(())
    })
    .await;
    let told = observer.stdout();
    let values: Vec<Value> = told
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["leader"]["value"].clone())
        .collect();
    let expected = [Value::Null, "first".into(), "second".into(), Value::Null];
    assert_eq!(values, expected);
    observer.signal(Signal::TERM);
    assert_eq!(observer.ended().await.code, 128 + 15);
}

async fn candidates_gone(cluster: &Cluster) {
    eventually("no candidates", || async {
        election(cluster).await.is_null().then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_command_finds_its_leadership_in_its_environment() {
    let cluster = one("elect-env").await;
    let script = "echo \"$CONCLAVE_ELECTION_NAME,$CONCLAVE_ELECTION_KEY,\
                  $CONCLAVE_ELECTION_TERM,$CONCLAVE_SESSION\"; \
                  conclave elections \"$CONCLAVE_ELECTION_NAME\" -o json; exit 3";
    let ended = cluster
        .run(["elect", "a b", "here", "--", "sh", "-c", script])
        .await;
    assert_eq!(ended.code, 3, "{ended:?}");
    let (environment, listed) = ended.stdout.split_once('\n').unwrap();
    let listed: Value = serde_json::from_str(listed).unwrap();
    let leader = &listed["elections"][0]["leader"];
    let session = leader["session_id"].as_str().unwrap();
    let expected = format!("a b,a b/{session},{},{session}", leader["term"]);
    assert_eq!(environment, expected);
    assert_eq!(leader["value"], "here");
}

#[tokio::test]
async fn the_election_goes_on_while_the_leading_server_is_killed() {
    let mut cluster = Cluster::start("elect-leader", 3);
    let leader = cluster.leader().await;
    let observer = cluster.begin(["elect", "--observe", "db", "-o", "json"]);
    observer.printed("\"leader\":null").await;
    let first = candidate(&cluster, "first");
    leads(&cluster, "first").await;
    let second = candidate(&cluster, "second");
    candidates(&cluster, 2).await;
    cluster.kill(leader);
    assert_ne!(cluster.leader().await, leader);
    enough(&cluster, "first");
    leads(&cluster, "second").await;
    assert_eq!(first.ended().await.code, 0);
    enough(&cluster, "second");
    assert_eq!(second.ended().await.code, 0);
    eventually("the end", || async {
        let told = observer.stdout();
        let values = told
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()["leader"]["value"].clone());
        let expected = [Value::Null, "first".into(), "second".into(), Value::Null];
        values.eq(expected).then_some(())
    })
    .await;
    observer.signal(Signal::INT);
    assert_eq!(observer.ended().await.code, 128 + 2);
}

#[tokio::test]
async fn a_leader_that_was_suspended_for_too_long_ends_its_command_when_it_goes_on() {
    let cluster = one("elect-suspended").await;
    let script = "trap '' TERM; echo $$; i=0; while [ $((i += 1)) -le 3000 ]; do sleep 0.02; done";
    let first = cluster.begin([
        "elect", "db", "first", "--ttl", "2s", "--", "sh", "-c", script,
    ]);
    first.printed("\n").await;
    let pid = first.stdout().trim().parse().unwrap();
    let second = candidate(&cluster, "second");
    candidates(&cluster, 2).await;
    first.signal(Signal::STOP);
    leads(&cluster, "second").await;
    assert!(runs(pid), "only the term tells the two apart");
    first.signal(Signal::CONT);
    let ended = first.ended().await;
    assert_eq!(ended.code, 75, "{ended:?}");
    assert!(ended.complaint().contains("lost"), "{ended:?}");
    assert!(!runs(pid), "SIGTERM was ignored, SIGKILL came");
    assert_eq!(election(&cluster).await["leader"]["value"], "second");
    enough(&cluster, "second");
    assert_eq!(second.ended().await.code, 0);
}

/// Whether a server serves an observer now.
fn serves_observer(cluster: &Cluster, node: usize) -> bool {
    let (port, _) = cluster.ports(node);
    let ask = || {
        let mut connection = TcpStream::connect(("127.0.0.1", port))?;
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.write_all(b"GET /metrics HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")?;
        let mut page = String::new();
        connection.read_to_string(&mut page)?;
        std::io::Result::Ok(page)
    };
    let open = "\nconclave_requests_in_flight{method=\"Election/Observe\"} 1\n";
    ask().is_ok_and(|page| page.contains(open))
}

#[tokio::test]
async fn an_observer_misses_nothing_when_the_servers_that_it_hears_are_killed() {
    let mut cluster = Cluster::start("elect-observer", 3);
    cluster.leader().await;
    let observer = cluster.begin(["elect", "--observe", "db", "-o", "json"]);
    observer.printed("\"leader\":null").await;
    let mut running = Vec::new();
    for (count, name) in (1..).zip(["first", "second", "third"]) {
        running.push(candidate(&cluster, name));
        candidates(&cluster, count).await;
    }
    for (leader, next) in [("first", "second"), ("second", "third")] {
        leads(&cluster, leader).await;
        let heard = eventually("a server with the observer", || async {
            (0..3).find(|node| serves_observer(&cluster, *node))
        })
        .await;
        cluster.kill(heard);
        enough(&cluster, leader);
        leads(&cluster, next).await;
        cluster.spawn(heard);
        cluster.leader().await;
    }
    enough(&cluster, "third");
    for candidate in running {
        assert_eq!(candidate.ended().await.code, 0);
    }
    let lines = || {
        let told = observer.stdout();
        let lines = told.lines().map(serde_json::from_str::<Value>);
        lines.collect::<Result<Vec<_>, _>>().unwrap_or_default()
    };
    eventually("the end", || async {
        let lines = lines();
        (lines.len() > 1 && lines.last()?["leader"].is_null()).then_some(())
    })
    .await;
    let lines = lines();
    let value = |line: &Value| line["leader"]["value"].clone();
    let values: Vec<Value> = lines.iter().map(value).collect();
    let expected = ["first", "second", "third"].map(Value::from);
    let expected = [&[Value::Null][..], &expected, &[Value::Null]].concat();
    assert_eq!(values, expected);
    assert!(
        lines.iter().all(|line| line["missed"] == false),
        "{lines:?}"
    );
    let revision = |line: &Value| line["revision"].as_u64();
    assert!(
        lines
            .iter()
            .map(revision)
            .is_sorted_by(|one, next| one < next)
    );
    let term = |line: &Value| line["leader"]["term"].as_u64();
    let told: Vec<u64> = lines.iter().filter_map(term).collect();
    let led: Vec<u64> = terms(&cluster).into_iter().map(|(_, term)| term).collect();
    assert_eq!(told, led);
    observer.signal(Signal::INT);
    assert_eq!(observer.ended().await.code, 128 + 2);
}
