//! Every connection of the cluster goes through here: from server to server, and
//! from clients to servers. Each direction of each link can be made late, be held
//! (what was sent arrives when the link is open again, as after a pause of TCP)
//! or lose what it carries; and connections can be cut.
//!
//! All members must agree on each other's addresses, so there is one proxy in
//! front of each server, and who dials is found out by asking the system which
//! process owns the other end.

use std::{
    fs, io,
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    time::sleep,
};

/// At most so much is read, and so delayed, at once.
const CHUNK_BYTES: usize = 16 << 10;

/// What one direction of a link does with what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Passes it on.
    Open,
    /// Passes it on, late.
    Late(Duration),
    /// Keeps it until the way is open again.
    Held,
    /// Loses it. A connection that has lost something ends when the way opens.
    Lost,
}

/// One link: all connections from one place to one server.
#[derive(Debug)]
pub(crate) struct Link {
    /// From who dialled.
    forth: watch::Sender<Way>,
    /// To who dialled.
    back: watch::Sender<Way>,
    cuts: watch::Sender<u64>,
    /// Pieces that were late, held or lost.
    disturbed: AtomicU64,
}

impl Link {
    fn new() -> Self {
        Self {
            forth: watch::Sender::new(Way::Open),
            back: watch::Sender::new(Way::Open),
            cuts: watch::Sender::new(0),
            disturbed: AtomicU64::new(0),
        }
    }

    /// Sets both directions.
    pub(crate) fn set(&self, forth: Way, back: Way) {
        self.forth.send_replace(forth);
        self.back.send_replace(back);
    }

    /// Ends all connections; says how many there were.
    pub(crate) fn cut(&self) -> u64 {
        self.cuts.send_modify(|cuts| *cuts += 1);
        self.cuts.receiver_count() as u64
    }

    /// How many pieces were late, held or lost so far.
    pub(crate) fn disturbed(&self) -> u64 {
        self.disturbed.load(Ordering::Relaxed)
    }
}

/// All links of a cluster.
#[derive(Debug)]
pub(crate) struct Network {
    /// By who dials, then by whom.
    peers: Vec<Vec<Arc<Link>>>,
    /// From all clients to each server.
    clients: Vec<Arc<Link>>,
    /// The processes of the servers that run.
    processes: Mutex<Vec<Option<u32>>>,
}

impl Network {
    /// A network of open links.
    pub(crate) fn new(nodes: usize) -> Arc<Self> {
        let row = || (0..nodes).map(|_| Arc::new(Link::new())).collect();
        Arc::new(Self {
            peers: (0..nodes).map(|_| row()).collect(),
            clients: row(),
            processes: Mutex::new(vec![None; nodes]),
        })
    }

    /// The link on which one server sends its messages to another.
    pub(crate) fn peer(&self, from: usize, to: usize) -> &Link {
        &self.peers[from][to]
    }

    /// The link of all clients to a server.
    pub(crate) fn client(&self, to: usize) -> &Link {
        &self.clients[to]
    }

    /// All links, twice those of servers to themselves, which nobody uses.
    pub(crate) fn links(&self) -> impl Iterator<Item = &Link> {
        let links = self.peers.iter().flatten().chain(&self.clients);
        links.map(|link| &**link)
    }

    /// Opens all links.
    pub(crate) fn heal(&self) {
        for link in self.links() {
            link.set(Way::Open, Way::Open);
        }
    }

    /// Which process a server is now.
    pub(crate) fn is_process(&self, node: usize, process: Option<u32>) {
        let mut processes = self
            .processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        processes[node] = process;
    }

    /// Stands in front of a server's port for clients; the port to dial instead.
    pub(crate) async fn stand_before_clients(
        self: &Arc<Self>,
        node: usize,
        port: u16,
    ) -> io::Result<u16> {
        let link = Arc::clone(&self.clients[node]);
        stand_before(port, move |_, _| Some(Arc::clone(&link))).await
    }

    /// Stands in front of a server's port for other servers.
    pub(crate) async fn stand_before_peers(
        self: &Arc<Self>,
        node: usize,
        port: u16,
    ) -> io::Result<u16> {
        let network = Arc::clone(self);
        stand_before(port, move |dialler, outside| {
            let from = network.who_dials(dialler, outside)?;
            Some(Arc::clone(&network.peers[from][node]))
        })
        .await
    }

    fn who_dials(&self, local: u16, remote: u16) -> Option<usize> {
        let inode = socket_inode(local, remote)?;
        let socket = format!("socket:[{inode}]");
        let processes = self
            .processes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        processes
            .iter()
            .position(|process| process.is_some_and(|process| has_open(process, &socket)))
    }
}

/// Stands in front of a port, at the one that it gives back. Each connection takes
/// the link that is given for the dialler's port and this one; without one, the
/// dialler has ended meanwhile.
async fn stand_before(
    port: u16,
    link: impl Fn(u16, u16) -> Option<Arc<Link>> + Send + 'static,
) -> io::Result<u16> {
    let (listener, outside) = listen().await?;
    tokio::spawn(async move {
        while let Ok((stream, dialler)) = listener.accept().await {
            if let Some(link) = link(dialler.port(), outside) {
                tokio::spawn(carry(stream, port, link));
            }
        }
    });
    Ok(outside)
}

/// A listener at a free port of this machine.
async fn listen() -> io::Result<(TcpListener, u16)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let port = listener.local_addr()?.port();
    Ok((listener, port))
}

fn socket_inode(local: u16, remote: u16) -> Option<String> {
    let table = fs::read_to_string("/proc/self/net/tcp").ok()?;
    table.lines().find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let is_port = |column: &str, port: u16| column.ends_with(&format!(":{port:04X}"));
        let is_it = is_port(columns.get(1)?, local) && is_port(columns.get(2)?, remote);
        is_it.then(|| columns.get(9).map(|inode| (*inode).to_owned()))?
    })
}

fn has_open(process: u32, socket: &str) -> bool {
    let Ok(files) = fs::read_dir(format!("/proc/{process}/fd")) else {
        return false;
    };
    files
        .flatten()
        .filter_map(|file| fs::read_link(file.path()).ok())
        .any(|target| target.as_os_str() == socket)
}

/// Carries one connection until either side ends it, or it is cut.
async fn carry(outer: TcpStream, port: u16, link: Arc<Link>) {
    let mut cuts = link.cuts.subscribe();
    let Ok(inner) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else {
        return;
    };
    // Without it a connection is slower, and nothing else is wrong.
    outer.set_nodelay(true).ok();
    inner.set_nodelay(true).ok();
    let (outer_read, outer_write) = outer.into_split();
    let (inner_read, inner_write) = inner.into_split();
    tokio::select! {
        _ = pump(outer_read, inner_write, link.forth.subscribe(), &link.disturbed) => {}
        _ = pump(inner_read, outer_write, link.back.subscribe(), &link.disturbed) => {}
        _ = cuts.changed() => {}
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
    disturbed: &AtomicU64,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let length = from.read(&mut chunk).await?;
        if length == 0 {
            return Ok(());
        }
        let now = *way.borrow_and_update();
        if now != Way::Open {
            disturbed.fetch_add(1, Ordering::Relaxed);
        }
        match now {
            Way::Open => {}
            Way::Late(delay) => sleep(delay).await,
            Way::Held => {
                let opened = way.wait_for(|way| *way != Way::Held).await;
                if opened.is_err() {
                    return Ok(());
                }
            }
            Way::Lost => {
                let opened = way.wait_for(|way| *way != Way::Lost);
                let mut nowhere = tokio::io::sink();
                tokio::select! {
                    _ = opened => return Ok(()),
                    all = tokio::io::copy(&mut from, &mut nowhere) => {
                        return all.map(|_| ());
                    }
                }
            }
        }
        to.write_all(&chunk[..length]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two ends of a link, with a server that sends back what it gets.
    async fn echo(network: &Arc<Network>) -> TcpStream {
        let (server, port) = listen().await.unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = server.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.split();
                    tokio::io::copy(&mut read, &mut write).await.ok();
                });
            }
        });
        let outside = network.stand_before_clients(0, port).await.unwrap();
        TcpStream::connect((Ipv4Addr::LOCALHOST, outside))
            .await
            .unwrap()
    }

    async fn say(stream: &mut TcpStream, word: &[u8; 4]) {
        stream.write_all(word).await.unwrap();
    }

    async fn hear(stream: &mut TcpStream) -> io::Result<[u8; 4]> {
        let mut word = [0; 4];
        stream.read_exact(&mut word).await.map(|_| word)
    }

    async fn until_disturbed(link: &Link) {
        while link.disturbed() == 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn what_is_held_arrives_when_the_link_opens() {
        let network = Network::new(1);
        let mut stream = echo(&network).await;
        say(&mut stream, b"open").await;
        assert_eq!(&hear(&mut stream).await.unwrap(), b"open");
        network.client(0).set(Way::Open, Way::Held);
        say(&mut stream, b"held").await;
        until_disturbed(network.client(0)).await;
        network.heal();
        assert_eq!(&hear(&mut stream).await.unwrap(), b"held");
    }

    #[tokio::test]
    async fn a_connection_that_lost_something_ends() {
        let network = Network::new(1);
        let mut stream = echo(&network).await;
        network.client(0).set(Way::Lost, Way::Open);
        say(&mut stream, b"lost").await;
        until_disturbed(network.client(0)).await;
        network.heal();
        assert!(hear(&mut stream).await.is_err());
    }

    #[tokio::test]
    async fn a_cut_ends_connections_and_new_ones_work() {
        let network = Network::new(1);
        let mut stream = echo(&network).await;
        say(&mut stream, b"open").await;
        assert_eq!(&hear(&mut stream).await.unwrap(), b"open");
        assert_eq!(network.client(0).cut(), 1);
        assert!(hear(&mut stream).await.is_err());
    }

    #[tokio::test]
    async fn who_dials_is_known() {
        let network = Network::new(3);
        network.is_process(2, Some(std::process::id()));
        let (listener, port) = listen().await.unwrap();
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .unwrap();
        let (_, dialler) = listener.accept().await.unwrap();
        assert_eq!(network.who_dials(dialler.port(), port), Some(2));
        network.is_process(2, None);
        assert_eq!(network.who_dials(dialler.port(), port), None);
        drop(stream);
    }
}
