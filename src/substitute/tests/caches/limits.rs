//! Settings that limit what is done at once, or how fast; and when a source has had enough.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix_compat::narinfo::Compression;
use substitute::Outcome;

use crate::rig::{Cache, Entry, Rig};
use crate::server::{Server, response};

#[tokio::test(flavor = "multi_thread")]
async fn downloads_are_as_slow_as_wanted() {
    let cache = Cache::new();
    let server = Server::new(cache.path());
    let contents = b"contents".repeat(25_000);
    let mut took = Vec::new();
    // KiB per second; the file has 196 of them.
    for speed in ["0", "200"] {
        let rig = Rig::new();
        let plain = cache.entry("x", &contents, &[]);
        let mut entry = Cache::described(plain.narinfo.info, &contents, Compression::None);
        cache.publish(&mut entry);
        let start = Instant::now();
        let (outcome, told) = rig.fetch(&[&server.url()], &[("download-speed", speed)], &entry).await;
        assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
        took.push(start.elapsed());
    }
    assert!(took[1] >= Duration::from_millis(950), "{took:?}");
    assert!(took[1] < Duration::from_secs(10) && took[0] < took[1], "{took:?}");
}

/// How many files of paths were asked for at once, at most, with this setting.
async fn most_at_once(jobs: Option<&str>) -> usize {
    static NOW: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    MOST.store(0, Ordering::SeqCst);
    let (cache, rig) = (Cache::new(), Rig::new());
    let all: Vec<Entry> = (0..40).map(|n| cache.add(&format!("path-{n}"), b"x", &[])).collect();
    let top = cache.add("top", b"top", &all.iter().collect::<Vec<_>>());
    let server = Server::with(cache.path(), |path, _| {
        if path.contains(".nar.") {
            MOST.fetch_max(NOW.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(100));
            NOW.fetch_sub(1, Ordering::SeqCst);
        }
        None
    });
    let extra: Vec<_> = jobs.map(|jobs| ("max-substitution-jobs", jobs)).into_iter().collect();
    let (outcome, told) = rig.fetch(&[&server.url()], &extra, &top).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    MOST.load(Ordering::SeqCst)
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_jobs_as_wanted() {
    assert_eq!(most_at_once(Some("1")).await, 1);
    let three = most_at_once(Some("3")).await;
    assert!((2..=3).contains(&three), "{three}");
    // Nobody has said anything.
    let usual = most_at_once(None).await;
    assert!(usual > 3, "{usual}");
}

/// A cache whose narinfos come, and whose files do not.
#[tokio::test(flavor = "multi_thread")]
async fn downloads_that_fail_count_for_the_breaker() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let all: Vec<Entry> = (0..4).map(|n| cache.add(&format!("path-{n}"), b"x", &[])).collect();
    static BUSY: AtomicBool = AtomicBool::new(true);
    let server = Server::with(cache.path(), |path, _| {
        let busy = path.contains(".nar.") && BUSY.load(Ordering::SeqCst);
        busy.then(|| response("503 Service Unavailable", "", b"busy"))
    });
    let once = [("download-attempts", "1")];
    let (client, told) = rig.client(&[&server.url()], &once);
    assert_eq!(rig.get(&client, all[0].path()).await, Outcome::Failed);
    assert!(told.lines().contains("HTTP error 503"), "{}", told.lines());
    assert_eq!(server.count(".nar.zstd"), 1);
    // It is left alone now, whatever it is asked for, and others are not held up by it.
    let (outcome, told) = rig.fetch(&[&server.url()], &once, &all[1]).await;
    assert_eq!(outcome, Outcome::Unavailable);
    assert!(told.lines().contains("is disabled"), "{}", told.lines());
    let second = format!("{}?priority=90", cache.url());
    assert_eq!(rig.fetch(&[&server.url(), &second], &once, &all[2]).await.0, Outcome::Substituted);
    assert_eq!((server.count(".nar.zstd"), server.count(".narinfo")), (1, 1));
}

/// One file that cannot be had is no reason to leave its source alone, if that gives others meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_single_file_in_trouble_is_not_its_source() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let all: Vec<Entry> = (0..3).map(|n| cache.add(&format!("path-{n}"), b"x", &[])).collect();
    let top = cache.add("top", b"top", &all.iter().collect::<Vec<_>>());
    let broken = all[0].narinfo.url().to_owned();
    let server = Server::with(cache.path(), move |path, _| {
        if !path.ends_with(&broken) {
            return None;
        }
        std::thread::sleep(Duration::from_millis(500));
        Some(response("503 Service Unavailable", "", b"busy"))
    });
    let once = [("download-attempts", "1")];
    assert_eq!(rig.fetch(&[&server.url()], &once, &top).await.0, Outcome::Failed);
    let (outcome, told) = rig.fetch(&[&server.url()], &once, &all[1]).await;
    assert_eq!(outcome, Outcome::AlreadyValid, "{}", told.lines());
    let other = cache.add("other", b"x", &[]);
    let (outcome, told) = rig.fetch(&[&server.url()], &once, &other).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
}
