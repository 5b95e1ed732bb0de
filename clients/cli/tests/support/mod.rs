//! Real servers for tests of the binary: processes, sockets, files.

use std::{
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use conclave_client::{Client, Session, SessionOptions};
use tokio::time::sleep;

/// Nothing here takes as long; it is what a test waits before it gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A new directory that goes with this value, unless the test failed.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let unique = format!("conclave-{name}-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(unique);
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

/// Servers named n0, n1, ... Killed when this value goes.
pub struct Cluster {
    directory: Directory,
    ports: Vec<(u16, u16)>,
    servers: Vec<Option<Child>>,
}

impl Cluster {
    /// Starts `size` servers; does not wait for them.
    pub fn start(name: &str, size: usize) -> Self {
        let directory = Directory::new(name);
        let ports = free_ports(2 * size)
            .chunks(2)
            .map(|pair| (pair[0], pair[1]))
            .collect();
        let mut cluster = Self {
            directory,
            ports,
            servers: (0..size).map(|_| None).collect(),
        };
        for node in 0..size {
            cluster.spawn(node);
        }
        cluster
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.ports
            .iter()
            .map(|(client, _)| format!("127.0.0.1:{client}"))
            .collect()
    }

    /// The command that starts a server.
    pub fn command(&self, node: usize) -> Command {
        let (client, peer) = self.ports[node];
        let members = self.ports.iter().enumerate();
        let initial: Vec<_> = members
            .map(|(n, (_, peer))| format!("n{n}=http://127.0.0.1:{peer}"))
            .collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_conclave"));
        command
            .arg("serve")
            .args(["--name", &format!("n{node}")])
            .args(["--data-dir", &self.data_dir(node).to_string_lossy()])
            .args([
                "--listen-client-urls",
                &format!("http://127.0.0.1:{client}"),
            ])
            .args([
                "--advertise-client-urls",
                &format!("http://127.0.0.1:{client}"),
            ])
            .args(["--listen-peer-urls", &format!("http://127.0.0.1:{peer}")])
            .args([
                "--initial-advertise-peer-urls",
                &format!("http://127.0.0.1:{peer}"),
            ])
            .args(["--initial-cluster", &initial.join(",")])
            .stdin(Stdio::null());
        command
    }

    pub fn data_dir(&self, node: usize) -> PathBuf {
        self.directory().join(format!("n{node}.conclave"))
    }

    pub fn log_file(&self, node: usize) -> PathBuf {
        self.directory().join(format!("n{node}.log"))
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

    pub fn client(&self) -> Client {
        Client::connect(self.endpoints()).unwrap()
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
        eventually("one leader", || async {
            let running = (0..self.servers.len()).filter(|node| self.servers[*node].is_some());
            let mut leaders = Vec::new();
            for node in running {
                let client = Client::connect([&self.endpoints()[node]]).unwrap();
                let status = client.status().await.remove(0).status.ok()?;
                let header = status.header?;
                let leads = header.leader_id == header.member_id;
                leaders.push((header.leader_id, leads.then_some(node)));
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

/// Ports that nobody uses now.
fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<_> = (0..count)
        .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    listeners
        .iter()
        .map(|listener| listener.local_addr().unwrap().port())
        .collect()
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
        sleep(Duration::from_millis(50)).await;
    }
}
