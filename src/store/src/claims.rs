//! What a path info says of contents, held against the contents.

use castore::Node;
use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::{Algorithm, Hash};
use nix_compat::path_info::PathInfo;

use crate::error::{Error, Result};
use crate::nar_digest::NarFacts;
use crate::register::NewPath;
use crate::store::Store;

/// What is found in place of a content address that does not give the path it is claimed for.
pub(crate) const OTHER_PATH: &str = "a content address that belongs to another store path";

/// The algorithm a NAR must be hashed with, beside SHA-256, to check the content address of `info`.
pub(crate) fn nar_algorithm(info: &PathInfo) -> Option<Algorithm> {
    info.ca.as_ref().filter(|ca| ca.method == Method::Nar).map(|ca| ca.hash.algorithm())
}

impl Store {
    /// Recomputes from contents that are in the castore everything their path info says of them.
    ///
    /// # Errors
    /// [`Error::HashMismatch`], [`Error::SizeMismatch`], [`Error::ContentAddressMismatch`], and failures of the
    /// castore.
    pub fn check_contents(&self, new: &NewPath) -> Result<()> {
        let nar = self.nar_facts(&new.node, nar_algorithm(&new.info))?;
        self.check_claims(&new.info, &new.node, &nar)
    }

    /// The same for contents that were imported before anything was claimed of them: `nar` is what was found then.
    ///
    /// # Errors
    /// As for [`Store::check_contents`].
    pub fn check_imported(&self, new: &NewPath, nar: &NarFacts) -> Result<()> {
        match nar_algorithm(&new.info) {
            // The archive has not been hashed with that.
            Some(algorithm) if algorithm != Algorithm::Sha256 => self.check_contents(new),
            _ => self.check_claims(&new.info, &new.node, nar),
        }
    }

    /// Compares the claims of `info` with what was found. A NAR size of 0 claims nothing.
    pub(crate) fn check_claims(&self, info: &PathInfo, node: &Node, nar: &NarFacts) -> Result<()> {
        let path = || self.store_dir().display(&info.path);
        if info.nar_size != 0 && info.nar_size != nar.nar_size {
            return Err(Error::SizeMismatch { path: path(), specified: info.nar_size, got: nar.nar_size });
        }
        if info.nar_hash != nar.nar_hash {
            let (specified, got) = (info.nar_hash.to_prefixed_nix32(), nar.nar_hash.to_prefixed_nix32());
            return Err(Error::HashMismatch { path: path(), specified, got });
        }
        let Some(ca) = &info.ca else { return Ok(()) };
        let mismatch = |got| Error::ContentAddressMismatch { path: path(), specified: ca.to_string(), got };
        let hash = match ca.method {
            Method::Nar if info.references.contains(&info.path) => {
                let hashes = self.hashes_modulo_itself(node, &info.path, ca.hash.algorithm())?;
                if hashes.with_places == ca.hash { ca.hash } else { hashes.plain }
            }
            Method::Nar => nar.other.unwrap_or(Hash::Sha256(*nar.nar_hash.as_bytes())),
            Method::Git => self.git_hash(node, ca.hash.algorithm())?,
            Method::Flat | Method::Text => self.flat_hash(node, ca.hash.algorithm(), &path())?,
        };
        if hash != ca.hash {
            return Err(mismatch(ContentAddress { method: ca.method, hash }.to_string()));
        }
        if !info.is_content_addressed(self.store_dir()) {
            return Err(mismatch(OTHER_PATH.to_owned()));
        }
        Ok(())
    }
}
