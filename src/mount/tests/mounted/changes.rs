//! Paths that come and go while programs look.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::fixture::{mounted, names, noise};

#[test]
fn a_new_path_is_there_at_once_for_whoever_looked_before() {
    let Some(store) = mounted() else { return };
    for i in 0..200 {
        let name = format!("path-{i:04}");
        // The base name depends on the name alone, so it can be looked for before it is there.
        let base = store.view.add(&name, store.view.file("old"));
        store.view.remove(&base);
        assert_eq!(fs::read(store.path(&base)).unwrap_err().kind(), ErrorKind::NotFound);
        let before = names(store.root());
        assert!(!before.contains(&base));
        assert_eq!(store.view.add(&name, store.view.file("new")), base);
        let after = names(store.root());
        assert!(after.contains(&base), "listing after adding {base}");
        assert_eq!(after.len(), before.len() + 1);
        assert_eq!(fs::read(store.path(&base)).unwrap(), b"new");
    }
}

#[test]
fn a_removed_path_is_gone_at_once() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    for i in 0..200 {
        let base = view.add(&format!("path-{i}"), view.directory([("file", view.file(i.to_string()))]));
        assert_eq!(fs::read_to_string(store.path(&base).join("file")).unwrap(), i.to_string());
        assert!(names(store.root()).contains(&base));
        view.remove(&base);
        assert_eq!(fs::symlink_metadata(store.path(&base)).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(fs::read(store.path(&base).join("file")).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(!names(store.root()).contains(&base));
    }
}

#[test]
fn a_path_that_comes_back_shows_its_new_contents() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let first = view.add("again", view.directory([("file", view.file("first"))]));
    assert_eq!(fs::read(store.path(&first).join("file")).unwrap(), b"first");
    view.remove(&first);
    let second = view.add("again", view.directory([("file", view.file("second"))]));
    assert_eq!(first, second);
    assert_eq!(fs::read(store.path(&second).join("file")).unwrap(), b"second");
}

#[test]
fn an_open_file_outlives_its_path() {
    let Some(store) = mounted() else { return };
    let base = store.view.add("open", store.view.file("still here"));
    let mut file = File::open(store.path(&base)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    store.view.remove(&base);
    // What was read stays in the kernel; anything else would be an error, never other bytes.
    std::io::Seek::rewind(&mut file).unwrap();
    let mut again = String::new();
    file.read_to_string(&mut again).unwrap();
    assert_eq!((text.as_str(), again.as_str()), ("still here", "still here"));
}

#[test]
fn what_was_not_read_of_an_open_file_before_its_path_went_is_right_or_an_error() {
    let Some(store) = mounted() else { return };
    let contents = noise(24 << 20, 11);
    let first = store.view.add("open", store.view.directory([("file", store.view.file(&contents))]));
    let file = File::open(store.path(&first).join("file")).unwrap();
    let mut piece = vec![0; 4096];
    file.read_exact_at(&mut piece, 0).unwrap();
    store.view.remove(&first);
    // Another file takes the name, which must not show up behind the old one's descriptor.
    store.view.add("open", store.view.directory([("file", store.view.file(noise(24 << 20, 12)))]));
    for offset in (0..contents.len() - piece.len()).step_by(1 << 20).rev() {
        match file.read_exact_at(&mut piece, offset as u64) {
            Ok(()) => assert!(piece == contents[offset..offset + piece.len()], "at {offset}"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::ESTALE as i32), "{error}"),
        }
    }
    assert!(fs::read(store.path(&first).join("file")).unwrap() == noise(24 << 20, 12));
}

#[test]
fn a_directory_held_open_ends_with_its_path() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let entries: Vec<_> = (0..5_000).map(|i| (format!("{i:05}"), view.file(""))).collect();
    let base = view.add("wide", view.directory(entries));
    let mut listing = fs::read_dir(store.path(&base)).unwrap();
    let first = listing.next().unwrap().unwrap().file_name();
    assert_eq!(first, "00000");
    view.remove(&base);
    // What comes out is a prefix of the listing, and at its end there is an end or an error.
    for (i, entry) in listing.enumerate() {
        match entry {
            Ok(entry) => assert_eq!(entry.file_name(), format!("{:05}", i + 1).as_str()),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(Errno::ESTALE as i32), "{error}");
                break;
            }
        }
    }
    assert_eq!(fs::read_dir(store.path(&base)).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_path_appears_at_once_while_others_are_looking_for_it() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let expected = |i: usize| {
        let base = view.add(&format!("path-{i:04}"), view.file("old"));
        view.remove(&base);
        store.path(base)
    };
    let paths: Vec<_> = (0..200).map(expected).collect();
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    if let Some(path) = paths.get(next.load(Ordering::SeqCst)) {
                        let _ = fs::symlink_metadata(path);
                    }
                }
            });
        }
        for (i, path) in paths.iter().enumerate() {
            next.store(i, Ordering::SeqCst);
            for _ in 0..5 {
                assert_eq!(fs::read(path).unwrap_err().kind(), ErrorKind::NotFound);
            }
            view.add(&format!("path-{i:04}"), view.file("new"));
            assert_eq!(fs::read(path).unwrap(), b"new", "{path:?}");
        }
    });
}

#[test]
fn a_listing_under_way_shows_what_stays_exactly_once() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let stay: Vec<_> = (0..600).map(|i| view.add(&format!("stay-{i}"), view.file(""))).collect();
    let go: Vec<_> = (0..600).map(|i| view.add(&format!("go-{i}"), view.file(""))).collect();
    let mut seen = Vec::new();
    for (step, entry) in fs::read_dir(store.root()).unwrap().enumerate() {
        seen.push(entry.unwrap().file_name().into_string().unwrap());
        if let Some(base) = go.get(step) {
            view.remove(base);
            view.add(&format!("come-{step}"), view.file(""));
        }
    }
    for base in &stay {
        assert_eq!(seen.iter().filter(|name| *name == base).count(), 1, "{base}");
    }
    let mut distinct = seen.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), seen.len(), "nothing is listed twice");
    let now = names(store.root());
    assert_eq!(now.len(), 1200);
    assert!(now.iter().all(|name| !name.contains("-go-")));
}

#[test]
fn listings_never_go_stale_under_load() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = StopOnDrop(&stop);
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    names(store.root());
                }
            });
        }
        let until = Instant::now() + Duration::from_secs(2);
        let mut last = None;
        for i in 0.. {
            let base = view.add(&format!("path-{i}"), view.file(""));
            // Every other time a listing that was under way may arrive in between.
            if i % 2 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
            assert!(names(store.root()).contains(&base), "{base} was added and is not listed");
            assert!(fs::symlink_metadata(store.path(&base)).is_ok());
            if let Some(last) = last.replace(base) {
                view.remove(&last);
                assert!(!names(store.root()).contains(&last), "{last} was removed and is listed");
                assert!(fs::symlink_metadata(store.path(&last)).is_err(), "{last} was removed and is found");
            }
            if Instant::now() > until {
                break;
            }
        }
    });
}

/// Ends the other threads even when an assertion fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
