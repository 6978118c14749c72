//! `castored stats` and `castored du`, as they are called: of a store whose answer is known.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a daemon may take to answer or to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A store below a directory.
struct Place(tempfile::TempDir);

impl Place {
    fn castored(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_castored"));
        command.arg("--root").arg(self.0.path().join("root")).args(arguments);
        command
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let out = self.castored(arguments).output().unwrap();
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(arguments)).unwrap()
    }

    /// Imports a directory of these files; its store path.
    fn import(&self, name: &str, files: &[(&str, &[u8])]) -> String {
        let dir = self.0.path().join(name);
        fs::create_dir(&dir).unwrap();
        files.iter().for_each(|(file, contents)| fs::write(dir.join(file), contents).unwrap());
        self.ok(&["import", dir.to_str().unwrap()]).trim().to_owned()
    }
}

/// Bytes that do not pack.
fn noise(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed;
    let step = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state >> 11) as u8
    };
    std::iter::repeat_with(step).take(length).collect()
}

/// Whether it is that, and a little for directories and the blocks' heads.
#[track_caller]
fn assert_about(value: &Value, bytes: u64) {
    let value = value.as_u64().unwrap();
    assert!((bytes..bytes + 2_000).contains(&value), "{value} is not about {bytes}");
}

/// Two paths that have a file in common, one that shares the most of a file, and one that shares nothing.
fn furnish(place: &Place) -> [String; 4] {
    let (common, long) = (noise(1, 60_000), noise(2, 1_500_000));
    let longer = [b"inserted", &long[..]].concat();
    [
        place.import("one", &[("common", &common), ("own", &noise(3, 20_000))]),
        place.import("two", &[("common", &common), ("long", &long)]),
        place.import("three", &[("longer", &longer)]),
        place.import("four", &[("own", &noise(4, 40_000))]),
    ]
}

fn check(place: &Place, [one, two, three, four]: &[String; 4]) -> Value {
    let stats = place.json(&["stats", "--json"]);
    assert_eq!(stats["paths"], 4);
    assert_about(&stats["distinct_bytes"], 60_000 + 20_000 + 2 * 1_500_000 + 8 + 40_000);
    let (unique, stored) = (stats["unique_bytes"].as_u64().unwrap(), stats["stored_bytes"].as_u64().unwrap());
    assert!((1_620_000..1_900_000).contains(&unique) && stored < 1_900_000, "{stats}");
    assert!(stats["nar_bytes"].as_u64().unwrap() > 3_180_000);

    let costs = place.json(&["du", "--json", one, two, three, four]);
    assert_eq!(costs[0]["path"], **one);
    assert_about(&costs[0]["unique_bytes"], 20_000);
    assert_about(&costs[0]["shared_bytes"], 60_000);
    assert!(costs[1]["shared_bytes"].as_u64().unwrap() > 60_000 + 1_200_000, "{costs}");
    assert!(costs[2]["shared_bytes"].as_u64().unwrap() > 1_200_000, "{costs}");
    assert_about(&costs[3]["unique_bytes"], 40_000);
    assert_eq!(costs[3]["shared_bytes"], 0);
    for cost in costs.as_array().unwrap() {
        assert_eq!(cost["closure"]["paths"], 1);
        assert_eq!(cost["closure"]["unique_bytes"], cost["unique_bytes"]);
    }
    costs
}

#[test]
fn sizes_of_a_store_without_a_daemon() {
    let place = Place(tempfile::tempdir().unwrap());
    let paths = furnish(&place);
    check(&place, &paths);
    let text = place.ok(&["du", &paths[0]]);
    assert!(text.contains("its own") && text.contains(&paths[0]) && text.contains("all it needs, 1 paths"), "{text}");
    let plot = place.0.path().join("plot.svg");
    let text = place.ok(&["stats", "--plot", plot.to_str().unwrap()]);
    assert!(text.contains("files once") && text.contains("chunks once"), "{text}");
    assert!(fs::read_to_string(plot).unwrap().starts_with("<svg"));
    let refused = place.castored(&["du", "/nix/store/nothing"]).output().unwrap();
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no store path"));
}

/// A daemon that is ended with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// Starts the daemon; `None`, after saying why, where there can be none.
fn start(place: &Place) -> Option<Daemon> {
    if !Path::new("/dev/fuse").exists() {
        println!("SKIPPED: no FUSE");
        return None;
    }
    let log = fs::File::create(place.0.path().join("log")).unwrap();
    let mut command = place.castored(&["daemon", "--grpc-listen", "none", "--no-keeper"]);
    let mut daemon = Daemon(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
    let began = Instant::now();
    while !place.castored(&["status"]).output().unwrap().status.success() {
        let log = || fs::read_to_string(place.0.path().join("log")).unwrap();
        assert!(daemon.0.try_wait().unwrap().is_none() && began.elapsed() < PATIENCE, "{}", log());
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(daemon)
}

#[test]
fn a_daemon_tells_the_same() {
    let place = Place(tempfile::Builder::new().prefix("sizes").tempdir_in("/var/tmp").unwrap());
    let paths = furnish(&place);
    let before = check(&place, &paths);
    let Some(_daemon) = start(&place) else { return };
    assert_eq!(check(&place, &paths), before);
    let refused = place.castored(&["du", "00000000000000000000000000000000-nothing"]).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not valid"), "{refused:?}");
}
