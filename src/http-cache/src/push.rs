//! What trusted pushers put into the store, as stock clients write to a binary cache: a NAR first, then the narinfo that
//! says what it is.
//!
//! A pusher knows a token and is trusted as stock trusts a user who may copy without signatures: what it says of a path is
//! believed, but for what the contents say themselves. Signatures are kept as they come; none is made here.

mod body;
mod pending;
mod token;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{HeaderMap, Request, StatusCode, header};
use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::realisation::{DrvOutput, Realisation};
use percent_encoding::percent_decode_str;
use store::nar_digest::NarFacts;
use store::{AutoGc, NewPath, SignaturePolicy, Store, causes};
use tokio::sync::Semaphore;

use crate::limits::{MAX_DESCRIPTION_BYTES, MAX_PUSH_NAME, MAX_PUSHES, PUSH_TIME, REQUEST_TIME};
use crate::target::{PathDigest, Target};

use pending::Pending;
pub use token::{TokenError, Tokens};

/// Why something was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PushError {
    /// What came is not what it should be.
    #[error("{0}")]
    Wrong(String),
    /// Too many bytes for what it is.
    #[error("it is longer than {MAX_DESCRIPTION_BYTES} bytes")]
    TooLarge,
    /// The pusher stopped sending.
    #[error("nothing came for too long")]
    Stalled,
    /// A narinfo came without its NAR.
    #[error("'{0}' was not uploaded, or too long ago; upload it again")]
    NoNar(String),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// A thread of the server.
    #[error("a thread ended early: {0}")]
    Thread(String),
}

impl PushError {
    /// What a client makes of it: it tries again what begins with a 5.
    pub(crate) fn status(&self) -> StatusCode {
        use store::Error as E;
        match self {
            Self::Wrong(_) => StatusCode::BAD_REQUEST,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Stalled => StatusCode::REQUEST_TIMEOUT,
            Self::NoNar(_) => StatusCode::CONFLICT,
            Self::Store(
                E::Nar(_)
                | E::TrailingBytes
                | E::HashMismatch { .. }
                | E::SizeMismatch { .. }
                | E::ContentAddressMismatch { .. }
                | E::InvalidReference { .. }
                | E::Derivation { .. }
                | E::TooManySignatures { .. }
                | E::SignatureTooLong { .. }
                | E::NotValid(_)
                | E::RealisationConflict { .. }
                | E::RealisationTooLarge { .. },
            ) => StatusCode::BAD_REQUEST,
            Self::Store(_) | Self::Thread(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// What a pusher may put, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Put {
    /// `nar/<name>.nar`, with an ending that says how it is compressed.
    Nar {
        name: String,
        compression: Compression,
    },
    NarInfo(PathDigest),
    Realisation(DrvOutput),
    /// A listing: they are made here, from the contents.
    Listing,
}

impl Put {
    fn parse(path: &str) -> Option<Self> {
        match Target::parse(path, None) {
            Some(Target::NarInfo(digest)) => return Some(Self::NarInfo(digest)),
            Some(Target::Realisation(id)) => return Some(Self::Realisation(id)),
            Some(Target::Listing(_)) => return Some(Self::Listing),
            _ => {}
        }
        let (name, compression) = nar_file(path)?;
        Some(Self::Nar { name, compression })
    }
}

/// The file of a NAR, as narinfos call it, and how it is compressed.
fn nar_file(path: &str) -> Option<(String, Compression)> {
    let name = percent_decode_str(path.strip_prefix('/')?).decode_utf8().ok()?.into_owned();
    let file = name.strip_prefix("nar/")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if file.len() > MAX_PUSH_NAME || !file.bytes().all(plain) {
        return None;
    }
    let (stem, ending) = file.split_once(".nar")?;
    let compression = Compression::ALL.iter().copied().find(|compression| {
        compression.file_ending() == ending && (*compression == Compression::None) == ending.is_empty()
    })?;
    (!stem.is_empty()).then_some((name, compression))
}

/// Takes what pushers send.
pub(crate) struct Pushing {
    store: Arc<Store>,
    tokens: Tokens,
    room: AutoGc,
    pending: Arc<Pending>,
    places: Arc<Semaphore>,
    patience: Duration,
}

impl Pushing {
    pub(crate) fn new(store: Arc<Store>, tokens: Tokens, room: AutoGc, patience: Duration) -> Self {
        let places = Arc::new(Semaphore::new(MAX_PUSHES));
        Self { store, tokens, room, pending: Arc::default(), places, patience }
    }

    /// Whether the request comes from somebody who may push.
    pub(crate) fn admits(&self, headers: &HeaderMap) -> bool {
        self.tokens.admit(headers)
    }

    /// Whether a NAR's file has been uploaded so recently that nobody need do it again. Blocks.
    pub(crate) fn has(&self, path: &str) -> store::Result<bool> {
        let Some((name, _)) = nar_file(path) else { return Ok(false) };
        self.pending.has(&name, &self.store)
    }

    /// Lets go of what nobody has described for too long, for as long as it is polled.
    pub(crate) async fn forget_old(&self) {
        loop {
            tokio::time::sleep(PUSH_TIME / 8).await;
            self.pending.forget_old(PUSH_TIME);
        }
    }

    /// Takes what a request has. `None` where nothing can be put.
    pub(crate) async fn take(&self, request: Request<Incoming>) -> Option<Result<(), PushError>> {
        let (head, body) = request.into_parts();
        let put = Put::parse(head.uri.path())?;
        let coding = head.headers.get(header::CONTENT_ENCODING);
        if coding.is_some_and(|coding| coding.as_bytes() != b"identity") {
            return Some(Err(PushError::Wrong("files are taken as they are, without a content encoding".to_owned())));
        }
        Some(match put {
            Put::Nar { name, compression } => self.nar(name, compression, body).await,
            Put::Listing => body::discard(body, self.patience).await,
            Put::NarInfo(digest) => {
                let (store, pending) = (self.store.clone(), self.pending.clone());
                self.described(body, move |text| narinfo(&store, &pending, digest, text)).await
            }
            Put::Realisation(id) => {
                let store = self.store.clone();
                self.described(body, move |text| realisation(&store, &id, text)).await
            }
        })
    }

    async fn nar(&self, name: String, compression: Compression, body: Incoming) -> Result<(), PushError> {
        let Ok(place) = self.places.clone().acquire_owned().await else {
            return Err(PushError::Thread("the server ends".to_owned()));
        };
        let (store, room, pending) = (self.store.clone(), self.room.clone(), self.pending.clone());
        let import = move |reader: body::Reader| {
            // Also when the pusher is gone.
            let _place = place;
            if store.may_lack_room(&room) {
                store.keep_room(&room);
            }
            let ingested = body::import(&store, compression, reader)?;
            tracing::debug!(%name, bytes = ingested.nar.nar_size, "a NAR was uploaded over http");
            pending.put(name, ingested);
            Ok(())
        };
        body::stream(body, self.patience, import).await
    }

    /// Has a worker thread take a small text.
    async fn described(
        &self,
        body: Incoming,
        work: impl FnOnce(&str) -> Result<(), PushError> + Send + 'static,
    ) -> Result<(), PushError> {
        let bytes = body::whole(body, self.patience.min(REQUEST_TIME)).await?;
        let work = move || {
            let text = std::str::from_utf8(&bytes).map_err(|e| PushError::Wrong(format!("it is not UTF-8: {e}")))?;
            work(text)
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(PushError::Thread(e.to_string())))
    }
}

/// Registers what a narinfo describes. It is durable when this returns: the pusher may delete its own.
fn narinfo(store: &Store, pending: &Pending, digest: PathDigest, text: &str) -> Result<(), PushError> {
    let narinfo = NarInfo::parse(store.store_dir(), text).map_err(|e| PushError::Wrong(causes(&e)))?;
    let (url, info) = (narinfo.url().to_owned(), narinfo.info);
    if info.path.digest() != digest {
        return Err(PushError::Wrong(format!("this is the narinfo of another path, {}", info.path)));
    }
    let roots = store.new_temp_roots();
    roots.add(&info.path);
    let path = info.path.clone();
    let new = match store.shared_entry(&path)? {
        // Of a path that somebody else has pushed meanwhile only the signatures are news.
        Some(known) if known.info.nar_hash == info.nar_hash => {
            let new = NewPath { info, node: known.node.clone(), pin: None };
            let (nar_hash, nar_size) = (known.info.nar_hash, known.info.nar_size);
            store.check_imported(&new, &NarFacts { nar_hash, nar_size, other: None, references: BTreeSet::new() })?;
            new
        }
        // As with stock's stores, a valid path is not replaced; and signatures of other contents are not its own.
        Some(_) => return Ok(()),
        None => pending.claim(&url, info, &roots, store)?.ok_or_else(|| PushError::NoNar(url.clone()))?,
    };
    store.register(vec![new])?;
    store.sync()?;
    pending.used(&url, &path);
    tracing::info!(%path, "pushed over http");
    Ok(())
}

fn realisation(store: &Store, id: &DrvOutput, text: &str) -> Result<(), PushError> {
    let realisation = Realisation::from_json(text).map_err(|e| PushError::Wrong(causes(&e)))?;
    if realisation.id != *id {
        return Err(PushError::Wrong(format!("this is the realisation of another output, {}", realisation.id)));
    }
    store.register_realisation(&realisation, SignaturePolicy::DontCheck)?;
    Ok(store.sync()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_nars() {
        let compression = |path: &str| nar_file(path).map(|(name, compression)| (name, compression.as_str()));
        for (path, expected) in [
            ("/nar/0ab.nar", "none"),
            ("/nar/0ab.nar.xz", "xz"),
            ("/nar/0ab.nar.zst", "zstd"),
            ("/nar/0ab.nar.bz2", "bzip2"),
            ("/nar/a-b_c.nar.br", "br"),
        ] {
            assert_eq!(compression(path), Some((path[1..].to_owned(), expected)));
        }
        for path in
            ["/nar/.nar", "/nar/a.tar", "/nar/../a.nar", "/nar/a/b.nar", "/a.nar", "/nar/a.nar.exe", "/nar/%ff.nar"]
        {
            assert_eq!(compression(path), None, "{path}");
        }
        assert_eq!(compression(&format!("/nar/{}.nar", "a".repeat(MAX_PUSH_NAME))), None);
    }

    #[test]
    fn nothing_else_can_be_put() {
        for path in
            ["/", "/nix-cache-info", "/log/h6haz8fcxqy67i7c7n03iwh4jx13hhxx-f", "/h6haz8fcxqy67i7c7n03iwh4jx13hhxx-f"]
        {
            assert_eq!(Put::parse(path), None, "{path}");
        }
        assert_eq!(Put::parse("/h6haz8fcxqy67i7c7n03iwh4jx13hhxx.ls"), Some(Put::Listing));
    }
}
