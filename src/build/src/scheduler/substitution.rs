//! What need not be built because a substituter has it.
//!
//! It is looked for on behalf of whoever wants it, with its settings, before a goal begins: what a goal does is the same
//! for all who want it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use futures::StreamExt;
use futures::future::join_all;
use futures::stream;
use nix_compat::conf::Settings;
use nix_compat::derivation::{BasicDerivation, Output};
use nix_compat::realisation::DrvOutput;
use nix_compat::store_path::StorePath;
use nix_compat::worker::stderr::{Message, Verbosity};
use nix_compat::worker::{BuildResult, BuildStatus, OutputsSpec, SubstitutableInfo};
use substitute::{Copying, Outcome, Wanted, Watch};

use super::goal::blocking;
use super::plan::{NO_HASH, Plan};
use super::session::{Events, Session};
use super::{Client, OpenSession, Scheduler};
use crate::attributes::Attributes;
use crate::failure::Failure;
use crate::options::Options;

/// Paths of one request that are looked for at once.
pub(super) const LOOKUPS: usize = 256;

/// How one missing output may be had.
enum Source {
    Path(Wanted),
    Realisation(DrvOutput),
}

impl Scheduler {
    /// Makes a path valid without building it.
    pub(crate) async fn substitute(&self, session: &Session, wanted: Wanted) -> Outcome {
        self.keep_room(&session.settings).await;
        self.substituter.substitute(&session.substitution, wanted).await
    }

    /// The result for a derivation of which all wanted outputs are there, or are now; `None` if it has to be built.
    ///
    /// # Errors
    /// When a source had one but could not give it, and the client did not say that it then be built.
    pub(crate) async fn obtain(
        &self,
        session: &Session,
        drv: &StorePath,
        inline: Option<&BasicDerivation>,
        wanted: &OutputsSpec,
    ) -> Result<Option<BuildResult>, Failure> {
        let plan = self.plan(drv, inline).await?;
        if has_all(&plan, wanted) {
            return Ok(Some(plan.success(BuildStatus::AlreadyValid)));
        }
        if !session.substitution.substitutes() || !session.options.substitutes(&plan.derivation.basic) {
            return Ok(None);
        }
        let Some(sources) = sources(&plan, wanted, &session.options) else { return Ok(None) };
        plan.paths().for_each(|path| session.temp_roots.add(path));
        self.keep_room(&session.settings).await;
        let client = &session.substitution;
        let get = |source| async {
            match source {
                Source::Path(wanted) => self.substituter.substitute(client, wanted).await,
                Source::Realisation(id) => self.substituter.realise(client, id).await,
            }
        };
        let outcomes = join_all(sources.into_iter().map(get)).await;
        if outcomes.contains(&Outcome::Failed) && !session.options.fallback {
            let drv = self.store.store_dir().display(drv);
            let text = format!(
                "some substitutes for the outputs of derivation '{drv}' failed (usually happens due to networking \
                 issues); try '--fallback' to build derivation from source "
            );
            return Err(Failure::new(BuildStatus::TransientFailure, text));
        }
        if !outcomes.iter().all(Outcome::is_valid) {
            return Ok(None);
        }
        let plan = self.plan(drv, inline).await?;
        plan.paths().for_each(|path| session.temp_roots.add(path));
        Ok(has_all(&plan, wanted).then(|| plan.success(BuildStatus::Substituted)))
    }

    /// What is known of a derivation: of the one in the store, or of the one that a client sent.
    pub(super) async fn plan(&self, drv: &StorePath, inline: Option<&BasicDerivation>) -> Result<Plan, Failure> {
        let (store, drv, inline) = (self.store.clone(), drv.clone(), inline.cloned());
        blocking(move || match inline {
            Some(basic) => Plan::of(&store, &drv, Arc::new(basic.into())),
            None => Plan::load(&store, &drv),
        })
        .await
    }

    /// Makes paths valid as far as sources have them. Failures are only told.
    pub async fn substitute_paths(&self, paths: Vec<StorePath>, settings: Arc<Settings>, client: Client) {
        let options = Arc::new(Options::new(&settings));
        let session = OpenSession(Session::open(client.events, client.temp_roots, options, settings, client.gate));
        join_all(paths.into_iter().map(|path| self.substitute(&session.0, path.into()))).await;
    }

    /// What would be fetched for these paths. With `mass`, only sources that like to be asked for many are.
    pub async fn substitutable(
        &self,
        paths: Vec<Wanted>,
        mass: bool,
        settings: Arc<Settings>,
        client: Client,
    ) -> BTreeMap<StorePath, SubstitutableInfo> {
        let client = quiet(settings, client);
        let client = &client;
        let ask = |wanted: Wanted| async move {
            let path = wanted.path.clone();
            let info = match mass {
                true => self.substituter.mass_info(client, wanted).await,
                false => self.substituter.info(client, wanted).await,
            };
            info.map(|info| (path, info))
        };
        let asked = stream::iter(paths.into_iter().map(ask)).buffer_unordered(LOOKUPS);
        asked.filter_map(std::future::ready).collect().await
    }

    /// Which of the paths a source has.
    pub async fn substitutable_paths(
        &self,
        paths: BTreeSet<StorePath>,
        settings: Arc<Settings>,
        client: Client,
    ) -> BTreeSet<StorePath> {
        let wanted = paths.into_iter().map(Wanted::from).collect();
        self.substitutable(wanted, true, settings, client).await.into_keys().collect()
    }
}

/// A client of the substituter that shows no activities.
pub(super) fn quiet(settings: Arc<Settings>, client: Client) -> substitute::Client {
    substitute::Client::new(settings, client.temp_roots, Arc::new(LogOnly(client.events)))
}

/// Whether all wanted outputs are valid.
pub(super) fn has_all(plan: &Plan, wanted: &OutputsSpec) -> bool {
    plan.outputs.keys().all(|name| plan.has(name) || !wanted.contains(name))
}

/// Where the missing outputs may be had; `None` when one of them cannot be had elsewhere.
fn sources(plan: &Plan, wanted: &OutputsSpec, options: &Options) -> Option<Vec<Source>> {
    let basic = &plan.derivation.basic;
    let mut sources = Vec::new();
    for (name, output) in plan.outputs.iter().filter(|(name, output)| !output.valid && wanted.contains(name)) {
        sources.push(match &output.path {
            Some(path) => {
                let ca = fixed_address(basic.outputs.get(name));
                Source::Path(Wanted { path: path.clone(), ca, explicit: false })
            }
            None if basic.is_impure() || output.drv_hash == NO_HASH || !options.has_feature("ca-derivations") => {
                return None;
            }
            None => Source::Realisation(DrvOutput::Modulo { hash: output.drv_hash, output: name.clone() }),
        });
    }
    Some(sources)
}

/// What the contents of an output must be, if that is known.
pub(super) fn fixed_address(output: Option<&Output>) -> Option<nix_compat::content_address::ContentAddress> {
    match output {
        Some(Output::Fixed { ca, .. }) => Some(ca.clone()),
        _ => None,
    }
}

impl Options {
    /// Whether a derivation's outputs may come from elsewhere.
    pub(super) fn substitutes(&self, drv: &BasicDerivation) -> bool {
        let allowed = || Attributes::new(drv).is_ok_and(|attributes| attributes.flag_or("allowSubstitutes", true));
        !drv.is_impure() && (self.always_allow_substitutes || allowed())
    }
}

/// A session that copying is told to, as long as it is there.
pub(super) struct ToSession(pub(super) Weak<Session>);

impl ToSession {
    fn tell(&self, tell: impl FnOnce(&Session)) {
        if let Some(session) = self.0.upgrade() {
            tell(&session);
        }
    }
}

impl Watch for ToSession {
    fn log(&self, _: Verbosity, text: String) {
        self.tell(|session| session.log(text + "\n"));
    }

    fn expect(&self, paths: u64, download: u64, nar: u64) {
        self.tell(|session| session.expect_copies(paths, download, nar));
    }

    fn began(&self, copying: &Copying) {
        self.tell(|session| session.copy_started(copying));
    }

    fn progress(&self, copying: &Copying, file: u64, of_file: u64, nar: u64) {
        self.tell(|session| session.copy_progress(copying, file, of_file, nar));
    }

    fn ended(&self, copying: &Copying) {
        self.tell(|session| session.copy_ended(copying));
    }

    fn done(&self, success: bool, download: u64, nar: u64) {
        self.tell(|session| session.copy_done(success, download, nar));
    }
}

/// Warnings and errors only: for questions.
struct LogOnly(Arc<dyn Events>);

impl Watch for LogOnly {
    fn log(&self, _: Verbosity, text: String) {
        self.0.emit(Message::Next((text + "\n").into_bytes()));
    }
    fn expect(&self, _: u64, _: u64, _: u64) {}
    fn began(&self, _: &Copying) {}
    fn progress(&self, _: &Copying, _: u64, _: u64, _: u64) {}
    fn ended(&self, _: &Copying) {}
    fn done(&self, _: bool, _: u64, _: u64) {}
}
