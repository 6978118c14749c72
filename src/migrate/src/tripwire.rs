//! What stops a stock client that would use castored's store without its daemon.
//!
//! Stock Nix run as root without `NIX_REMOTE=daemon` opens store directory and database itself. In castored's state
//! directory it finds a database that answers no question: every query of paths and every change fails, before stock
//! touches a file. All releases name the database in that error, with symlinks resolved, so the name of the file is
//! the message ([`NAME`]); newer ones also print what SQLite says, and there it stands again.
//!
//! *Opening* it succeeds: stock prepares its statements for any store that shares the state directory, also one
//! that is not castored's and is only computed with, which harms nobody.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::symlink;
use std::path::Path;

use rusqlite::Connection;

use crate::database::{self, FILE, SCHEMA, SCHEMA_FILE};
use crate::error::{Error, Result};

/// The real name of the database, which stock prints.
pub const NAME: &str = "this-store-belongs-to-castored-start-its-daemon-and-set-NIX_REMOTE=daemon";
/// What SQLite says when anything is asked of it.
const SAID: &str = "this store belongs to castored; start its daemon and set NIX_REMOTE=daemon";
/// `cast`, where SQLite keeps the kind of a database.
const APPLICATION_ID: u32 = u32::from_be_bytes(*b"cast");
/// Where in the file that is: four bytes, big-endian.
const APPLICATION_ID_AT: usize = 68;
/// What SQLite keeps beside a database.
const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// Whether a database is such a one.
pub fn is_ours(database: &Path) -> bool {
    let mut header = [0; APPLICATION_ID_AT + 4];
    let read = File::open(database).and_then(|mut file| file.read_exact(&mut header));
    read.is_ok() && header[APPLICATION_ID_AT..] == APPLICATION_ID.to_be_bytes()
}

/// Puts one into `<state>/db`, which exists, unless there is one or stock has paths there. Answers whether there is one
/// now. A stock database without paths, as `nix-store --init` makes it, is replaced.
///
/// # Errors
/// When files cannot be written.
pub fn install(state_dir: &Path) -> Result<bool> {
    let dir = state_dir.join("db");
    let link = dir.join(FILE);
    if is_ours(&link) {
        return Ok(true);
    }
    if link.exists() {
        if !database::count(&link).is_ok_and(|paths| paths == 0) {
            return Ok(false);
        }
        for companion in COMPANIONS {
            remove(&dir.join(format!("{FILE}{companion}")))?;
        }
    }
    let real = dir.join(NAME);
    write(&real)?;
    let schema = dir.join(SCHEMA_FILE);
    fs::write(&schema, SCHEMA).map_err(Error::file("write", &schema))?;
    let new = dir.join(".db.sqlite.new");
    remove(&new)?;
    symlink(NAME, &new).map_err(Error::file("create", &new))?;
    fs::rename(&new, &link).map_err(Error::file("create", &link))?;
    Ok(true)
}

fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::file("remove", file)(e)),
        _ => Ok(()),
    }
}

/// Stock prepares statements that read and change three tables. Two of them are there. The third is a view whose rows
/// cannot be computed, and whose changes are refused.
fn write(path: &Path) -> Result<()> {
    for companion in ["", "-wal", "-shm", "-journal"] {
        let mut name = path.as_os_str().to_owned();
        name.push(companion);
        remove(Path::new(&name))?;
    }
    let columns = "id, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca";
    let values = ["said"; 9].join(", ");
    let mut sql = format!(
        "pragma application_id = {APPLICATION_ID};
         begin;
         create table Refs (referrer integer not null, reference integer not null, primary key (referrer, reference));
         create table DerivationOutputs (drv integer not null, id text not null, path text not null, primary key (drv, id));
         create view ValidPaths ({columns}) as
             select {values} from (select json_extract('{{}}', '{SAID}') as said);"
    );
    for change in ["insert", "update", "delete"] {
        sql.push_str(&format!(
            "create trigger Refuse_{change} instead of {change} on ValidPaths begin select raise(abort, '{SAID}'); end;"
        ));
    }
    sql.push_str("commit;");
    let write = || Connection::open(path)?.execute_batch(&sql);
    write().map_err(Error::database("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_can_be_opened_and_answers_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("db")).unwrap();
        for _ in 0..2 {
            assert!(install(dir.path()).unwrap());
        }
        let link = dir.path().join("db").join(FILE);
        assert!(is_ours(&link));
        let connection = Connection::open(&link).unwrap();
        for sql in
            ["select id from ValidPaths where path = 'x'", "select path from ValidPaths", "delete from ValidPaths"]
        {
            let mut statement = connection.prepare(sql).unwrap();
            let error = statement.query([]).and_then(|mut rows| rows.next().map(|row| row.is_some())).unwrap_err();
            assert!(error.to_string().contains("castored"), "{sql}: {error}");
        }
        let insert = "insert into ValidPaths (path, hash, registrationTime) values ('x', 'y', 1)";
        assert!(connection.execute(insert, []).unwrap_err().to_string().contains("NIX_REMOTE=daemon"));
    }

    #[test]
    fn a_stock_database_with_paths_is_left_alone_and_an_empty_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("db")).unwrap();
        let stock = dir.path().join("db").join(FILE);
        let connection = Connection::open(&stock).unwrap();
        connection.execute_batch("create table ValidPaths (path text); insert into ValidPaths values ('x')").unwrap();
        assert!(!install(dir.path()).unwrap());
        connection.execute_batch("delete from ValidPaths").unwrap();
        drop(connection);
        assert!(install(dir.path()).unwrap() && is_ours(&stock));
    }
}
