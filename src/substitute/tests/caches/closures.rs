//! Closures, and many who want the same.

use std::sync::Arc;
use std::time::Duration;

use substitute::Outcome;

use crate::rig::{Cache, Entry, Rig};
use crate::server::Server;

/// A tree of paths; the first is the one that refers to all others.
fn tree(cache: &Cache, count: usize) -> Vec<Entry> {
    let mut made: Vec<Entry> = Vec::new();
    for n in 0..count {
        let references: Vec<&Entry> = [n / 2, n / 3, n.saturating_sub(1)].iter().filter_map(|m| made.get(*m)).collect();
        let entry = cache.add(&format!("path-{n}"), format!("contents {n}").as_bytes(), &references);
        made.push(entry);
    }
    made.reverse();
    made
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_comes_whole() {
    let cache = Cache::new();
    let all = tree(&cache, 60);
    let server = Server::new(cache.path());
    for url in [cache.url(), server.url()] {
        let rig = Rig::new();
        let (outcome, told) = rig.fetch(&[&url], &[], &all[0]).await;
        assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
        assert!(all.iter().all(|entry| rig.has(entry)));
        assert_eq!(told.copied.lock().unwrap().len(), 60);
        assert_eq!(told.expected.lock().unwrap().0, 60);
        assert_eq!(rig.store.path_info(all[0].path()).unwrap().unwrap().signatures.len(), 1);
    }
    assert_eq!((server.count(".narinfo"), server.count(".nar.zstd"), server.count("nix-cache-info")), (60, 60, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_many_want_at_once_is_fetched_once() {
    let cache = Cache::new();
    let all = tree(&cache, 12);
    let server = Server::with(cache.path(), |path, _| {
        if path.contains(".nar.") {
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    });
    let rig = Arc::new(Rig::new());
    let clients = (0..8).map(|n| {
        let (rig, url, path) = (rig.clone(), server.url(), all[n % 3].path().clone());
        tokio::spawn(async move {
            let (client, told) = rig.client(&[&url], &[]);
            let outcome = rig.get(&client, &path).await;
            assert!(outcome.is_valid(), "{}", told.lines());
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    assert!(all.iter().all(|entry| rig.has(entry)));
    assert_eq!((server.count(".narinfo"), server.count(".nar.zstd")), (12, 12));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closure_with_a_gap_is_no_closure() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let gap = cache.entry("gap", b"not published", &[]);
    let inner = cache.add("inner", b"inner", &[&gap]);
    let outer = cache.add("outer", b"outer", &[&inner]);
    let (outcome, told) = rig.fetch(&[&cache.url()], &[], &outer).await;
    assert_eq!(outcome, Outcome::Unavailable);
    assert!(told.lines().contains("-gap', to which"), "{}", told.lines());
    assert!(!rig.has(&inner));
    // Another source fills it.
    let other = Cache::new();
    other.add("gap", b"not published", &[]);
    assert_eq!(rig.fetch(&[&cache.url(), &other.url()], &[], &outer).await.0, Outcome::Substituted);
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_refer_to_each_other_are_refused() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let two = cache.entry("two", b"two", &[]);
    let one = cache.add("one", b"one", &[&two]);
    let two = cache.add("two", b"two", &[&one]);
    assert_eq!(rig.fetch(&[&cache.url()], &[], &two).await.0, Outcome::Unavailable);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_goes_away_stops_what_only_it_wanted() {
    let cache = Cache::new();
    let entry = cache.add("slow", b"slow", &[]);
    let server = Server::with(cache.path(), |path, _| path.contains(".nar.").then(Vec::new));
    let rig = Rig::new();
    let (client, _) = rig.client(&[&server.url()], &[("stalled-download-timeout", "1")]);
    let waited = tokio::time::timeout(Duration::from_millis(300), rig.get(&client, entry.path())).await;
    assert!(waited.is_err());
    // Nobody is in the way of the next.
    let (outcome, told) = rig.fetch(&[&cache.url()], &[], &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
}
