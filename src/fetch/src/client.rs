//! Downloads over HTTP, piece by piece.
//!
//! Servers are not trusted: redirections, headers and bodies all have bounds, and passwords go to the host they are for,
//! never to where it redirects. **Certificates are always verified** (CVE-2024-47174 was a `builtin:fetchurl` that did
//! not, because a hash protects the contents; but not the passwords, nor the URL).

use std::fs::File;
use std::io::{self, Read as _};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use data_encoding::BASE64;
use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap, HeaderValue};
use url::Url;

use crate::download::Download;
use crate::error::{DownloadError, Trouble, UploadError};
use crate::netrc::{Login, login};
use crate::s3::SignedBucket;
use crate::transport::{Answer, Transport};

/// Redirections followed one after the other: curl's number.
const MAX_REDIRECTS: usize = 10;
/// Longest body of an error that is told.
const MAX_TOLD_BODY: usize = 1024;
/// Bytes read at once.
const PIECE: usize = 64 * 1024;
/// Time before the second attempt; it doubles with every further one, and up to half of it again is left to chance.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// A server that asks for a longer one is asked again all the same: who waits may have other places to look.
const LONGEST_ASKED: Duration = Duration::from_secs(30);
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

/// Downloads as the settings say.
pub struct Client {
    settings: Arc<Download>,
    transport: Transport,
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
        Self { transport: Transport::new(settings.clone()), settings, bucket: None }
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
        let mut answer = self.request(url, state)?;
        let status = answer.status();
        let continues = status == StatusCode::PARTIAL_CONTENT && starts_at(&answer, state.length);
        if !status.is_success() || (status == StatusCode::PARTIAL_CONTENT && !continues) {
            // With an error for an answer the next attempt still goes on where this one wanted to.
            if status == StatusCode::RANGE_NOT_SATISFIABLE || status.is_success() {
                state.resumable = false;
            }
            return Err(refusal(&mut answer));
        }
        if !continues {
            state.length = 0;
        }
        state.resumable = continues || answer.header(header::ACCEPT_RANGES) == Some("bytes");
        state.tag = answer.header(header::ETAG).filter(|tag| tag.starts_with('"')).map(str::to_owned);
        let expected = answer.content_length().map_or(0, |length| state.length.saturating_add(length));

        sink.begin(state.length, expected).map_err(Trouble::Disk)?;
        let (start, before) = (Instant::now(), state.length);
        while let Some(bytes) = answer.piece()? {
            for piece in bytes.chunks(PIECE) {
                sink.take(piece).map_err(Trouble::Disk)?;
                state.length += piece.len() as u64;
                self.slow_down(state.length - before, start);
            }
        }
        Ok(())
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
        let mut headers = self.authorization(url)?;
        headers.insert(header::CONTENT_TYPE, value(content_type)?);
        let mut answer = self.transport.put(&bare(url), headers, body)?;
        if answer.status().is_success() {
            // Read to its end, so that the connection can be used again.
            let _ = short_body(&mut answer);
            return Ok(());
        }
        Err(refusal(&mut answer))
    }

    /// Waits until `bytes` may have come since `start`.
    fn slow_down(&self, bytes: u64, start: Instant) {
        if self.settings.speed > 0 {
            let due = Duration::from_secs_f64(bytes as f64 / 1024.0 / self.settings.speed as f64);
            std::thread::sleep(due.saturating_sub(start.elapsed()));
        }
    }

    /// Asks for what is not there yet, wherever the server says that it is.
    fn request(&self, url: &Url, state: &State) -> Result<Answer, Trouble> {
        let mut url = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            if !matches!(url.scheme(), "http" | "https") {
                return Err(Trouble::Scheme(url.scheme().to_owned()));
            }
            let answer = self.request_once(&url, state)?;
            let location = answer.headers().get(header::LOCATION);
            let Some(location) = location.filter(|_| is_redirection(answer.status())) else { return Ok(answer) };
            let location = String::from_utf8_lossy(location.as_bytes());
            url = url.join(&location).map_err(Trouble::Url)?;
        }
        Err(Trouble::TooManyRedirects(MAX_REDIRECTS))
    }

    fn request_once(&self, url: &Url, state: &State) -> Result<Answer, Trouble> {
        // The signature says who asks; a server refuses to be told twice.
        let (url, mut headers) = match self.bucket.as_ref().and_then(|bucket| bucket.sign(url)) {
            Some(signed) => (signed, HeaderMap::new()),
            None => (bare(url), self.authorization(url)?),
        };
        if state.length > 0 {
            headers.insert(header::RANGE, value(&format!("bytes={}-", state.length))?);
            if let Some(tag) = &state.tag {
                headers.insert(header::IF_RANGE, value(tag)?);
            }
        }
        self.transport.get(&url, headers)
    }

    /// Who asks, as a server wants to be told.
    fn authorization(&self, url: &Url) -> Result<HeaderMap, Trouble> {
        let mut headers = HeaderMap::new();
        if let Some(Login { user, password }) = self.login(url) {
            let basic = BASE64.encode(format!("{user}:{password}").as_bytes());
            let mut value = value(&format!("Basic {basic}"))?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        Ok(headers)
    }

    /// From the URL itself, else from the netrc file.
    fn login(&self, url: &Url) -> Option<Login> {
        if url.username().is_empty() && url.password().is_none() {
            return login(&self.settings.netrc, url.host_str()?);
        }
        Some(Login { user: decoded(url.username()), password: decoded(url.password().unwrap_or_default()) })
    }
}

fn value(text: &str) -> Result<HeaderValue, Trouble> {
    HeaderValue::from_str(text).map_err(|_| Trouble::Header(text.to_owned()))
}

fn decoded(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
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
fn starts_at(answer: &Answer, offset: u64) -> bool {
    let range = answer.header(header::CONTENT_RANGE).and_then(|range| range.strip_prefix("bytes "));
    let start = range.and_then(|range| range.split('-').next()?.trim().parse().ok());
    offset > 0 && start == Some(offset)
}

/// What a server says that does not do what it was asked.
fn refusal(answer: &mut Answer) -> Trouble {
    let (status, retry_after) = (answer.status().as_u16(), retry_after(answer));
    Trouble::Status { status, retry_after, body: short_body(answer) }
}

/// How long a server asks to be left alone: seconds. A date, which it may be as well, is not understood.
fn retry_after(answer: &Answer) -> Option<Duration> {
    answer.header(header::RETRY_AFTER)?.trim().parse().ok().map(Duration::from_secs)
}

/// What a server says about an error, if it is short.
fn short_body(answer: &mut Answer) -> Option<String> {
    let mut body = Vec::new();
    while let Some(piece) = answer.piece().ok()? {
        if body.len() + piece.len() > MAX_TOLD_BODY {
            return None;
        }
        body.extend_from_slice(&piece);
    }
    String::from_utf8(body).ok().filter(|text| !text.is_empty())
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
