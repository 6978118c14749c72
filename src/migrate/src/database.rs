//! The database of a stock store, read and never written.
//!
//! A [`Database`] is the state at one moment: it holds one read transaction for as long as it lives, so stock may go on
//! adding and deleting meanwhile. A write-ahead log that nobody checkpointed is read with it. Where SQLite cannot read
//! in place, because it may not write its shared memory beside the database (a read-only file system), database and log
//! are copied first.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nix_compat::content_address::ContentAddress;
use nix_compat::derivation::OutputName;
use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use parking_lot::Mutex;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, Row};
use tempfile::TempDir;

use crate::error::{Error, Result};
use crate::tripwire;

/// The database's file name.
pub(crate) const FILE: &str = "db.sqlite";
/// The file beside it that tells its layout.
pub(crate) const SCHEMA_FILE: &str = "schema";
/// The one layout known: that of Nix 2.0 and all later ones.
pub(crate) const SCHEMA: &str = "10";
/// How long a lock of stock's is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// The tables in which stock has kept realisations, the newest first. A later one was made without taking over the
/// rows of those before.
const REALISATIONS: [&str; 4] = ["BuildTraceV3", "BuildTraceV2", "BuildTrace", "Realisations"];

/// A stock store's database, as it was when it was opened.
pub(crate) struct Database {
    connection: Mutex<Connection>,
    path: PathBuf,
    store_dir: StoreDir,
    /// A copy that is read instead, where one is needed.
    _copy: Option<TempDir>,
}

/// A row of the list of valid paths, and what is needed to put it in order.
pub(crate) struct Listed {
    /// Its key.
    pub(crate) id: i64,
    /// Bytes of its NAR; 0 when that was never recorded.
    pub(crate) nar_size: u64,
}

/// What the database says of one path, or why that cannot be understood.
pub(crate) type Info = Result<PathInfo, Unreadable>;

/// A row that castored cannot take over.
#[derive(Debug)]
pub(crate) struct Unreadable {
    /// The path as it stands there.
    pub(crate) path: String,
    /// What is wrong with the row.
    pub(crate) reason: String,
}

impl Database {
    /// Opens the database in `dir`. `scratch` is where a copy goes, if there must be one.
    pub(crate) fn open(dir: &Path, store_dir: &StoreDir, scratch: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        if !path.exists() {
            return Err(Error::NoStockStore(path));
        }
        if tripwire::is_ours(&path) {
            return Err(Error::Ours(path));
        }
        let schema = dir.join(SCHEMA_FILE);
        let found = fs::read_to_string(&schema).map_err(Error::file("read", &schema))?;
        if found.trim() != SCHEMA {
            return Err(Error::Schema { path: schema, found: found.trim().to_owned() });
        }
        let (connection, copy) = match begin(&path) {
            Ok(connection) => (connection, None),
            Err(error) if cannot_read_in_place(&error) => {
                let copy = tempfile::Builder::new()
                    .prefix("stock-database-")
                    .tempdir_in(scratch)
                    .map_err(Error::file("make a directory in", scratch))?;
                for name in [FILE.to_owned(), format!("{FILE}-wal")] {
                    let from = dir.join(&name);
                    if from.exists() {
                        fs::copy(&from, copy.path().join(&name)).map_err(Error::file("copy", &from))?;
                    }
                }
                (begin(&copy.path().join(FILE)).map_err(Error::database("open", &path))?, Some(copy))
            }
            Err(error) => return Err(Error::database("open", &path)(error)),
        };
        Ok(Self { connection: Mutex::new(connection), path, store_dir: store_dir.clone(), _copy: copy })
    }

    fn failed(&self, source: rusqlite::Error) -> Error {
        Error::database("read", &self.path)(source)
    }

    /// All valid paths, in the order in which they became valid.
    ///
    /// # Errors
    /// [`Error::OtherStoreDir`] when one of them does not begin with the store directory.
    pub(crate) fn list(&self) -> Result<Vec<Listed>> {
        let prefix = format!("{}/", self.store_dir.as_str());
        let mut listed = Vec::new();
        let connection = self.connection.lock();
        let read = |listed: &mut Vec<Listed>| -> rusqlite::Result<Option<String>> {
            let mut select = connection.prepare("select id, path, narSize from ValidPaths order by id")?;
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                let path = row.get_ref(1)?.as_bytes().unwrap_or_default();
                if !path.starts_with(prefix.as_bytes()) {
                    return Ok(Some(String::from_utf8_lossy(path).into_owned()));
                }
                listed.push(Listed { id: row.get(0)?, nar_size: size(row, 2)? });
            }
            Ok(None)
        };
        match read(&mut listed).map_err(|e| self.failed(e))? {
            Some(path) => Err(Error::OtherStoreDir { path, store_dir: self.store_dir.as_str().to_owned() }),
            None => Ok(listed),
        }
    }

    /// Calls `each` with the ids of every path and of one it refers to, but for itself.
    pub(crate) fn for_each_reference(&self, each: &mut dyn FnMut(i64, i64)) -> Result<()> {
        let connection = self.connection.lock();
        let mut read = || -> rusqlite::Result<()> {
            let mut select = connection.prepare("select referrer, reference from Refs where referrer <> reference")?;
            let mut rows = select.query([])?;
            while let Some(row) = rows.next()? {
                each(row.get(0)?, row.get(1)?);
            }
            Ok(())
        };
        read().map_err(|e| self.failed(e))
    }

    /// The path with this id as it stands there, for messages.
    pub(crate) fn path(&self, id: i64) -> Result<String> {
        let connection = self.connection.lock();
        let path = connection.query_row("select path from ValidPaths where id = ?", [id], |row| row.get(0));
        path.map_err(|e| self.failed(e))
    }

    /// The id of a path; `None` when it is not valid.
    pub(crate) fn id(&self, path: &str) -> Result<Option<i64>> {
        let connection = self.connection.lock();
        let id = connection.query_row("select id from ValidPaths where path = ?", [path], |row| row.get(0));
        id.optional().map_err(|e| self.failed(e))
    }

    /// What is known of the path with this id.
    pub(crate) fn info(&self, id: i64) -> Result<Info> {
        let connection = self.connection.lock();
        let read = || -> rusqlite::Result<Info> {
            let mut select = connection.prepare_cached(
                "select path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca from ValidPaths where id = ?",
            )?;
            let info = select.query_row([id], |row| self.info_of(row))?;
            let mut info = match info {
                Ok(info) => info,
                unreadable => return Ok(unreadable),
            };
            let mut select = connection.prepare_cached(
                "select v.path from Refs r join ValidPaths v on v.id = r.reference where r.referrer = ?",
            )?;
            let mut rows = select.query([id])?;
            while let Some(row) = rows.next()? {
                let reference: String = row.get(0)?;
                match self.store_dir.parse(&reference) {
                    Ok(reference) => info.references.insert(reference),
                    Err(error) => {
                        let (path, reason) = (self.store_dir.display(&info.path), format!("reference: {error}"));
                        return Ok(Err(Unreadable { path, reason }));
                    }
                };
            }
            Ok(Ok(info))
        };
        read().map_err(|e| self.failed(e))
    }

    fn info_of(&self, row: &Row<'_>) -> rusqlite::Result<Info> {
        let path: String = row.get(0)?;
        let hash: String = row.get(1)?;
        let registered: i64 = row.get(2)?;
        let deriver: Option<String> = row.get(3)?;
        let ultimate: Option<i64> = row.get(5)?;
        let signatures: Option<String> = row.get(6)?;
        let ca: Option<String> = row.get(7)?;
        let nar_size = size(row, 4)?;
        let parse = || -> Result<PathInfo, String> {
            let parsed = self.store_dir.parse(&path).map_err(|e| e.to_string())?;
            let deriver = deriver.filter(|text| !text.is_empty());
            let signatures = signatures.unwrap_or_default();
            Ok(PathInfo {
                path: parsed,
                deriver: deriver
                    .map(|text| self.store_dir.parse(&text).map_err(|e| format!("deriver: {e}")))
                    .transpose()?,
                nar_hash: NarHash::parse(&hash).map_err(|e| format!("hash '{hash}': {e}"))?,
                references: Default::default(),
                registration_time: u64::try_from(registered).unwrap_or(0),
                nar_size,
                ultimate: ultimate == Some(1),
                signatures: signatures
                    .split_whitespace()
                    .map(|text| text.parse().map_err(|e| format!("signature '{text}': {e}")))
                    .collect::<Result<_, String>>()?,
                ca: ca
                    .filter(|text| !text.is_empty())
                    .map(|text| ContentAddress::from_str(&text).map_err(|e| format!("content address '{text}': {e}")))
                    .transpose()?,
            })
        };
        Ok(parse().map_err(|reason| Unreadable { path: path.clone(), reason }))
    }

    /// All realisations, each output's once: where tables of several ages know it, the newest one's. What cannot be
    /// understood comes as text.
    pub(crate) fn realisations(&self) -> Result<(Vec<Realisation>, Vec<String>)> {
        let (mut found, mut unreadable) = (BTreeMap::new(), Vec::new());
        let connection = self.connection.lock();
        let read = |found: &mut BTreeMap<DrvOutput, Realisation>,
                    unreadable: &mut Vec<String>|
         -> rusqlite::Result<()> {
            for table in REALISATIONS.into_iter().filter(|table| has_table(&connection, table)) {
                let mut here: BTreeMap<i64, Realisation> = BTreeMap::new();
                // The path is the key of a row of ValidPaths, but since BuildTraceV3, where it is a base name.
                let sql = format!(
                    "select t.id, t.drvPath, t.outputName, coalesce(v.path, t.outputPath), t.signatures from {table} t \
                     left join ValidPaths v on v.id = t.outputPath"
                );
                let mut select = connection.prepare(&sql)?;
                let mut rows = select.query([])?;
                while let Some(row) = rows.next()? {
                    let (drv, output): (String, String) = (row.get(1)?, row.get(2)?);
                    let path = String::from_utf8_lossy(row.get_ref(3)?.as_bytes().unwrap_or_default()).into_owned();
                    match self.realisation(&drv, &output, &path, row.get(4)?) {
                        Ok(realisation) => drop(here.insert(row.get(0)?, realisation)),
                        Err(reason) => unreadable.push(format!("realisation of '{drv}!{output}': {reason}")),
                    }
                }
                if table == "Realisations" && has_table(&connection, "RealisationsRefs") {
                    add_dependencies(&connection, &mut here)?;
                }
                for realisation in here.into_values() {
                    found.entry(realisation.id.clone()).or_insert(realisation);
                }
            }
            Ok(())
        };
        read(&mut found, &mut unreadable).map_err(|e| self.failed(e))?;
        Ok((found.into_values().collect(), unreadable))
    }

    fn realisation(&self, drv: &str, output: &str, path: &str, sigs: Option<String>) -> Result<Realisation, String> {
        // Up to 2.34 the derivation's hash, since then its path or base name.
        let id = if drv.starts_with("sha256:") {
            format!("{drv}!{output}").parse::<DrvOutput>().map_err(|e| e.to_string())?
        } else {
            let output = output.parse::<OutputName>().map_err(|e| e.to_string())?;
            DrvOutput::Path { drv: self.any_path(drv)?, output }
        };
        let mut realisation = Realisation::new(id, self.any_path(path)?);
        for text in sigs.unwrap_or_default().split_whitespace() {
            realisation.signatures.insert(text.parse().map_err(|e| format!("signature '{text}': {e}"))?);
        }
        Ok(realisation)
    }

    /// A path or a base name.
    fn any_path(&self, text: &str) -> Result<StorePath, String> {
        let base_name = text.strip_prefix(self.store_dir.as_str()).map_or(text, |rest| rest.trim_start_matches('/'));
        StorePath::from_base_name(base_name).map_err(|e| format!("'{text}': {e}"))
    }
}

/// Opens a database for reading and begins the one transaction.
fn begin(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(PATIENCE)?;
    // The transaction begins with the first look at a table.
    connection.execute_batch("pragma query_only = 1; begin")?;
    connection.query_row("select count(*) from sqlite_master", [], |_| Ok(()))?;
    Ok(connection)
}

/// How many paths are valid in a database, without waiting for anybody.
pub(crate) fn count(path: &Path) -> rusqlite::Result<u64> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    if !has_table(&connection, "ValidPaths") {
        return Ok(0);
    }
    connection.query_row("select count(*) from ValidPaths", [], |row| size(row, 0))
}

fn cannot_read_in_place(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied))
}

fn has_table(connection: &Connection, table: &str) -> bool {
    let found =
        connection.query_row("select 1 from sqlite_master where type = 'table' and name = ?", [table], |_| Ok(()));
    found.is_ok()
}

/// Numbers that cannot be negative; nothing counts as 0.
fn size(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    Ok(row.get::<_, Option<i64>>(column)?.and_then(|size| u64::try_from(size).ok()).unwrap_or(0))
}

/// What realisations were built with: a table of its own from 2.4 to 2.33.
fn add_dependencies(connection: &Connection, realisations: &mut BTreeMap<i64, Realisation>) -> rusqlite::Result<()> {
    let mut select = connection.prepare("select referrer, realisationReference from RealisationsRefs")?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let (referrer, reference): (i64, Option<i64>) = (row.get(0)?, row.get(1)?);
        let Some(dependency) = reference.and_then(|id| realisations.get(&id)) else { continue };
        let (id, path) = (dependency.id.clone(), dependency.out_path.clone());
        if let Some(realisation) = realisations.get_mut(&referrer) {
            realisation.dependencies.insert(id, path);
        }
    }
    Ok(())
}
