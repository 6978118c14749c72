//! The server's side: what it was handed, and what is to be kept for its successor.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::channel::send;

/// The name under which a keeper hands over the socket for messages to it.
pub(crate) const CHANNEL: &str = "keeper";
/// How long a service manager may take to store what it was sent.
const BARRIER: Duration = Duration::from_secs(5);

/// Whoever started this server: a [`Keeper`](crate::Keeper), systemd, or somebody who keeps nothing.
#[derive(Debug)]
pub struct Manager {
    channel: Option<Channel>,
    given: Mutex<Vec<(String, OwnedFd)>>,
    /// Names under which something is kept.
    names: Mutex<BTreeSet<String>>,
    keeps: bool,
}

#[derive(Debug)]
enum Channel {
    Keeper(OwnedFd),
    Service(UnixDatagram),
}

/// Whether this process was started by a keeper.
pub fn by_keeper() -> bool {
    let ours = std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    ours && std::env::var("LISTEN_FDNAMES").is_ok_and(|names| names.split(':').any(|name| name == CHANNEL))
}

/// Whether this process was started by a service manager that keeps descriptors, which systemd says since version 254.
pub fn by_service_manager() -> bool {
    let room = std::env::var("FDSTORE").ok().and_then(|room| room.parse::<u32>().ok());
    room.is_some_and(|room| room > 0) && std::env::var_os("NOTIFY_SOCKET").is_some()
}

impl Manager {
    /// Takes what this process was handed when it was started. To be called once, before anything else opens or closes
    /// descriptors.
    ///
    /// # Errors
    /// When the variables that tell of it make no sense, or the manager cannot be reached.
    pub fn from_environment() -> io::Result<Manager> {
        let mut given = given()?;
        let names = given.iter().map(|(name, _)| name.clone()).collect();
        let keeper = given.iter().position(|(name, _)| name == CHANNEL).map(|at| given.remove(at).1);
        let (channel, keeps) = match keeper {
            Some(keeper) => (Some(Channel::Keeper(keeper)), true),
            None => (notify_socket()?.map(Channel::Service), by_service_manager()),
        };
        Ok(Manager { channel, given: Mutex::new(given), names: Mutex::new(names), keeps })
    }

    /// Whether descriptors are kept for a successor.
    pub fn keeps(&self) -> bool {
        self.keeps
    }

    /// A descriptor that was handed over under this name; each only once.
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        self.take_if(|other| other == name)
    }

    /// A descriptor whose name is none of these: what a socket unit of systemd gives has the unit's name.
    pub fn take_other(&self, names: &[&str]) -> Option<OwnedFd> {
        self.take_if(|other| !names.contains(&other))
    }

    fn take_if(&self, wanted: impl Fn(&str) -> bool) -> Option<OwnedFd> {
        let mut given = lock(&self.given);
        let at = given.iter().position(|(name, _)| wanted(name))?;
        Some(given.remove(at).1)
    }

    /// Has a copy of a descriptor kept under this name, if anything is kept at all.
    ///
    /// # Errors
    /// When the manager is gone.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        if !self.keeps {
            return Ok(());
        }
        // What epoll says of a descriptor is no reason to drop it: the device polls as an error while nothing is mounted.
        lock(&self.names).insert(name.to_owned());
        self.say(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), Some(descriptor))
    }

    /// Has the descriptor of this name kept no longer.
    ///
    /// # Errors
    /// When the manager is gone.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        if !self.keeps {
            return Ok(());
        }
        self.say(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)
    }

    /// Has nothing kept any longer: there will be no successor.
    ///
    /// # Errors
    /// When the manager is gone.
    pub fn remove_all(&self) -> io::Result<()> {
        let names = std::mem::take(&mut *lock(&self.names));
        names.iter().try_for_each(|name| self.remove(name))
    }

    /// Waits until what was said has arrived. A keeper reads it also after our death; systemd may not know by then that it
    /// was us.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn settle(&self) -> io::Result<()> {
        let Some(Channel::Service(_)) = &self.channel else { return Ok(()) };
        let (reader, writer) = io::pipe()?;
        self.say("BARRIER=1", Some(writer.as_fd()))?;
        drop(writer);
        let patience = PollTimeout::try_from(BARRIER).unwrap_or(PollTimeout::NONE);
        match poll(&mut [PollFd::new(reader.as_fd(), PollFlags::empty())], patience)? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }

    /// Says that the server serves.
    ///
    /// # Errors
    /// When the manager is gone.
    pub fn ready(&self) -> io::Result<()> {
        self.say("READY=1", None)
    }

    fn say(&self, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        match &self.channel {
            Some(Channel::Keeper(socket)) => send(socket.as_fd(), text, descriptor),
            Some(Channel::Service(socket)) => send(socket.as_fd(), text, descriptor),
            // Nobody to tell.
            None => Ok(()),
        }
    }
}

/// What whoever started this process has handed over, with names. To be called once, before anything else opens or closes
/// descriptors.
///
/// # Errors
/// When the variables that tell of it make no sense.
pub fn given() -> io::Result<Vec<(String, OwnedFd)>> {
    let descriptors = sd_notify::listen_fds_with_names()?;
    // SAFETY: whoever started us says that they are ours, and nobody here has seen them yet.
    Ok(descriptors.map(|(number, name)| (name, unsafe { OwnedFd::from_raw_fd(number) })).collect())
}

/// A panic of another thread leaves these lists as good as they were.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The socket for messages to a service manager. (The sd-notify crate, which finds the descriptors, knows no abstract
/// addresses.)
pub(crate) fn notify_socket() -> io::Result<Option<UnixDatagram>> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(None) };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(Some(socket))
}
