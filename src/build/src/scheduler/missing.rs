//! What a request would build and fetch, found out without doing either.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use futures::future::join_all;
use futures::stream;
use nix_compat::conf::Settings;
use nix_compat::derivation::OutputName;
use nix_compat::realisation::DrvOutput;
use nix_compat::store_path::StorePath;
use nix_compat::worker::{DerivedPath, Missing, OutputsSpec, SubstitutableInfo};
use store::Store;
use substitute::Wanted;

use super::goal::blocking;
use super::plan::{NO_HASH, Plan};
use super::substitution::{LOOKUPS, fixed_address, has_all, quiet};
use super::{Client, Scheduler};
use crate::failure::Failure;
use crate::options::Options;

/// Where to go on.
enum Step {
    /// A path that is not valid.
    Path(Wanted),
    /// A derivation with outputs that are not valid.
    Derivation(StorePath, Box<Plan>, OutputsSpec),
}

/// What sources say of one step.
enum Answer {
    Path(StorePath, Option<SubstitutableInfo>),
    /// The outputs that would be fetched; `None` if it has to be built.
    Derivation(StorePath, Box<Plan>, Option<Vec<(StorePath, SubstitutableInfo)>>),
}

impl Scheduler {
    /// Walks from the wanted paths down to what is valid or can be fetched.
    pub(super) async fn missing(
        &self,
        wanted: Vec<DerivedPath>,
        settings: Arc<Settings>,
        client: Client,
    ) -> Result<Missing, Failure> {
        let options = Options::new(&settings);
        let client = quiet(settings, client);
        let mut missing = Missing::default();
        let mut seen = Seen::default();
        let mut todo = wanted;
        while !todo.is_empty() {
            let store = self.store.clone();
            let round = std::mem::take(&mut todo);
            let (steps, unknown);
            (steps, unknown, seen) = blocking(move || seen.look(&store, round)).await?;
            missing.unknown.extend(unknown);
            let ask = |step| self.ask(&client, &options, step);
            let mut asked = stream::iter(steps.into_iter().map(ask)).buffer_unordered(LOOKUPS);
            while let Some(answer) = asked.next().await {
                let mut fetched = Vec::new();
                match answer {
                    Answer::Path(path, Some(info)) => fetched.push((path, info)),
                    Answer::Path(path, None) => drop(missing.unknown.insert(path)),
                    Answer::Derivation(_, _, Some(outputs)) => fetched = outputs,
                    Answer::Derivation(drv, plan, None) => {
                        missing.will_build.insert(drv);
                        todo.extend(inputs(&plan));
                    }
                }
                for (path, info) in fetched {
                    if missing.will_substitute.insert(path) {
                        missing.download_size = missing.download_size.saturating_add(info.download_size);
                        missing.nar_size = missing.nar_size.saturating_add(info.nar_size);
                        todo.extend(info.references.into_iter().map(DerivedPath::Opaque));
                    }
                }
            }
        }
        Ok(missing)
    }

    async fn ask(&self, client: &substitute::Client, options: &Options, step: Step) -> Answer {
        let (drv, plan, wanted) = match step {
            Step::Path(wanted) => {
                let path = wanted.path.clone();
                return Answer::Path(path, self.substituter.info(client, wanted).await);
            }
            Step::Derivation(drv, plan, wanted) => (drv, plan, wanted),
        };
        let basic = &plan.derivation.basic;
        if !client.substitutes() || !options.substitutes(basic) {
            return Answer::Derivation(drv, plan, None);
        }
        let absent = plan.outputs.iter().filter(|(name, output)| !output.valid && wanted.contains(name));
        let look = |(name, output): (&OutputName, &super::plan::PlannedOutput)| {
            let ca = fixed_address(basic.outputs.get(name));
            let known = output.path.clone();
            let id = DrvOutput::Modulo { hash: output.drv_hash, output: name.clone() };
            let floating = output.drv_hash != NO_HASH && options.has_feature("ca-derivations");
            async move {
                let path = match known {
                    Some(path) => path,
                    None if floating => self.substituter.realisation(client, id).await?.out_path,
                    None => return None,
                };
                if self.store.is_valid(&path).unwrap_or(false) {
                    return Some(None);
                }
                let wanted = Wanted { path: path.clone(), ca, explicit: false };
                self.substituter.info(client, wanted).await.map(|info| Some((path, info)))
            }
        };
        let found: Option<Vec<_>> = join_all(absent.map(look)).await.into_iter().collect();
        let found = found.map(|found| found.into_iter().flatten().collect());
        Answer::Derivation(drv, plan, found)
    }
}

/// What was looked at already.
#[derive(Default)]
struct Seen(HashSet<DerivedPath>);

impl Seen {
    /// Sorts out what is valid; gives what is not, and what nothing can be said of. Blocks.
    fn look(
        mut self,
        store: &Store,
        paths: Vec<DerivedPath>,
    ) -> Result<(Vec<Step>, BTreeSet<StorePath>, Self), Failure> {
        let (mut steps, mut unknown) = (Vec::new(), BTreeSet::new());
        for path in paths {
            if !self.0.insert(path.clone()) {
                continue;
            }
            let (drv, outputs) = match path {
                DerivedPath::Opaque(path) => {
                    if !store.is_valid(&path)? {
                        steps.push(Step::Path(path.into()));
                    }
                    continue;
                }
                DerivedPath::Built { drv, outputs } => (drv, outputs),
                // Nothing is known of the derivation that the last outputs are of.
                DerivedPath::Dynamic { drv, through, .. } => {
                    (drv, OutputsSpec::Names(through.into_iter().take(1).collect()))
                }
            };
            if !store.is_valid(&drv)? {
                unknown.insert(drv);
                continue;
            }
            // What cannot be planned will say so when it is built.
            let Ok(plan) = Plan::load(store, &drv) else { continue };
            if !has_all(&plan, &outputs) {
                steps.push(Step::Derivation(drv, Box::new(plan), outputs));
            }
        }
        Ok((steps, unknown, self))
    }
}

/// What a derivation is built from.
fn inputs(plan: &Plan) -> impl Iterator<Item = DerivedPath> {
    let sources = plan.derivation.basic.input_srcs.iter().cloned().map(DerivedPath::Opaque);
    sources.chain(plan.derivation.input_drvs.iter().map(|(drv, wanted)| DerivedPath::Built {
        drv: drv.clone(),
        outputs: OutputsSpec::Names(wanted.names().cloned().collect()),
    }))
}
