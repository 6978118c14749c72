//! The four stock Nix releases, taken from Debian and made relocatable.
//!
//! Each release is unpacked with its whole library closure (libc and the dynamic loader included) into
//! `<cache>/nix-VERSION`, and its one binary is told to use exactly these. Nothing is installed on the machine and no
//! LD_LIBRARY_PATH leaks into builders.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{PrivateApt, remove_left, run};
use crate::error::{Context, Error, Result};

/// Version and the Debian suite that ships it. Together they speak worker protocol 1.21, 1.34 and 1.38 (twice).
const RELEASES: [(&str, &str); 4] =
    [("2.3.7", "bullseye"), ("2.8.0", "bookworm"), ("2.26.3", "trixie"), ("2.34.8", "forky")];

/// The loader's file name on the one architecture these packages are fetched for.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// One stock release on disk.
#[derive(Debug, Clone)]
pub struct Release {
    /// For example "2.34.8".
    pub version: String,
    /// Holds `bin`, `lib`, `libexec`, `share`.
    pub prefix: PathBuf,
}

impl Release {
    /// The full path of a command such as `nix-store`.
    pub fn command(&self, name: &str) -> PathBuf {
        self.prefix.join("bin").join(name)
    }

    /// Whether this release still has the command line of the 2.3 series.
    pub fn is_2_3(&self) -> bool {
        self.version.starts_with("2.3.")
    }

    /// Whether it is all there and runs.
    fn is_complete(&self) -> bool {
        let out = Command::new(self.command("nix")).arg("--version").output();
        out.is_ok_and(|o| o.status.success() && String::from_utf8_lossy(&o.stdout).trim().ends_with(&self.version))
    }
}

/// Fetches what is missing below `cache`. The caller holds the cache's lock.
pub(crate) fn fetch_all(cache: &Path) -> Result<Vec<Release>> {
    RELEASES
        .iter()
        .map(|(version, suite)| {
            let release = Release { version: (*version).to_owned(), prefix: cache.join(format!("nix-{version}")) };
            if !release.is_complete() {
                println!("fetching nix {version} from Debian {suite}");
                fetch(cache, &release, suite)?;
            }
            Ok(release)
        })
        .collect()
}

/// Downloads, unpacks and patches one release beside its final place, then renames it there.
fn fetch(cache: &Path, release: &Release, suite: &str) -> Result<()> {
    let work = cache.join(".apt").join(&release.version);
    let new = cache.join(format!(".new-{}", release.version));
    remove_left(&[&work, &new, &release.prefix])?;
    let root = work.join("root");
    for dir in [&root, &new.join("bin"), &new.join("lib"), &new.join("libexec/nix"), &new.join("share")] {
        fs::create_dir_all(dir).doing("creating", dir)?;
    }
    let is_wanted = |name: &str| ["lib", "nix-bin", "zlib", "bash-static"].iter().any(|p| name.starts_with(p));
    PrivateApt::new(&work, "deb", suite)?.unpack_closure(&["nix-bin"], &root, is_wanted)?;
    copy_libraries(&root, &root.join("usr/bin/nix"), &new.join("lib"))?;
    for file in fs::read_dir(new.join("lib")).doing("listing", new.join("lib"))?.flatten().map(|e| e.path()) {
        if file.file_name().is_some_and(|n| n.to_string_lossy().starts_with("libnix")) {
            run(Command::new("patchelf").arg("--remove-rpath").arg(&file))?;
        }
    }
    install_commands(&root, &new, release)?;
    fs::rename(&new, &release.prefix).doing("moving into place", &release.prefix)?;
    fs::remove_dir_all(&work).doing("removing", &work)?;
    if release.is_complete() {
        Ok(())
    } else {
        Err(Error::Wrong(format!("nix {} was fetched but does not run", release.version)))
    }
}

/// Copies the libraries that `program` needs, as its own loader resolves them inside `root`, flat into `lib`.
pub(crate) fn copy_libraries(root: &Path, program: &Path, lib: &Path) -> Result<()> {
    let mut shared = Vec::new();
    walk(root, &mut |path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.contains(".so") && !path.components().any(|c| c.as_os_str() == "gconv") {
            shared.push(path.to_owned());
        }
    })?;
    let mut dirs: Vec<String> =
        shared.iter().filter_map(|f| f.parent()).map(|d| d.to_string_lossy().into_owned()).collect();
    dirs.sort();
    dirs.dedup();
    let loader = shared
        .iter()
        .find(|f| f.ends_with(format!("x86_64-linux-gnu/{LOADER}")))
        .ok_or_else(|| Error::Wrong(format!("no {LOADER} among the unpacked packages")))?;
    // In bullseye the name is a link to ld-2.31.so, relative to its own directory.
    let loader = fs::canonicalize(loader).doing("resolving", loader)?;
    copy(&loader, &lib.join(LOADER))?;
    let list = run(Command::new(&loader).args(["--library-path", &dirs.join(":"), "--list"]).arg(program))?;
    for line in list.lines() {
        let Some((name, rest)) = line.trim().split_once(" => ") else { continue };
        let file = Path::new(rest.split_whitespace().next().unwrap_or_default());
        if name.contains('/') {
            continue;
        }
        if !file.starts_with(root) {
            return Err(Error::Wrong(format!("library {name} resolves to {}, outside the packages", file.display())));
        }
        copy(file, &lib.join(name))?;
    }
    // Loaded at run time by name, so not in the list: user and host look-ups.
    for file in &shared {
        let name = file.file_name().unwrap_or_default();
        if ["libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2"].iter().any(|n| name == *n) {
            copy(file, &lib.join(name))?;
        }
    }
    Ok(())
}

/// Makes a program use exactly the libraries in `lib`, the loader included.
pub(crate) fn bind_to(program: &Path, lib: &Path) -> Result<()> {
    let mut patchelf = Command::new("patchelf");
    patchelf.arg("--set-interpreter").arg(lib.join(LOADER)).args(["--force-rpath", "--set-rpath"]).arg(lib);
    run(patchelf.arg(program)).map(drop)
}

/// Puts the commands in place. Nix is one binary that looks at the name it is called by.
fn install_commands(root: &Path, new: &Path, release: &Release) -> Result<()> {
    let share = root.join("usr/share/nix");
    if share.exists() {
        run(Command::new("cp").arg("-a").arg(&share).arg(new.join("share")))?;
    }
    // 2.3 finds even `derivation` in its data directory, which only the environment can name: it gets wrappers.
    let real = if release.is_2_3() { "real" } else { "bin" };
    fs::create_dir_all(new.join(real)).doing("creating", new.join(real))?;
    let lib = release.prefix.join("lib");
    copy(&root.join("usr/bin/nix"), &new.join(real).join("nix"))?;
    bind_to(&new.join(real).join("nix"), &lib)?;
    let mut names = vec!["nix".to_owned()];
    let bin = root.join("usr/bin");
    for entry in fs::read_dir(&bin).doing("listing", &bin)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("nix-") {
            let link = new.join(real).join(&name);
            symlink("nix", &link).doing("linking", &link)?;
            names.push(name);
        }
    }
    let remote = new.join("libexec/nix/build-remote");
    symlink(release.prefix.join(real).join("nix"), &remote).doing("linking", &remote)?;
    if real != "bin" {
        let p = release.prefix.display();
        for name in names {
            let wrapper = new.join("bin").join(&name);
            let text = format!(
                "#!/bin/sh\nNIX_DATA_DIR={p}/share NIX_BIN_DIR={p}/bin NIX_LIBEXEC_DIR={p}/libexec exec {p}/{real}/{name} \
                 \"$@\"\n"
            );
            fs::write(&wrapper, text).doing("writing", &wrapper)?;
            fs::set_permissions(&wrapper, Permissions::from_mode(0o755)).doing("making executable", &wrapper)?;
        }
    }
    Ok(())
}

/// Copies what `from` points to, readable by everybody.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).doing("copying", from)?;
    fs::set_permissions(to, Permissions::from_mode(0o755)).doing("opening to all", to)
}

/// Calls `each` for every file and link below `dir`, in sorted order.
fn walk(dir: &Path, each: &mut dyn FnMut(&Path)) -> Result<()> {
    let mut entries: Vec<_> = fs::read_dir(dir).doing("listing", dir)?.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            walk(&entry.path(), each)?;
        } else {
            each(&entry.path());
        }
    }
    Ok(())
}
