//! How each row that takes time is measured.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::packages::Closure;
use compat_tests::wire::{Op, Request};
use compat_tests::{Call, Release, Result, Room, Who, ssh};
use sha2::{Digest, Sha256};

use super::inputs::{CLIENTS, Inputs};
use crate::build::rows::expression;
use crate::build::watch::{Watch, clients_cpu, cpu};
use crate::build::{Figure, Target, figure, wrong};
use crate::sides::Side;

/// A command may take this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(900);
/// For processes that have ended to be waited for.
const REST: Duration = Duration::from_millis(500);
/// What a daemon may take of memory at any time, in MiB.
const MEMORY: f64 = 256.0;
/// Bytes hashed at a time.
const PIECE: usize = 1 << 20;
/// Mebibyte.
const MIB: f64 = 1024.0 * 1024.0;

/// What something cost.
pub(crate) struct Cost {
    /// Seconds until the client was done.
    time: f64,
    /// CPU seconds of the daemon and its children.
    daemon: f64,
    /// CPU seconds of the clients.
    clients: f64,
    /// The most memory that was seen of the daemon's processes, in bytes.
    peak: u64,
}

impl Cost {
    /// What it costs that a client does something in the daemon's room.
    pub(crate) fn of<T: Send + 'static>(
        side: &Side,
        work: impl FnOnce(&Room) -> Result<T> + Send + 'static,
    ) -> Result<(Self, T)> {
        // What was written before is not written during what is measured.
        nix::unistd::sync();
        let (daemon, clients, watch) = (cpu(side.pid), clients_cpu(), Watch::begin(side.pid, b""));
        let started = Instant::now();
        let done = side.inside(work)?;
        let time = started.elapsed().as_secs_f64();
        let peak = watch.end()?.rss;
        thread::sleep(REST);
        Ok((Self { time, daemon: cpu(side.pid) - daemon, clients: clients_cpu() - clients, peak }, done))
    }

    /// As figures, with what castored may take of stock's time.
    pub(crate) fn figures(&self, name: impl Into<String>, time: Target, cpu: Target) -> Vec<Figure> {
        vec![
            figure(name, "s", self.time, time),
            figure("  CPU time of daemon and client", "s", self.daemon + self.clients, cpu),
            figure("  of it the daemon's", "s", self.daemon, Target::None),
            figure("  the daemon's memory at most", "MiB", self.peak as f64 / MIB, Target::AtMost(MEMORY)),
        ]
    }
}

/// Adds a file or a tree as stock's client does it; answers its store path.
fn add(side: &Side, inputs: &Inputs, path: &Path) -> Result<(Cost, String)> {
    let (client, path) = (inputs.client.clone(), path.to_owned());
    Cost::of(side, move |room| {
        let call = Call::nix(room, Who::User, &client, "nix-store").arg("--add").arg(path);
        Ok(call.limit(LIMIT).quiet().ok()?.text())
    })
}

/// A tree that is new, and then the same again.
pub(super) fn tree(side: &Side, inputs: &Inputs) -> Result<Vec<Figure>> {
    let tree = inputs.tree()?;
    let (first, path) = add(side, inputs, tree)?;
    let (again, same) = add(side, inputs, tree)?;
    if path != same {
        return Err(wrong(format!("the same tree is {path} and {same}")));
    }
    let mut figures =
        first.figures("nix-store --add of a tree, first time", Target::OfStock(0.3), Target::OfStock(0.6));
    figures.extend(again.figures("the same again", Target::OfStock(0.3), Target::None));
    Ok(figures)
}

/// A file that does not pack, beside nothing but SHA-256 of it.
pub(super) fn incompressible(side: &Side, inputs: &Inputs) -> Result<Vec<Figure>> {
    let noise = inputs.noise()?;
    let started = Instant::now();
    let mut hasher = Sha256::new();
    let mut file = File::open(noise).doing("opening", noise)?;
    let mut buffer = vec![0; PIECE];
    loop {
        match file.read(&mut buffer).doing("reading", noise)? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    hasher.finalize();
    let alone = started.elapsed().as_secs_f64();
    let (cost, _) = add(side, inputs, noise)?;
    let mut figures = cost.figures("nix-store --add of an incompressible file", Target::None, Target::None);
    figures.push(figure("  SHA-256 alone on it", "s", alone, Target::None));
    figures.push(figure("  times SHA-256 alone", "times", cost.time / alone, Target::AtMost(1.2)));
    Ok(figures)
}

/// Copies a closure from a binary cache into the daemon's store.
pub(super) fn copy_in(room: &Room, client: &Release, url: &str, top: &str) -> Result<()> {
    let call = Call::nix(room, Who::Root, client, "nix").args(["copy", "--no-check-sigs", "--from", url, top]);
    call.limit(LIMIT).quiet().ok().map(drop)
}

/// A closure that is copied in, and out again.
pub(super) fn copy(side: &Side, inputs: &Inputs) -> Result<Vec<Figure>> {
    let closure = &inputs.closures()?.first;
    let (client, url, top) = (inputs.client.clone(), closure.url(), closure.top.clone());
    let (into, ()) = Cost::of(side, move |room| copy_in(room, &client, &url, &top))?;

    let (client, subject, top) = (inputs.client.clone(), side.subject.clone(), closure.top.clone());
    let path = side.inside(move |room| ssh::stand_in(room, &subject, &client))?;
    let client = inputs.client.clone();
    let (out, files) = Cost::of(side, move |room| {
        let to = room.tmp("copied");
        let call = Call::nix(room, Who::Root, &client, "nix").env("PATH", path).args(["copy", "--no-check-sigs"]);
        let call = call.args(["--from", &format!("ssh-ng://{}", ssh::HOST)]);
        let call = call.args(["--to", &format!("file://{}?compression=none", to.display()), &top]);
        call.limit(LIMIT).quiet().ok()?;
        Ok(std::fs::read_dir(to.join("nar")).doing("listing", &to)?.count())
    })?;
    if files != closure.paths.len() {
        return Err(wrong(format!("{files} paths came out of {}", closure.paths.len())));
    }
    let (sent, daemon) = archives(side, closure)?;
    let mut figures = into.figures("nix copy of a closure into the daemon", Target::OfStock(0.4), Target::None);
    figures.extend(out.figures("nix copy of it out again, ssh-ng", Target::OfStock(0.7), Target::None));
    figures.push(figure("NarFromPath of all its paths, read and dropped", "s", sent, Target::None));
    figures.push(figure("  the daemon's CPU time", "s", daemon, Target::None));
    Ok(figures)
}

/// Has all archives sent over one connection; the seconds that took, and the daemon's CPU seconds.
fn archives(side: &Side, closure: &Closure) -> Result<(f64, f64)> {
    let before = cpu(side.pid);
    let started = Instant::now();
    let mut connection = side.connect()?;
    for (path, size) in &closure.paths {
        connection.call(&Request::new(Op::NarFromPath).string(path).0)?;
        connection.skip(*size)?;
    }
    let time = started.elapsed().as_secs_f64();
    drop(connection);
    thread::sleep(REST);
    Ok((time, cpu(side.pid) - before))
}

/// Derivations that refer to each other, instantiated, beside what the client takes for that without a store.
pub(super) fn instantiate(side: &Side, inputs: &Inputs) -> Result<Vec<Figure>> {
    let count = inputs.derivations();
    // As long as derivations of nixpkgs are.
    let body = format!(
        "let text = builtins.concatStringsSep \" \" (builtins.genList toString 300); all = builtins.genList (i: mk \
         \"drv-${{toString i}}\" \"true\" {{ inherit text; needs = if i == 0 then [] else [ (builtins.elemAt all (i / \
         2)) (builtins.elemAt all (i / 3)) ]; }}) {count}; in all"
    );
    let instantiate = |more: &'static [&'static str]| {
        let (client, expression) = (inputs.client.clone(), expression(&body));
        Cost::of(side, move |room| {
            let call = Call::nix(room, Who::User, &client, "nix-instantiate").args(more).args(["-E", &expression]);
            Ok(call.limit(LIMIT).quiet().ok()?.lines())
        })
    };
    let (alone, named) = instantiate(&["--readonly-mode"])?;
    let (cost, added) = instantiate(&[])?;
    if added.len() != count || named != added {
        return Err(wrong(format!("{} derivations were added, not {count}", added.len())));
    }
    let name = format!("nix-instantiate that adds {count} derivations");
    let mut figures = cost.figures(name, Target::OfStock(0.8), Target::None);
    let share = (cost.time - alone.time).max(0.0);
    figures.push(figure("  what it takes longer than without a store", "s", share, Target::OfStock(0.4)));
    Ok(figures)
}

/// Several clients at once, each with a tree of its own.
pub(super) fn eight(side: &Side, inputs: &Inputs) -> Result<Vec<Figure>> {
    let (client, trees): (_, Vec<PathBuf>) = (inputs.client.clone(), inputs.trees()?.to_vec());
    let (cost, ()) = Cost::of(side, move |room| {
        let calls = trees
            .iter()
            .map(|tree| Call::nix(room, Who::User, &client, "nix-store").arg("--add").arg(tree).limit(LIMIT).quiet());
        let calls: Vec<Call> = calls.collect();
        thread::scope(|scope| {
            let running: Vec<_> = calls.into_iter().map(|call| scope.spawn(|| call.ok())).collect();
            running
                .into_iter()
                .try_for_each(|call| call.join().unwrap_or_else(|_| Err(wrong("a client panicked"))).map(drop))
        })
    })?;
    let name = format!("{CLIENTS} clients that add {CLIENTS} trees at once");
    Ok(cost.figures(name, Target::OfStock(0.4), Target::None))
}
