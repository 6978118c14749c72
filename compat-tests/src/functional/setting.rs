//! The suite's files as its own build system would lay them out, and the environment of its tests.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::layout::Layout;
use crate::apt::run;
use crate::error::{Context, Error, Result};
use crate::room::USER;
use crate::{Release, Room, Subject};

/// The daemon side's `nix`, with `@client@` and `@daemon@` to be filled in.
const NIX: &str = include_str!("../../suites/nix");
/// Where the room has the suite: a short path, since the tests' sockets are deep below it.
const PLACE: &str = "/f";

/// A suite that is ready to be run.
#[derive(Debug)]
pub(crate) struct Setting {
    place: PathBuf,
    pub(crate) layout: &'static Layout,
    client: Release,
    path: String,
    shell: PathBuf,
}

impl Setting {
    /// Lays the suite out in the room that the calling thread is in.
    pub(crate) fn lay_out(
        room: &Room,
        layout: &'static Layout,
        client: &Release,
        subject: &Subject,
        source: &Path,
        tools: &Path,
    ) -> Result<Self> {
        let place = room.short(PLACE)?;
        let path = format!("{}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", tools.display());
        let shell = find(&path, "bash")?;
        let setting = Self { place, layout, client: client.clone(), path, shell };
        setting.copy_source(source)?;
        setting.configure()?;
        setting.make_daemon_package(room, subject)?;
        // Stores of another place have links into the usual one, which the tests resolve.
        for dir in [setting.temporary(), PathBuf::from("/nix/store")] {
            fs::create_dir(&dir).doing("creating", &dir)?;
        }
        let owner = format!("{0}:{0}", USER.id);
        run(Command::new("chown").args(["--recursive", &owner]).arg(&setting.place))?;
        Ok(setting)
    }

    /// The directory of the suite.
    pub(crate) fn tests(&self) -> PathBuf {
        self.place.join("source").join(self.layout.tests)
    }

    /// What the tests' build system would have made.
    fn build(&self) -> PathBuf {
        if self.layout.built_apart { self.place.join("build") } else { self.tests() }
    }

    /// The tests' TMPDIR, below which each has a directory.
    pub(crate) fn temporary(&self) -> PathBuf {
        self.place.join("t")
    }

    fn copy_source(&self, source: &Path) -> Result<()> {
        for part in self.layout.parts {
            let to = self.place.join("source").join(part);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).doing("creating", parent)?;
            }
            run(Command::new("cp").arg("--archive").arg(source.join(part)).arg(to))?;
        }
        let functions = self.tests().join(self.layout.functions);
        let text = fs::read_to_string(&functions).doing("reading", &functions)?;
        fs::write(&functions, format!("{text}\n{}", self.layout.appended)).doing("writing", &functions)
    }

    /// Fills in the templates.
    fn configure(&self) -> Result<()> {
        let (build, tests) = (self.build(), self.tests());
        let ls = find(&self.path, "ls")?;
        let coreutils = ls.parent().unwrap_or(Path::new("/bin"));
        let (bin, busybox) = (self.client.prefix.join("bin"), find(&self.path, "busybox")?);
        let values = [
            ("bash", self.shell.display().to_string()),
            ("bindir", bin.display().to_string()),
            ("coreutils", coreutils.display().to_string()),
            ("dot", String::new()),
            ("sandbox_shell", busybox.display().to_string()),
            ("PACKAGE_VERSION", self.client.version.clone()),
            ("system", "x86_64-linux".to_owned()),
        ];
        let fill = |template: &Path, to: &Path| -> Result<()> {
            let mut text = fs::read_to_string(template).doing("reading", template)?;
            for (name, value) in &values {
                text = text.replace(&format!("@{name}@"), value);
            }
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).doing("creating", parent)?;
            }
            fs::write(to, text).doing("writing", to)
        };
        for template in self.layout.templates {
            let name = template.strip_suffix(".in").unwrap_or(template);
            // Suites share one where they have none of their own.
            let own = tests.join(template);
            let shared = own.file_name().map(|name| tests.join(name)).filter(|_| !own.exists());
            fill(&shared.unwrap_or(own), &build.join(name))?;
        }
        Ok(())
    }

    /// A directory that looks to the suite like an installed Nix whose daemon is the one under test.
    fn make_daemon_package(&self, room: &Room, subject: &Subject) -> Result<()> {
        let bin = self.daemon_package().join("bin");
        fs::create_dir_all(&bin).doing("creating", &bin)?;
        let daemon = bin.join("nix-daemon");
        // A stock nix finds its libraries by its own place, and is where everybody can run it.
        let binary = if subject.is_stock() { subject.binary().to_owned() } else { subject.copy_into(room)? };
        symlink(&binary, &daemon).doing("linking", &daemon)?;
        let text = NIX.replace("@client@", &self.client.prefix.join("bin").display().to_string());
        let nix = bin.join("nix");
        fs::write(&nix, text.replace("@daemon@", &daemon.display().to_string())).doing("writing", &nix)?;
        fs::set_permissions(&nix, Permissions::from_mode(0o755)).doing("making executable", &nix)
    }

    fn daemon_package(&self) -> PathBuf {
        self.place.join("daemon")
    }

    /// A command in the environment of a test.
    pub(crate) fn command(&self, program: &str, suite: &str, test: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", &self.path).env("TMPDIR", self.temporary()).env("LC_ALL", "C.UTF-8");
        command.env("USER", USER.name).env("shell", &self.shell).env("_NIX_TEST_SOURCE_DIR", self.tests());
        command.env("_NIX_TEST_BUILD_DIR", self.build()).env("TEST_NAME", format!("{suite}/{test}"));
        command.env("NIX_CLIENT_PACKAGE", &self.client.prefix).env("NIX_DAEMON_PACKAGE", self.daemon_package());
        command.env("NIX_LIBEXEC_DIR", self.client.prefix.join("libexec"));
        if self.layout.misses_its_programs {
            command.env("NIX_BIN_DIR", self.client.prefix.join("bin"));
        }
        // Upstream runs the suite in a derivation's builder, where this is set.
        command.env("out", self.place.join("out"));
        command.env("NIX_REMOTE", "").env("NIX_STORE", "").env("PS4", "+(${BASH_SOURCE[0]-$0}:$LINENO) ");
        for passed in ["CASTORED_LOG", "RUST_BACKTRACE"] {
            command.envs(std::env::var_os(passed).map(|v| (passed, v)));
        }
        command
    }
}

/// A program in that PATH.
fn find(path: &str, program: &str) -> Result<PathBuf> {
    let found = path.split(':').map(|dir| Path::new(dir).join(program)).find(|file| file.exists());
    found.ok_or_else(|| Error::Wrong(format!("the suite needs {program}, which is not in {path}")))
}
