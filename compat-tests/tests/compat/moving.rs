//! Moving in from real stock stores, and out into one.

mod house;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use compat_tests::checks::expect_contains;
use compat_tests::{Call, Who};
use nix::mount::{MsFlags, mount};

use crate::builds::poll;
use crate::castored_setup;
use house::House;

/// What a client of `nix-store --serve` says first: its magic number, and version 2.5.
const SERVE_HELLO: [u8; 16] = [0xeb, 0x9d, 0x0c, 0x39, 0, 0, 0, 0, 5, 2, 0, 0, 0, 0, 0, 0];

/// In, started, compared; out again, verified by stock, compared; and all that twice, with stores of stock's oldest and
/// newest release.
#[test]
fn a_store_of_2_3_moves_in_and_out() {
    in_and_out("2.3.7");
}

#[test]
fn a_store_of_2_34_moves_in_and_out() {
    in_and_out("2.34.8");
}

fn in_and_out(version: &str) {
    let Some(s) = castored_setup("move") else { return };
    let house = House::new(&s, version);
    house.furnish();
    let before = house.inventory("local");

    // Nothing is taken away from stock before the end.
    expect_contains(&house.adopt(&[]).ok().unwrap().text(), "adopted").unwrap();
    let later = house.add_later();
    let before = before.with(house.inventory("local"));
    house.adopt(&["--finish"]).ok().unwrap();
    expect_contains(&house.adopt(&[]).ok().unwrap().text(), "has taken over").unwrap();

    let daemon = s.start();
    let after = house.inventory("daemon");
    before.assert_equal(&after);
    assert!(after.paths().contains(&later), "what stock added after the first run");
    house.assert_contents(&after);
    let verified = s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
    assert!(!verified.all().contains("modified"), "{}", verified.all());
    daemon.stop().unwrap();

    // The old files are below the mount, and castored starts over them again.
    assert!(Path::new(&later).exists(), "an old file is gone");
    let daemon = s.start();
    house.castored(&["adopt", "--remove-old"]).ok().unwrap();
    house.assert_contents(&after);
    daemon.stop().unwrap();
    assert_eq!(fs::read_dir("/nix/store").unwrap().flatten().map(|e| e.file_name()).collect::<Vec<_>>(), [".links"]);
    assert!(!Path::new("/nix/var/nix/db.stock").exists());

    let out = s.room.tmp("out");
    house.castored(&["export-store", out.to_str().unwrap()]).ok().unwrap();
    house.castored(&["export-store", out.to_str().unwrap()]).fails().expect("the directory is not empty now");
    house.assert_modes(&out.join("nix/store"));
    let chroot = out.display().to_string();
    for release in &s.machine.releases {
        let verify = house.nix_of(release, "nix-store", &format!("local?root={chroot}"));
        let verified = verify.args(["--verify", "--check-contents"]).ok().unwrap();
        assert!(!verified.all().contains("modified") && !verified.all().contains("error"), "{}", verified.all());
    }
    before.assert_equal_but_for_roots(&house.inventory(&format!("local?root={chroot}")));

    // As the machine's own store.
    house.empty_nix();
    copy(&out.join("nix"), Path::new("/nix"));
    before.assert_equal(&house.inventory("local"));
    let verified = house.stock("nix-store").args(["--verify", "--check-contents"]).ok().unwrap();
    assert!(!verified.all().contains("modified") && !verified.all().contains("error"), "{}", verified.all());
    house.assert_garbage_is_collected();
}

#[test]
fn realisations_move_in_and_out() {
    let Some(s) = castored_setup("realisations") else { return };
    for version in ["2.8.0", "2.26.3", "2.34.8"] {
        let house = House::new(&s, version);
        let (drv, out) = house.build_addressed();
        let known = house.realisation(&drv, "local");
        assert!(known.contains(Path::new(&out).file_name().unwrap().to_str().unwrap()), "{known}");
        house.adopt(&["--finish"]).ok().unwrap();
        let conf = format!("{}extra-experimental-features = ca-derivations\n", compat_tests::subject::default_conf());
        let daemon = s.subject.start_with(&s.room, &conf).unwrap();
        assert_eq!(house.realisation(&drv, "daemon"), known, "of a store of {version}");
        daemon.stop().unwrap();
        let export = s.room.tmp(&format!("export-{version}"));
        house.castored(&["export-store", "--optimise", export.to_str().unwrap()]).ok().unwrap();
        let chroot = format!("local?root={}", export.display());
        assert_eq!(house.realisation(&drv, &chroot), known, "exported, of a store of {version}");
        house.empty_nix();
    }
}

#[test]
fn a_closure_is_exported_with_equal_files_linked() {
    let Some(s) = castored_setup("closure") else { return };
    let daemon = s.start();
    let other = s.nix(Who::User, "nix-store").arg("--add").arg(s.room.write("other", "other\n").unwrap()).ok().unwrap();
    let tree = s.room.tmp("tree");
    fs::create_dir_all(tree.join("below")).unwrap();
    for name in ["a", "b", "below/c"] {
        fs::write(tree.join(name), "the same\n").unwrap();
    }
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    daemon.stop().unwrap();
    let house = House::new(&s, "2.34.8");
    let out = s.room.tmp("out");
    let dir = out.to_str().unwrap();
    house.castored(&["export-store", "--optimise", dir, &path]).ok().unwrap();
    let file = |name: &str| fs::metadata(format!("{dir}{path}/{name}")).unwrap();
    assert_eq!((file("a").nlink(), file("a").ino()), (4, file("below/c").ino()));
    assert!(!Path::new(&format!("{dir}{}", other.text())).exists(), "only the closure");
    let chroot = format!("local?root={dir}");
    let verified = house.nix("nix-store", &chroot).args(["--verify", "--check-contents"]).ok().unwrap();
    assert!(!verified.all().contains("error"), "{}", verified.all());
    // Stock knows the links as its own, and the path has a root.
    let optimised = house.nix("nix-store", &chroot).arg("--optimise").ok().unwrap();
    expect_contains(&optimised.all(), "0.0 KiB freed").unwrap();
    house.nix("nix-store", &chroot).arg("--gc").ok().unwrap();
    assert!(Path::new(&format!("{dir}{path}/a")).exists());
}

/// Starts a command so many times and kills it, each time when `due` returns for the round, counted from one. How many of
/// them had not ended by then.
fn kill_again_and_again(rounds: u32, command: impl Fn() -> Call, due: impl Fn(u32)) -> u32 {
    let mut kills = 0;
    for round in 1..=rounds {
        let mut child = command().spawn().unwrap();
        due(round);
        kills += u32::from(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    kills
}

#[test]
fn killed_at_any_moment_it_continues() {
    let Some(s) = castored_setup("killed") else { return };
    let house = House::new(&s, "2.34.8");
    house.furnish();
    house.add_many(150);
    let before = house.inventory("local");
    let later = |round| thread::sleep(Duration::from_millis(15) * round);
    let kills = kill_again_and_again(12, || house.adopt(&["--jobs", "2"]), later);
    println!("killed {kills} of 12 runs");
    assert!(kills > 2, "too few to mean anything");
    house.adopt(&["--finish"]).ok().unwrap();
    let daemon = s.start();
    let after = house.inventory("daemon");
    before.assert_equal(&after);
    house.assert_contents(&after);
    daemon.stop().unwrap();
}

#[test]
fn files_that_stock_has_linked_are_read_once() {
    let Some(s) = castored_setup("linked") else { return };
    let house = House::new(&s, "2.34.8");
    for (round, arguments) in [&["--finish"][..], &["--in-place"]].into_iter().enumerate() {
        for number in 0..4 {
            let tree = s.room.tmp(&format!("linked-{round}-{number}"));
            fs::create_dir(&tree).unwrap();
            fs::write(tree.join("own"), format!("{number}\n").repeat(50_000)).unwrap();
            fs::write(tree.join("small"), "the same in all\n").unwrap();
            fs::write(tree.join("large"), "also the same in all\n".repeat(100_000)).unwrap();
            house.stock("nix-store").arg("--add").arg(&tree).quiet().ok().unwrap();
        }
        house.stock("nix-store").arg("--optimise").ok().unwrap();
        let before = house.inventory("local");
        let said = house.adopt(&[&["--jobs", "1"][..], arguments].concat()).ok().unwrap().text();
        expect_contains(&said, "6 files were hard links of others, and not read again").unwrap();
        let daemon = s.start();
        let after = house.inventory("daemon");
        before.assert_equal(&after);
        house.assert_contents(&after);
        daemon.stop().unwrap();
        house.empty_nix();
    }
}

#[test]
fn an_export_that_was_killed_continues() {
    let Some(s) = castored_setup("killed-export") else { return };
    let house = House::new(&s, "2.34.8");
    house.furnish();
    house.add_many(150);
    let before = house.inventory("local");
    house.adopt(&["--finish"]).ok().unwrap();
    let out = s.room.tmp("out");
    let dir = out.to_str().unwrap();
    let command = || house.castored(&["export-store", "--optimise", dir]);
    // By what is written, not by the clock: a run that came to its end would leave nothing to continue.
    let written = || fs::read_dir(out.join("nix/store")).map_or(0, |entries| entries.count());
    let (limit, pause) = (Duration::from_secs(20), Duration::from_millis(2));
    let further = |round| assert!(poll(limit, pause, || written() >= 15 * round as usize));
    assert_eq!(kill_again_and_again(6, command, further), 6);
    let other = house.castored(&["export-store", dir]).fails().unwrap();
    expect_contains(&other.all(), "the beginning of an export of other paths or options").unwrap();
    // As a crash of the machine may leave it: the name is there, and the contents are not.
    let written = fs::read_dir(out.join("nix/store")).unwrap().flatten().map(|entry| entry.path());
    let whole: Vec<_> = written.filter(|path| path.to_string_lossy().contains("-many-")).collect();
    let hollow = whole[0].join("3");
    fs::set_permissions(&hollow, PermissionsExt::from_mode(0o644)).unwrap();
    let length = fs::metadata(&hollow).unwrap().len();
    let file = fs::File::options().write(true).truncate(true).open(&hollow).unwrap();
    file.set_len(length).unwrap();
    let said = house.castored(&["export-store", "--optimise", dir]).ok().unwrap().text();
    expect_contains(&said, "of the paths had been written before").unwrap();
    let chroot = format!("local?root={dir}");
    let verified = house.nix("nix-store", &chroot).args(["--verify", "--check-contents"]).ok().unwrap();
    assert!(!verified.all().contains("modified") && !verified.all().contains("error"), "{}", verified.all());
    before.assert_equal_but_for_roots(&house.inventory(&chroot));
    house.assert_modes(&out.join("nix/store"));
    house
        .castored(&["export-store", "--optimise", dir])
        .fails()
        .expect("it is finished, and the directory is not empty");
}

#[test]
fn what_is_damaged_is_left_out_by_name_with_what_refers_to_it() {
    let Some(s) = castored_setup("damaged") else { return };
    let house = House::new(&s, "2.34.8");
    let furniture = house.furnish();
    let file = Path::new(&furniture.tree).join("plain");
    let was = fs::read(&file).unwrap();
    fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    fs::write(&file, "another text\n").unwrap();
    for arguments in [&[][..], &["--finish"]] {
        let said = house.adopt(arguments).fails().unwrap().all();
        expect_contains(&said, &format!("{}: hash mismatch", furniture.tree)).unwrap();
        expect_contains(&said, &format!("{}: refers to what was left out", furniture.out)).unwrap();
    }
    // castored has not taken over, so it does not start, and stock goes on.
    match s.subject.start(&s.room) {
        Err(compat_tests::Error::Daemon { log, .. }) => expect_contains(&log, "castored adopt").unwrap(),
        other => panic!("{other:?}"),
    }
    house.stock("nix-store").args(["-q", "--references", &furniture.out]).ok().unwrap();
    fs::write(&file, was).unwrap();
    house.adopt(&["--finish"]).ok().unwrap();
    let daemon = s.start();
    s.nix(Who::User, "nix-store").args(["--verify-path", &furniture.out, &furniture.tree]).ok().unwrap();
    daemon.stop().unwrap();
}

#[test]
fn stock_at_work_is_not_replaced() {
    let Some(s) = castored_setup("at-work") else { return };
    let house = House::new(&s, "2.34.8");
    let furniture = house.furnish();
    for version in ["2.3.7", "2.34.8"] {
        let release = s.machine.release(version).unwrap();
        // Holds the store open until it is killed.
        let mut serving = std::process::Command::new(release.command("nix-store"))
            .args(["--serve", "--write", "--option", "build-users-group", ""])
            .env("NIX_REMOTE", "local")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(serving.stdin.as_mut().unwrap(), &SERVE_HELLO).unwrap();
        let mut answer = [0; 16];
        std::io::Read::read_exact(serving.stdout.as_mut().unwrap(), &mut answer).unwrap();
        let refused = house.adopt(&["--finish"]).fails().unwrap();
        expect_contains(&refused.stderr, "stop nix-daemon").unwrap();
        house.adopt(&[]).ok().unwrap();
        serving.kill().unwrap();
        serving.wait().unwrap();
    }
    house.adopt(&["--finish"]).ok().unwrap();
    let stopped = house.stock("nix-store").args(["-q", "--references", &furniture.out]).fails().unwrap();
    expect_contains(&stopped.stderr, "castored").unwrap();
}

#[test]
fn in_place_frees_what_is_not_in_use() {
    let Some(s) = castored_setup("in-place") else { return };
    let house = House::new(&s, "2.34.8");
    let furniture = house.furnish();
    let tools = s.room.tmp("tools");
    fs::create_dir_all(&tools).unwrap();
    fs::copy("/usr/bin/busybox", tools.join("sleep"))
        .or_else(|_| fs::copy("/bin/busybox", tools.join("sleep")))
        .unwrap();
    let program = house.stock("nix-store").arg("--add").arg(&tools).ok().unwrap().text();
    let before = house.inventory("local");
    let mut running = std::process::Command::new(format!("{program}/sleep")).arg("600").spawn().unwrap();
    let said = house.adopt(&["--in-place"]).ok().unwrap().text();
    expect_contains(&said, "removed the old files").unwrap();
    assert!(Path::new(&program).join("sleep").exists(), "a program that runs");
    assert!(Path::new(&furniture.out).exists(), "what a profile has");
    assert!(!Path::new(&furniture.loose).exists(), "what nobody uses was to be freed");
    // Stock must not take for valid what is gone.
    let stopped = house.stock("nix-store").args(["-q", "--references", &furniture.loose]).fails().unwrap();
    expect_contains(&stopped.stderr, "castored").unwrap();
    let daemon = s.start();
    before.assert_equal(&house.inventory("daemon"));
    house.assert_contents(&before);
    house.castored(&["adopt", "--remove-old"]).ok().unwrap();
    running.kill().unwrap();
    running.wait().unwrap();
    daemon.stop().unwrap();
    assert!(!Path::new(&program).exists());
}

#[test]
fn a_store_elsewhere_on_a_read_only_file_system_is_taken_over() {
    let Some(s) = castored_setup("elsewhere") else { return };
    let house = House::new(&s, "2.34.8");
    house.furnish();
    let before = house.inventory("local");
    let elsewhere = s.room.tmp("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    copy(Path::new("/nix"), &elsewhere.join("nix"));
    house.empty_nix();
    let none = None::<&str>;
    mount(Some(&elsewhere), &elsewhere, none, MsFlags::MS_BIND, none).unwrap();
    mount(none, &elsewhere, none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, none).unwrap();
    // As it is after a crash: SQLite may not make what it needs beside the database.
    house
        .castored(&["adopt", "--from", elsewhere.to_str().unwrap(), "--finish"])
        .fails()
        .expect("no lock can be taken");
    house.castored(&["adopt", "--from", elsewhere.to_str().unwrap()]).ok().unwrap();
    nix::mount::umount(&elsewhere).unwrap();
    let daemon = s.start();
    before.assert_equal(&house.inventory("daemon"));
    house.assert_contents(&before);
    daemon.stop().unwrap();
}

/// Copies a tree as it is.
fn copy(from: &Path, to: &Path) {
    let status = std::process::Command::new("cp").arg("-aT").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}
