//! One client's connection, from its handshake to its end.
//!
//! A session is one task. While a request is worked on, the same task also writes the log to the client and
//! looks whether the client is still there; when it is gone, the work is dropped where it stands, which
//! withdraws this client's interest in builds and its temporary roots.

use std::sync::Arc;

use build::Gate;
use nix_compat::wire::Writer;
use nix_compat::worker::handshake::{self, Progress, ServerHandshake};
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{Features, Protocol, Request, Response};
use tokio::net::UnixStream;

use crate::connection::{ConnectionError, Input, Output, hung_up};
use crate::context::Session;
use crate::daemon::Daemon;
use crate::error::OpError;
use crate::events::Events;
use crate::ops::{self, Reply};
use crate::peer::{Peer, Trust};
use crate::socket::Socket;

/// The Nix version a client is told. Clients show it and some compare it; it is the stock release whose
/// behaviour castored follows.
pub const NIX_VERSION: &str = "2.34.8";

/// The features offered: every one that an ordinary daemon of Nix 2.35 offers.
const OFFERED: Features = Features::ALL;

/// Bytes of most responses, for a buffer that need not grow.
const USUAL_RESPONSE: usize = 1024;

/// Serves one client until it leaves; behind a gate, if it is part of a running build.
///
/// # Errors
/// Why the connection ended before the client wanted.
pub(crate) async fn serve(
    daemon: Arc<Daemon>,
    stream: UnixStream,
    peer: Peer,
    trust: Trust,
    gate: Option<Arc<Gate>>,
) -> Result<(), ConnectionError> {
    let watched = Socket::new(stream).map_err(|source| ConnectionError::Io { action: "watch", source })?;
    let stream = Arc::new(watched);
    let (received, sent) = daemon.recorder.as_ref().map(|recorder| recorder.session(&peer)).unwrap_or_default();
    let mut input = Input::new(stream.clone(), received);
    let mut output = Output::new(stream.clone(), sent);
    let Some(protocol) = shake_hands(&daemon, trust, &mut input, &mut output).await? else { return Ok(()) };
    if trust == Trust::Untrusted {
        input.limit_large_requests(daemon.large_requests.of(peer.uid));
    }
    let mut session = Session {
        settings: gate.as_ref().map_or(&daemon.settings, |gate| gate.settings()).clone(),
        keys: daemon.keys.clone(),
        temp_roots: Arc::new(daemon.store.new_temp_roots()),
        events: Events::new(),
        daemon,
        peer,
        trust,
        protocol,
        gate,
    };
    let result = requests(&mut session, &stream, &mut input, &mut output).await;
    // What this client was told is durable when it is gone: it may be about to rely on it elsewhere.
    let store = session.store().clone();
    // Its temporary roots end now, as stock's do, and not after the disk.
    drop(session);
    let synced = tokio::task::spawn_blocking(move || store.sync()).await;
    if let Ok(Err(error)) = synced {
        tracing::error!(%error, "cannot make the changes of a client durable");
    }
    result
}

async fn shake_hands(
    daemon: &Daemon,
    trust: Trust,
    input: &mut Input,
    output: &mut Output,
) -> Result<Option<Protocol>, ConnectionError> {
    let told = match trust {
        Trust::Trusted => handshake::Trust::Trusted,
        Trust::Untrusted => handshake::Trust::NotTrusted,
    };
    let store_dir = daemon.store.store_dir().clone();
    let mut handshake = ServerHandshake::new(store_dir, NIX_VERSION.to_owned(), told, OFFERED);
    loop {
        let mut writer = Writer::new();
        let advanced = handshake.advance(input.buffer(), &mut writer);
        output.queue(writer.as_bytes());
        let (used, progress) = match advanced {
            Ok(advanced) => advanced,
            Err(error) => {
                // No channel exists yet on which the client could be told.
                tracing::debug!(%error, "refused a connection in its handshake");
                output.flush().await?;
                return Ok(None);
            }
        };
        let _ = input.buffer().split_to(used);
        if let Progress::Done(connected) = progress {
            output.queue_messages(&connected.protocol, &[Message::Last]);
            output.flush().await?;
            return Ok(Some(connected.protocol));
        }
        output.flush().await?;
        if !input.fill(512).await? {
            return Ok(None);
        }
    }
}

async fn requests(
    session: &mut Session,
    stream: &Socket,
    input: &mut Input,
    output: &mut Output,
) -> Result<(), ConnectionError> {
    loop {
        let request = match input.request(&session.protocol).await {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(error @ (ConnectionError::Invalid(_) | ConnectionError::TooLarge)) => {
                let refusal = OpError::from(error);
                output.queue_messages(&session.protocol, &[Message::Error(refusal.message())]);
                return output.flush().await;
            }
            Err(error) => return Err(error),
        };
        tracing::debug!(peer = session.peer.pid, operation = ?request.operation(), "request");
        match perform(session, stream, input, output, request).await {
            Ok(Reply::Response(response)) => finish(session, output, &response).await?,
            Ok(Reply::Nar(path)) => {
                finish(session, output, &Response::Nothing).await?;
                ops::stream_nar(session, output, &path).await?;
            }
            Err(OpError::Connection(error)) => return Err(error),
            Err(error) => {
                let error = error.with_advice(session.store());
                drain_events(session, output);
                output.queue_messages(&session.protocol, &[Message::Error(error.message())]);
                output.flush().await?;
                if error.is_fatal() {
                    return Ok(());
                }
            }
        }
    }
}

/// Does the work, writes the log, and watches for the client's end, all at once.
async fn perform(
    session: &mut Session,
    stream: &Socket,
    input: &mut Input,
    output: &mut Output,
    request: Request,
) -> Result<Reply, OpError> {
    let events = session.events.clone();
    let protocol = session.protocol.clone();
    let work = ops::perform(session, input, request);
    let logging = async {
        loop {
            events.wait().await;
            output.queue_messages(&protocol, &events.take());
            if let Err(error) = output.flush().await {
                return error;
            }
        }
    };
    tokio::select! {
        biased;
        result = work => result,
        error = logging => Err(error.into()),
        () = hung_up(stream) => Err(ConnectionError::Disconnected.into()),
    }
}

fn drain_events(session: &Session, output: &mut Output) {
    let last = session.events.take_last();
    if !last.is_empty() {
        output.queue_messages(&session.protocol, &last);
    }
}

async fn finish(session: &Session, output: &mut Output, response: &Response) -> Result<(), ConnectionError> {
    drain_events(session, output);
    let mut writer = Writer::with_capacity(USUAL_RESPONSE);
    Message::Last.encode(&session.protocol, &mut writer);
    response.encode(&session.protocol, &mut writer);
    output.queue_written(writer);
    output.flush().await
}
