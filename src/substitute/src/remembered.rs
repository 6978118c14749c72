//! What binary caches on servers have said, kept on disk, so that a daemon that was started anew need not ask again.
//!
//! It is a database of SQLite of its own, beside the store's index and not in it: nothing depends on it, so its writes need
//! no disk that keeps them, and it may be deleted at any time. One that cannot be used is made anew, or done without.
//! Everything here blocks, for microseconds.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension, params};

use crate::origin::SourceInfo;

/// The file, in the store's own directory.
const FILE: &str = "narinfos.sqlite";
/// Goes up with each change of the tables; what another version left is thrown away.
const VERSION: i64 = 1;
/// Narinfos, and the lack of them, that are kept of all caches together: some 100 MB.
const MAX_ROWS: u64 = 100_000;
/// So many are written between two looks whether there are more.
const BETWEEN_LOOKS: u64 = 1_000;
/// What is older is of no use to anybody with usual settings: stock's `narinfo-cache-positive-ttl`.
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 3600);

const TABLES: &str = "
    CREATE TABLE caches (cache TEXT PRIMARY KEY, priority INTEGER NOT NULL, mass INTEGER NOT NULL, since INTEGER NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE narinfos (cache TEXT NOT NULL, hash TEXT NOT NULL, text TEXT, since INTEGER NOT NULL,
        PRIMARY KEY (cache, hash)) WITHOUT ROWID;
    CREATE INDEX narinfos_by_age ON narinfos (since);";

/// The answers of all caches.
pub(crate) struct Remembered(Mutex<State>);

struct State {
    /// None where there can be no database.
    database: Option<Connection>,
    /// Rows written since the last look.
    written: u64,
}

/// An answer, and when it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dated<T> {
    pub(crate) answer: T,
    pub(crate) since: SystemTime,
}

impl<T> Dated<T> {
    /// Given now.
    pub(crate) fn now(answer: T) -> Self {
        Self { answer, since: SystemTime::now() }
    }

    /// Whether it was given less than this ago. One of the future is of a clock that was wrong.
    pub(crate) fn is_younger(&self, limit: Duration) -> bool {
        SystemTime::now().duration_since(self.since).is_ok_and(|age| age < limit)
    }
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn time(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

impl Remembered {
    /// Opens the database in a directory.
    pub(crate) fn open(dir: &Path) -> Self {
        let file = dir.join(FILE);
        let database = open(&file).or_else(|error| {
            tracing::warn!("beginning {} anew: {error}", file.display());
            remove(&file);
            open(&file)
        });
        let database = database.inspect_err(|error| {
            tracing::warn!("what binary caches say is remembered in memory only: {}: {error}", file.display());
        });
        Self(Mutex::new(State { database: database.ok(), written: BETWEEN_LOOKS }))
    }

    /// What a cache said of a path with this hash; `None` inside when it had none.
    pub(crate) fn narinfo(&self, cache: &str, hash: &str) -> Option<Dated<Option<String>>> {
        self.with(|database| {
            let mut select =
                database.prepare_cached("SELECT text, since FROM narinfos WHERE cache = ? AND hash = ?")?;
            let row = |row: &rusqlite::Row<'_>| Ok(Dated { answer: row.get(0)?, since: time(row.get(1)?) });
            select.query_row(params![cache, hash], row).optional()
        })?
    }

    /// Remembers what it said now.
    pub(crate) fn keep_narinfo(&self, cache: &str, hash: &str, text: Option<&str>) {
        self.with(|database| {
            let insert = "INSERT OR REPLACE INTO narinfos (cache, hash, text, since) VALUES (?, ?, ?, ?)";
            database.prepare_cached(insert)?.execute(params![cache, hash, text, seconds(SystemTime::now())])
        });
        self.look();
    }

    /// Forgets what it said: it has proved to be wrong.
    pub(crate) fn forget(&self, cache: &str, hash: &str) {
        self.with(|database| {
            let delete = "DELETE FROM narinfos WHERE cache = ? AND hash = ?";
            database.prepare_cached(delete)?.execute(params![cache, hash])
        });
    }

    /// What a cache said of itself.
    pub(crate) fn info(&self, cache: &str) -> Option<Dated<SourceInfo>> {
        self.with(|database| {
            let mut select = database.prepare_cached("SELECT priority, mass, since FROM caches WHERE cache = ?")?;
            let row = |row: &rusqlite::Row<'_>| {
                let priority = u64::try_from(row.get::<_, i64>(0)?).unwrap_or(u64::MAX);
                let answer = SourceInfo { priority, want_mass_query: row.get(1)? };
                Ok(Dated { answer, since: time(row.get(2)?) })
            };
            select.query_row(params![cache], row).optional()
        })?
    }

    /// Remembers what it says now.
    pub(crate) fn keep_info(&self, cache: &str, info: &SourceInfo) {
        self.with(|database| {
            let insert = "INSERT OR REPLACE INTO caches (cache, priority, mass, since) VALUES (?, ?, ?, ?)";
            let priority = i64::try_from(info.priority).unwrap_or(i64::MAX);
            let values = params![cache, priority, info.want_mass_query, seconds(SystemTime::now())];
            database.prepare_cached(insert)?.execute(values)
        });
    }

    /// Does something with the database, if there is one. One that fails is not used again.
    fn with<T>(&self, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Option<T> {
        let mut state = self.0.lock();
        match work(state.database.as_ref()?) {
            Ok(done) => Some(done),
            Err(error) => {
                tracing::warn!("what binary caches say is remembered in memory only from now on: {error}");
                state.database = None;
                None
            }
        }
    }

    /// Deletes the oldest rows now and then.
    fn look(&self) {
        {
            let mut state = self.0.lock();
            state.written += 1;
            if state.written < BETWEEN_LOOKS {
                return;
            }
            state.written = 0;
        }
        self.with(|database| {
            let oldest = seconds(SystemTime::now().checked_sub(MAX_AGE).unwrap_or(SystemTime::UNIX_EPOCH));
            database.execute("DELETE FROM narinfos WHERE since < ?", params![oldest])?;
            let rows: i64 = database.query_row("SELECT count(*) FROM narinfos", [], |row| row.get(0))?;
            let excess = rows.saturating_sub(i64::try_from(MAX_ROWS).unwrap_or(i64::MAX));
            if excess > 0 {
                let delete = "DELETE FROM narinfos WHERE (cache, hash) IN \
                              (SELECT cache, hash FROM narinfos ORDER BY since LIMIT ?)";
                database.execute(delete, params![excess])?;
            }
            Ok(())
        });
    }
}

fn open(file: &Path) -> rusqlite::Result<Connection> {
    let database = Connection::open(file)?;
    // Another process that repairs the store while no daemon runs is gone by the time a daemon is there.
    database.busy_timeout(Duration::from_secs(1))?;
    database.pragma_update(None, "journal_mode", "wal")?;
    database.pragma_update(None, "synchronous", "off")?;
    let version: i64 = database.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version != VERSION {
        let tables: i64 = database.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if tables > 0 {
            return Err(rusqlite::Error::InvalidQuery);
        }
        database.execute_batch(&format!("BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;"))?;
    }
    Ok(database)
}

fn remove(file: &Path) {
    for end in ["", "-wal", "-shm"] {
        let mut name = file.as_os_str().to_owned();
        name.push(end);
        // Not there, or not to be removed: opening will tell.
        let _ = std::fs::remove_file(PathBuf::from(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_survive() {
        let dir = tempfile::tempdir().unwrap();
        let info = SourceInfo { priority: 30, want_mass_query: true };
        let first = Remembered::open(dir.path());
        first.keep_narinfo("a", "x", Some("text"));
        first.keep_narinfo("a", "y", None);
        first.keep_info("a", &info);
        drop(first);
        let second = Remembered::open(dir.path());
        let said = |hash: &str| second.narinfo("a", hash).map(|dated| dated.answer);
        assert_eq!(said("x"), Some(Some("text".to_owned())));
        assert_eq!((said("y"), said("z")), (Some(None), None));
        assert_eq!(second.narinfo("b", "x"), None);
        let dated = second.info("a").unwrap();
        assert!(dated.is_younger(Duration::from_secs(60)) && !dated.is_younger(Duration::ZERO));
        assert_eq!((dated.answer, second.info("b")), (info, None));
        second.forget("a", "x");
        assert_eq!(second.narinfo("a", "x"), None);
    }

    #[test]
    fn what_is_no_database_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), [7; 100_000]).unwrap();
        Remembered::open(dir.path()).keep_narinfo("a", "x", Some("text"));
        assert!(Remembered::open(dir.path()).narinfo("a", "x").is_some());
        // The same with one of another version.
        let other = Connection::open(dir.path().join(FILE)).unwrap();
        other.pragma_update(None, "user_version", VERSION + 1).unwrap();
        drop(other);
        assert_eq!(Remembered::open(dir.path()).narinfo("a", "x"), None);
        // And where there can be none, nothing is remembered.
        let nowhere = Remembered::open(&dir.path().join("absent"));
        nowhere.keep_narinfo("a", "x", None);
        assert_eq!(nowhere.narinfo("a", "x"), None);
    }

    #[test]
    fn there_is_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = Remembered::open(dir.path());
        let (begin, rows) = (seconds(SystemTime::now()) - 200_000, MAX_ROWS + 50);
        let fill = format!(
            "WITH RECURSIVE n (v) AS (SELECT 1 UNION ALL SELECT v + 1 FROM n WHERE v < {rows}) \
             INSERT INTO narinfos SELECT 'a', v, NULL, {begin} + v FROM n; \
             INSERT INTO narinfos VALUES ('old', 'x', NULL, 1)"
        );
        remembered.with(|database| database.execute_batch(&fill)).unwrap();
        remembered.keep_narinfo("a", "new", None);
        let count = remembered.with(|database| database.query_row("SELECT count(*) FROM narinfos", [], |r| r.get(0)));
        assert_eq!(count, Some(i64::try_from(MAX_ROWS).unwrap()));
        let is_there = |cache: &str, hash: &str| remembered.narinfo(cache, hash).is_some();
        assert!(is_there("a", "new") && is_there("a", "52") && !is_there("a", "51") && !is_there("old", "x"));
    }
}
