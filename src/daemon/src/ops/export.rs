//! Whole paths out and in: NarFromPath, and the export streams of old clients.

use std::collections::BTreeSet;
use std::io::{self, Write};

use nix_compat::export;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;
use nix_compat::wire::Writer;
use nix_compat::worker::stderr::Message;
use nix_compat::worker::{Payload, Response};
use store::nar_digest::NarDigest;
use store::{NewPath, SignaturePolicy};
use tokio::sync::mpsc;

use crate::connection::{ConnectionError, Input, Output};
use crate::context::Session;
use crate::error::OpError;
use crate::payload;
use crate::streams::Running;

/// Bytes of a NAR handed to the socket at a time.
const PIECE: usize = 256 * 1024;
/// Pieces that may wait for a slow client.
const WAITING_PIECES: usize = 4;

/// Sends the NAR of a path, bare. An error in the middle can only be shown by ending the connection.
pub(crate) async fn stream_nar(
    session: &Session,
    output: &mut Output,
    path: &StorePath,
) -> Result<(), ConnectionError> {
    let failed = |error: String| ConnectionError::Io { action: "send a path to", source: io::Error::other(error) };
    let (mut pieces, rendering) = render(session, path.clone(), |_| Ok(())).await.map_err(|e| failed(e.to_string()))?;
    while let Some(piece) = pieces.recv().await {
        output.queue(&piece);
        output.flush().await?;
    }
    match rendering.await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            tracing::error!(path = %path, %error, "cannot send a path");
            Err(failed(error.to_string()))
        }
        Err(error) => Err(failed(error.to_string())),
    }
}

/// ExportPath: the record of one path in messages.
pub(super) async fn export(session: &Session, path: StorePath) -> Result<Response, OpError> {
    let info = session.store().valid_entry(&path)?.info;
    let trailer = export::Trailer { path: info.path, references: info.references, deriver: info.deriver };
    let store_dir = session.store().store_dir().clone();
    let (mut pieces, rendering) = render(session, path, move |out| {
        let mut writer = Writer::new();
        export::write_trailer(&store_dir, &trailer, &mut writer);
        out.write_all(writer.as_bytes())
    })
    .await?;
    while let Some(piece) = pieces.recv().await {
        session.events.push_data(Message::Write(piece)).await;
    }
    rendering.await.map_err(|e| OpError::internal(e.to_string()))??;
    Ok(Response::One)
}

/// Renders a NAR, and what `then` adds, on a thread of its own. When the receiver is dropped, so is the work.
async fn render(
    session: &Session,
    path: StorePath,
    then: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static,
) -> Result<(mpsc::Receiver<Vec<u8>>, Running<Result<(), OpError>>), OpError> {
    let (send, receive) = mpsc::channel(WAITING_PIECES);
    let store = session.store().clone();
    let work = move || {
        let mut out = Pieces { piece: Vec::with_capacity(PIECE), send };
        store.write_nar(&path, &mut out)?;
        then(&mut out)
            .and_then(|()| out.flush())
            .map_err(|e| OpError::new(format!("cannot send '{}': {e}", store.store_dir().display(&path))))
    };
    Ok((receive, session.daemon.streams.start(session.share_of(), work).await?))
}

struct Pieces {
    piece: Vec<u8>,
    send: mpsc::Sender<Vec<u8>>,
}

impl Write for Pieces {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(buf);
        if self.piece.len() >= PIECE {
            self.flush()?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.send.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// ImportPaths: an export stream, asked for piece by piece.
pub(super) async fn import(session: &Session, input: &mut Input, payload: Payload) -> Result<Response, OpError> {
    let store = session.store().clone();
    let temp_roots = session.temp_roots.clone();
    let keys = session.keys.clone();
    let gate = session.gate.clone();
    let check = session.settings.require_sigs && !session.is_trusted();
    payload::receive(session, input, payload, move |reader| {
        let mut imported = Vec::new();
        let broken = |e: io::Error| OpError::new(format!("cannot receive the export stream: {e}"));
        while export::read_word(reader).map_err(broken)? == export::MORE {
            let ingested = store.import_nar(reader, NarDigest::new(None, None))?;
            let trailer = export::read_trailer(store.store_dir(), reader).map_err(|e| OpError::new(e.to_string()))?;
            let info = PathInfo {
                path: trailer.path.clone(),
                deriver: trailer.deriver,
                nar_hash: ingested.nar.nar_hash,
                references: trailer.references,
                registration_time: 0,
                nar_size: ingested.nar.nar_size,
                ultimate: false,
                signatures: BTreeSet::new(),
                ca: None,
            };
            let policy = if check { SignaturePolicy::Require(&keys) } else { SignaturePolicy::DontCheck };
            store.check_signatures(&info, policy)?;
            temp_roots.add(&info.path);
            let nar_hash = info.nar_hash;
            store.register(vec![NewPath { info, node: ingested.node, pin: Some(ingested.pin) }])?;
            if let Some(gate) = &gate {
                gate.admit_sent(&trailer.path, Some(&nar_hash))?;
            }
            imported.push(trailer.path);
        }
        Ok(Response::PathList(imported))
    })
    .await
}
