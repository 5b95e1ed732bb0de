//! Every file of a data directory, damaged in every way in turn: a start is refused
//! with a message that says what to do, or everything that was acknowledged is there.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use conclave_proto::v1::{
    AcquireRequest, CloseSessionRequest, OpenSessionRequest, lock_client::LockClient,
    session_client::SessionClient,
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::transport::{Channel, Endpoint};

use crate::support::{Cluster, Directory, PATIENCE, eventually};

/// Set, every case is tried; else one of each kind for each file of the log, and a
/// third of those for all other files. With `--nocapture` the table is printed.
const ALL: &str = "CONCLAVE_DAMAGE";
/// No checkpoint because of so many entries.
const NEVER: u64 = 1 << 40;
const METADATA_BYTES: usize = 4_000;
/// More than a segment of the log holds, in sessions.
const BULK: usize = 4_400;

/// The only server of a cluster, with a number of entries between checkpoints that
/// changes from one life to the next.
struct Server {
    cluster: Cluster,
    snapshot_count: Arc<AtomicU64>,
    held: AtomicU64,
}

/// Sessions, and locks with their tokens.
type Acknowledged = (BTreeSet<i64>, BTreeMap<String, u64>);

impl Server {
    fn new(snapshot_count: u64) -> Self {
        let count = Arc::new(AtomicU64::new(snapshot_count));
        let snapshot_count = Arc::clone(&count);
        let environment = move |_, command: &mut Command| {
            let count = count.load(Ordering::Relaxed).to_string();
            command.args(["--snapshot-count", &count]);
        };
        let directory = Directory::new("damage");
        Self {
            cluster: Cluster::start_in(directory, 1, Box::new(environment)),
            snapshot_count,
            held: AtomicU64::new(0),
        }
    }

    async fn restart(&mut self, snapshot_count: u64) {
        assert_eq!(self.cluster.stop(0).await, 0);
        self.start(snapshot_count);
        self.cluster.leader().await;
    }

    fn start(&mut self, snapshot_count: u64) {
        self.snapshot_count.store(snapshot_count, Ordering::Relaxed);
        self.cluster.spawn(0);
    }

    async fn channel(&self) -> Channel {
        let endpoint = format!("http://{}", self.cluster.endpoints()[0]);
        let endpoint = Endpoint::from_shared(endpoint).unwrap();
        eventually("a connection", || async { endpoint.connect().await.ok() }).await
    }

    /// Fills more than a segment of the log, and leaves nothing in the state.
    async fn fill_a_segment(&self) {
        let channel = self.channel().await;
        let mut tasks = JoinSet::new();
        for _ in 0..64 {
            let mut sessions = SessionClient::new(channel.clone());
            tasks.spawn(async move {
                for _ in 0..BULK.div_ceil(64) {
                    let value = "m".repeat(METADATA_BYTES);
                    let request = OpenSessionRequest {
                        ttl_ms: 600_000,
                        metadata: [("m".to_owned(), value)].into(),
                        ..OpenSessionRequest::default()
                    };
                    let opened = sessions.open(request).await.unwrap().into_inner();
                    let request = CloseSessionRequest {
                        session_id: opened.session_id,
                        attachment: 0,
                    };
                    sessions.close(request).await.unwrap();
                }
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
    }

    /// So many sessions, which outlive the test, each with a lock.
    async fn hold(&self, count: usize) {
        let channel = self.channel().await;
        for _ in 0..count {
            let number = self.held.fetch_add(1, Ordering::Relaxed);
            let request = OpenSessionRequest {
                ttl_ms: 12 * 60 * 60 * 1_000,
                ..OpenSessionRequest::default()
            };
            let opened = SessionClient::new(channel.clone()).open(request).await;
            let request = AcquireRequest {
                name: format!("held/{number}"),
                session_id: opened.unwrap().into_inner().session_id,
                ..AcquireRequest::default()
            };
            let acquired = LockClient::new(channel.clone()).acquire(request).await;
            acquired.unwrap();
        }
    }

    /// What is there now, if the server serves.
    async fn acknowledged(&self) -> Option<Acknowledged> {
        let client = self.cluster.client();
        let sessions = client.sessions().await.ok()?;
        let locks = client.locks().await.ok()?;
        let held = locks.into_iter().filter_map(|lock| {
            let token = lock.holder?.token;
            Some((lock.name, token))
        });
        let sessions = sessions.into_iter().map(|session| session.session_id);
        Some((sessions.collect(), held.collect()))
    }

    fn checkpoints(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cluster.data_dir(0).join("checkpoints"));
        let mut paths: Vec<_> = entries
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| !path.ends_with("unfinished"))
            .collect();
        paths.sort();
        paths
    }

    /// Waits until nothing of the log is unattested, and kills the server then.
    async fn kill_when_idle(&mut self) {
        eventually("an idle server", || async {
            self.acknowledged().await.map(drop)
        })
        .await;
        // A mark follows what was written after 50 ms.
        sleep(Duration::from_millis(500)).await;
        self.cluster.kill(0);
    }
}

/// Makes a directory with two segments, of which the first is not the first of all,
/// and two checkpoints, the older one in the older segment. Gives also what its
/// files were earlier.
async fn directory() -> (Server, Files) {
    let mut server = Server::new(50);
    server.cluster.leader().await;
    server.fill_a_segment().await;
    // Twice as many as are needed for two checkpoints in the second segment.
    server.hold(60).await;
    eventually("a log that is cut", || async {
        let first = server
            .cluster
            .data_dir(0)
            .join("log/log-00000000000000000001");
        server.hold(1).await;
        (!first.exists()).then_some(())
    })
    .await;
    server.restart(NEVER).await;
    let mut earlier = Files::below(&server.cluster.data_dir(0));
    server.fill_a_segment().await;
    server.hold(2).await;
    assert_eq!(server.cluster.stop(0).await, 0);
    earlier.add_new(Files::below(&server.cluster.data_dir(0)));
    let before = server.checkpoints();
    server.start(100);
    eventually("a newer checkpoint", || async {
        server.hold(1).await;
        (server.checkpoints().last() != before.last()).then_some(())
    })
    .await;
    server.restart(NEVER).await;
    server.hold(3).await;
    (server, earlier)
}

/// The files below a directory, by their names below it. What is zero at the end of
/// one is not kept.
#[derive(Clone)]
struct Files(BTreeMap<PathBuf, (Vec<u8>, u64)>);

impl Files {
    fn below(directory: &Path) -> Self {
        let mut files = BTreeMap::new();
        let mut directories = vec![directory.to_owned()];
        while let Some(path) = directories.pop() {
            for entry in fs::read_dir(path).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                    continue;
                }
                let mut bytes = fs::read(&path).unwrap();
                let length = bytes.len() as u64;
                let used = bytes.iter().rposition(|byte| *byte != 0);
                bytes.truncate(used.map_or(0, |last| last + 1));
                let name = path.strip_prefix(directory).unwrap().to_owned();
                files.insert(name, (bytes, length));
            }
        }
        Self(files)
    }

    /// Adds those of which there is none.
    fn add_new(&mut self, others: Self) {
        for (name, file) in others.0 {
            self.0.entry(name).or_insert(file);
        }
    }

    /// Of what is in a checkpoint, which is written once, the older copy is that of
    /// the other one.
    fn add_other_checkpoints(&mut self, whole: &Self) {
        let inside = |name: &Path| name.iter().skip(2).collect::<PathBuf>();
        for name in whole
            .0
            .keys()
            .filter(|name| name.starts_with("checkpoints"))
        {
            let other = whole.0.iter().find(|(other, _)| {
                *other != name && inside(other) == inside(name) && !is_segment(other)
            });
            self.0
                .extend(other.map(|(_, file)| (name.clone(), file.clone())));
        }
    }

    /// Puts a directory back as it was.
    fn restore(&self, directory: &Path) {
        fs::remove_dir_all(directory).ok();
        for (name, (bytes, length)) in &self.0 {
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            write(&path, bytes, *length);
        }
    }
}

fn write(path: &Path, bytes: &[u8], length: u64) {
    fs::write(path, bytes).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(length).unwrap();
}

/// What is done to a file.
#[derive(Clone, Debug)]
enum Damage {
    Flipped(u64),
    Cut(u64),
    Zeroed,
    Empty,
    Missing,
    Older(Vec<u8>, u64),
}

impl Damage {
    fn kind(&self) -> &'static str {
        match self {
            Self::Flipped(_) => "a bit flipped",
            Self::Cut(_) => "cut",
            Self::Zeroed => "zeroed",
            Self::Empty => "empty",
            Self::Missing => "missing",
            Self::Older(..) => "an older copy",
        }
    }

    /// All that are tried on a file.
    fn all(bytes: &[u8], length: u64, older: Option<&(Vec<u8>, u64)>) -> Vec<Self> {
        let used = bytes.len() as u64;
        let mut flips: BTreeSet<u64> = (0..16).map(|n| used * n / 16).collect();
        // The last record, and the zeros behind it.
        flips.extend([60, used.saturating_sub(1), used + 100]);
        let mut cuts: BTreeSet<u64> = (1..8).map(|n| used * n / 8).collect();
        cuts.extend([used.saturating_sub(1), used, length.saturating_sub(1)]);
        // Where the log's files grow.
        cuts.insert((used / 2) >> 20 << 20);
        let flips = flips.into_iter().filter(|at| *at < length);
        let cuts = cuts.into_iter().filter(|at| (1..length).contains(at));
        let mut all: Vec<_> = flips
            .map(Self::Flipped)
            .chain(cuts.map(Self::Cut))
            .collect();
        all.push(Self::Missing);
        if length > 0 {
            all.extend([Self::Zeroed, Self::Empty]);
        }
        if let Some((older, length)) = older
            && older != bytes
        {
            all.push(Self::Older(older.clone(), *length));
        }
        all
    }

    fn apply(&self, path: &Path) {
        let length = fs::metadata(path).unwrap().len();
        let change = |to: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = fs::read(path).unwrap();
            to(&mut bytes);
            fs::write(path, bytes).unwrap();
        };
        match self {
            Self::Flipped(at) => change(&|bytes| bytes[*at as usize] ^= 1 << (at % 8)),
            Self::Cut(at) => change(&|bytes| bytes.truncate(*at as usize)),
            Self::Zeroed => write(path, &[], length),
            Self::Empty => write(path, &[], 0),
            Self::Missing if path.is_dir() => fs::remove_dir_all(path).unwrap(),
            Self::Missing => fs::remove_file(path).unwrap(),
            Self::Older(bytes, length) => write(path, bytes, *length),
        }
    }
}

/// What came of a start.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// It serves with all that was acknowledged; the damage is of no consequence.
    Unharmed,
    /// The same, but something was done without.
    Survived,
    /// It ended, and said what to do.
    Refused,
    /// It serves, without something that was acknowledged.
    Lost,
}

impl Outcome {
    fn shown(&self) -> &'static str {
        match self {
            Self::Unharmed => "unharmed",
            Self::Survived => "survived",
            Self::Refused => "refused",
            Self::Lost => "LOST",
        }
    }
}

impl Server {
    /// What comes of a start from what is there.
    async fn outcome(&mut self, expected: &Acknowledged) -> Outcome {
        let path = self.cluster.data_dir(0);
        let checked = self
            .cluster
            .run(["check-data", path.to_str().unwrap()])
            .await;
        let log = self.cluster.log_file(0);
        fs::remove_file(&log).unwrap();
        self.start(NEVER);
        let serves = async {
            loop {
                if !self.cluster.is_running(0) {
                    return None;
                }
                // A client would try for long to connect.
                if TcpStream::connect(&self.cluster.endpoints()[0]).is_ok()
                    && let Some(found) = self.acknowledged().await
                {
                    return Some(found);
                }
                sleep(Duration::from_millis(10)).await;
            }
        };
        let serves = timeout(PATIENCE, serves).await;
        match serves.expect("it serves or ends") {
            Some(found) => {
                self.cluster.kill(0);
                match checked.code {
                    _ if found != *expected => Outcome::Lost,
                    0 => Outcome::Unharmed,
                    2 => Outcome::Survived,
                    _ => panic!("serves, but {checked:?}"),
                }
            }
            None => {
                let code = self.cluster.ended(0).await;
                let said = self.cluster.log(0);
                let last = said.lines().last().unwrap_or_default();
                assert!(last.starts_with("conclave: "), "{code}: {last}");
                assert!(last.contains("restore"), "{last}");
                assert_eq!((code, checked.code), (1, 1), "{last}; {checked:?}");
                Outcome::Refused
            }
        }
    }
}

/// What is shown of a file: those of different checkpoints count as one.
fn class(name: &Path) -> String {
    let text = name.to_str().unwrap();
    match name.strip_prefix("checkpoints") {
        Ok(below) => {
            let inside = below.iter().skip(1).collect::<PathBuf>();
            match (below == Path::new(""), inside == Path::new("")) {
                (true, _) => text.to_owned(),
                (_, true) => "a checkpoint".to_owned(),
                _ => format!("a checkpoint's `{}`", inside.display()),
            }
        }
        Err(_) => text.to_owned(),
    }
}

/// The cases of a run: files and directories below the one of data, and what is done
/// to them.
fn cases(whole: &Files, earlier: &Files) -> Vec<(PathBuf, Damage)> {
    let is_all = std::env::var_os(ALL).is_some();
    let mut cases = Vec::new();
    let mut directories = BTreeSet::new();
    for (place, (name, (bytes, length))) in whole.0.iter().enumerate() {
        let below: Vec<_> = name.ancestors().skip(1).collect();
        // Not the whole, and not what lies inside a checkpoint.
        let parents = below.iter().rev().skip(1).take(2);
        directories.extend(parents.map(|path| path.to_path_buf()));
        let mut kinds = BTreeMap::<_, Vec<_>>::new();
        for damage in Damage::all(bytes, *length, earlier.0.get(name)) {
            kinds.entry(damage.kind()).or_default().push(damage);
        }
        for (number, (_, damages)) in kinds.into_iter().enumerate() {
            let count = damages.len();
            let is_of_log = name.starts_with("log");
            let chosen = damages.into_iter().enumerate().filter(|(case, _)| {
                is_all || (*case == count / 2 && (is_of_log || (place + number) % 3 == 0))
            });
            cases.extend(chosen.map(|(_, damage)| (name.clone(), damage)));
        }
    }
    cases.extend(directories.into_iter().map(|name| (name, Damage::Missing)));
    cases
}

#[tokio::test]
#[expect(clippy::print_stderr, reason = "the table is what it is for")]
async fn no_damage_loses_what_was_acknowledged() {
    let (mut server, mut earlier) = directory().await;
    let expected = server.acknowledged().await.unwrap();
    server.kill_when_idle().await;
    let path = server.cluster.data_dir(0);
    let whole = Files::below(&path);
    let segments: Vec<_> = whole.0.keys().filter(|name| is_segment(name)).collect();
    let [_, newest] = segments[..] else {
        panic!("not two segments: {segments:?}");
    };
    earlier.add_other_checkpoints(&whole);
    assert_eq!(server.outcome(&expected).await, Outcome::Unharmed);

    let mut table = BTreeMap::<_, BTreeSet<_>>::new();
    let mut lost = Vec::new();
    let cases = cases(&whole, &earlier);
    for (name, damage) in &cases {
        whole.restore(&path);
        damage.apply(&path.join(name));
        let outcome = server.outcome(&expected).await;
        let shown = match name {
            name if name == newest => "the newest segment".to_owned(),
            name if is_segment(name) => "an older segment".to_owned(),
            name => class(name),
        };
        // An older copy is a log that ends earlier, and nobody can tell.
        let is_known = name == newest && matches!(damage, Damage::Older(..));
        if outcome == Outcome::Lost && !is_known {
            lost.push((name, damage.clone()));
        }
        let row = table.entry((shown, damage.kind())).or_default();
        row.insert(outcome);
    }
    eprintln!("{} cases", cases.len());
    for ((file, kind), outcomes) in table {
        let outcomes: Vec<_> = outcomes.iter().map(Outcome::shown).collect();
        eprintln!("| {file} | {kind} | {} |", outcomes.join(", "));
    }
    assert!(lost.is_empty(), "of {} cases: {lost:#?}", cases.len());
}

fn is_segment(name: &Path) -> bool {
    name.to_string_lossy().starts_with("log/log-")
}
