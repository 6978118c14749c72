//! The store directory as programs see it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::thread;

use compat_tests::nar::Tree;
use compat_tests::wire::Client;
use compat_tests::{Call, Who};

use crate::{castored_setup, setup};

#[test]
fn a_path_can_be_read_the_instant_it_is_registered() {
    let Some(s) = setup("instant") else { return };
    let daemon = s.start();
    thread::scope(|scope| {
        for worker in 0..4 {
            let daemon = &daemon;
            scope.spawn(move || {
                let mut client = Client::new(daemon.connect().unwrap()).unwrap();
                for n in 0..100 {
                    let text = format!("{worker} {n}");
                    let below = Tree::File(text.clone().into_bytes());
                    let tree = Tree::Directory(vec![(b"file".to_vec(), below)]);
                    let path = client.add("instant", &tree).unwrap();
                    assert_eq!(fs::read_to_string(Path::new(&path).join("file")).unwrap(), text);
                    let missing = format!("/nix/store/{}", path.trim_start_matches("/nix/store/").replace('-', "_"));
                    assert!(!Path::new(&missing).exists());
                }
            });
        }
    });
    daemon.stop().unwrap();
}

#[test]
fn a_name_looked_up_before_it_exists_appears() {
    let Some(s) = setup("negative") else { return };
    let daemon = s.start();
    let source = s.room.write("later", "now it is here\n").unwrap();
    let path = s.nix(Who::User, "nix-store").args(["--add", "--dry-run"]).arg(&source).quiet().run().unwrap();
    drop(path);
    let added = s.nix(Who::Root, "nix-store").arg("--add").arg(&source).ok().unwrap().text();
    s.nix(Who::Root, "nix-store").args(["--delete", &added]).ok().unwrap();
    assert!(!Path::new(&added).exists());
    let listing = || fs::read_dir("/nix/store").unwrap().flatten().any(|e| e.path() == Path::new(&added));
    assert!(!listing());
    s.nix(Who::User, "nix-store").arg("--add").arg(&source).ok().unwrap();
    assert_eq!(fs::read_to_string(&added).unwrap(), "now it is here\n");
    assert!(listing(), "the directory's listing must follow");
    daemon.stop().unwrap();
}

#[test]
fn metadata_is_canonical_and_nothing_can_be_written() {
    let Some(s) = castored_setup("metadata") else { return };
    let daemon = s.start();
    let tree = s.room.tmp("tree");
    fs::create_dir_all(tree.join("below")).unwrap();
    fs::write(tree.join("plain"), "plain").unwrap();
    fs::write(tree.join("below/program"), "#!/bin/sh\necho it runs\n").unwrap();
    fs::set_permissions(tree.join("below/program"), PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("below/program", tree.join("link")).unwrap();
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    for (name, mode) in [("", 0o40555), ("plain", 0o100_444), ("below", 0o40555), ("below/program", 0o100_555)] {
        let meta = fs::metadata(Path::new(&path).join(name)).unwrap();
        assert_eq!((meta.mode(), meta.uid(), meta.mtime()), (mode, 0, 1), "{name}");
    }
    assert_eq!(Call::new(&s.room, Who::User, format!("{path}/link")).ok().unwrap().text(), "it runs");
    assert_eq!(fs::read_link(Path::new(&path).join("link")).unwrap(), Path::new("below/program"));
    for result in [
        fs::write(format!("{path}/new"), "x"),
        fs::write(format!("{path}/plain"), "x"),
        fs::remove_file(format!("{path}/plain")),
        fs::create_dir("/nix/store/new"),
        fs::set_permissions(format!("{path}/plain"), PermissionsExt::from_mode(0o777)),
    ] {
        assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    }
    daemon.stop().unwrap();
}

#[test]
fn attributes_tell_the_digests() {
    let Some(s) = castored_setup("attributes") else { return };
    let daemon = s.start();
    let tree = s.room.tmp("tree");
    fs::create_dir_all(&tree).unwrap();
    fs::write(tree.join("system"), "x86_64-linux").unwrap();
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let attributes = |of: &str| {
        let call = Call::new(&s.room, Who::User, "getfattr").args(["-d", "-m", "-", "--absolute-names", of]);
        call.ok().unwrap().lines()
    };
    let file = "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=";
    let line = format!("user.tvix.castore.blob.digest=\"{file}\"");
    assert!(attributes(&format!("{path}/system")).contains(&line));
    // The directory's message, byte by byte: field 2 (files), one entry of name, digest, size.
    let digest = blake3::hash(b"x86_64-linux");
    let mut entry = vec![0x0a, 6];
    entry.extend(b"system");
    entry.extend([0x12, 32]);
    entry.extend(digest.as_bytes());
    entry.extend([0x18, 12]);
    let mut message = vec![0x12, u8::try_from(entry.len()).unwrap()];
    message.extend(entry);
    let directory = data_encoding::BASE64.encode(blake3::hash(&message).as_bytes());
    assert!(attributes(&path).contains(&format!("user.tvix.castore.directory.digest=\"b3:{directory}\"")));
    daemon.stop().unwrap();
}
