//! What the store says to those who ask for small things. Everything here blocks.

use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use bzip2::read::MultiBzDecoder;
use nix_compat::narinfo::{Compression, NarInfo};
use nix_compat::realisation::DrvOutput;
use nix_compat::store_path::StorePath;
use store::{AutoGc, Entry, Signer, Store};

use crate::push::Tokens;
use crate::target::{PathDigest, nar_url};

/// A cache's place among others; smaller ones are asked first. That of other servers over a store of their own, before the
/// 40 of cache.nixos.org.
const PRIORITY: u32 = 30;

/// What is served.
#[derive(Clone, Debug)]
pub struct Served {
    /// The paths.
    pub store: Arc<Store>,
    /// Signs what is told of them, beside the signatures they have.
    pub signer: Signer,
    /// Where build logs are.
    pub log_dir: PathBuf,
    /// Who may push; nobody unless given.
    pub pushers: Option<Tokens>,
    /// When to make room for what is pushed.
    pub room: AutoGc,
}

impl Served {
    /// `nix-cache-info`. The cache can be asked for many paths at once (`WantMassQuery`): each costs a look at the index.
    pub(crate) fn cache_info(&self) -> String {
        format!("StoreDir: {}\nWantMassQuery: 1\nPriority: {PRIORITY}\n", self.store.store_dir().as_str())
    }

    /// The valid path of this hash part; `None` also for one of which nothing may be read, so that clients have it
    /// elsewhere.
    pub(crate) fn entry(&self, digest: &PathDigest) -> store::Result<Option<Arc<Entry>>> {
        let Some(path) = self.store.path_from_hash_part(digest)? else { return Ok(None) };
        self.entry_of(&path)
    }

    /// The same by the whole name.
    pub(crate) fn entry_of(&self, path: &StorePath) -> store::Result<Option<Arc<Entry>>> {
        match self.store.check_readable(path) {
            Ok(()) => self.store.shared_entry(path),
            Err(store::Error::Quarantined { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A narinfo's text: the NAR as it is, and signed.
    pub(crate) fn narinfo(&self, digest: &PathDigest) -> store::Result<Option<String>> {
        let Some(entry) = self.entry(digest)? else { return Ok(None) };
        let mut info = entry.info.clone();
        self.signer.sign(self.store.store_dir(), &mut info);
        let url = nar_url(&info.path, &info.nar_hash);
        let (nar_hash, nar_size) = (info.nar_hash, info.nar_size);
        // The URL is made of digits and what stands between them.
        let Ok(mut narinfo) = NarInfo::new(info, url, Compression::None) else { return Ok(None) };
        narinfo.file_hash = Some(nar_hash.into());
        narinfo.file_size = Some(nar_size);
        Ok(Some(narinfo.to_text(self.store.store_dir())))
    }

    /// A realisation as JSON, signed.
    pub(crate) fn realisation(&self, id: &DrvOutput) -> store::Result<Option<String>> {
        let Some(mut realisation) = self.store.realisation(id)? else { return Ok(None) };
        self.signer.sign_realisation(&mut realisation);
        Ok(Some(realisation.to_json()))
    }

    /// A build's log, whichever way it is kept.
    pub(crate) fn log(&self, drv: &StorePath) -> io::Result<Option<Box<dyn Read + Send>>> {
        for compressed in [true, false] {
            match File::open(build::log::LogFile::path(&self.log_dir, drv, compressed)) {
                Ok(file) if compressed => return Ok(Some(Box::new(MultiBzDecoder::new(file)))),
                Ok(file) => return Ok(Some(Box::new(file))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}
