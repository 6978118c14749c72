//! Servers that are dead, slow, or break off.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use substitute::{Outcome, Substituter, Wanted};

use crate::rig::{Cache, Rig};
use crate::server::{Server, response};

/// The URL of a port at which nobody listens.
fn dead() -> String {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    format!("http://127.0.0.1:{port}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_server_costs_a_warning() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let one = cache.add("one", b"one", &[]);
    let two = cache.add("two", b"two", &[&one]);
    let dead = dead();
    let start = Instant::now();
    let (outcome, told) = rig.fetch(&[&dead, &cache.url()], &[], &one).await;
    assert_eq!(outcome, Outcome::Substituted);
    assert_eq!(told.lines().matches("unable to download").count(), 1, "{}", told.lines());
    let (outcome, told) = rig.fetch(&[&dead, &cache.url()], &[], &two).await;
    assert_eq!(outcome, Outcome::Substituted);
    assert_eq!(told.lines(), format!("warning: substituter '{dead}' is disabled"));
    // Alone it has nothing, which is no failure.
    let absent = cache.entry("absent", b"x", &[]);
    assert_eq!(rig.fetch(&[&dead], &[], &absent).await.0, Outcome::Unavailable);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_server_costs_one_timeout() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let all: Vec<_> = (0..10).map(|n| cache.add(&format!("path-{n}"), b"x", &[])).collect();
    let silent = Server::with(cache.path(), |_, _| Some(Vec::new()));
    let extra = [("stalled-download-timeout", "1"), ("download-attempts", "1")];
    let start = Instant::now();
    for entry in &all {
        assert_eq!(rig.fetch(&[&silent.url(), &cache.url()], &extra, entry).await.0, Outcome::Substituted);
    }
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(silent.count(""), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_there_is_remembered() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.entry("x", b"x", &[]);
    let server = Server::new(cache.path());
    for _ in 0..3 {
        assert_eq!(rig.fetch(&[&server.url()], &[], &entry).await.0, Outcome::Unavailable);
    }
    assert_eq!(server.count(".narinfo"), 1);
    // Unless somebody does not want that.
    cache.add("x", b"x", &[]);
    let fresh = [("narinfo-cache-negative-ttl", "0")];
    assert_eq!(rig.fetch(&[&server.url()], &fresh, &entry).await.0, Outcome::Substituted);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_for_itself_is_looked_for_again() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.entry("x", b"x", &[]);
    let server = Server::new(cache.path());
    let (client, _) = rig.client(&[&server.url()], &[]);
    let ask = |wanted: Wanted| rig.substituters.substitute(&client, wanted);
    let explicitly = || Wanted::explicitly(entry.path().clone());
    for _ in 0..2 {
        assert_eq!(ask(explicitly()).await, Outcome::Unavailable);
    }
    // Not twice in a moment: clients ask what would be fetched first.
    assert_eq!(server.count(".narinfo"), 1);
    cache.add("x", b"x", &[]);
    tokio::time::sleep(Duration::from_millis(3_100)).await;
    assert_eq!(ask(entry.path().clone().into()).await, Outcome::Unavailable);
    assert_eq!(ask(explicitly()).await, Outcome::Substituted);
    assert_eq!(server.count(".narinfo"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_cache_is_told() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", b"x", &[]);
    std::fs::remove_file(cache.path().join("nix-cache-info")).unwrap();
    let server = Server::new(cache.path());
    let (outcome, told) = rig.fetch(&[&server.url(), "gopher://x"], &[], &entry).await;
    assert_eq!(outcome, Outcome::Unavailable);
    assert!(told.lines().contains("does not appear to be a binary cache"), "{}", told.lines());
    assert!(told.lines().contains("don't know how to open Nix store 'gopher://x'"), "{}", told.lines());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_goes_on_where_it_broke() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let mut state = 1_u64;
    let contents: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(400_000)
    .collect();
    let entry = cache.add("x", &contents, &[]);
    let file = std::fs::read(cache.path().join(entry.narinfo.url())).unwrap();
    let ranges: &'static Mutex<Vec<String>> = Box::leak(Box::default());
    let server = Server::with(cache.path(), move |path, head| {
        if !path.contains(".nar.") {
            return None;
        }
        let range = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("range: ").map(str::to_owned));
        let from = range.as_deref().map_or(0, |range| range[6..range.len() - 1].parse().unwrap());
        ranges.lock().unwrap().extend(range);
        // At most a third at a time.
        let (rest, part) = (file.len() - from, (file.len() / 3).min(file.len() - from));
        let status = if from == 0 { "200 OK".to_owned() } else { "206 Partial Content".to_owned() };
        let content_range = format!("Content-Range: bytes {from}-{}/{}\r\n", file.len() - 1, file.len());
        let head = format!(
            "HTTP/1.1 {status}\r\nConnection: close\r\nAccept-Ranges: bytes\r\nContent-Length: {rest}\r\n{content_range}\r\n"
        );
        Some([head.as_bytes(), &file[from..from + part]].concat())
    });
    let (outcome, told) = rig.fetch(&[&server.url()], &[], &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert!(rig.has(&entry));
    assert!(ranges.lock().unwrap().len() >= 2, "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_without_ranges_is_the_next_sources() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", &b"contents".repeat(10_000), &[]);
    let server = Server::with(cache.path(), |path, _| {
        path.contains(".nar.")
            .then(|| b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1000\r\n\r\nhalf".to_vec())
    });
    let (outcome, told) = rig.fetch(&[&server.url()], &[], &entry).await;
    assert_eq!(outcome, Outcome::Failed);
    assert!(told.lines().contains("unable to download"), "{}", told.lines());
    let second = format!("{}?priority=90", cache.url());
    assert_eq!(rig.fetch(&[&server.url(), &second], &[], &entry).await.0, Outcome::Substituted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_busy_is_asked_again() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", b"x", &[]);
    let busy: &'static Mutex<usize> = Box::leak(Box::default());
    let server = Server::with(cache.path(), |path, _| {
        let mut busy = busy.lock().unwrap();
        *busy += 1;
        // Every other time.
        (path != "/nix-cache-info" && busy.is_multiple_of(2)).then(|| response("503 Service Unavailable", "", b"busy"))
    });
    let (outcome, told) = rig.fetch(&[&server.url()], &[], &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
}

#[test]
fn a_silent_server_does_not_hold_up_the_end() {
    let cache = Cache::new();
    let entry = cache.add("x", b"x", &[]);
    for silent in [".narinfo", ".nar.zstd"] {
        let server = Server::with(cache.path(), move |path, _| path.ends_with(silent).then(Vec::new));
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let (url, path) = (server.url(), entry.path().clone());
        runtime.spawn(async move {
            let rig = Rig::new();
            let (client, _) = rig.client(&[&url], &[("stalled-download-timeout", "60")]);
            rig.get(&client, &path).await
        });
        let start = Instant::now();
        while server.count(silent) == 0 {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(runtime);
        assert!(start.elapsed() < Duration::from_secs(12), "{silent}: {:?}", start.elapsed());
    }
}
