//! What the index alone knows, written into the packs as well, so that it can be found again when the index is lost.
//!
//! A *record* is an object of the castore. There are four:
//!
//! * of a path: its row in the table `paths`;
//! * of a realisation: its key and row in the table `realisations`;
//! * a *checkpoint*: which path numbers are in use. It follows each deletion, when that is durable, and says for ever
//!   that the numbers below its limit which it does not name are dead: no number is given twice;
//! * of a path whose contents may be elsewhere ([`crate::lazy`]): the digest of its hash part, and its source.
//!
//! What a registration writes goes into one block and becomes visible in the same step as the rows themselves. A record
//! that is superseded is not marked by the next sweep and disappears as other objects do; until its pack is rewritten it
//! can still be found there, so a rebuilding has rules for what contradicts itself ([`crate::rebuild`]).
//!
//! The digest of a record follows from the row, so the index need not say where it is.

use std::ops::ControlFlow;

use castore::engine::Garbage;
use castore::index::Batch;
use castore::objects::{ObjectKey, ObjectKind, ObjectWriter};
use castore::{Digest, Node};
use prost::Message;

use crate::error::{Error, Result};
use crate::record::Entry;
use crate::store::{META_CHECKPOINT, META_RECORDS, Store};

/// Records of one block while those of an old store are written.
const BACKFILL: usize = 1000;

/// One record, as it is stored. Exactly one field is set.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Record {
    #[prost(bytes = "vec", optional, tag = "1")]
    pub(crate) path: Option<Vec<u8>>,
    #[prost(message, optional, tag = "2")]
    pub(crate) realisation: Option<RealisationRecord>,
    #[prost(message, optional, tag = "3")]
    pub(crate) checkpoint: Option<Checkpoint>,
    #[prost(message, optional, tag = "4")]
    pub(crate) lazy: Option<LazyRecord>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct LazyRecord {
    /// The digest of the path's hash part.
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) digest: Vec<u8>,
    /// The source's URL.
    #[prost(string, tag = "2")]
    pub(crate) source: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct RealisationRecord {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(crate) row: Vec<u8>,
}

/// Which path numbers below a limit are in use.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Checkpoint {
    /// Numbers from here on it says nothing of.
    #[prost(uint32, tag = "1")]
    pub(crate) limit: u32,
    /// The numbers in use, each as its distance from the one before; packed.
    #[prost(uint32, repeated, tag = "2")]
    pub(crate) distances: Vec<u32>,
    /// What the paths of the store begin with.
    #[prost(string, tag = "3")]
    pub(crate) store_dir: String,
}

impl Checkpoint {
    /// The numbers in use, ascending.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u32> {
        self.distances.iter().scan(0_u32, |number, distance| {
            *number = number.checked_add(*distance)?;
            Some(*number)
        })
    }
}

fn encode_path(row: &[u8]) -> Vec<u8> {
    Record { path: Some(row.to_vec()), ..Record::default() }.encode_to_vec()
}

fn encode_realisation(key: &[u8], row: &[u8]) -> Vec<u8> {
    let realisation = Some(RealisationRecord { key: key.to_vec(), row: row.to_vec() });
    Record { realisation, ..Record::default() }.encode_to_vec()
}

fn encode_lazy(digest: &[u8; 20], source: &str) -> Vec<u8> {
    let lazy = Some(LazyRecord { digest: digest.to_vec(), source: source.to_owned() });
    Record { lazy, ..Record::default() }.encode_to_vec()
}

/// The object that the record of a lazy path is.
pub(crate) fn key_of_lazy(digest: &[u8; 20], source: &str) -> ObjectKey {
    key(&encode_lazy(digest, source))
}

/// The object that a path's record is.
pub(crate) fn key_of_path(row: &[u8]) -> ObjectKey {
    key(&encode_path(row))
}

/// The object that a realisation's record is.
pub(crate) fn key_of_realisation(key: &[u8], row: &[u8]) -> ObjectKey {
    self::key(&encode_realisation(key, row))
}

fn key(record: &[u8]) -> ObjectKey {
    ObjectKey { kind: ObjectKind::Record, digest: Digest::of(record) }
}

/// What is called with each row, and with its key if it is one of the table of realisations.
pub(crate) type EachRow<'a> = &'a mut dyn FnMut(Option<&[u8]>, &[u8]) -> Result<()>;

/// Puts records, then commits what they are about.
pub(crate) struct RecordWriter {
    writer: ObjectWriter,
}

impl RecordWriter {
    pub(crate) fn new(store: &Store) -> Self {
        Self { writer: store.engine.objects().writer() }
    }

    /// The record of a row of the table of paths.
    pub(crate) fn path(&mut self, row: &[u8]) -> Result<()> {
        self.put(&encode_path(row))
    }

    /// The same of a path that was not valid before. Its number makes it unlike any that is here, so none is looked for.
    pub(crate) fn new_path(&mut self, row: &[u8]) -> Result<()> {
        let record = encode_path(row);
        self.writer.put_new(key(&record), &record).map_err(castore::Error::from)?;
        Ok(())
    }

    /// The record of a row of the table of realisations.
    pub(crate) fn realisation(&mut self, key: &[u8], row: &[u8]) -> Result<()> {
        self.put(&encode_realisation(key, row))
    }

    /// The record of a row of the table of lazy paths.
    pub(crate) fn lazy(&mut self, digest: &[u8; 20], source: &str) -> Result<()> {
        self.put(&encode_lazy(digest, source))
    }

    fn put(&mut self, record: &[u8]) -> Result<()> {
        self.writer.put(key(record), record).map_err(castore::Error::from)?;
        Ok(())
    }

    /// Makes the records visible in one step with the batch.
    pub(crate) fn commit(mut self, store: &Store, batch: Batch) -> Result<()> {
        store.commit_by(batch, |batch| Ok(self.writer.flush_with(batch).map_err(castore::Error::from)?))
    }
}

impl Store {
    /// Whether every path and realisation was given its record.
    pub(crate) fn has_records(&self) -> Result<bool> {
        Ok(self.index().get(&self.tables.meta, META_RECORDS)?.is_some())
    }

    /// Writes the records of a store that was made when there were none.
    pub(crate) fn write_missing_records(&self) -> Result<()> {
        if self.has_records()? {
            return Ok(());
        }
        self.rewrite_records()?;
        let mut batch = Batch::default();
        batch.put(self.tables.meta, META_RECORDS, "1");
        self.commit(batch)
    }

    /// Writes the records that are missing; how many.
    pub(crate) fn rewrite_records(&self) -> Result<u64> {
        let mut records = RecordWriter::new(self);
        let (mut written, mut pending) = (0, 0);
        let mut put = |encoded: &[u8]| -> Result<()> {
            written += u64::from(records.writer.put(key(encoded), encoded).map_err(castore::Error::from)?);
            pending += 1;
            if pending % BACKFILL == 0 {
                records.writer.flush().map_err(castore::Error::from)?;
            }
            Ok(())
        };
        self.each_row(&mut |key, row| put(&key.map_or_else(|| encode_path(row), |key| encode_realisation(key, row))))?;
        records.writer.flush().map_err(castore::Error::from)?;
        Ok(written)
    }

    /// Gives every row that has a record: without a key one of the table of paths.
    pub(crate) fn each_row(&self, each: EachRow<'_>) -> Result<()> {
        let mut failure = None;
        for (table, with_key) in [(&self.tables.paths, false), (&self.tables.realisations, true)] {
            self.index().scan_prefix(table, &[], &mut |key, row| match each(with_key.then_some(key), row) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            })?;
            if let Some(error) = failure.take() {
                return Err(error);
            }
        }
        Ok(())
    }

    /// Marks the records that count as alive, and gives the trees of all valid paths. After deletions it first writes a
    /// checkpoint.
    pub(crate) fn mark_records(&self, garbage: &mut Garbage, deleted: bool) -> Result<Vec<Node>> {
        if deleted {
            self.write_checkpoint()?;
        }
        if let Some(digest) = self.index().get(&self.tables.meta, META_CHECKPOINT)?
            && let Ok(digest) = <[u8; 32]>::try_from(&digest[..])
        {
            garbage.mark_record(&Digest::from(digest));
        }
        self.mark_lazy_records(garbage)?;
        let mut roots = Vec::new();
        self.each_row(&mut |key, row| {
            let record = key.map_or_else(|| key_of_path(row), |key| key_of_realisation(key, row));
            garbage.mark_record(&record.digest);
            if key.is_none() {
                roots.push(Entry::decode(b"a path", row)?.node);
            }
            Ok(())
        })?;
        Ok(roots)
    }

    /// Writes down which numbers are in use. Only what was durably deleted is missing from it, since it would be missing
    /// for ever.
    pub(crate) fn write_checkpoint(&self) -> Result<()> {
        let limit = self.changing.lock().next();
        let mut checkpoint =
            Checkpoint { limit, store_dir: self.store_dir().as_str().to_owned(), ..Default::default() };
        let mut before = 0;
        self.index().scan_prefix(&self.tables.numbers, &[], &mut |number, _| {
            if let Ok(number) = <[u8; 4]>::try_from(number).map(u32::from_be_bytes)
                && number < limit
            {
                checkpoint.distances.push(number - before);
                before = number;
            }
            ControlFlow::Continue(())
        })?;
        self.sync()?;
        let record = Record { checkpoint: Some(checkpoint), ..Record::default() }.encode_to_vec();
        let mut records = RecordWriter::new(self);
        records.put(&record)?;
        let mut batch = Batch::default();
        batch.put(self.tables.meta, META_CHECKPOINT, Digest::of(&record).as_bytes().to_vec());
        records.commit(self, batch)
    }

    /// Reads a record.
    pub(crate) fn record(&self, key: &ObjectKey) -> Result<Option<Record>> {
        let Some(bytes) = self.engine.objects().get(key).map_err(castore::Error::from)? else { return Ok(None) };
        let damaged = |e: prost::DecodeError| Error::Record { key: key.to_string(), reason: e.to_string() };
        Ok(Some(Record::decode(&bytes[..]).map_err(damaged)?))
    }
}
