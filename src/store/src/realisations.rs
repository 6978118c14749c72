//! Realisations: which valid path an output of a derivation turned out to be.
//!
//! The table `realisations` has them by output, `realised` by the path, so that a path that is deleted takes its
//! realisations with it. An output has two names (see [`DrvOutput`]), and each is a key of its own: a signature covers
//! the name it was made for.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use castore::index::Batch;
use nix_compat::derivation::OutputName;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::signature::Signature;
use nix_compat::store_path::{DIGEST_LEN, StorePath};
use prost::Message;

use crate::derivations::output_paths;
use crate::error::{Error, Result};
use crate::records::RecordWriter;
use crate::register::{MAX_SIGNATURE_LENGTH, MAX_SIGNATURES};
use crate::store::Store;
use crate::trust::SignaturePolicy;

/// Realisations another may name as those it was built with. Stock names none since 2.34, and before that one for each
/// content-addressed input.
const MAX_DEPENDENCIES: usize = 10_000;

/// A realisation in the index; what it is of is in its key.
#[derive(Clone, PartialEq, Message)]
struct Record {
    /// Base name.
    #[prost(string, tag = "1")]
    out_path: String,
    #[prost(string, repeated, tag = "2")]
    signatures: Vec<String>,
    /// The output's name by hash → base name: signatures cover them.
    #[prost(btree_map = "string, string", tag = "3")]
    dependencies: BTreeMap<String, String>,
    /// Base name of the derivation, if it names the output.
    #[prost(string, tag = "4")]
    drv_path: String,
    /// The number that the path has: a path that was deleted and came back is another one. 0 in old rows.
    #[prost(uint32, tag = "5")]
    number: u32,
}

/// The path that a row of the table of realisations names, by its digest, and the number it had.
pub(crate) fn realised_path(key: &[u8], value: &[u8]) -> Result<([u8; 20], u32)> {
    let damaged = |reason: String| Error::Record { key: key.iter().map(|b| format!("{b:02x}")).collect(), reason };
    let record = Record::decode(value).map_err(|e| damaged(e.to_string()))?;
    let path = StorePath::from_base_name(&record.out_path).map_err(|e| damaged(e.to_string()))?;
    Ok((path.digest(), record.number))
}

/// Two rows of the same realisation as one: with the signatures of both, which neither takes back.
pub(crate) fn merged(one: &[u8], other: &[u8]) -> Option<Vec<u8>> {
    let (mut one, other) = (Record::decode(one).ok()?, Record::decode(other).ok()?);
    let room = MAX_SIGNATURES.saturating_sub(one.signatures.len());
    let new: Vec<String> =
        other.signatures.into_iter().filter(|signature| !one.signatures.contains(signature)).collect();
    one.signatures.extend(new.into_iter().take(room));
    one.signatures.sort_unstable();
    Some(one.encode_to_vec())
}

/// The same row for a path that has another number now.
pub(crate) fn renumbered(value: &[u8], number: u32) -> Option<Vec<u8>> {
    Some(Record { number, ..Record::decode(value).ok()? }.encode_to_vec())
}

/// The key of an output: of which kind its name is, the hash or digest in it, the output.
fn key(id: &DrvOutput) -> Vec<u8> {
    match id {
        DrvOutput::Modulo { hash, output } => [b"h", &hash[..], output.as_str().as_bytes()].concat(),
        DrvOutput::Path { drv, output } => [b"p", &drv.digest()[..], output.as_str().as_bytes()].concat(),
    }
}

/// The output of a [`key`], with the derivation's name from the record.
fn named(key: &[u8], record: &[u8]) -> Result<DrvOutput> {
    let damaged = |reason: String| Error::Record { key: String::from_utf8_lossy(key).into_owned(), reason };
    let output =
        |bytes: &[u8]| String::from_utf8_lossy(bytes).parse::<OutputName>().map_err(|e| damaged(e.to_string()));
    match key.split_first() {
        Some((b'h', rest)) => match rest.split_first_chunk::<32>() {
            Some((hash, name)) => Ok(DrvOutput::Modulo { hash: *hash, output: output(name)? }),
            None => Err(damaged("its key is too short".into())),
        },
        Some((b'p', rest)) if rest.len() > 20 => {
            let record = Record::decode(record).map_err(|e| damaged(e.to_string()))?;
            let drv = StorePath::from_base_name(&record.drv_path).map_err(|e| damaged(e.to_string()))?;
            Ok(DrvOutput::Path { drv, output: output(&rest[20..])? })
        }
        _ => Err(damaged("its key names no output".into())),
    }
}

impl Record {
    fn new(realisation: &Realisation, number: u32) -> Self {
        let drv_path = match &realisation.id {
            DrvOutput::Path { drv, .. } => drv.to_string(),
            DrvOutput::Modulo { .. } => String::new(),
        };
        Self {
            out_path: realisation.out_path.to_string(),
            signatures: realisation.signatures.iter().map(Signature::to_string).collect(),
            dependencies: realisation.dependencies.iter().map(|(id, p)| (id.to_string(), p.to_string())).collect(),
            drv_path,
            number,
        }
    }

    /// The realisation of `id`; `None` for one of another derivation with the same digest.
    fn read(bytes: &[u8], id: &DrvOutput) -> Result<Option<Realisation>> {
        let damaged = |reason: String| Error::Record { key: id.to_string(), reason };
        let path = |name: &str| StorePath::from_base_name(name).map_err(|e| damaged(e.to_string()));
        let record = Self::decode(bytes).map_err(|e| damaged(e.to_string()))?;
        if let DrvOutput::Path { drv, .. } = id
            && drv.base_name() != record.drv_path
        {
            return Ok(None);
        }
        let mut realisation = Realisation::new(id.clone(), path(&record.out_path)?);
        for text in &record.signatures {
            realisation.signatures.insert(text.parse().map_err(|e| damaged(format!("signature '{text}': {e}")))?);
        }
        for (id, name) in &record.dependencies {
            let id = id.parse().map_err(|e| damaged(format!("dependency '{id}': {e}")))?;
            realisation.dependencies.insert(id, path(name)?);
        }
        Ok(Some(realisation))
    }
}

impl Store {
    /// The realisation of an output, if it is known. One that was registered under the derivation's hash is found under
    /// its path as well, without signatures, while the derivation is valid.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>> {
        if let Some(bytes) = self.index().get(&self.tables.realisations, &key(id))?
            && let Some(found) = Record::read(&bytes, id)?
        {
            return Ok(Some(found));
        }
        let DrvOutput::Path { drv, output } = id else { return Ok(None) };
        if !self.is_valid(drv)? {
            return Ok(None);
        }
        let derivation = self.derivation(drv)?;
        let Some(hash) = self.output_hash_modulo(drv, &derivation)?.of(output) else { return Ok(None) };
        let by_hash = DrvOutput::Modulo { hash, output: output.clone() };
        let Some(bytes) = self.index().get(&self.tables.realisations, &key(&by_hash))? else { return Ok(None) };
        Ok(Record::read(&bytes, &by_hash)?.map(|found| Realisation::new(id.clone(), found.out_path)))
    }

    /// The realisations of a path, each under the name it was registered with.
    ///
    /// # Errors
    /// When the index cannot be read or a record is damaged.
    pub fn realisations_of(&self, path: &StorePath) -> Result<Vec<Realisation>> {
        let mut found = Vec::new();
        for (key, row) in self.realisation_rows(&path.digest())? {
            found.extend(Record::read(&row, &named(&key, &row)?)?.filter(|found| found.out_path == *path));
        }
        Ok(found)
    }

    /// All realisations, each under the name it was registered with.
    ///
    /// # Errors
    /// When the index cannot be read or a record is damaged.
    pub fn all_realisations(&self) -> Result<Vec<Realisation>> {
        let mut realisations = Vec::new();
        let mut failure = None;
        self.index().scan_prefix(&self.tables.realisations, &[], &mut |key, value| match named(key, value)
            .and_then(|id| Record::read(value, &id))
        {
            Ok(found) => {
                realisations.extend(found);
                ControlFlow::Continue(())
            }
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        })?;
        failure.map_or(Ok(realisations), Err)
    }

    /// Registers what an output turned out to be. Known already, it gets the new signatures.
    ///
    /// # Errors
    /// [`Error::UntrustedRealisation`] by the policy, [`Error::NotValid`] when the path is not valid,
    /// [`Error::RealisationConflict`] when the output is known to be another path, [`Error::RealisationTooLarge`].
    pub fn register_realisation(&self, new: &Realisation, policy: SignaturePolicy<'_>) -> Result<()> {
        if let SignaturePolicy::Require(keys) = policy
            && !new.is_signed_by(keys)
        {
            return Err(Error::UntrustedRealisation(new.id.to_string()));
        }
        let mut changing = self.changing.lock();
        let number = self.valid_entry(&new.out_path)?.number;
        let key = key(&new.id);
        let mut merged = new.clone();
        if let Some(bytes) = self.index().get(&self.tables.realisations, &key)?
            && let Some(known) = Record::read(&bytes, &new.id)?
        {
            if known.out_path != new.out_path {
                return Err(Error::RealisationConflict {
                    id: new.id.to_string(),
                    known: self.store_dir().display(&known.out_path),
                    offered: self.store_dir().display(&new.out_path),
                });
            }
            merged.signatures.extend(known.signatures);
            // Signatures of both cover their own lists; the first is kept.
            merged.dependencies = known.dependencies;
        }
        check_size(&merged)?;
        let mut batch = Batch::default();
        batch.put(self.tables.realised, &[&merged.out_path.digest()[..], &key].concat(), Vec::new());
        let row = Record::new(&merged, number).encode_to_vec();
        let mut records = RecordWriter::new(self);
        records.realisation(&key, &row)?;
        batch.put(self.tables.realisations, &key, row);
        changing.count_realisation();
        records.commit(self, batch)?;
        drop(changing);
        self.registered()
    }

    /// Whether any path has a realisation. In most stores none has, and a look is what a search for each would cost.
    pub(crate) fn has_realisations(&self) -> Result<bool> {
        let mut any = false;
        self.index().scan_prefix(&self.tables.realised, &[], &mut |_, _| {
            any = true;
            ControlFlow::Break(())
        })?;
        Ok(any)
    }

    /// The keys of the realisations of a path, in the table that has them by path.
    pub(crate) fn realisation_keys(&self, path: &StorePath) -> Result<Vec<Vec<u8>>> {
        let mut keys = Vec::new();
        self.index().scan_prefix(&self.tables.realised, &path.digest(), &mut |key, _| {
            keys.push(key.to_vec());
            ControlFlow::Continue(())
        })?;
        Ok(keys)
    }

    /// Adds to `batch` what removes the realisations with these keys, because their path is deleted.
    pub(crate) fn remove_realisations(&self, keys: &[Vec<u8>], batch: &mut Batch) {
        for key in keys {
            batch.delete(self.tables.realisations, &key[DIGEST_LEN..]);
            batch.delete(self.tables.realised, key);
        }
    }

    /// The outputs of a valid derivation with their paths, as far as these are known: from the derivation itself, or
    /// from a realisation.
    ///
    /// # Errors
    /// [`Error::NotValid`], [`Error::Derivation`].
    pub fn output_map(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>> {
        let derivation = self.derivation(drv)?;
        let mut fixed = output_paths(&derivation.basic);
        let mut map = BTreeMap::new();
        for name in derivation.basic.outputs.keys() {
            let path = match fixed.remove(name) {
                Some(path) => Some(path),
                None => {
                    let id = DrvOutput::Path { drv: drv.clone(), output: name.clone() };
                    self.realisation(&id)?.map(|realisation| realisation.out_path)
                }
            };
            map.insert(name.clone(), path);
        }
        Ok(map)
    }
}

fn check_size(realisation: &Realisation) -> Result<()> {
    let too_large = |what, limit| Err(Error::RealisationTooLarge { id: realisation.id.to_string(), what, limit });
    let signatures: &BTreeSet<Signature> = &realisation.signatures;
    if signatures.len() > MAX_SIGNATURES {
        return too_large("signatures", MAX_SIGNATURES);
    }
    if signatures.iter().any(|signature| signature.to_string().len() > MAX_SIGNATURE_LENGTH) {
        return too_large("bytes in a signature", MAX_SIGNATURE_LENGTH);
    }
    if realisation.dependencies.len() > MAX_DEPENDENCIES {
        return too_large("dependencies", MAX_DEPENDENCIES);
    }
    Ok(())
}
