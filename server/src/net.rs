//! Sockets: listening, accepting, and handing connections to the thread that
//! serves them.

use std::{
    io,
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream, ToSocketAddrs as _},
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::mpsc,
    time,
};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};

use crate::options::Url;

/// Connections that wait to be accepted: a restarted cluster gets all of its
/// clients back at once.
const BACKLOG: u32 = 1_024;
/// Accepted connections that wait for one thread.
const ACCEPTED_MAX: usize = 256;
/// After a failed accept, which is usually the limit of open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An address that is taken, and to which nobody can connect yet.
#[derive(Debug)]
pub(crate) struct Bound {
    url: Url,
    socket: TcpSocket,
}

/// Takes one address.
pub(crate) fn bind(url: &Url) -> Result<Bound, BindError> {
    let addresses: Vec<SocketAddr> = (url.host(), url.port())
        .to_socket_addrs()
        .map_err(|source| BindError::UnknownHost {
            url: url.clone(),
            source,
        })?
        .collect();
    let preferred = addresses
        .iter()
        .find(|address| address.is_ipv4())
        .or_else(|| addresses.first());
    let socket = preferred
        .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
        .and_then(|address| bound(*address))
        .map_err(|error| BindError::new(url, error))?;
    let url = url.clone();
    Ok(Bound { url, socket })
}

impl Bound {
    /// Lets others connect. Must run inside a runtime.
    pub(crate) fn listen(self) -> Result<StdListener, BindError> {
        self.socket
            .listen(BACKLOG)
            .and_then(TcpListener::into_std)
            .map_err(|error| BindError::new(&self.url, error))
    }
}

fn bound(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    // Connections of the process before may linger.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// The end of a channel into which connections for one thread go.
pub(crate) type ConnectionSender = mpsc::Sender<StdStream>;

/// A channel for the connections of one thread.
pub(crate) fn connections() -> (ConnectionSender, mpsc::Receiver<StdStream>) {
    mpsc::channel(ACCEPTED_MAX)
}

/// Accepts for ever, and deals connections out in turn.
pub(crate) async fn accept(
    listener: StdListener,
    servers: Vec<ConnectionSender>,
    accepted: impl Fn(),
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    for server in servers.iter().cycle() {
        let stream = next(&listener).await;
        accepted();
        if server.send(stream).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// The next connection that is in order.
async fn next(listener: &TcpListener) -> StdStream {
    let mut failing = false;
    loop {
        let accepted = listener.accept().await.and_then(|(stream, _)| {
            stream.set_nodelay(true)?;
            stream.into_std()
        });
        match accepted {
            Ok(stream) => return stream,
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "cannot accept a connection");
                }
                time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The connections of this thread, for tonic.
pub(crate) fn incoming(
    connections: mpsc::Receiver<StdStream>,
) -> impl Stream<Item = io::Result<TcpStream>> {
    ReceiverStream::new(connections).map(TcpStream::from_std)
}

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages say it, and the fields are what they name"
)]
pub enum BindError {
    #[error("{url} is in use by another process")]
    InUse { url: Url },
    #[error("{url} names an unknown host")]
    UnknownHost { url: Url, source: io::Error },
    #[error("cannot listen on {url}")]
    Failed { url: Url, source: io::Error },
}

impl BindError {
    fn new(url: &Url, source: io::Error) -> Self {
        let url = url.clone();
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse { url },
            _ => Self::Failed { url, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;

    fn url(text: &str) -> Url {
        let listen_client_urls = vec![text.to_owned()];
        let options = Options {
            listen_client_urls,
            ..Options::default()
        };
        options.validate().unwrap().listen_client.remove(0)
    }

    fn listen(url: &Url) -> Result<StdListener, BindError> {
        bind(url)?.listen()
    }

    #[tokio::test]
    async fn a_port_in_use_is_told_from_other_trouble() {
        let first = listen(&url("http://127.0.0.1:0")).unwrap();
        let taken = url(&format!("http://{}", first.local_addr().unwrap()));
        assert!(matches!(listen(&taken), Err(BindError::InUse { .. })));
        assert!(matches!(
            listen(&url("http://host.invalid:1")),
            Err(BindError::UnknownHost { .. })
        ));
        assert!(matches!(
            listen(&url("http://192.0.2.1:1")),
            Err(BindError::Failed { .. })
        ));
    }

    #[tokio::test]
    async fn connections_are_dealt_out_in_turn() {
        let listener = listen(&url("http://127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (one, mut ones) = connections();
        let (two, mut twos) = connections();
        let accepting = tokio::spawn(accept(listener, vec![one, two], || ()));
        let mut clients = vec![];
        for _ in 0..4 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        for _ in 0..2 {
            assert!(ones.recv().await.unwrap().nodelay().unwrap());
            assert!(twos.recv().await.unwrap().nodelay().unwrap());
        }
        accepting.abort();
    }
}
