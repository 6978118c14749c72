//! Requests on their way: connections, proxies, TLS and time limits. HTTP/2 with servers that offer it in TLS, all requests to
//! one on the same connection; else HTTP/1.1, with as many connections as there are requests at once.
//!
//! Who asks is blocked. Connections live on a few threads of their own, which carry bytes and do nothing else.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::pin::{Pin, pin};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::header::{AsHeaderName, HeaderMap};
use reqwest::{Body, Client, Proxy, RequestBuilder, Response, StatusCode, redirect};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use url::Url;

use crate::client::Upload;
use crate::download::Download;
use crate::error::Trouble;
use crate::first::FirstRequests;
use crate::network::NetworkError;
use crate::proxy::proxy_for;

/// Threads that carry the bytes of all connections, on machines with as many processors.
const MAX_THREADS: usize = 4;
/// Connections to one server that are kept for the next request: more than are asked at once, since a new one costs round
/// trips.
const KEPT_CONNECTIONS: usize = 128;
/// For how long they are kept: servers close them as well, and a request to one that is just closing fails.
pub(crate) const KEPT_FOR: Duration = Duration::from_secs(15);
/// Bytes of one file that HTTP/2 lets come before they are asked for.
const STREAM_WINDOW: u32 = 2 << 20;
/// The same for all files that come over one connection: for as many as stand still at once, so that none holds up another.
const CONNECTION_WINDOW: u32 = 64 * STREAM_WINDOW;
/// Bytes of a file that is sent, taken at once; and how many such pieces wait for the network.
const PIECE: usize = 64 * 1024;
const WAITING_PIECES: usize = 4;
/// Some servers treat browsers and download tools differently, so that this begins as stock's does.
const USER_AGENT: &str = concat!("curl/8 castored/", env!("CARGO_PKG_VERSION"));

/// Made when the first request is: builders that download nothing have no threads.
static RUNTIME: LazyLock<Option<Runtime>> = LazyLock::new(|| {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(threads).thread_name("fetch").enable_all().build();
    runtime.inspect_err(|error| tracing::error!(%error, "cannot start the threads of downloads")).ok()
});

/// Sends requests as the settings say.
pub(crate) struct Transport {
    settings: Arc<Download>,
    tls: Result<ClientConfig, rustls::Error>,
    /// One for each proxy that was needed, and one for none: each has connections that are used again.
    clients: Mutex<Vec<(Option<String>, Client)>>,
    first: FirstRequests,
}

impl Transport {
    pub(crate) fn new(settings: Arc<Download>) -> Self {
        let tls = tls(&settings);
        Self { settings, tls, clients: Mutex::default(), first: FirstRequests::default() }
    }

    /// Asks for what is at `url`. Blocks until the answer begins.
    pub(crate) fn get(&self, url: &Url, headers: HeaderMap) -> Result<Answer, Trouble> {
        let request = self.client(url)?.get(url.clone()).headers(headers);
        let limit = seconds(self.settings.stalled_timeout);
        let send = async {
            if self.settings.http2 && url.scheme() == "https" {
                self.first.send(url, within(limit, request.send())).await
            } else {
                within(limit, request.send()).await
            }
        };
        Ok(Answer { response: runtime()?.block_on(send)?, limit })
    }

    /// Sends `body` to `url`. Blocks until it is answered.
    pub(crate) fn put(&self, url: &Url, headers: HeaderMap, body: &Upload<'_>) -> Result<Answer, Trouble> {
        let request = self.client(url)?.put(url.clone()).headers(headers);
        let limit = seconds(self.settings.stalled_timeout);
        let response = match body {
            Upload::Text(text) => runtime()?.block_on(within(limit, request.body((*text).to_owned()).send()))?,
            Upload::File(file) => runtime()?.block_on(send_file(request, file, limit))?,
        };
        Ok(Answer { response, limit })
    }

    fn client(&self, url: &Url) -> Result<Client, Trouble> {
        let proxy = proxy_for(url, &self.settings.proxies);
        let mut clients = self.clients.lock();
        if let Some((_, client)) = clients.iter().find(|(known, _)| known.as_deref() == proxy) {
            return Ok(client.clone());
        }
        let client = self.build(proxy)?;
        clients.push((proxy.map(str::to_owned), client.clone()));
        Ok(client)
    }

    fn build(&self, proxy: Option<&str>) -> Result<Client, NetworkError> {
        let user_agent = [USER_AGENT, &self.settings.user_agent_suffix].join(" ");
        let mut builder = Client::builder()
            .user_agent(user_agent.trim_end())
            .redirect(redirect::Policy::none())
            // None but the one that was chosen.
            .no_proxy()
            .tls_backend_preconfigured(self.tls.clone()?)
            .pool_max_idle_per_host(KEPT_CONNECTIONS)
            .pool_idle_timeout(KEPT_FOR)
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW);
        if let Some(limit) = seconds(self.settings.connect_timeout) {
            builder = builder.connect_timeout(limit);
        }
        if let Some(proxy) = proxy {
            builder = builder.proxy(Proxy::all(proxy)?);
        }
        Ok(builder.build()?)
    }
}

/// An answer whose body is still to come.
pub(crate) struct Answer {
    response: Response,
    limit: Option<Duration>,
}

impl Answer {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// A header's value, if it is text.
    pub(crate) fn header(&self, name: impl AsHeaderName) -> Option<&str> {
        self.response.headers().get(name)?.to_str().ok()
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// How long the body is, if the server says so.
    pub(crate) fn content_length(&self) -> Option<u64> {
        self.response.content_length()
    }

    /// What comes next of the body; `None` at its end. Blocks.
    pub(crate) fn piece(&mut self) -> Result<Option<Bytes>, NetworkError> {
        runtime()?.block_on(within(self.limit, self.response.chunk()))
    }
}

fn runtime() -> Result<&'static Runtime, NetworkError> {
    RUNTIME.as_ref().ok_or(NetworkError::Threads)
}

async fn within<T>(limit: Option<Duration>, work: impl Future<Output = reqwest::Result<T>>) -> Result<T, NetworkError> {
    let Some(limit) = limit else { return Ok(work.await?) };
    Ok(tokio::time::timeout(limit, work).await.map_err(|_| NetworkError::Stalled(limit))??)
}

fn seconds(setting: u64) -> Option<Duration> {
    (setting != 0).then(|| Duration::from_secs(setting))
}

/// Certificates that nobody can read are passed over; a server that one of them is needed for is refused.
fn tls(settings: &Download) -> Result<ClientConfig, rustls::Error> {
    let certificates = CertificateDer::pem_slice_iter(settings.certificates.as_bytes()).filter_map(Result::ok);
    let mut trusted = RootCertStore::empty();
    trusted.add_parsable_certificates(certificates);
    let mut tls = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(trusted)
        .with_no_client_auth();
    // What is offered to a server, the preferred one first.
    let offered: &[&[u8]] = if settings.http2 { &[b"h2", b"http/1.1"] } else { &[b"http/1.1"] };
    tls.alpn_protocols = offered.iter().map(|name| name.to_vec()).collect();
    Ok(tls)
}

/// Sends a file from its beginning, read by this thread as the network takes it.
async fn send_file(request: RequestBuilder, file: &File, limit: Option<Duration>) -> Result<Response, Trouble> {
    let mut file = file;
    file.rewind().map_err(Trouble::Source)?;
    let mut left = file.metadata().map_err(Trouble::Source)?.len();
    let (sender, pieces) = mpsc::channel(WAITING_PIECES);
    let mut answer = pin!(request.body(Body::wrap(Outgoing { pieces, left })).send());
    // Until all is read, or the connection wants no more.
    let mut more = left > 0;
    loop {
        let step = async {
            tokio::select! {
                biased;
                answer = &mut answer => Ok(Step::Answered(answer?)),
                room = sender.reserve(), if more => Ok(Step::Room(room.ok())),
            }
        };
        match within(limit, step).await? {
            Step::Answered(response) => return Ok(response),
            Step::Room(None) => more = false,
            Step::Room(Some(room)) => {
                let piece = read_piece(&mut file, left)?;
                left -= piece.len() as u64;
                more = left > 0;
                room.send(piece);
            }
        }
    }
}

/// What happens to a file on its way.
enum Step<'a> {
    Answered(Response),
    /// For a piece, unless nobody takes any.
    Room(Option<mpsc::Permit<'a, Bytes>>),
}

fn read_piece(file: &mut &File, left: u64) -> Result<Bytes, Trouble> {
    let mut piece = vec![0; PIECE.min(usize::try_from(left).unwrap_or(PIECE))];
    let length = file.read(&mut piece).map_err(Trouble::Source)?;
    if length == 0 {
        return Err(Trouble::Source(io::ErrorKind::UnexpectedEof.into()));
    }
    piece.truncate(length);
    Ok(piece.into())
}

/// A file on its way out.
struct Outgoing {
    pieces: mpsc::Receiver<Bytes>,
    /// Bytes that are still to be sent.
    left: u64,
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<http_body::Frame<Bytes>>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        self.pieces.poll_recv(context).map(|piece| match piece {
            Some(piece) => {
                self.left = self.left.saturating_sub(piece.len() as u64);
                Some(Ok(http_body::Frame::data(piece)))
            }
            None => Some(Err(io::ErrorKind::UnexpectedEof.into())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}
