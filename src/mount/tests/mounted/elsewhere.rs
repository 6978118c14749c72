//! Contents that are not here yet.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use castore::{Digest, Node};

use crate::fixture::{Mounted, mounted, noise};

/// More than there are threads that serve.
const READERS: usize = 24;

fn add(store: &Mounted, name: &str, contents: &[u8]) -> (std::path::PathBuf, Digest) {
    let node = store.view.file(contents);
    let Node::File { digest, .. } = node else { panic!("a file") };
    store.view.send_away(digest);
    (store.path(store.view.add(name, node)), digest)
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn who_waits_for_contents_keeps_nobody_else_from_reading() {
    let Some(store) = mounted() else { return };
    let here = store.path(store.view.add("here", store.view.file("here")));
    let files: Vec<_> =
        (0..READERS).map(|n| add(&store, &format!("away-{n}"), &noise(200_000, n as u64 + 1))).collect();
    thread::scope(|scope| {
        let readers: Vec<_> = files.iter().map(|(path, _)| scope.spawn(move || fs::read(path).unwrap())).collect();
        until("all ask", || files.iter().all(|(_, digest)| store.view.waiting(digest) > 0));
        assert_eq!(fs::read(&here).unwrap(), b"here");
        assert!(readers.iter().all(|reader| !reader.is_finished()));
        for (_, digest) in files.iter().rev() {
            store.view.arrive(digest);
        }
        for (n, reader) in readers.into_iter().enumerate() {
            assert!(reader.join().unwrap() == noise(200_000, n as u64 + 1), "file {n}");
        }
    });
}

#[test]
fn contents_that_cannot_be_had_are_an_error_until_they_can() {
    let Some(store) = mounted() else { return };
    let (path, digest) = add(&store, "away", b"contents");
    thread::scope(|scope| {
        for _ in 0..2 {
            let reader = scope.spawn(|| fs::read(&path));
            until("it asks", || store.view.waiting(&digest) > 0);
            store.view.fail(&digest);
            // The kernel may ask once more for what it read ahead in vain.
            until("it ends", || {
                store.view.fail(&digest);
                reader.is_finished()
            });
            assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(5));
        }
        let reader = scope.spawn(|| fs::read(&path).unwrap());
        until("it asks", || store.view.waiting(&digest) > 0);
        store.view.arrive(&digest);
        assert_eq!(reader.join().unwrap(), b"contents");
    });
}
