//! What goes wrong between here and a server.

use std::error::Error;
use std::fmt;
use std::io::{self, ErrorKind};
use std::time::Duration;

/// No connection, or a broken one.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The library says so.
    #[error("{}", Causes(.0))]
    Http(reqwest::Error),
    /// Nothing went on.
    #[error("timeout: nothing came or went for {} s", .0.as_secs())]
    Stalled(Duration),
    /// TLS cannot be spoken at all.
    #[error("cannot speak TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// No thread that connections could live on.
    #[error("cannot start the threads that connections need")]
    Threads,
}

impl From<reqwest::Error> for NetworkError {
    /// Without the URL, which may have a signature in it: who tells the error names it.
    fn from(error: reqwest::Error) -> Self {
        Self::Http(error.without_url())
    }
}

impl NetworkError {
    /// Whether it may go better another time: not with a request that cannot be made, and not with a certificate that is
    /// none, which does not get better in seconds.
    pub(crate) fn is_transient(&self) -> bool {
        let Self::Http(error) = self else { return true };
        let untrusted =
            |cause: &(dyn Error + 'static)| matches!(cause.downcast_ref(), Some(rustls::Error::InvalidCertificate(_)));
        !error.is_builder() && !causes(error).any(untrusted)
    }

    /// Whether nobody answered at all. Somebody did who broke off, or whose certificate is wrong.
    pub(crate) fn is_unreachable(&self) -> bool {
        let error = match self {
            Self::Http(error) => error,
            Self::Stalled(_) => return true,
            Self::Tls(_) | Self::Threads => return false,
        };
        let answered = |cause: &(dyn Error + 'static)| {
            let broken_off = |error: &io::Error| {
                use ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
                matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
            };
            cause.is::<rustls::Error>() || cause.downcast_ref().is_some_and(broken_off)
        };
        let no_way = |cause: &(dyn Error + 'static)| {
            use ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
            let kind = cause.downcast_ref().map(io::Error::kind);
            matches!(kind, Some(AddrNotAvailable | ConnectionRefused | HostUnreachable | NetworkUnreachable | TimedOut))
        };
        error.is_timeout() || causes(error).any(no_way) || (error.is_connect() && !causes(error).any(answered))
    }
}

/// An error and what is below it, also what an [`io::Error`] is around, which its `source` passes over.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| {
        let error = *error;
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        inner.map(|inner| inner as &(dyn Error + 'static)).or_else(|| error.source())
    })
}

/// What is below the library's own words, which say only that a request failed.
struct Causes<'a>(&'a reqwest::Error);

impl fmt::Display for Causes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = causes(self.0).map(ToString::to_string).collect();
        let mut told: Vec<&str> = Vec::new();
        for text in if all.len() > 1 { &all[1..] } else { &all } {
            // Some repeat what is below them.
            if !told.iter().any(|known| known.ends_with(text.as_str())) {
                told.push(text);
            }
        }
        f.write_str(&told.join(": "))
    }
}
