//! Downloads over HTTP, piece by piece.
//!
//! Servers are not trusted: redirections, headers and bodies all have bounds, and passwords go to the host they are for,
//! never to where it redirects. **Certificates are always verified** (CVE-2024-47174 was a `builtin:fetchurl` that did
//! not, because a hash protects the contents; but not the passwords, nor the URL).

use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use data_encoding::BASE64;
use parking_lot::Mutex;
use ureq::http::{Response, StatusCode, header};
use ureq::tls::{PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};
use ureq::{Agent, Body, Proxy, RequestBuilder};
use url::Url;

use crate::download::Download;
use crate::error::{DownloadError, Trouble, UploadError};
use crate::forward::ForwardProxy;
use crate::netrc::{Login, login};
use crate::proxy::proxy_for;
use crate::s3::SignedBucket;

/// Redirections followed one after the other: curl's number.
const MAX_REDIRECTS: usize = 10;
/// Longest body of an error that is told.
const MAX_TOLD_BODY: u64 = 1024;
/// Bytes read at once.
const PIECE: usize = 64 * 1024;
/// Time before the second attempt; it doubles with every further one, and up to half of it again is left to chance.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// A server that asks for a longer one is asked again all the same: who waits may have other places to look.
const LONGEST_ASKED: Duration = Duration::from_secs(30);
/// Connections to one server that are kept for the next request: more than are asked at once, since a new one costs round
/// trips.
const KEPT_CONNECTIONS: usize = 128;
/// The same for all servers behind one proxy, or behind none.
const ALL_KEPT_CONNECTIONS: usize = 2 * KEPT_CONNECTIONS;
/// Bytes of what each connection has for what comes, and for what is sent: a request, or a piece of a file.
const INPUT_BUFFER: usize = 64 * 1024;
const OUTPUT_BUFFER: usize = 16 * 1024;
/// Some servers treat browsers and download tools differently, so that this begins as stock's does.
const USER_AGENT: &str = concat!("curl/8 castored/", env!("CARGO_PKG_VERSION"));

/// What a download goes into.
pub trait Sink {
    /// The next piece is the one at `offset`; `expected` is where the file ends, or 0 if nobody knows. Called once for
    /// each attempt that a server answers.
    ///
    /// # Errors
    /// When it cannot go on from there.
    fn begin(&mut self, offset: u64, expected: u64) -> io::Result<()>;

    /// Takes a piece.
    ///
    /// # Errors
    /// Ends the download.
    fn take(&mut self, piece: &[u8]) -> io::Result<()>;

    /// Whether what was taken can be taken back, for a server that can only begin again.
    fn can_restart(&self) -> bool;

    /// Whether anybody still waits for it; if not, nothing is tried again.
    fn is_wanted(&self) -> bool {
        true
    }

    /// Another attempt will be made; the text says why.
    fn retrying(&mut self, _why: &str) {}
}

/// What is put on a server.
#[derive(Clone, Copy, Debug)]
pub enum Upload<'a> {
    /// A small text.
    Text(&'a str),
    /// A whole file, which is not changed meanwhile.
    File(&'a File),
}

/// What is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// All that may go better another time.
    Always,
    /// The same, unless no server could be reached: whoever asks has other places to look.
    IfReached,
}

/// A proxy, and whether it forwards requests: else it is a tunnel.
type Way = (Option<String>, bool);

/// Downloads as the settings say.
pub struct Client {
    settings: Arc<Download>,
    tls: TlsConfig,
    /// One for each proxy that was needed, as a tunnel or to forward requests: each has connections that are used again.
    agents: Mutex<Vec<(Way, Agent)>>,
    /// Requests to it are signed.
    bucket: Option<SignedBucket>,
}

/// What the sink has of a download.
#[derive(Default)]
struct State {
    /// Bytes taken.
    length: u64,
    /// Whether the server can go on from there.
    resumable: bool,
    /// The version of the file, if the server names it.
    tag: Option<String>,
}

impl Client {
    /// A client with these settings.
    pub fn new(settings: Arc<Download>) -> Self {
        let certificates = parse_pem(settings.certificates.as_bytes()).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .root_certs(RootCerts::from(certificates))
            .build();
        Self { settings, tls, agents: Mutex::default(), bucket: None }
    }

    /// The same, that signs its requests to a bucket.
    #[must_use]
    pub fn signing(self, bucket: SignedBucket) -> Self {
        Self { bucket: Some(bucket), ..self }
    }

    /// Downloads what is at `url` into `sink`. Tries again what may go better another time. Blocks.
    ///
    /// # Errors
    /// Says what went wrong at the last attempt.
    pub fn fetch(&self, url: &Url, sink: &mut dyn Sink, retry: Retry) -> Result<(), DownloadError> {
        let failed = |cause| DownloadError { url: without_password(url.as_str()), cause };
        let mut state = State::default();
        let mut attempt = 1;
        loop {
            let Err(cause) = self.attempt(url, sink, &mut state) else { return Ok(()) };
            let again = cause.is_transient()
                && sink.is_wanted()
                && attempt < self.settings.attempts
                && (retry == Retry::Always || !cause.is_unreachable())
                && (state.length == 0 || state.resumable || sink.can_restart());
            let pause = match &cause {
                Trouble::Status { retry_after: Some(asked), .. } => pause(attempt).max(*asked.min(&LONGEST_ASKED)),
                _ => pause(attempt),
            };
            let error = failed(cause);
            if !again {
                return Err(error);
            }
            let from = if state.resumable && state.length > 0 {
                format!(" from offset {}", state.length)
            } else {
                String::new()
            };
            sink.retrying(&format!(
                "{error}; retrying{from} in {} ms (attempt {attempt}/{})",
                pause.as_millis(),
                self.settings.attempts
            ));
            std::thread::sleep(pause);
            attempt += 1;
        }
    }

    fn attempt(&self, url: &Url, sink: &mut dyn Sink, state: &mut State) -> Result<(), Trouble> {
        if !state.resumable {
            state.length = 0;
        }
        let mut response = self.request(url, state)?;
        let status = response.status();
        let continues = status == StatusCode::PARTIAL_CONTENT && starts_at(&response, state.length);
        if !status.is_success() || (status == StatusCode::PARTIAL_CONTENT && !continues) {
            // With an error for an answer the next attempt still goes on where this one wanted to.
            if status == StatusCode::RANGE_NOT_SATISFIABLE || status.is_success() {
                state.resumable = false;
            }
            return Err(refusal(&mut response));
        }
        if !continues {
            state.length = 0;
        }
        let text = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
        state.resumable = continues || text(header::ACCEPT_RANGES) == Some("bytes");
        state.tag = text(header::ETAG).filter(|tag| tag.starts_with('"')).map(str::to_owned);
        let expected = response.body().content_length().map_or(0, |length| state.length.saturating_add(length));

        sink.begin(state.length, expected).map_err(Trouble::Disk)?;
        let mut body = response.body_mut().as_reader();
        let (mut buffer, start, before) = (vec![0; PIECE], Instant::now(), state.length);
        loop {
            let length = body.read(&mut buffer).map_err(|e| Trouble::Network(ureq::Error::Io(e)))?;
            if length == 0 {
                return Ok(());
            }
            sink.take(&buffer[..length]).map_err(Trouble::Disk)?;
            state.length += length as u64;
            self.slow_down(state.length - before, start);
        }
    }

    /// Puts `body` at `url`. Tries again what may go better another time. Redirections are not followed: who is to take an
    /// upload names itself. Blocks.
    ///
    /// # Errors
    /// Says what went wrong at the last attempt.
    pub fn put(&self, url: &Url, body: &Upload<'_>, content_type: &str) -> Result<(), UploadError> {
        let mut attempt = 1;
        loop {
            let Err(cause) = self.put_once(url, body, content_type) else { return Ok(()) };
            if !cause.is_transient() || cause.is_unreachable() || attempt >= self.settings.attempts {
                return Err(UploadError { url: without_password(url.as_str()), cause });
            }
            std::thread::sleep(pause(attempt));
            attempt += 1;
        }
    }

    fn put_once(&self, url: &Url, body: &Upload<'_>, content_type: &str) -> Result<(), Trouble> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(Trouble::Scheme(url.scheme().to_owned()));
        }
        let (agent, proxy) = self.agent(url)?;
        let request = self.authorized(url, agent.put(bare(url).as_str())).header(header::CONTENT_TYPE, content_type);
        let request = at_proxy(proxy.as_ref(), request);
        let mut response = match body {
            Upload::Text(text) => request.send(*text)?,
            Upload::File(file) => {
                let mut file: &File = file;
                file.rewind().map_err(Trouble::Source)?;
                request.send(file)?
            }
        };
        let status = response.status();
        if status.is_success() {
            // Read to its end, so that the connection can be used again.
            let _ = short_body(&mut response);
            return Ok(());
        }
        Err(refusal(&mut response))
    }

    /// Waits until `bytes` may have come since `start`.
    fn slow_down(&self, bytes: u64, start: Instant) {
        if self.settings.speed > 0 {
            let due = Duration::from_secs_f64(bytes as f64 / 1024.0 / self.settings.speed as f64);
            std::thread::sleep(due.saturating_sub(start.elapsed()));
        }
    }

    /// Asks for what is not there yet, wherever the server says that it is.
    fn request(&self, url: &Url, state: &State) -> Result<Response<Body>, Trouble> {
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            if !matches!(url.scheme(), "http" | "https") {
                return Err(Trouble::Scheme(url.scheme().to_owned()));
            }
            let response = self.request_once(&url, state)?;
            let location = response.headers().get(header::LOCATION);
            let Some(location) = location.filter(|_| is_redirection(response.status())) else { return Ok(response) };
            let location = String::from_utf8_lossy(location.as_bytes());
            url = url.join(&location).map_err(Trouble::Url)?;
        }
        Err(Trouble::TooManyRedirects(MAX_REDIRECTS))
    }

    fn request_once(&self, url: &Url, state: &State) -> Result<Response<Body>, Trouble> {
        let (agent, proxy) = self.agent(url)?;
        let signed = self.bucket.as_ref().and_then(|bucket| bucket.sign(url));
        // The signature says who asks; a server refuses to be told twice.
        let mut request = match &signed {
            Some(signed) => agent.get(signed.as_str()),
            None => self.authorized(url, agent.get(bare(url).as_str())),
        };
        request = at_proxy(proxy.as_ref(), request);
        if state.length > 0 {
            request = request.header(header::RANGE, format!("bytes={}-", state.length));
            if let Some(tag) = &state.tag {
                request = request.header(header::IF_RANGE, tag);
            }
        }
        Ok(request.call()?)
    }

    fn authorized<B>(&self, url: &Url, request: RequestBuilder<B>) -> RequestBuilder<B> {
        let Some(Login { user, password }) = self.login(url) else { return request };
        request.header(header::AUTHORIZATION, basic(&user, &password))
    }

    /// Who asks for a URL, and the proxy that is asked in place of its server.
    fn agent(&self, url: &Url) -> Result<(Agent, Option<ForwardProxy>), Trouble> {
        let proxy_url = proxy_for(url, &self.settings.proxies);
        let forward = proxy_url
            .and_then(|proxy| ForwardProxy::of(proxy, url, |user, password| basic(&decoded(user), &decoded(password))));
        let key = (proxy_url.map(str::to_owned), forward.is_some());
        let mut agents = self.agents.lock();
        if let Some((_, agent)) = agents.iter().find(|(known, _)| *known == key) {
            return Ok((agent.clone(), forward));
        }
        let limit = |seconds: u64| (seconds != 0).then(|| Duration::from_secs(seconds));
        let user_agent = [USER_AGENT, &self.settings.user_agent_suffix].join(" ");
        let tunnel = proxy_url.filter(|_| forward.is_none());
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .user_agent(user_agent.trim_end())
            .timeout_resolve(limit(self.settings.connect_timeout))
            .timeout_connect(limit(self.settings.connect_timeout))
            .timeout_per_read(limit(self.settings.stalled_timeout))
            .timeout_per_write(limit(self.settings.stalled_timeout))
            .max_idle_connections(ALL_KEPT_CONNECTIONS)
            .max_idle_connections_per_host(KEPT_CONNECTIONS)
            .input_buffer_size(INPUT_BUFFER)
            .output_buffer_size(OUTPUT_BUFFER)
            .tls_config(self.tls.clone())
            .proxy(tunnel.map(proxy).transpose()?)
            .build();
        let agent = forward.as_ref().map_or_else(|| config.new_agent(), |proxy| proxy.agent(config.clone()));
        agents.push((key, agent.clone()));
        Ok((agent, forward))
    }

    /// From the URL itself, else from the netrc file.
    fn login(&self, url: &Url) -> Option<Login> {
        if url.username().is_empty() && url.password().is_none() {
            return login(&self.settings.netrc, url.host_str()?);
        }
        Some(Login { user: decoded(url.username()), password: decoded(url.password().unwrap_or_default()) })
    }
}

/// Who asks, as it stands in a header.
fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", BASE64.encode(format!("{user}:{password}").as_bytes()))
}

fn at_proxy<B>(proxy: Option<&ForwardProxy>, request: RequestBuilder<B>) -> RequestBuilder<B> {
    match proxy.and_then(|proxy| proxy.authorization.as_ref()) {
        Some(authorization) => request.header(header::PROXY_AUTHORIZATION, authorization),
        None => request,
    }
}

fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}

fn proxy(text: &str) -> Result<Proxy, Trouble> {
    Ok(if text.contains("://") { Proxy::new(text)? } else { Proxy::new(&format!("http://{text}"))? })
}

/// A URL without what is not for the server.
fn bare(url: &Url) -> Url {
    let mut url = url.clone();
    // Fails for URLs that cannot have them.
    let _ = (url.set_username(""), url.set_password(None));
    url.set_fragment(None);
    url
}

/// A URL for messages.
pub fn without_password(text: &str) -> String {
    match Url::parse(text) {
        Ok(mut url) if url.password().is_some() => {
            let _ = url.set_password(Some("***"));
            url.into()
        }
        _ => text.to_owned(),
    }
}

fn is_redirection(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Whether a partial response goes on where the file ends.
fn starts_at(response: &Response<Body>, offset: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok());
    offset > 0 && start == Some(offset)
}

/// What a server says that does not do what it was asked.
fn refusal(response: &mut Response<Body>) -> Trouble {
    let (status, retry_after) = (response.status().as_u16(), retry_after(response));
    Trouble::Status { status, retry_after, body: short_body(response) }
}

/// How long a server asks to be left alone: seconds. A date, which it may be as well, is not understood.
fn retry_after(response: &Response<Body>) -> Option<Duration> {
    let value = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

/// What a server says about an error, if it is short.
fn short_body(response: &mut Response<Body>) -> Option<String> {
    let mut body = Vec::new();
    response.body_mut().as_reader().take(MAX_TOLD_BODY + 1).read_to_end(&mut body).ok()?;
    let text = String::from_utf8(body).ok()?;
    (!text.is_empty() && text.len() as u64 <= MAX_TOLD_BODY).then_some(text)
}

fn pause(attempt: u64) -> Duration {
    let chance = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.subsec_micros() % 1000);
    let exponent = (attempt - 1) as f64 + f64::from(chance) / 2000.0;
    FIRST_PAUSE.mul_f64(exponent.min(16.0).exp2()).min(LONGEST_PAUSE)
}

/// Gives the file that a `file` URL names to `sink`.
///
/// # Errors
/// When it is no regular file, or cannot be read.
pub fn copy_file(url: &Url, sink: &mut dyn Sink) -> Result<(), DownloadError> {
    let failed = |cause| DownloadError { url: without_password(url.as_str()), cause };
    let path = url.to_file_path().map_err(|()| failed(Trouble::FileUrl))?;
    let could_not = |source| failed(Trouble::File { path: path.clone(), source });
    // Opening a pipe would wait for whoever writes into it.
    if !std::fs::metadata(&path).map_err(could_not)?.is_file() {
        return Err(could_not(io::Error::other("it is no regular file")));
    }
    let mut file = File::open(&path).map_err(could_not)?;
    sink.begin(0, file.metadata().map_err(could_not)?.len()).map_err(|e| failed(Trouble::Disk(e)))?;
    let mut buffer = vec![0; PIECE];
    loop {
        let length = file.read(&mut buffer).map_err(could_not)?;
        if length == 0 {
            return Ok(());
        }
        sink.take(&buffer[..length]).map_err(|e| failed(Trouble::Disk(e)))?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_have_an_end() {
        for (attempt, least, most) in [(1, 250, 354), (2, 500, 708), (4, 2000, 2829), (1000, 120_000, 120_000)] {
            let pause = pause(attempt).as_millis();
            assert!((least..=most).contains(&pause), "{attempt}: {pause}");
        }
    }

    #[test]
    fn passwords_are_not_told_and_not_sent_in_the_url() {
        assert_eq!(without_password("https://me:secret@host/x"), "https://me:***@host/x");
        assert_eq!(without_password("https://host/x y"), "https://host/x y");
        assert_eq!(bare(&Url::parse("https://me:secret@host/x?y#z").unwrap()).as_str(), "https://host/x?y");
    }
}
