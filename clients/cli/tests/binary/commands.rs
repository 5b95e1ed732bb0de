//! The commands that look at a cluster, `bench`, and what the binary says of
//! itself.

use std::{collections::BTreeSet, time::Duration};

use conclave_proto::v1::{CloseSessionRequest, OpenSessionRequest, session_client::SessionClient};
use serde_json::Value;
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use crate::support::{Cluster, Directory, Process, conclave};

/// What scripts rely on wherever they look: names in snake case, ids as
/// hexadecimal text, times in milliseconds.
fn check_conventions(value: &Value) {
    match value {
        Value::Array(values) => values.iter().for_each(check_conventions),
        Value::Object(fields) => {
            for (name, value) in fields {
                let snake = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
                assert!(name.chars().all(snake), "{name}");
                if name.ends_with("_id") {
                    let id = value.as_str().unwrap();
                    assert!(u64::from_str_radix(id, 16).is_ok(), "{name} {id}");
                }
                if name.ends_with("_ms") {
                    assert!(value.is_u64(), "{name} {value}");
                }
                if name != "metadata" {
                    check_conventions(value);
                }
            }
        }
        _ => {}
    }
}

fn fields(value: &Value) -> BTreeSet<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[tokio::test]
async fn what_programs_read_is_complete() {
    let cluster = Cluster::start("json", 3);
    let leader = cluster.leader().await;
    let holder = cluster.begin(["lock", "deploy", "--ttl", "5s"]);
    holder.printed("token").await;
    let _waiter = cluster.begin(["lock", "deploy", "--ttl", "7s"]);
    cluster.waiters("deploy", 1).await;

    let locks = cluster.run(["locks", "-o", "json"]).await.json();
    check_conventions(&locks);
    let lock = &locks["locks"][0];
    assert_eq!(lock["name"], "deploy");
    let (held, waiting) = (&lock["holder"], &lock["waiters"][0]);
    assert_eq!((&held["place"], &waiting["place"]), (&0.into(), &1.into()));
    assert!(held["token"].as_u64() < waiting["token"].as_u64());
    for contender in [held, waiting] {
        let names = [
            "candidate",
            "entries",
            "key",
            "owner",
            "place",
            "session_id",
        ];
        let names = names
            .into_iter()
            .chain(["session_name", "since_ms", "token"]);
        assert_eq!(fields(contender), names.collect());
        let session = contender["session_id"].as_str().unwrap();
        assert_eq!(contender["key"], format!("deploy/{session}"));
    }
    let none = cluster.run(["locks", "unknown", "-o", "json"]).await.json();
    assert_eq!(none, serde_json::json!({ "locks": [] }));

    let sessions = cluster.run(["sessions", "-o", "json"]).await.json();
    check_conventions(&sessions);
    let sessions = sessions["sessions"].as_array().unwrap();
    let ids: BTreeSet<_> = sessions
        .iter()
        .map(|s| &s["session_id"])
        .map(Value::to_string)
        .collect();
    let expected = [held, waiting].map(|contender| contender["session_id"].to_string());
    assert_eq!(ids, BTreeSet::from(expected));
    let ttls: BTreeSet<_> = sessions
        .iter()
        .filter_map(|s| s["ttl_ms"].as_u64())
        .collect();
    assert_eq!(ttls, BTreeSet::from([5_000, 7_000]));

    let status = cluster.run(["status", "-o", "json"]).await.json();
    check_conventions(&status);
    let servers = status["servers"].as_array().unwrap();
    assert_eq!(servers.len(), 3);
    for (node, server) in servers.iter().enumerate() {
        assert_eq!(server["ok"], true);
        assert_eq!(server["endpoint"], cluster.endpoints()[node]);
        assert_eq!(server["member_name"], format!("n{node}"));
        let role = if node == leader { "leader" } else { "follower" };
        assert_eq!(server["role"], role);
        assert_eq!(server["leader_id"], servers[leader]["member_id"]);
        assert_eq!(server["members"].as_array().unwrap().len(), 3);
        for number in ["term", "revision", "applied_index", "sessions", "keys"] {
            assert!(server[number].is_u64(), "{number}");
        }
    }
}

#[tokio::test]
async fn a_server_that_is_down_is_shown_as_such() {
    let mut cluster = Cluster::start("down", 3);
    let leader = cluster.leader().await;
    let down = (leader + 1) % 3;
    cluster.kill(down);
    let status = cluster.run(["status", "-o", "json"]).await.json();
    for (node, server) in status["servers"].as_array().unwrap().iter().enumerate() {
        assert_eq!(server["ok"], node != down);
        assert_eq!(server["error"].is_string(), node == down);
    }
    let table = cluster.run(["status"]).await;
    assert_eq!(table.code, 0);
    assert_eq!(table.stdout.matches("unreachable").count(), 1);
}

#[tokio::test]
async fn tables_do_not_obey_what_names_say() {
    let cluster = Cluster::start("tables", 1);
    let client = cluster.client();
    let session = cluster.session(&client, Duration::from_secs(60)).await;
    let _guard = session.lock("wipe\x1b[2J\r\nlock").await.unwrap();
    let table = cluster.run(["locks"]).await;
    assert_eq!(table.code, 0);
    assert_eq!(table.stdout.lines().count(), 2, "{}", table.stdout);
    assert!(!table.stdout.contains(['\x1b', '\r']));
}

#[tokio::test]
async fn the_benchmark_ends_with_its_figures() {
    let cluster = Cluster::start("bench", 3);
    cluster.leader().await;
    for hot in [false, true] {
        let line = [
            "bench",
            "lock",
            "--clients",
            "2",
            "--seconds",
            "1",
            "-o",
            "json",
        ];
        let line = line.into_iter().chain(hot.then_some("--hot"));
        let ended = cluster.run(line).await;
        assert_eq!(ended.code, 0, "{ended:?}");
        let last: Value = serde_json::from_str(ended.stdout.lines().last().unwrap()).unwrap();
        let names = "bench hot clients owners held connections seconds ops ops_s ops_s_min \
                     p50_us p99_us max_us handoff_p50_us handoff_p99_us errors violations";
        assert_eq!(fields(&last), names.split_whitespace().collect());
        assert_eq!(last["bench"], "lock");
        assert_eq!(last["hot"], hot);
        assert_eq!(
            (&last["clients"], &last["connections"]),
            (&2.into(), &2.into())
        );
        assert!(last["ops"].as_u64().unwrap() > 0);
        assert_eq!(
            (&last["errors"], &last["violations"]),
            (&0.into(), &0.into())
        );
        assert!(last["p50_us"].as_u64() <= last["max_us"].as_u64());
    }
    let left = cluster.run(["locks", "-o", "json"]).await.json();
    assert_eq!(left, serde_json::json!({ "locks": [] }));
}

#[tokio::test]
async fn the_benchmark_shares_sessions_among_owners_while_others_hold() {
    let cluster = Cluster::start("bench-owners", 1);
    cluster.leader().await;
    let line = "bench lock --clients 6 --owners 3 --held 5 --hot --seconds 1 -o json";
    let ended = cluster.run(line.split(' ')).await;
    assert_eq!(ended.code, 0, "{ended:?}");
    let last = ended.json();
    assert!(last["ops"].as_u64().unwrap() > 0);
    assert!(last["handoff_p50_us"].as_u64() > Some(0));
    let left = cluster.run(["locks", "-o", "json"]).await.json();
    assert_eq!(left, serde_json::json!({ "locks": [] }));
}

#[tokio::test]
async fn the_benchmark_of_sessions_keeps_them_and_sees_them_expire() {
    let cluster = Cluster::start("bench-sessions", 1);
    cluster.leader().await;
    for vanish in [false, true] {
        let line = "bench sessions --sessions 9 --ttl 1s --connections 2 --seconds 2 -o json";
        let line = line.split(' ').chain(vanish.then_some("--vanish"));
        let ended = cluster.run(line).await;
        assert_eq!(ended.code, 0, "{ended:?}");
        let last = ended.json();
        assert_eq!((&last["sessions"], &last["lost"]), (&9.into(), &0.into()));
        assert_eq!(last["expired_ms"].is_u64(), vanish);
        let left = cluster.run(["sessions", "-o", "json"]).await.json();
        assert_eq!(left, serde_json::json!({ "sessions": [] }));
    }
}

#[tokio::test]
async fn help_of_every_command_has_examples() {
    let directory = Directory::new("help");
    let lines = [
        "serve",
        "dev",
        "lock",
        "unlock",
        "locks",
        "sessions",
        "status",
        "bench",
        "bench lock",
        "bench sessions",
        "completions",
    ];
    for line in lines {
        let mut help = conclave();
        help.args(line.split(' ')).arg("--help");
        let help = Process::start(directory.path(), &mut help).ended().await;
        assert_eq!((help.code, help.stderr.as_str()), (0, ""), "{line}");
        assert!(help.stdout.contains(&format!("conclave {line}")), "{line}");
        let (_, examples) = help.stdout.split_once("Example").expect(line);
        assert!(examples.contains(&format!("conclave {line}")), "{line}");
    }
    let all = Process::start(directory.path(), conclave().arg("--help"))
        .ended()
        .await;
    for line in lines {
        let command = line.split(' ').next().unwrap();
        assert!(all.stdout.contains(&format!("\n  {command} ")), "{line}");
    }
    assert!(!all.stdout.contains("watchdog"), "it is nobody's business");
    let version = Process::start(directory.path(), conclave().arg("--version"))
        .ended()
        .await;
    let expected = format!("conclave {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!((version.code, version.stdout), (0, expected));
}

#[tokio::test]
async fn completions_know_the_commands() {
    let directory = Directory::new("completions");
    for shell in ["bash", "zsh", "fish"] {
        let mut command = conclave();
        command.args(["completions", shell]);
        let printed = Process::start(directory.path(), &mut command).ended().await;
        assert_eq!((printed.code, printed.stderr.as_str()), (0, ""));
        for word in ["lock", "sessions", "endpoints"] {
            assert!(printed.stdout.contains(word), "{shell} {word}");
        }
    }
    let mut unknown = conclave();
    unknown.args(["completions", "no-shell"]);
    let ended = Process::start(directory.path(), &mut unknown).ended().await;
    assert_eq!(ended.code, 64);
}

/// Sessions until the cluster has no more room for one.
async fn fill(channel: &Channel) -> Vec<i64> {
    let mut opened = Vec::new();
    for _ in 0..1_000 {
        let request = OpenSessionRequest {
            ttl_ms: 600_000,
            metadata: [("m".to_owned(), "m".repeat(4_000))].into(),
            ..OpenSessionRequest::default()
        };
        match SessionClient::new(channel.clone()).open(request).await {
            Ok(session) => opened.push(session.into_inner().session_id),
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                return opened;
            }
        }
    }
    panic!("there is no quota");
}

#[tokio::test]
async fn a_cluster_at_its_quota_is_made_room_in_and_disarmed() {
    let flags = &["--quota-backend-bytes", "200000"];
    let cluster = Cluster::start_with("quota", 1, flags);
    cluster.leader().await;
    let endpoint = format!("http://{}", cluster.endpoints()[0]);
    let channel = Endpoint::from_shared(endpoint).unwrap();
    let channel = channel.connect().await.unwrap();
    let sessions = fill(&channel).await;
    assert!(sessions.len() > 10, "{}", sessions.len());
    let status =
        || async { cluster.run(["status", "-o", "json"]).await.json()["servers"][0].clone() };
    assert_eq!(status().await["alarms"][0], "NOSPACE");
    let refused = cluster.run(["lock", "x", "--", "true"]).await;
    assert_ne!(refused.code, 0, "{refused:?}");

    for session_id in sessions {
        let request = CloseSessionRequest {
            session_id,
            attachment: 0,
        };
        SessionClient::new(channel.clone())
            .close(request)
            .await
            .unwrap();
    }
    let newest = status().await["revision"].clone();
    let compacted = cluster.run(["compact", "-o", "json"]).await.json();
    assert_eq!(compacted["compacted_revision"], newest);
    assert_eq!(status().await["compacted_revision"], newest);
    // It is safe to repeat, and refuses what is to come.
    let again = cluster.run(["compact", &newest.to_string()]).await;
    assert_eq!(again.code, 0, "{again:?}");
    let future = cluster.run(["compact", "1000000"]).await;
    assert_eq!(future.code, 1, "{future:?}");
    assert!(future.complaint().contains("REVISION_FUTURE"), "{future:?}");

    let disarmed = cluster.run(["disarm"]).await;
    assert_eq!(disarmed.code, 0, "{disarmed:?}");
    assert!(status().await["alarms"].as_array().unwrap().is_empty());
    let served = cluster.run(["lock", "x", "--", "true"]).await;
    assert_eq!(served.code, 0, "{served:?}");
}
