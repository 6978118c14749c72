//! The operations of the worker protocol. [`unrestricted`] is the list of them; each group has a file.

mod add;
mod build;
mod export;
mod maintain;
mod multiple;
mod query;
mod realisation;
mod restricted;
mod substitutes;
mod verify;

use nix_compat::store_path::StorePath;
use nix_compat::worker::{Request, Response};

use crate::connection::Input;
use crate::context::Session;
use crate::error::OpError;
use crate::options;

pub(crate) use export::stream_nar;

/// How a request is answered.
#[derive(Debug)]
pub(crate) enum Reply {
    /// By a response.
    Response(Response),
    /// By the NAR of a valid path, bare.
    Nar(StorePath),
}

impl From<Response> for Reply {
    fn from(response: Response) -> Self {
        Self::Response(response)
    }
}

/// Does what the client asked for.
///
/// # Errors
/// What the client is to be told instead of a response.
pub(crate) async fn perform(session: &mut Session, input: &mut Input, request: Request) -> Result<Reply, OpError> {
    match session.gate.clone() {
        Some(gate) => restricted::perform(session, &gate, input, request).await,
        None => unrestricted(session, input, request).await,
    }
}

async fn unrestricted(session: &mut Session, input: &mut Input, request: Request) -> Result<Reply, OpError> {
    let payload = request.payload(&session.protocol);
    if adds_contents(&request) {
        session.make_room().await;
    }
    let response = match request {
        Request::SetOptions(sent) => {
            let granted = options::apply(&session.daemon.settings, &sent, session.is_trusted(), &session.events);
            if granted.trusted_public_keys != session.settings.trusted_public_keys {
                session.keys = options::public_keys(&granted, &session.events).unwrap_or(session.daemon.keys.clone());
            }
            session.settings = std::sync::Arc::new(granted);
            Response::Nothing
        }

        Request::IsValidPath(path) => Response::Bool(session.store().is_valid(&path)?),
        Request::QueryPathInfo(path) => Response::PathInfo(session.store().path_info(&path)?),
        Request::QueryPathHash(path) => query::path_hash(session, &path)?,
        Request::QueryReferences(path) => query::references(session, &path)?,
        Request::QueryReferrers(path) => Response::Paths(session.store().referrers(&path)?),
        Request::QueryDeriver(path) => query::deriver(session, &path)?,
        Request::QueryValidDerivers(path) => query::valid_derivers(session, &path)?,
        Request::QueryDerivationOutputs(path) => query::derivation_outputs(session, path).await?,
        Request::QueryDerivationOutputNames(path) => query::derivation_output_names(session, path).await?,
        Request::QueryDerivationOutputMap(path) => query::derivation_output_map(session, path).await?,
        Request::QueryPathFromHashPart(hash_part) => query::path_from_hash_part(session, &hash_part)?,
        Request::QueryAllValidPaths => query::all_valid_paths(session).await?,
        Request::QueryValidPaths { paths, substitute } => query::valid_paths(session, paths, substitute).await?,

        Request::HasSubstitutes(path) => substitutes::has(session, path).await,
        Request::QuerySubstitutablePaths(paths) => substitutes::paths(session, paths).await,
        Request::QuerySubstitutablePathInfo(path) => substitutes::info(session, path).await,
        Request::QuerySubstitutablePathInfos(paths) => substitutes::infos(session, paths).await,

        Request::AddToStore(_) | Request::AddToStoreOld { .. } => {
            add::content(session, input, request, payload).await?
        }
        Request::AddTextToStore { name, text, references } => add::text(session, name, text, references).await?,
        Request::AddToStoreNar(nar) => add::nar(session, input, nar, payload).await?,
        Request::AddMultipleToStore { repair: _, dont_check_sigs } => {
            multiple::add(session, input, dont_check_sigs, payload).await?
        }
        Request::AddSignatures { path, signatures } => maintain::add_signatures(session, path, signatures).await?,
        Request::AddBuildLog(path) => maintain::add_build_log(session, input, path, payload).await?,

        Request::NarFromPath(path) => {
            session.store().valid_entry(&path)?;
            session.temp_roots.add(&path);
            return Ok(Reply::Nar(path));
        }
        Request::ExportPath(path) => export::export(session, path).await?,
        Request::ImportPaths => export::import(session, input, payload).await?,

        Request::BuildPaths { paths, mode } => build::paths(session, paths, mode).await?,
        Request::BuildPathsWithResults { paths, mode } => build::paths_with_results(session, paths, mode).await?,
        Request::BuildDerivation { drv_path, derivation, mode } => {
            build::derivation(session, drv_path, derivation, mode).await?
        }
        Request::EnsurePath(path) => build::ensure(session, path).await?,
        Request::QueryMissing(paths) => build::missing(session, paths).await?,

        Request::QueryRealisation(id) => realisation::query(session, id).await?,
        Request::RegisterDrvOutput(realisation) => realisation::register(session, realisation).await?,

        Request::AddTempRoot(path) => {
            session.temp_roots.add(&path);
            Response::One
        }
        Request::AddIndirectRoot(link) => maintain::add_indirect_root(session, link).await?,
        Request::AddPermRoot { path, link } => maintain::add_permanent_root(session, path, link).await?,
        Request::FindRoots => maintain::find_roots(session).await?,
        Request::CollectGarbage(options) => maintain::collect_garbage(session, options).await?,
        // There is nothing to wait for: roots and collections see each other at once.
        Request::SyncWithGc => Response::One,
        Request::OptimiseStore => maintain::optimise(session).await?,
        Request::VerifyStore { check_contents, repair } => verify::verify(session, check_contents, repair).await?,
    };
    Ok(response.into())
}

/// Whether a request brings contents that take space.
fn adds_contents(request: &Request) -> bool {
    matches!(
        request,
        Request::AddToStore(_)
            | Request::AddToStoreOld { .. }
            | Request::AddTextToStore { .. }
            | Request::AddToStoreNar(_)
            | Request::AddMultipleToStore { .. }
            | Request::ImportPaths
    )
}
