//! Debian packages: the machine's own mirror, and installing what is missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};

/// Where the machine's apt looks for its sources.
const SOURCES: &str = "/etc/apt";

/// Removes what is left of an earlier try.
pub(crate) fn remove_left(dirs: &[&Path]) -> Result<()> {
    for dir in dirs {
        if dir.exists() {
            fs::remove_dir_all(dir).doing("removing", *dir)?;
        }
    }
    Ok(())
}

/// The mirror of the main archive that this machine's apt is configured to use.
pub fn mirror() -> Result<String> {
    mirror_below(Path::new(SOURCES))
}

/// As [`mirror`], for a configuration directory other than `/etc/apt`.
fn mirror_below(etc: &Path) -> Result<String> {
    let mut files = vec![etc.join("sources.list")];
    let mut parts: Vec<PathBuf> =
        fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten().map(|e| e.path()).collect();
    parts.sort();
    files.append(&mut parts);
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let found = match file.extension().and_then(|e| e.to_str()) {
            Some("list") => one_line_mirror(&text),
            Some("sources") => deb822_mirror(&text),
            _ => None,
        };
        if let Some(uri) = found {
            return Ok(uri.trim_end_matches('/').to_owned());
        }
    }
    Err(Error::NoMirror(etc.display().to_string()))
}

/// Whether an entry is the main Debian archive rather than the security archive or somebody else's repository.
fn is_main_archive(uri: &str, suites: &str, components: &str) -> bool {
    uri.starts_with("http")
        && !uri.contains("security")
        && !suites.contains("security")
        && uri.trim_end_matches('/').ends_with("debian")
        && components.split_whitespace().any(|c| c == "main")
}

/// The older form: `deb [options] URI suite component...` on a line.
fn one_line_mirror(text: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let mut rest = line.trim().strip_prefix("deb ")?.trim_start();
        if let Some(options) = rest.strip_prefix('[') {
            rest = options.split_once(']')?.1.trim_start();
        }
        let (uri, rest) = rest.split_once(char::is_whitespace)?;
        let (suite, components) = rest.trim_start().split_once(char::is_whitespace)?;
        is_main_archive(uri, suite, components).then(|| uri.to_owned())
    })
}

/// The newer form: stanzas of `Field: value`, separated by empty lines.
fn deb822_mirror(text: &str) -> Option<String> {
    let text: Vec<&str> = text.lines().filter(|l| !l.starts_with('#')).collect();
    text.split(|l| l.trim().is_empty()).find_map(|stanza| {
        let field = |name: &str| {
            stanza.iter().find_map(|l| l.strip_prefix(name)?.strip_prefix(':').map(str::trim)).unwrap_or_default()
        };
        if field("Enabled").eq_ignore_ascii_case("no") || !field("Types").split_whitespace().any(|t| t == "deb") {
            return None;
        }
        field("URIs")
            .split_whitespace()
            .find(|uri| is_main_archive(uri, field("Suites"), field("Components")))
            .map(str::to_owned)
    })
}

/// A private apt configuration below a directory of ours: it resolves against nothing installed, so that a download
/// brings the whole dependency closure, and it leaves the machine's own apt alone.
#[derive(Debug)]
pub struct PrivateApt {
    dir: PathBuf,
}

impl PrivateApt {
    /// Sets the configuration up for one suite; `kind` is `deb` or `deb-src`. Fetches the package lists.
    pub fn new(dir: &Path, kind: &str, suite: &str) -> Result<Self> {
        for sub in [
            "etc/apt.conf.d",
            "etc/preferences.d",
            "etc/sources.list.d",
            "etc/trusted.gpg.d",
            "state/lists/partial",
            "cache/archives/partial",
        ] {
            let sub = dir.join(sub);
            fs::create_dir_all(&sub).doing("creating", &sub)?;
        }
        let write = |name: &str, text: String| fs::write(dir.join(name), text).doing("writing", dir.join(name));
        let keyring = ["gpg", "pgp", "asc"]
            .iter()
            .map(|ext| format!("/usr/share/keyrings/debian-archive-keyring.{ext}"))
            .find(|f| Path::new(f).exists())
            .map(|f| format!("[signed-by={f}] "))
            .unwrap_or_default();
        write("state/status", String::new())?;
        write("etc/sources.list", format!("{kind} {keyring}{} {suite} main\n", mirror()?))?;
        // Proxies and the like come from the machine; only the directories are ours.
        let machine = run(Command::new("apt-config").args(["dump", "Acquire"]))?;
        let d = dir.display();
        write(
            "apt.conf",
            format!(
                "{machine}\nDir \"{d}/\";\nDir::Etc \"{d}/etc\";\nDir::State \"{d}/state\";\nDir::State::status \
                 \"{d}/state/status\";\nDir::Cache \"{d}/cache\";\nAPT::Architecture \"amd64\";\n\
                 APT::Architectures {{ \"amd64\"; }};\nAPT::Install-Recommends \"false\";\n\
                 APT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\n\
                 Acquire::Check-Valid-Until \"false\";\n"
            ),
        )?;
        let apt = Self { dir: dir.to_owned() };
        run(apt.get().arg("update"))?;
        Ok(apt)
    }

    /// `apt-get` under this configuration.
    fn get(&self) -> Command {
        let mut command = Command::new("apt-get");
        command.env("APT_CONFIG", self.dir.join("apt.conf")).args(["-qq", "-y"]);
        command
    }

    /// Downloads packages and everything they depend on, which does not name what every system has; answers the package
    /// files.
    pub fn download_closure(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        run(self.get().args(["--download-only", "install"]).args(packages))?;
        let archives = self.dir.join("cache/archives");
        let mut debs = files_in(&archives)?;
        debs.retain(|f| f.extension().is_some_and(|e| e == "deb"));
        Ok(debs)
    }

    /// Downloads packages and everything they depend on, and unpacks below `root` those whose files' names are wanted.
    pub fn unpack_closure(&self, packages: &[&str], root: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<()> {
        for deb in self.download_closure(packages)? {
            if is_wanted(&deb.file_name().unwrap_or_default().to_string_lossy()) {
                run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(root))?;
            }
        }
        Ok(())
    }

    /// The packages that the suite has.
    pub fn available(&self) -> Result<Vec<Available>> {
        let mut command = Command::new("apt-cache");
        let text = run(command.env("APT_CONFIG", self.dir.join("apt.conf")).arg("dumpavail"))?;
        Ok(text.split("\n\n").filter_map(Available::parse).collect())
    }

    /// Downloads packages, and nothing they depend on, into `into`; answers the package files.
    pub fn download(&self, packages: &[&str], into: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(into).doing("creating", into)?;
        run(self.get().arg("download").args(packages).current_dir(into))?;
        files_in(into)
    }

    /// Downloads a source package into `into` without unpacking it; answers its files.
    pub fn download_source(&self, package: &str, into: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(into).doing("creating", into)?;
        run(self.get().args(["--download-only", "source", package]).current_dir(into))?;
        files_in(into)
    }
}

/// A package that can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The source package it is made from.
    pub source: String,
    /// What it takes when it is installed, in KiB.
    pub installed: u64,
}

impl Available {
    /// Reads a stanza of a package list; none when it lacks what it must have.
    fn parse(stanza: &str) -> Option<Self> {
        let field = |name: &str| stanza.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(": ").map(str::trim));
        let name = field("Package")?.to_owned();
        // The source's version follows where it is another.
        let source = field("Source").and_then(|s| s.split_whitespace().next()).unwrap_or(&name).to_owned();
        let installed = field("Installed-Size")?.parse().ok()?;
        Some(Self { version: field("Version")?.to_owned(), source, installed, name })
    }
}

/// The entries of a directory, sorted.
fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).doing("listing", dir)?.flatten().map(|e| e.path()).collect();
    files.sort();
    Ok(files)
}

/// Whether dpkg has a package installed.
pub fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${Status}", package])
        .output()
        .is_ok_and(|o| String::from_utf8_lossy(&o.stdout).ends_with("install ok installed"))
}

/// Installs the packages that are missing; fetches the package lists only when that is needed.
pub fn install(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().copied().filter(|p| !is_installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    println!("installing Debian packages: {}", missing.join(" "));
    let get = || {
        let mut get = Command::new("apt-get");
        get.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-y", "-o", "DPkg::Lock::Timeout=300"]);
        get
    };
    let again = |first: Result<String>| match first {
        Ok(_) => Ok(()),
        Err(_) => {
            run(get().arg("update"))?;
            run(get().args(["--no-install-recommends", "install"]).args(&missing)).map(drop)
        }
    };
    again(run(get().args(["--no-install-recommends", "install"]).args(&missing)))
}

/// Runs a helper command to its end and answers its standard output; any failure is an error with all it printed.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let out = command.output().doing("running", &shown)?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(text);
    }
    let output = format!("{text}{}", String::from_utf8_lossy(&out.stderr));
    Err(Error::Command { command: shown, status: out.status.to_string(), output })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_from_one_line_list() {
        let text = "# deb http://old.example/debian sid main\n\
                    deb http://security.debian.org/debian-security bookworm-security main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main contrib\n";
        assert_eq!(one_line_mirror(text).as_deref(), Some("http://mirror.example/debian/"));
        assert_eq!(one_line_mirror("deb http://a.example/node nodistro main\n"), None);
    }

    #[test]
    fn mirror_from_deb822() {
        let text = "Types: deb\nURIs: http://x.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                    Enabled: no\nTypes: deb\nURIs: http://off.example/debian\nSuites: bookworm\nComponents: main\n\n\
                    Types: deb deb-src\n# a comment\nURIs: http://y.example/debian\nSuites: bookworm\nComponents: main\n";
        assert_eq!(deb822_mirror(text).as_deref(), Some("http://y.example/debian"));
        assert_eq!(deb822_mirror("Types: deb-src\nURIs: http://y.example/debian\nComponents: main\n"), None);
    }

    #[test]
    fn both_places_are_looked_at_and_none_is_an_error() {
        let etc = tempfile::tempdir().unwrap();
        assert!(matches!(mirror_below(etc.path()), Err(Error::NoMirror(_))));
        fs::create_dir(etc.path().join("sources.list.d")).unwrap();
        let stanza = "Types: deb\nURIs: https://z.example/debian/\nSuites: trixie\nComponents: main\n";
        fs::write(etc.path().join("sources.list.d/debian.sources"), stanza).unwrap();
        assert_eq!(mirror_below(etc.path()).unwrap(), "https://z.example/debian");
    }

    #[test]
    fn a_stanza_is_read() {
        let stanza = "Package: libx1\nSource: x (1.0-2)\nVersion: 1:1.0-2+b1\nInstalled-Size: 12\nDescription: a\n";
        let read = Available::parse(stanza).unwrap();
        assert_eq!((read.name.as_str(), read.version.as_str()), ("libx1", "1:1.0-2+b1"));
        assert_eq!((read.source.as_str(), read.installed), ("x", 12));
        assert_eq!(Available::parse("Package: y\nVersion: 1\nInstalled-Size: 1\n").unwrap().source, "y");
        assert_eq!(Available::parse("Package: y\nVersion: 1\n"), None);
    }
}
