//! The parent's side: one loop that waits for signals, for the server's messages, and for those who want it replaced.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::backoff::{Deaths, Limits};
use crate::channel::{Message, receive};
use crate::manager::{CHANNEL, notify_socket};
use crate::replace::DONE;
use crate::{channel, orphans, spawn};

/// The most descriptors that are kept.
const MAX_STORED: usize = 32;
/// How long somebody who wants the server replaced may take to say so, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often to look whether a server has been killed and cannot die. (That it died would come as a signal.)
const LOOK: Duration = Duration::from_secs(2);
/// Tells a server to end and to leave to its successor what is kept.
const HAND_OVER: Signal = Signal::SIGUSR2;

/// What to run, and how.
#[derive(Debug)]
pub struct Config {
    /// The server's program.
    pub program: OwnedFd,
    /// Its arguments, the first being its name.
    pub arguments: Vec<CString>,
    /// Descriptors that a service manager gave, with their names. They are handed on to each server.
    pub given: Vec<(String, OwnedFd)>,
    /// Where to listen for [`replace::ask`](crate::replace::ask). The directory has to be there when a server is ready, and
    /// whoever may enter it may have the server replaced.
    pub control: PathBuf,
    /// How patient to be.
    pub limits: Limits,
    /// Given what is kept, gets an answer to threads that were killed and cannot die while nobody answers them.
    pub release: fn(&[(String, OwnedFd)], &[u32]),
}

/// How it ended.
#[derive(Debug)]
pub struct End {
    /// The server's exit code, or 128 and the signal that killed it.
    pub code: u8,
    /// What is still kept: nothing when the server ended in order, everything when it could not be kept alive.
    pub kept: Vec<(String, OwnedFd)>,
}

/// The keeper itself could not work.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {source}")]
pub struct KeeperError {
    /// What was tried.
    action: &'static str,
    /// Why it failed.
    source: io::Error,
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> KeeperError {
    move |source| KeeperError { action, source: source.into() }
}

/// Keeps one server alive.
#[derive(Debug)]
pub struct Keeper {
    config: Config,
    signals: SignalFd,
    stored: Vec<(String, OwnedFd)>,
    /// Children that whoever executed the keeper had started before.
    spared: Vec<Pid>,
    control: Option<UnixListener>,
    /// The program that is to take the server's place.
    next: Option<OwnedFd>,
    /// The program to go back to when the new one never gets ready.
    previous: Option<OwnedFd>,
    /// Who wants the server replaced and has not been answered.
    asker: Option<UnixStream>,
    stopping: bool,
    /// Whether any server has been ready yet.
    served: bool,
}

/// What there is of a running server.
struct Server {
    pid: Pid,
    channel: OwnedFd,
    /// Since when it has been ready.
    ready: Option<Instant>,
    /// It has closed its end of the channel, most likely because it is about to end.
    silent: bool,
    /// When it is killed unless it has ended by then.
    until: Option<Instant>,
}

impl Keeper {
    /// Prepares: blocks the signals it listens to, and becomes the parent of what dead servers leave behind. The process
    /// must have no other thread.
    ///
    /// # Errors
    /// [`KeeperError`].
    pub fn new(config: Config) -> Result<Keeper, KeeperError> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, HAND_OVER] {
            mask.add(signal);
        }
        mask.thread_block().map_err(failed("block signals"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(failed("listen for signals"))?;
        set_child_subreaper(true).map_err(failed("become the parent of orphans"))?;
        Ok(Keeper {
            config,
            signals,
            stored: Vec::new(),
            spared: orphans::children(),
            control: None,
            next: None,
            previous: None,
            asker: None,
            stopping: false,
            served: false,
        })
    }

    /// Runs one server after the other until one ends in order, the keeper is told to end, or too many servers in a row
    /// end before they are ready.
    ///
    /// # Errors
    /// [`KeeperError`]: no server runs any more.
    pub fn run(mut self) -> Result<End, KeeperError> {
        let mut deaths = Deaths::default();
        loop {
            let (status, served) = self.serve()?;
            let code = exit_code(status);
            let held = orphans::kill_all(&self.spared);
            if !held.is_empty() {
                (self.config.release)(&self.stored, &held);
                orphans::kill_all(&self.spared);
            }
            if self.stored.is_empty() || self.stopping {
                self.answer("the daemon has ended");
                return Ok(self.end(code));
            }
            deaths.note(served, &self.config.limits);
            if self.switch(served.is_some()) {
                deaths = Deaths::default();
                continue;
            }
            let Deaths { failures, in_service } = deaths;
            let Some(rest) = deaths.rest(&self.config.limits) else {
                tracing::error!(failures, ?status, "the server ends again and again before it is ready: giving up");
                self.answer("the daemon cannot be started any more");
                return Ok(self.end(code.max(1)));
            };
            tracing::warn!(
                ?status,
                failures,
                in_service,
                ?rest,
                "the server has died and is started again; the mount waits for it"
            );
            self.pause(rest)?;
            if self.stopping {
                return Ok(self.end(code));
            }
        }
    }

    fn end(&mut self, code: u8) -> End {
        if self.control.is_some() {
            // Whatever is left of it is replaced by the next keeper.
            let _ = fs::remove_file(&self.config.control);
        }
        End { code, kept: std::mem::take(&mut self.stored) }
    }

    /// After a server's end: whether another program is to run next.
    fn switch(&mut self, ready: bool) -> bool {
        if let Some(next) = self.next.take() {
            self.previous = Some(std::mem::replace(&mut self.config.program, next));
            return true;
        }
        let Some(previous) = self.previous.take_if(|_| !ready) else { return false };
        tracing::error!("the new server has ended before it was ready; going back to the old one");
        self.config.program = previous;
        self.answer("the new daemon ended before it was ready, so the old one runs again; the log says why");
        true
    }

    fn answer(&mut self, line: &str) {
        if let Some(mut asker) = self.asker.take() {
            // Who has gone does not want to know.
            let _ = writeln!(asker, "{line}");
        }
    }

    /// Runs one server to its end: how it ended, and how long it had been ready, if it was at all.
    fn serve(&mut self) -> Result<(WaitStatus, Option<Duration>), KeeperError> {
        let (channel, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(failed("make a socket pair"))?;
        let mut descriptors: Vec<(&str, BorrowedFd<'_>)> = vec![(CHANNEL, theirs.as_fd())];
        let kept = self.stored.iter().chain(&self.config.given);
        descriptors.extend(kept.map(|(name, descriptor)| (name.as_str(), descriptor.as_fd())));
        let pid = spawn::spawn(self.config.program.as_fd(), &self.config.arguments, &descriptors)
            .map_err(failed("start a process"))?;
        drop(theirs);
        let mut server = Server { pid, channel, ready: None, silent: false, until: None };
        if self.stopping {
            self.ask_to_end(&mut server, Signal::SIGTERM);
        }
        loop {
            let left = server.until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                tracing::error!("the server does not end and is killed");
                let _ = kill(server.pid, Signal::SIGKILL);
                server.until = None;
                continue;
            }
            let limit = left.map_or(LOOK, |left| left.min(LOOK));
            let [signalled, spoke, asked] = self.wait(Some(&server), limit)?;
            if !(signalled || spoke || asked) {
                let held = orphans::dying(server.pid);
                if !held.is_empty() {
                    (self.config.release)(&self.stored, &held);
                }
            }
            if spoke {
                self.listen(&mut server);
            }
            if asked {
                self.consider(&mut server);
            }
            if signalled && let Some(status) = self.take_signals(Some(&mut server)) {
                // What it said before it died.
                self.listen(&mut server);
                return Ok((status, server.ready.map(|since| since.elapsed())));
            }
        }
    }

    /// Rests, unless told to end.
    fn pause(&mut self, rest: Duration) -> Result<(), KeeperError> {
        let until = Instant::now() + rest;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || self.stopping {
                return Ok(());
            }
            if self.wait(None, left)?[0] {
                self.take_signals(None);
            }
        }
    }

    /// Waits for a signal, for the server to say something, or for somebody who wants it replaced; no longer than `limit`.
    fn wait(&self, server: Option<&Server>, limit: Duration) -> Result<[bool; 3], KeeperError> {
        // Rounded up, so that nothing is waited for in a loop.
        let limit = PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let signals = self.signals.as_fd();
        let channel = server.filter(|server| !server.silent).map(|server| server.channel.as_fd());
        let control = self.control.as_ref().filter(|_| server.is_some()).map(UnixListener::as_fd);
        let or_nothing = |fd: Option<BorrowedFd<'_>>| match fd {
            Some(_) => PollFlags::POLLIN,
            None => PollFlags::empty(),
        };
        let mut fds = [
            PollFd::new(signals, PollFlags::POLLIN),
            PollFd::new(channel.unwrap_or(signals), or_nothing(channel)),
            PollFd::new(control.unwrap_or(signals), or_nothing(control)),
        ];
        match poll(&mut fds, limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed("wait")(errno)),
        }
        Ok(fds.map(|fd| fd.revents().is_some_and(|events| events.intersects(PollFlags::POLLIN))))
    }

    /// Does what signals ask for. The server's end, if that is among them.
    fn take_signals(&mut self, mut server: Option<&mut Server>) -> Option<WaitStatus> {
        let mut end = None;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => {}
                _ => {
                    self.stopping = true;
                    if let Some(server) = server.as_deref_mut() {
                        self.ask_to_end(server, Signal::SIGTERM);
                    }
                }
            }
        }
        // Signals of one kind come as one: look for all children.
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(status @ (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..))) => {
                    if server.as_ref().is_some_and(|server| server.pid == pid) {
                        end = Some(status);
                    }
                }
                Err(Errno::EINTR) => {}
                _ => return end,
            }
        }
    }

    fn ask_to_end(&self, server: &mut Server, signal: Signal) {
        let _ = kill(server.pid, signal);
        server.until.get_or_insert(Instant::now() + self.config.limits.farewell);
    }

    /// Takes what the server has to say.
    fn listen(&mut self, server: &mut Server) {
        loop {
            let (text, descriptors) = match receive(server.channel.as_fd()) {
                Ok(Some(message)) => message,
                Ok(None) => return server.silent = true,
                // Nothing more for now, or it is broken and will end.
                Err(_) => return,
            };
            match Message::parse(&text, descriptors) {
                Message::Store(name, descriptors) => {
                    for descriptor in descriptors {
                        if self.stored.len() < MAX_STORED {
                            self.stored.push((name.clone(), descriptor));
                        } else {
                            tracing::warn!(name, "not keeping more than {MAX_STORED} descriptors");
                        }
                    }
                }
                Message::Remove(name) => self.stored.retain(|(other, _)| *other != name),
                Message::Ready => self.welcome(server),
                Message::Other => {}
            }
        }
    }

    /// A server is ready.
    fn welcome(&mut self, server: &mut Server) {
        server.ready = Some(Instant::now());
        self.previous = None;
        self.answer(DONE);
        if std::mem::replace(&mut self.served, true) {
            return;
        }
        // The server holds its state directory for itself: what is there is a dead keeper's.
        let _ = fs::remove_file(&self.config.control);
        match UnixListener::bind(&self.config.control) {
            Ok(listener) => self.control = Some(listener),
            Err(error) => {
                let path = self.config.control.display();
                tracing::warn!(%path, %error, "cannot listen there; the server cannot be replaced");
            }
        }
        match notify_socket() {
            Ok(Some(socket)) => drop(channel::send(socket.as_fd(), "READY=1", None)),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "cannot tell the service manager that the server is ready"),
        }
    }

    /// Somebody wants another program to serve.
    fn consider(&mut self, server: &mut Server) {
        let Some(Ok((stream, _))) = self.control.as_ref().map(UnixListener::accept) else { return };
        let patience = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::ZERO);
        let spoke = poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], patience);
        let message = spoke.ok().filter(|count| *count > 0).and_then(|_| receive(stream.as_fd()).ok().flatten());
        let Some(program) = message.and_then(|(_, mut descriptors)| descriptors.pop()) else { return };
        let mut stream = stream;
        let _ = stream.set_write_timeout(Some(PATIENCE));
        if self.asker.is_some() || self.stopping || server.ready.is_none() {
            let _ = writeln!(stream, "the daemon is starting or ending at this moment; try again");
            return;
        }
        tracing::info!("the server makes room for a new one; the mount waits for it");
        self.asker = Some(stream);
        self.next = Some(program);
        self.ask_to_end(server, HAND_OVER);
    }
}

fn exit_code(status: WaitStatus) -> u8 {
    match status {
        WaitStatus::Exited(_, code) => u8::try_from(code).unwrap_or(1),
        WaitStatus::Signaled(_, signal, _) => 128 + signal as u8,
        _ => 1,
    }
}
