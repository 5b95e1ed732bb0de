//! `etcdctl` of the reference, against both: the same commands print the same.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::Command,
    time::Duration,
};

use rustix::{
    fs::{CWD, Mode, mkfifoat},
    process::Signal,
};
use tokio::time::sleep;

use crate::{
    reference::{Reference, installed, serving},
    support::{Cluster, Directory, Process},
};

/// A line of a script. In arguments `$1` is the first lease id that was printed.
enum Line {
    /// A command that ends by itself, and what it reads.
    Run(&'static str, &'static str),
    /// One that goes on: until it has printed so many lines.
    Until(&'static str, &'static str, usize),
    /// One that goes on until the end of the script, once it has printed a line.
    Begin(&'static str),
}

use Line::{Begin, Run, Until};

const SCRIPTS: &[(&str, &[Line])] = &[
    (
        "put, get, del",
        &[
            Run("put a 1", ""),
            Run("put a 2 --prev-kv", ""),
            Run("put ab 3", ""),
            Run("put b", "from stdin"),
            Run("get a", ""),
            Run("get a -w json", ""),
            Run("get a -w fields", ""),
            Run("get a --hex", ""),
            Run("get a --rev=2", ""),
            Run("get a b", ""),
            Run("get a --prefix", ""),
            Run("get a --prefix --print-value-only", ""),
            Run("get a --from-key --limit=2 -w json", ""),
            Run("get a --from-key --keys-only", ""),
            Run("get a --from-key --keys-only -w json", ""),
            Run("get a --prefix --count-only -w json", ""),
            Run("get a --from-key --order=DESCEND --sort-by=MODIFY", ""),
            Run("get a --from-key --order=ASCEND --sort-by=VALUE", ""),
            Run("get a --consistency=s", ""),
            Run("get nothing", ""),
            Run("get a --rev=1000", ""),
            Run("put a --ignore-value", ""),
            Run("put nothing --ignore-value", ""),
            Run("put a x --lease=1234", ""),
            Run("del nothing", ""),
            Run("del a --prev-kv", ""),
            Run("del a --from-key", ""),
            Run("put c 1", ""),
            Run("put d 1", ""),
            Run("del c --range z", ""),
            Run("del c z", ""),
            Run("compaction 4", ""),
            Run("compaction 4", ""),
            Run("compaction 1000", ""),
            Run("compaction 5 --physical", ""),
            Run("get a --rev=3", ""),
            Run("get a --rev=5", ""),
        ],
    ),
    (
        "txn",
        &[
            Run("put key1 0", ""),
            Run(
                "txn -i",
                "mod(\"key1\") > \"0\"\n\nput key1 \"overwrote\"\nget key1\n\nput key2 \"made\"\n\n",
            ),
            Run(
                "txn",
                "value(\"key1\") = \"nothing\"\n\nget key1\n\nput key1 again\nput key2 also\nget key1 --prefix\n\n",
            ),
            Run(
                "txn",
                "create(\"key9\") = \"0\"\nver(\"key1\") > \"1\"\nlease(\"key1\") = \"0\"\n\ndel key1 --prev-kv\nget key2\n\n\n",
            ),
            Run(
                "txn -w json",
                "create(\"key9\") = \"0\"\n\nput key9 x\n\n\n",
            ),
            Run(
                "txn",
                "create(\"key9\") = \"0\"\n\nput twice 1\nput twice 2\n\n\n",
            ),
        ],
    ),
    (
        "watch",
        &[
            Run("put w 1", ""),
            Run("put w 2", ""),
            Run("put w/x 3", ""),
            Run("del w", ""),
            Until("watch w --rev=2", "", 6),
            Until("watch w --rev=2 --prefix --prev-kv", "", 14),
            Until("watch w x --rev=2 -w json", "", 1),
            Until(
                "watch w --rev=3 -- sh -c 'echo $ETCD_WATCH_EVENT_TYPE $ETCD_WATCH_KEY $ETCD_WATCH_VALUE $ETCD_WATCH_REVISION'",
                "",
                6,
            ),
            Until("watch -i", "watch w --rev=2\n", 6),
            Run("compaction 4", ""),
            Run("watch w --rev=2", ""),
        ],
    ),
    (
        "lease",
        &[
            Run("lease grant 600", ""),
            Run("lease list", ""),
            Run("lease timetolive $1", ""),
            Run("put l/1 x --lease=$1", ""),
            Run("get l/1 -w json", ""),
            // With one key: the reference tells several in any order.
            Run("lease timetolive $1 --keys", ""),
            Run("put l/2 x --lease=$1", ""),
            Run("lease keep-alive --once $1", ""),
            Until("lease keep-alive $1", "", 1),
            Run("lease revoke $1", ""),
            Run("get l/ --prefix", ""),
            Run("lease timetolive $1", ""),
            Run("lease keep-alive --once $1", ""),
            Run("lease revoke $1", ""),
            Run("lease list", ""),
            Run("lease grant 1", ""),
            Run("lease grant 10000000000", ""),
        ],
    ),
    (
        "lock",
        &[
            Run("lock door -- echo held", ""),
            Run(
                "lock door -- sh -c 'echo $ETCD_LOCK_KEY $ETCD_LOCK_REV'",
                "",
            ),
            Run("lock door --ttl=20 -- sh -c 'exit 3'", ""),
            Begin("lock door"),
            Run("get door --prefix --keys-only", ""),
            Run("--command-timeout=1s lock door/inner -- echo another", ""),
        ],
    ),
    (
        "elect",
        &[
            Begin("elect chair first"),
            Run("get chair --prefix", ""),
            Until("elect -l chair", "", 2),
        ],
    ),
    (
        "cluster and maintenance",
        &[
            Run("member list", ""),
            Run("member list -w json", ""),
            Run("put x 1", ""),
            Run("endpoint health", ""),
            Run("endpoint health --cluster", ""),
            Run("endpoint status", ""),
            Run("endpoint status -w json", ""),
            Run("endpoint hashkv", ""),
            Run("endpoint hashkv --cluster -w json", ""),
            Run("alarm list", ""),
            Run("alarm disarm", ""),
            Run("defrag", ""),
            Run("member remove 1234", ""),
            Run("move-leader 1234", ""),
            Run("auth disable", ""),
        ],
    ),
];

/// What differs on purpose, by the beginning of a command: with the reason.
const KNOWN: &[(&str, &str)] = &[(
    "endpoint hashkv --cluster",
    "a fault: a Go client that dials a URL sends it whole as the authority, which the \
     HTTP/2 library refuses",
)];

/// One of the two, and what a script has seen of it.
struct Shell {
    endpoints: Vec<String>,
    directory: Directory,
    leases: Vec<String>,
    background: Vec<Process>,
}

impl Shell {
    fn new(name: &str, endpoints: &[String]) -> Self {
        Self {
            endpoints: endpoints.to_vec(),
            directory: Directory::new(name),
            leases: Vec::new(),
            background: Vec::new(),
        }
    }

    fn command(&self, line: &str, stdin: File) -> Command {
        let mut command = Command::new("etcdctl");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("ETCDCTL") {
                command.env_remove(name);
            }
        }
        let mut line = line.to_owned();
        for (at, lease) in self.leases.iter().enumerate().rev() {
            line = line.replace(&format!("${}", at + 1), lease);
        }
        command
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints.join(",")])
            .args(words(&line))
            .stdin(stdin);
        command
    }

    fn start(&self, line: &str, stdin: &str) -> Process {
        let input = self.directory.path().join("stdin");
        fs::write(&input, stdin).unwrap();
        let input = File::open(input).unwrap();
        Process::start(self.directory.path(), &mut self.command(line, input))
    }

    /// With an input that does not end: both ends of a pipe are the command's.
    fn start_endless(&self, line: &str, stdin: &str) -> Process {
        let path = self.directory.path().join("pipe");
        mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        let mut pipe = File::options().read(true).write(true).open(&path).unwrap();
        fs::remove_file(path).unwrap();
        pipe.write_all(stdin.as_bytes()).unwrap();
        Process::start(self.directory.path(), &mut self.command(line, pipe))
    }

    /// What a line prints, made comparable.
    async fn run(&mut self, line: &Line) -> String {
        let (code, stdout, stderr) = match line {
            Run(line, stdin) => {
                let ended = self.start(line, stdin).ended().await;
                (ended.code, ended.stdout, ended.stderr)
            }
            Until(line, stdin, count) => {
                let process = self.start_endless(line, stdin);
                printed(&process, *count).await;
                process.signal(Signal::KILL);
                let ended = process.ended().await;
                let lines: Vec<_> = ended.stdout.lines().take(*count).collect();
                (0, lines.join("\n"), String::new())
            }
            Begin(line) => {
                let process = self.start_endless(line, "");
                printed(&process, 1).await;
                let stdout = process.stdout();
                self.background.push(process);
                (0, stdout.lines().take(1).collect(), String::new())
            }
        };
        self.note_leases(&stdout);
        let errors = stderr.lines().filter(|line| line.starts_with("Error: "));
        let errors: Vec<_> = errors.collect();
        let told = format!("{code}\n{stdout}\n{}", errors.join("\n"));
        let (Run(command, _) | Until(command, ..) | Begin(command)) = line;
        // Sizes, indexes, hashes, the version: only that they are there.
        let figures = ["endpoint status", "endpoint hashkv"];
        let figures = figures.iter().any(|start| command.starts_with(start));
        let shown = comparable(&told, figures);
        // Members are told in order of their ids, which nobody chose.
        if ["member list", "endpoint "]
            .iter()
            .any(|start| command.starts_with(start))
        {
            let mut parts: Vec<_> = shown.split([',', '\n']).map(str::trim).collect();
            parts.sort_unstable();
            return parts.join("\n");
        }
        shown
    }

    fn note_leases(&mut self, stdout: &str) {
        for line in stdout.lines() {
            if let Some(granted) = line.strip_prefix("lease ")
                && let Some((id, _)) = granted.split_once(" granted")
            {
                self.leases.push(id.to_owned());
            }
        }
    }
}

/// Waits until it has printed so much, unless it never does: what is there is compared.
async fn printed(process: &Process, lines: usize) {
    const TRIES: u32 = 500;
    for _ in 0..TRIES {
        if process.stdout().lines().count() >= lines {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// As a shell splits a line, with single quotes.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (at, part) in line.split('\'').enumerate() {
        if at % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}

/// Ids, times and addresses are each server's own.
fn comparable(text: &str, figures: bool) -> String {
    let mut shown = String::new();
    let mut rest = text;
    while !rest.is_empty() {
        let part = |c: char| c.is_alphanumeric() || c == '.';
        let word: String = rest.chars().take_while(|c| part(*c)).collect();
        if word.is_empty() {
            let other: String = rest.chars().take_while(|c| !part(*c)).collect();
            rest = &rest[other.len()..];
            shown += &other;
            continue;
        }
        rest = &rest[word.len()..];
        shown += match word.find(|c: char| c.is_ascii_digit()) {
            Some(_) if figures => "#",
            None if figures && ["B", "kB", "MB"].contains(&word.as_str()) => "B",
            _ => comparable_word(&word, &shown),
        };
    }
    shown
}

fn comparable_word<'a>(word: &'a str, before: &str) -> &'a str {
    const LONGEST_NUMBER: usize = 9;
    const SHORTEST_ID: usize = 12;
    let digits = word.chars().all(|c| c.is_ascii_digit());
    let hex = word.chars().all(|c| c.is_ascii_hexdigit());
    let number = word.trim_end_matches(|c: char| c.is_alphabetic());
    let unit = &word[number.len()..];
    let is_port_or_time = digits && (word.len() > LONGEST_NUMBER || before.ends_with("127.0.0.1:"));
    let is_id = hex && word.len() >= SHORTEST_ID;
    let is_term = ["\"raft_term\":", "\"RaftTerm\" : "]
        .iter()
        .any(|name| before.ends_with(name));
    if is_port_or_time || is_id || is_term {
        "#"
    } else if ["s", "ms", "µs", "m"].contains(&unit) && number.parse::<f64>().is_ok() {
        "TIME"
    } else {
        word
    }
}

/// The script on both; every line that differs and is not known to.
async fn differences(
    (name, script): &(&str, &[Line]),
    theirs: &[String],
    ours: &[String],
    known: &[(&str, &str)],
) -> Vec<String> {
    for endpoint in theirs.iter().chain(ours) {
        serving(endpoint).await;
    }
    let (mut theirs, mut ours) = (
        Shell::new("etcdctl-theirs", theirs),
        Shell::new("etcdctl-ours", ours),
    );
    let mut differences = Vec::new();
    for line in *script {
        let (theirs, ours) = tokio::join!(theirs.run(line), ours.run(line));
        let (Run(command, _) | Until(command, ..) | Begin(command)) = line;
        let known = known.iter().find(|(start, _)| command.starts_with(start));
        if (theirs == ours) == known.is_some() {
            differences.push(format!(
                "{name}: etcdctl {command}\n--- the reference\n{theirs}\n--- the other\n{ours}\n"
            ));
        }
    }
    differences
}

async fn scripts(size: usize) {
    if !installed() {
        return;
    }
    let mut found = Vec::new();
    for script in SCRIPTS {
        let reference = Reference::start("etcdctl-reference", size);
        let cluster = Cluster::start("etcdctl", size);
        let ours = cluster.endpoints();
        found.extend(differences(script, reference.endpoints(), &ours, KNOWN).await);
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The harness itself.
#[tokio::test]
async fn etcdctl_sees_the_reference_as_itself() {
    if !installed() {
        return;
    }
    for script in SCRIPTS {
        let one = Reference::start("etcdctl-one", 1);
        let other = Reference::start("etcdctl-other", 1);
        let found = differences(script, one.endpoints(), other.endpoints(), &[]).await;
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
    // A server that has another past is found out.
    let one = Reference::start("etcdctl-one", 1);
    let other = Reference::start("etcdctl-other", 1);
    let past: (&str, &[Line]) = ("past", &[Run("put a 1", "")]);
    let [one, other] = [one.endpoints(), other.endpoints()];
    let mut shell = Shell::new("etcdctl-past", other);
    serving(&other[0]).await;
    shell.run(&past.1[0]).await;
    let found = differences(&SCRIPTS[0], one, other, &[]).await;
    assert!(found.len() > 1, "{found:?}");
}

#[tokio::test]
async fn etcdctl_sees_one_server_as_the_reference() {
    scripts(1).await;
}

#[tokio::test]
async fn etcdctl_sees_three_servers_as_the_reference() {
    scripts(3).await;
}

/// What has an output of its own: checked for what it does.
#[tokio::test]
async fn etcdctl_saves_a_snapshot_and_moves_the_leader() {
    if !installed() {
        return;
    }
    let cluster = Cluster::start("etcdctl-moves", 3);
    let leader = cluster.leader().await;
    let shell = Shell::new("etcdctl-moves", &cluster.endpoints());
    let saved = shell.directory.path().join("saved");
    let one = Shell::new("etcdctl-one", &cluster.endpoints()[..1]);
    let line = format!("snapshot save {}", saved.display());
    let ended = one.start(&line, "").ended().await;
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(size(&saved) > 0, "an empty snapshot");

    let listed = shell.start("member list", "").ended().await.stdout;
    let follower = format!("n{}", (leader + 1) % 3);
    let member = listed
        .lines()
        .find(|line| line.contains(&follower))
        .unwrap();
    let id = member.split(',').next().unwrap();
    let ended = shell.start(&format!("move-leader {id}"), "").ended().await;
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(cluster.leader().await, (leader + 1) % 3);
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |data| data.len())
}
