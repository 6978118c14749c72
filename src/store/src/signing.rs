//! Signing what is vouched for here: what was built, and what is served to others.

use std::fs;
use std::path::Path;

use nix_compat::path_info::PathInfo;
use nix_compat::realisation::Realisation;
use nix_compat::signature::{PublicKey, SecretKey};
use nix_compat::store_path::StoreDir;

use crate::error::{Error, Result};

/// The keys of the setting `secret-key-files`.
#[derive(Clone, Debug, Default)]
pub struct Signer(Vec<SecretKey>);

impl Signer {
    /// Reads the files.
    ///
    /// # Errors
    /// [`Error::File`] for a file that cannot be read, [`Error::SecretKey`] for one that holds no key.
    pub fn new(files: &[String]) -> Result<Self> {
        let read = |file: &String| {
            let text =
                fs::read_to_string(file).map_err(|e| Error::file("read the secret key file", Path::new(file), e))?;
            SecretKey::parse(&text).map_err(|source| Error::SecretKey { file: file.clone(), source })
        };
        files.iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// The keys that check its signatures.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.0.iter().map(SecretKey::public_key).collect()
    }

    /// Adds a signature by each key.
    pub fn sign(&self, dir: &StoreDir, info: &mut PathInfo) {
        if self.0.is_empty() {
            return;
        }
        let text = info.fingerprint(dir);
        info.signatures.extend(self.0.iter().map(|key| key.sign(text.as_bytes())));
    }

    /// Adds signatures by each key: one for clients that know of dependencies, one for those since Nix 2.34, to which
    /// they do not count.
    pub fn sign_realisation(&self, realisation: &mut Realisation) {
        let mut bare = Realisation::new(realisation.id.clone(), realisation.out_path.clone());
        for key in &self.0 {
            realisation.sign(key);
            bare.sign(key);
        }
        realisation.signatures.extend(bare.signatures);
    }
}
