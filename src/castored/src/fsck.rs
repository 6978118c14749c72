//! `castored fsck`: checking a store, repairing it, and making its index anew.
//!
//! A daemon that runs does the work itself and goes on serving; it is asked on a socket of its own ([`serve`]), which lies
//! where only its user may enter. Without one the store is opened here.
//!
//! | exit code | |
//! |---|---|
//! | 0 | nothing was found |
//! | 1 | it could not be done, or was ended early |
//! | 2 | damage was found, and all of it repaired |
//! | 3 | damage was found and is still there |

mod castores;
mod news;
mod serve;
mod show;
mod work;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::sync::Arc;

use ::daemon::Locations;
use indicatif::{ProgressBar, ProgressStyle};
use nix_compat::store_path::StorePath;
use remote::ClientError;
use store::fsck::Mended;
use store::{Config, Store};
use substitute::{Contents, NoWatch, Outcome, Substituter, Substituters};

use crate::failure::Failure;
use crate::{daemon, state};
use castores::Castores;
use news::{News, Request, Summary};
use show::Show;

pub(crate) use serve::{Server, listen};

/// Damage was found, and all of it repaired.
const REPAIRED: u8 = 2;
/// Damage was found and is still there.
const DAMAGED: u8 = 3;

/// What is asked for on the command line.
pub(crate) struct Options {
    pub(crate) repair: bool,
    pub(crate) rebuild_index: bool,
    pub(crate) json: bool,
    /// Only these, with the paths they lie in; all when there are none.
    pub(crate) paths: Vec<String>,
}

pub(crate) fn run(locations: &Locations, options: Options) -> Result<ExitCode, Failure> {
    if options.rebuild_index {
        return rebuild(locations);
    }
    let paths = options.paths.iter().map(|path| base_name(locations, path)).collect::<Result<_, _>>()?;
    let request = Request { repair: options.repair, paths };
    let show = Show::new(options.json);
    let summary = match serve::ask(&locations.state_dir, &request, &show) {
        Err(Failure::Client(ClientError::NoDaemon { .. })) => offline(locations, &request, &show)?,
        other => other?,
    };
    show.end(&summary);
    Ok(match summary {
        summary if summary.ended => ExitCode::FAILURE,
        summary if summary.found == 0 && summary.affected == 0 => ExitCode::SUCCESS,
        summary if summary.left() == 0 => ExitCode::from(REPAIRED),
        _ => ExitCode::from(DAMAGED),
    })
}

/// The base name of the store path that `text` is or lies in.
pub(crate) fn base_name(locations: &Locations, text: &str) -> Result<String, Failure> {
    let below = text.strip_prefix(locations.store_dir.as_str()).map_or(text, |rest| rest.trim_start_matches('/'));
    let name = below.split('/').next().unwrap_or_default();
    match StorePath::from_base_name(name) {
        Ok(path) => Ok(path.base_name().to_owned()),
        Err(error) => Err(Failure::Usage(format!("'{text}' is no store path: {error}"))),
    }
}

/// The check of a store that no daemon has.
fn offline(locations: &Locations, request: &Request, show: &Show) -> Result<Summary, Failure> {
    state::prepare(locations)?;
    let store = Store::open(Config::new(locations.store_dir.clone(), &locations.state_dir))?;
    let settings = Arc::new(daemon::settings(locations, &[])?);
    let runtime =
        tokio::runtime::Runtime::new().map_err(|source| Failure::Process { action: "start the runtime", source })?;
    let castores = Castores::new(&settings, runtime.handle());
    let roots = Arc::new(store.new_temp_roots());
    let client = substitute::Client::new(settings, roots, Arc::new(NoWatch));
    let sources = Substituters::new(store.clone());
    let mut mend = |path: &StorePath| {
        castores.mend(&store, path, &mut |path| runtime.block_on(fetch(&store, &sources, &client, path)))
    };
    Ok(work::run(&store, request, &mut mend, show)?)
}

/// Has the contents of a path fetched. Nothing can be built without the daemon.
async fn fetch(store: &Store, sources: &Substituters, client: &substitute::Client, path: &StorePath) -> Mended {
    if !store.is_valid(path).map_err(|e| e.to_string())? {
        return match sources.substitute(client, path.clone().into()).await {
            Outcome::AlreadyValid | Outcome::Substituted => Ok(()),
            Outcome::Unavailable => Err("no substituter has it".to_owned()),
            Outcome::Failed => Err("the substituter that has it failed".to_owned()),
        };
    }
    match sources.contents(client, path.clone().into()).await {
        Contents::Found(new) => store.replace_contents(*new).map_err(|e| e.to_string()),
        Contents::Unavailable => {
            Err("no substituter has it; a daemon that runs could try to build it again".to_owned())
        }
        Contents::Failed => Err("the substituter that has it failed".to_owned()),
    }
}

fn rebuild(locations: &Locations) -> Result<ExitCode, Failure> {
    state::prepare(locations)?;
    let config = Config::new(locations.store_dir.clone(), &locations.state_dir);
    let bar = ProgressBar::new(Store::rebuild_size(&config)?);
    if let Ok(style) =
        ProgressStyle::with_template("reading packs {bar:30} {bytes}/{total_bytes} ({bytes_per_sec}, {eta})")
    {
        bar.set_style(style);
    }
    let progress = |bytes| {
        bar.inc(bytes);
        ControlFlow::Continue(())
    };
    let rebuilt = Store::rebuild(config, &progress)?;
    bar.finish_and_clear();
    let dir = &locations.store_dir;
    for told in &rebuilt.packs.told {
        println!("{told}");
    }
    for dropped in &rebuilt.dropped {
        println!("not valid any more: '{}': {}", dir.display(&dropped.path), dropped.reason);
    }
    for damaged in &rebuilt.damaged {
        println!("damaged: '{}': {}", dir.display(&damaged.path), damaged.reason);
    }
    if let Some(before) = &rebuilt.packs.before {
        println!("the index that was there is now '{}'; delete it when you are content", before.display());
    }
    println!(
        "{} paths, {} realisations and {} objects came back from {} packs",
        rebuilt.paths, rebuilt.realisations, rebuilt.packs.objects, rebuilt.packs.packs
    );
    if rebuilt.packs.is_whole() && rebuilt.unreadable_records == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{} places in the packs are damaged ({} bytes in which no block could be made out, {} objects saved, {} records \
         unreadable); `castored fsck --repair` repairs what can be had elsewhere",
        rebuilt.packs.damaged, rebuilt.packs.lost_bytes, rebuilt.rescued, rebuilt.unreadable_records
    );
    Ok(ExitCode::from(DAMAGED))
}

/// Somebody who is told how a check goes; a break ends it.
pub(crate) trait Tell: Sync {
    fn tell(&self, news: News) -> ControlFlow<()>;
}

/// The store paths a request names.
fn requested(store: &Store, request: &Request) -> Result<BTreeSet<StorePath>, store::Error> {
    let mut paths = BTreeSet::new();
    for name in &request.paths {
        let path = StorePath::from_base_name(name)
            .map_err(|e| store::Error::Path { name: name.clone(), reason: e.to_string() })?;
        store.valid_entry(&path)?;
        paths.insert(path);
    }
    Ok(paths)
}
