//! `conclave kv`, `watch` and `lease`: against a cluster, and against etcd, where the
//! `etcd` command is installed.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Cluster, Directory, Ended, Process, conclave, eventually, free_ports};

/// An etcd that ends with this value.
struct Etcd {
    child: Child,
    directory: Directory,
    endpoint: String,
}

impl Etcd {
    fn start() -> Option<Etcd> {
        let directory = Directory::new("etcd");
        let ports = free_ports(2);
        let [client, peer] = [ports[0], ports[1]].map(|port| format!("http://127.0.0.1:{port}"));
        let child = Command::new("etcd")
            .env_clear()
            .args(["--log-level", "error", "--name", "a", "--data-dir"])
            .arg(directory.path().join("data"))
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("a={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Some(Etcd {
            child: child.ok()?,
            directory,
            endpoint: client,
        })
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The binary as a client of some servers.
struct Shell<'a> {
    endpoints: String,
    directory: &'a Path,
}

impl Shell<'_> {
    fn command(&self, line: &[&str]) -> Command {
        let mut command = conclave();
        command
            .args(line)
            .current_dir(self.directory)
            .env("CONCLAVE_ENDPOINTS", &self.endpoints);
        command
    }

    fn begin(&self, line: &[&str]) -> Process {
        Process::start(self.directory, &mut self.command(line))
    }

    async fn run(&self, line: &[&str]) -> Ended {
        self.begin(line).ended().await
    }

    async fn json(&self, line: &[&str]) -> Value {
        let line: Vec<&str> = ["-o", "json"].iter().chain(line).copied().collect();
        self.run(&line).await.json()
    }

    /// With this on stdin.
    async fn fed(&self, line: &[&str], stdin: &[u8]) -> Ended {
        let path = self.directory.join("stdin");
        fs::File::create(&path).unwrap().write_all(stdin).unwrap();
        let mut command = self.command(line);
        command.stdin(fs::File::open(&path).unwrap());
        Process::start(self.directory, &mut command).ended().await
    }
}

/// Runs a scenario on etcd, if it is installed, and on a cluster of ours.
#[expect(clippy::print_stderr, reason = "a test says that it is skipped")]
async fn on_both(name: &str, scenario: impl AsyncFn(Shell<'_>)) {
    match Etcd::start() {
        Some(etcd) => {
            let shell = Shell {
                endpoints: etcd.endpoint.clone(),
                directory: etcd.directory.path(),
            };
            serves(&shell).await;
            scenario(shell).await;
        }
        None => eprintln!("SKIPPED: for etcd, which is not installed"),
    }
    let cluster = Cluster::start(name, 3);
    let shell = Shell {
        endpoints: cluster.endpoints().join(","),
        directory: cluster.directory(),
    };
    serves(&shell).await;
    scenario(shell).await;
}

async fn serves(shell: &Shell<'_>) {
    eventually("a read", || async {
        let ended = shell.run(&["kv", "get", "x", "--count-only"]).await;
        (ended.code == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn keys_are_written_read_and_deleted() {
    on_both("kv", async |shell| {
        let first = shell.json(&["kv", "put", "a/1", "one"]).await;
        let at = first["revision"].as_i64().unwrap();
        assert_eq!(first["previous"], Value::Null);
        let again = shell.json(&["kv", "put", "a/1", "-1", "--prev"]).await;
        assert_eq!(again["revision"], at + 1);
        assert_eq!(again["previous"]["value"], "one");
        let binary = b"\xff\0\n";
        assert_eq!(shell.fed(&["kv", "put", "a/2"], binary).await.code, 0);

        let all = shell.json(&["kv", "get", "a/", "--prefix"]).await;
        assert_eq!((&all["count"], &all["more"]), (&json!(2), &json!(false)));
        assert_eq!(
            all["kvs"][0],
            json!({
                "key": "a/1",
                "value": "-1",
                "create_revision": at,
                "mod_revision": at + 1,
                "version": 2,
            })
        );
        assert_eq!(all["kvs"][1]["value_base64"], "/wAK");
        let table = shell.run(&["kv", "get", "a/", "--prefix"]).await.stdout;
        assert!(table.starts_with("KEY  VALUE"), "{table}");
        assert!(table.contains("a/2  \\xff\\u{0}\\n"), "{table}");
        let value = shell.run(&["kv", "get", "a/1", "--value-only"]).await;
        assert_eq!(value.stdout, "-1");

        let revision = at.to_string();
        let old = shell.json(&["kv", "get", "a/1", "--rev", &revision]).await;
        assert_eq!(old["kvs"][0]["value"], "one");
        let line = ["kv", "get", "a/", "--prefix", "--keys-only"];
        let last = [&line[..], &["--sort", "mod", "--descend", "--limit", "1"]].concat();
        assert_eq!(shell.run(&last).await.stdout, "a/2\n");
        assert_eq!(
            shell
                .run(&["kv", "get", "a/1", "a/2", "--keys-only"])
                .await
                .stdout,
            "a/1\n"
        );

        let deleted = shell.json(&["kv", "del", "a/", "--prefix", "--prev"]).await;
        assert_eq!(deleted["deleted"], 2);
        assert_eq!(deleted["previous"][0]["key"], "a/1");
        let gone = shell.run(&["kv", "get", "a/1"]).await;
        assert_eq!((gone.code, gone.complaint()), (1, "there is no key `a/1`"));
        assert_eq!(shell.run(&["kv", "get", ""]).await.code, 64);
        assert_eq!(
            shell
                .run(&["kv", "put", "a", "b", "--lease", "77"])
                .await
                .code,
            1
        );

        shell.run(&["kv", "compact", &revision]).await;
        let old = shell.run(&["kv", "compact", &revision]).await;
        assert_eq!(old.code, 1, "{old:?}");
    })
    .await;
}

#[tokio::test]
async fn transactions_take_one_branch_or_the_other() {
    on_both("kv-txn", async |shell| {
        let take = [
            "kv",
            "txn",
            "--if",
            "create(leader) = 0",
            "--then",
            "put leader 'number one'",
            "--else",
            "get leader",
        ];
        let taken = shell.json(&take).await;
        assert_eq!(taken["succeeded"], true);
        assert_eq!(taken["results"][0]["put"]["previous"], Value::Null);
        let refused = shell.json(&take).await;
        assert_eq!(refused["succeeded"], false);
        assert_eq!(
            refused["results"][0]["get"]["kvs"][0]["value"],
            "number one"
        );
        assert_eq!(refused["revision"], taken["revision"]);

        let text = "value(\"leader\") = \"number one\"\nversion(leader) < 2\n\n\
                    put a 1\nget a\ndel leader --prev\n\nput a 2\n";
        let done = shell.fed(&["kv", "txn"], text.as_bytes()).await;
        assert_eq!(done.code, 0, "{done:?}");
        assert!(done.stdout.starts_with("the conditions held"), "{done:?}");
        assert!(done.stdout.contains("del: 1 deleted"), "{done:?}");
        let twice = ["kv", "txn", "--then", "put a 1", "--then", "put a 2"];
        assert_eq!(shell.run(&twice).await.code, 64);
        assert_eq!(shell.run(&["kv", "txn", "--then", "fly a"]).await.code, 64);
    })
    .await;
}

#[tokio::test]
async fn changes_are_printed_as_they_happen() {
    on_both("kv-watch", async |shell| {
        let first = shell.json(&["kv", "put", "w/1", "one"]).await["revision"].clone();
        shell.run(&["kv", "put", "w/2", "two"]).await;
        let from = first.to_string();
        let line = [
            "kv", "watch", "w/", "--prefix", "--rev", &from, "--prev", "-o", "json",
        ];
        let line = [&line[..], &["--events", "4"]].concat();
        let watching = shell.begin(&line);
        watching.printed("two").await;
        shell.run(&["kv", "put", "other", "x"]).await;
        shell.run(&["kv", "put", "w/1", "more"]).await;
        shell.run(&["kv", "del", "w/2"]).await;
        let ended = watching.ended().await;
        assert_eq!(ended.code, 0, "{ended:?}");
        let lines = ended.stdout.lines();
        let told: Vec<Value> = lines.map(|l| serde_json::from_str(l).unwrap()).collect();
        let what = |event: &Value| {
            let [kind, key, value] = ["type", "key", "value"].map(|name| event[name].clone());
            json!([kind, key, value, event["previous"]["value"]])
        };
        assert_eq!(
            told.iter().map(what).collect::<Vec<_>>(),
            [
                json!(["put", "w/1", "one", null]),
                json!(["put", "w/2", "two", null]),
                json!(["put", "w/1", "more", "one"]),
                json!(["delete", "w/2", null, "two"]),
            ]
        );
        assert_eq!(told[0]["revision"], first);

        let newest = told[3]["revision"].to_string();
        shell.run(&["kv", "compact", &newest]).await;
        let late = shell
            .run(&["kv", "watch", "w/", "--prefix", "--rev", &from])
            .await;
        assert_eq!(late.code, 1, "{late:?}");
        assert!(
            late.complaint().contains(&format!("--rev {newest}")),
            "{late:?}"
        );
    })
    .await;
}

#[tokio::test]
async fn a_command_runs_for_each_change() {
    on_both("watch-command", async |shell| {
        let script = "printf '%s %s ' $CONCLAVE_EVENT $CONCLAVE_KEY; cat; \
                      echo \" $CONCLAVE_PREV_VALUE ${CONCLAVE_LEASE-none}\"; \
                      while ! [ -e go ]; do sleep 0.02; done";
        let begun = shell.json(&["kv", "put", "c/1", "zero"]).await["revision"].clone();
        let from = (begun.as_i64().unwrap() + 1).to_string();
        let line = [
            "watch", "c/", "--prefix", "--prev", "--rev", &from, "--events", "4", "--",
        ];
        let watching = shell.begin(&[&line[..], &["sh", "-c", script]].concat());
        shell.run(&["kv", "put", "c/1", "one"]).await;
        // All of these while the first command runs.
        watching.printed("put c/1 one zero none").await;
        shell.run(&["kv", "put", "c/1", "two"]).await;
        shell.run(&["kv", "put", "c/2", "x"]).await;
        shell.run(&["kv", "del", "c/1"]).await;
        fs::write(shell.directory.join("go"), "").unwrap();
        let ended = watching.ended().await;
        assert_eq!(ended.code, 0, "{ended:?}");
        let expected = "put c/1 one zero none\nput c/1 two one none\n\
                        put c/2 x  none\ndelete c/1  two none\n";
        assert_eq!(ended.stdout, expected);
        fs::remove_file(shell.directory.join("go")).unwrap();
    })
    .await;
}

#[tokio::test]
async fn the_end_of_a_command_that_watches() {
    on_both("watch-end", async |shell| {
        let revision = shell.json(&["kv", "put", "e", "2"]).await["revision"].to_string();
        let line = [
            "watch",
            "e",
            "--rev",
            &revision,
            "--",
            "sh",
            "-c",
            "echo up; sleep 100",
        ];
        let watching = shell.begin(&line);
        watching.printed("up").await;
        watching.signal(Signal::TERM);
        assert_eq!(watching.ended().await.code, 143);
        let line = ["watch", "e", "--rev", &revision, "--", "./not-there"];
        assert_eq!(shell.run(&line).await.code, 127);
        let line = ["watch", "e", "--rev", &revision, "--fail-fast", "--"];
        let failed = [&line[..], &["sh", "-c", "exit 7"]].concat();
        assert_eq!(shell.run(&failed).await.code, 7);
    })
    .await;
}

#[tokio::test]
async fn leases_are_granted_renewed_and_ended() {
    on_both("lease", async |shell| {
        let granted = shell.json(&["lease", "grant", "30s", "--id", "7f3"]).await;
        assert_eq!(granted, json!({ "lease_id": "7f3", "ttl_ms": 30_000 }));
        assert_eq!(
            shell
                .run(&["lease", "grant", "30s", "--id", "7f3"])
                .await
                .code,
            1
        );
        shell
            .run(&["kv", "put", "l/1", "x", "--lease", "7f3"])
            .await;
        let kept = shell.json(&["kv", "get", "l/1"]).await;
        assert_eq!(kept["kvs"][0]["lease_id"], "7f3");
        let ttl = shell.json(&["lease", "ttl", "7f3", "--keys"]).await;
        assert_eq!(ttl["ttl_ms"], 30_000);
        assert!(ttl["left_ms"].as_u64().unwrap() <= 30_000);
        assert_eq!(ttl["keys"], json!([{ "key": "l/1" }]));
        let list = shell.json(&["lease", "list"]).await;
        let has = |id: &str| {
            list["leases"]
                .as_array()
                .unwrap()
                .contains(&json!({ "lease_id": id }))
        };
        assert!(has("7f3") && !has("7f4"));

        let once = shell.json(&["lease", "keep-alive", "7f3", "--once"]).await;
        assert_eq!(once, granted);
        let keeping = shell.begin(&["lease", "keep-alive", "7f3"]);
        keeping.printed("active").await;
        let short = shell.json(&["lease", "grant", "2s"]).await;
        let short = short["lease_id"].as_str().unwrap().to_owned();
        let keeping_short = shell.begin(&["lease", "keep-alive", &short]);
        keeping_short.printed("active").await;
        assert_eq!(shell.run(&["lease", "revoke", "7f3"]).await.code, 0);
        assert_eq!(shell.run(&["lease", "revoke", "7f3"]).await.code, 1);
        assert_eq!(shell.run(&["kv", "get", "l/1"]).await.code, 1);
        assert_eq!(shell.run(&["lease", "ttl", "7f3"]).await.code, 1);
        assert_eq!(shell.run(&["lease", "keep-alive", "7f3"]).await.code, 1);
        shell.run(&["lease", "revoke", &short]).await;
        let lost = keeping_short.ended().await;
        assert_eq!(lost.code, 75, "{lost:?}");
        assert!(lost.complaint().ends_with("lease_gone"), "{lost:?}");
    })
    .await;
}

#[tokio::test]
async fn kv_watch_ends_when_its_reader_does() {
    let cluster = Cluster::start("reader", 1);
    cluster.leader().await;
    let ends = cluster.directory().join("ends");
    for (endless, change) in [
        ("kv watch k", &["kv", "put", "k", "v"][..]),
        ("elect --observe db", &["elect", "db", "v", "--", "true"]),
    ] {
        let script = format!(
            "{{ {} {endless} --endpoints {}; echo $? > {}; }} | head -n 1",
            env!("CARGO_BIN_EXE_conclave"),
            cluster.endpoints()[0],
            ends.display(),
        );
        let shell = Process::start(
            cluster.directory(),
            Command::new("sh").args(["-c", &script]),
        );
        eventually(endless, || async {
            cluster.run(change).await;
            let code = fs::read_to_string(&ends).ok();
            code.filter(|code| code == "0\n").map(drop)
        })
        .await;
        let ended = shell.ended().await;
        assert_eq!(ended.stdout.lines().count(), 1, "{ended:?}");
        fs::remove_file(&ends).unwrap();
    }
}
