//! Puts a server together, runs it, and takes it apart in the right order.
//!
//! Threads: `conclave-loop` runs the node and carries messages between members;
//! `conclave-io-N` serve clients, or `conclave-loop` where a machine has too few
//! cores for more; `conclave-checkpoint` writes checkpoints; the thread that calls
//! [`Server::wait`] accepts connections and watches over the others.

use std::{
    future::{Future, pending},
    io,
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    sync::{Arc, atomic::Ordering},
    thread::{self, JoinHandle},
    time::Duration,
};

use conclave_core::{
    checkpoint::Writer,
    limits,
    node::{self, Outlets, Stores},
    replica::{Config, Fatal, Role, Status},
};
use conclave_primitives::Primitives;
use tokio::{
    runtime::{Builder, Runtime},
    sync::{Notify, mpsc, watch},
    time,
};
use tonic::{service::Routes, transport};
use tonic_health::{
    pb::health_server::{Health, HealthServer},
    server::{HealthReporter, health_reporter},
};
use tower_layer::layer_fn;

use crate::{
    cluster::role_name,
    deadline::Deadlines,
    etcd::Snapshots,
    events::Hub,
    gateway::Gateway,
    http,
    mailbox::Mailbox,
    net::{self, BindError, Bound, ConnectionSender},
    options::{Options, OptionsError, Settings, Url},
    peers::Peers,
    readers::Readers,
    routes,
    shutdown::{Requests, Shutdown},
    storage::{self, Storage, StorageError},
    turns,
};

/// How often the threads and the state of the cluster are looked at.
const WATCH_EVERY: Duration = Duration::from_millis(100);
/// How often the health service learns whether this member serves.
const HEALTH_EVERY: Duration = Duration::from_secs(1);
/// How long requests have to finish when the server stops.
const DRAIN_WITHIN: Duration = Duration::from_secs(3);
/// How often it is looked whether threads have ended.
const END_EVERY: Duration = Duration::from_millis(10);
/// How long the threads have to end after that.
const END_WITHIN: Duration = Duration::from_secs(2);
/// Pings find clients that are gone without a word; their streams hold memory.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Calls that one connection may have waiting, and streams that it may have open, of
/// whichever service: as many as the replica takes.
const STREAMS_MAX: u32 = 1 << 17;
/// Calls that a client may give up in one burst.
const RESETS_MAX: usize = 4_096;
/// Large enough that no list waits for a window.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
/// For all streams of a connection together.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

const _: () = assert!(STREAMS_MAX as usize >= limits::PENDING_COMMANDS_MAX);

/// Runs a server until it is asked to stop, or cannot go on. The error is for
/// the caller to report; it is not logged.
pub fn run(options: &Options, shutdown: Shutdown) -> Result<(), ServerError> {
    Server::start(options)?.wait(shutdown)
}

/// A server that has begun.
#[derive(Debug)]
pub struct Server {
    gateway: Arc<Gateway>,
    /// Accepts and watches; runs only inside [`Server::wait`].
    control: Runtime,
    clients: Vec<StdListener>,
    client_threads: Vec<ConnectionSender>,
    metrics: Vec<StdListener>,
    addresses: Addresses,
    health: HealthReporter,
    phase: watch::Sender<Phase>,
    replica: LoopThread,
    io: Vec<JoinHandle<()>>,
}

/// Joins to why the node ended.
type LoopThread = JoinHandle<Result<(), Fatal>>;

/// Where a server listens, with the ports that the system chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// For clients.
    pub clients: Vec<SocketAddr>,
    /// For the other members.
    pub peers: Vec<SocketAddr>,
    /// For metrics alone.
    pub metrics: Vec<SocketAddr>,
}

/// How far a server is from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Serving,
    /// No new connections; requests finish.
    Draining,
    Stopped,
}

impl Server {
    /// Takes the addresses, opens the data directory, and starts the threads.
    pub fn start(options: &Options) -> Result<Self, ServerError> {
        let settings = options.validate()?;
        let control = runtime()?;
        let inside = control.enter();
        // A start that fails for its addresses leaves no directory behind that
        // belongs to them. But nobody connects before the log was read.
        let clients = bind_all(&settings.listen_client)?;
        let peers = bind_all(&settings.listen_peer)?;
        let metrics = bind_all(&settings.listen_metrics)?;
        let storage = Storage::open(&settings)?;
        let clients = listen_all(clients)?;
        let peer_listeners = listen_all(peers)?;
        let metrics = listen_all(metrics)?;
        let addresses = Addresses {
            clients: local_addresses(&clients),
            peers: local_addresses(&peer_listeners),
            metrics: local_addresses(&metrics),
        };
        log_start(&settings, &addresses);
        let (phase, phases) = watch::channel(Phase::Serving);
        let (health, health_server) = health_reporter();
        let checkpoints = storage.checkpoints.clone();
        let snapshots = Snapshots::new(storage.checkpoints.clone());
        let (gateway, turns) = open_node(settings, storage, snapshots)?;
        let gateway = Arc::new(gateway);
        let peers = Arc::clone(&gateway.peers);
        let links = peers.run(gateway.handle.clone(), checkpoints, peer_listeners);
        let (client_threads, mut services): (Vec<_>, Vec<_>) = gateway
            .client_mailboxes()
            .map(|mailbox| serve_clients(&gateway, mailbox, &health_server, phases.clone()))
            .unzip();
        let here = match gateway.settings.io_threads {
            0 => services.pop(),
            _ => None,
        };
        let replica = spawn("conclave-loop".to_owned(), run_node(turns, links, here))?;
        let io = services
            .into_iter()
            .enumerate()
            .map(|(number, service)| spawn(format!("conclave-io-{number}"), service))
            .collect::<Result<_, _>>()?;
        drop(inside);
        Ok(Self {
            gateway,
            control,
            clients,
            client_threads,
            metrics,
            addresses,
            health,
            phase,
            replica,
            io,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until asked to stop, or until the replica cannot go on.
    pub fn wait(mut self, shutdown: Shutdown) -> Result<(), ServerError> {
        let control = std::mem::replace(&mut self.control, runtime()?);
        let patient = control.block_on(self.serve(shutdown))?;
        self.gateway.hub.close();
        self.phase.send_replace(Phase::Stopped);
        if patient {
            // Whether they all end in time is seen below.
            control.block_on(async { time::timeout(END_WITHIN, self.drained()).await.ok() });
        }
        if !self.replica.is_finished() {
            tracing::warn!("stopped without waiting for the log any longer");
            return Ok(());
        }
        match self.replica.join() {
            Ok(ended) => Ok(ended?),
            Err(_) => Err(ServerError::LoopPanicked),
        }
    }

    /// Whether the threads may have a moment to end.
    async fn serve(&mut self, shutdown: Shutdown) -> Result<bool, ServerError> {
        let mut shutdown = shutdown.listen().map_err(ServerError::Signals)?;
        self.accept();
        let gateway = Arc::clone(&self.gateway);
        let mailbox = Arc::clone(&gateway.mailbox);
        tokio::spawn(async move { mailbox.deliver().await });
        tokio::spawn(report_health(
            gateway,
            self.health.clone(),
            self.phase.subscribe(),
        ));
        tokio::select! {
            () = self.watch_replica() => Ok(true),
            () = shutdown.next() => Ok(self.drain(&mut shutdown).await),
        }
    }

    /// Begins to accept connections. The tasks end with the runtime.
    fn accept(&mut self) {
        for listener in self.clients.drain(..) {
            let gateway = Arc::clone(&self.gateway);
            let count = move || {
                gateway.metrics.connections.fetch_add(1, Ordering::Relaxed);
            };
            let accept = net::accept(listener, self.client_threads.clone(), count);
            tokio::spawn(until(self.phase.subscribe(), Phase::Draining, accept));
        }
        for listener in self.metrics.drain(..) {
            let (sender, connections) = net::connections();
            tokio::spawn(net::accept(listener, vec![sender], || ()));
            let routes = routes::metrics_routes(&self.gateway);
            tokio::spawn(serve_connections(
                routes,
                connections,
                self.phase.subscribe(),
            ));
        }
        // So that the I/O threads see the end of their connections.
        self.client_threads.clear();
    }

    /// Runs until the loop thread ends; logs what becomes of the cluster.
    async fn watch_replica(&self) {
        let mut seen = Status::default();
        while !self.replica.is_finished() {
            let status = self.gateway.handle.status();
            if (status.leader, status.term, status.role) != (seen.leader, seen.term, seen.role) {
                log_leader(&status, seen.leader.is_some(), &self.gateway.settings);
                seen = Status::clone(&status);
            }
            time::sleep(WATCH_EVERY).await;
        }
    }

    /// Hands leadership over and lets requests finish, for as long as there is time.
    /// False if it was asked again meanwhile, to stop at once.
    async fn drain(&self, shutdown: &mut Requests) -> bool {
        tracing::info!("stopping");
        self.phase.send_replace(Phase::Draining);
        self.gateway.hub.close();
        self.gateway.handle.stop();
        tokio::select! {
            _ = time::timeout(DRAIN_WITHIN, self.drained()) => true,
            () = shutdown.next() => false,
        }
    }

    async fn drained(&self) {
        while !self.replica.is_finished() || !self.io.iter().all(JoinHandle::is_finished) {
            time::sleep(END_EVERY).await;
        }
    }
}

/// A runtime on the thread that blocks on it.
fn runtime() -> Result<Runtime, ServerError> {
    Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ServerError::Thread)
}

fn bind_all(urls: &[Url]) -> Result<Vec<Bound>, ServerError> {
    Ok(urls.iter().map(net::bind).collect::<Result<_, _>>()?)
}

fn listen_all(bound: Vec<Bound>) -> Result<Vec<StdListener>, ServerError> {
    let listeners = bound.into_iter().map(Bound::listen);
    Ok(listeners.collect::<Result<_, _>>()?)
}

fn local_addresses(listeners: &[StdListener]) -> Vec<SocketAddr> {
    listeners
        .iter()
        .filter_map(|listener| listener.local_addr().ok())
        .collect()
}

/// Opens the node, for a thread that will run its turns.
fn open_node(
    settings: Settings,
    storage: Storage,
    snapshots: Snapshots,
) -> Result<(Gateway, impl Future<Output = Result<(), Fatal>> + Send), ServerError> {
    let Storage {
        log,
        recovered,
        state,
        checkpoints,
    } = storage;
    let config = Config {
        node: settings.topology.own().id,
        boot: storage::random(),
        seed: storage::random(),
        heartbeat_ms: settings.heartbeat_ms,
        election_ms: settings.election_ms,
        name: settings.name.clone(),
        client_urls: settings
            .advertise_client
            .iter()
            .map(Url::to_string)
            .collect(),
        retention: settings.retention,
        quota_bytes: settings.quota_bytes,
        watch_queue_bytes: limits::WATCH_QUEUE_BYTES_MAX,
    };
    let incarnation = recovered.identity.incarnation;
    let peers = Arc::new(Peers::new(&settings.topology, incarnation, config.boot));
    let hub = Arc::new(Hub::default());
    let readers = Arc::new(Readers::default());
    let mailboxes: Vec<Arc<Mailbox>> = (0..=settings.io_threads.max(1))
        .map(|_| Arc::default())
        .collect();
    let arrived = Arc::new(Notify::new());
    let outlets = outlets(&arrived, &peers, &hub, &readers, &mailboxes);
    let stores = Stores {
        log,
        recovered,
        state,
        checkpoints: Writer::start(checkpoints).map_err(ServerError::Thread)?,
        checkpoint_every: settings.snapshot_count,
        log_bytes_max: settings.log_retention_bytes,
    };
    let (handle, node) = node::open(config, stores, outlets);
    let settings = Arc::new(settings);
    let gateway = Gateway::new(handle, settings, hub, readers, peers, snapshots, mailboxes);
    Ok((gateway, turns::run(node, arrived)))
}

/// Where the node sends what leaves it.
fn outlets(
    arrived: &Arc<Notify>,
    peers: &Arc<Peers>,
    hub: &Arc<Hub>,
    readers: &Arc<Readers>,
    mailboxes: &[Arc<Mailbox>],
) -> Outlets<Primitives> {
    let post = {
        let mailboxes = mailboxes.to_vec();
        move || mailboxes.iter().for_each(|mailbox| mailbox.post())
    };
    Outlets {
        wake: Box::new({
            let arrived = Arc::clone(arrived);
            move || arrived.notify_one()
        }),
        answered: Box::new(post.clone()),
        send: Box::new({
            let peers = Arc::clone(peers);
            move |messages| peers.send(messages)
        }),
        publish: Box::new({
            let hub = Arc::clone(hub);
            move |events| hub.publish(events)
        }),
        missed: Box::new({
            let hub = Arc::clone(hub);
            move || hub.missed()
        }),
        notify: Box::new({
            let readers = Arc::clone(readers);
            move |notices| {
                readers.notify(notices);
                post();
            }
        }),
        fetch: Box::new({
            let peers = Arc::clone(peers);
            move |fetch, sink| peers.fetch(fetch, sink)
        }),
    }
}

/// What the loop thread does: the turns of the node, the links to other members,
/// and, if there are no threads for them, clients.
async fn run_node(
    turns: impl Future<Output = Result<(), Fatal>>,
    links: impl Future<Output = ()> + Send + 'static,
    clients: Option<impl Future<Output = ()> + Send + 'static>,
) -> Result<(), Fatal> {
    // Ends with the runtime.
    tokio::spawn(links);
    let clients = clients.map(tokio::spawn);
    turns.await?;
    if let Some(clients) = clients {
        // They still get their answers. A panic ends the process in a release.
        clients.await.ok();
    }
    Ok(())
}

/// The service for one thread's share of the clients, and the way to hand it
/// connections.
fn serve_clients(
    gateway: &Gateway,
    mailbox: &Arc<Mailbox>,
    health: &HealthServer<impl Health>,
    phases: watch::Receiver<Phase>,
) -> (ConnectionSender, impl Future<Output = ()> + Send + 'static) {
    let gateway = Arc::new(gateway.with_mailbox(Arc::clone(mailbox)));
    let (sender, connections) = net::connections();
    let routes = routes::routes(&gateway, health.clone());
    let serve = async move {
        tokio::select! {
            () = gateway.mailbox.deliver() => {}
            () = serve_connections(routes, connections, phases) => {}
        }
    };
    (sender, serve)
}

/// A thread with a runtime of its own, for as long as the future runs.
fn spawn<T: Send + 'static>(
    name: String,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<JoinHandle<T>, ServerError> {
    let runtime = runtime()?;
    let run = move || {
        let result = runtime.block_on(work);
        // A look-up of a name may still run, and nobody waits for it.
        runtime.shutdown_background();
        result
    };
    thread::Builder::new()
        .name(name)
        .spawn(run)
        .map_err(ServerError::Thread)
}

/// Serves connections until there are no more, or the server stops.
async fn serve_connections(
    routes: Routes,
    connections: mpsc::Receiver<StdStream>,
    phases: watch::Receiver<Phase>,
) {
    let served = transport::Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .layer(layer_fn(Deadlines))
        .add_routes(routes)
        .serve_with_incoming_shutdown(
            net::incoming(connections),
            until(phases.clone(), Phase::Draining, pending::<()>()),
        );
    until(phases, Phase::Stopped, async {
        if let Err(error) = served.await {
            tracing::error!(%error, "a thread can no longer serve clients");
        }
    })
    .await;
}

/// Runs a future until it is done, or the server has come to `phase`.
async fn until<T>(mut phases: watch::Receiver<Phase>, phase: Phase, work: impl Future<Output = T>) {
    tokio::select! {
        _ = work => {}
        // An error means that the server is gone.
        _ = phases.wait_for(|now| *now >= phase) => {}
    }
}

/// Keeps the health service up to date.
async fn report_health(
    gateway: Arc<Gateway>,
    reporter: HealthReporter,
    phases: watch::Receiver<Phase>,
) {
    let report = async {
        let mut every = time::interval(HEALTH_EVERY);
        loop {
            every.tick().await;
            let serving = http::is_ready(&gateway).await.is_ok();
            routes::report_health(&reporter, serving).await;
        }
    };
    routes::report_health(&reporter, false).await;
    until::<()>(phases, Phase::Draining, report).await;
    routes::report_health(&reporter, false).await;
}

fn log_start(settings: &Settings, addresses: &Addresses) {
    let topology = &settings.topology;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        name = settings.name,
        member = %topology.own().id,
        cluster = %format_args!("{:x}", topology.cluster),
        members = topology.members().len(),
        data_dir = %settings.data_dir.display(),
        clients = ?addresses.clients,
        peers = ?addresses.peers,
        "starting"
    );
}

fn log_leader(status: &Status, had_leader: bool, settings: &Settings) {
    let (term, role) = (status.term, role_name(status.role));
    let Some(leader) = status.leader else {
        if had_leader {
            tracing::warn!(term, role, "no leader is known any more");
        } else {
            tracing::info!(term, role, "no leader is known yet");
        }
        return;
    };
    let name = settings
        .topology
        .member(leader)
        .map_or("", |member| member.name.as_str());
    let leads = status.role == Role::Leader;
    tracing::info!(term = status.term, leader = name, id = %leader, leads, "a leader is known");
}

/// Why a server did not start, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The options do not hold together.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The data directory cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// An address cannot be listened on.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The system gave no thread or no runtime.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
    /// The replica cannot go on.
    #[error(transparent)]
    Fatal(#[from] Fatal),
    /// A defect of the replica.
    #[error("the replica's thread panicked")]
    LoopPanicked,
}
