//! Stock's database as Nix 2.34 makes it (schema 10), written anew.

use std::path::{Path, PathBuf};

use nix_compat::hash::Hash;
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use rusqlite::{Connection, OptionalExtension, params};

use crate::database::{FILE, SCHEMA, SCHEMA_FILE};
use crate::error::{Error, Result};

/// The tables every stock store has.
const TABLES: &str = "
    create table ValidPaths (
        id integer primary key autoincrement not null,
        path text unique not null,
        hash text not null,
        registrationTime integer not null,
        deriver text,
        narSize integer,
        ultimate integer,
        sigs text,
        ca text
    );
    create table Refs (
        referrer integer not null,
        reference integer not null,
        primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict
    );
    create index IndexReferrer on Refs(referrer);
    create index IndexReference on Refs(reference);
    create trigger DeleteSelfRefs before delete on ValidPaths
        begin delete from Refs where referrer = old.id and reference = old.id; end;
    create table DerivationOutputs (
        drv integer not null,
        id text not null,
        path text not null,
        primary key (drv, id),
        foreign key (drv) references ValidPaths(id) on delete cascade
    );
    create index IndexDerivationOutputs on DerivationOutputs(path);
    create table SchemaMigrations (migration text primary key not null);
";

/// What stock adds when the experimental feature `ca-derivations` is on. Without it stock does not look there.
const REALISATIONS: &str = "
    create table Realisations (
        id integer primary key autoincrement not null,
        drvPath text not null,
        outputName text not null,
        outputPath integer not null,
        signatures text,
        foreign key (outputPath) references ValidPaths(id) on delete cascade
    );
    create index IndexRealisations on Realisations(drvPath, outputName);
    create table RealisationsRefs (
        referrer integer not null,
        realisationReference integer,
        foreign key (referrer) references Realisations(id) on delete cascade,
        foreign key (realisationReference) references Realisations(id) on delete restrict
    );
    create trigger DeleteSelfRefsViaRealisations before delete on ValidPaths
        begin
            delete from RealisationsRefs where realisationReference in
                (select id from Realisations where outputPath = old.id);
        end;
    create index IndexRealisationsRefsRealisationReference on RealisationsRefs(realisationReference);
    create index IndexRealisationsRefs on RealisationsRefs(referrer);
    create index IndexRealisationsRefsOnOutputPath on Realisations(outputPath);
    insert into SchemaMigrations values ('20220326-ca-derivations');
";

/// Where outputs are named by their derivation: stock's next table (2.35), which 2.34 leaves alone.
const BUILD_TRACE: &str = "
    create table BuildTraceV3 (
        id integer primary key autoincrement not null,
        drvPath text not null,
        outputName text not null,
        outputPath text not null,
        signatures text
    );
    create index IndexBuildTraceV3 on BuildTraceV3(drvPath, outputName);
";

/// A database that is being written. Nothing of it counts before [`NewDatabase::finish`].
pub(crate) struct NewDatabase {
    connection: Connection,
    dir: PathBuf,
    store_dir: StoreDir,
}

impl NewDatabase {
    /// Begins one in `dir`, which exists and has none.
    pub(crate) fn create(dir: &Path, store_dir: &StoreDir) -> Result<Self> {
        let path = dir.join(FILE);
        let begin = || -> rusqlite::Result<Connection> {
            let connection = Connection::open(&path)?;
            connection.pragma_update(None, "journal_mode", "wal")?;
            connection.pragma_update(None, "foreign_keys", 1)?;
            connection.execute_batch(&format!("begin; {TABLES}"))?;
            Ok(connection)
        };
        let connection = begin().map_err(Error::database("create", &path))?;
        Ok(Self { connection, dir: dir.to_owned(), store_dir: store_dir.clone() })
    }

    fn written<T>(&self, result: rusqlite::Result<T>) -> Result<T> {
        result.map_err(Error::database("write", self.dir.join(FILE)))
    }

    /// Adds a path without its references, which need not be there yet.
    pub(crate) fn add(&self, info: &PathInfo) -> Result<()> {
        let signatures: Vec<String> = info.signatures.iter().map(ToString::to_string).collect();
        let add = || -> rusqlite::Result<()> {
            let sql = "insert into ValidPaths (path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca) \
                       values (?, ?, ?, ?, ?, ?, ?, ?)";
            self.connection.prepare_cached(sql)?.execute(params![
                self.store_dir.display(&info.path),
                Hash::Sha256(*info.nar_hash.as_bytes()).to_prefixed_base16(),
                i64::try_from(info.registration_time).unwrap_or(i64::MAX),
                info.deriver.as_ref().map(|path| self.store_dir.display(path)),
                i64::try_from(info.nar_size).unwrap_or(i64::MAX),
                info.ultimate.then_some(1),
                (!signatures.is_empty()).then(|| signatures.join(" ")),
                info.ca.as_ref().map(ToString::to_string),
            ])?;
            Ok(())
        };
        self.written(add())
    }

    fn id(&self, path: &StorePath) -> rusqlite::Result<Option<i64>> {
        let mut select = self.connection.prepare_cached("select id from ValidPaths where path = ?")?;
        select.query_row([self.store_dir.display(path)], |row| row.get(0)).optional()
    }

    /// Adds the references of a path; all of them were added.
    pub(crate) fn refer(&self, info: &PathInfo) -> Result<()> {
        let add = || -> rusqlite::Result<()> {
            let referrer = self.id(&info.path)?;
            let mut insert = self.connection.prepare_cached("insert into Refs (referrer, reference) values (?, ?)")?;
            for reference in &info.references {
                insert.execute(params![referrer, self.id(reference)?])?;
            }
            Ok(())
        };
        self.written(add())
    }

    /// Adds an output that a derivation names.
    pub(crate) fn add_output(&self, drv: &StorePath, name: &str, output: &StorePath) -> Result<()> {
        let add = || -> rusqlite::Result<()> {
            let sql = "insert into DerivationOutputs (drv, id, path) values (?, ?, ?)";
            let output = self.store_dir.display(output);
            self.connection.prepare_cached(sql)?.execute(params![self.id(drv)?, name, output]).map(drop)
        };
        self.written(add())
    }

    /// Adds realisations; their paths were added.
    pub(crate) fn add_realisations(&self, realisations: &[Realisation]) -> Result<()> {
        let by_hash = |realisation: &&Realisation| matches!(realisation.id, DrvOutput::Modulo { .. });
        let add = || -> rusqlite::Result<()> {
            if realisations.iter().any(|realisation| by_hash(&realisation)) {
                self.connection.execute_batch(REALISATIONS)?;
            }
            if !realisations.iter().all(|realisation| by_hash(&realisation)) {
                self.connection.execute_batch(BUILD_TRACE)?;
            }
            for realisation in realisations {
                self.add_realisation(realisation)?;
            }
            for realisation in realisations.iter().filter(by_hash) {
                for dependency in realisation.dependencies.keys() {
                    let sql = "insert into RealisationsRefs (referrer, realisationReference) values (?, ?)";
                    if let Some(reference) = self.realisation_id(dependency)? {
                        self.connection.execute(sql, params![self.realisation_id(&realisation.id)?, reference])?;
                    }
                }
            }
            Ok(())
        };
        self.written(add())
    }

    fn add_realisation(&self, realisation: &Realisation) -> rusqlite::Result<()> {
        let signatures: Vec<String> = realisation.signatures.iter().map(ToString::to_string).collect();
        let signatures = signatures.join(" ");
        let output = realisation.id.output().as_str();
        match &realisation.id {
            DrvOutput::Modulo { hash, .. } => {
                let drv = Hash::Sha256(*hash).to_prefixed_base16();
                let sql = "insert into Realisations (drvPath, outputName, outputPath, signatures) values (?, ?, ?, ?)";
                self.connection.execute(sql, params![drv, output, self.id(&realisation.out_path)?, signatures])?;
            }
            DrvOutput::Path { drv, .. } => {
                let path = realisation.out_path.base_name();
                let sql = "insert into BuildTraceV3 (drvPath, outputName, outputPath, signatures) values (?, ?, ?, ?)";
                self.connection.execute(sql, params![drv.base_name(), output, path, signatures])?;
            }
        }
        Ok(())
    }

    fn realisation_id(&self, id: &DrvOutput) -> rusqlite::Result<Option<i64>> {
        let DrvOutput::Modulo { hash, output } = id else { return Ok(None) };
        let sql = "select id from Realisations where drvPath = ? and outputName = ?";
        let key = params![Hash::Sha256(*hash).to_prefixed_base16(), output.as_str()];
        self.connection.query_row(sql, key, |row| row.get(0)).optional()
    }

    /// Makes it a database that stock opens.
    pub(crate) fn finish(self) -> Result<()> {
        let commit = self.connection.execute_batch("commit; pragma wal_checkpoint(truncate);");
        self.written(commit)?;
        let path = self.dir.join(FILE);
        self.connection.close().map_err(|(_, source)| Error::Database { action: "close", path, source })?;
        let schema = self.dir.join(SCHEMA_FILE);
        std::fs::write(&schema, SCHEMA).map_err(Error::file("write", &schema))
    }
}
