//! Paths of a lazy castore: valid before their contents are here.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use castore::contract::noise;
use castore::engine::Elsewhere;
use castore::{BlobService as _, Digest};
use store::fsck::Watch;
use store::{Config, Store};
use substitute::Outcome;

use crate::proxy::Proxy;
use crate::rig::{Node, Rig, Source, directory, file};
use crate::tree;

/// Nobody is told.
struct Silent;

impl Watch for Silent {
    fn stage(&self, _: store::fsck::Stage, _: u64) {}
    fn advance(&self, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

fn lazily(url: &str) -> String {
    format!("{url}?lazy=true")
}

fn address(source: &Source) -> &str {
    source.server.uri.strip_prefix("http://").unwrap()
}

/// Waits for what goes on in the background.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_whole(rig: &Rig) -> bool {
    rig.store.elsewhere().unwrap() == Elsewhere::default() && rig.store.lazy_paths().unwrap().is_empty()
}

#[test]
fn a_path_is_valid_without_its_contents_and_they_come_when_it_is_read() {
    let source = Source::tcp();
    let inner = source.add("inner", &tree(20), &[]);
    let outer = source.add("outer", &tree(21), &[&inner]);
    let rig = Rig::new();
    let (outcome, told) = rig.fetch(&lazily(&source.url()), &[], &outer);
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert!(source.watched.read.lock().is_empty(), "no contents were asked for");
    assert!(rig.store.is_valid(&inner).unwrap());
    let elsewhere = rig.store.elsewhere().unwrap();
    assert!(elsewhere.bytes > 2 * 5_700_000 && elsewhere.blobs > 200, "{elsewhere:?}");

    // To check it is no reason to fetch it, and that it is not here no damage.
    assert_eq!(rig.store.verify_path(&outer, true).unwrap(), None);
    let report = rig.store.fsck(false, &Silent).unwrap();
    assert!(report.is_sound(), "{:?}", report.problems().collect::<Vec<_>>());
    assert!(source.watched.read.lock().is_empty());

    // One file: the rest of its path follows, and nothing of the other.
    let tool = Digest::of(&noise(21, 700_000));
    assert_eq!(rig.store.engine().read_at(&tool, 699_990, 100).unwrap(), noise(21, 700_000)[699_990..]);
    until("the path's rest comes", || rig.store.lazy_paths().unwrap().len() == 1);
    assert_eq!(rig.store.lazy_paths().unwrap()[0].path, inner);
    assert!(rig.store.engine().promised(&Digest::of(&noise(20, 700_000))).unwrap().is_some());

    source.watched.read.lock().clear();
    assert_eq!(rig.nar(&outer), source.nar(&outer));
    assert!(source.watched.read.lock().is_empty(), "it is here");
    assert_eq!(rig.nar(&inner), source.nar(&inner));
    until("all is here and settled", || is_whole(&rig));
    assert!(rig.store.quarantined().unwrap().is_empty());
}

#[test]
fn nothing_is_fetched_twice_and_what_is_here_not_at_all() {
    let source = Source::tcp();
    let rig = Rig::new();
    let first = source.add("first", &tree(30), &[]);
    assert_eq!(rig.fetch(&source.url(), &[], &first).0, Outcome::Substituted);
    source.watched.read.lock().clear();
    // All of it is here: it is compared with what was signed at once.
    let same = source.add("same", &tree(30), &[]);
    assert_eq!(rig.fetch(&lazily(&source.url()), &[], &same).0, Outcome::Substituted);
    assert!(is_whole(&rig));
    assert!(source.watched.read.lock().is_empty());

    let other = source.add("other", &tree(31), &[]);
    assert_eq!(rig.fetch(&lazily(&source.url()), &[], &other).0, Outcome::Substituted);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(rig.nar(&other), source.nar(&other)));
        }
        scope.spawn(|| rig.lazy.fetch_path(&other, &|_, _| ControlFlow::Continue(())).unwrap());
    });
    until("all is here and settled", || is_whole(&rig));
    let read = source.watched.read.lock().clone();
    assert!(read.values().all(|times| *times == 1), "{read:?}");
}

#[test]
fn what_cannot_be_had_is_an_error_until_the_source_is_back() {
    let source = Source::tcp();
    let proxy = Proxy::before(address(&source));
    let node = directory([
        ("here".to_owned(), file(noise(40, 50_000))),
        ("there".to_owned(), file(noise(41, 300_000))),
        ("too".to_owned(), file(b"too".to_vec())),
    ]);
    let rig = Rig::new();
    // One of its files is in another path.
    let known = source.add("known", &file(noise(40, 50_000)), &[]);
    assert_eq!(rig.fetch(&source.url(), &[], &known).0, Outcome::Substituted);
    let path = source.add("away", &node, &[]);
    assert_eq!(rig.fetch(&lazily(&proxy.url()), &[], &path).0, Outcome::Substituted);
    let rig = rig.reopened();
    assert_eq!(rig.store.elsewhere().unwrap(), Elsewhere { blobs: 2, bytes: 300_003 });

    proxy.break_after(0, true);
    let engine = rig.store.engine();
    let read = |bytes: &[u8]| engine.read_at(&Digest::of(bytes), 0, bytes.len());
    let begun = Instant::now();
    let error = read(&noise(41, 300_000)).unwrap_err().to_string();
    assert!(error.contains("cannot be fetched") && error.contains(&proxy.url()), "{error}");
    assert!(read(b"too").is_err());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(read(&noise(40, 50_000)).unwrap(), noise(40, 50_000));
    assert!(rig.read(&path).is_err());
    let sources = rig.lazy.sources().unwrap();
    assert_eq!((sources.len(), sources[0].paths, sources[0].url.as_str()), (1, 1, &*proxy.url()));
    assert!(sources[0].failure.is_some());
    // It is nobody's damage.
    assert_eq!(rig.store.examine_path(&path).unwrap(), None);

    proxy.heal();
    assert_eq!(read(b"too").unwrap(), b"too"[..]);
    assert_eq!(rig.nar(&path), source.nar(&path));
    until("all is here and settled", || is_whole(&rig));
}

#[test]
fn altered_contents_are_refused() {
    let source = Source::tcp();
    let rig = Rig::new();
    for (seed, size, uncut) in [(50, 1000, false), (51, 400_000, false), (52, 3_000_000, true)] {
        let contents = noise(seed, size);
        let path = source.add(&format!("altered-{size}"), &directory([("f".to_owned(), file(contents.clone()))]), &[]);
        assert_eq!(rig.fetch(&lazily(&source.url()), &[], &path).0, Outcome::Substituted);
        source.watched.lie();
        if uncut {
            source.watched.uncut();
        }
        let digest = Digest::of(&contents);
        let error = rig.store.engine().read_at(&digest, 0, 1).unwrap_err().to_string();
        assert!(error.contains("does not have the digest"), "{error}");
        assert!(rig.store.engine().promised(&digest).unwrap().is_some());
        source.watched.honest();
        assert_eq!(rig.nar(&path), source.nar(&path));
    }
}

#[test]
fn a_path_that_is_not_what_was_signed_is_withheld_when_all_is_here() {
    let source = Source::tcp();
    let tree = |text: &str| directory([("f".to_owned(), file(text.as_bytes().to_vec()))]);
    let path = source.add_with_other_tree("swapped", &tree("signed"), &tree("others"));
    let rig = Rig::new();
    assert_eq!(rig.fetch(&lazily(&source.url()), &[], &path).0, Outcome::Substituted);
    let error = rig.lazy.fetch_path(&path, &|_, _| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains("was modified!"), "{error}");
    let quarantined = rig.store.quarantined().unwrap();
    assert_eq!((quarantined.len(), quarantined[0].withheld), (1, true));
    assert!(rig.read(&path).unwrap_err().to_string().contains("quarantined"));

    // Where nothing had to come it is not even valid.
    let again = source.add_with_other_tree("again", &tree("signed"), &tree("others"));
    let (outcome, told) = rig.fetch(&lazily(&source.url()), &[], &again);
    assert_eq!(outcome, Outcome::Failed, "{}", told.lines());
    assert!(told.lines().contains("hash mismatch"), "{}", told.lines());
}

#[test]
fn a_tree_larger_than_was_said_is_not_taken_lazily() {
    let source = Source::tcp();
    let small = directory([("f".to_owned(), file(b"x".to_vec()))]);
    let path = source.add_with_other_tree("swollen", &small, &directory([("f".to_owned(), file(noise(1, 10_000)))]));
    let rig = Rig::new();
    assert_eq!(rig.fetch(&lazily(&source.url()), &[], &path).0, Outcome::Failed);
    assert_eq!(rig.store.elsewhere().unwrap(), Elsewhere::default());
}

#[test]
fn who_fetches_from_a_store_with_lazy_paths_gets_them() {
    let source = Source::tcp();
    let path = source.add("relayed", &tree(60), &[]);
    let (middle, end) = (Rig::new(), Rig::new());
    assert_eq!(middle.fetch(&lazily(&source.url()), &[], &path).0, Outcome::Substituted);
    let server = crate::common::TestServer::tcp(crate::common::services_of(&middle.store, rpc::Trust::Untrusted));
    let (outcome, told) = end.fetch(&format!("grpc+{}", server.uri), &[], &path);
    assert_eq!(outcome, Outcome::Substituted, "{}", told.lines());
    assert_eq!(end.nar(&path), source.nar(&path));
}

#[test]
fn a_lost_index_takes_no_lazy_path_along() {
    let source = Source::tcp();
    let path = source.add("kept", &tree(70), &[]);
    let rig = Rig::new();
    assert_eq!(rig.fetch(&lazily(&source.url()), &[], &path).0, Outcome::Substituted);
    let before = rig.store.elsewhere().unwrap();
    let dir = rig.closed();
    std::fs::remove_dir_all(dir.path().join("castored/index")).unwrap();
    let config = || Config::new(nix_compat::store_path::StoreDir::default(), dir.path());
    let rebuilt = Store::rebuild(config(), &|_| ControlFlow::Continue(())).unwrap();
    assert_eq!((rebuilt.paths, rebuilt.dropped.len(), rebuilt.damaged.len()), (1, 0, 0), "{rebuilt:?}");
    let rig = Rig::open(dir);
    assert_eq!(rig.store.elsewhere().unwrap(), before);
    assert_eq!(rig.nar(&path), source.nar(&path));
    until("all is here and settled", || is_whole(&rig));
}

#[test]
fn a_repair_and_what_nobody_signed_come_whole() {
    let source = Source::tcp();
    let rig = Rig::new();
    let node = || Node::File { contents: noise(80, 5000), exec: true };
    let path = source.add("repaired", &directory([("f".to_owned(), node())]), &[]);
    assert_eq!(rig.fetch(&lazily(&source.url()), &[], &path).0, Outcome::Substituted);
    let contents = rig.contents(&lazily(&source.url()), &path);
    assert!(matches!(contents, substitute::Contents::Found(_)), "{contents:?}");
    assert!(rig.store.engine().stat(&Digest::of(&noise(80, 5000))).unwrap().is_some());
    let other = noise(81, 5000);
    let path = source.add_by_contents("by-contents", &other);
    assert_eq!(rig.fetch(&lazily(&source.url()), &[], &path).0, Outcome::Substituted);
    assert!(rig.store.engine().stat(&Digest::of(&other)).unwrap().is_some());
}
