//! What `stat` shows, and the numbers by which programs tell files apart.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirEntryExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::statvfs::statvfs;
use store::view::FIRST_ROOT_NUMBER;

use crate::fixture::{MemoryView, SPACE, mount_or_skip, mounted};

#[test]
fn kinds_modes_sizes_and_times() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let tree = view.directory([
        ("data", view.file(vec![b'x'; 1025])),
        ("empty", view.file("")),
        ("link", view.symlink("../elsewhere")),
        ("tool", view.executable("#!/bin/sh\n")),
    ]);
    let base = view.add("tree", tree);
    let single = view.add("single", view.file("one file"));
    let alias = view.add("alias", view.symlink("tree"));

    let expect = |path: PathBuf, kind: fn(&fs::FileType) -> bool, mode: u32, size: u64, blocks: u64| {
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(kind(&found.file_type()), "{path:?} is {:?}", found.file_type());
        assert_eq!(found.mode() & 0o7777, mode, "mode of {path:?}");
        assert_eq!((found.size(), found.blocks()), (size, blocks), "size of {path:?}");
        assert_eq!((found.mtime(), found.mtime_nsec()), (1, 0), "mtime of {path:?}");
        assert_eq!((found.ctime(), found.atime()), (1, 1), "times of {path:?}");
        assert_eq!((found.uid(), found.gid(), found.nlink()), (0, 0, 1), "owner of {path:?}");
        assert_eq!(found.blksize(), 4096);
    };
    expect(store.path(&base), fs::FileType::is_dir, 0o555, 4, 0);
    expect(store.path(&base).join("data"), fs::FileType::is_file, 0o444, 1025, 3);
    expect(store.path(&base).join("empty"), fs::FileType::is_file, 0o444, 0, 0);
    expect(store.path(&base).join("link"), fs::FileType::is_symlink, 0o777, 12, 0);
    expect(store.path(&base).join("tool"), fs::FileType::is_file, 0o555, 10, 1);
    expect(store.path(&single), fs::FileType::is_file, 0o444, 8, 1);
    expect(store.path(&alias), fs::FileType::is_symlink, 0o777, 4, 0);
    expect(store.root().to_owned(), fs::FileType::is_dir, 0o555, 0, 0);

    assert_eq!(fs::read_link(store.path(&base).join("link")).unwrap(), Path::new("../elsewhere"));
    assert!(!fs::symlink_metadata(store.root()).unwrap().file_type().is_socket());
}

#[test]
fn files_tell_which_store_path_they_belong_to() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let [first, second] = ["first", "second"].map(|name| view.add(name, view.directory([("file", view.file(name))])));
    let recognise = store.mount.recogniser();
    let number = |path: &Path| {
        let found = fs::metadata(path).unwrap();
        let device = (nix::sys::stat::major(found.dev()), nix::sys::stat::minor(found.dev()));
        recognise((device.0 as u32, device.1 as u32), found.ino())
    };
    for (base, expected) in [(&first, FIRST_ROOT_NUMBER), (&second, FIRST_ROOT_NUMBER + 1)] {
        assert_eq!(number(&store.path(base)), Some(expected));
        assert_eq!(number(&store.path(base).join("file")), Some(expected));
    }
    assert_eq!(number(store.root()), None, "the store directory is no store path");
    assert_eq!(number(Path::new("/proc/self/exe")), None);
}

#[test]
fn an_executable_and_its_plain_twin_differ() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let script = "#!/bin/sh\necho twin\n";
    let base = view.add("twins", view.directory([("plain", view.file(script)), ("tool", view.executable(script))]));
    let plain = fs::metadata(store.path(&base).join("plain")).unwrap();
    let tool = fs::metadata(store.path(&base).join("tool")).unwrap();
    assert_eq!((plain.mode() & 0o777, tool.mode() & 0o777), (0o444, 0o555));
    assert_ne!(plain.ino(), tool.ino());
    let output = std::process::Command::new(store.path(&base).join("tool")).output().unwrap();
    assert_eq!(output.stdout, b"twin\n");
    let refused = std::process::Command::new(store.path(&base).join("plain")).output().unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn space_is_that_of_the_store() {
    let Some(store) = mounted() else { return };
    let found = statvfs(store.root()).unwrap();
    assert_eq!(found.block_size(), u64::from(SPACE.block_size));
    assert_eq!((found.blocks(), found.blocks_free()), (SPACE.blocks, SPACE.blocks_free));
    assert_eq!(found.blocks_available(), SPACE.blocks_available);
    assert_eq!((found.files(), found.files_free()), (SPACE.files, SPACE.files_free));
    assert_eq!(found.name_max(), 255);
}

/// Every path below `dir` with its inode number, which `stat` and the listing must agree on.
fn numbers(dir: &Path) -> HashMap<PathBuf, u64> {
    let mut found = HashMap::from([(dir.to_owned(), fs::symlink_metadata(dir).unwrap().ino())]);
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let ino = entry.metadata().unwrap().ino();
            assert_eq!(entry.ino(), ino, "{:?} listed and looked at", entry.path());
            found.insert(entry.path(), ino);
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
        }
    }
    found
}

/// One directory three times in one tree, once within itself's parent, and once in another path.
fn aliases(view: &MemoryView) {
    let leaf = || view.directory([("a", view.file("a")), ("b", view.file("a"))]);
    let middle = || view.directory([("leaf", leaf()), ("leaf2", leaf()), ("z", view.file(""))]);
    view.add("first", view.directory([("l", leaf()), ("m", middle()), ("n", middle()), ("s", view.symlink("l"))]));
    view.add("second", middle());
    view.add("third", leaf());
}

#[test]
fn numbers_are_unique_even_where_directories_are_the_same() {
    let Some(store) = mounted() else { return };
    aliases(&store.view);
    let numbers = numbers(store.root());
    // A leaf is 3 nodes, a middle 1 + 3 + 3 + 1.
    let (leaf, middle) = (3, 8);
    assert_eq!(numbers.len(), 1 + (1 + leaf + middle + middle + 1) + middle + leaf);
    let mut distinct: Vec<_> = numbers.values().collect();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), numbers.len());
}

#[test]
fn numbers_survive_a_remount() {
    let dir = tempfile::tempdir().unwrap();
    let view = Arc::new(MemoryView::default());
    aliases(&view);
    let mut seen = Vec::new();
    for _ in 0..2 {
        let Some(mount) = mount_or_skip(Arc::clone(&view), dir.path()) else { return };
        seen.push(numbers(mount.mountpoint()));
        mount.unmount().unwrap();
    }
    assert_eq!(seen[0], seen[1]);
}

#[test]
fn a_node_is_found_again_from_its_number_alone() {
    // Reading an open file after the caches were dropped must go down the tree by position.
    let view = Arc::new(MemoryView::default());
    aliases(&view);
    let walked = mount::Tree::new(Arc::clone(&view) as Arc<_>);
    let mut open = vec![mount::NodeId::STORE];
    let mut seen = 0;
    while let Some(dir) = open.pop() {
        walked
            .list(dir, 2, &mut |entry| {
                let fresh = mount::Tree::new(Arc::clone(&view) as Arc<_>);
                assert_eq!(fresh.attributes(entry.attributes.id).unwrap(), entry.attributes);
                if entry.attributes.kind == mount::Kind::Directory {
                    open.push(entry.attributes.id);
                }
                seen += 1;
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
    }
    assert!(seen > 30);
}
