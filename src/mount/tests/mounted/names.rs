//! Names and shapes of directories: long, strange, deep, wide, empty.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use nix::errno::Errno;

use crate::fixture::{Mounted, mounted, names};

fn errno_of(path: PathBuf) -> Option<i32> {
    fs::symlink_metadata(path).unwrap_err().raw_os_error()
}

#[test]
fn names_are_bytes() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let longest = vec![b'n'; 255];
    let strange: [&[u8]; 6] = [b"\xff\xfe", b"new\nline", b" ", b"-rf", "ü".as_bytes(), &longest];
    let base = view.add("strange", view.directory(strange.map(|name| (name, view.file(name)))));

    let mut listed: Vec<_> =
        fs::read_dir(store.path(&base)).unwrap().map(|entry| entry.unwrap().file_name().into_vec()).collect();
    listed.sort();
    let mut expected = strange.map(<[u8]>::to_vec);
    expected.sort();
    assert_eq!(listed, expected);
    for name in strange {
        assert_eq!(fs::read(store.path(&base).join(OsStr::from_bytes(name))).unwrap(), name);
    }
}

#[test]
fn what_is_missing_is_not_found() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let base = view.add("tree", view.directory([("b", view.file(""))]));
    let (missing, below_file) = (Some(Errno::ENOENT as i32), Some(Errno::ENOTDIR as i32));
    // Twice: the second answer may come from the kernel's memory.
    for _ in 0..2 {
        assert_eq!(errno_of(store.path("no-such-path")), missing);
        assert_eq!(errno_of(store.path(OsStr::from_bytes(b"\xff"))), missing);
        assert_eq!(errno_of(store.path(&base).join("a")), missing);
        assert_eq!(errno_of(store.path(&base).join("c")), missing);
        assert_eq!(errno_of(store.path(&base).join("b/c")), below_file);
        assert_eq!(errno_of(store.path(&base).join("n".repeat(256))), Some(Errno::ENAMETOOLONG as i32));
        assert_eq!(errno_of(store.path("n".repeat(256))), Some(Errno::ENAMETOOLONG as i32));
    }
}

#[test]
fn a_name_missing_inside_a_path_is_asked_for_once() {
    let Some(store) = mounted() else { return };
    let base = store.view.add("tree", store.view.directory([("a", store.view.file(""))]));
    assert_eq!(errno_of(store.path(&base).join("x")), Some(Errno::ENOENT as i32));
    let before = store.view.lookups();
    for _ in 0..10 {
        assert_eq!(errno_of(store.path(&base).join("x")), Some(Errno::ENOENT as i32));
    }
    assert_eq!(store.view.lookups(), before, "the kernel remembers names inside a path");
    for _ in 0..10 {
        assert_eq!(errno_of(store.path("x")), Some(Errno::ENOENT as i32));
    }
    assert_eq!(store.view.lookups(), before + 10, "and none that is missing from the store");
}

#[test]
fn trees_may_be_deep() {
    const DEPTH: usize = 63;
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let mut node = view.directory([("bottom", view.file("deep"))]);
    for _ in 1..DEPTH {
        node = view.directory([("a", view.file("")), ("d", node), ("z", view.file(""))]);
    }
    let base = view.add("deep", node);
    let mut path = store.path(&base);
    for _ in 1..DEPTH {
        path.push("d");
    }
    assert_eq!(fs::read_to_string(path.join("bottom")).unwrap(), "deep");
    assert_eq!(fs::canonicalize(path.join("../..")).unwrap(), path.parent().unwrap().parent().unwrap());
}

fn wide(store: &Mounted, entries: usize) -> PathBuf {
    let view = &store.view;
    let files = (0..entries).map(|i| (format!("file-{i:06}"), view.file(i.to_string())));
    let base = view.add("wide", view.directory(files.collect::<Vec<_>>()));
    store.path(&base)
}

#[test]
fn directories_may_be_wide() {
    const ENTRIES: usize = 100_000;
    let Some(store) = mounted() else { return };
    let dir = wide(&store, ENTRIES);
    // First from us, then from the kernel's cache.
    for _ in 0..2 {
        let listed = names(&dir);
        assert_eq!(listed.len(), ENTRIES);
        assert_eq!((listed[0].as_str(), listed[ENTRIES - 1].as_str()), ("file-000000", "file-099999"));
    }
    assert_eq!(fs::read_to_string(dir.join("file-098765")).unwrap(), "98765");
    assert_eq!(errno_of(dir.join("file-100000")), Some(Errno::ENOENT as i32));
}

#[test]
fn the_store_directory_may_be_wide() {
    const PATHS: usize = 100_000;
    let Some(store) = mounted() else { return };
    let nothing = store.view.file("");
    for i in 0..PATHS {
        store.view.add(&format!("path-{i:06}"), nothing.clone());
    }
    for _ in 0..2 {
        assert_eq!(names(store.root()).len(), PATHS);
    }
    let new = store.view.add("new", nothing);
    assert!(fs::symlink_metadata(store.path(&new)).is_ok());
    store.view.remove(&new);
    assert!(fs::symlink_metadata(store.path(&new)).is_err());
    assert_eq!(names(store.root()).len(), PATHS);
}

#[test]
fn a_listing_can_be_rewound_and_resumed() {
    use nix::dir::Dir;
    use nix::fcntl::OFlag;
    use nix::sys::stat::Mode;

    let Some(store) = mounted() else { return };
    let path = wide(&store, 3_000);
    let mut dir = Dir::open(&path, OFlag::O_RDONLY, Mode::empty()).unwrap();
    let part: Vec<_> = dir.iter().take(1_500).map(|entry| entry.unwrap().file_name().to_owned()).collect();
    // `iter` rewinds when it is dropped.
    let whole: Vec<_> = dir.iter().map(|entry| entry.unwrap().file_name().to_owned()).collect();
    assert_eq!(whole.len(), 3_002);
    assert_eq!(part, whole[..1_500]);
    assert_eq!((whole[0].to_bytes(), whole[1].to_bytes()), (b".".as_slice(), b"..".as_slice()));
}

#[test]
fn empty_things() {
    let Some(store) = mounted() else { return };
    assert_eq!(names(store.root()), [""; 0]);
    let nothing: [(&str, _); 0] = [];
    let dir = store.view.add("dir", store.view.directory(nothing));
    let file = store.view.add("file", store.view.file(""));
    assert_eq!(names(&store.path(&dir)), [""; 0]);
    assert_eq!(fs::read(store.path(&file)).unwrap(), b"");
    assert_eq!(errno_of(store.path(&dir).join("a")), Some(Errno::ENOENT as i32));
}

#[test]
fn the_directory_that_stock_expects_is_there_and_listed_nowhere() {
    let Some(store) = mounted() else { return };
    let nothing: [(&str, _); 0] = [];
    store.view.directory(nothing);
    let links = store.path(".links");
    assert!(fs::symlink_metadata(&links).unwrap().is_dir());
    assert_eq!(names(&links), [""; 0]);
    assert_eq!(names(store.root()), [""; 0]);
    assert_eq!(fs::write(links.join("a"), "").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
}
