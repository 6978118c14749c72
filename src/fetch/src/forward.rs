//! Plain HTTP through a plain HTTP proxy: the proxy is sent the request itself, with the whole URL in its first line (RFC 9112,
//! 3.2.2), as curl does it. The library would ask it for a tunnel, which squid and others grant to the ports of TLS only.

use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, TcpConnector, Transport};
use ureq::{Agent, config::Config};
use url::Url;

/// What a proxy is that takes requests as they are, and who asks it.
pub(crate) struct ForwardProxy {
    uri: Uri,
    /// What stands in the header of that name, if the proxy wants to know.
    pub(crate) authorization: Option<String>,
}

impl ForwardProxy {
    /// The proxy that forwards requests for this URL; `None` if there has to be a tunnel, or it speaks something else.
    pub(crate) fn of(proxy: &str, url: &Url, basic: impl FnOnce(&str, &str) -> String) -> Option<Self> {
        let proxy =
            if proxy.contains("://") { Url::parse(proxy) } else { Url::parse(&format!("http://{proxy}")) }.ok()?;
        if url.scheme() != "http" || proxy.scheme() != "http" {
            return None;
        }
        let named = !proxy.username().is_empty() || proxy.password().is_some();
        let authorization = named.then(|| basic(proxy.username(), proxy.password().unwrap_or_default()));
        let port = proxy.port_or_known_default()?;
        let uri = format!("http://{}:{port}/", proxy.host_str()?).parse().ok()?;
        Some(Self { uri, authorization })
    }

    /// An agent whose requests all go to the proxy.
    pub(crate) fn agent(&self, config: Config) -> Agent {
        let connector = ().chain(TcpConnector::default()).chain(WholeUrls);
        Agent::with_parts(config, connector, ToProxy { uri: self.uri.clone(), usual: DefaultResolver::default() })
    }
}

/// Every host is where the proxy is.
#[derive(Debug)]
struct ToProxy {
    uri: Uri,
    usual: DefaultResolver,
}

impl Resolver for ToProxy {
    fn resolve(&self, _: &Uri, config: &Config, timeout: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        self.usual.resolve(&self.uri, config, timeout)
    }
}

/// Puts [`Whole`] around connections.
#[derive(Debug)]
struct WholeUrls;

impl<In: Transport> Connector<In> for WholeUrls {
    type Out = Whole<In>;

    fn connect(&self, details: &ConnectionDetails, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        let authority = details.uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        let server = format!("http://{authority}").into_bytes();
        Ok(chained.map(|inner| Whole { inner, server, request: true }))
    }
}

/// A connection over which the first line of each request gets its server's name.
#[derive(Debug)]
struct Whole<T> {
    inner: T,
    /// What the path is put behind.
    server: Vec<u8>,
    /// Whether what is sent next is the beginning of a request.
    request: bool,
}

impl<T: Transport> Transport for Whole<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        if !std::mem::replace(&mut self.request, false) {
            return self.inner.transmit_output(amount, timeout);
        }
        let buffer = self.inner.buffers().output();
        let longer = amount + self.server.len();
        // Behind the method.
        let at = buffer[..amount].iter().position(|byte| *byte == b' ').map(|blank| blank + 1);
        let Some(at) = at.filter(|at| longer <= buffer.len() && buffer[*at] == b'/') else {
            return Err(ureq::Error::Other("a request is too long for a proxy".into()));
        };
        buffer.copy_within(at..amount, at + self.server.len());
        buffer[at..at + self.server.len()].copy_from_slice(&self.server);
        self.inner.transmit_output(longer, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        // Once something is answered, the next thing that is said is another request.
        self.request = true;
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }
}
