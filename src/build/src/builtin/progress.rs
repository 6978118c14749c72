//! How a builder tells clients of a download: lines of its log that are messages.

use std::time::{Duration, Instant};

use serde_json::json;

/// Time between two messages about one download.
const INTERVAL: Duration = Duration::from_millis(500);

/// Codes of the worker protocol.
const FILE_TRANSFER: u64 = 101;
const PROGRESS: u64 = 105;
const TALKATIVE: u64 = 4;

/// A download that clients are shown. It ends when this is dropped.
pub(super) struct Progress {
    done: u64,
    expected: u64,
    said: Instant,
}

/// A process makes one download at a time, and its messages are told apart from those of other builds by the daemon.
const ID: u64 = 1;

impl Progress {
    pub(super) fn start(url: &str) -> Self {
        say(&json!({
            "action": "start", "id": ID, "level": TALKATIVE, "parent": 0, "type": FILE_TRANSFER,
            "text": format!("downloading '{url}'"), "fields": [url],
        }));
        Self { done: 0, expected: 0, said: Instant::now() }
    }

    /// So many bytes are there, of so many, or of 0 when nobody knows.
    pub(super) fn at(&mut self, done: u64, expected: u64) {
        (self.done, self.expected) = (done, expected);
        if self.said.elapsed() >= INTERVAL {
            self.said = Instant::now();
            self.say_progress();
        }
    }

    fn say_progress(&self) {
        say(&json!({"action": "result", "id": ID, "type": PROGRESS, "fields": [self.done, self.expected, 0, 0]}));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.say_progress();
        say(&json!({"action": "stop", "id": ID}));
    }
}

fn say(message: &serde_json::Value) {
    eprintln!("@nix {message}");
}
