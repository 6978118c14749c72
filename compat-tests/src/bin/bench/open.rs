//! Starting after `kill -9`: a store with a million objects, killed while it writes; the time until the daemon answers
//! again, with everything mounted.

use std::time::{Duration, Instant};

use compat_tests::machine::Machine;
use compat_tests::nar::Tree;
use compat_tests::wire::Client;
use compat_tests::{Error, Result, Room, Subject};

/// Objects: so many files of contents of their own.
const FILES: usize = 1_000_000;
/// Files of one path, and of one directory in it.
const FILES_OF_A_PATH: usize = 50_000;
const FILES_OF_A_DIRECTORY: usize = 1000;
/// How often it is killed.
const ROUNDS: usize = 5;
/// What is written before each kill.
const FILES_OF_A_ROUND: usize = 20_000;
/// The daemon answers within this.
const PROMISED: Duration = Duration::from_secs(1);

/// Whether the promise is kept.
pub(crate) fn bench(_: &Machine) -> Result<bool> {
    let subject = Subject::from_environment()?;
    let room = Room::enter("bench-open")?;
    let mut daemon = subject.start(&room)?;
    let began = Instant::now();
    let connect = |daemon: &compat_tests::Daemon| {
        Client::new(daemon.connect().map_err(|e| Error::Wrong(format!("cannot connect: {e}")))?)
    };
    let mut client = connect(&daemon)?;
    for path in 0..FILES / FILES_OF_A_PATH {
        client.add("many", &tree(path * FILES_OF_A_PATH, FILES_OF_A_PATH))?;
    }
    println!("{FILES} files added in {:.1?}", began.elapsed());
    let mut times = Vec::new();
    for round in 0..ROUNDS {
        let mut client = connect(&daemon)?;
        client.add("more", &tree(FILES + round * FILES_OF_A_ROUND, FILES_OF_A_ROUND))?;
        daemon.kill_hard()?;
        let began = Instant::now();
        daemon = subject.start(&room)?;
        // It answers from the store, and not only at the socket.
        let paths = connect(&daemon)?.all_valid_paths()?.len();
        times.push(began.elapsed());
        if paths < FILES / FILES_OF_A_PATH {
            return Err(Error::Wrong(format!("only {paths} paths are left")));
        }
    }
    daemon.stop()?;
    times.sort();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("{:<34} {:>10} {:>10}", "killed with 1,000,000 objects", "median", "longest");
    println!("{:<34} {median:>10.1?} {longest:>10.1?}", "until the daemon answers");
    let kept = longest <= PROMISED;
    println!("{} within {PROMISED:?}", if kept { "ok:" } else { "WRONG: not" });
    Ok(kept)
}

/// Directories of small files that no other call gives.
fn tree(first: usize, count: usize) -> Tree {
    let name = |number: usize| format!("{number:08}").into_bytes();
    let file = |number: usize| (name(number), Tree::File(format!("the contents of file {number}\n").into_bytes()));
    let directories = (first..first + count).step_by(FILES_OF_A_DIRECTORY);
    let directory =
        |start: usize| (name(start), Tree::Directory((start..start + FILES_OF_A_DIRECTORY).map(file).collect()));
    Tree::Directory(directories.map(directory).collect())
}
