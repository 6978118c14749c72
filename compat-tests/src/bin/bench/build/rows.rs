//! How each row is measured.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::load::Connection;
use compat_tests::{Call, Result, Room, Who, memory};

use super::watch::{Watch, cpu, tree};
use super::{Bench, Figure, Target, figure, wrong};
use crate::sides::{MINOR, Side};

/// A build may take this long.
const LIMIT: Duration = Duration::from_secs(600);
/// For processes that have ended to be waited for, and for memory to come to rest.
const REST: Duration = Duration::from_millis(500);
/// Idle connections, and clients at once.
const CLIENTS: usize = 50;
/// The sleep of the build that two clients share, and its command line.
const SLEEP: &[u8] = b"sleep\x005\x00";
/// Mebibyte.
const MIB: f64 = 1024.0 * 1024.0;

fn seconds(name: &str, value: f64, target: f64) -> Figure {
    figure(name, "s", value, Target::OfStock(target))
}

/// An expression in which `mk name script more` is a derivation.
pub(crate) fn expression(body: &str) -> String {
    "let mk = name: script: more: derivation ({ inherit name; system = \"x86_64-linux\"; builder = \"/bin/sh\"; \
     args = [ \"-c\" script ]; } // more); in "
        .to_owned()
        + body
}

fn build(room: &Room, bench: &Bench, body: &str) -> Call {
    let call = Call::nix(room, Who::User, &bench.client, "nix-build").limit(LIMIT).quiet();
    call.args(["--no-out-link", "--max-jobs", "2", "-E", &expression(body)])
}

/// The derivation of an expression, instantiated.
fn instantiate(room: &Room, bench: &Bench, body: &str) -> Result<String> {
    let call = Call::nix(room, Who::User, &bench.client, "nix-instantiate").limit(LIMIT).quiet();
    Ok(call.args(["-E", &expression(body)]).ok()?.text())
}

fn realise(room: &Room, bench: &Bench, drv: &str) -> Call {
    Call::nix(room, Who::User, &bench.client, "nix-store").limit(LIMIT).quiet().args(["--realise", drv])
}

/// Instantiates, then builds; answers how long the build took and its output.
fn timed(side: &Side, bench: &Bench, body: String) -> Result<(f64, compat_tests::Output)> {
    let bench = bench.clone();
    side.inside(move |room| {
        let drv = instantiate(room, &bench, &body)?;
        let started = Instant::now();
        let output = realise(room, &bench, &drv).ok()?;
        Ok((started.elapsed().as_secs_f64(), output))
    })
}

/// Trivial derivations in one nix-build, in three sizes.
pub(super) fn independent(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let run = |count: usize| -> Result<f64> {
        let bench = bench.clone();
        side.inside(move |room| {
            let tag = &bench.tag;
            let body = format!(
                "builtins.genList (i: mk \"{tag}-{count}-${{toString i}}\" \"echo {tag} ${{toString i}} > $out\" {{}}) \
                 {count}"
            );
            let started = Instant::now();
            let built = build(room, &bench, &body).ok()?.lines().len();
            if built == count { Ok(started.elapsed().as_secs_f64()) } else { Err(wrong("not all outputs were built")) }
        })
    };
    let (few, more) = (run(30)?, run(100)?);
    thread::sleep(REST);
    let (before, watch) = (cpu(side.pid), Watch::begin(side.pid, b""));
    let many = run(300)?;
    let peak = watch.end()?;
    thread::sleep(REST);
    let used = cpu(side.pid) - before;
    Ok(vec![
        figure("30 independent derivations, one nix-build", "s", few, Target::None),
        figure("100 independent derivations", "s", more, Target::None),
        seconds("300 independent derivations", many, 0.15),
        // Three times as many may take three times as long, and a little for what is uneven.
        figure("  300 beside 100", "times", many / more, Target::AtMost(3.3)),
        figure("  CPU time of the daemon and all its children", "s", used, Target::None),
        figure("  peak RSS of the daemon's processes", "MiB", peak.rss as f64 / MIB, Target::AtMost(150.0)),
    ])
}

pub(super) fn chain(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let tag = bench.tag.clone();
    let bench = bench.clone();
    let time = side.inside(move |room| {
        let body = format!(
            "builtins.foldl' (p: i: mk \"{tag}-${{toString i}}\" \"echo ${{toString i}} ${{p}} > $out\" {{}}) \"\" \
             (builtins.genList (i: i) 100)"
        );
        let started = Instant::now();
        build(room, &bench, &body).ok()?;
        Ok(started.elapsed().as_secs_f64())
    })?;
    Ok(vec![seconds("chain of 100 derivations", time, 0.6)])
}

pub(super) fn inputs(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let sources = bench.tag.clone();
    let tag = bench.tag.clone();
    let directory = side.inside(move |room| {
        for n in 0..500 {
            room.write(&format!("{sources}/f{n}"), format!("source file {n} of {sources}\n").repeat(20))?;
        }
        Ok(room.tmp(&sources))
    })?;
    let body = format!(
        "mk \"{tag}\" \"n=0; for f in $srcs; do read l < $f && n=$((n+1)); done; echo $n > $out\" {{ srcs = \
         builtins.genList (i: {} + \"/f${{toString i}}\") 500; }}",
        directory.display()
    );
    let (time, output) = timed(side, bench, body)?;
    check_output(side, output.text(), |out| Ok(fs::read_to_string(out).doing("reading", out)?.trim() == "500"))?;
    Ok(vec![seconds("500 inputs in the closure", time, 1.0)])
}

/// Looks at an output in the room.
fn check_output(side: &Side, out: String, check: fn(&str) -> Result<bool>) -> Result<()> {
    side.inside(move |_| if check(&out)? { Ok(()) } else { Err(wrong(format!("{out} is not as it must be"))) })
}

pub(super) fn log(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let line = "a line of the log that is some sixty bytes long as usual: ";
    let body = format!("mk \"{}\" \"seq 1 100000 | sed 's/^/{line}/'; echo > $out\" {{}}", bench.tag);
    let (time, output) = timed(side, bench, body)?;
    let lines = output.stderr.lines().filter(|l| l.contains(line)).count();
    if lines < 100_000 {
        return Err(wrong(format!("the client saw {lines} lines of the log")));
    }
    Ok(vec![seconds("a build that logs 100,000 lines", time, 0.8)])
}

pub(super) fn files(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let script = "mkdir $out; cd $out; for d in 0 1 2 3 4 5 6 7 8 9; do mkdir $d; done; head -c 61425000 /dev/urandom | \
                  base64 -w 4095 | awk '{f = (NR % 10) \\\"/\\\" NR; print > f; close(f)}'";
    let (time, output) = timed(side, bench, format!("mk \"{}\" \"{script}\" {{}}", bench.tag))?;
    check_output(side, output.text(), |out| {
        let mut count = 0;
        for directory in fs::read_dir(out).doing("listing", out)?.flatten() {
            count += fs::read_dir(directory.path()).doing("listing", directory.path())?.count();
        }
        Ok(count == 20_000)
    })?;
    Ok(vec![seconds("an output of 20,000 files of 4 KiB", time, 0.8)])
}

pub(super) fn large(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let body = format!("mk \"{}\" \"head -c 500000000 /dev/urandom > $out\" {{}}", bench.tag);
    let (time, output) = timed(side, bench, body)?;
    check_output(side, output.text(), |out| Ok(fs::metadata(out).doing("looking at", out)?.len() == 500_000_000))?;
    Ok(vec![seconds("an output of 500 MB of random bytes", time, 0.95)])
}

/// Two clients that want the same.
pub(super) fn shared(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let watch = Watch::begin(side.pid, SLEEP);
    let work = bench.clone();
    let last = side.inside(move |room| {
        let body = format!("mk \"{}\" \"echo begins; sleep 5; echo ends; echo > $out\" {{}}", work.tag);
        let drv = instantiate(room, &work, &body)?;
        let started = Instant::now();
        let logs = thread::scope(|scope| {
            let clients: Vec<_> = (0..2).map(|_| scope.spawn(|| realise(room, &work, &drv).ok())).collect();
            let ended = clients.into_iter().map(|c| c.join().unwrap_or_else(|_| Err(wrong("a client panicked"))));
            ended.collect::<Result<Vec<_>>>()
        })?;
        let whole = logs.iter().filter(|l| l.stderr.contains("begins") && l.stderr.contains("ends")).count();
        Ok((started.elapsed().as_secs_f64(), whole as f64))
    })?;
    let builds = watch.end()?.marked;
    Ok(vec![
        figure("two clients, the same build of 5 s: both done", "s", last.0, Target::AtMost(5.2)),
        figure("  builds", "", builds as f64, Target::AtMost(1.0)),
        // More is better: castored's lack, so that less is.
        figure("  clients that lack a part of the log", "", 2.0 - last.1, Target::AtMost(0.0)),
    ])
}

pub(super) fn clients(side: &Side, bench: &Bench) -> Result<Vec<Figure>> {
    let work = bench.clone();
    let time = side.inside(move |room| {
        let tag = &work.tag;
        let body = format!(
            "builtins.genList (i: mk \"{tag}-${{toString i}}\" \"echo {tag} ${{toString i}} > $out\" {{}}) {CLIENTS}"
        );
        let drvs = instantiate(room, &work, &body)?;
        let started = Instant::now();
        thread::scope(|scope| {
            let clients: Vec<_> =
                drvs.lines().map(|drv| scope.spawn(|| realise(room, &work, drv).ok().map(drop))).collect();
            clients.into_iter().try_for_each(|c| c.join().unwrap_or_else(|_| Err(wrong("a client panicked"))))
        })?;
        Ok(started.elapsed().as_secs_f64())
    })?;
    Ok(vec![seconds("50 clients at once, a trivial derivation each", time, 0.6)])
}

/// What 50 connections that say nothing take. Comes first: memory freed by other work would hide it.
pub(super) fn idle(side: &Side, _: &Bench) -> Result<Vec<Figure>> {
    thread::sleep(REST);
    let before = memory::pss_with_children(side.pid)?;
    let connections = (0..CLIENTS).map(|_| Connection::open(&side.socket, MINOR)).collect::<Result<Vec<_>>>()?;
    thread::sleep(REST);
    let processes = tree(side.pid).len();
    let grown = memory::pss_with_children(side.pid)?.saturating_sub(before);
    drop(connections);
    Ok(vec![
        figure("50 idle connections: processes", "", processes as f64, Target::AtMost(1.0)),
        figure("  memory they take (PSS)", "MiB", grown as f64 / MIB, Target::AtMost(5.0)),
    ])
}
