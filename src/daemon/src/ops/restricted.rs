//! What a running build may ask for: the operations behind a [`Gate`].
//!
//! [`judge`] is the list of them. It names each, so that a new one is not let through before somebody has thought about
//! it. Where stock has an answer for recursive Nix, it is stock's.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ::build::Gate;
use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, Request, Response};

use super::{Reply, unrestricted};
use crate::connection::Input;
use crate::context::Session;
use crate::error::OpError;

/// What is to be done with a request.
enum Verdict {
    /// Nothing: this is the answer.
    Answer(Response),
    /// It is performed, and this is done with the response.
    Perform(Then),
}

/// What becomes of the response to a request that was performed.
enum Then {
    /// It says nothing that the build may not know.
    Keep,
    /// What is said of a path is reduced to what its contents say.
    Censor,
    /// A path is named only if the build may see it.
    OnlySeen,
    /// The path it names was added: its contents have named it.
    AdmitAdded,
    /// This path was added, and contents of this hash sent.
    AdmitSent(StorePath, NarHash),
    /// These paths are unknown as well.
    Unknown(BTreeSet<StorePath>),
}

/// Does what a running build asked for, as far as it may.
///
/// # Errors
/// As for every client, and when the build may not.
pub(super) async fn perform(
    session: &mut Session,
    gate: &Arc<Gate>,
    input: &mut Input,
    mut request: Request,
) -> Result<Reply, OpError> {
    match judge(session, gate, &mut request)? {
        Verdict::Answer(response) => Ok(response.into()),
        Verdict::Perform(then) => match unrestricted(session, input, request).await? {
            Reply::Response(response) => Ok(then.apply(session, gate, response).await?.into()),
            nar @ Reply::Nar(_) => Ok(nar),
        },
    }
}

fn judge(session: &Session, gate: &Gate, request: &mut Request) -> Result<Verdict, OpError> {
    use Verdict::{Answer, Perform};
    let display = |path: &StorePath| session.store().store_dir().display(path);
    let sees = |path: &StorePath| gate.allows(path);
    let require = |path: &StorePath, refusal: &dyn Fn(String) -> String| {
        if gate.allows(path) { Ok(()) } else { Err(OpError::new(refusal(display(path)))) }
    };
    let valid = |path: &StorePath| require(path, &|path| format!("path '{path}' is not valid"));
    let dumpable =
        |path: &StorePath| require(path, &|path| format!("cannot dump unknown path '{path}' in recursive Nix"));
    let buildable = |path: &StorePath| {
        require(path, &|path| format!("cannot build '{path}' in recursive Nix because path is unknown"))
    };
    Ok(match request {
        Request::SetOptions(options) => {
            // The settings in force are those of whoever wants the build.
            session.events.set_verbosity(options.verbosity);
            Answer(Response::Nothing)
        }

        Request::IsValidPath(path) if sees(path) => Perform(Then::Keep),
        Request::IsValidPath(_) => Answer(Response::Bool(false)),
        Request::QueryPathInfo(path) if sees(path) => Perform(Then::Censor),
        Request::QueryPathInfo(_) => Answer(Response::PathInfo(None)),
        Request::QueryPathHash(path) | Request::QueryReferences(path) => {
            valid(path)?;
            Perform(Then::Keep)
        }
        // Who made a path, and who needs it, differs from store to store.
        Request::QueryDeriver(path) => {
            valid(path)?;
            Answer(Response::Path(None))
        }
        Request::QueryReferrers(_) | Request::QueryValidDerivers(_) => Answer(Response::Paths(BTreeSet::new())),
        Request::QueryDerivationOutputs(path)
        | Request::QueryDerivationOutputNames(path)
        | Request::QueryDerivationOutputMap(path) => {
            require(path, &|path| format!("cannot query output map for unknown path '{path}' in recursive Nix"))?;
            Perform(Then::Keep)
        }
        Request::QueryPathFromHashPart(_) => Perform(Then::OnlySeen),
        Request::QueryAllValidPaths => Answer(Response::Paths(gate.paths())),
        Request::QueryValidPaths { paths, substitute } => {
            paths.retain(|path| sees(path));
            *substitute = false;
            Perform(Then::Keep)
        }

        Request::HasSubstitutes(_) => Answer(Response::Bool(false)),
        Request::QuerySubstitutablePaths(_) => Answer(Response::Paths(BTreeSet::new())),
        Request::QuerySubstitutablePathInfo(_) => Answer(Response::SubstitutableInfo(None)),
        Request::QuerySubstitutablePathInfos(_) => Answer(Response::SubstitutableInfos(BTreeMap::new())),

        Request::AddToStore(_) | Request::AddToStoreOld { .. } | Request::AddTextToStore { .. } => {
            Perform(Then::AdmitAdded)
        }
        Request::AddToStoreNar(nar) => Perform(Then::AdmitSent(nar.info.path.clone(), nar.info.nar_hash)),
        // These admit each path as it comes: the next may refer to it.
        Request::AddMultipleToStore { .. } | Request::ImportPaths => Perform(Then::Keep),
        Request::AddSignatures { .. } => {
            return Err(OpError::new("operation 'addSignatures' is not supported by store 'local'"));
        }
        // Refused to everybody who is not trusted, with the log that follows.
        Request::AddBuildLog(_) => Perform(Then::Keep),

        Request::NarFromPath(path) | Request::ExportPath(path) => {
            dumpable(path)?;
            Perform(Then::Keep)
        }

        // These admit what was built.
        Request::BuildPaths { paths, mode } | Request::BuildPathsWithResults { paths, mode } => {
            check_mode(*mode)?;
            paths.iter().try_for_each(|path| buildable(path.base()))?;
            Perform(Then::Keep)
        }
        Request::BuildDerivation { derivation, mode, .. } => {
            check_mode(*mode)?;
            derivation.input_srcs.iter().try_for_each(buildable)?;
            Perform(Then::Keep)
        }
        Request::EnsurePath(path) => {
            require(path, &|path| format!("cannot substitute unknown path '{path}' in recursive Nix"))?;
            Answer(Response::One)
        }
        Request::QueryMissing(paths) => {
            let (known, unknown): (Vec<_>, Vec<_>) = std::mem::take(paths).into_iter().partition(|p| sees(p.base()));
            *paths = known;
            Perform(Then::Unknown(unknown.iter().map(|path| path.base().clone()).collect()))
        }

        Request::QueryRealisation(_) => Perform(Then::OnlySeen),
        Request::RegisterDrvOutput(_) => return Err(OpError::new("registerDrvOutput")),

        // What the build may see is kept by the build; roots and garbage are none of its business.
        Request::AddTempRoot(_) | Request::AddIndirectRoot(_) | Request::SyncWithGc | Request::OptimiseStore => {
            Answer(Response::One)
        }
        // Refused to everybody who is not trusted.
        Request::AddPermRoot { .. } | Request::VerifyStore { repair: true, .. } => Perform(Then::Keep),
        Request::FindRoots => Answer(Response::Roots(Vec::new())),
        Request::CollectGarbage(options) if options.ignore_liveness => {
            return Err(OpError::new("you are not allowed to ignore liveness"));
        }
        Request::CollectGarbage(_) => Answer(Response::Collected { paths: BTreeSet::new(), bytes_freed: 0 }),
        Request::VerifyStore { repair: false, .. } => Answer(Response::Bool(false)),
    })
}

fn check_mode(mode: BuildMode) -> Result<(), OpError> {
    match mode {
        // Repairing is refused to everybody who is not trusted.
        BuildMode::Normal | BuildMode::Repair => Ok(()),
        BuildMode::Check => Err(OpError::new("unsupported build mode")),
    }
}

impl Then {
    async fn apply(self, session: &Session, gate: &Arc<Gate>, response: Response) -> Result<Response, OpError> {
        Ok(match (self, response) {
            (Self::Keep, response) => response,
            (Self::Censor, Response::PathInfo(Some(info))) => Response::PathInfo(Some(censored(info))),
            (Self::Censor, response) => response,
            (Self::OnlySeen, Response::Path(path)) => Response::Path(path.filter(|path| gate.allows(path))),
            (Self::OnlySeen, Response::Realisation(found)) => {
                let mut seen = found.filter(|found| gate.allows(&found.out_path));
                if let Some(realisation) = &mut seen {
                    realisation.dependencies.retain(|_, path| gate.allows(path));
                }
                Response::Realisation(seen)
            }
            (Self::AdmitAdded, Response::AddedPath(info)) => {
                admit(session, gate, info.path.clone(), None).await?;
                Response::AddedPath(censored(info))
            }
            (Self::AdmitAdded, Response::Path(Some(path))) => {
                admit(session, gate, path.clone(), None).await?;
                Response::Path(Some(path))
            }
            (Self::AdmitSent(path, hash), response) => {
                admit(session, gate, path, Some(hash)).await?;
                response
            }
            (Self::Unknown(unknown), Response::Missing(mut missing)) => {
                missing.unknown.extend(unknown);
                Response::Missing(missing)
            }
            (Self::OnlySeen | Self::AdmitAdded | Self::Unknown(_), _) => {
                return Err(OpError::internal("a response of another kind than its request"));
            }
        })
    }
}

async fn admit(session: &Session, gate: &Arc<Gate>, path: StorePath, nar_hash: Option<NarHash>) -> Result<(), OpError> {
    let gate = gate.clone();
    session.blocking(move |_| Ok(gate.admit_sent(&path, nar_hash.as_ref())?)).await
}

/// What is the same in every store.
fn censored(info: PathInfo) -> PathInfo {
    PathInfo { deriver: None, registration_time: 0, ultimate: false, signatures: BTreeSet::new(), ..info }
}
