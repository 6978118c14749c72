//! Responses: which, and with what headers.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use nix_compat::hash::{NarHash, sha256};
use nix_compat::nixbase32;
use nix_compat::store_path::StorePath;
use store::Entry;
use store::view::StoreView as _;
use tokio::sync::Semaphore;

use crate::cache::Served;
use crate::conditions::{self, Part};
use crate::failure::Failure;
use crate::limits::{Limits, MAX_LOOKUPS};
use crate::listing;
use crate::page::{self, Found};
use crate::push::Pushing;
use crate::render::{Body, Pieces, Renderers};
use crate::target::{PathDigest, Target};

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
/// No page needs anything but itself.
const PAGE_POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
/// A NAR is compressed anew for each client that wants it so: speed counts.
const ZSTD_LEVEL: i32 = 1;

/// How a NAR is sent.
#[derive(Clone, Debug)]
enum Form {
    Zstd,
    Plain(Range<u64>),
}

/// Answers all requests.
pub(crate) struct Answering {
    served: Arc<Served>,
    lookups: Arc<Semaphore>,
    renderers: Renderers,
    pushing: Option<Arc<Pushing>>,
}

impl Answering {
    pub(crate) fn new(served: Served, limits: &Limits) -> Self {
        let pushers = served.pushers.clone();
        let pushing = pushers.map(|tokens| {
            Arc::new(Pushing::new(served.store.clone(), tokens, served.room.clone(), limits.request_time))
        });
        Self {
            pushing,
            served: Arc::new(served),
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            renderers: Renderers::new(limits.max_renderings),
        }
    }

    /// What has to be done now and then for as long as there is a server; never ends.
    pub(crate) async fn forget_old(&self) {
        match &self.pushing {
            Some(pushing) => pushing.forget_old().await,
            None => std::future::pending().await,
        }
    }

    pub(crate) async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        match (request.method(), &self.pushing) {
            (&Method::GET | &Method::HEAD, _) => self.shown(&request).await,
            (&Method::PUT, Some(pushing)) => pushed(pushing, request).await,
            (_, pushing) => {
                let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "this cache can only be read");
                put(&mut response, header::ALLOW, if pushing.is_some() { "GET, HEAD, PUT" } else { "GET, HEAD" });
                response
            }
        }
    }

    /// What a request that changes nothing asks for.
    async fn shown(&self, request: &Request<Incoming>) -> Response<Body> {
        let uri = request.uri();
        let Some(target) = Target::parse(uri.path(), uri.query()) else { return self.uploaded(request).await };
        let answered = match target {
            Target::CacheInfo => Ok(text(request, "text/x-nix-cache-info", Some(self.served.cache_info()))),
            Target::NarInfo(path) => self
                .look(move |served| Ok(served.narinfo(&path)?))
                .await
                .map(|found| text(request, "text/x-nix-narinfo", found)),
            Target::Realisation(id) => {
                self.look(move |served| Ok(served.realisation(&id)?)).await.map(|found| text(request, JSON, found))
            }
            Target::Home => Ok(html(request, Some(page::home(&self.served, &host(request))))),
            Target::Page(path) => {
                let host = host(request);
                self.look(move |served| Ok(page::of(served, &path, &host)?)).await.map(|found| html(request, found))
            }
            Target::Find(typed) => self.look(move |served| Ok(page::find(served, &typed)?)).await.map(found),
            Target::Nar { path, nar_hash, zstd } => self.nar(request, path, nar_hash, zstd).await,
            Target::Listing(path) => self.listing(request, path).await,
            Target::Log(drv) => self.log(request, drv).await,
        };
        answered.unwrap_or_else(|error| failed(&error, uri.path()))
    }

    /// Of a file that is only here as the contents of a path, or not even that: a pusher asks whether it has to upload it.
    async fn uploaded(&self, request: &Request<Incoming>) -> Response<Body> {
        let Some(pushing) = self.pushing.clone().filter(|_| request.method() == Method::HEAD) else { return missing() };
        let path = request.uri().path().to_owned();
        match self.look(move |_| Ok(pushing.has(&path)?)).await {
            Ok(true) => response(StatusCode::OK, "application/x-nix-nar"),
            Ok(false) => missing(),
            Err(error) => failed(&error, request.uri().path()),
        }
    }

    async fn log(&self, request: &Request<Incoming>, drv: StorePath) -> Result<Response<Body>, Failure> {
        let what = format!("the log of {drv}");
        let Some(mut log) = self.look(move |served| Ok(served.log(&drv)?)).await? else { return Ok(missing()) };
        let copy = move |out: &mut Pieces| Ok(io::copy(&mut log, out).map(drop)?);
        self.made(request, response(StatusCode::OK, TEXT), what, copy).await
    }

    async fn nar(
        &self,
        request: &Request<Incoming>,
        path: PathDigest,
        nar_hash: NarHash,
        zstd: bool,
    ) -> Result<Response<Body>, Failure> {
        let found = self.look(move |served| Ok(served.entry(&path)?)).await?;
        let Some(entry) = found.filter(|entry| entry.info.nar_hash == nar_hash) else { return Ok(missing()) };
        let headers = request.headers();
        let coded = !zstd && !headers.contains_key(header::RANGE) && conditions::takes_zstd(headers);
        let hash = nixbase32::encode(nar_hash.as_bytes());
        let etag = if zstd || coded { format!("\"{hash}-zstd\"") } else { format!("\"{hash}\"") };
        if conditions::is_known(headers, &etag) {
            return Ok(unchanged(&etag));
        }
        let size = entry.info.nar_size;
        let mut head = response(StatusCode::OK, if zstd { "application/zstd" } else { "application/x-nix-nar" });
        put(&mut head, header::ETAG, &etag);
        let form = if zstd || coded {
            Form::Zstd
        } else {
            put(&mut head, header::ACCEPT_RANGES, "bytes");
            match conditions::part(headers, &etag, size) {
                Part::Whole => Form::Plain(0..size),
                Part::Bytes(part) => {
                    *head.status_mut() = StatusCode::PARTIAL_CONTENT;
                    put(&mut head, header::CONTENT_RANGE, &format!("bytes {}-{}/{size}", part.start, part.end - 1));
                    Form::Plain(part)
                }
                Part::Unsatisfiable => {
                    let mut response = plain(StatusCode::RANGE_NOT_SATISFIABLE, "there are no such bytes");
                    put(&mut response, header::CONTENT_RANGE, &format!("bytes */{size}"));
                    return Ok(response);
                }
            }
        };
        if !zstd {
            put(&mut head, header::VARY, "accept-encoding");
        }
        if coded {
            put(&mut head, header::CONTENT_ENCODING, "zstd");
        }
        if let Form::Plain(part) = &form {
            put(&mut head, header::CONTENT_LENGTH, &(part.end - part.start).to_string());
        }
        let served = self.served.clone();
        let what = format!("the NAR of {}", entry.info.path);
        self.made(request, head, what, move |out| write_nar(&served, &entry, form, out)).await
    }

    async fn listing(&self, request: &Request<Incoming>, path: PathDigest) -> Result<Response<Body>, Failure> {
        let Some(entry) = self.look(move |served| Ok(served.entry(&path)?)).await? else { return Ok(missing()) };
        // The tree is what the NAR's hash is of.
        let etag = format!("\"{}-ls\"", nixbase32::encode(entry.info.nar_hash.as_bytes()));
        if conditions::is_known(request.headers(), &etag) {
            return Ok(unchanged(&etag));
        }
        let mut head = response(StatusCode::OK, JSON);
        put(&mut head, header::ETAG, &etag);
        let served = self.served.clone();
        let what = format!("the listing of {}", entry.info.path);
        self.made(request, head, what, move |out| listing::write(&served.store, &entry.node, out)).await
    }

    /// A response whose body `work` makes while it is sent.
    async fn made(
        &self,
        request: &Request<Incoming>,
        head: Response<Body>,
        what: String,
        work: impl FnOnce(&mut Pieces) -> Result<(), Failure> + Send + 'static,
    ) -> Result<Response<Body>, Failure> {
        if request.method() == Method::HEAD {
            return Ok(head);
        }
        let body = self.renderers.start(what, work).await?;
        Ok(head.map(|_| body))
    }

    /// Has a thread that may block look into the store.
    async fn look<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Served) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let failed = |error: &dyn std::fmt::Display| Failure::Thread(error.to_string());
        let place = self.lookups.clone().acquire_owned().await.map_err(|e| failed(&e))?;
        let served = self.served.clone();
        let looking = move || {
            // Also when nobody waits any more.
            let _place = place;
            work(&served)
        };
        tokio::task::spawn_blocking(looking).await.map_err(|e| failed(&e))?
    }
}

/// Takes what a pusher sends, if it is one.
async fn pushed(pushing: &Pushing, request: Request<Incoming>) -> Response<Body> {
    if !pushing.admits(request.headers()) {
        let mut response = plain(StatusCode::UNAUTHORIZED, "a push token is needed, as a password or a bearer's");
        put(&mut response, header::WWW_AUTHENTICATE, "Basic realm=\"castored\"");
        return response;
    }
    let path = request.uri().path().to_owned();
    match pushing.take(request).await {
        None => {
            let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "this cannot be written");
            put(&mut response, header::ALLOW, "GET, HEAD");
            response
        }
        Some(Ok(())) => plain(StatusCode::CREATED, "taken"),
        Some(Err(error)) => {
            tracing::warn!(%error, path, "cannot take what is pushed over http");
            plain(error.status(), &error.to_string())
        }
    }
}

fn failed(error: &Failure, path: &str) -> Response<Body> {
    tracing::error!(%error, path, "cannot answer over http");
    plain(StatusCode::INTERNAL_SERVER_ERROR, "the server failed; its log says more")
}

fn write_nar(served: &Served, entry: &Entry, form: Form, out: &mut Pieces) -> Result<(), Failure> {
    let store = &served.store;
    let written = match form {
        Form::Plain(part) => store.write_nar_part(&entry.node, part, out).map_err(Failure::from),
        Form::Zstd => {
            let mut encoder = zstd::stream::write::Encoder::new(&mut *out, ZSTD_LEVEL)?;
            let written = store.write_nar_of(&entry.node, &mut encoder).map_err(Failure::from);
            written.and_then(|()| Ok(encoder.finish().map(drop)?))
        }
    };
    // What was deleted meanwhile is not damaged.
    if written.is_err() && !out.is_abandoned() && store.is_valid(&entry.info.path)? {
        store.report_damage(&entry.info.path);
    }
    written
}

fn response(status: StatusCode, kind: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::Whole(Bytes::new()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    put(&mut response, header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    response
}

/// A text that is held in memory, with what tells it from others.
fn text(request: &Request<Incoming>, kind: &'static str, found: Option<String>) -> Response<Body> {
    let Some(text) = found else { return missing() };
    let etag = format!("\"{}\"", nixbase32::encode(&sha256(text.as_bytes())));
    if conditions::is_known(request.headers(), &etag) {
        return unchanged(&etag);
    }
    let mut response = response(StatusCode::OK, kind);
    put(&mut response, header::ETAG, &etag);
    // Of HEAD the server leaves out the body, but not its length.
    *response.body_mut() = Body::Whole(text.into());
    response
}

fn html(request: &Request<Incoming>, found: Option<String>) -> Response<Body> {
    let mut response = text(request, HTML, found);
    put(&mut response, header::CONTENT_SECURITY_POLICY, PAGE_POLICY);
    put(&mut response, header::REFERRER_POLICY, "no-referrer");
    put(&mut response, header::VARY, "host");
    response
}

/// Sends who has typed something to its page.
fn found(found: Found) -> Response<Body> {
    match found {
        Found::At(path) => {
            let mut response = plain(StatusCode::SEE_OTHER, "it is here");
            put(&mut response, header::LOCATION, &page::href(&path));
            response
        }
        Found::Nowhere => missing(),
    }
}

/// As what the client has reached this machine.
fn host(request: &Request<Incoming>) -> String {
    request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned()
}

fn plain(status: StatusCode, text: &str) -> Response<Body> {
    let mut response = response(status, TEXT);
    *response.body_mut() = Body::Whole(format!("{text}\n").into());
    response
}

fn missing() -> Response<Body> {
    plain(StatusCode::NOT_FOUND, "there is no such thing here")
}

fn unchanged(etag: &str) -> Response<Body> {
    let mut response = Response::new(Body::Whole(Bytes::new()));
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    put(&mut response, header::ETAG, etag);
    response
}

fn put(response: &mut Response<Body>, name: HeaderName, value: &str) {
    // All that is put comes from here and is visible ASCII.
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}
