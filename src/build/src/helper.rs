//! The daemon's end of a sandbox helper: starting it, reading its log, learning its end.

use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::fchown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::sandbox::{HELPER_NAME, Identity, MAX_SHOWN_AT_ONCE, Report, Spec};

/// Longest report taken from a helper.
const MAX_REPORT_BYTES: u64 = 64 * 1024;

/// A running build's processes.
///
/// Dropping it kills them all, waits for the helper and therefore for every process of the build.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    socket: UnixStream,
    window: Option<Window>,
}

/// What a running builder sees of the store, to be extended.
#[derive(Debug)]
pub struct Window(BufReader<UnixStream>);

impl Window {
    /// Shows store objects to the builder, named by their base names. Waits until it can see them.
    ///
    /// # Errors
    /// When one cannot be shown, or the builder is gone.
    pub fn show(&mut self, names: &[&str]) -> io::Result<()> {
        for names in names.chunks(MAX_SHOWN_AT_ONCE) {
            let mut line = serde_json::to_vec(names)?;
            line.push(b'\n');
            self.0.get_mut().write_all(&line)?;
            let mut answer = Vec::new();
            if (&mut self.0).take(MAX_REPORT_BYTES).read_until(b'\n', &mut answer)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the builder is gone"));
            }
            if let Some(error) = serde_json::from_slice::<Option<String>>(&answer)? {
                return Err(io::Error::other(error));
            }
        }
        Ok(())
    }
}

/// Ends a build from another thread.
#[derive(Debug)]
pub struct Killer(UnixStream);

impl Killer {
    /// Makes the helper kill the builder; returns at once.
    pub fn kill(&self) {
        // Fails only when the helper is gone already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

impl Helper {
    /// Starts the build that `spec` describes. The pipe is its standard output and error; it ends when the last
    /// process of the build has.
    pub fn spawn(exe: &Path, spec: &Spec) -> io::Result<(Self, PipeReader)> {
        let (socket, theirs) = UnixStream::pair()?;
        let (log, write) = io::pipe()?;
        if let Identity::BuildUser { uid, gid, .. } = spec.identity {
            // Else the builder could write to it, but not open it anew, as /dev/stderr.
            fchown(&write, Some(uid), Some(gid))?;
        }
        let (window, stdout) = if spec.grows {
            let (window, theirs) = UnixStream::pair()?;
            (Some(Window(BufReader::new(window))), Stdio::from(OwnedFd::from(theirs)))
        } else {
            (None, Stdio::from(write.try_clone()?))
        };
        let child = Command::new(exe)
            .arg0(HELPER_NAME)
            .env_clear()
            .current_dir("/")
            .stdin(OwnedFd::from(theirs))
            .stdout(stdout)
            .stderr(Stdio::from(write))
            .spawn()?;
        let mut helper = Self { child, socket, window };
        helper.socket.write_all(&serde_json::to_vec(spec)?)?;
        helper.socket.shutdown(Shutdown::Write)?;
        Ok((helper, log))
    }

    /// What the builder sees of the store; none when that does not grow, or was taken before.
    pub fn take_window(&mut self) -> Option<Window> {
        self.window.take()
    }

    /// A handle that ends the build.
    pub fn killer(&self) -> io::Result<Killer> {
        Ok(Killer(self.socket.try_clone()?))
    }

    /// Becomes readable when the helper has nothing more to say: every process of the build is gone, or it was killed.
    pub fn end(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The helper's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end of the build. When this returns, none of its processes is left.
    ///
    /// `None`: it was killed, and there is nothing to say about it.
    pub fn wait(mut self) -> io::Result<Option<Report>> {
        let mut line = Vec::new();
        (&self.socket).take(MAX_REPORT_BYTES).read_to_end(&mut line)?;
        self.child.wait()?;
        if line.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&line)?))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        // The helper has the builder as its child and ends only after it, so this waits for both.
        let _ = self.child.wait();
    }
}
