//! Client commands: run with a clean environment and a time limit, shown to the reader, answered as text.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::room::{MEMBER, Room, STRANGER, TRUSTED, USER, User};
use crate::{Release, apt};

/// How long a command may take unless told otherwise.
const LIMIT: Duration = Duration::from_secs(120);
/// How many lines of a command's output are shown unless told otherwise; tests see all of it.
const SHOWN_LINES: usize = 12;

/// Who runs a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Who {
    /// Trusted by the daemon.
    Root,
    /// The room's unprivileged user, whom the daemon does not trust.
    User,
    /// An unprivileged user whom `trusted-users` may name; see [`crate::subject::identities_conf`].
    Trusted,
    /// A member of a group that `trusted-users` may name.
    Member,
    /// A user whom `allowed-users` may leave out.
    Stranger,
}

impl Who {
    /// Who it is; `None` for root.
    pub fn user(self) -> Option<User> {
        match self {
            Self::Root => None,
            Self::User => Some(USER),
            Self::Trusted => Some(TRUSTED),
            Self::Member => Some(MEMBER),
            Self::Stranger => Some(STRANGER),
        }
    }

    /// Whether the daemon trusts them, provided that its configuration names those whom it may name.
    pub fn is_trusted(self) -> bool {
        matches!(self, Self::Root | Self::Trusted | Self::Member)
    }
}

/// What a command left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// Exit code; 128 + signal if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error, lossily as text, terminal escapes removed.
    pub stderr: String,
}

impl Output {
    /// Standard output as text without the last newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// The lines of standard output.
    pub fn lines(&self) -> Vec<String> {
        self.text().lines().map(str::to_owned).collect()
    }

    /// Standard output and standard error joined, for messages.
    pub fn all(&self) -> String {
        format!("{}{}", String::from_utf8_lossy(&self.stdout), self.stderr)
    }
}

/// A command about to be run in a room.
#[derive(Debug)]
pub struct Call {
    command: Command,
    input: Option<Vec<u8>>,
    /// Whether standard input has been set.
    own_input: bool,
    limit: Duration,
    quiet: bool,
    lines: usize,
    shown: String,
}

impl Call {
    /// Any program, in the environment that all commands of a room get.
    pub fn new(room: &Room, who: Who, program: impl AsRef<OsStr>) -> Self {
        let home = room.dir().join(who.user().map_or("home-root", |user| user.home));
        let mut command = Command::new(program.as_ref());
        command.env_clear().current_dir(&home).env("HOME", &home).env("TMPDIR", room.tmp(""));
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C.UTF-8");
        // NIX_CONF_DIR: the client's own settings, never the daemon's nor the machine's.
        command.env("NIX_REMOTE", "daemon").env("NIX_CONF_DIR", room.dir().join("etc"));
        if let Some(user) = who.user() {
            command.uid(user.id).gid(user.id);
        }
        let name = Path::new(program.as_ref()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self { command, input: None, own_input: false, limit: LIMIT, quiet: false, lines: SHOWN_LINES, shown: name }
    }

    /// A command of a stock Nix release, such as `nix-store`.
    pub fn nix(room: &Room, who: Who, release: &Release, name: &str) -> Self {
        let mut call = Self::new(room, who, release.command(name));
        if name == "nix" && !release.is_2_3() {
            call.command.args(["--extra-experimental-features", "nix-command"]);
        }
        call
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.shown.push(' ');
        self.shown.push_str(&quoted(&arg.as_ref().to_string_lossy()));
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(self, args: impl IntoIterator<Item = A>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.command.env(name, value.into());
        self
    }

    /// Feeds these bytes to standard input; without it, it is empty.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Gives a descriptor of ours as standard input.
    #[must_use]
    pub fn input_from(mut self, input: OwnedFd) -> Self {
        self.command.stdin(input);
        self.own_input = true;
        self
    }

    /// Replaces the time limit.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Shows this many lines of the output.
    #[must_use]
    pub fn lines(mut self, lines: usize) -> Self {
        self.lines = lines;
        self
    }

    /// Does not show the command nor its output.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Starts the command and leaves it running; the caller waits for it or kills it. Nothing is shown.
    pub fn spawn(mut self) -> Result<Child> {
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command.spawn().doing("starting", &self.shown)
    }

    /// Runs the command to its end, whatever its exit code.
    pub fn run(mut self) -> Result<Output> {
        if !self.quiet {
            println!("$ {}", self.shown);
        }
        if !self.own_input {
            self.command.stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() });
        }
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().doing("starting", &self.shown)?;
        if let (Some(bytes), Some(mut pipe)) = (self.input.take(), child.stdin.take()) {
            // A command that does not read all of its input is no error of ours.
            thread::spawn(move || pipe.write_all(&bytes));
        }
        let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().doing("waiting for", &self.shown)? {
                break status;
            }
            if start.elapsed() > self.limit {
                let _ = child.kill();
                let _ = child.wait();
                let output = String::from_utf8_lossy(&stderr.join().unwrap_or_default()).into_owned();
                return Err(Error::Timeout { what: format!("`{}`", self.shown), limit: self.limit, output });
            }
            thread::sleep(Duration::from_millis(2));
        };
        let output = Output {
            code: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()),
            stdout: stdout.join().unwrap_or_default(),
            stderr: without_escapes(&String::from_utf8_lossy(&stderr.join().unwrap_or_default())),
        };
        if !self.quiet {
            show(&output, self.lines);
        }
        Ok(output)
    }

    /// Runs the command; anything but exit code 0 is an error.
    pub fn ok(self) -> Result<Output> {
        let shown = self.shown.clone();
        let output = self.run()?;
        if output.code == 0 {
            return Ok(output);
        }
        Err(Error::Command { command: shown, status: format!("exit code {}", output.code), output: output.all() })
    }

    /// Runs the command, which must fail; answers its output.
    pub fn fails(self) -> Result<Output> {
        let shown = self.shown.clone();
        let output = self.run()?;
        if output.code != 0 {
            return Ok(output);
        }
        Err(Error::Command { command: shown, status: "success, but had to fail".into(), output: output.all() })
    }
}

/// Reads a pipe to its end in a thread of its own, so that neither pipe can block the command.
fn drain<R: Read + Send + 'static>(pipe: Option<R>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Prints the first lines of what a command printed, indented below it.
fn show(output: &Output, shown: usize) {
    let text = output.all();
    let lines: Vec<&str> = text.lines().collect();
    for line in lines.iter().take(shown) {
        println!("    {}", line.chars().take(160).collect::<String>());
    }
    if lines.len() > shown {
        println!("    ... {} more lines", lines.len() - shown);
    }
    if output.code != 0 {
        println!("    (exit code {})", output.code);
    }
}

/// As it would have to be typed.
fn quoted(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=+,@%!^*".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) { arg.to_owned() } else { format!("'{}'", arg.replace('\'', "'\\''")) }
}

/// Removes terminal colour sequences (`ESC [ ... letter`).
pub fn without_escapes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c == '\u{1b}' {
            if chars.next() == Some('[') {
                chars.by_ref().find(char::is_ascii_alphabetic);
            }
        } else {
            out.push(c);
        }
    }
    out
}

/// Runs a helper of the harness (not a client) quietly; failure is an error.
pub fn helper(program: &str, args: &[&OsStr]) -> Result<String> {
    apt::run(Command::new(program).args(args))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_removed() {
        assert_eq!(without_escapes("\u{1b}[31;1merror:\u{1b}[0m path '\u{1b}[35;1mx\u{1b}[0m'"), "error: path 'x'");
    }

    #[test]
    fn arguments_are_shown_as_typed() {
        assert_eq!(quoted("--add"), "--add");
        assert_eq!(quoted("a b'c"), "'a b'\\''c'");
        assert_eq!(quoted(""), "''");
    }
}
