//! The two that are compared: stock's daemon and castored, each in a room of its own, reached from outside.

use std::path::PathBuf;
use std::sync::mpsc;
use std::thread::JoinHandle;

use compat_tests::load::Connection;
use compat_tests::machine::Machine;
use compat_tests::subject::{SOCKET, default_conf};
use compat_tests::{Error, Result, Room, Subject};
use nix::unistd::Pid;

use crate::build::{Figure, median, show};

/// What stock 2.34.8's own client speaks.
pub(crate) const MINOR: u64 = 38;

/// Something to be done inside a side's room.
type Job = Box<dyn FnOnce(&Room) + Send>;

/// One daemon, running.
pub(crate) struct Side {
    pub(crate) socket: PathBuf,
    pub(crate) pid: Pid,
    /// Whether it is stock's, which has its paths as plain files.
    pub(crate) stock: bool,
    pub(crate) subject: Subject,
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<Result<()>>,
}

impl Side {
    /// Starts a daemon in a room that a thread of its own enters.
    pub(crate) fn start(name: &'static str, subject: Subject) -> Result<Self> {
        Self::start_with(name, subject, default_conf())
    }

    /// The same with this nix.conf.
    pub(crate) fn start_with(name: &'static str, subject: Subject, conf: String) -> Result<Self> {
        let (tell, told) = mpsc::channel();
        let (jobs, given) = mpsc::channel::<Job>();
        let (stock, started) = (subject.is_stock(), subject.clone());
        let thread = std::thread::spawn(move || -> Result<()> {
            let room = Room::enter(name)?;
            let daemon = started.start_with(&room, &conf)?;
            // The room's /nix is this directory for all others.
            let socket = room.dir().join(SOCKET.trim_start_matches('/'));
            if tell.send((socket, daemon.pid())).is_ok() {
                // Until the one who gives them is gone.
                given.into_iter().for_each(|job| job(&room));
            }
            daemon.stop().map(drop)
        });
        match told.recv() {
            Ok((socket, pid)) => Ok(Self { socket, pid, stock, subject, jobs, thread }),
            Err(_) => Err(joined(thread).err().unwrap_or_else(|| Error::Wrong("the daemon did not start".into()))),
        }
    }

    /// A new connection.
    pub(crate) fn connect(&self) -> Result<Connection> {
        Connection::open(&self.socket, MINOR)
    }

    /// Does something in the room of the daemon, where clients find it, and waits for it.
    pub(crate) fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Room) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (tell, told) = mpsc::channel();
        let job: Job = Box::new(move |room| {
            // Nobody hears it if the one who waits is gone.
            let _ = tell.send(work(room));
        });
        let gone = || Error::Wrong("the thread of a daemon is gone".into());
        self.jobs.send(job).map_err(|_| gone())?;
        told.recv().map_err(|_| gone())?
    }

    pub(crate) fn stop(self) -> Result<()> {
        drop(self.jobs);
        joined(self.thread)
    }
}

fn joined(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_| Err(Error::Wrong("the thread of a daemon panicked".into())))
}

/// Measures the same with one and the other in turn, each time with a daemon that is started anew on an empty store, with
/// this nix.conf. Prints the medians of the rounds; answers whether all targets are reached.
pub(crate) fn compare(
    machine: &Machine,
    rounds: usize,
    conf: &str,
    measure: impl Fn(&Side) -> Result<Vec<Figure>>,
) -> Result<bool> {
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (subject, figures) in
            [Subject::stock(machine.newest()), Subject::from_environment()?].into_iter().zip(&mut figures)
        {
            let name = if subject.is_stock() { "bench-stock" } else { "bench-castored" };
            let side = Side::start_with(name, subject, conf.to_owned())?;
            let measured = measure(&side);
            side.stop()?;
            figures.push(measured?);
        }
    }
    let [stock, castored] = &figures;
    let lines = (0..castored[0].len()).map(|n| show(&castored[0][n], median(stock, n), median(castored, n)));
    Ok(lines.fold(true, |kept, line| kept & line))
}

/// Both of them.
pub(crate) struct Sides {
    pub(crate) stock: Side,
    pub(crate) castored: Side,
}

impl Sides {
    pub(crate) fn start(machine: &Machine) -> Result<Self> {
        let castored = Side::start("bench-castored", Subject::from_environment()?)?;
        let stock = Side::start("bench-stock", Subject::stock(machine.newest()))?;
        Ok(Self { stock, castored })
    }

    pub(crate) fn stop(self) -> Result<()> {
        self.stock.stop().and(self.castored.stop())
    }
}
