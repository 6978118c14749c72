//! The socket, its connections, and their end.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::Answering;
use crate::cache::Served;
use crate::limits::{Limits, MAX_BUFFER_BYTES, MAX_HEADER_BYTES, MAX_HEADERS, SHUTDOWN_GRACE};
use crate::pace::Paced;

/// The address is taken, or not one of this machine.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for http on {address}: {source}")]
pub struct ListenError {
    /// The address asked for.
    pub address: SocketAddr,
    /// What the kernel said.
    pub source: io::Error,
}

/// A socket that listens already, so that a caller can say it is ready before it serves.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
}

impl Server {
    /// Listens; port 0 takes a free one. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`ListenError`].
    pub fn bind(address: SocketAddr) -> Result<Self, ListenError> {
        let bind = || Self::adopt(std::net::TcpListener::bind(address)?);
        bind().map_err(|source| ListenError { address, source })
    }

    /// Takes a socket that listens already, for example that of an earlier server. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When it is not what it should be.
    pub fn adopt(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: TcpListener::from_std(listener)? })
    }

    /// The address, with the port that was taken.
    ///
    /// # Errors
    /// The kernel's.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The socket, to be kept open for a later server.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Serves until `shutdown` resolves; then answers under way have [`SHUTDOWN_GRACE`] to finish.
    pub async fn serve(self, served: Served, limits: Limits, shutdown: impl Future<Output = ()> + Send) {
        let answering = Arc::new(Answering::new(served, &limits));
        let stop = CancellationToken::new();
        // What is left in the end is dropped with its tasks.
        let cut = CancellationToken::new();
        let _cut_in_the_end = cut.clone().drop_guard();
        let connections = TaskTracker::new();
        let accepting = async {
            let room = Arc::new(Semaphore::new(limits.max_connections));
            while let Ok(place) = room.clone().acquire_owned().await {
                let stream = accept(&self.listener).await;
                let (answering, limits, stop) = (answering.clone(), limits.clone(), stop.clone());
                let connection = cut.clone().run_until_cancelled_owned(async move {
                    converse(stream, answering, &limits, stop).await;
                    drop(place);
                });
                connections.spawn(connection);
            }
        };
        tokio::select! {
            () = accepting => {}
            () = answering.forget_old() => {}
            () = shutdown => {}
        }
        stop.cancel();
        connections.close();
        let _ = tokio::time::timeout(SHUTDOWN_GRACE, connections.wait()).await;
    }
}

/// The next connection. A failing accept is a client that went away or a shortage (of file descriptors) that may pass.
async fn accept(listener: &TcpListener) -> TcpStream {
    const LONGEST_PAUSE: Duration = Duration::from_secs(1);
    const FIRST_PAUSE: Duration = Duration::from_millis(1);

    let mut pause = FIRST_PAUSE;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                tracing::debug!(%peer, "http connection");
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an http connection");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Answers one request after the other until the client, a time-out or `stop` ends the connection.
async fn converse(stream: TcpStream, answering: Arc<Answering>, limits: &Limits, stop: CancellationToken) {
    // Only costs time where it fails.
    let _ = stream.set_nodelay(true);
    let stream = TokioIo::new(Paced::new(stream, limits.write_time));
    let answer = service_fn(move |request| {
        let answering = answering.clone();
        async move { Ok::<_, Infallible>(answering.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.request_time)
        .max_buf_size(MAX_BUFFER_BYTES)
        .max_header_size(MAX_HEADER_BYTES)
        .max_headers(MAX_HEADERS)
        .serve_connection(stream, answer);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an http connection broke off");
    }
}
