//! A server between a good cache and its clients that does all that servers and wires do. What becomes valid is what was
//! signed, whatever happens on the way.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use substitute::Outcome;

use crate::rig::{Cache, Entry, Rig};
use crate::server::{Server, response};

fn counter() -> &'static Mutex<usize> {
    Box::leak(Box::default())
}

/// Counts; whether it is the first time.
fn first(counter: &Mutex<usize>) -> bool {
    let mut count = counter.lock().unwrap();
    *count += 1;
    *count == 1
}

fn is_nar(path: &str) -> bool {
    path.contains(".nar.")
}

/// What is registered is what was signed.
fn is_as_signed(rig: &Rig, entry: &Entry) {
    assert!(rig.has(entry));
    let info = rig.store.path_info(entry.path()).unwrap().unwrap();
    assert_eq!((info.nar_hash, info.nar_size), (entry.narinfo.info.nar_hash, entry.narinfo.info.nar_size));
    assert_eq!(info.references, entry.narinfo.info.references);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_says_when_to_come_again() {
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        let (cache, rig) = (Cache::new(), Rig::new());
        let entry = cache.add("x", b"x", &[]);
        let (narinfos, nars) = (counter(), counter());
        let server = Server::with(cache.path(), move |path, _| {
            let busy = match path {
                _ if path.ends_with(".narinfo") => first(narinfos),
                _ if is_nar(path) => first(nars),
                _ => false,
            };
            busy.then(|| response(status, "Retry-After: 1\r\n", b"later"))
        });
        let start = Instant::now();
        let (outcome, told) = rig.fetch(&[&server.url()], &[], &entry).await;
        assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
        // A second each; without their wish it were a quarter, or three eighths at most.
        assert!(start.elapsed() >= Duration::from_secs(2), "{:?}", start.elapsed());
        assert_eq!((*narinfos.lock().unwrap(), *nars.lock().unwrap()), (2, 2));
        is_as_signed(&rig, &entry);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_always_wants_more_time_is_left_alone() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", b"x", &[]);
    let server = Server::with(cache.path(), |path, _| {
        path.ends_with(".narinfo").then(|| response("429 Too Many Requests", "Retry-After: 1\r\n", b"later"))
    });
    let second = format!("{}?priority=90", cache.url());
    let extra = [("download-attempts", "2")];
    let (outcome, told) = rig.fetch(&[&server.url(), &second], &extra, &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert!(told.lines().contains("HTTP error 429"), "{}", told.lines());
    let other = cache.add("other", b"other", &[]);
    let (outcome, told) = rig.fetch(&[&server.url(), &second], &extra, &other).await;
    assert_eq!(outcome, Outcome::Substituted);
    assert_eq!(told.lines(), format!("warning: substituter '{}' is disabled", server.url()));
}

#[tokio::test(flavor = "multi_thread")]
async fn redirections_are_followed_but_not_everywhere() {
    let cache = Cache::new();
    let entry = cache.add("x", b"x", &[]);
    let good = Server::new(cache.path());
    let redirect = |to: &str| response("302 Found", &format!("Location: {to}\r\n"), b"");
    let target = good.url();
    let away = Server::with(cache.path(), move |path, _| Some(redirect(&format!("{target}{path}"))));
    let rig = Rig::new();
    let (outcome, told) = rig.fetch(&[&away.url()], &[], &entry).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    is_as_signed(&rig, &entry);
    assert_eq!(good.count(".narinfo"), 1);

    let file = format!("file://{}", cache.path().join(entry.narinfo.url()).display());
    for (place, says) in [("/again", "more than 10 redirections"), (file.as_str(), "Protocol \"file\" not supported")] {
        let place = place.to_owned();
        let server =
            Server::with(cache.path(), move |path, _| (is_nar(path) || path == "/again").then(|| redirect(&place)));
        let rig = Rig::new();
        let (outcome, told) = rig.fetch(&[&server.url()], &[], &entry).await;
        assert_eq!(outcome, Outcome::Failed);
        assert!(told.lines().contains(says), "{}", told.lines());
        let second = format!("{}?priority=90", cache.url());
        assert_eq!(rig.fetch(&[&server.url(), &second], &[], &entry).await.0, Outcome::Substituted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_missing_at_first_is_found_when_it_is_wanted_again() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", b"x", &[]);
    let nars = counter();
    let server = Server::with(cache.path(), move |path, _| {
        (is_nar(path) && first(nars)).then(|| response("404 Not Found", "", b"not yet"))
    });
    let (outcome, told) = rig.fetch(&[&server.url()], &[], &entry).await;
    assert_eq!(outcome, Outcome::Failed);
    assert!(told.lines().contains("HTTP error 404"), "{}", told.lines());
    assert_eq!(rig.fetch(&[&server.url()], &[], &entry).await.0, Outcome::Substituted);
    // What was said of it had proved to be wrong, so it was asked for again.
    assert_eq!(server.count(".narinfo"), 2);
    is_as_signed(&rig, &entry);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_stands_still_is_another_sources() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let entry = cache.add("x", &b"contents".repeat(1000), &[]);
    // Half of the head, or half of the body.
    for half in ["HTTP/1.1 200 OK\r\nContent-", "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf"] {
        let server = Server::stalling(cache.path(), move |path, _| is_nar(path).then(|| half.as_bytes().to_vec()));
        let extra = [("stalled-download-timeout", "1"), ("download-attempts", "1")];
        let start = Instant::now();
        let (outcome, told) = rig.fetch(&[&server.url()], &extra, &entry).await;
        assert_eq!(outcome, Outcome::Failed, "{}", told.lines());
        let rig = Rig::new();
        let second = format!("{}?priority=90", cache.url());
        let (outcome, told) = rig.fetch(&[&server.url(), &second], &extra, &entry).await;
        assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
        is_as_signed(&rig, &entry);
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_while_a_closure_is_asked_for_is_told_once() {
    let (cache, rig) = (Cache::new(), Rig::new());
    let parts: Vec<Entry> = (0..40).map(|n| cache.add(&format!("part-{n}"), b"x", &[])).collect();
    let whole = cache.add("whole", b"whole", &parts.iter().collect::<Vec<_>>());
    let narinfos = counter();
    let server = Server::with(cache.path(), move |path, _| {
        // After the first, nobody gets an answer.
        (path.ends_with(".narinfo") && !first(narinfos)).then(Vec::new)
    });
    let second = format!("{}?priority=90", cache.url());
    let extra = [("stalled-download-timeout", "1"), ("http-connections", "10")];
    let start = Instant::now();
    let (outcome, told) = rig.fetch(&[&server.url(), &second], &extra, &whole).await;
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    let lines = told.lines();
    let of_it = lines.lines().filter(|line| line.contains(&server.url()));
    assert_eq!(of_it.count(), 1, "{lines}");
}

/// Every third byte of what describes a path, and every byte of its file, one at a time.
#[tokio::test(flavor = "multi_thread")]
async fn any_byte_may_be_another() {
    let cache = Cache::new();
    let part = cache.add("part", b"part", &[]);
    let entry = cache.add("whole", b"some contents", &[&part]);
    let narinfo = cache.path().join(format!("{}.narinfo", entry.path().hash_part()));
    let (mut became_valid, mut refused) = (0, 0);
    for (file, step) in [(narinfo, 3), (cache.path().join(entry.narinfo.url()), 1)] {
        let right = std::fs::read(&file).unwrap();
        let mut rig = Rig::new();
        for at in (0..right.len()).step_by(step) {
            let mut wrong = right.clone();
            wrong[at] ^= 1;
            std::fs::write(&file, &wrong).unwrap();
            // Fails by itself when the outcome does not tell what is valid.
            let (outcome, _) = rig.fetch(&[&cache.url()], &[], &entry).await;
            if outcome.is_valid() {
                is_as_signed(&rig, &entry);
                rig = Rig::new();
                became_valid += 1;
            } else {
                refused += 1;
            }
        }
        std::fs::write(&file, &right).unwrap();
    }
    // Names of unknown fields, say, may be anything.
    assert!(refused > 50 && refused > became_valid, "{refused} refused, {became_valid} valid");
    assert_eq!(Rig::new().fetch(&[&cache.url()], &[], &entry).await.0, Outcome::Substituted);
}
