//! Programs that settings have the daemon run around a build.
//!
//! | setting | when | what it is told |
//! |---|---|---|
//! | `pre-build-hook` | before the sandbox is made | arguments: derivation, root of the sandbox; its output adds sandbox paths |
//! | `diff-hook` | a check found another output, with `run-diff-hook` | arguments: valid output, rebuilt one, derivation, build directory |
//! | `post-build-hook` | the outputs are valid | `DRV_PATH`, `OUT_PATHS` |
//!
//! They run as stock Nix runs them (measured with 2.34.8): as the daemon, except the diff hook, which reads what a
//! builder made and therefore is that builder's user. Only the administrator and trusted clients can set them.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use nix_compat::conf::{SandboxPath, Settings};
use nix_compat::store_path::{StoreDir, StorePath};

use crate::failure::Failure;
use crate::log::LineSplitter;
use crate::oom;
use crate::options::Options;
use crate::run::{Control, signal_name};
use crate::sandbox::Identity;
use crate::scheduler::feed::Feed;

/// How many post-build hooks run at once in the whole daemon. They hold no job, so jobs do not bound them.
pub(crate) const MAX_POST_BUILD_HOOKS: usize = 16;

/// Most that is taken of what a pre-build hook says, in bytes.
const MAX_COMMANDS: usize = 1 << 20;

/// How often it is looked whether a hook has ended, or is not wanted any more.
const LOOK: Duration = Duration::from_millis(50);

/// How long after a hook's end its output is still read. A process it left behind may hold the pipe open for ever.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Bytes of output read at once.
const PIECE: usize = 16 * 1024;

/// The hooks that a client's settings name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hooks {
    pub(crate) pre_build: Option<PathBuf>,
    pub(crate) post_build: Option<PathBuf>,
    pub(crate) diff: Option<PathBuf>,
    /// The settings a hook finds in `NIX_CONFIG`, so that the Nix commands in it go by them too.
    nix_config: String,
}

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    #[error("cannot run \"{program}\": {source}")]
    Start { program: String, source: io::Error },
    #[error("cannot read what \"{program}\" says: {source}")]
    Output { program: String, source: io::Error },
    #[error("program \"{program}\" {how}")]
    Failed { program: String, how: String },
    #[error("unknown pre-build hook command '{0}'")]
    UnknownCommand(String),
    #[error("the pre-build hook says more than {MAX_COMMANDS} bytes")]
    TooMuch,
    #[error("interrupted by the user")]
    Cancelled,
}

impl From<HookError> for Failure {
    /// Another client may have no such hook.
    fn from(error: HookError) -> Self {
        Failure::misc(error).by_settings()
    }
}

impl Hooks {
    pub(crate) fn new(settings: &Settings) -> Self {
        let path = |setting: &Option<String>| setting.as_ref().map(PathBuf::from);
        let mut hooks = Self {
            pre_build: path(&settings.pre_build_hook),
            post_build: path(&settings.post_build_hook),
            diff: path(&settings.diff_hook).filter(|_| settings.run_diff_hook),
            nix_config: String::new(),
        };
        if hooks.post_build.is_some() {
            hooks.nix_config = settings.changed().iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
        }
        hooks
    }
}

/// Outputs that have just become valid, for the post-build hook. Nothing of the build is held any more.
pub(crate) struct PostBuild {
    pub(crate) store_dir: StoreDir,
    pub(crate) options: Arc<Options>,
    pub(crate) config: Arc<crate::BuildConfig>,
    pub(crate) drv: StorePath,
    pub(crate) outputs: BTreeSet<StorePath>,
}

impl PostBuild {
    /// Runs the hook, if there is one, and shows watchers what it says. Blocks until it ends.
    pub(crate) fn run(&self, control: &Control, feed: &Feed) -> Result<(), HookError> {
        let Some(hook) = &self.options.hooks.post_build else { return Ok(()) };
        let drv = self.store_dir.display(&self.drv);
        let outputs: Vec<String> = self.outputs.iter().map(|path| self.store_dir.display(path)).collect();
        let mut program = Program::new(hook);
        program.env.extend(self.config.client_env.iter().map(|(name, value)| (name.clone(), value.clone())));
        program.env.push(("DRV_PATH".into(), drv.clone().into()));
        program.env.push(("OUT_PATHS".into(), outputs.join(" ").into()));
        program.env.push(("NIX_CONFIG".into(), self.options.hooks.nix_config.clone().into()));
        feed.hook_started(drv, format!("running post-build-hook '{}'", hook.display()));
        let result = program.run(control, &mut |line| feed.hook_line(line));
        feed.hook_ended();
        result
    }
}

/// Asks the pre-build hook for sandbox paths: targets, and what is shown there. Blocks.
pub(crate) fn ask_pre_build(
    hook: &Path,
    drv: &str,
    sandbox_root: Option<&Path>,
    control: &Control,
) -> Result<Vec<(String, SandboxPath)>, HookError> {
    let mut program = Program::new(hook);
    program.only_stdout = true;
    program.args.push(drv.into());
    program.args.extend(sandbox_root.map(OsString::from));
    let mut lines = Vec::new();
    let mut size = 0;
    program.run(control, &mut |line| {
        size += line.len() + 1;
        if size <= MAX_COMMANDS {
            lines.push(String::from_utf8_lossy(line).into_owned());
        }
    })?;
    if size > MAX_COMMANDS { Err(HookError::TooMuch) } else { parse_commands(&lines) }
}

/// What a pre-build hook says: the line `extra-sandbox-paths`, then paths up to an empty line, any number of times.
fn parse_commands(lines: &[String]) -> Result<Vec<(String, SandboxPath)>, HookError> {
    let mut paths = Vec::new();
    let mut in_paths = false;
    for line in lines {
        match line.as_str() {
            "" => in_paths = false,
            path if in_paths => {
                let (target, source) = path.split_once('=').unwrap_or((path, path));
                paths.push((target.to_owned(), SandboxPath { source: source.to_owned(), optional: false }));
            }
            // The second is the name before there was another sandbox than a chroot.
            "extra-sandbox-paths" | "extra-chroot-dirs" => in_paths = true,
            other => return Err(HookError::UnknownCommand(other.to_owned())),
        }
    }
    Ok(paths)
}

/// Two outputs that should be equal.
pub(crate) struct Difference<'a> {
    pub(crate) valid: &'a Path,
    pub(crate) rebuilt: &'a Path,
    pub(crate) drv: &'a str,
    pub(crate) build_dir: &'a Path,
}

/// Shows the diff hook two outputs, and the watchers what it says of them. Its failure changes nothing. Blocks.
pub(crate) fn show_difference(hook: &Path, files: &Difference<'_>, identity: Identity, control: &Control, feed: &Feed) {
    let mut program = Program::new(hook);
    program.identity = identity;
    program.args =
        [files.valid.as_os_str(), files.rebuilt.as_os_str(), files.drv.as_ref(), files.build_dir.as_os_str()]
            .map(OsString::from)
            .into();
    let result = program.run(control, &mut |line| feed.note(&String::from_utf8_lossy(line)));
    if let Err(error) = result {
        feed.note(&format!("diff hook execution failed: {error}"));
    }
}

/// A program to be run to its end.
struct Program<'a> {
    path: &'a Path,
    args: Vec<OsString>,
    /// Beside the daemon's own environment.
    env: Vec<(OsString, OsString)>,
    identity: Identity,
    /// Whether its errors go to the daemon's log.
    only_stdout: bool,
}

impl<'a> Program<'a> {
    fn new(path: &'a Path) -> Self {
        Self { path, args: Vec::new(), env: Vec::new(), identity: Identity::Caller, only_stdout: false }
    }

    /// Runs it; `each` gets its lines as they come. It dies with all it started when `control` is cancelled.
    fn run(&self, control: &Control, each: &mut dyn FnMut(&[u8])) -> Result<(), HookError> {
        let name = || self.path.display().to_string();
        let start = |source| HookError::Start { program: name(), source };
        let output = |source| HookError::Output { program: name(), source };
        let (mut output_pipe, write) = io::pipe().map_err(start)?;
        let mut command = Command::new(self.path);
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        command.current_dir("/").stdin(Stdio::null()).process_group(0);
        if !self.only_stdout {
            command.stderr(write.try_clone().map_err(start)?);
        }
        command.stdout(write);
        if let Identity::BuildUser { uid, gid, .. } = self.identity {
            // Leaves all supplementary groups too.
            command.uid(uid).gid(gid);
        }
        let program = command.spawn().map_err(start)?;
        oom::expose_other(program.id());
        let mut group = ProcessGroup(Some(program));
        // It has the other end of the pipe.
        drop(command);
        fcntl(&output_pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|e| output(e.into()))?;

        let mut splitter = LineSplitter::default();
        let mut status: Option<(ExitStatus, Instant)> = None;
        loop {
            control.check().map_err(|_| HookError::Cancelled)?;
            let piece = read_piece(&mut output_pipe).map_err(output)?;
            if let Piece::Bytes(bytes) = &piece {
                splitter.feed(bytes, each);
            }
            if status.is_none() {
                status = group.look().map_err(output)?.map(|status| (status, Instant::now()));
            }
            let silent = matches!(piece, Piece::End);
            match &status {
                Some((_, ended)) if silent || ended.elapsed() > LAST_WORDS => break,
                // It goes on, but a pipe at its end is always readable.
                None if silent => std::thread::sleep(LOOK),
                _ => {}
            }
        }
        splitter.finish(each);
        let how = match status {
            Some((status, _)) if status.success() => return Ok(()),
            Some((status, _)) => describe(status),
            None => "has not ended".to_owned(),
        };
        Err(HookError::Failed { program: name(), how })
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (None, Some(signal)) => format!("failed due to signal {}", signal_name(signal)),
        (None, None) => "died abnormally".to_owned(),
    }
}

/// What a look at a pipe found.
enum Piece {
    Bytes(Vec<u8>),
    Nothing,
    End,
}

fn read_piece(pipe: &mut PipeReader) -> io::Result<Piece> {
    let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(Piece::Nothing),
        other => other?,
    };
    let mut bytes = vec![0; PIECE];
    match pipe.read(&mut bytes) {
        Ok(0) => Ok(Piece::End),
        Ok(length) => {
            bytes.truncate(length);
            Ok(Piece::Bytes(bytes))
        }
        Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => Ok(Piece::Nothing),
        Err(e) => Err(e),
    }
}

/// A program and what it started. Unless its end was seen, it is killed when dropped.
struct ProcessGroup(Option<Child>);

impl ProcessGroup {
    fn look(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.0.as_mut().map(Child::try_wait).transpose()?.flatten();
        if status.is_some() {
            self.0 = None;
        }
        Ok(status)
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        let Some(child) = &mut self.0 else { return };
        if let Ok(pid) = i32::try_from(child.id()) {
            // Not waited for yet, so the number is still that of our child.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pre_build_hook_may_say() {
        let parse = |text: &str| parse_commands(&text.lines().map(str::to_owned).collect::<Vec<_>>());
        let paths = parse("extra-sandbox-paths\n/a\n/b=/c\n\nextra-chroot-dirs\n/d\n").unwrap();
        let paths: Vec<(&str, &str)> = paths.iter().map(|(t, s)| (t.as_str(), s.source.as_str())).collect();
        assert_eq!(paths, [("/a", "/a"), ("/b", "/c"), ("/d", "/d")]);
        assert!(parse("").unwrap().is_empty());
        assert!(matches!(parse("extra-sandbox-paths\n\n/a\n"), Err(HookError::UnknownCommand(_))));
    }

    fn shell(script: &str, control: &Control) -> (Result<(), HookError>, Vec<String>) {
        let mut program = Program::new(Path::new("/bin/sh"));
        program.args = ["-c", script].map(OsString::from).into();
        let mut lines = Vec::new();
        let result = program.run(control, &mut |line| lines.push(String::from_utf8_lossy(line).into_owned()));
        (result, lines)
    }

    #[test]
    fn its_end_is_reported_and_its_lines_are_all_there() {
        let control = Control::default();
        let (result, lines) = shell("echo one; echo two >&2; printf three", &control);
        result.unwrap();
        assert_eq!(lines, ["one", "two", "three"]);
        for (script, text) in [
            ("exit 3", "program \"/bin/sh\" failed with exit code 3"),
            ("kill -9 $$", "program \"/bin/sh\" failed due to signal 9 (SIGKILL)"),
            ("exec >&- 2>&-; sleep 0.2; exit 4", "program \"/bin/sh\" failed with exit code 4"),
        ] {
            assert_eq!(shell(script, &control).0.unwrap_err().to_string(), text);
        }
        let start = Instant::now();
        // What it leaves behind holds nobody up.
        let (result, lines) = shell("sleep 30 & echo $!", &control);
        result.unwrap();
        assert!(start.elapsed() < Duration::from_secs(10));
        nix::sys::signal::kill(Pid::from_raw(lines[0].parse().unwrap()), Signal::SIGKILL).unwrap();
    }

    #[test]
    fn nobody_wants_it_any_more() {
        let control = Control::default();
        let start = Instant::now();
        std::thread::scope(|scope| {
            let hook = scope.spawn(|| shell("sleep 30 & echo $!; sleep 30", &control));
            std::thread::sleep(Duration::from_millis(300));
            control.cancel();
            let (result, lines) = hook.join().unwrap();
            assert!(matches!(result, Err(HookError::Cancelled)));
            let left = PathBuf::from(format!("/proc/{}/stat", lines[0]));
            while std::fs::read_to_string(&left).is_ok_and(|stat| !stat.contains(") Z")) {
                assert!(start.elapsed() < Duration::from_secs(10), "it left a process behind");
            }
        });
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
