//! A program from a closure that is elsewhere: the time until it has run, when the closure is fetched whole and when its source
//! is lazy. One castored is the source of two others, over gRPC on the loopback.
//!
//! The closure is that of `source`, 1 GB, and one path more that has the program and needs all the others.
//! `CASTORED_BENCH_PART=n` takes an n-th of the paths.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use compat_tests::error::Context;
use compat_tests::machine::Machine;
use compat_tests::packages::{self, Closure, begin_cache, put_in_cache};
use compat_tests::{Call, Release, Result, Subject, Who, load, nar};

use crate::build::{Target, figure, show, wrong};
use crate::sides::Side;
use crate::source::{GRPC_SOCKET, LIMIT, PATHS, Relay};

/// Of the time it takes when all is fetched first.
const SHARE: f64 = 0.05;

/// Whether the target is reached.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let closures = packages::closures((PATHS / crate::part()).max(2))?;
    let client = Arc::new(machine.newest().clone());
    let [source, whole, lazy] = ["bench-lazy-source", "bench-lazy-whole", "bench-lazy"]
        .map(|name| Side::start(name, Subject::from_environment()?));
    let (source, whole, lazy) = (source?, whole?, lazy?);
    let measured = measure(&source, &whole, &lazy, &client, &closures.first);
    source.stop().and(whole.stop()).and(lazy.stop())?;
    crate::show_load();
    measured
}

fn measure(source: &Side, whole: &Side, lazy: &Side, client: &Arc<Release>, closure: &Closure) -> Result<bool> {
    let hello = give(source, client, closure)?;
    let relay = Relay::before(source.socket.with_file_name(GRPC_SOCKET))?;
    println!("{:<50} {:>12} {:>14} {:>7} {:>9}", "lazy paths", "whole", "lazy", "ratio", "at most");
    let mut sides = Vec::new();
    for (side, url) in [(whole, relay.url.clone()), (lazy, format!("{}?lazy=true", relay.url))] {
        let before = relay.count();
        let time = until_it_has_run(side, client, &hello, url)?;
        sides.push((time, (relay.count() - before) as f64 / 1e6));
    }
    show(&figure("bytes that crossed the wire by then", "MB", sides[1].1, Target::None), sides[0].1, sides[1].1);
    show(&figure("until a program of the closure has run", "s", sides[1].0, Target::None), sides[0].0, sides[1].0);
    let share = sides[1].0 / sides[0].0;
    Ok(show(&figure("  of what it takes whole", "times", share, Target::AtMost(SHARE)), 1.0, share))
}

/// Gives the source the closure, and a path with a program that needs all of it.
fn give(source: &Side, client: &Arc<Release>, closure: &Closure) -> Result<String> {
    let dir = tempfile::tempdir().doing("creating", "a directory")?;
    let (tree, cache) = (dir.path().join("tree"), dir.path().join("cache"));
    std::fs::create_dir_all(tree.join("bin")).doing("creating", &tree)?;
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].into_iter().find(|file| Path::new(file).exists());
    let busybox = busybox.ok_or_else(|| wrong("there is no busybox"))?;
    std::fs::copy(busybox, tree.join("bin/hello")).doing("copying", busybox)?;
    let hello = load::made_up_path("the program", "hello");
    begin_cache(&cache)?;
    put_in_cache(&cache, &hello, std::slice::from_ref(&closure.top), |out| nar::write_path(&tree, out))?;
    let first = (closure.url(), closure.top.clone());
    for (url, path) in [first, (format!("file://{}", cache.display()), hello.clone())] {
        let with = client.clone();
        source.inside(move |room| {
            // What the program needs is in the first cache alone.
            let call = Call::nix(room, Who::Root, &with, "nix").args(["copy", "--no-check-sigs"]);
            let call = if path.ends_with("-hello") { call.arg("--no-recursive") } else { call };
            call.args(["--from", &url, &path]).limit(LIMIT).quiet().ok().map(drop)
        })?;
    }
    Ok(hello)
}

/// Seconds.
fn until_it_has_run(side: &Side, client: &Arc<Release>, hello: &str, url: String) -> Result<f64> {
    let (with, hello) = (client.clone(), hello.to_owned());
    let started = Instant::now();
    side.inside(move |room| {
        let call = Call::nix(room, Who::Root, &with, "nix-store").args(["-r", &hello]);
        call.args(["--option", "substituters", &url, "--option", "require-sigs", "false"]).limit(LIMIT).quiet().ok()?;
        let program = format!("{hello}/bin/hello");
        let said = Command::new(&program).arg0("busybox").args(["echo", "Hello, world!"]).output();
        let said = said.doing("running", &program)?;
        match &said.stdout[..] {
            b"Hello, world!\n" => Ok(()),
            other => Err(wrong(format!("{program} said {:?}", String::from_utf8_lossy(other)))),
        }
    })?;
    Ok(started.elapsed().as_secs_f64())
}
