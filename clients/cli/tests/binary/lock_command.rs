//! `conclave lock` as scripts see it: who runs when, with what, and how it ends.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
};

use rustix::process::Signal;

use crate::support::{Cluster, Directory, Process, conclave, eventually, free_ports, runs};

/// The head of a loop that is longer than any test, but ends when nobody ends it.
/// Counts without another process, which a signal to the group could end.
const LONG: &str = "i=0; while [ $((i += 1)) -le 3000 ];";

/// A command that writes down when it begins and ends, and works until told.
fn job(cluster: &Cluster, name: &str) -> String {
    let directory = cluster.directory().display();
    format!(
        "cd {directory}; echo {name} begins >> order; \
         {LONG} do [ -e {name}.enough ] && break; sleep 0.02; done; echo {name} ends >> order"
    )
}

fn enough(cluster: &Cluster, name: &str) {
    fs::write(cluster.directory().join(format!("{name}.enough")), "").unwrap();
}

fn order(cluster: &Cluster) -> Vec<String> {
    let order = fs::read_to_string(cluster.directory().join("order")).unwrap_or_default();
    order.lines().map(str::to_owned).collect()
}

async fn begins(cluster: &Cluster, name: &str) {
    let line = format!("{name} begins");
    eventually(&line, || async {
        order(cluster).contains(&line).then_some(())
    })
    .await;
}

/// A cluster of one that serves.
async fn one(name: &str) -> Cluster {
    let cluster = Cluster::start(name, 1);
    cluster.leader().await;
    cluster
}

#[tokio::test]
async fn commands_exclude_each_other_while_the_leader_is_killed() {
    let mut cluster = Cluster::start("lock-leader", 3);
    let leader = cluster.leader().await;
    let first = cluster.begin(["lock", "deploy", "--", "sh", "-c", &job(&cluster, "first")]);
    begins(&cluster, "first").await;
    let second = cluster.begin(["lock", "deploy", "--", "sh", "-c", &job(&cluster, "second")]);
    cluster.waiters("deploy", 1).await;
    let before = cluster.lock("deploy").await;

    cluster.kill(leader);
    assert_ne!(cluster.leader().await, leader);
    // The others serve: a lock is taken and given back.
    let other = cluster.run(["lock", "other", "--", "true"]).await;
    assert_eq!(other.code, 0, "{other:?}");
    let after = cluster.lock("deploy").await;
    for who in ["holder", "waiters"] {
        let who = |lock: &serde_json::Value| match &lock[who] {
            serde_json::Value::Array(waiters) => waiters[0]["key"].clone(),
            holder => holder["key"].clone(),
        };
        assert_eq!(who(&before), who(&after));
    }
    assert_eq!(before["holder"]["token"], after["holder"]["token"]);
    assert_eq!(order(&cluster), ["first begins"]);

    enough(&cluster, "first");
    begins(&cluster, "second").await;
    enough(&cluster, "second");
    assert_eq!(first.ended().await.code, 0);
    assert_eq!(second.ended().await.code, 0);
    let expected = ["first begins", "first ends", "second begins", "second ends"];
    assert_eq!(order(&cluster), expected);
}

#[tokio::test]
async fn a_killed_holder_takes_its_command_along_and_the_next_waits_for_the_ttl() {
    let cluster = one("lock-kill").await;
    // Both the command and its child ignore whatever can be ignored.
    let script = format!(
        "cd {}; trap '' TERM INT HUP; echo $$ > pids; echo \"$CONCLAVE_SESSION\" > session; \
         {LONG} do echo work >> order; sleep 0.02; done & echo $! >> pids; wait",
        cluster.directory().display()
    );
    let holder = cluster.begin(["lock", "deploy", "--ttl", "3s", "--", "sh", "-c", &script]);
    eventually("work", || async {
        order(&cluster).contains(&"work".to_owned()).then_some(())
    })
    .await;
    // What the next one sees when it is let in.
    let script = format!(
        "cd {}; echo next >> order; conclave sessions -o json > seen",
        cluster.directory().display()
    );
    let next = cluster.begin(["lock", "deploy", "--", "sh", "-c", &script]);
    cluster.waiters("deploy", 1).await;

    holder.signal(Signal::KILL);
    let pids = fs::read_to_string(cluster.directory().join("pids")).unwrap();
    let pids: Vec<u32> = pids.lines().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 2);
    eventually("the end of the command and its child", || async {
        pids.iter().all(|pid| !runs(*pid)).then_some(())
    })
    .await;
    assert_eq!(holder.ended().await.code, 137);
    // Dead, but not forgotten before its time.
    let lock = cluster.lock("deploy").await;
    let session = fs::read_to_string(cluster.directory().join("session")).unwrap();
    assert_eq!(lock["holder"]["session_id"], session.trim());
    assert_eq!(lock["waiters_total"], 1);

    assert_eq!(next.ended().await.code, 0);
    let order = order(&cluster);
    let admitted = order.iter().filter(|line| *line == "next").count();
    assert_eq!(admitted, 1, "once");
    assert_eq!(order.last().unwrap(), "next", "after the last of the work");
    let seen = fs::read_to_string(cluster.directory().join("seen")).unwrap();
    assert!(seen.contains("\"sessions\""), "{seen}");
    assert!(!seen.contains(session.trim()), "let in before its end");
}

#[tokio::test]
async fn the_command_finds_the_grant_in_its_environment() {
    let cluster = one("lock-env").await;
    let script = "echo \"$CONCLAVE_LOCK_NAME,$CONCLAVE_LOCK_KEY,$CONCLAVE_LOCK_TOKEN,\
                  $CONCLAVE_SESSION\"; conclave locks \"$CONCLAVE_LOCK_NAME\" -o json";
    let ended = cluster.run(["lock", "a b", "--", "sh", "-c", script]).await;
    assert_eq!(ended.code, 0, "{ended:?}");
    let (environment, listed) = ended.stdout.split_once('\n').unwrap();
    let listed: serde_json::Value = serde_json::from_str(listed).unwrap();
    let holder = &listed["locks"][0]["holder"];
    let expected = format!(
        "a b,{},{},{}",
        holder["key"].as_str().unwrap(),
        holder["token"],
        holder["session_id"].as_str().unwrap(),
    );
    assert_eq!(environment, expected);
    assert!(environment.starts_with("a b,a b/"), "{environment}");
    assert_eq!(cluster.lock("a b").await, serde_json::Value::Null, "free");
}

#[tokio::test]
async fn exit_codes_of_the_command_are_those_of_a_shell() {
    let cluster = one("lock-codes").await;
    let plain = cluster.directory().join("plain");
    fs::write(&plain, "not for running").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    let plain = plain.to_str().unwrap();
    let cases: [(&[&str], i32); 7] = [
        (&["true"], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["sh", "-c", "exit 73"], 73),
        (&[plain], 126),
        (&["./no-such-command"], 127),
    ];
    for (words, code) in cases {
        let line = ["lock", "codes", "--"].iter().chain(words);
        let ended = cluster.run(line).await;
        assert_eq!(ended.code, code, "{words:?} {ended:?}");
        if [126, 127].contains(&code) {
            assert!(ended.complaint().contains(words[0]), "{ended:?}");
        }
    }
    let ended = cluster.run(["lock", "codes", "--try", "--", "true"]).await;
    assert_eq!(ended.code, 0, "nobody holds it after all that");
}

#[tokio::test]
async fn a_held_lock_is_refused_at_once_or_after_a_wait() {
    let cluster = one("lock-held").await;
    let holder = cluster.begin(["lock", "held"]);
    holder.printed("token").await;
    let marker = cluster.directory().join("ran");
    let marker = marker.to_str().unwrap();
    let ended = cluster.run(["lock", "held", "--try", "--", "touch", marker]);
    assert_eq!(ended.await.code, 73);
    let wait = ["lock", "held", "--wait", "300ms", "--", "touch", marker];
    let ended = cluster.run(wait).await;
    assert_eq!(ended.code, 124);
    assert!(ended.complaint().contains("`held`"));
    assert!(!fs::exists(marker).unwrap(), "the command ran");
    cluster.waiters("held", 0).await;
}

#[tokio::test]
async fn without_a_command_it_holds_until_it_is_told_to_end() {
    let cluster = one("lock-hold").await;
    for signal in [Signal::TERM, Signal::INT] {
        let holder = cluster.begin(["lock", "hold"]);
        holder.printed("token").await;
        let lock = cluster.lock("hold").await;
        let expected = format!(
            "key    {}\ntoken  {}\n",
            lock["holder"]["key"].as_str().unwrap(),
            lock["holder"]["token"]
        );
        assert_eq!(holder.stdout(), expected);
        holder.signal(signal);
        assert_eq!(holder.ended().await.code, 0);
        assert_eq!(cluster.lock("hold").await, serde_json::Value::Null);
    }
    let holder = cluster.begin(["lock", "hold", "-o", "json"]);
    holder.printed("}").await;
    let printed: serde_json::Value = serde_json::from_str(&holder.stdout()).unwrap();
    let lock = cluster.lock("hold").await;
    for field in ["key", "token", "session_id"] {
        assert_eq!(printed[field], lock["holder"][field]);
    }
}

#[tokio::test]
async fn force_takes_the_lock_with_a_reason_and_ends_the_command() {
    let cluster = one("lock-force").await;
    let script = format!(
        "cd {}; trap 'echo told; exit 0' TERM; echo $CONCLAVE_LOCK_TOKEN; \
         {LONG} do sleep 0.02; done",
        cluster.directory().display()
    );
    let holder = cluster.begin(["lock", "deploy", "--", "sh", "-c", &script]);
    holder.printed("\n").await;
    let next = cluster.begin(["lock", "deploy"]);
    cluster.waiters("deploy", 1).await;
    let token = holder.stdout().trim().to_owned();

    let reason = "the host is being replaced";
    let forced = ["unlock", "deploy", "--force", "--reason", reason, "-o"];
    let forced = cluster.run(forced.iter().chain(&["json"])).await.json();
    assert_eq!(forced["released"]["token"].to_string(), token);
    let ended = holder.ended().await;
    assert_eq!(ended.code, 75);
    assert!(ended.stderr.contains(reason), "{ended:?}");
    assert!(ended.stdout.contains("told"), "{ended:?}");
    next.printed("token").await;

    let unknown = cluster.run(["unlock", "unknown", "--force", "--reason", "x"]);
    let unknown = unknown.await;
    assert_eq!(unknown.code, 1);
    assert_eq!(unknown.complaint(), "nobody holds `unknown`");
}

#[tokio::test]
async fn without_the_cluster_the_command_ends_before_the_lock_does() {
    let mut cluster = one("lock-lost").await;
    let script = format!("trap '' TERM; echo $$; {LONG} do sleep 0.02; done");
    let holder = cluster.begin(["lock", "x", "--ttl", "2s", "--", "sh", "-c", &script]);
    holder.printed("\n").await;
    let pid = holder.stdout().trim().parse().unwrap();
    cluster.kill(0);
    let ended = holder.ended().await;
    assert_eq!(ended.code, 75, "{ended:?}");
    assert!(!runs(pid), "SIGTERM was ignored, SIGKILL came");
}

/// As when a laptop sleeps, or a machine is paused: nobody is there to end the command in
/// time.
#[tokio::test]
async fn a_holder_that_was_suspended_for_too_long_ends_its_command_when_it_goes_on() {
    let cluster = one("lock-suspended").await;
    let script = format!("trap '' TERM; echo $$; {LONG} do sleep 0.02; done");
    let holder = cluster.begin(["lock", "x", "--ttl", "2s", "--", "sh", "-c", &script]);
    holder.printed("\n").await;
    let pid = holder.stdout().trim().parse().unwrap();
    let next = cluster.begin(["lock", "x"]);
    cluster.waiters("x", 1).await;
    holder.signal(Signal::STOP);
    next.printed("token").await;
    assert!(runs(pid), "only the token tells the two apart");
    holder.signal(Signal::CONT);
    let ended = holder.ended().await;
    assert_eq!(ended.code, 75, "{ended:?}");
    assert!(ended.complaint().contains("lost"), "{ended:?}");
    assert!(!runs(pid), "SIGTERM was ignored, SIGKILL came");
    // It gave up nothing that was not its own any more.
    let holds = cluster.lock("x").await["holder"]["token"].to_string();
    assert!(next.stdout().contains(&holds), "{holds} {}", next.stdout());
}

#[tokio::test]
async fn signals_reach_the_command() {
    let cluster = one("lock-signals").await;
    let script = format!(
        "trap 'echo user' USR1; trap 'echo hangup' HUP; \
         trap 'echo interrupted; exit 9' INT; echo ready; {LONG} do sleep 0.02; done"
    );
    let holder = cluster.begin(["lock", "x", "--", "sh", "-c", &script]);
    holder.printed("ready").await;
    holder.signal(Signal::USR1);
    holder.printed("user").await;
    holder.signal(Signal::HUP);
    holder.printed("hangup").await;
    holder.signal(Signal::INT);
    let ended = holder.ended().await;
    assert_eq!(ended.code, 9);
    assert_eq!(ended.stdout, "ready\nuser\nhangup\ninterrupted\n");

    // One that does not care dies of it, and that shows.
    let script = "echo ready; exec sleep 60";
    let holder = cluster.begin(["lock", "x", "--", "sh", "-c", script]);
    holder.printed("ready").await;
    holder.signal(Signal::INT);
    assert_eq!(holder.ended().await.code, 130);
    assert_eq!(cluster.lock("x").await, serde_json::Value::Null);
}

#[tokio::test]
async fn a_waiter_that_is_interrupted_leaves_the_queue() {
    let cluster = one("lock-leave").await;
    let holder = cluster.begin(["lock", "x"]);
    holder.printed("token").await;
    let waiter = cluster.begin(["lock", "x", "--", "true"]);
    cluster.waiters("x", 1).await;
    waiter.signal(Signal::INT);
    assert_eq!(waiter.ended().await.code, 130);
    cluster.waiters("x", 0).await;
}

#[tokio::test]
async fn wrong_arguments_are_usage_errors() {
    let cluster = one("lock-usage").await;
    let long = "x".repeat(1_025);
    let cases: [&[&OsStr]; 9] = [
        &[],
        &["x".as_ref(), "--ttl".as_ref(), "soon".as_ref()],
        &["x".as_ref(), "--ttl".as_ref(), "499ms".as_ref()],
        &["x".as_ref(), "--ttl".as_ref(), "25h".as_ref()],
        &["x".as_ref(), "--try".as_ref(), "--wait=1s".as_ref()],
        &["x".as_ref(), "true".as_ref()],
        &["".as_ref()],
        &[long.as_ref()],
        &[OsStr::from_bytes(b"\xff\xfe")],
    ];
    for case in cases {
        let line = [&["lock".as_ref()][..], case].concat();
        let ended = cluster.run(line).await;
        assert_eq!(ended.code, 64, "{case:?} {ended:?}");
        assert!(ended.stderr.starts_with("conclave: "), "{ended:?}");
    }
    let longest = &long[1..];
    let ended = cluster.run(["lock", longest, "--", "true"]).await;
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[tokio::test]
async fn no_cluster_is_told_from_other_trouble() {
    let directory = Directory::new("lock-nobody");
    let nobody = free_ports(1)[0].to_string();
    let endpoint = format!("127.0.0.1:{nobody}");
    let commands: [&[&str]; 6] = [
        &["lock", "x", "--", "true"],
        &["unlock", "x", "--force", "--reason", "y"],
        &["locks"],
        &["sessions"],
        &["status"],
        &["bench", "lock", "--clients", "1", "--seconds", "1"],
    ];
    // All at once, since each of them tries for a while.
    let running: Vec<Process> = commands
        .iter()
        .map(|command| {
            let mut line = conclave();
            line.args(["--endpoints", &endpoint]).args(*command);
            Process::start(directory.path(), &mut line)
        })
        .collect();
    for (process, command) in running.into_iter().zip(commands) {
        let ended = process.ended().await;
        assert_eq!(ended.code, 69, "{command:?} {ended:?}");
        ended.complaint();
    }
}

/// Kills the holder of the lock `a` without a word, and waits until its session has
/// expired; what is left of it.
async fn lost_with_delay(cluster: &Cluster, delay: &str) -> serde_json::Value {
    let holder = cluster.begin(["lock", "a", "--ttl", "1s", "--lock-delay", delay]);
    holder.printed("token").await;
    assert_eq!(cluster.lock("a").await["holder"].get("delay_left_ms"), None);
    holder.signal(Signal::KILL);
    eventually("the delay", || async {
        let left = cluster.lock("a").await["holder"].clone();
        left["delay_left_ms"].is_u64().then_some(left)
    })
    .await
}

#[tokio::test]
async fn a_lock_that_was_lost_is_free_when_its_delay_has_ended() {
    let cluster = Cluster::start("delay", 1);
    cluster.leader().await;
    let left = lost_with_delay(&cluster, "2s").await;
    let held = cluster.run(["lock", "a", "--try", "--", "true"]).await;
    assert_eq!(held.code, 73, "{held:?}");
    let session = left["session_id"].as_str().unwrap();
    assert_eq!(left["key"], format!("a/{session}"));
    assert!(left["delay_left_ms"].as_u64() <= Some(2_001));
    let next = cluster
        .run(["lock", "a", "--", "sh", "-c", "echo $CONCLAVE_LOCK_TOKEN"])
        .await;
    assert!(next.stdout.trim().parse::<u64>().ok() > left["token"].as_u64());
}

#[tokio::test]
async fn an_operator_ends_a_delay_only_if_that_is_said() {
    let cluster = Cluster::start("skip", 1);
    cluster.leader().await;
    lost_with_delay(&cluster, "1m").await;
    let table = cluster.run(["locks"]).await.stdout;
    assert!(table.contains("delay "), "{table}");
    let unlock = ["unlock", "a", "--force", "--reason", "it is gone"];
    let refused = cluster.run(unlock).await;
    assert_eq!(refused.code, 1);
    assert!(refused.complaint().contains("--skip-delay"), "{refused:?}");
    let freed = cluster
        .run(unlock.into_iter().chain(["--skip-delay"]))
        .await;
    assert_eq!(freed.code, 0, "{freed:?}");
    let next = cluster.run(["lock", "a", "--try", "--", "true"]).await;
    assert_eq!(next.code, 0, "{next:?}");
}
