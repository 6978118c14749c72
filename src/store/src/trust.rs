//! Who may make a path valid.
//!
//! Contents verify themselves; a path info is a claim. It is accepted from a trusted peer that asks for no
//! check, or when it is content-addressed with a matching path, or when a trusted key signed it.

use nix_compat::path_info::PathInfo;
use nix_compat::signature::PublicKey;

use crate::error::{Error, Result};
use crate::store::Store;

/// What a path info has to show before it is accepted.
#[derive(Clone, Copy, Debug)]
pub enum SignaturePolicy<'a> {
    /// The peer is trusted and wants no check, or `require-sigs` is off.
    DontCheck,
    /// A signature by one of these keys, or a matching content address.
    Require(&'a [PublicKey]),
}

impl Store {
    /// Applies the policy to `info`, before any of its contents are read.
    ///
    /// A content-addressed path passes here on the claim alone: the import recomputes its address from the
    /// contents.
    ///
    /// # Errors
    /// [`Error::Untrusted`].
    pub fn check_signatures(&self, info: &PathInfo, policy: SignaturePolicy<'_>) -> Result<()> {
        match policy {
            SignaturePolicy::DontCheck => Ok(()),
            SignaturePolicy::Require(keys) => {
                if info.is_content_addressed(self.store_dir()) || info.is_signed_by(self.store_dir(), keys) {
                    Ok(())
                } else {
                    Err(Error::Untrusted(self.store_dir().display(&info.path)))
                }
            }
        }
    }
}
