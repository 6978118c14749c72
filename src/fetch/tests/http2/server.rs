//! A server on the loopback interface that counts its connections.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

/// Length of the large file: more than comes over HTTP/2 without being asked for.
pub(crate) const LARGE: usize = 3 << 20;
/// Bytes that it lets come.
const WINDOW: u32 = 64 << 10;

pub(crate) fn large() -> Vec<u8> {
    (0..LARGE).map(|i| (i * i / 7) as u8).collect()
}

type Body = BoxBody<Bytes, std::convert::Infallible>;

#[derive(Default)]
struct Seen {
    connections: AtomicUsize,
    versions: Mutex<BTreeMap<String, usize>>,
    /// The last upload: the length that was told, and what came.
    taken: Mutex<Option<(u64, Vec<u8>)>>,
}

pub(crate) struct Server {
    address: SocketAddr,
    /// The file with its certificate.
    pub(crate) certificate: String,
    seen: Arc<Seen>,
    _runtime: Runtime,
    _dir: tempfile::TempDir,
}

impl Server {
    /// One that offers these protocols in TLS.
    pub(crate) fn start(offered: &[&str]) -> Self {
        let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let certificate = dir.path().join("certificate");
        std::fs::write(&certificate, own.cert.pem()).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()));
        let mut tls = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        tls.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
        let runtime = Runtime::new().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (seen, tls) = (Arc::<Seen>::default(), TlsAcceptor::from(Arc::new(tls)));
        let all = seen.clone();
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                all.connections.fetch_add(1, Ordering::SeqCst);
                let (all, tls) = (all.clone(), tls.clone());
                tokio::spawn(async move {
                    // Who does not like the certificate goes away.
                    let Ok(stream) = tls.accept(stream).await else { return };
                    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let service = service_fn(move |request| answer(all.clone(), request));
                    let stream = TokioIo::new(stream);
                    let _ = if is_http2 {
                        let mut http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let http2 = http2.initial_stream_window_size(WINDOW);
                        http2.serve_connection(stream, service).await
                    } else {
                        hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await
                    };
                });
            }
        });
        let certificate = certificate.to_str().unwrap().to_owned();
        Self { address, certificate, seen, _runtime: runtime, _dir: dir }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.address.port())
    }

    pub(crate) fn connections(&self) -> usize {
        self.seen.connections.load(Ordering::SeqCst)
    }

    /// How many requests came in which version.
    pub(crate) fn versions(&self) -> Vec<(String, usize)> {
        self.seen.versions.lock().unwrap().clone().into_iter().collect()
    }

    pub(crate) fn asked(&self) -> usize {
        self.seen.versions.lock().unwrap().values().sum()
    }

    pub(crate) fn taken(&self) -> Option<(u64, Vec<u8>)> {
        self.seen.taken.lock().unwrap().take()
    }
}

async fn answer(seen: Arc<Seen>, request: Request<Incoming>) -> hyper::Result<Response<Body>> {
    *seen.versions.lock().unwrap().entry(format!("{:?}", request.version())).or_default() += 1;
    let path = request.uri().path().to_owned();
    let mut response = Response::new(full(b"hello".to_vec()));
    match path.as_str() {
        "/small" => {}
        "/large" => *response.body_mut() = full(large()),
        // Half of what is promised.
        "/half" => {
            let (sender, frames) = tokio::sync::mpsc::channel(1);
            let _ = sender.send(Bytes::from_static(b"half")).await;
            *response.body_mut() = Half(frames, sender).boxed();
        }
        "/put" | "/put-slowly" => {
            let length = request.headers()[hyper::header::CONTENT_LENGTH].to_str().unwrap().parse().unwrap();
            let (mut body, mut taken) = (request.into_body(), Vec::new());
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame?.into_data() else { continue };
                taken.extend_from_slice(&data);
                if path == "/put-slowly" {
                    // 2 MiB in a second.
                    tokio::time::sleep(Duration::from_micros(488) * u32::try_from(data.len() >> 10).unwrap()).await;
                }
            }
            *seen.taken.lock().unwrap() = Some((length, taken));
        }
        "/refuse" => *response.status_mut() = StatusCode::FORBIDDEN,
        _ => std::future::pending().await,
    }
    Ok(response)
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(bytes.into()).boxed()
}

/// What comes, without an end.
#[allow(dead_code, reason = "the sender is kept, so that there is no end")]
struct Half(tokio::sync::mpsc::Receiver<Bytes>, tokio::sync::mpsc::Sender<Bytes>);

impl hyper::body::Body for Half {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}
