//! The server: its sockets, its services under both their names, reflection and health.

use std::fs;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use castore::{BlobService, DirectoryService};
use nix_compat::signature::PublicKey;
use rpc_client::proto::castore::blob_service_server::BlobServiceServer;
use rpc_client::proto::castore::directory_service_server::DirectoryServiceServer;
use rpc_client::proto::store::path_info_service_server::PathInfoServiceServer;
use rpc_client::proto::{SNIX_DESCRIPTORS, TVIX_DESCRIPTORS};
use store::Signer;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::oneshot;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tower::util::MapRequestLayer;

use crate::blobs::Blobs;
use crate::connection::{Incoming, TrustOf};
use crate::cut_off::CutOff;
use crate::directories::Directories;
use crate::limits::{
    CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, MAX_CALLS_PER_CONNECTION, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES,
    SHUTDOWN_GRACE, STREAM_WINDOW_BYTES,
};
use crate::paths::{PathInfos, Paths};
use crate::snix_names;

/// The names that the services answer to.
pub const SERVICE_NAMES: [&str; 6] = [
    "tvix.castore.v1.BlobService",
    "tvix.castore.v1.DirectoryService",
    "tvix.store.v1.PathInfoService",
    "snix.castore.v1.BlobService",
    "snix.castore.v1.DirectoryService",
    "snix.store.v1.PathInfoService",
];

/// The port gRPC clients of a castore look at.
pub const DEFAULT_PORT: u16 = 8000;

/// What is served.
#[derive(Clone)]
pub struct Services {
    /// Behind BlobService.
    pub blobs: Arc<dyn BlobService>,
    /// Behind DirectoryService.
    pub directories: Arc<dyn DirectoryService>,
    /// Behind PathInfoService.
    pub paths: Arc<dyn PathInfos>,
    /// Keys whose signature makes an untrusted peer's path acceptable: `trusted-public-keys`.
    pub trusted_keys: Vec<PublicKey>,
    /// Signs what is told of paths, beside the signatures they have: `secret-key-files`.
    pub signer: Signer,
    /// Decides whether a peer on the Unix socket is trusted. Peers on TCP never are.
    pub trust_of: TrustOf,
}

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// A loopback address; port 0 takes a free one.
    pub tcp: Option<SocketAddr>,
    /// A socket in the filesystem, open to every local user.
    pub unix: Option<PathBuf>,
}

impl Default for Listen {
    fn default() -> Self {
        Listen { tcp: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT))), unix: None }
    }
}

/// Why the server did not start or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address can be reached from other machines, and there is no TLS to know them by.
    #[error("cannot serve grpc on {address}: only loopback addresses are allowed, since connections are not encrypted")]
    NotLoopback {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The TCP address is taken, or not one of this machine.
    #[error("cannot listen for grpc on {address}: {source}")]
    Tcp {
        /// The address asked for.
        address: SocketAddr,
        /// What the kernel said.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot listen for grpc on {}: {source}", .path.display())]
    Unix {
        /// The socket's path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptors built into the program do not fit together.
    #[error("cannot describe the grpc services: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The server failed while running.
    #[error("grpc server: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// Listens and serves until `shutdown` resolves; then calls under way have [`SHUTDOWN_GRACE`] to finish.
pub async fn serve(
    services: Services,
    listen: Listen,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    Listeners::bind(&listen)?.serve(services, shutdown).await
}

/// Sockets that listen already, so that a caller can say it is ready before it serves.
#[derive(Debug)]
pub struct Listeners {
    tcp: Option<TcpListener>,
    /// With its file, if that is to be removed in the end.
    unix: Option<(UnixListener, Option<SocketFile>)>,
}

impl Listeners {
    /// Opens the sockets; must be called within a tokio runtime.
    pub fn bind(listen: &Listen) -> Result<Listeners, ServeError> {
        let tcp = listen.tcp.map(bind_tcp).transpose()?;
        let unix = listen.unix.as_deref().map(bind_unix).transpose()?;
        Ok(Listeners { tcp, unix: unix.map(|(listener, file)| (listener, Some(file))) })
    }

    /// Takes sockets that listen already, for example those of an earlier server, in the place of its own. Must be called
    /// within a tokio runtime. The file of the Unix socket is not removed in the end.
    ///
    /// # Errors
    /// When they are not what they should be.
    pub fn adopt(
        mut self,
        tcp: Option<std::net::TcpListener>,
        unix: Option<std::os::unix::net::UnixListener>,
    ) -> io::Result<Listeners> {
        if let Some(tcp) = tcp {
            tcp.set_nonblocking(true)?;
            self.tcp = Some(TcpListener::from_std(tcp)?);
        }
        if let Some(unix) = unix {
            unix.set_nonblocking(true)?;
            self.unix = Some((UnixListener::from_std(unix)?, None));
        }
        Ok(self)
    }

    /// The sockets, to be kept open for a later server; and from now on the Unix socket's file is not removed in the end.
    pub fn share(&mut self) -> (Option<BorrowedFd<'_>>, Option<BorrowedFd<'_>>) {
        if let Some((_, file)) = &mut self.unix
            && let Some(file) = file.take()
        {
            file.leave();
        }
        (self.tcp.as_ref().map(AsFd::as_fd), self.unix.as_ref().map(|(unix, _)| unix.as_fd()))
    }

    /// The TCP address, with the port that was taken.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref()?.local_addr().ok()
    }

    /// Serves until `shutdown` resolves; then calls under way have [`SHUTDOWN_GRACE`] to finish.
    pub async fn serve(self, services: Services, shutdown: impl Future<Output = ()> + Send) -> Result<(), ServeError> {
        let (unix, _socket_file) = self.unix.unzip();
        let incoming = Incoming::new(self.tcp, unix, services.trust_of.clone());
        let routes = routes(services).await?;

        let (stopping, stopped) = oneshot::channel();
        let serving = Server::builder()
            .layer(MapRequestLayer::new(|request| CutOff::watch(snix_names::to_tvix(request))))
            .max_concurrent_streams(MAX_CALLS_PER_CONNECTION)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, async {
                shutdown.await;
                let _ = stopping.send(());
            });
        let out_of_patience = async {
            // The sender goes unused only when serving ended by itself, and then this is not awaited any more.
            let _ = stopped.await;
            tokio::time::sleep(SHUTDOWN_GRACE).await;
        };
        tokio::select! {
            served = serving => Ok(served?),
            () = out_of_patience => Ok(()),
        }
    }
}

async fn routes(services: Services) -> Result<Routes, ServeError> {
    let Services { blobs, directories, paths, trusted_keys, signer, trust_of: _ } = services;
    // For clients that ask for it; what they send is taken as it is only.
    let zstd = CompressionEncoding::Zstd;
    let blobs_service = BlobServiceServer::new(Blobs::new(blobs)).send_compressed(zstd);
    let directories_service = DirectoryServiceServer::new(Directories::new(directories)).send_compressed(zstd);
    let paths_service = PathInfoServiceServer::new(Paths::new(paths, trusted_keys, signer));

    let (health, health_service) = tonic_health::server::health_reporter();
    for name in SERVICE_NAMES {
        health.set_service_status(name, ServingStatus::Serving).await;
    }

    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(TVIX_DESCRIPTORS)
            .register_encoded_file_descriptor_set(SNIX_DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Ok(Routes::new(blobs_service.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(directories_service.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(paths_service.max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(health_service)
        .add_service(described().build_v1()?)
        .add_service(described().build_v1alpha()?)
        .prepare())
}

fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ServeError> {
    if !address.ip().is_loopback() {
        return Err(ServeError::NotLoopback { address });
    }
    let bind = || {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener)
    };
    bind().map_err(|source| ServeError::Tcp { address, source })
}

fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), ServeError> {
    /// Who may do what is decided by the peer's credentials, not by who may open the socket.
    const MODE: u32 = 0o666;

    let bind = || {
        remove_stale_socket(path)?;
        let listener = UnixListener::bind(path)?;
        let file = SocketFile(path.to_owned());
        fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
        Ok((listener, file))
    };
    bind().map_err(|source| ServeError::Unix { path: path.to_owned(), source })
}

/// Removes the socket that a process left when it was killed. One that somebody listens on stays, and so does
/// whatever is not a socket: binding then fails.
fn remove_stale_socket(path: &Path) -> io::Result<()> {
    // A regular file refuses connections, too.
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match StdUnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}

/// A socket in the filesystem, removed when the server ends.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl SocketFile {
    /// Lets it be.
    fn leave(mut self) {
        self.0 = PathBuf::new();
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = fs::remove_file(&self.0)
        {
            tracing::debug!(path = %self.0.display(), %error, "the grpc socket was not there to be removed");
        }
    }
}
