//! `castored import`: local files into the store, through the daemon when one runs.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::daemon::Locations;
use indicatif::{ProgressBar, ProgressStyle};
use nix_compat::content_address::Method;
use nix_compat::hash::Algorithm;
use nix_compat::worker::{AddToStore, MethodText, Request, Response};
use remote::{ClientError, Connection};
use store::{AddOptions, Config, Store};

use crate::failure::Failure;
use crate::state;

/// Where the paths go.
enum Target {
    Daemon(Connection),
    /// Nobody serves the store, so it can be opened.
    Store(std::sync::Arc<Store>),
}

pub(crate) fn run(locations: &Locations, paths: &[PathBuf]) -> Result<ExitCode, Failure> {
    let mut target = match Connection::open(&locations.socket, &locations.store_dir) {
        Ok(connection) => Target::Daemon(connection),
        Err(ClientError::NoDaemon { .. }) => {
            state::prepare(locations)?;
            Target::Store(Store::open(Config::new(locations.store_dir.clone(), &locations.state_dir))?)
        }
        Err(error) => return Err(error.into()),
    };
    for path in paths {
        let name = path
            .canonicalize()
            .map_err(Failure::file("find", path))?
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .ok_or_else(|| Failure::Usage(format!("'{}' has no name to give it in the store", path.display())))?;
        let added = add(&mut target, &name, path)?;
        println!("{}", locations.store_dir.display(&added));
    }
    if let Target::Store(store) = &target {
        store.sync()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn add(target: &mut Target, name: &str, path: &Path) -> Result<nix_compat::store_path::StorePath, Failure> {
    let bar = ProgressBar::new_spinner().with_message(path.display().to_string()).with_style(style());
    let dump = |out: &mut dyn Write| dump(path, &mut Counting { out, bar: &bar });
    let added = match target {
        Target::Daemon(connection) => {
            let request = Request::AddToStore(AddToStore {
                name: name.to_owned(),
                method: MethodText::new(Method::Nar, Algorithm::Sha256),
                references: BTreeSet::new(),
                repair: false,
            });
            match connection.call(&request, dump)? {
                Response::AddedPath(info) => info.path,
                other => return Err(ClientError::Protocol(format!("unexpected answer {other:?}")).into()),
            }
        }
        Target::Store(store) => {
            let options = AddOptions {
                name: name.to_owned(),
                method: Method::Nar,
                algorithm: Algorithm::Sha256,
                references: BTreeSet::new(),
            };
            let ingested = store.ingest_dump(dump, None, None)?;
            let hash = nix_compat::hash::Hash::Sha256(*ingested.nar.nar_hash.as_bytes());
            store.add_ingested(&options, ingested, hash)?.path
        }
    };
    bar.finish_and_clear();
    Ok(added)
}

fn dump(path: &Path, out: &mut dyn Write) -> io::Result<()> {
    // The parent is opened and the entry named, so that a symlink is added as one.
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match path.file_name() {
        Some(name) => build::dump_tree(File::open(parent)?.as_fd(), Path::new(name), out),
        None => build::dump_tree(File::open(path)?.as_fd(), Path::new("."), out),
    }
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {msg}  {bytes} ({bytes_per_sec})")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}

/// Shows how much has been written.
struct Counting<'a> {
    out: &'a mut dyn Write,
    bar: &'a ProgressBar,
}

impl Write for Counting<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.out.write(buf)?;
        self.bar.inc(n as u64);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
