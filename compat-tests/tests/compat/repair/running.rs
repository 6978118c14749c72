//! Pack files that somebody deletes, cuts short or changes while the daemon runs.

use std::fs;

use compat_tests::Who;
use compat_tests::checks::expect_contains;

use super::{DAMAGED, REPAIRED, SOUND, damage_copies_of, fsck, is_io_error, noise, packs};
use crate::{Setup, castored_setup};

/// Bytes of a file that is added.
const LENGTH: usize = 300_000;

/// Adds a file of noise, which is another for each odd number. What the pack has of it was never read by then.
fn add(s: &Setup, name: &str, seed: u64) -> String {
    let file = s.room.write(name, noise(seed, LENGTH)).unwrap();
    s.nix(Who::Root, "nix-store").arg("--add").arg(file).ok().unwrap().text()
}

fn is_right(path: &str, seed: u64) -> bool {
    fs::read(path).unwrap() == noise(seed, LENGTH)
}

#[test]
fn a_pack_that_is_deleted_while_it_is_in_use_is_put_back() {
    let Some(s) = castored_setup("pack-deleted") else { return };
    let daemon = s.start();
    let one = add(&s, "one", 1);
    let [pack] = &packs()[..] else { panic!("one pack expected: {:?}", packs()) };
    fs::remove_file(pack).unwrap();
    assert!(is_right(&one, 1), "the daemon has it open");
    let (code, text) = fsck(&s, &[]);
    assert_eq!(code, DAMAGED, "{text}");
    expect_contains(&text, "has been deleted").unwrap();
    let (code, text) = fsck(&s, &["--repair"]);
    assert_eq!(code, REPAIRED, "{text}");
    assert!(pack.exists());
    // Also by what is added next, before it is answered for.
    fs::remove_file(pack).unwrap();
    let two = add(&s, "two", 3);
    assert_eq!(fsck(&s, &[]).0, SOUND);
    daemon.stop().unwrap();
    let daemon = s.start();
    assert!(is_right(&one, 1) && is_right(&two, 3));
    daemon.stop().unwrap();
}

#[test]
fn what_a_pack_loses_while_it_is_in_use_is_an_error_for_that_alone_and_is_healed_or_in_quarantine() {
    let Some(s) = castored_setup("pack-cut") else { return };
    let daemon = s.start();
    let whole = add(&s, "whole", 11);
    let [pack] = &packs()[..] else { panic!("one pack expected: {:?}", packs()) };
    let length = fs::metadata(pack).unwrap().len();
    let (cut, gone, had) = (add(&s, "cut", 13), add(&s, "gone", 15), add(&s, "had", 17));
    let cache = format!("file://{}", s.room.tmp("cache").display());
    s.nix(Who::Root, "nix").args(["copy", "--no-check-sigs", "--to", &cache, &had]).ok().unwrap();
    fs::OpenOptions::new().write(true).open(pack).unwrap().set_len(length + 1000).unwrap();

    let (code, text) = fsck(&s, &[]);
    assert_eq!(code, DAMAGED, "{text}");
    expect_contains(&text, "has been cut to").unwrap();
    assert!([&cut, &gone, &had].iter().all(|path| text.contains(*path)) && !text.contains(&whole), "{text}");
    assert!(is_right(&whole, 11) && [&cut, &gone].iter().all(|path| is_io_error(path)));

    // Nothing is deduplicated against what is lost, and who brings the contents heals every path that has them.
    let again = add(&s, "cut-again", 13);
    assert!(is_right(&again, 13) && is_right(&cut, 13));

    let (code, text) = fsck(&s, &["--repair"]);
    assert_eq!(code, DAMAGED, "{text}");
    let quarantined = |path: &str| text.lines().any(|line| line.starts_with("in quarantine") && line.contains(path));
    assert!(quarantined(&gone) && quarantined(&had) && !quarantined(&cut) && !quarantined(&whole), "{text}");
    daemon.stop().unwrap();

    // What nobody has any more is no hindrance.
    let daemon = s.start();
    assert!(is_right(&whole, 11) && is_right(&cut, 13) && is_io_error(&gone) && is_io_error(&had));
    let verify = s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents", "--repair"]);
    verify.args(["--option", "substituters", &cache]).fails().unwrap();
    assert!(is_right(&had, 17) && is_io_error(&gone));
    assert!(is_right(&add(&s, "gone-again", 15), 15) && is_right(&gone, 15));
    assert_eq!(fsck(&s, &["--repair"]).0, SOUND);

    // The same for a bit that changes under the daemon.
    damage_copies_of(&noise(11, LENGTH)[100_000..100_032]);
    let (code, text) = fsck(&s, &[]);
    assert!(code == DAMAGED && text.contains(&whole) && !text.contains(&cut), "{code}: {text}");
    assert!(is_right(&add(&s, "whole-again", 11), 11));
    assert_eq!(fsck(&s, &[]).0, SOUND);
    daemon.stop().unwrap();
}
