//! Realisations: what the outputs of content-addressed derivations turned out to be.

use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::worker::Response;
use store::SignaturePolicy;

use crate::context::Session;
use crate::error::OpError;

/// The experimental feature without which stock registers no realisation.
const FEATURE: &str = "ca-derivations";

pub(super) async fn query(session: &Session, id: DrvOutput) -> Result<Response, OpError> {
    session.blocking(move |store| Ok(Response::Realisation(store.realisation(&id)?))).await
}

/// RegisterDrvOutput. Stock up to 2.34 believes everybody; here it is a claim like a path info.
pub(super) async fn register(session: &Session, realisation: Realisation) -> Result<Response, OpError> {
    session.daemon.settings.require_feature(FEATURE).map_err(|e| OpError::new(e.to_string()))?;
    let check = session.settings.require_sigs && !session.is_trusted();
    let keys = session.keys.clone();
    session
        .blocking(move |store| {
            let policy = if check { SignaturePolicy::Require(&keys) } else { SignaturePolicy::DontCheck };
            store.register_realisation(&realisation, policy)?;
            Ok(Response::Nothing)
        })
        .await
}
