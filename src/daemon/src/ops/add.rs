//! Adding contents.

use std::collections::BTreeSet;
use std::io::Read;

use nix_compat::content_address::Method;
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;
use nix_compat::worker::{AddToStoreNar, MethodText, Payload, Request, Response};
use store::nar_digest::NarDigest;
use store::{AddOptions, Ingested, SignaturePolicy, Store};

use crate::connection::Input;
use crate::context::Session;
use crate::error::OpError;
use crate::payload::{self, PayloadReader};

/// AddToStore, in its form since 1.25 and in the older one.
pub(super) async fn content(
    session: &Session,
    input: &mut Input,
    request: Request,
    payload: Payload,
) -> Result<Response, OpError> {
    let (options, old) = match request {
        Request::AddToStore(add) => (options(add.name, &add.method, add.references), false),
        Request::AddToStoreOld { name, method } => (options(name, &method, BTreeSet::new()), true),
        _ => return Err(OpError::internal("not a request to add contents")),
    };
    let options = options.and_then(|options| {
        if options.method == Method::Git {
            session.settings.require_feature("git-hashing").map_err(|e| OpError::new(e.to_string()))?;
        }
        Ok(options)
    });
    let options = match options {
        Ok(options) => options,
        Err(error) => {
            payload::discard(session, input, payload).await?;
            return Err(error);
        }
    };
    let store = session.store().clone();
    let temp_roots = session.temp_roots.clone();
    let info = payload::receive(session, input, payload, move |reader| {
        let (ingested, hash) = if old && matches!(options.method, Method::Flat | Method::Text) {
            ingest_flat_from_nar(&store, &options, reader)?
        } else {
            store.ingest(&options, reader)?
        };
        // The older form has no end mark, and ends with the archive.
        if !old {
            refuse_trailing_bytes(reader)?;
        }
        Ok(store.add_ingested_rooted(&options, &temp_roots, ingested, hash)?)
    })
    .await?;
    Ok(if old { Response::Path(Some(info.path)) } else { Response::AddedPath(info) })
}

/// Checks what can be checked before the contents come.
fn options(name: String, method: &MethodText, references: BTreeSet<StorePath>) -> Result<AddOptions, OpError> {
    let (method, algorithm) = method.resolve().map_err(|e| OpError::new(e.to_string()))?;
    nix_compat::store_path::validate_name(&name).map_err(|e| OpError::new(e.to_string()))?;
    if method == Method::Text && algorithm != Algorithm::Sha256 {
        return Err(OpError::new(format!("cannot add '{name}': text is hashed with sha256, not with '{algorithm}'")));
    }
    let holds_references = method == Method::Text || (method == Method::Nar && algorithm == Algorithm::Sha256);
    if !references.is_empty() && !holds_references {
        return Err(OpError::new(format!(
            "fixed output derivation '{name}' is not allowed to refer to other store paths.\nYou may need to use the \
             'unsafeDiscardReferences' derivation attribute, see the manual for more details."
        )));
    }
    Ok(AddOptions { name, method, algorithm, references })
}

/// Below 1.25 even a file that is hashed flat comes as a NAR.
fn ingest_flat_from_nar(
    store: &Store,
    options: &AddOptions,
    reader: &mut dyn Read,
) -> Result<(Ingested, Hash), OpError> {
    let mut ingested = store.import_nar(reader, NarDigest::new(None, None))?;
    let castore::Node::File { digest, size, executable } = ingested.node else {
        return Err(OpError::new(format!("regular file expected for '{}', which is hashed flat", options.name)));
    };
    if executable {
        // The flat hash does not cover the bit, so the path must not either.
        ingested.node = castore::Node::File { digest, size, executable: false };
        ingested.nar = store.nar_facts(&ingested.node, None)?;
    }
    let hash: Hash = store.flat_hash(&ingested.node, options.algorithm, &options.name)?;
    Ok((ingested, hash))
}

/// A payload that goes on after its archive is not what the client meant to send.
pub(super) fn refuse_trailing_bytes(reader: &mut PayloadReader) -> Result<(), OpError> {
    match reader.is_at_end() {
        Ok(true) => Ok(()),
        Ok(false) => Err(store::Error::TrailingBytes.into()),
        Err(error) => Err(OpError::new(format!("cannot receive the archive: {error}"))),
    }
}

/// AddTextToStore.
pub(super) async fn text(
    session: &Session,
    name: String,
    text: Vec<u8>,
    references: BTreeSet<StorePath>,
) -> Result<Response, OpError> {
    nix_compat::store_path::validate_name(&name).map_err(|e| OpError::new(e.to_string()))?;
    let options = AddOptions { name, method: Method::Text, algorithm: Algorithm::Sha256, references };
    let temp_roots = session.temp_roots.clone();
    session
        .blocking(move |store| {
            let info = store.add_rooted(&options, &temp_roots, &mut &text[..])?;
            Ok(Response::Path(Some(info.path)))
        })
        .await
}

/// AddToStoreNar.
pub(super) async fn nar(
    session: &Session,
    input: &mut Input,
    request: AddToStoreNar,
    payload: Payload,
) -> Result<Response, OpError> {
    let mut info = request.info;
    let repair = request.repair && session.is_trusted();
    session.temp_roots.add(&info.path);
    let admitted =
        admit(session, &mut info, request.dont_check_sigs).and_then(|()| Ok(session.store().is_valid(&info.path)?));
    match admitted {
        Ok(false) => {}
        // The contents that are here may be damaged.
        Ok(true) if repair => {}
        // Who may not know that it is valid has to prove that it has the contents.
        Ok(true) if !session.may_see(&info.path) => {}
        Ok(true) => {
            payload::discard(session, input, payload).await?;
            return Ok(Response::Nothing);
        }
        Err(refusal) => {
            payload::discard(session, input, payload).await?;
            return Err(refusal);
        }
    }
    let store = session.store().clone();
    payload::receive(session, input, payload, move |reader| {
        let new = store.import_with_info(info, reader)?;
        // Other transports have no end mark, and end with the archive.
        if payload == Payload::Framed {
            refuse_trailing_bytes(reader)?;
        }
        if repair {
            return Ok(store.replace_contents(new)?);
        }
        Ok(store.register(vec![new])?)
    })
    .await?;
    Ok(Response::Nothing)
}

/// Applies the signature policy of this client to a path it offers, and takes back what it may not claim.
pub(super) fn admit(session: &Session, info: &mut PathInfo, dont_check_sigs: bool) -> Result<(), OpError> {
    let trusted = session.is_trusted();
    info.ultimate &= trusted;
    let settings = &session.settings;
    let policy = if (dont_check_sigs && trusted) || !settings.require_sigs {
        SignaturePolicy::DontCheck
    } else {
        SignaturePolicy::Require(&session.keys)
    };
    Ok(session.store().check_signatures(info, policy)?)
}
