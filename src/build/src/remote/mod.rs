//! Building on other machines (`builders`), as stock's build hook does it.
//!
//! [`place`] finds a build its place: on another machine if one can have it ([`pool`]), else here. What is built
//! elsewhere is one [`job`]: connect, copy inputs there, build, copy outputs back.
//!
//! **What comes back is hashed while it is stored, and durable before it is answered**, as if it had been built here.

mod job;
mod log;
mod pool;
mod turn;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix_compat::derivation::{BasicDerivation, Output, OutputName};
use nix_compat::machines::{self, Machine};
use nix_compat::store_path::StorePath;
use nix_compat::worker::{BuildMode, BuildResult};
use remote::Stopper;

use self::job::{Ended, Job};
use self::pool::Found;
pub(crate) use self::pool::Pool;
pub(crate) use self::turn::Turn;
use crate::attributes::Attributes;
use crate::failure::Failure;
use crate::options::Options;
use crate::scheduler::goal::{Realisation, blocking};

/// How often it is looked again for a machine: one that could not be reached may be back.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// What a machine must have to build derivations whose output paths follow from their contents.
const CONTENT_ADDRESSED: &str = "ca-derivations";

/// Something to build, wherever.
pub(crate) struct Wish {
    pub(crate) drv: Arc<BasicDerivation>,
    /// Whether the stored derivation has input derivations, whose outputs then stand among `inputs`.
    pub(crate) has_input_drvs: bool,
    /// Every output, with its path if that is known before it is built.
    pub(crate) outputs: BTreeMap<OutputName, Option<StorePath>>,
    /// Store paths it builds upon.
    pub(crate) inputs: BTreeSet<StorePath>,
    /// Why it cannot be built here, if so.
    pub(crate) here: Result<(), Failure>,
}

/// What another machine has built. The outputs are valid here.
#[derive(Debug)]
pub(crate) struct Built {
    /// Where the outputs are.
    pub(crate) outputs: BTreeMap<OutputName, StorePath>,
    /// What the machine said of the build.
    pub(crate) result: BuildResult,
}

/// Where a build takes place.
pub(crate) enum Place {
    /// Here, and it is its turn.
    Here(Turn),
    /// On another machine, and it is done.
    Elsewhere(Built),
}

/// Has a derivation built on another machine, or waits for its turn to be built here.
pub(crate) async fn place(realisation: &Realisation, wish: Wish) -> Result<Place, Failure> {
    let Realisation { scheduler, goal, session, mode, .. } = realisation;
    let name = scheduler.store.store_dir().display(&goal.key.drv);
    let attributes = Attributes::new(&wish.drv).map_err(|e| Failure::attributes(&name, &e));
    let machines = match mode {
        // To compare or repair is this machine's own business, as in stock.
        BuildMode::Check | BuildMode::Repair => Arc::default(),
        BuildMode::Normal => list(realisation).await?,
    };
    let (mut features, mut prefers_here) = (BTreeSet::new(), false);
    if !machines.is_empty() {
        let attributes = attributes?;
        features.extend(attributes.words("requiredSystemFeatures").unwrap_or_default());
        if wish.drv.outputs.values().any(|output| matches!(output, Output::Floating { .. } | Output::Impure { .. })) {
            features.insert(CONTENT_ADDRESSED.to_owned());
        }
        prefers_here = attributes.flag("preferLocalBuild") && wish.here.is_ok();
    }
    let system = String::from_utf8_lossy(&wish.drv.platform).into_owned();
    let suits = |machine: &&Machine| !prefers_here && machine.builds(&system, features.iter().map(String::as_str));
    let suitable: Vec<&Machine> = machines.iter().filter(suits).collect();

    let here = {
        let (own, all, possible) = (session.jobs.clone(), scheduler.jobs.clone(), wish.here.is_ok());
        async move { if possible { turn::wait(goal, own, all).await } else { std::future::pending().await } }
    };
    tokio::pin!(here);
    let wish = Arc::new(wish);
    let mut lost: Option<Failure> = None;
    loop {
        let change = scheduler.pool.change();
        match scheduler.pool.take(&suitable) {
            Found::Slot(i, slot) => {
                let machine = suitable[i];
                match elsewhere(realisation, &wish, machine.clone(), slot).await? {
                    Ended::Built(built) => return Ok(Place::Elsewhere(built)),
                    Ended::Unreachable(slot, error) => {
                        let text = format!("cannot build on '{}': {error}", machine.store);
                        tracing::warn!("{text}");
                        goal.feed.note(&text);
                        slot.unreachable(error.to_string());
                    }
                    // What takes two machines down with it is not tried on a third.
                    Ended::Lost(_, failure) if lost.is_some() => return Err(failure),
                    Ended::Lost(slot, failure) => {
                        let text = format!("{}; trying elsewhere", failure.message);
                        tracing::warn!("{text}");
                        goal.feed.lost(&text);
                        slot.unreachable(failure.message.clone());
                        lost = Some(failure);
                    }
                }
            }
            Found::Busy => tokio::select! {
                turn = &mut here => return turn.map(Place::Here),
                () = change => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            },
            Found::Unreachable(reasons) => {
                if let Err(failure) = &wish.here {
                    if let Some(failure) = lost {
                        return Err(failure);
                    }
                    if !machines.is_empty() && !prefers_here {
                        goal.feed.note(&no_machine(&name, &system, &features, &machines, &reasons));
                    }
                    return Err(failure.clone());
                }
                return here.await.map(Place::Here);
            }
        }
    }
}

/// Runs a build on a machine in a thread of its own: there may be more machines than shared threads.
async fn elsewhere(
    realisation: &Realisation,
    wish: &Arc<Wish>,
    machine: Machine,
    slot: pool::Slot,
) -> Result<Ended, Failure> {
    let scheduler = &realisation.scheduler;
    let stopper = StopOnDrop(Stopper::default());
    let job = Job {
        store: scheduler.store.clone(),
        config: scheduler.config.clone(),
        options: realisation.session.options.clone(),
        goal: realisation.goal.clone(),
        running: scheduler.running.clone(),
        wish: wish.clone(),
        machine,
        stopper: stopper.0.clone(),
    };
    let (done, ended) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("remote-build".into()).spawn(move || {
        // Nobody waits any more when the goal was given up.
        let _ = done.send(job.run(slot));
    });
    thread.map_err(|e| Failure::misc(format!("cannot start a thread for a remote build: {e}")))?;
    ended.await.map_err(|_| Failure::misc("a thread of the daemon failed"))?
}

/// Ends a build with its goal.
struct StopOnDrop(Stopper);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// The machines of the client's settings, read once for its request.
async fn list(realisation: &Realisation) -> Result<Arc<[Machine]>, Failure> {
    let session = &realisation.session;
    let options = session.options.clone();
    let read = || blocking(move || Ok(read(&options)));
    session.machines.get_or_try_init(read).await?.clone().map_err(Failure::misc)
}

/// Reads the machines with the files that are named. Blocks.
fn read(options: &Options) -> Result<Arc<[Machine]>, machines::Error> {
    let systems = [options.system.clone()].into();
    let mut include = |path: &str| match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    };
    machines::parse(&options.builders, &systems, &mut include).map(Arc::from)
}

/// What stock says when a derivation can be built neither here nor elsewhere.
fn no_machine(
    drv: &str,
    system: &str,
    features: &BTreeSet<String>,
    machines: &[Machine],
    unreachable: &[String],
) -> String {
    let list = |words: &BTreeSet<String>| words.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    let mut text = format!(
        "Failed to find a machine for remote build!\nderivation: {drv}\nrequired (system, features): ({system}, [{}])\n\
         {} available machines:\n(systems, maxjobs, supportedFeatures, mandatoryFeatures)",
        list(features),
        machines.len()
    );
    for machine in machines {
        text.push_str(&format!(
            "\n([{}], {}, [{}], [{}])",
            list(&machine.systems),
            machine.max_jobs,
            list(&machine.supported_features),
            list(&machine.mandatory_features)
        ));
    }
    for reason in unreachable {
        text.push('\n');
        text.push_str(reason);
    }
    text
}
