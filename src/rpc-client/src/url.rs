//! Where a peer is: `grpc+http://host:port`, `grpc+https://host:port`, `grpc+unix:///path/of/socket`.

use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::limits::{CONNECTION_WINDOW_BYTES, KEEPALIVE_INTERVAL, STREAM_WINDOW_BYTES};

/// What every URL of a peer begins with.
const PREFIX: &str = "grpc+";
/// How long it may take to connect.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a peer may take to say that it is still there.
const KEEPALIVE_PATIENCE: Duration = Duration::from_secs(10);

/// Why a URL names no peer.
#[derive(Debug, thiserror::Error)]
pub enum UrlError {
    /// It begins with something else.
    #[error(
        "'{0}' is no address of a gRPC store: it should begin with grpc+http://, grpc+https:// or grpc+unix://, as in \
         grpc+http://127.0.0.1:8000 or grpc+unix:///nix/var/nix/daemon-socket/grpc"
    )]
    Scheme(String),
    /// What follows is no address.
    #[error("cannot make a connection of '{url}': {source}")]
    Address {
        /// The URL.
        url: String,
        /// What is wrong with it.
        source: tonic::transport::Error,
    },
}

/// Opens a channel to the peer at `url`, which connects when it is first used, and again when the connection is lost.
/// `authorities` are the certificates (PEM) by which a peer behind `grpc+https` is known. Must be called in a runtime.
///
/// # Errors
/// When the URL is none.
pub fn open(url: &str, authorities: &[u8]) -> Result<Channel, UrlError> {
    open_within(url, authorities, CONNECT_PATIENCE)
}

/// The same; connecting may take as long as `patience`.
///
/// # Errors
/// When the URL is none.
pub fn open_within(url: &str, authorities: &[u8], patience: Duration) -> Result<Channel, UrlError> {
    let address = url.strip_prefix(PREFIX).filter(|address| {
        ["http://", "https://", "unix:/"]
            .iter()
            .any(|scheme| address.strip_prefix(scheme).is_some_and(|rest| !rest.trim_matches('/').is_empty()))
    });
    let address = address.ok_or_else(|| UrlError::Scheme(url.to_owned()))?;
    let wrong = |source| UrlError::Address { url: url.to_owned(), source };
    let mut endpoint = Endpoint::from_shared(address.to_owned()).map_err(wrong)?;
    if address.starts_with("https://") {
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(authorities));
        endpoint = endpoint.tls_config(tls).map_err(wrong)?;
    }
    Ok(tuned(endpoint).connect_timeout(patience).connect_lazy())
}

/// Bounds on what a peer may send ahead, and on how long it may be silent.
pub(crate) fn tuned(endpoint: Endpoint) -> Endpoint {
    endpoint
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .connect_timeout(CONNECT_PATIENCE)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_PATIENCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_three_forms_are_known_and_nothing_else() {
        for url in [
            "grpc+http://127.0.0.1:8000",
            "grpc+http://[::1]:8000",
            "grpc+https://store.example",
            "grpc+unix:///run/castored/grpc",
            "grpc+unix:/run/castored/grpc",
        ] {
            assert!(open(url, b"").is_ok(), "{url}");
        }
        for url in ["", "grpc+", "http://127.0.0.1:8000", "grpc+ftp://a", "grpc+http://", "grpc+unix://", "unix:///a"] {
            assert!(matches!(open(url, b""), Err(UrlError::Scheme(_))), "{url}");
        }
        assert!(matches!(open("grpc+http://a b", b""), Err(UrlError::Address { .. })));
    }
}
