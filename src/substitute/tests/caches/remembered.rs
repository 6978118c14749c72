//! What caches have said, for as long as the settings say, also by daemons that are no more.

use std::time::{Duration, Instant};

use substitute::{Outcome, Substituter, Wanted};

use crate::rig::{Cache, Entry, Rig};
use crate::server::Server;

/// Asks what would be fetched; whether there is anything.
async fn is_offered(rig: &Rig, server: &Server, extra: &[(&str, &str)], entry: &Entry) -> bool {
    let (client, _) = rig.client(&[&server.url()], extra);
    rig.substituters.info(&client, Wanted::from(entry.path().clone())).await.is_some()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_survive_the_daemon() {
    let (cache, mut rig) = (Cache::new(), Rig::new());
    let (there, absent) = (cache.add("there", b"x", &[]), cache.entry("absent", b"x", &[]));
    let server = Server::new(cache.path());
    for round in 0..3 {
        assert!(is_offered(&rig, &server, &[], &there).await, "{round}");
        assert!(!is_offered(&rig, &server, &[], &absent).await, "{round}");
        assert_eq!((server.count(".narinfo"), server.count("nix-cache-info")), (2, 1), "{round}");
        rig = rig.again();
    }
    // Whoever has other passwords is another one.
    assert!(is_offered(&rig, &server, &[("netrc-file", "/absent")], &there).await);
    assert_eq!((server.count(".narinfo"), server.count("nix-cache-info")), (3, 2));
    // What was said is not less checked than what is said.
    let (outcome, told) = rig.fetch(&[&server.url()], &[("trusted-public-keys", "")], &there).await;
    assert_eq!(outcome, Outcome::Unavailable);
    assert!(told.lines().contains("not signed by any of the keys"), "{}", told.lines());
    assert_eq!(rig.fetch(&[&server.url()], &[], &there).await.0, Outcome::Substituted);
    assert_eq!(server.count(".narinfo"), 3);
}

/// As `--refresh` has it, which stock's clients send as settings.
#[tokio::test(flavor = "multi_thread")]
async fn no_answer_is_older_than_wanted() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let (there, absent) = (cache.add("there", b"x", &[]), cache.entry("absent", b"x", &[]));
    let server = Server::new(cache.path());
    for rig in [rig.again(), Rig::new()] {
        for _ in 0..2 {
            assert!(is_offered(&rig, &server, &[], &there).await);
            assert!(!is_offered(&rig, &server, &[], &absent).await);
        }
        let before = server.count(".narinfo");
        let refresh = [("narinfo-cache-positive-ttl", "0"), ("narinfo-cache-negative-ttl", "0")];
        assert!(is_offered(&rig, &server, &refresh, &there).await);
        assert_eq!(server.count(".narinfo"), before + 1);
        assert!(!is_offered(&rig, &server, &refresh, &absent).await);
        assert_eq!(server.count(".narinfo"), before + 2);
        // A positive answer lives for as long as it is wanted to.
        let second = [("narinfo-cache-positive-ttl", "1")];
        let start = Instant::now();
        assert!(is_offered(&rig, &server, &second, &there).await);
        let at_once = server.count(".narinfo");
        assert!(at_once == before + 2 || start.elapsed() > Duration::from_millis(500));
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        assert!(is_offered(&rig, &server, &second, &there).await);
        assert_eq!(server.count(".narinfo"), at_once + 1);
        // And so does what a cache says of itself.
        let before = server.count("nix-cache-info");
        assert!(is_offered(&rig, &server, &[("narinfo-cache-meta-ttl", "0")], &there).await);
        assert_eq!(server.count("nix-cache-info"), before + 1);
        assert!(is_offered(&rig, &server, &[], &there).await);
        assert_eq!(server.count("nix-cache-info"), before + 1);
    }
}

/// A narinfo that has proved to be wrong is asked for again, also by the next daemon.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_wrong_is_forgotten() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", b"x", &[]);
    let file = cache.path().join(entry.narinfo.url());
    let right = std::fs::read(&file).unwrap();
    std::fs::write(&file, b"something else").unwrap();
    let server = Server::new(cache.path());
    assert_eq!(rig.fetch(&[&server.url()], &[], &entry).await.0, Outcome::Failed);
    assert_eq!(server.count(".narinfo"), 1);
    std::fs::write(&file, right).unwrap();
    let rig = rig.again();
    assert_eq!(rig.fetch(&[&server.url()], &[], &entry).await.0, Outcome::Substituted);
    assert_eq!(server.count(".narinfo"), 2);
}

/// Whoever answers is not held up by who does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_server_holds_nobody_up() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let all: Vec<Entry> = (0..3).map(|n| cache.add(&format!("path-{n}"), b"x", &[])).collect();
    let absent = cache.entry("absent", b"x", &[]);
    let (server, silent) = (Server::new(cache.path()), Server::with(cache.path(), |_, _| Some(Vec::new())));
    let (client, told) = rig.client(&[&silent.url(), &server.url()], &[("stalled-download-timeout", "5")]);
    let start = Instant::now();
    for entry in &all {
        assert_eq!(rig.get(&client, entry.path()).await, Outcome::Substituted);
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert_eq!(told.lines(), "");
    // It is waited for by who finds nothing elsewhere.
    assert_eq!(rig.get(&client, absent.path()).await, Outcome::Unavailable);
    assert!(start.elapsed() > Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(told.lines().contains("unable to download"), "{}", told.lines());
    assert_eq!(silent.count(""), 1);
}
