//! `kill -9` at random moments: what a client was told is there is there, and nothing is half there.
//!
//! Each round starts the daemon, which mounts the store anew, puts it under load by stock's clients and some of our own,
//! kills it, starts it again, and checks everything that is new: through the mount, over the protocol, and with
//! `nix-store --verify --check-contents`. In every second round garbage is collected as well.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use compat_tests::nar::{Tree, hash_path, hex};
use compat_tests::wire::Client;
use compat_tests::{Daemon, Who};

use crate::{Setup, derivation, setup};

/// How often the daemon is killed, unless [`ROUNDS_VARIABLE`] says otherwise.
const ROUNDS: u64 = 16;
/// For longer runs.
const ROUNDS_VARIABLE: &str = "CASTORED_KILL_ROUNDS";
/// A registration may be lost if it was answered this shortly before the kill, and nothing made it durable since.
const WINDOW: Duration = Duration::from_millis(100);

/// What a client was told, and when.
#[derive(Debug, Clone, Copy)]
struct Told {
    at: Instant,
    /// A finished build is a durable point: it may not be lost at all.
    durable: bool,
    /// It has a root, so no collection takes it.
    rooted: bool,
}

/// Numbers that differ from run to run; the seed is printed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count / 8 + 1).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

#[test]
fn killed_at_any_moment_the_store_is_whole() {
    let Some(s) = setup("crash") else { return };
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}");
    let mut random = Random(seed);
    let rounds = std::env::var(ROUNDS_VARIABLE).map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    let roots = s.room.dir().join("home-user/crash-roots");
    let mut known = Known::default();
    let (mut told_total, mut lost_total) = (0, 0);
    for round in 0..rounds {
        let daemon = s.start();
        let told: Mutex<BTreeMap<String, Told>> = Mutex::default();
        let over = AtomicBool::new(false);
        let patience = Duration::from_millis(100 + random.next() % 900);
        let seeds = [random.next() | 1, random.next() | 1];
        let collects = round % 2 == 1;
        let killed = thread::scope(|scope| {
            for seed in seeds {
                let (daemon, told) = (&daemon, &told);
                scope.spawn(move || add_until_cut_off(daemon, &mut Random(seed), told));
            }
            scope.spawn(|| build_until(&s, &roots, round, &over, &told));
            scope.spawn(|| query_until(&s, round, &over));
            if collects {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let _ = s.nix(Who::Root, "nix-store").args(["--gc"]).quiet().run();
                    }
                });
            }
            thread::sleep(patience);
            let killed = Instant::now();
            daemon.send_kill().unwrap();
            over.store(true, Ordering::Relaxed);
            killed
        });
        daemon.kill_hard().unwrap();
        let told = told.into_inner().unwrap();
        let lost = verify(&s, &mut known, &told, killed, collects);
        println!("round {round}: killed after {patience:?}; {} paths told, {lost} lost within the window", told.len());
        told_total += told.len();
        lost_total += lost;
    }
    println!(
        "{rounds} kills, {told_total} registrations answered, {lost_total} lost, each within {WINDOW:?} of its kill"
    );
    assert!(told_total > 100, "too few to mean anything");
    assert!(known.rooted.len() > 3, "too few builds were finished to mean anything");
}

/// What earlier rounds have verified.
#[derive(Debug, Default)]
struct Known {
    paths: BTreeSet<String>,
    rooted: BTreeSet<String>,
}

/// Adds small trees with a large file now and then until the connection breaks.
fn add_until_cut_off(daemon: &Daemon, random: &mut Random, told: &Mutex<BTreeMap<String, Told>>) {
    let Ok(mut client) = daemon.connect().map_err(|_| ()).and_then(|s| Client::new(s).map_err(|_| ())) else { return };
    loop {
        let large = if random.next().is_multiple_of(8) { 700_000 } else { 3_000 };
        let tree = Tree::Directory(vec![
            (b"large".to_vec(), Tree::File(random.bytes(large))),
            (b"link".to_vec(), Tree::Link(b"large".to_vec())),
            (b"small".to_vec(), Tree::File(random.bytes(100))),
        ]);
        let Ok(path) = client.add("crash", &tree) else { return };
        told.lock().unwrap().insert(path, Told { at: Instant::now(), durable: false, rooted: false });
    }
}

/// Builds small derivations one after the other, each with a root; each path that the client prints was built and
/// registered.
fn build_until(s: &Setup, roots: &Path, round: u64, over: &AtomicBool, told: &Mutex<BTreeMap<String, Told>>) {
    for n in 0.. {
        let script = "mkdir $out; i=0; while [ $i -lt 20 ]; do echo $i $out > $out/$i; i=$((i+1)); done";
        let expression = derivation(&format!("built-{round}-{n}"), script, "");
        let root = format!("{}-{round}-{n}", roots.display());
        let call = s.nix(Who::User, "nix-build").args(["-o", &root, "-E", &expression]);
        let Ok(built) = call.quiet().run() else { return };
        if built.code == 0 {
            let finished = Told { at: Instant::now(), durable: true, rooted: true };
            told.lock().unwrap().insert(built.text(), finished);
        }
        if over.load(Ordering::Relaxed) {
            return;
        }
    }
}

/// Adds a file with a stock client and asks for what there is, again and again.
fn query_until(s: &Setup, round: u64, over: &AtomicBool) {
    let file = s.room.dir().join("home-user/crash-file");
    fs::write(&file, round.to_string()).unwrap();
    while !over.load(Ordering::Relaxed) {
        let Ok(added) = s.nix(Who::User, "nix-store").args(["--add", file.to_str().unwrap()]).quiet().run() else {
            return;
        };
        if added.code == 0 {
            let _ = s.nix(Who::User, "nix-store").args(["--query", "--requisites", &added.text()]).quiet().run();
        }
    }
}

/// After a restart: everything valid is whole, and what was told is valid but for the last moments and what a collection
/// may have taken. Answers how many were lost. What is verified becomes `known`.
fn verify(s: &Setup, known: &mut Known, told: &BTreeMap<String, Told>, killed: Instant, collected: bool) -> usize {
    let daemon = s.start();
    let mut client = Client::new(daemon.connect().unwrap()).unwrap();
    let valid: BTreeSet<String> = client.all_valid_paths().unwrap().into_iter().collect();
    let kept = if collected { &known.rooted } else { &known.paths };
    let missing: Vec<_> = kept.difference(&valid).collect();
    assert!(missing.is_empty(), "gone although an earlier round verified them: {missing:?}");
    known.rooted.extend(told.iter().filter(|(_, told)| told.rooted).map(|(path, _)| path.clone()));
    let mut lost = 0;
    for (path, told) in told {
        if !valid.contains(path) {
            let before = killed.saturating_duration_since(told.at);
            assert!(!told.durable, "{path} was built and is gone");
            assert!(collected || before <= WINDOW, "{path} was answered {before:?} before the kill and is gone");
            assert!(!Path::new(path).exists(), "{path} is not valid but in the store directory");
            lost += 1;
        }
    }
    for path in valid.difference(&known.paths) {
        let info = client.path_info(path).unwrap().unwrap();
        let (hash, size) = hash_path(Path::new(path)).unwrap();
        assert_eq!(
            (hex(&hash), size),
            (info.nar_hash.clone(), info.nar_size),
            "{path} read through the store directory"
        );
        assert_eq!(hex(&client.archive_hash(path, size).unwrap()), info.nar_hash, "{path} read from the daemon");
        assert!(info.references.iter().all(|r| valid.contains(r)), "{path} refers to what is not there");
    }
    if !s.subject.is_stock() {
        // Stock leaves half-written paths behind and removes them later; here the directory shows what is valid.
        let shown: BTreeSet<String> =
            fs::read_dir("/nix/store").unwrap().map(|e| e.unwrap().path().to_str().unwrap().to_owned()).collect();
        assert_eq!(shown, valid, "the store directory and the list of valid paths");
    }
    known.paths = valid;
    drop(client);
    let check = s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).quiet().ok().unwrap();
    assert!(!check.all().contains("modified"), "{}", check.all());
    daemon.stop().unwrap();
    lost
}
