//! Damage in the packs, behind the daemon's back: what stock clients see of it, and how they have it repaired.
//!
//! Stock's own test of this (`main/repair`) overwrites files of the store, which a mount that is read-only does not let
//! it; so this is its equivalent.

mod running;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use compat_tests::checks::expect_contains;
use compat_tests::{Daemon, Who};

use crate::{Setup, castored_setup, derivation};

const PACKS: &str = "/nix/var/nix/castored/packs";
/// What `castored fsck` exits with.
const SOUND: i32 = 0;
const REPAIRED: i32 = 2;
const DAMAGED: i32 = 3;

/// Bytes that do not compress, so that a pack holds them as they are.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

fn packs() -> Vec<PathBuf> {
    let mut packs: Vec<_> = fs::read_dir(PACKS).unwrap().map(|entry| entry.unwrap().path()).collect();
    packs.sort();
    packs
}

/// Changes a byte of a pack.
fn damage(pack: &Path, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(pack).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x11], at).unwrap();
    file.sync_all().unwrap();
}

/// Damages what the packs hold of these bytes, every copy.
pub(crate) fn damage_copies_of(bytes: &[u8]) {
    let mut copies = 0;
    for pack in packs() {
        let contents = fs::read(&pack).unwrap();
        let places = contents.windows(bytes.len()).enumerate().filter(|(_, window)| *window == bytes);
        for (at, _) in places {
            damage(&pack, at as u64);
            copies += 1;
        }
    }
    assert!(copies > 0, "the packs do not have the bytes");
}

fn castored(s: &Setup, arguments: &[&str]) -> Output {
    Command::new(s.subject.binary()).args(arguments).output().unwrap()
}

fn fsck(s: &Setup, arguments: &[&str]) -> (i32, String) {
    let output = castored(s, &[&["fsck"][..], arguments].concat());
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned())
}

/// The damage is done while no daemon runs, so that nothing is in anybody's memory.
fn with_damage(s: &Setup, daemon: Daemon, damage: impl FnOnce()) -> Daemon {
    daemon.stop().unwrap();
    damage();
    s.start()
}

pub(crate) fn is_io_error(path: &str) -> bool {
    fs::read(path).is_err_and(|error| error.raw_os_error() == Some(5))
}

#[test]
fn damage_is_found_named_and_substituted() {
    let Some(s) = castored_setup("repair-subst") else { return };
    let daemon = s.start();
    let contents = noise(7, 300_000);
    let add = |name: &str| {
        let file = s.room.write(name, &contents).unwrap();
        s.nix(Who::Root, "nix-store").arg("--add").arg(file).ok().unwrap().text()
    };
    let (one, other) = (add("one"), add("other"));
    let apart = {
        let file = s.room.write("apart", "something else").unwrap();
        s.nix(Who::Root, "nix-store").arg("--add").arg(file).ok().unwrap().text()
    };
    let cache = format!("file://{}", s.room.tmp("cache").display());
    s.nix(Who::Root, "nix").args(["copy", "--no-check-sigs", "--to", &cache, &one, &other]).ok().unwrap();
    assert_eq!(fsck(&s, &[]).0, SOUND);

    let daemon = with_damage(&s, daemon, || damage_copies_of(&contents[150_000..150_032]));
    // One chunk, two paths.
    assert!(is_io_error(&one) && is_io_error(&other));
    assert_eq!(fs::read(&apart).unwrap(), b"something else");
    let log = daemon.log();
    expect_contains(&log, one.rsplit('/').next().unwrap()).unwrap();
    expect_contains(&log, "chunk").unwrap();
    let verify = ["--verify", "--check-contents"];
    let found = s.nix(Who::Root, "nix-store").args(verify).fails().unwrap().all();
    for path in [&one, &other] {
        expect_contains(&found, path).unwrap();
    }
    s.nix(Who::Root, "nix-store").args(["--verify-path", &one]).fails().unwrap();
    s.nix(Who::Root, "nix-store").args(["--verify-path", &apart]).ok().unwrap();
    let (code, text) = fsck(&s, &[]);
    assert_eq!(code, DAMAGED, "{text}");
    assert!(text.contains(&one) && text.contains(&other) && !text.contains(&apart), "{text}");

    // Nobody has it: everything stays, and the list says so.
    let (code, text) = fsck(&s, &["--repair"]);
    assert_eq!(code, DAMAGED, "{text}");
    expect_contains(&text, "in quarantine").unwrap();
    s.nix(Who::Root, "nix-store").args(["--check-validity", &one, &other]).ok().unwrap();
    // An untrusted user may look but not repair.
    let refused = s.nix(Who::User, "nix-store").args(verify).arg("--repair").fails().unwrap().all();
    expect_contains(&refused, "not privileged to repair").unwrap();

    let options = ["--option", "substituters", &cache];
    s.nix(Who::Root, "nix-store").args(verify).arg("--repair").args(options).ok().unwrap();
    for path in [&one, &other] {
        assert!(fs::read(path).unwrap() == contents);
        s.nix(Who::Root, "nix-store").args(["--verify-path", path]).ok().unwrap();
    }
    s.nix(Who::Root, "nix-store").args(verify).ok().unwrap();
    let (code, text) = fsck(&s, &["--repair"]);
    assert_eq!(code, SOUND, "{text}");

    // One path only, by its name.
    let daemon = with_damage(&s, daemon, || damage_copies_of(&contents[10_000..10_032]));
    assert!(is_io_error(&one));
    let repair = s.nix(Who::Root, "nix-store").args(["--realise", "--repair", &one]).args(options);
    repair.ok().unwrap();
    assert!(fs::read(&one).unwrap() == contents && fs::read(&other).unwrap() == contents);
    daemon.stop().unwrap();

    // Without a daemon, with what nix.conf says.
    damage_copies_of(&contents[200_000..200_032]);
    let output = Command::new(s.subject.binary())
        .args(["fsck", "--repair"])
        .env("NIX_CONFIG", format!("substituters = {cache}\nrequire-sigs = false"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(REPAIRED), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(fsck(&s, &[]).0, SOUND);
}

#[test]
fn damaged_outputs_are_built_again() {
    let Some(s) = castored_setup("repair-build") else { return };
    let mut daemon = s.start();
    let text = "0123456789abcdefghijklmnopqrstuvwxyz".repeat(3);
    let inner = derivation("inner", &format!("echo {text} > $out"), "");
    let outer = derivation("outer", "echo $inner > $out", &format!("inner = {inner};"));
    let uuid = derivation("random", "read x < /proc/sys/kernel/random/uuid; echo $x > $out", "");
    for (expression, same) in [(&outer, true), (&uuid, false)] {
        let built = s.build(expression).ok().unwrap().text();
        let path = if same { fs::read_to_string(&built).unwrap().trim().to_owned() } else { built.clone() };
        let before = fs::read(&path).unwrap();
        daemon = with_damage(&s, daemon, || damage_object_of(&s, &before));
        assert!(is_io_error(&path));
        let build = s.nix(Who::Root, "nix-build").args(["--no-out-link", "--repair", "-E", expression]);
        assert_eq!(build.ok().unwrap().text(), built);
        let after = fs::read(&path).unwrap();
        assert_eq!(before == after, same, "another build has other contents, and so has the path");
        s.nix(Who::Root, "nix-store").args(["--verify-path", &path]).ok().unwrap();
        s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
    }
    assert_eq!(fsck(&s, &[]).0, SOUND);
    let refused =
        s.nix(Who::User, "nix-build").args(["--no-out-link", "--repair", "-E", &outer]).fails().unwrap().all();
    expect_contains(&refused, "trusted-users").unwrap();
    daemon.stop().unwrap();
}

/// Damages the block that has an object with these contents: its table names the digest.
fn damage_object_of(s: &Setup, contents: &[u8]) {
    let file = s.room.write("digest", contents).unwrap();
    let digest = blake3_of(&fs::read(file).unwrap());
    let mut found = 0;
    for pack in packs() {
        let bytes = fs::read(&pack).unwrap();
        for (at, _) in bytes.windows(32).enumerate().filter(|(_, window)| *window == digest) {
            // Not the table, from which the object could be saved, but the payload behind it.
            let header = (0..=at - 41).rev().find(|at| &bytes[*at..at + 4] == b"cBLK").unwrap();
            let objects = u32::from_le_bytes(bytes[header + 8..header + 12].try_into().unwrap()) as usize;
            let stored = u32::from_le_bytes(bytes[header + 16..header + 20].try_into().unwrap()) as usize;
            let payload = header + 40 + 37 * objects;
            if at >= payload || !(at - header - 41).is_multiple_of(37) {
                continue;
            }
            (payload..payload + stored).for_each(|at| damage(&pack, at as u64));
            found += 1;
        }
    }
    assert!(found > 0);
}

fn blake3_of(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

#[test]
fn a_lost_index_is_made_anew() {
    let Some(s) = castored_setup("rebuild-index") else { return };
    let daemon = s.start();
    let outer =
        derivation("outer", "echo $inner > $out", &format!("inner = {};", derivation("inner", "echo x > $out", "")));
    let built = s.build(&outer).ok().unwrap().text();
    let root = s.room.tmp("root");
    s.nix(Who::Root, "nix-store").args(["--realise", &built, "--add-root"]).arg(&root).ok().unwrap();
    let dump = || {
        let database = s.nix(Who::Root, "nix-store").arg("--dump-db").ok().unwrap().text();
        let roots = s.nix(Who::Root, "nix-store").args(["--gc", "--print-roots"]).ok().unwrap().text();
        let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&built).unwrap());
        (database, roots, inode, fs::read(&built).unwrap())
    };
    let before = dump();
    daemon.stop().unwrap();
    fs::remove_dir_all("/nix/var/nix/castored/index").unwrap();

    let refused = castored(&s, &["daemon"]);
    assert!(!refused.status.success());
    expect_contains(&String::from_utf8_lossy(&refused.stderr), "--rebuild-index").unwrap();
    let (code, text) = fsck(&s, &["--rebuild-index"]);
    assert_eq!(code, SOUND, "{text}");
    let daemon = s.start();
    assert_eq!(dump(), before);
    let (code, text) = fsck(&s, &[]);
    assert_eq!(code, SOUND, "{text}");
    daemon.stop().unwrap();
}

/// Another castored on the machine, with a root of its own, until dropped.
struct Neighbour {
    process: std::process::Child,
    root: PathBuf,
}

impl Neighbour {
    fn start(s: &Setup, address: &str) -> Self {
        let root = s.room.tmp("neighbour");
        let log = fs::File::create(s.room.tmp("neighbour.log")).unwrap();
        let mut command = Command::new(s.subject.binary());
        command
            .args(["daemon", "--no-keeper", "--grpc-listen", address, "--root"])
            .arg(&root)
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        let neighbour = Self { process: command.spawn().unwrap(), root };
        let began = std::time::Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            assert!(began.elapsed().as_secs() < 30, "{}", fs::read_to_string(s.room.tmp("neighbour.log")).unwrap());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        neighbour
    }

    fn import(&self, s: &Setup, path: &Path) {
        let output =
            Command::new(s.subject.binary()).arg("import").arg("--root").arg(&self.root).arg(path).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = nix::mount::umount2(&self.root.join("store"), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// What a castore says is asked for by its digest, so it may be anybody's: here one with another store directory, that has
/// the contents under other names.
#[test]
fn damaged_contents_come_from_another_castore() {
    let Some(s) = castored_setup("repair-castore") else { return };
    let address = crate::grpc::free_address();
    let daemon = s.start();
    let tree = s.room.tmp("tree");
    fs::create_dir_all(tree.join("below")).unwrap();
    let (large, small) = (noise(77, 900_000), noise(78, 40_000));
    fs::write(tree.join("below/large"), &large).unwrap();
    fs::write(tree.join("small"), &small).unwrap();
    for number in 0..300 {
        fs::write(tree.join(format!("below/file-{number}")), format!("{number}\n").repeat(20)).unwrap();
    }
    let path = s.nix(Who::Root, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let here_only = s.room.write("here-only", noise(79, 50_000)).unwrap();
    let other = s.nix(Who::Root, "nix-store").arg("--add").arg(&here_only).ok().unwrap().text();
    let damage = || {
        damage_copies_of(&large[400_000..400_032]);
        damage_object_of(&s, &small);
        damage_object_of(&s, &noise(79, 50_000));
    };
    daemon.stop().unwrap();
    fs::write(s.room.dir().join("daemon-conf/castored.conf"), format!("castores = grpc+http://{address}\n")).unwrap();
    damage();
    let daemon = s.start();
    // Nobody is there yet.
    let (code, text) = fsck(&s, &["--repair"]);
    assert_eq!(code, DAMAGED, "{text}");
    expect_contains(&text, &format!("the castore 'grpc+http://{address}'")).unwrap();
    let neighbour = Neighbour::start(&s, &address);
    neighbour.import(&s, &tree);
    let (code, text) = fsck(&s, &["--repair"]);
    assert_eq!(code, DAMAGED, "{text}");
    assert!(text.contains(&other), "{text}");
    assert_eq!(compat_tests::nar::hash_path(Path::new(&path)).unwrap(), compat_tests::nar::hash_path(&tree).unwrap());
    s.nix(Who::Root, "nix-store").args(["--verify-path", &path]).ok().unwrap();
    s.nix(Who::Root, "nix-store").args(["--verify-path", &other]).fails().unwrap();
    neighbour.import(&s, &here_only);
    let (code, text) = fsck(&s, &["--repair"]);
    assert_eq!(code, REPAIRED, "{text}");
    assert_eq!(fsck(&s, &[]).0, SOUND);
    daemon.stop().unwrap();
}
