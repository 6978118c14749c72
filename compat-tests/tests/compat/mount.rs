//! The store directory as programs see it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::checks::expect_contains;
use compat_tests::grpc::Server;
use compat_tests::memory;
use compat_tests::nar::Tree;
use compat_tests::subject::default_conf;
use compat_tests::wire::Client;
use compat_tests::{Call, Who};
use data_encoding::BASE64;
use serde_json::{Value, json};

use crate::grpc::{free_address, start_on};
use crate::repair::{damage_copies_of, is_io_error, noise};
use crate::{castored_setup, setup};

/// How many store paths the test of many paths makes; more for figures.
const PATHS_VARIABLE: &str = "CASTORED_TEST_PATHS";
const PATHS: usize = 4000;

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

/// `getfattr -d` of everything below a path: attributes by path.
fn attributes_below(s: &crate::Setup, path: &str) -> BTreeMap<PathBuf, String> {
    let call = Call::new(&s.room, Who::User, "getfattr").args(["-R", "-P", "-d", "-m", "-", "--absolute-names", path]);
    let mut found = BTreeMap::new();
    for record in call.ok().unwrap().text().split("\n\n") {
        let (file, attribute) = record.split_once('\n').unwrap();
        found.insert(PathBuf::from(file.strip_prefix("# file: ").unwrap()), attribute.to_owned());
    }
    found
}

/// The same as the services tell it, from a directory down.
fn told(server: &Server, path: &Path, node: &Value, found: &mut BTreeMap<PathBuf, String>) {
    let digest = node["digest"].as_str().unwrap();
    found.insert(path.to_owned(), format!("user.tvix.castore.directory.digest=\"b3:{digest}\""));
    let get = json!({ "digest": digest });
    let directory = &server.call("tvix.castore.v1.DirectoryService", "Get", &[get]).unwrap()[0];
    let name =
        |node: &Value| String::from_utf8(BASE64.decode(node["name"].as_str().unwrap().as_bytes()).unwrap()).unwrap();
    for child in directory["directories"].as_array().into_iter().flatten() {
        told(server, &path.join(name(child)), child, found);
    }
    for child in directory["files"].as_array().into_iter().flatten() {
        let attribute = format!("user.tvix.castore.blob.digest=\"b3:{}\"", child["digest"].as_str().unwrap());
        found.insert(path.join(name(child)), attribute);
    }
}

#[test]
fn attributes_of_a_whole_tree_are_what_grpc_tells() {
    let Some(s) = castored_setup("attributes-grpc") else { return };
    let address = free_address();
    let daemon = start_on(&s, &address);
    let tree = s.room.tmp("tree");
    for dir in 0..5 {
        fs::create_dir_all(tree.join(format!("{dir}/deeper/{dir}"))).unwrap();
        for file in 0..10 {
            fs::write(
                tree.join(format!("{dir}/deeper/file-{file}")),
                noise(file, 30_000 * usize::try_from(file).unwrap()),
            )
            .unwrap();
        }
    }
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&tree).ok().unwrap().text();
    let server = Server::connect(&address).unwrap();
    let list = server.call("tvix.store.v1.PathInfoService", "List", &[json!({})]).unwrap();
    let mut expected = BTreeMap::new();
    told(&server, Path::new(&path), &list[0]["node"]["directory"], &mut expected);
    assert_eq!(expected.len(), 1 + 5 * 3 + 5 * 10);
    assert_eq!(attributes_below(&s, &path), expected);
    daemon.stop().unwrap();
}

#[test]
fn what_a_reader_finds_damaged_is_fetched_again() {
    let Some(s) = castored_setup("damage") else { return };
    let daemon = s.start();
    let add = |name: &str, seed| {
        let file = s.room.write(name, noise(seed, 300_000)).unwrap();
        s.nix(Who::Root, "nix-store").arg("--add").arg(file).ok().unwrap().text()
    };
    let (cached, lost) = (add("cached", 21), add("lost", 22));
    let cache = format!("file://{}", s.room.tmp("cache").display());
    s.nix(Who::Root, "nix").args(["copy", "--no-check-sigs", "--to", &cache, &cached]).ok().unwrap();
    daemon.stop().unwrap();
    for seed in [21, 22] {
        damage_copies_of(&noise(seed, 300_000)[150_000..150_032]);
    }
    let conf = default_conf().replace("substituters =\n", &format!("substituters = {cache}\nrequire-sigs = false\n"));
    let daemon = s.subject.start_with(&s.room, &conf).unwrap();

    // An error for who reads what is damaged; the rest of the file, in other blocks, can be read meanwhile.
    let file = File::open(&lost).unwrap();
    assert_eq!(file.read_at(&mut [0; 16], 150_000).unwrap_err().raw_os_error(), Some(5));
    let mut beginning = [0; 4096];
    file.read_exact_at(&mut beginning, 0).unwrap();
    assert!(beginning == noise(22, 300_000)[..4096]);

    assert!(is_io_error(&cached));
    let begun = Instant::now();
    while is_io_error(&cached) {
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", daemon.log());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(fs::read(&cached).unwrap() == noise(21, 300_000));
    s.nix(Who::Root, "nix-store").args(["--verify-path", &cached]).ok().unwrap();

    while !daemon.log().contains("could not be repaired") {
        assert!(begun.elapsed() < Duration::from_secs(20), "{}", daemon.log());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(is_io_error(&lost));
    let log = daemon.log();
    for (path, seed) in [(&cached, 21), (&lost, 22)] {
        let base = path.trim_start_matches("/nix/store/");
        let digest = BASE64.encode(blake3::hash(&noise(seed, 300_000)).as_bytes());
        let line = log.lines().find(|line| line.contains("cannot answer a request") && line.contains(base));
        expect_contains(line.unwrap(), &format!("b3:{digest}")).unwrap();
    }
    expect_contains(&log, &format!("repaired a damaged path path=\"{cached}\"")).unwrap();
    daemon.stop().unwrap();
}

#[test]
fn a_file_of_more_than_four_gib() {
    const SIZE: u64 = (4 << 30) + (100 << 20);
    let Some(s) = castored_setup("huge") else { return };
    let daemon = s.start();
    let source = s.room.write("huge", "").unwrap();
    let sparse = File::options().write(true).open(&source).unwrap();
    sparse.set_len(SIZE).unwrap();
    let marks: [(u64, &[u8]); 3] = [(0, b"begin"), (4 << 30, b"beyond"), (SIZE - 3, b"end")];
    for (at, mark) in marks {
        sparse.write_all_at(mark, at).unwrap();
    }
    let add = s.nix(Who::User, "nix-store").arg("--add").arg(&source).limit(Duration::from_secs(300));
    let path = add.ok().unwrap().text();
    let stored = File::open(&path).unwrap();
    assert_eq!(stored.metadata().unwrap().len(), SIZE);
    for (at, mark) in marks {
        let mut found = vec![0; mark.len()];
        stored.read_exact_at(&mut found, at).unwrap();
        assert_eq!(found, mark, "at {at}");
    }
    let mut zeros = vec![1; 1 << 20];
    for at in [(2 << 30) - 7, (4 << 30) - zeros.len() as u64, (4 << 30) + 100] {
        stored.read_exact_at(&mut zeros, at).unwrap();
        assert!(zeros.iter().all(|byte| *byte == 0), "at {at}");
    }
    // Zeros are stored once.
    let packs: u64 =
        fs::read_dir("/nix/var/nix/castored/packs").unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    assert!(packs < 64 << 20, "{packs} bytes of packs");
    daemon.stop().unwrap();
}

#[test]
fn a_store_of_many_paths() {
    let Some(s) = castored_setup("many-paths") else { return };
    let paths: usize = std::env::var(PATHS_VARIABLE).ok().map_or(PATHS, |number| number.parse().unwrap());
    let daemon = s.start();
    thread::scope(|scope| {
        for worker in 0..4 {
            let daemon = &daemon;
            scope.spawn(move || {
                let mut client = Client::new(daemon.connect().unwrap()).unwrap();
                for n in (worker..paths).step_by(4) {
                    client.add("one-of-many", &Tree::File(n.to_string().into_bytes())).unwrap();
                }
            });
        }
    });
    let before = memory::rss(daemon.pid()).unwrap();
    let timed = |what: &str, work: &mut dyn FnMut() -> usize| {
        let begun = Instant::now();
        assert_eq!(work(), paths, "{what}");
        println!("{what}: {:.1?} for {paths} paths", begun.elapsed());
    };
    let mut names = Vec::new();
    timed("list", &mut || {
        names = fs::read_dir("/nix/store").unwrap().map(|entry| entry.unwrap().path()).collect();
        names.len()
    });
    timed("list again", &mut || fs::read_dir("/nix/store").unwrap().count());
    timed("look at each", &mut || names.iter().filter(|name| fs::symlink_metadata(name).unwrap().is_file()).count());
    timed("read each", &mut || names.iter().filter(|name| !fs::read(name).unwrap().is_empty()).count());
    let missing = |name: &PathBuf| fs::symlink_metadata(name.to_str().unwrap().replace("-one", "-two")).is_err();
    timed("look for what is missing", &mut || names.iter().filter(|name| missing(name)).count());
    let mut numbers: Vec<u64> = names.iter().map(|name| fs::metadata(name).unwrap().ino()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), paths);
    let after = memory::rss(daemon.pid()).unwrap();
    println!("memory: {} MiB before, {} MiB after", before >> 20, after >> 20);
    assert!(after < before + (64 << 20), "the mount keeps something of every path: {before} before, {after} after");
    daemon.stop().unwrap();
}

#[test]
fn an_ordinary_user_sees_the_mount_inside_a_namespace_and_can_have_a_store_of_their_own_there() {
    let Some(s) = castored_setup("namespace") else { return };
    let daemon = s.start();
    let file = s.room.write("file", "seen from inside").unwrap();
    let path = s.nix(Who::User, "nix-store").arg("--add").arg(&file).ok().unwrap().text();
    let inside = |script: &str| {
        let castored = s.subject.copy_into(&s.room).unwrap();
        let call = Call::new(&s.room, Who::User, "unshare").args(["-Urm", "--", "/bin/sh", "-euc", script, "sh"]);
        call.arg(castored).arg(&path).arg(s.room.tmp("own")).arg(&file)
    };
    assert_eq!(inside(r#"cat "$2""#).ok().unwrap().text(), "seen from inside");
    // Their own daemon, store and mount, which nobody outside sees.
    let script = r#"
        "$1" --root "$3" daemon --grpc-listen none 2>"$3.log" >&2 &
        pid=$!
        for i in $(seq 200); do test -S "$3/var/nix/daemon-socket/socket" && break; sleep 0.05; done
        added=$("$1" --root "$3" import "$4") || { cat "$3.log" >&2; exit 1; }
        base=$(basename "$added")
        mountpoint -q "$3/store"
        cat "$3/store/$base"
        kill $pid; wait $pid
    "#;
    assert_eq!(inside(script).ok().unwrap().text(), "seen from inside");
    daemon.stop().unwrap();
}
