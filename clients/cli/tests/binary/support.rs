//! Real servers and commands for tests of the binary: processes, sockets, files.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    net::TcpListener,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU16, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use conclave_client::{Client, Session, SessionOptions};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::time::sleep;

/// Nothing here takes as long; it is what a test waits before it gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// How often it looks meanwhile.
const PAUSE: Duration = Duration::from_millis(20);

/// A new directory that goes with this value, unless the test failed.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("conclave-{name}-{}-{count}", std::process::id());
        let path = env::temp_dir().join(unique);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            fs::remove_dir_all(&self.0).ok();
        }
    }
}

/// The binary, with nothing of this environment that it would listen to.
pub fn conclave() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_conclave"));
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CONCLAVE_") || name.starts_with("ETCD_") {
            command.env_remove(&*name);
        }
    }
    // The commands that it runs may call it by its name.
    let own = Path::new(env!("CARGO_BIN_EXE_conclave")).parent().unwrap();
    let path = env::var_os("PATH").unwrap_or_default();
    let path = [own.to_owned()].into_iter().chain(env::split_paths(&path));
    command
        .env("PATH", env::join_paths(path).unwrap())
        .stdin(Stdio::null());
    command
}

/// How a process ended.
#[derive(Debug)]
pub struct Ended {
    /// As a shell has it: 128+n for signal n.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// The JSON of a command that succeeded.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// The one line that tells people why it failed.
    pub fn complaint(&self) -> &str {
        let lines = self.stderr.lines();
        let told: Vec<&str> = lines.filter_map(|l| l.strip_prefix("conclave: ")).collect();
        assert_eq!(told.len(), 1, "{self:?}");
        assert!(self.stderr.trim_end().ends_with(told[0]), "{self:?}");
        told[0]
    }
}

/// A process that is killed when this value goes. What it prints goes to files.
pub struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    pub fn start(directory: &Path, command: &mut Command) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let stdout = directory.join(format!("{count}.stdout"));
        let stderr = directory.join(format!("{count}.stderr"));
        let child = command
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        Self {
            child,
            stdout,
            stderr,
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(pid(&self.child), signal).unwrap();
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap()
    }

    /// What it has told people so far.
    pub fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits until it has printed this.
    pub async fn printed(&self, text: &str) {
        eventually(text, || async {
            self.stdout().contains(text).then_some(())
        })
        .await;
    }

    /// Waits until it has ended.
    pub async fn ended(mut self) -> Ended {
        let status = ended(&mut self.child).await;
        Ended {
            code: status,
            stdout: fs::read_to_string(&self.stdout).unwrap(),
            stderr: fs::read_to_string(&self.stderr).unwrap(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().unwrap()).unwrap()
}

async fn ended(child: &mut Child) -> i32 {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap());
        }
        assert!(Instant::now() < until, "gave up waiting for an exit");
        sleep(PAUSE).await;
    }
}

/// Whether a process runs; one that only waits to be reaped does not.
pub fn runs(id: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    let state = stat
        .rsplit(") ")
        .next()
        .and_then(|rest| rest.chars().next());
    !stat.is_empty() && state != Some('Z')
}

/// Which processes have this in their command line.
pub fn running(text: &str) -> Vec<u32> {
    fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|id| {
            let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            runs(*id) && String::from_utf8_lossy(&line).contains(text)
        })
        .collect()
}

/// Servers named n0, n1, ... Killed when this value goes.
pub struct Cluster {
    directory: Directory,
    ports: Vec<(u16, u16)>,
    servers: Vec<Option<Child>>,
    environment: Environment,
}

/// What a server finds in its environment: its number, and what is added.
type Environment = Box<dyn Fn(usize, &mut Command)>;

impl Cluster {
    /// Starts `size` servers; does not wait for them.
    pub fn start(name: &str, size: usize) -> Self {
        let directory = Directory::new(name);
        Self::start_in(directory, size, Box::new(|_, _| ()))
    }

    /// The same with more flags.
    pub fn start_with(name: &str, size: usize, flags: &'static [&'static str]) -> Self {
        let directory = Directory::new(name);
        let environment = move |_, command: &mut Command| {
            command.args(flags);
        };
        Self::start_in(directory, size, Box::new(environment))
    }

    /// The same in a given directory, with a changed environment.
    pub fn start_in(directory: Directory, size: usize, environment: Environment) -> Self {
        let ports = free_ports(2 * size)
            .chunks(2)
            .map(|pair| (pair[0], pair[1]))
            .collect();
        let mut cluster = Self {
            directory,
            ports,
            servers: (0..size).map(|_| None).collect(),
            environment,
        };
        for node in 0..size {
            cluster.spawn(node);
        }
        cluster
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn own_directory(&self) -> &Directory {
        &self.directory
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.ports
            .iter()
            .map(|(client, _)| format!("127.0.0.1:{client}"))
            .collect()
    }

    /// Of a server: for clients, and for other servers.
    pub fn ports(&self, node: usize) -> (u16, u16) {
        self.ports[node]
    }

    pub fn initial_cluster(&self) -> String {
        let members = self.ports.iter().enumerate();
        let members: Vec<_> = members
            .map(|(n, (_, peer))| format!("n{n}=http://127.0.0.1:{peer}"))
            .collect();
        members.join(",")
    }

    /// The command that starts a server.
    pub fn command(&self, node: usize) -> Command {
        let (client, peer) = self.ports[node];
        let (client, peer) = (
            format!("http://127.0.0.1:{client}"),
            format!("http://127.0.0.1:{peer}"),
        );
        let mut command = conclave();
        command
            .arg("serve")
            .args(["--name", &format!("n{node}")])
            .args(["--data-dir", &self.data_dir(node).to_string_lossy()])
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &self.initial_cluster()]);
        (self.environment)(node, &mut command);
        command
    }

    pub fn data_dir(&self, node: usize) -> PathBuf {
        self.directory().join(format!("n{node}.conclave"))
    }

    pub fn log_file(&self, node: usize) -> PathBuf {
        self.directory().join(format!("n{node}.log"))
    }

    /// What a server has logged in all its lives.
    pub fn log(&self, node: usize) -> String {
        fs::read_to_string(self.log_file(node)).unwrap()
    }

    pub fn spawn(&mut self, node: usize) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file(node))
            .unwrap();
        let mut command = self.command(node);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let before = self.servers[node].replace(command.spawn().unwrap());
        assert!(before.is_none(), "n{node} runs already");
    }

    /// kill -9.
    pub fn kill(&mut self, node: usize) {
        let mut server = self.servers[node].take().expect("it runs");
        server.kill().unwrap();
        server.wait().unwrap();
    }

    /// Asks a server to stop, and waits until it has.
    pub async fn stop(&mut self, node: usize) -> i32 {
        let server = self.servers[node].as_ref().expect("it runs");
        kill_process(pid(server), Signal::TERM).unwrap();
        self.ended(node).await
    }

    /// Waits until a server has ended by itself.
    pub async fn ended(&mut self, node: usize) -> i32 {
        let mut server = self.servers[node].take().expect("it runs");
        ended(&mut server).await
    }

    pub fn is_running(&mut self, node: usize) -> bool {
        let server = self.servers[node].as_mut();
        server.is_some_and(|server| server.try_wait().unwrap().is_none())
    }

    pub fn client(&self) -> Client {
        Client::connect(self.endpoints()).unwrap()
    }

    /// The binary as a client of this cluster.
    pub fn conclave<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = conclave();
        command
            .args(arguments)
            .env("CONCLAVE_ENDPOINTS", self.endpoints().join(","));
        command
    }

    /// A command that goes on while the test does.
    pub fn begin<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Process {
        Process::start(self.directory(), &mut self.conclave(arguments))
    }

    /// A command from its start to its end.
    pub async fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ended {
        self.begin(arguments).ended().await
    }

    /// The lock as `conclave locks` shows it.
    pub async fn lock(&self, name: &str) -> Value {
        let listed = self.run(["locks", name, "-o", "json"]).await.json();
        listed["locks"][0].clone()
    }

    /// Waits until so many wait for the lock.
    pub async fn waiters(&self, name: &str, count: usize) {
        eventually("waiters", || async {
            let waiters = self.lock(name).await["waiters_total"].as_u64();
            (waiters == Some(count as u64)).then_some(())
        })
        .await;
    }

    /// A session, once the cluster serves.
    pub async fn session(&self, client: &Client, ttl: Duration) -> Session {
        let options = SessionOptions {
            ttl,
            ..SessionOptions::default()
        };
        eventually("a session", || async {
            client.session(options.clone()).await.ok()
        })
        .await
    }

    /// Which server leads, once all that run agree on one that runs.
    pub async fn leader(&self) -> usize {
        let running = (0..self.servers.len()).filter(|node| self.servers[*node].is_some());
        self.leader_of(&running.collect::<Vec<_>>()).await
    }

    /// Which of these servers leads, once all of them agree.
    pub async fn leader_of(&self, nodes: &[usize]) -> usize {
        eventually("one leader", || async {
            let mut leaders = Vec::new();
            for node in nodes {
                let client = Client::connect([&self.endpoints()[*node]]).unwrap();
                let status = client.status().await.remove(0).status.ok()?;
                let header = status.header?;
                let leads = header.leader_id == header.member_id;
                leaders.push((header.leader_id, leads.then_some(*node)));
            }
            let (id, _) = leaders.first().copied()?;
            let agreed = id != 0 && leaders.iter().all(|(other, _)| *other == id);
            agreed.then(|| leaders.iter().find_map(|(_, node)| *node))?
        })
        .await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for server in self.servers.iter_mut().flatten() {
            server.kill().ok();
            server.wait().ok();
        }
    }
}

/// Ports that nobody uses now, and that are given out once. They lie below those
/// that the system takes for outgoing connections.
pub fn free_ports(count: usize) -> Vec<u16> {
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test runs beside this one begin elsewhere.
    let start = std::process::id().wrapping_mul(97) % u32::from(COUNT);
    let candidates = std::iter::from_fn(|| {
        let next = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        Some(FIRST + u16::try_from((start + next) % u32::from(COUNT)).unwrap())
    });
    candidates
        .filter(|port| is_free(*port))
        .take(count)
        .collect()
}

pub fn is_free(port: u16) -> bool {
    TcpListener::bind(("127.0.0.1", port)).is_ok()
}

/// Tries until there is something.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(Instant::now() < until, "gave up waiting for {what}");
        sleep(PAUSE).await;
    }
}
