//! Repairing: valid paths whose contents are damaged are fetched or built again.
//!
//! As stock does it: of a derivation whose outputs are valid everything these refer to is looked at, and what is not as it
//! was registered is repaired, what is referred to first. A path comes from a substituter if one has it, else its
//! derivation is built again; see [`Store::replace_contents`] for what becomes of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use nix_compat::conf::Settings;
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildResult, BuildStatus, OutputsSpec};
use store::{NewPath, Store};
use substitute::Contents;

use super::goal::blocking;
use super::graph::GoalKey;
use super::session::Session;
use super::{Client, OpenSession, Scheduler, unwrap_result};
use crate::failure::Failure;
use crate::options::Options;

impl Scheduler {
    /// Has the contents of a valid path put into the store again, whether they are damaged or not; makes it valid if it
    /// is not.
    ///
    /// # Errors
    /// When it cannot be had: why not, for the user.
    pub async fn repair_path(
        self: &Arc<Self>,
        path: StorePath,
        settings: Arc<Settings>,
        client: Client,
    ) -> Result<(), String> {
        let options = Arc::new(Options { client_uid: client.uid, ..Options::new(&settings) });
        let session = OpenSession(Session::open(client.events, client.temp_roots, options, settings, client.gate));
        session.0.temp_roots.add(&path);
        let valid = self.store.is_valid(&path).map_err(|e| e.to_string())?;
        if !valid && self.substitute(&session.0, path.clone().into()).await.is_valid() {
            return Ok(());
        }
        self.mend(&path, &session.0).await.map_err(|failure| failure.message)
    }

    /// A path that is wanted as it is: valid and sound.
    pub(super) async fn repair_opaque(
        self: &Arc<Self>,
        path: StorePath,
        session: &Arc<Session>,
    ) -> Result<BuildResult, Failure> {
        let result = self.realise_opaque(path.clone(), session).await?;
        if result.status != BuildStatus::AlreadyValid || self.is_sound(&path).await? {
            return Ok(result);
        }
        self.mend(&path, session).await?;
        Ok(BuildResult::new(BuildStatus::Substituted, ""))
    }

    /// The outputs of a derivation, made if they are not valid, and sound with all they refer to.
    pub(super) async fn repair_built(
        self: &Arc<Self>,
        drv: StorePath,
        wanted: &OutputsSpec,
        session: &Arc<Session>,
    ) -> Result<BuildResult, Failure> {
        let result = self.realise_built(drv, wanted, BuildMode::Normal, session).await?;
        if !result.status.is_success() {
            return Ok(result);
        }
        self.repair_closure(&result, session).await?;
        Ok(result)
    }

    /// Repairs what is not sound of outputs that are valid, and of all they refer to.
    pub(super) async fn repair_closure(
        self: &Arc<Self>,
        result: &BuildResult,
        session: &Arc<Session>,
    ) -> Result<(), Failure> {
        let outputs: Vec<StorePath> = result.built_outputs.values().map(|output| output.path.clone()).collect();
        let store = self.store.clone();
        for path in blocking(move || Ok(references_first(&store, &outputs)?)).await? {
            if self.is_sound(&path).await? {
                continue;
            }
            let name = self.store.store_dir().display(&path);
            session.log(format!("error: found corrupted or missing path '{name}' in the output closure\n"));
            self.mend(&path, session).await?;
        }
        Ok(())
    }

    /// Whether a path is as it was registered. What of it can be saved from damaged blocks is.
    async fn is_sound(&self, path: &StorePath) -> Result<bool, Failure> {
        let (store, path) = (self.store.clone(), path.clone());
        blocking(move || Ok(store.heal_path(&path)?.is_none())).await
    }

    /// Puts the contents of a path into the store again.
    async fn mend(self: &Arc<Self>, path: &StorePath, session: &Arc<Session>) -> Result<(), Failure> {
        let name = self.store.store_dir().display(path);
        if session.substitution.substitutes()
            && let Contents::Found(new) = self.substituter.contents(&session.substitution, path.clone().into()).await
        {
            return self.replace(*new).await;
        }
        let Some(drv) = self.deriver(path).await? else {
            return Err(Failure::misc(format!(
                "cannot repair path '{name}': no substituter has it, and no derivation is known that makes it"
            )));
        };
        let key = GoalKey::stored(drv, BuildMode::Repair);
        let (result, _) = self.settle(key, session, BuildMode::Repair, None, |goal| goal.attach(session)).await;
        let result = unwrap_result(result.as_deref());
        if !result.status.is_success() {
            return Err(Failure::new(result.status, result.error));
        }
        if !self.is_sound(path).await? {
            return Err(Failure::misc(format!("cannot repair path '{name}': building it again did not mend it")));
        }
        Ok(())
    }

    async fn replace(&self, new: NewPath) -> Result<(), Failure> {
        let store = self.store.clone();
        blocking(move || Ok(store.replace_contents(new)?)).await
    }

    /// A valid derivation that has the path as an output.
    async fn deriver(&self, path: &StorePath) -> Result<Option<StorePath>, Failure> {
        let (store, path) = (self.store.clone(), path.clone());
        blocking(move || {
            let noted = store.path_info(&path)?.and_then(|info| info.deriver);
            if let Some(drv) = noted
                && store.is_valid(&drv)?
            {
                return Ok(Some(drv));
            }
            Ok(store.valid_derivers(&path)?.into_keys().next())
        })
        .await
    }
}

/// The closure of these paths in an order in which none comes before one it refers to. Blocks.
fn references_first(store: &Store, paths: &[StorePath]) -> store::Result<Vec<StorePath>> {
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    let mut stack: Vec<(StorePath, bool)> = paths.iter().map(|path| (path.clone(), false)).collect();
    while let Some((path, left)) = stack.pop() {
        if left {
            order.push(path);
        } else if seen.insert(path.clone()) {
            let references = store.path_info(&path)?.map(|info| info.references).unwrap_or_default();
            stack.push((path, true));
            stack.extend(references.into_iter().map(|reference| (reference, false)));
        }
    }
    Ok(order)
}
