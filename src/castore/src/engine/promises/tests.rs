use std::io::Read;
use std::sync::Weak;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::*;
use crate::engine::Options;
use crate::services::contract::noise;
use crate::{BlobService, Directory, NodeName};

const PATIENCE: Duration = Duration::from_secs(10);

/// A tree of which the contents of `there` are not here.
fn tree(engine: &Engine, here: &[u8], there: &[&[u8]]) -> Node {
    let mut session = engine.session();
    let node = |digest, bytes: &[u8]| Node::File { digest, size: bytes.len() as u64, executable: false };
    let name = |n: usize| NodeName::try_from(format!("{n:02}").as_str()).unwrap();
    let mut entries = vec![(name(0), node(session.put_blob_bytes(here).unwrap(), here))];
    entries.extend(there.iter().enumerate().map(|(n, bytes)| (name(n + 1), node(Digest::of(bytes), bytes))));
    let directory = Directory::new(entries).unwrap();
    let digest = session.put_directory(&directory).unwrap();
    session.flush().unwrap();
    Node::Directory { digest, size: directory.size() }
}

fn open(dir: &TempDir) -> Arc<Engine> {
    Engine::open(dir.path(), Options::default()).unwrap()
}

fn collect(engine: &Arc<Engine>, roots: &[&Node]) {
    let mut garbage = engine.begin_collection(PATIENCE).unwrap();
    roots.iter().for_each(|root| garbage.mark(root).unwrap());
    garbage.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
}

/// Has contents, and counts how often it was asked.
struct Source {
    engine: Weak<Engine>,
    contents: Vec<u8>,
    asked: AtomicUsize,
}

impl Source {
    fn of(engine: &Arc<Engine>, contents: &[u8]) -> Arc<Source> {
        let contents = contents.to_vec();
        let source = Arc::new(Source { engine: Arc::downgrade(engine), contents, asked: AtomicUsize::new(0) });
        engine.set_filler(source.clone());
        source
    }
}

impl Filler for Source {
    fn fill(&self, digest: Digest, _: Promise, then: Then) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let (engine, contents) = (self.engine.upgrade().unwrap(), self.contents.clone());
        std::thread::spawn(move || {
            if Digest::of(&contents) != digest {
                return then(Err(Error::NotFilled { digest, reason: "no source has it".into() }));
            }
            engine.put(&mut &contents[..]).unwrap();
            then(engine.promise_kept(&[digest]));
        });
    }
}

#[test]
fn what_is_promised_is_no_object_and_survives() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir);
    let (small, large) = (b"small".to_vec(), noise(1, 300_000));
    let root = tree(&engine, b"here", &[&small, &large, &small]);
    assert!(matches!(engine.hold(&root), Err(Error::BlobNotFound(_))), "nobody may register it for whole");
    let (hold, elsewhere) = engine.promise(&root, b"note").unwrap();
    assert_eq!(elsewhere, Elsewhere { blobs: 2, bytes: 300_005 });
    drop(hold);
    let digest = Digest::of(&small);
    assert_eq!(engine.stat(&digest).unwrap(), None);
    engine.sync().unwrap();
    drop(engine);

    let engine = open(&dir);
    let promise = Promise { size: 5, note: Bytes::from_static(b"note") };
    assert_eq!(engine.promised(&digest).unwrap(), Some(promise));
    assert_eq!(engine.all_elsewhere().unwrap(), elsewhere);
    let mut order = Vec::new();
    engine
        .elsewhere(&root, &mut |digest, _| {
            order.push(digest);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(order, [digest, Digest::of(&large)]);
    assert!(matches!(engine.read_here(&digest, 0, 5), Err(Error::Elsewhere(_))));
    assert!(matches!(engine.read_at(&digest, 0, 5), Err(Error::Elsewhere(_))), "nobody fetches");
    assert!(matches!(engine.read_at(&Digest::of(b"never"), 0, 5), Err(Error::BlobNotFound(_))));
    let checked = engine.objects().check(&|_| ControlFlow::Continue(())).unwrap();
    assert!(checked.damaged.is_empty() && checked.miscounted.is_empty(), "{checked:?}");

    // Who adds the same stores it.
    assert_eq!(BlobService::put(&*engine, &mut &large[..]).unwrap().0, Digest::of(&large));
    assert_eq!(engine.read_at(&Digest::of(&large), 299_990, 100).unwrap(), large[299_990..]);
    assert_eq!(engine.all_elsewhere().unwrap(), Elsewhere { blobs: 1, bytes: 5 });
}

#[test]
fn a_collection_keeps_promises_of_what_is_alive() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir);
    let alive = tree(&engine, b"1", &[b"alive", b"came"]);
    let dead = tree(&engine, b"2", &[b"dead"]);
    let rows = |engine: &Engine| {
        let mut rows = 0;
        let mut count = |_, _| -> Result<(), Error> {
            rows += 1;
            Ok(())
        };
        engine.objects.core.each_promised(&mut count).unwrap();
        rows
    };
    drop((engine.promise(&alive, b"").unwrap(), engine.promise(&dead, b"").unwrap()));
    BlobService::put(&*engine, &mut &b"came"[..]).unwrap();
    assert_eq!(rows(&engine), 3);
    collect(&engine, &[&alive]);
    assert_eq!(rows(&engine), 1);
    assert!(engine.promised(&Digest::of(b"alive")).unwrap().is_some());
    assert_eq!(engine.read_at(&Digest::of(b"came"), 0, 9).unwrap(), "came");

    // Of what is promised while a collection runs it knows nothing.
    let late = tree(&engine, b"3", &[b"late"]);
    let mut garbage = engine.begin_collection(PATIENCE).unwrap();
    garbage.mark(&alive).unwrap();
    let (hold, _) = engine.promise(&late, b"").unwrap();
    garbage.sweep(&mut |_| ControlFlow::Continue(())).unwrap();
    drop(hold);
    assert!(engine.promised(&Digest::of(b"late")).unwrap().is_some());
    collect(&engine, &[]);
    assert_eq!(rows(&engine), 0);
}

#[test]
fn readers_wait_for_what_was_promised() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir);
    let contents = noise(7, 200_000);
    let root = tree(&engine, b"here", &[&contents, b"nobody has this"]);
    drop(engine.promise(&root, b"").unwrap());
    // One who asks before there is anybody to fetch.
    let (done, early) = crossbeam_channel::bounded(1);
    let digest = Digest::of(&contents);
    engine.bring(&digest, Box::new(move |result| done.send(result.is_ok()).unwrap()));
    assert!(early.try_recv().is_err());
    let source = Source::of(&engine, &contents);
    assert!(early.recv_timeout(PATIENCE).unwrap());
    assert_eq!(engine.read_here(&digest, 0, 200_000).unwrap(), contents);

    let error = engine.read_at(&Digest::of(b"nobody has this"), 0, 1).unwrap_err();
    assert!(matches!(error, Error::NotFilled { .. }), "{error}");
    let mut all = Vec::new();
    let piece = engine.read_at(&digest, 10, 200_000).unwrap();
    (&piece[..]).read_to_end(&mut all).unwrap();
    assert_eq!(all, contents[10..]);
    assert_eq!(source.asked.load(Ordering::SeqCst), 2, "what is here is asked for no more");
    // Once more: it might be there by now.
    assert!(engine.read_at(&Digest::of(b"nobody has this"), 0, 1).is_err());
    assert_eq!(source.asked.load(Ordering::SeqCst), 3);
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(&dir);
    let root = tree(&engine, b"here", &[b"x"]);
    let Node::Directory { digest, size } = root else { panic!("a directory") };
    let larger = Node::Directory { digest, size: size + 1 };
    assert!(matches!(engine.promise(&larger, b""), Err(Error::ChildSize { .. })));
    let other = Node::File { digest: Digest::of(b"here"), size: 5, executable: false };
    assert!(matches!(engine.promise(&other, b""), Err(Error::BlobSize { .. })));
    assert!(matches!(engine.promise(&root, &[0; MAX_NOTE + 1]), Err(Error::LongNote { .. })));
    assert_eq!(engine.all_elsewhere().unwrap(), Elsewhere::default());
}
