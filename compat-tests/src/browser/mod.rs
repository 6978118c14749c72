//! A browser without a screen, to see pages as people do: Debian's `chromium-headless-shell`, spoken to in the DevTools
//! protocol over a pair of pipes (a message of JSON, then a byte 0).
//!
//! It is made relocatable as the Nix releases are, and nothing is installed: some 150 MB are downloaded when it is first
//! asked for, of which 260 MB stay in the cache.

mod fetch;

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::error::{Context, Error, Result};
use crate::machine::{CACHE, lock};

/// How long the browser may take for anything: the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// The height of the window, in pixels.
const HEIGHT: u32 = 800;

/// A running browser with one page.
#[derive(Debug)]
pub struct Browser {
    process: Child,
    to: File,
    from: Receiver<Value>,
    session: String,
    last: u64,
    /// What was said without being asked and not looked at yet.
    events: VecDeque<Value>,
    complaints: Vec<String>,
}

impl Browser {
    /// Starts one whose window is so many pixels wide, fetching it before if it is not here. Its files are in `scratch`.
    pub fn start(scratch: &Path, width: u32) -> Result<Self> {
        let cache = Path::new(CACHE).join("browser");
        fs::create_dir_all(&cache).doing("creating", &cache)?;
        let place = {
            let _turn = lock(&cache)?;
            fetch::fetch(&cache)?
        };
        fs::create_dir_all(scratch).doing("creating", scratch)?;
        let pipes = ["to", "from"].map(|name| scratch.join(name));
        for pipe in &pipes {
            mkfifo(pipe, Mode::S_IRUSR | Mode::S_IWUSR).doing("making the pipe", pipe)?;
        }
        let log = scratch.join("log");
        let mut command = Command::new("sh");
        // The shell opens the pipes where the browser looks for them.
        command.args(["-c", "to=$1 from=$2 && shift 2 && exec \"$0\" \"$@\" 3<\"$to\" 4>\"$from\""]);
        command.arg(place.join("bin/chromium-headless-shell")).args(&pipes);
        // Root has no sandbox, and what it looks at is ours.
        command.args(["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]);
        command.arg(format!("--user-data-dir={}", scratch.join("profile").display())).arg("about:blank");
        command.env("FONTCONFIG_FILE", place.join("fonts.conf")).env("HOME", scratch);
        let log = File::create(&log).doing("creating", &log)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let process = command.spawn().doing("starting", "the browser")?;
        let to = OpenOptions::new().write(true).open(&pipes[0]).doing("opening", &pipes[0])?;
        let from = File::open(&pipes[1]).doing("opening", &pipes[1])?;
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let messages = BufReader::new(from).split(0).map_while(|message| message.ok());
            for message in messages.filter_map(|message| serde_json::from_slice(&message).ok()) {
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        let mut browser = Self {
            process,
            to,
            from: receiver,
            session: String::new(),
            last: 0,
            events: VecDeque::new(),
            complaints: Vec::new(),
        };
        browser.attach(width)?;
        Ok(browser)
    }

    fn attach(&mut self, width: u32) -> Result<()> {
        let targets = self.ask("Target.getTargets", &json!({}))?;
        let page = targets["targetInfos"].as_array().into_iter().flatten().find(|target| target["type"] == "page");
        let target = match page {
            Some(page) => page["targetId"].clone(),
            None => self.ask("Target.createTarget", &json!({"url": "about:blank"}))?["targetId"].clone(),
        };
        let attached = self.ask("Target.attachToTarget", &json!({"targetId": target, "flatten": true}))?;
        self.session = attached["sessionId"].as_str().unwrap_or_default().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.ask(&format!("{domain}.enable"), &json!({}))?;
        }
        let window = json!({"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": true});
        self.ask("Emulation.setDeviceMetricsOverride", &window).map(drop)
    }

    /// Goes to a page and waits until it has loaded. The status it came with.
    pub fn go(&mut self, url: &str) -> Result<u64> {
        self.events.clear();
        let went = self.ask("Page.navigate", &json!({"url": url}))?;
        match went["errorText"].as_str() {
            Some(error) => Err(Error::Wrong(format!("the browser cannot go to {url}: {error}"))),
            None => self.loaded(),
        }
    }

    /// Does what leads to another page, and waits until that has loaded. The status it came with.
    pub fn follow(&mut self, script: &str) -> Result<u64> {
        self.events.clear();
        self.evaluate(script)?;
        self.loaded()
    }

    fn loaded(&mut self) -> Result<u64> {
        let start = Instant::now();
        let mut status = 0;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.next(start)?,
            };
            self.note(&event);
            let params = &event["params"];
            if event["method"] == "Network.responseReceived" && params["type"] == "Document" {
                status = params["response"]["status"].as_u64().unwrap_or_default();
            }
            if event["method"] == "Page.loadEventFired" {
                return Ok(status);
            }
        }
    }

    /// The value of an expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let found = self.ask("Runtime.evaluate", &json!({"expression": expression, "returnByValue": true}))?;
        match found.get("exceptionDetails") {
            Some(error) => Err(Error::Wrong(format!("{expression}: {error}"))),
            None => Ok(found["result"]["value"].clone()),
        }
    }

    /// What the console has shown since this was last asked: errors, warnings, and what pages have written there.
    pub fn complaints(&mut self) -> Result<Vec<String>> {
        // Whatever was said before the answer has come by then.
        self.evaluate("0")?;
        while let Some(event) = self.events.pop_front() {
            self.note(&event);
        }
        Ok(std::mem::take(&mut self.complaints))
    }

    fn note(&mut self, event: &Value) {
        let method = event["method"].as_str().unwrap_or_default();
        if ["Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"].contains(&method) {
            self.complaints.push(event["params"].to_string());
        }
    }

    fn ask(&mut self, method: &str, params: &Value) -> Result<Value> {
        self.last += 1;
        let mut message = json!({"id": self.last, "method": method, "params": params});
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let bytes = [message.to_string().as_bytes(), &[0]].concat();
        self.to.write_all(&bytes).doing("asking the browser for", method)?;
        let start = Instant::now();
        loop {
            let message = self.next(start)?;
            if message["id"] != json!(self.last) {
                self.events.push_back(message);
            } else if let Some(error) = message.get("error") {
                return Err(Error::Wrong(format!("the browser refuses {method}: {error}")));
            } else {
                return Ok(message["result"].clone());
            }
        }
    }

    fn next(&self, start: Instant) -> Result<Value> {
        self.from.recv_timeout(PATIENCE.saturating_sub(start.elapsed())).map_err(|error| match error {
            RecvTimeoutError::Timeout => Error::Wrong("the browser does not answer".to_owned()),
            RecvTimeoutError::Disconnected => Error::Wrong("the browser has ended".to_owned()),
        })
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
