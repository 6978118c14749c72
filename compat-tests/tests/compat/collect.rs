//! Garbage collections as stock clients start, watch and abandon them.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::Shutdown;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::checks::expect_contains;
use compat_tests::load::{self, Connection, Offer};
use compat_tests::nar::Tree;
use compat_tests::wire::{Client, Request};
use compat_tests::{Call, Daemon, Who};

use crate::{Setup, derivation, setup};

/// Paths in a store that is collected while something else happens: enough for that to happen in the middle.
const MANY: usize = 12_000;
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
const ROOTS: &str = "/nix/var/nix/gcroots";

/// Adds paths in chains of ten, each with a file or two of its own, and answers their names.
fn add_many(daemon: &Daemon, tag: &str, count: usize) -> Vec<String> {
    let name = |n: usize| load::made_up_path(&format!("{tag} {n}"), tag);
    let offer = |n: usize| Offer {
        path: name(n),
        references: if n.is_multiple_of(10) { vec![] } else { vec![name(n - 1)] },
        archive: Tree::Directory(vec![(b"file".to_vec(), Tree::File(format!("{tag} {n}").into_bytes()))]).archive(),
        ..Offer::default()
    };
    let mut connection = Connection::over(daemon.connect().unwrap(), 38).unwrap();
    connection.call(&load::add_multiple((0..count).map(offer))).unwrap();
    // What it added is rooted until it is gone.
    connection.output().shutdown(Shutdown::Write).unwrap();
    assert_eq!(connection.input().read(&mut [0]).unwrap(), 0);
    (0..count).map(name).collect()
}

fn valid(daemon: &Daemon) -> BTreeSet<String> {
    Client::new(daemon.connect().unwrap()).unwrap().all_valid_paths().unwrap().into_iter().collect()
}

/// Whatever is valid is whole: what it refers to is valid, it can be read, and the directory shows just that.
fn expect_whole(s: &Setup, daemon: &Daemon) {
    let valid = valid(daemon);
    let mut client = Client::new(daemon.connect().unwrap()).unwrap();
    for path in &valid {
        let info = client.path_info(path).unwrap().unwrap();
        assert!(info.references.iter().all(|reference| valid.contains(reference)), "{path} lacks a reference");
    }
    if !s.subject.is_stock() {
        let shown = fs::read_dir("/nix/store").unwrap().map(|e| e.unwrap().path().to_str().unwrap().to_owned());
        assert_eq!(shown.collect::<BTreeSet<_>>(), valid, "the store directory and the list of valid paths");
    }
    let check = s.nix(Who::Root, "nix-store").args(["--verify", "--check-contents"]).quiet().ok().unwrap();
    assert!(!check.all().contains("modified"), "{}", check.all());
}

/// Starts a collection and answers when the client has been told of the first path that is gone.
fn begin(s: &Setup, who: Who) -> Child {
    let mut client = s.nix(who, "nix-store").arg("--gc").spawn().unwrap();
    let mut lines = BufReader::new(client.stderr.take().unwrap()).lines();
    let first = lines.find(|line| line.as_ref().unwrap().starts_with("deleting '/nix/store/"));
    assert!(first.is_some(), "nothing was deleted");
    thread::spawn(move || lines.for_each(drop));
    client
}

#[test]
fn what_a_collection_does_is_told_in_stocks_words() {
    let Some(s) = setup("collect-words") else { return };
    let daemon = s.start();
    let file = s.room.write("file", "dead\n").unwrap();
    let add = || s.nix(Who::User, "nix-store").arg("--add").arg(&file).quiet().ok().unwrap().text();
    let path = add();
    fs::create_dir_all(format!("{ROOTS}/auto")).unwrap();
    symlink("/nowhere/at/all", format!("{ROOTS}/auto/stale")).unwrap();
    let invalid = load::made_up_path("nobody", "has-this");
    symlink(&invalid, format!("{ROOTS}/invalid")).unwrap();
    let store = |args: &[&str]| s.nix(Who::User, "nix-store").args(args).ok().unwrap();
    let lines = |output: compat_tests::Output, wanted: &[String]| {
        let heard: Vec<&str> = output.stderr.lines().filter(|line| wanted.iter().any(|w| w == line)).collect();
        assert_eq!(heard, wanted, "{}", output.stderr);
    };
    let finding = "finding garbage collector roots...".to_owned();
    let skipping = format!("skipping invalid root from \"{ROOTS}/invalid\" to \"{invalid}\"");
    let roots = store(&["--gc", "--print-roots"]);
    let stale = format!("removing stale link from \"{ROOTS}/auto/stale\" to \"/nowhere/at/all\"");
    expect_contains(&roots.stderr, &stale).unwrap();
    expect_contains(&roots.stderr, &skipping).unwrap();
    assert!(fs::symlink_metadata(format!("{ROOTS}/auto/stale")).is_err(), "the stale link is still there");
    for what in ["--print-live", "--print-dead"] {
        let told = [&finding, &skipping, &"determining live/dead paths...".to_owned()].map(String::clone);
        lines(store(&["--gc", what]), &told);
    }
    let quiet = store(&["--gc", "--print-dead", "--quiet"]);
    assert!(!quiet.stderr.contains("garbage") && !quiet.stderr.contains("skipping"), "{}", quiet.stderr);
    let deleting = format!("deleting '{path}'");
    let told = [finding.clone(), skipping, "deleting garbage...".to_owned(), deleting.clone()];
    let output = store(&["--gc"]);
    expect_contains(&output.all(), "1 store paths deleted").unwrap();
    lines(output, &told);
    assert_eq!(add(), path);
    lines(store(&["--delete", &path]), &[finding, deleting]);
    daemon.stop().unwrap();
}

#[test]
fn a_client_that_goes_away_ends_its_collection_where_the_store_is_whole() {
    let Some(s) = setup("collect-gone") else { return };
    let daemon = s.start();
    add_many(&daemon, "gone", MANY);
    let mut client = begin(&s, Who::User);
    client.kill().unwrap();
    client.wait().unwrap();
    // It has ended when another collection has had its turn.
    let dead = s.nix(Who::User, "nix-store").args(["--gc", "--print-dead"]).quiet().ok().unwrap().lines();
    assert_eq!(dead.len(), valid(&daemon).len());
    println!("{} of {MANY} were left", dead.len());
    assert!(!dead.is_empty() && dead.len() < MANY, "it went on, or never began");
    expect_whole(&s, &daemon);
    s.nix(Who::User, "nix-store").arg("--gc").quiet().ok().unwrap();
    assert!(valid(&daemon).is_empty());
    daemon.stop().unwrap();
}

#[test]
fn a_collection_that_the_daemons_death_cut_off_is_finished_by_the_next() {
    let Some(s) = setup("collect-killed") else { return };
    let daemon = s.start();
    let all = add_many(&daemon, "killed", MANY);
    symlink(&all[9], format!("{ROOTS}/kept")).unwrap();
    let mut client = begin(&s, Who::Root);
    daemon.kill_hard().unwrap();
    client.wait().unwrap();
    let daemon = s.start();
    let left = valid(&daemon);
    println!("{} of {MANY} were left", left.len());
    assert!(left.len() > 10, "it was not cut off");
    expect_whole(&s, &daemon);
    s.nix(Who::User, "nix-store").arg("--gc").quiet().ok().unwrap();
    assert_eq!(valid(&daemon), all[..10].iter().cloned().collect());
    expect_whole(&s, &daemon);
    daemon.stop().unwrap();
}

#[test]
fn collections_at_the_same_time_take_turns_and_hold_up_nobody() {
    let Some(s) = setup("collect-turns") else { return };
    let daemon = s.start();
    let all = add_many(&daemon, "turns", MANY);
    symlink(&all[99], format!("{ROOTS}/kept")).unwrap();
    let mut first = begin(&s, Who::User);
    let second = s.nix(Who::Root, "nix-store").arg("--gc").quiet().ok().unwrap();
    expect_contains(&second.stderr, "waiting for the big garbage collector lock...").unwrap();
    assert!(first.wait().unwrap().success());
    let kept: BTreeSet<String> = all[90..100].iter().cloned().collect();
    assert_eq!(valid(&daemon), kept);
    // Many more than there are worker threads may wait for their turn, and others are served.
    add_many(&daemon, "more", MANY);
    let mut busy = begin(&s, Who::User);
    let request = Request::numbered(20).word(2).strings::<&str>(&[]).word(0).word(u64::MAX).word(0).word(0).word(0);
    let waiting: Vec<_> = (0..300)
        .map(|_| {
            let mut client = Client::new(daemon.connect().unwrap()).unwrap();
            client.send(&request.0).unwrap();
            client
        })
        .collect();
    let began = Instant::now();
    let file = s.room.write("file", "meanwhile\n").unwrap();
    s.nix(Who::User, "nix-store").arg("--add").arg(&file).ok().unwrap();
    println!("added in {:?} while {} collections wait", began.elapsed(), waiting.len());
    assert!(began.elapsed() < PATIENCE / 4);
    for mut client in waiting {
        client.set_patience(PATIENCE * 2).unwrap();
        client.finish().unwrap();
    }
    assert!(busy.wait().unwrap().success());
    assert_eq!(valid(&daemon), kept);
    daemon.stop().unwrap();
}

#[test]
fn what_is_named_is_deleted_as_stock_deletes_it() {
    let Some(s) = setup("collect-named") else { return };
    let daemon = s.start();
    let store = |args: &[&str]| s.nix(Who::Root, "nix-store").args(args);
    let expression = derivation("named", "echo > $out", "");
    let build = || s.build(&expression).quiet().ok().unwrap().text();
    let out = build();
    let drv = store(&["--query", "--deriver", &out]).ok().unwrap().text();
    let alive = |call: Call| expect_contains(&call.fails().unwrap().stderr, "since it is still alive").unwrap();
    // A derivation stays as long as what was built from it, dead as that is, unless the client has it otherwise.
    alive(store(&["--delete", &drv]));
    alive(store(&["--delete", &out, "--option", "keep-outputs", "true"]));
    store(&["--delete", &drv, "--option", "keep-derivations", "false"]).ok().unwrap();
    store(&["--delete", &out]).ok().unwrap();
    assert!(valid(&daemon).is_empty());
    let out = build();
    store(&["--delete", &out, &drv]).ok().unwrap();

    let out = build();
    let refused = store(&["--delete", "--ignore-liveness", &out]).fails().unwrap();
    expect_contains(&refused.stderr, "you are not allowed to ignore liveness").unwrap();
    let refused = s.nix(Who::Root, "nix").args(["store", "delete", "--ignore-liveness", &out]).fails().unwrap();
    expect_contains(&refused.stderr, "you are not allowed to ignore liveness").unwrap();
    let link = s.room.tmp("result");
    store(&["--add-root", link.to_str().unwrap(), "--realise", &out]).ok().unwrap();
    alive(s.nix(Who::User, "nix").args(["store", "delete", &out]));
    fs::remove_file(&link).unwrap();
    s.nix(Who::User, "nix").args(["store", "delete", &out]).ok().unwrap();
    assert!(!Path::new(&out).exists());
    // Of what does not exist, stock says that it has deleted it.
    store(&["--delete", &out]).ok().unwrap();
    daemon.stop().unwrap();
}

#[test]
fn a_collection_stops_when_enough_is_free() {
    let Some(s) = setup("collect-enough") else { return };
    let daemon = s.start();
    let all = add_many(&daemon, "enough", 40);
    let stopped = s.nix(Who::User, "nix-store").args(["--gc", "--max-freed", "1"]).ok().unwrap();
    expect_contains(&stopped.stderr, "deleted more than 1 bytes; stopping").unwrap();
    expect_contains(&stopped.all(), "1 store paths deleted").unwrap();
    assert_eq!(valid(&daemon).len(), all.len() - 1);
    s.nix(Who::User, "nix").args(["store", "gc", "--max", "1"]).ok().unwrap();
    assert_eq!(valid(&daemon).len(), all.len() - 2);
    s.nix(Who::User, "nix-collect-garbage").args(["--max-freed", "1"]).ok().unwrap();
    assert_eq!(valid(&daemon).len(), all.len() - 3);
    expect_whole(&s, &daemon);
    s.nix(Who::User, "nix").args(["store", "gc"]).ok().unwrap();
    assert!(valid(&daemon).is_empty());
    daemon.stop().unwrap();
}

#[test]
fn old_generations_go_with_what_only_they_used() {
    let Some(s) = setup("collect-generations") else { return };
    let daemon = s.start();
    let profile = "/nix/var/nix/profiles/per-user/root/it";
    fs::create_dir_all("/nix/var/nix/profiles/per-user/root").unwrap();
    let mut generations = Vec::new();
    for n in 0..3 {
        let out = s.build(&derivation(&format!("generation-{n}"), "mkdir $out", "")).quiet().ok().unwrap().text();
        s.nix(Who::Root, "nix-env").args(["--profile", profile, "--set", &out]).ok().unwrap();
        generations.push(out);
    }
    s.nix(Who::Root, "nix-collect-garbage").ok().unwrap();
    assert!(generations.iter().all(|out| Path::new(out).exists()), "each is a root");
    s.nix(Who::Root, "nix-env").args(["--profile", profile, "--rollback"]).ok().unwrap();
    s.nix(Who::Root, "nix-collect-garbage").arg("-d").ok().unwrap();
    let there: Vec<bool> = generations.iter().map(|out| Path::new(out).exists()).collect();
    assert_eq!(there, [false, true, false]);
    daemon.stop().unwrap();
}
