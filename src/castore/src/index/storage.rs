//! The database below the overlay, and its tables.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use fjall::{Database, Keyspace, KeyspaceCreateOptions};

use super::{IndexError, IndexOptions, Table, database, journal};

/// The database's journals but for the newest may grow to this before tables are written out to be rid of them: its least,
/// so that there is one at most as a rule, since each has as much.
const JOURNAL_BYTES: u64 = 64 << 20;
/// The longest name the database takes for a table.
const MAX_NAME: usize = 255;
/// Where in the database's directory its tables are.
pub(super) const TABLES: &str = "keyspaces";
/// Space that must be there before a database that ran out of it is opened again.
const PROBE_BYTES: usize = 1 << 20;

/// The database, open or (when opening it again has failed) closed, and the tables that have been asked for.
pub(super) struct Storage {
    database: Option<Database>,
    tables: Vec<(&'static str, Option<Keyspace>)>,
}

impl Storage {
    /// Opens the database in `dir`, creating it when there is none.
    pub(super) fn open(dir: &Path, options: &IndexOptions) -> Result<Self, IndexError> {
        create(dir, options)?;
        Ok(Self { database: Some(open_database(dir, options)?), tables: Vec::new() })
    }

    pub(super) fn database(&self) -> Result<&Database, IndexError> {
        self.database.as_ref().ok_or(IndexError::Closed)
    }

    pub(super) fn keyspace(&self, table: Table) -> Result<&Keyspace, IndexError> {
        self.tables[table.0].1.as_ref().ok_or(IndexError::Closed)
    }

    /// The table called `name`, created when there is none.
    pub(super) fn table(&mut self, name: &'static str, options: &IndexOptions) -> Result<Table, IndexError> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(IndexError::TableName(name));
        }
        if let Some(number) = self.tables.iter().position(|(known, _)| *known == name) {
            return Ok(Table(number));
        }
        let keyspace = open_keyspace(self.database()?, name, options)?;
        self.tables.push((name, Some(keyspace)));
        Ok(Table(self.tables.len() - 1))
    }

    /// Closes the database and opens it again. After a failed write that is the only way to write to it once more: it
    /// recovers to the last batch that was written whole.
    pub(super) fn reopen(&mut self, dir: &Path, options: &IndexOptions) -> Result<(), IndexError> {
        self.tables.iter_mut().for_each(|(_, keyspace)| *keyspace = None);
        self.database = None;
        let database = open_database(dir, options)?;
        for (name, keyspace) in &mut self.tables {
            *keyspace = Some(open_keyspace(&database, name, options)?);
        }
        self.database = Some(database);
        Ok(())
    }
}

/// Whether the filesystem of `dir` takes a little data.
pub(super) fn has_space(dir: &Path) -> io::Result<()> {
    let path = dir.with_extension("probe");
    let probe = || -> io::Result<()> {
        let mut file = File::create(&path)?;
        file.write_all(&vec![0x5a; PROBE_BYTES])?;
        file.sync_all()
    };
    let result = probe();
    // When not even the file could be created, that is the answer.
    result.and(std::fs::remove_file(&path)).inspect_err(|_| {
        let _ = std::fs::remove_file(&path);
    })
}

fn open_keyspace(database: &Database, name: &str, options: &IndexOptions) -> Result<Keyspace, IndexError> {
    let create = || KeyspaceCreateOptions::default().max_memtable_size(options.memtable_bytes);
    let new = !database.keyspace_exists(name);
    let keyspace = database.keyspace(name, create).map_err(self::database("opening a table"))?;
    if new && let Some(tables) = keyspace.path().parent() {
        sync_dir(tables)?;
    }
    Ok(keyspace)
}

fn open_database(dir: &Path, options: &IndexOptions) -> Result<Database, IndexError> {
    journal::prepare(dir)?;
    let builder = Database::builder(dir).cache_size(options.cache_bytes).max_journaling_size(JOURNAL_BYTES);
    let database = builder.open().map_err(|error| match error {
        fjall::Error::Locked => IndexError::Locked(dir.to_owned()),
        source => IndexError::Database { doing: "opening", source },
    })?;
    // Of tables that a process created which was killed before it could sync their names.
    sync_dir(&dir.join(TABLES))?;
    Ok(database)
}

/// The database syncs what is in a table's directory, but not the directory that has its name: without this, a crash can
/// take a table away with all that was ever committed to it.
fn sync_dir(dir: &Path) -> Result<(), IndexError> {
    let failed = |error| IndexError::Database { doing: "syncing a directory", source: fjall::Error::Io(error) };
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)
}

/// Creates the database if there is none. A crash while it creates itself would leave it in a state it cannot open, so
/// that happens under another name, which is taken for rubbish the next time.
fn create(dir: &Path, options: &IndexOptions) -> Result<(), IndexError> {
    let io = |doing| move |error| IndexError::Database { doing, source: fjall::Error::Io(error) };
    if dir.try_exists().map_err(io("looking for the database"))? {
        return Ok(());
    }
    let unfinished = dir.with_extension("new");
    match std::fs::remove_dir_all(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io("clearing away an unfinished creation")(error));
        }
        _ => {}
    }
    std::fs::create_dir_all(&unfinished).map_err(io("creating the directory"))?;
    drop(open_database(&unfinished, options)?);
    std::fs::rename(&unfinished, dir).map_err(io("putting the new database in place"))?;
    if let Some(parent) = dir.parent() {
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(io("syncing the directory"))?;
    }
    Ok(())
}
