//! Signing what was built here.

use std::fs;

use nix_compat::path_info::PathInfo;
use nix_compat::realisation::Realisation;
use nix_compat::signature::SecretKey;
use nix_compat::store_path::StoreDir;

use crate::failure::Failure;

/// The keys of the setting `secret-key-files`.
pub(crate) struct Signer(Vec<SecretKey>);

impl Signer {
    /// Reads the files.
    ///
    /// # Errors
    /// Names the file that is not there or holds no key.
    pub(crate) fn new(files: &[String]) -> Result<Self, Failure> {
        let read = |file: &String| {
            let text = fs::read_to_string(file)
                .map_err(|e| Failure::misc(format!("cannot read the secret key file '{file}': {e}")))?;
            SecretKey::parse(&text).map_err(|e| Failure::misc(format!("the secret key file '{file}': {e}")))
        };
        files.iter().map(read).collect::<Result<_, _>>().map(Self)
    }

    /// Adds a signature by each key.
    pub(crate) fn sign(&self, dir: &StoreDir, info: &mut PathInfo) {
        if self.0.is_empty() {
            return;
        }
        let text = info.fingerprint(dir);
        info.signatures.extend(self.0.iter().map(|key| key.sign(text.as_bytes())));
    }

    /// Adds signatures by each key: one for clients that know of dependencies, one for those since Nix 2.34, to which
    /// they do not count.
    pub(crate) fn sign_realisation(&self, realisation: &mut Realisation) {
        let mut bare = Realisation::new(realisation.id.clone(), realisation.out_path.clone());
        for key in &self.0 {
            realisation.sign(key);
            bare.sign(key);
        }
        realisation.signatures.extend(bare.signatures);
    }
}
