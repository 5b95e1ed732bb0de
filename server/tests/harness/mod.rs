//! Real servers inside the test process, on ports that the system chooses, with
//! data directories that go away.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use conclave_proto::v1::{
    AcquireRequest, OpenSessionRequest, cluster_client::ClusterClient,
    election_client::ElectionClient, lock_client::LockClient, session_client::SessionClient,
};
use conclave_server::{Options, Server, ServerError, Shutdown, Stopper, server::Addresses};
use tonic::{Status, transport::Channel};
use tonic_types::StatusExt as _;

/// Everything here takes milliseconds; only a defect takes this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A directory that is removed with this.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("conclave-test-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// A server that runs.
pub(crate) struct Node {
    pub(crate) addresses: Addresses,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Node {
    pub(crate) fn start(options: &Options) -> Result<Self, ServerError> {
        let server = Server::start(options)?;
        let addresses = server.addresses().clone();
        let (stopper, shutdown) = Shutdown::on_request();
        let thread = Some(thread::spawn(|| server.wait(shutdown)));
        Ok(Self {
            addresses,
            stopper,
            thread,
        })
    }

    /// A cluster of one, ready to serve.
    pub(crate) fn alone(directory: &Directory) -> Self {
        let node = Self::start(&alone(directory)).unwrap();
        node.await_ready();
        node
    }

    pub(crate) fn client(&self) -> SocketAddr {
        self.addresses.clients[0]
    }

    pub(crate) fn await_ready(&self) {
        eventually("the server is ready", || {
            get(self.client(), "/readyz").0 == 200
        });
    }

    pub(crate) async fn connect(&self) -> Client {
        let endpoint = Channel::from_shared(format!("http://{}", self.client())).unwrap();
        Client {
            channel: endpoint.connect().await.unwrap(),
        }
    }

    /// Waits until it ends by itself.
    pub(crate) fn ended(mut self) -> Result<(), ServerError> {
        self.thread.take().unwrap().join().unwrap()
    }

    /// Asks it to stop, once.
    pub(crate) fn request_stop(&self) {
        self.stopper.stop();
    }

    /// Stops it gracefully.
    pub(crate) fn stop(mut self) -> Result<(), ServerError> {
        self.stopper.stop();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.stopper.stop();
            self.stopper.stop();
            let ended = thread.join();
            if !thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

/// Options of a cluster of one.
pub(crate) fn alone(directory: &Directory) -> Options {
    let anywhere = || vec!["http://127.0.0.1:0".to_owned()];
    Options {
        data_dir: Some(directory.0.join("alone")),
        listen_client_urls: anywhere(),
        listen_peer_urls: anywhere(),
        listen_metrics_urls: anywhere(),
        initial_advertise_peer_urls: vec!["http://127.0.0.1:1".to_owned()],
        heartbeat_interval_ms: 20,
        election_timeout_ms: 100,
        io_threads: Some(2),
        ..Options::default()
    }
}

/// Options of the members of a cluster of three.
pub(crate) fn three(directory: &Directory) -> Vec<Options> {
    let ports: Vec<(u16, u16)> = (0..3).map(|_| (free_port(), free_port())).collect();
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let initial_cluster: Vec<String> = ports
        .iter()
        .zip("abc".chars())
        .map(|((_, peer), name)| format!("{name}={}", url(*peer)))
        .collect();
    let member = |((client, peer), name): (&(u16, u16), char)| Options {
        name: name.to_string(),
        data_dir: Some(directory.0.join(name.to_string())),
        listen_client_urls: vec![url(*client)],
        listen_peer_urls: vec![url(*peer)],
        initial_cluster: initial_cluster.clone(),
        heartbeat_interval_ms: 50,
        election_timeout_ms: 250,
        // Each way of serving clients: on the thread of the node, and beside it.
        io_threads: Some(usize::from(name == 'b')),
        ..Options::default()
    };
    ports.iter().zip("abc".chars()).map(member).collect()
}

/// A port that neither another test nor an outgoing connection takes meanwhile:
/// below the range from which the system chooses.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() * 61;
    loop {
        let next = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(10_000 + next % 20_000).unwrap();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Clients over one connection.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) channel: Channel,
}

impl Client {
    pub(crate) fn sessions(&self) -> SessionClient<Channel> {
        SessionClient::new(self.channel.clone())
    }

    pub(crate) fn locks(&self) -> LockClient<Channel> {
        LockClient::new(self.channel.clone())
    }

    pub(crate) fn elections(&self) -> ElectionClient<Channel> {
        ElectionClient::new(self.channel.clone())
    }

    pub(crate) fn cluster(&self) -> ClusterClient<Channel> {
        ClusterClient::new(self.channel.clone())
    }

    /// A session that outlives the test.
    pub(crate) async fn open(&self, name: &str) -> i64 {
        let request = OpenSessionRequest {
            ttl_ms: 60_000,
            name: name.to_owned(),
            ..Default::default()
        };
        self.sessions()
            .open(request)
            .await
            .unwrap()
            .into_inner()
            .session_id
    }

    /// The token of a grant.
    pub(crate) async fn acquire(&self, request: AcquireRequest) -> Result<u64, Status> {
        Ok(self.locks().acquire(request).await?.into_inner().token)
    }
}

/// Asks for a lock without a number.
pub(crate) fn acquire(name: &str, session_id: i64, wait_ms: Option<u64>) -> AcquireRequest {
    AcquireRequest {
        name: name.to_owned(),
        session_id,
        wait_ms,
        ..Default::default()
    }
}

/// The reason of a status.
pub(crate) fn reason(status: &Status) -> String {
    status
        .get_details_error_info()
        .map(|info| info.reason)
        .unwrap_or_default()
}

/// Status and body of a GET over HTTP/1.
pub(crate) fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    let answer = exchange(address, request.as_bytes());
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0);
    (status, body.to_owned())
}

/// Sends bytes and returns what comes until the server closes or falls silent.
pub(crate) fn exchange(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    // The server may close at any time.
    stream.write_all(bytes).ok();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok();
    answer
}

/// Waits for something that happens by itself.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not in time");
        thread::sleep(Duration::from_millis(20));
    }
}
