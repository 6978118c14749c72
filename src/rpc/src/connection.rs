//! Connections from both kinds of socket, and what is known of who is at the other end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::unix::UCred;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use crate::limits::MAX_CONNECTIONS;

/// Whether a peer's word about a store path is taken for true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// It may register any path: root, and the `trusted-users`.
    Trusted,
    /// It may register what proves itself: content-addressed or signed by a trusted key.
    Untrusted,
}

/// Decides about a peer on the Unix socket by its credentials; `None` turns it away.
pub type TrustOf = Arc<dyn Fn(UCred) -> Option<Trust> + Send + Sync>;

/// Who is at the other end of a connection; in the extensions of every request.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Whether the peer is believed.
    pub trust: Trust,
    /// Where it connects from, for the log.
    pub origin: Origin,
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug)]
pub enum Origin {
    /// A TCP address, which says nothing about the user behind it.
    Tcp(SocketAddr),
    /// A process on this machine; `None` when the kernel does not say which.
    Unix(Option<UCred>),
}

impl Peer {
    /// Whether the peer that sent `request` is believed. One that nothing is known of is not.
    pub(crate) fn trust<T>(request: &tonic::Request<T>) -> Trust {
        request.extensions().get::<Peer>().map_or(Trust::Untrusted, |peer| peer.trust)
    }
}

/// The listening sockets as one stream of connections. Dropping it closes them.
pub(crate) struct Incoming {
    connections: mpsc::Receiver<Connection>,
    _accepting: JoinSet<()>,
}

impl Incoming {
    pub(crate) fn new(tcp: Option<TcpListener>, unix: Option<UnixListener>, trust_of: TrustOf) -> Incoming {
        let (sender, connections) = mpsc::channel(1);
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut accepting = JoinSet::new();
        if let Some(tcp) = tcp {
            accepting.spawn(accept(Listener::Tcp(tcp), room.clone(), sender.clone()));
        }
        if let Some(unix) = unix {
            accepting.spawn(accept(Listener::Unix(unix, trust_of), room, sender));
        }
        Incoming { connections, _accepting: accepting }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.connections.poll_recv(context).map(|connection| connection.map(Ok))
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, TrustOf),
}

impl Listener {
    /// The next connection; `None` for one that was turned away.
    async fn accept(&self) -> io::Result<Option<(Socket, Peer)>> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let peer = Peer { trust: Trust::Untrusted, origin: Origin::Tcp(address) };
                Ok(Some((Socket::Tcp(stream), peer)))
            }
            Listener::Unix(listener, trust_of) => {
                let (stream, _) = listener.accept().await?;
                let credentials = stream.peer_cred().ok();
                let Some(trust) = credentials.and_then(|credentials| trust_of(credentials)) else {
                    tracing::warn!(?credentials, "refused a grpc peer who is not in allowed-users");
                    return Ok(None);
                };
                Ok(Some((Socket::Unix(stream), Peer { trust, origin: Origin::Unix(credentials) })))
            }
        }
    }
}

/// Hands over connections while there is room for them.
async fn accept(listener: Listener, room: Arc<Semaphore>, connections: mpsc::Sender<Connection>) {
    // A failing accept is a client that went away or a shortage (of file descriptors) that may pass.
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);
    const FIRST_PAUSE: Duration = Duration::from_millis(1);

    let mut pause = FIRST_PAUSE;
    while let Ok(permit) = room.clone().acquire_owned().await {
        match listener.accept().await {
            Ok(None) => {}
            Ok(Some((socket, peer))) => {
                pause = FIRST_PAUSE;
                tracing::debug!(?peer, "grpc connection");
                if connections.send(Connection { socket, peer, _permit: permit }).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a grpc connection");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// One accepted connection, which takes one of [`MAX_CONNECTIONS`] places until it is dropped.
pub(crate) struct Connection {
    socket: Socket,
    peer: Peer,
    _permit: OwnedSemaphorePermit,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

/// Calls one method on whichever socket it is.
macro_rules! forward {
    ($self:ident.$method:ident($($argument:expr),*)) => {
        match &mut $self.get_mut().socket {
            Socket::Tcp(stream) => Pin::new(stream).$method($($argument),*),
            Socket::Unix(stream) => Pin::new(stream).$method($($argument),*),
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(self.poll_read(context, into))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        forward!(self.poll_write_vectored(context, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match &self.socket {
            Socket::Tcp(stream) => stream.is_write_vectored(),
            Socket::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self.poll_flush(context))
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self.poll_shutdown(context))
    }
}
