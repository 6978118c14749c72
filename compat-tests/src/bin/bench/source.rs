//! One castored as the source of another, over gRPC on the loopback: a closure, its next version, and that rebuilt, fetched one
//! after the other. What is measured are the bytes on the wire, both directions, beside what an HTTP cache would have sent:
//! the NARs, each compressed by zstd.
//!
//! The packages come from two releases of Debian, so the second version's contents are mostly new; the rebuilt one has other
//! store hashes in the same contents. `CASTORED_BENCH_PART=n` takes an n-th of the paths.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use compat_tests::error::Context;
use compat_tests::machine::Machine;
use compat_tests::packages::{self, Closure};
use compat_tests::{Call, Error, Release, Result, Subject, Who};

use crate::build::{Target, figure, show, wrong};
use crate::sides::Side;

/// Paths of a closure: 1 GB.
pub(crate) const PATHS: usize = 200;
/// The source's gRPC socket, beside the one of its worker protocol.
pub(crate) const GRPC_SOCKET: &str = "grpc";
/// A command may take this long.
pub(crate) const LIMIT: Duration = Duration::from_secs(900);
/// Bytes relayed at a time.
const PIECE: usize = 64 * 1024;
/// What may cross the wire of what the compressed NARs have.
const SHARE: f64 = 0.3;

/// Whether the target is reached.
pub(crate) fn bench(machine: &Machine) -> Result<bool> {
    let part = crate::part();
    let closures = packages::closures((PATHS / part).max(2))?;
    let client = Arc::new(machine.newest().clone());
    let source = Side::start("bench-source", Subject::from_environment()?)?;
    let sink = Side::start("bench-sink", Subject::from_environment()?)?;
    let measured = measure(
        &source,
        &sink,
        &client,
        &[
            ("a closure, first time", &closures.first, Target::None),
            ("its next version, weeks later", &closures.second, Target::None),
            ("that rebuilt, with other store hashes", &closures.rebuilt, Target::AtMost(SHARE)),
        ],
    );
    source.stop().and(sink.stop())?;
    crate::show_load();
    measured
}

fn measure(source: &Side, sink: &Side, client: &Arc<Release>, closures: &[(&str, &Closure, Target)]) -> Result<bool> {
    let relay = Relay::before(source.socket.with_file_name(GRPC_SOCKET))?;
    println!("{:<50} {:>12} {:>14} {:>7} {:>9}", "source", "compressed", "on the wire", "ratio", "at most");
    let mut kept = true;
    for (name, closure, target) in closures {
        let (with, url, top) = (client.clone(), closure.url(), closure.top.clone());
        source.inside(move |room| {
            let call = Call::nix(room, Who::Root, &with, "nix").args(["copy", "--no-check-sigs", "--from", &url, &top]);
            call.limit(LIMIT).quiet().ok().map(drop)
        })?;
        let before = relay.count();
        let (with, url, top) = (client.clone(), relay.url.clone(), closure.top.clone());
        let started = Instant::now();
        sink.inside(move |room| {
            let call = Call::nix(room, Who::Root, &with, "nix-store").args(["-r", &top]);
            let options = ["--option", "substituters", &url, "--option", "require-sigs", "false"];
            call.args(options).limit(LIMIT).quiet().ok().map(drop)
        })?;
        let time = started.elapsed().as_secs_f64();
        let wire = (relay.count() - before) as f64 / 1e6;
        let compressed = compressed(closure)? as f64 / 1e6;
        if wire == 0.0 {
            return Err(wrong("nothing crossed the wire"));
        }
        show(&figure(format!("{name} ({time:.0} s)"), "MB", wire, Target::None), compressed, wire);
        let share = figure("  of the compressed NARs", "times", wire / compressed, *target);
        kept &= show(&share, 1.0, wire / compressed);
    }
    Ok(kept)
}

/// Bytes of all its NARs, each compressed as castored's own HTTP cache does it.
fn compressed(closure: &Closure) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(closure.dir.join("nar")).doing("listing", &closure.dir)?.flatten() {
        let out = Command::new("zstd").args(["-3", "-q", "-c"]).arg(entry.path()).output();
        let out = out.doing("running", "zstd")?;
        if !out.status.success() {
            return Err(Error::Wrong(String::from_utf8_lossy(&out.stderr).into_owned()));
        }
        sum += out.stdout.len() as u64;
    }
    Ok(sum)
}

/// A TCP port in front of a Unix socket, which counts all bytes.
pub(crate) struct Relay {
    pub(crate) url: String,
    bytes: Arc<AtomicU64>,
}

impl Relay {
    /// How many so far.
    pub(crate) fn count(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn before(socket: PathBuf) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").doing("listening on", "the loopback")?;
        let url = format!("grpc+http://{}", listener.local_addr().doing("asking for", "an address")?);
        let bytes = Arc::new(AtomicU64::new(0));
        let count = bytes.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = UnixStream::connect(&socket) else { continue };
                let _ = client.set_nodelay(true);
                if let (Ok(from), Ok(to)) = (client.try_clone(), server.try_clone()) {
                    let (there, back) = (count.clone(), count.clone());
                    std::thread::spawn(move || pass(from, to, &there));
                    std::thread::spawn(move || pass(server, client, &back));
                }
            }
        });
        Ok(Self { url, bytes })
    }
}

/// Passes bytes on until one side ends; dropping both ends the other direction as well.
fn pass(mut from: impl Read, mut to: impl Write + End, count: &AtomicU64) {
    let mut buffer = vec![0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        count.fetch_add(length as u64, Ordering::SeqCst);
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    to.end();
}

/// What can be told that nothing more comes.
trait End {
    fn end(&self);
}

impl End for TcpStream {
    fn end(&self) {
        let _ = self.shutdown(std::net::Shutdown::Both);
    }
}

impl End for UnixStream {
    fn end(&self) {
        let _ = self.shutdown(std::net::Shutdown::Both);
    }
}
