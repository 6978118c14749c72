//! A first look at speed: the mount beside a local filesystem with the same tree, both warm. Not run by default:
//! `cargo nextest run -p mount --run-ignored only --no-capture speed`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use castore::Node;

use crate::fixture::{MemoryView, mounted, noise};

const DIRECTORIES: usize = 500;
const FILES_EACH: usize = 100;
const RUNS: usize = 5;

/// What to measure, with `$1` for the tree.
const COMMANDS: [(&str, &str); 3] = [
    ("walk", "find $1 -ls > /dev/null"),
    ("read everything", "tar c -C $1 . | wc -c > /dev/null"),
    (
        "open and read 10,000",
        "find $1 -name '*[05]' -type f -print0 | head -z -n 10000 | xargs -0 cat | wc -c > /dev/null",
    ),
];

fn sizes(directory: usize, file: usize) -> usize {
    noise(2, (directory * FILES_EACH + file + 1) as u64).iter().map(|byte| usize::from(*byte)).product::<usize>() / 8
}

/// The same tree in a directory of the local filesystem and in the store.
fn tree(view: &MemoryView, local: &Path) -> Node {
    let mut directories = Vec::new();
    for directory in 0..DIRECTORIES {
        let name = format!("dir-{directory:03}");
        fs::create_dir(local.join(&name)).unwrap();
        let mut files = Vec::new();
        for file in 0..FILES_EACH {
            let contents = noise(sizes(directory, file), (directory * FILES_EACH + file) as u64);
            let path = local.join(&name).join(format!("file-{file:03}"));
            fs::write(&path, &contents).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
            files.push((format!("file-{file:03}"), view.file(contents)));
        }
        directories.push((name, view.directory(files)));
    }
    view.directory(directories)
}

fn time(command: &str, tree: &Path) -> Duration {
    let begun = Instant::now();
    assert!(Command::new("sh").args(["-c", command, "sh"]).arg(tree).status().unwrap().success());
    begun.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "a measurement: takes a minute and wants a quiet machine"]
fn beside_a_local_filesystem() {
    let Some(store) = mounted() else { return };
    let local = tempfile::tempdir_in("/var/tmp").unwrap();
    let base = store.view.add("tree", tree(&store.view, local.path()));
    for (what, command) in COMMANDS {
        let first = time(command, &store.path(&base));
        time(command, local.path());
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            ours.push(time(command, &store.path(&base)));
            theirs.push(time(command, local.path()));
        }
        let (ours, theirs) = (median(ours), median(theirs));
        let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
        println!("{what}: first {first:.0?}, then {ours:.0?}, local {theirs:.0?}, ratio {ratio:.2}");
    }
}
