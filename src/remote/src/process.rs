//! A process at the other end of a socket: `ssh`, or the store's program itself.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use parking_lot::Mutex;

use crate::error::{ClientError, Result};
use crate::ssh::SshCommand;

/// Bytes kept of the end of a process's standard error, for the message about its failure.
const TAIL: usize = 4096;
/// Bytes of it read at a time.
const PIECE: usize = 16 * 1024;
/// How long a process may take to end when its input has.
const GRACE: Duration = Duration::from_millis(500);
/// How often it is looked whether it has.
const GLANCE: Duration = Duration::from_millis(5);
/// How long the last of its standard error is waited for.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Ends a conversation from another thread: the processes on this side die at once, and whoever waits for them gets an
/// error.
#[derive(Clone, Debug, Default)]
pub struct Stopper(Arc<Mutex<Stoppable>>);

#[derive(Debug, Default)]
struct Stoppable {
    stopped: bool,
    socket: Option<UnixStream>,
    /// Not waited for yet, so that its number is nobody else's.
    child: Option<Child>,
}

impl Stopper {
    /// Ends the conversation, now or when it begins.
    pub fn stop(&self) {
        let mut place = self.0.lock();
        place.stopped = true;
        place.end();
    }

    /// Whether it was ended so.
    pub fn is_stopped(&self) -> bool {
        self.0.lock().stopped
    }

    /// Makes a socket one that is shut down.
    pub(crate) fn watch(&self, socket: &UnixStream) -> io::Result<()> {
        let mut place = self.0.lock();
        place.socket = Some(socket.try_clone()?);
        if place.stopped {
            place.end();
        }
        Ok(())
    }

    fn adopt(&self, child: Child) {
        let mut place = self.0.lock();
        place.child = Some(child);
        if place.stopped {
            place.end();
        }
    }

    /// Whether the process is over; then it has been waited for.
    fn is_over(&self) -> bool {
        let mut place = self.0.lock();
        let over = place.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
        if over {
            place.child = None;
        }
        over
    }
}

impl Stoppable {
    fn end(&self) {
        if let Some(child) = &self.child
            && let Ok(group) = i32::try_from(child.id())
        {
            // It leads its own group, so its helpers go with it.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        if let Some(socket) = &self.socket {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Where a process's standard error goes beside its tail.
pub(crate) type ErrorSink = Box<dyn FnMut(&[u8]) + Send>;

#[derive(Default)]
struct Said {
    tail: VecDeque<u8>,
    sink: Option<ErrorSink>,
    ended: bool,
}

/// What a process says on its standard error.
struct Stderr {
    said: Arc<Mutex<Said>>,
    /// To see whether more is there.
    pipe: OwnedFd,
}

impl Stderr {
    fn follow(mut pipe: ChildStderr) -> io::Result<Self> {
        let said: Arc<Mutex<Said>> = Arc::default();
        let stderr = Self { said: said.clone(), pipe: pipe.as_fd().try_clone_to_owned()? };
        thread::Builder::new().name("remote-stderr".into()).spawn(move || {
            let mut piece = vec![0; PIECE];
            loop {
                if !wait_readable(pipe.as_fd(), PollTimeout::NONE) {
                    // A signal; to read now would be to wait with the lock held.
                    continue;
                }
                // What was taken from the pipe and not passed on yet is nobody's but the lock's.
                let mut said = said.lock();
                match pipe.read(&mut piece) {
                    Ok(0) => break,
                    Ok(length) => said.take(&piece[..length]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            said.lock().ended = true;
        })?;
        Ok(stderr)
    }

    /// Waits until everything that was written so far has been passed on.
    fn settle(&self) {
        let start = Instant::now();
        while start.elapsed() < LAST_WORDS {
            let said = self.said.lock();
            if said.ended || !wait_readable(self.pipe.as_fd(), PollTimeout::ZERO) {
                return;
            }
            drop(said);
            thread::sleep(GLANCE);
        }
    }
}

impl Said {
    fn take(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let surplus = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..surplus);
        if let Some(sink) = &mut self.sink {
            sink(bytes);
        }
    }
}

fn wait_readable(fd: std::os::fd::BorrowedFd<'_>, timeout: PollTimeout) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
}

/// A process whose standard input and output are a socket of ours. Dropping it ends it and waits for it.
pub(crate) struct Process {
    stopper: Stopper,
    stderr: Stderr,
    /// Removed when the process is over.
    _known_hosts: Option<tempfile::NamedTempFile>,
}

impl Process {
    /// Starts a command; gives the socket to talk to it.
    pub(crate) fn start(command: SshCommand, stopper: &Stopper) -> Result<(Self, UnixStream)> {
        let SshCommand { words, known_hosts } = command;
        let program = words.first().cloned().unwrap_or_default();
        let failed = |source| ClientError::Spawn { command: program.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let copy = theirs.try_clone().map_err(failed)?;
        stopper.watch(&ours).map_err(failed)?;
        let mut child = Command::new(&program)
            .args(&words[1..])
            // Nobody is there to be asked.
            .env_remove("DISPLAY")
            .env_remove("SSH_ASKPASS")
            .stdin(OwnedFd::from(theirs))
            .stdout(OwnedFd::from(copy))
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let stderr = child.stderr.take();
        stopper.adopt(child);
        let ended = Ending(stopper.clone());
        let no_pipe = || io::Error::from(io::ErrorKind::BrokenPipe);
        let stderr = stderr.ok_or_else(no_pipe).and_then(Stderr::follow).map_err(failed)?;
        std::mem::forget(ended);
        Ok((Self { stopper: stopper.clone(), stderr, _known_hosts: known_hosts }, ours))
    }

    /// Passes on what the process says on its standard error from now on, or no longer.
    pub(crate) fn set_sink(&self, sink: Option<ErrorSink>) {
        self.stderr.said.lock().sink = sink;
    }

    /// Waits until what the process has said has been passed on.
    pub(crate) fn settle(&self) {
        self.stderr.settle();
    }

    /// Adds to an error what the process has said last.
    pub(crate) fn explain(&self, error: ClientError) -> ClientError {
        if matches!(error, ClientError::Broken(_)) {
            // It will have ended, and its reason be on the way.
            let start = Instant::now();
            while start.elapsed() < GRACE && !self.stderr.said.lock().ended {
                thread::sleep(GLANCE);
            }
        }
        self.settle();
        let tail: Vec<u8> = self.stderr.said.lock().tail.iter().copied().collect();
        let said = String::from_utf8_lossy(&tail).trim().to_owned();
        if said.is_empty() { error } else { ClientError::Process { error: Box::new(error), said } }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.set_sink(None);
        end(&self.stopper);
    }
}

/// Ends the process should its start fail half way.
struct Ending(Stopper);

impl Drop for Ending {
    fn drop(&mut self) {
        end(&self.0);
    }
}

/// Takes the process's input away, kills it if that is not enough, and waits for it.
fn end(stopper: &Stopper) {
    if let Some(socket) = &stopper.0.lock().socket {
        let _ = socket.shutdown(Shutdown::Both);
    }
    let start = Instant::now();
    while !stopper.is_over() {
        if start.elapsed() > GRACE {
            stopper.0.lock().end();
        }
        thread::sleep(GLANCE);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn start(script: &str, stopper: &Stopper) -> (Process, UnixStream) {
        let words = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        Process::start(SshCommand { words, known_hosts: None }, stopper).unwrap()
    }

    fn pid(stopper: &Stopper) -> u32 {
        stopper.0.lock().child.as_ref().unwrap().id()
    }

    fn exists(pid: u32) -> bool {
        std::path::Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn both_directions_and_the_end() {
        let stopper = Stopper::default();
        let (process, mut socket) = start("cat; echo over >&2", &stopper);
        let pid = pid(&stopper);
        socket.write_all(b"hello").unwrap();
        let mut answer = [0; 5];
        socket.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"hello");
        drop(process);
        assert!(!exists(pid), "it is not waited for");
    }

    #[test]
    fn one_that_does_not_end_is_killed_with_its_children() {
        let stopper = Stopper::default();
        let (process, mut socket) = start("trap '' HUP TERM PIPE; sleep 1000 & echo $!; wait", &stopper);
        let mut text = [0; 16];
        let length = socket.read(&mut text).unwrap();
        let sleeping: u32 = String::from_utf8_lossy(&text[..length]).trim().parse().unwrap();
        assert!(exists(sleeping));
        let begin = Instant::now();
        drop(process);
        assert!(begin.elapsed() < Duration::from_secs(3));
        let gone = || !exists(sleeping) || fs_state(sleeping) == Some('Z');
        let begin = Instant::now();
        while !gone() && begin.elapsed() < Duration::from_secs(3) {
            thread::sleep(GLANCE);
        }
        assert!(gone());
    }

    /// The state of a process; orphans may have nobody who waits for them in a test's container.
    fn fs_state(pid: u32) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(')').next()?.trim().chars().next()
    }

    #[test]
    fn stopping_wakes_who_waits_and_can_come_first() {
        let stopper = Stopper::default();
        let (_process, mut socket) = start("sleep 1000", &stopper);
        let waiting = thread::spawn(move || socket.read(&mut [0]).map_or(0, |n| n));
        thread::sleep(Duration::from_millis(50));
        let begin = Instant::now();
        stopper.stop();
        assert_eq!(waiting.join().unwrap(), 0);
        assert!(begin.elapsed() < Duration::from_secs(1));

        let stopper = Stopper::default();
        stopper.stop();
        let (_process, mut socket) = start("sleep 1000", &stopper);
        assert_eq!(socket.read(&mut [0]).unwrap_or(0), 0);
    }

    #[test]
    fn what_it_says_is_passed_on_and_its_end_is_kept() {
        let stopper = Stopper::default();
        let (process, mut socket) =
            start("cat >/dev/null & read x; head -c 100000 /dev/zero >&2; echo no >&2; echo", &stopper);
        let heard: Arc<Mutex<usize>> = Arc::default();
        let count = heard.clone();
        process.set_sink(Some(Box::new(move |bytes| *count.lock() += bytes.len())));
        socket.write_all(b"\n").unwrap();
        assert_eq!(socket.read(&mut [0]).unwrap(), 1);
        process.settle();
        assert_eq!(*heard.lock(), 100_003);
        let explained = process.explain(ClientError::Late);
        let ClientError::Process { said, .. } = explained else { panic!("{explained}") };
        assert!(said.ends_with("no") && said.len() <= TAIL);
    }

    #[test]
    fn what_cannot_be_started() {
        let words = vec!["/nowhere/ssh".to_owned()];
        let failed = Process::start(SshCommand { words, known_hosts: None }, &Stopper::default());
        assert!(matches!(failed, Err(ClientError::Spawn { command, .. }) if command == "/nowhere/ssh"));
    }
}
