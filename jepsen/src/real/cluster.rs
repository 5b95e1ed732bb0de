//! The servers: processes of the built binary, each behind its proxies.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, TcpListener},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use conclave_client::{Client, StatusResponse};
use rustix::{
    io::Errno,
    process::{Pid, Signal, kill_process},
};
use tokio::time::{Instant, sleep};

use super::{proxy::Network, shim::Shim};
use crate::checkers::{STAYS_UP, Verdict, broken};

/// How often a process is looked at that should end.
const LOOK: Duration = Duration::from_millis(20);
/// Nothing here takes as long.
const PATIENCE: Duration = Duration::from_secs(30);

/// See the module. Dropped, it kills what runs.
#[derive(Debug)]
pub(crate) struct Cluster {
    binary: PathBuf,
    directory: PathBuf,
    servers: Vec<Server>,
    network: Arc<Network>,
    initial_cluster: String,
}

#[derive(Debug)]
struct Server {
    child: Option<Child>,
    ports: Ports,
    shim: Option<Shim>,
}

/// Where a server listens, and where it is found.
#[derive(Clone, Copy, Debug)]
struct Ports {
    clients: u16,
    peers: u16,
    proxied_clients: u16,
    proxied_peers: u16,
}

impl Cluster {
    /// Prepares so many servers; none runs yet. With a library, it is put before
    /// each.
    pub(crate) async fn new(
        binary: PathBuf,
        directory: &Path,
        nodes: usize,
        library: Option<&Path>,
    ) -> io::Result<Self> {
        let network = Network::new(nodes);
        let mut servers = Vec::new();
        for node in 0..nodes {
            let (clients, peers) = (free_port()?, free_port()?);
            let ports = Ports {
                clients,
                peers,
                proxied_clients: network.stand_before_clients(node, clients).await?,
                proxied_peers: network.stand_before_peers(node, peers).await?,
            };
            let control = directory.join(format!("{}.shim", name(node)));
            let shim = library.map(|library| Shim::new(library, control));
            servers.push(Server {
                child: None,
                ports,
                shim: shim.transpose()?,
            });
        }
        let members = servers.iter().enumerate();
        let members: Vec<String> = members
            .map(|(node, server)| format!("{}={}", name(node), url(server.ports.proxied_peers)))
            .collect();
        Ok(Self {
            binary,
            directory: directory.to_owned(),
            servers,
            network,
            initial_cluster: members.join(","),
        })
    }

    /// How many servers there are.
    pub(crate) fn size(&self) -> usize {
        self.servers.len()
    }

    /// The links between them, and to them.
    pub(crate) fn network(&self) -> &Arc<Network> {
        &self.network
    }

    /// Where clients find the servers.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        let ports = self.servers.iter().map(|server| server.ports);
        ports
            .map(|ports| format!("127.0.0.1:{}", ports.proxied_clients))
            .collect()
    }

    /// Who knows which server leads.
    pub(crate) fn observer(&self) -> Observer {
        let ports = self.servers.iter().map(|server| server.ports.clients);
        Observer {
            endpoints: ports.map(|port| format!("127.0.0.1:{port}")).collect(),
        }
    }

    /// What stands before a server, if there is a C compiler.
    pub(crate) fn shim(&mut self, node: usize) -> Option<&mut Shim> {
        self.servers[node].shim.as_mut()
    }

    /// Starts a server that does not run.
    pub(crate) fn start(&mut self, node: usize) -> io::Result<()> {
        if self.servers[node].child.is_some() {
            return Ok(());
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.join(format!("{}.log", name(node))))?;
        let mut command = self.command(node);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn()?;
        self.network.is_process(node, Some(child.id()));
        self.servers[node].child = Some(child);
        Ok(())
    }

    fn command(&self, node: usize) -> Command {
        let Server { ports, shim, .. } = &self.servers[node];
        let mut command = Command::new(&self.binary);
        for (variable, _) in std::env::vars_os() {
            let variable = variable.to_string_lossy();
            if variable.starts_with("CONCLAVE_") || variable.starts_with("ETCD_") {
                command.env_remove(&*variable);
            }
        }
        if let Some(shim) = shim {
            shim.preload(&mut command);
        }
        let data = self.directory.join(format!("{}.conclave", name(node)));
        command
            .arg("serve")
            .args(["--name", &name(node)])
            .arg("--data-dir")
            .arg(data)
            .args(["--listen-client-urls", &url(ports.clients)])
            .args(["--advertise-client-urls", &url(ports.proxied_clients)])
            .args(["--listen-peer-urls", &url(ports.peers)])
            .args(["--initial-advertise-peer-urls", &url(ports.proxied_peers)])
            .args(["--initial-cluster", &self.initial_cluster]);
        command
    }

    /// kill -9. Whether it ran.
    pub(crate) fn kill(&mut self, node: usize) -> io::Result<bool> {
        let Some(mut child) = self.servers[node].child.take() else {
            return Ok(false);
        };
        self.network.is_process(node, None);
        child.kill()?;
        child.wait()?;
        Ok(true)
    }

    /// Asks a server to stop, and waits until it has. Whether it did as asked.
    pub(crate) async fn stop(&mut self, node: usize) -> io::Result<bool> {
        self.signal(node, Signal::TERM)?;
        let code = self.ended(node, PATIENCE).await?;
        Ok(code == Some(0))
    }

    /// Sends a signal to a server that runs. One that ended by itself is for
    /// [`Cluster::all_run`] to find.
    pub(crate) fn signal(&self, node: usize, signal: Signal) -> io::Result<()> {
        let Some(child) = &self.servers[node].child else {
            return Ok(());
        };
        match kill_process(pid(child)?, signal) {
            Err(Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }

    /// Waits for the end of a server; its exit code, 128+n after signal n; none
    /// if it goes on.
    pub(crate) async fn ended(
        &mut self,
        node: usize,
        patience: Duration,
    ) -> io::Result<Option<i32>> {
        let until = Instant::now() + patience;
        loop {
            if let Some(code) = self.exit_code(node)? {
                self.servers[node].child = None;
                self.network.is_process(node, None);
                return Ok(Some(code));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            sleep(LOOK).await;
        }
    }

    fn exit_code(&mut self, node: usize) -> io::Result<Option<i32>> {
        let Some(child) = &mut self.servers[node].child else {
            return Ok(None);
        };
        let status = child.try_wait()?;
        Ok(status.map(|status| {
            let signal = status.signal().unwrap_or_default();
            status.code().unwrap_or(128 + signal)
        }))
    }

    /// Nobody ended who was not asked to.
    pub(crate) fn all_run(&mut self) -> io::Result<Verdict> {
        for node in 0..self.size() {
            if let Some(code) = self.exit_code(node)? {
                return Ok(broken(
                    STAYS_UP,
                    format!("{} ended by itself with code {code}", name(node)),
                ));
            }
        }
        Ok(Ok(()))
    }

    /// Removes what servers keep, but not what they logged.
    pub(crate) fn remove_data(&self) -> io::Result<()> {
        for node in 0..self.size() {
            fs::remove_dir_all(self.directory.join(format!("{}.conclave", name(node))))?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in 0..self.size() {
            // It may have ended by itself.
            self.kill(node).ok();
        }
    }
}

/// Asks servers about themselves, past all proxies.
#[derive(Clone, Debug)]
pub(crate) struct Observer {
    endpoints: Vec<String>,
}

impl Observer {
    /// Who leads, if anybody says it does.
    pub(crate) async fn leader(&self) -> Option<usize> {
        let mut leader: Option<(u64, usize)> = None;
        for node in 0..self.endpoints.len() {
            let header = self.status(node).await.and_then(|status| status.header);
            // Two may say so; the one of the newer term is right.
            if let Some(header) = header
                && header.leader_id == header.member_id
                && leader.is_none_or(|(term, _)| term < header.term)
            {
                leader = Some((header.term, node));
            }
        }
        leader.map(|(_, node)| node)
    }

    /// What a server says about itself, if it answers.
    pub(crate) async fn status(&self, node: usize) -> Option<StatusResponse> {
        let client = Client::connect([&self.endpoints[node]]).ok()?;
        client.status().await.pop()?.status.ok()
    }
}

/// What a server is called.
pub(crate) fn name(node: usize) -> String {
    format!("n{node}")
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn pid(child: &Child) -> io::Result<Pid> {
    let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    id.ok_or_else(|| io::Error::other("a process without a number"))
}

/// A port that nobody uses now, below those that the system gives out, so that
/// no connection takes it while its server is down.
fn free_port() -> io::Result<u16> {
    use std::sync::atomic::{AtomicU16, Ordering};
    const FIRST: u16 = 10_000;
    const COUNT: u16 = 20_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Runs beside this one begin elsewhere.
    let start = std::process::id().wrapping_mul(131) % u32::from(COUNT);
    for _ in 0..COUNT {
        let next = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let offset = (start + next) % u32::from(COUNT);
        let port = FIRST + u16::try_from(offset).expect("less than COUNT, a u16");
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(io::Error::other("no free port"))
}
