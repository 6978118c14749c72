//! What is measured in each row.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use compat_tests::subject::default_conf;
use compat_tests::wire::{Op, Request};
use compat_tests::{Call, Release, Result, Who};

use super::caches::{Caches, Published};
use super::delay::far;
use super::server::{dead, serve};
use crate::build::{Figure, Target, figure, wrong};
use crate::engine::rows::{Cost, LIMIT};
use crate::sides::Side;

/// How far away the caches of a closure are.
const EACH_WAY: Duration = Duration::from_millis(20);
/// How long a server may say nothing, in seconds: both sides' `connect-timeout` and `stalled-download-timeout`. Stock's own
/// are 15 and 300, with which it waits for the dead cache for half an hour.
const PATIENCE: u64 = 2;

/// Where paths are, and which are wanted.
pub(super) struct Scene {
    name: String,
    client: Arc<Release>,
    /// The daemon's.
    pub(super) conf: String,
    wanted: Vec<String>,
    /// How many paths are valid when it is done, or answered for.
    count: usize,
    target: Target,
}

impl Scene {
    fn new(name: &str, caches: &Caches, published: &[Published], urls: &[SocketAddr], target: f64) -> Self {
        let urls: Vec<String> = urls.iter().map(|address| format!("http://{address}")).collect();
        let keys: Vec<&str> = published.iter().map(|p| p.key.as_str()).collect();
        let conf = default_conf().replace("substituters =\n", &format!("substituters = {}\n", urls.join(" ")));
        Self {
            name: name.to_owned(),
            client: Arc::new(caches.client.clone()),
            conf: format!("{conf}trusted-public-keys = {}\n", keys.join(" ")),
            wanted: published.iter().flat_map(|p| p.paths.last().cloned()).collect(),
            count: published.iter().map(|p| p.paths.len()).sum(),
            target: Target::OfStock(target),
        }
    }
}

/// A closure of small paths, far away.
pub(super) fn far_closure(caches: &Caches) -> Result<Scene> {
    let published = caches.closure()?;
    let address = far(serve(published.dir.clone())?, EACH_WAY)?;
    let name = format!("{} small paths, 20 ms away each way", published.paths.len());
    Ok(Scene::new(&name, caches, &[published], &[address], 0.3))
}

fn large(caches: &Caches, form: &str, parameters: &str, target: f64) -> Result<Scene> {
    let published = caches.large(&format!("large-{}", form.replace(' ', "-")), parameters)?;
    let address = serve(published.dir.clone())?;
    Ok(Scene::new(&format!("a path of 1 GB, {form}"), caches, &[published], &[address], target))
}

/// A large path in zstd.
pub(super) fn large_zstd(caches: &Caches) -> Result<Scene> {
    large(caches, "zstd", "compression=zstd", 0.8)
}

/// A large path in xz, as stock writes it unless told otherwise: one block.
pub(super) fn large_xz(caches: &Caches) -> Result<Scene> {
    large(caches, "xz", "compression=xz", 0.6)
}

/// A large path in xz of many blocks.
pub(super) fn large_xz_in_blocks(caches: &Caches) -> Result<Scene> {
    large(caches, "xz in blocks", "compression=xz&parallel-compression=true", 0.6)
}

/// Two caches with half of the paths each, and one that is dead.
pub(super) fn one_is_dead(caches: &Caches) -> Result<Scene> {
    let halves = [caches.half(0)?, caches.half(1)?];
    let urls = [serve(halves[0].dir.clone())?, dead()?, serve(halves[1].dir.clone())?];
    let count = halves[0].paths.len() + halves[1].paths.len();
    let mut scene = Scene::new(&format!("QueryMissing of {count}, 3 caches, one dead"), caches, &halves, &urls, 0.2);
    scene.conf += &format!("connect-timeout = {PATIENCE}\nstalled-download-timeout = {PATIENCE}\n");
    scene.wanted = halves.into_iter().flat_map(|half| half.paths).collect();
    Ok(scene)
}

/// Realises what is wanted, and looks whether all of it is there.
pub(super) fn realise(side: &Side, scene: &Scene) -> Result<Vec<Figure>> {
    let (client, wanted) = (scene.client.clone(), scene.wanted.clone());
    let (cost, ()) = Cost::of(side, move |room| {
        let call = Call::nix(room, Who::Root, &client, "nix-store").args(["--realise", "--max-jobs", "0"]);
        call.args(&wanted).limit(LIMIT).quiet().ok().map(drop)
    })?;
    let (client, wanted, count) = (scene.client.clone(), scene.wanted.clone(), scene.count);
    side.inside(move |room| {
        let call = Call::nix(room, Who::Root, &client, "nix-store").args(["--query", "--requisites"]);
        match call.args(&wanted).quiet().ok()?.lines().len() {
            found if found == count => Ok(()),
            found => Err(wrong(format!("{found} paths are valid, not {count}"))),
        }
    })?;
    Ok(cost.figures(scene.name.as_str(), scene.target, Target::None))
}

/// Asks what of the paths would be fetched: all of them.
pub(super) fn missing(side: &Side, scene: &Scene) -> Result<Vec<Figure>> {
    let mut connection = side.connect()?;
    let mut request = Request::new(Op::QueryMissing).word(scene.wanted.len() as u64);
    for path in &scene.wanted {
        request = request.string(path);
    }
    let mut ask = || -> Result<f64> {
        let started = Instant::now();
        connection.call(&request.0)?;
        for expected in [0, scene.count as u64, 0] {
            let number = connection.word()?;
            (0..number).try_for_each(|_| connection.string().map(drop))?;
            if number != expected {
                return Err(wrong(format!("an answer has {number} paths, not {expected}")));
            }
        }
        connection.skip(16)?;
        Ok(started.elapsed().as_secs_f64())
    };
    let (first, again) = (ask()?, ask()?);
    let name = scene.name.as_str();
    Ok(vec![figure(name, "s", first, scene.target), figure("  the same again", "s", again, Target::None)])
}
