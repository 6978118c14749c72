//! What can go wrong in the store, said with what was tried on what.

use std::path::PathBuf;

use nix_compat::store_path::StorePath;

/// An operation of the store failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The castore below failed.
    #[error(transparent)]
    Castore(#[from] castore::Error),
    /// The index failed.
    #[error(transparent)]
    Index(#[from] castore::index::IndexError),
    /// A collection or a rewriting of packs failed.
    #[error(transparent)]
    Collect(#[from] castore::collect::CollectError),
    /// The paths that were asked about have too many objects.
    #[error("what is asked about has more than {} objects; ask about less at once", castore::engine::MAX_OBJECTS)]
    TooManyObjects,
    /// More paths than can be asked about at once.
    #[error("{count} paths were asked about at once, more than {}", crate::costs::MAX_COSTS)]
    TooManyCosts {
        /// How many.
        count: usize,
    },
    /// A file or directory of the state directory could not be used.
    #[error("cannot {action} '{}': {source}", path.display())]
    File {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A file of the setting `secret-key-files` holds something else.
    #[error("the secret key file '{file}': {source}")]
    SecretKey {
        /// Which file.
        file: String,
        /// What is wrong with it.
        source: nix_compat::signature::Error,
    },
    /// Another process owns the state directory.
    #[error("the store in '{}' is in use by process {pid}; stop it first, or choose another state directory", path.display())]
    InUse {
        /// The state directory.
        path: PathBuf,
        /// The owner, as it wrote itself into the lock file.
        pid: String,
    },
    /// The store was made for another store directory.
    #[error("this store was made for the store directory '{found}', not for '{wanted}'")]
    WrongStoreDir {
        /// As recorded in the index.
        found: String,
        /// As configured now.
        wanted: String,
    },
    /// A path that must be valid is not.
    #[error("path '{0}' is not valid")]
    NotValid(String),
    /// A path to be registered refers to one that is not valid.
    #[error("cannot register path '{path}' because it refers to '{reference}', which is not valid")]
    InvalidReference {
        /// The path that was offered (full path).
        path: String,
        /// The missing one (full path).
        reference: String,
    },
    /// The contents do not have the hash they were announced with.
    #[error("hash mismatch importing path '{path}';\n  specified: {specified}\n  got:       {got}")]
    HashMismatch {
        /// The path that was offered (full path).
        path: String,
        /// The announced hash.
        specified: String,
        /// The hash of what arrived.
        got: String,
    },
    /// The contents do not have the size they were announced with.
    #[error("size mismatch importing path '{path}';\n  specified: {specified}\n  got:       {got}")]
    SizeMismatch {
        /// The path that was offered (full path).
        path: String,
        /// The announced NAR size in bytes.
        specified: u64,
        /// The size of what arrived.
        got: u64,
    },
    /// The content address does not match the contents.
    #[error("ca hash mismatch importing path '{path}';\n  specified: {specified}\n  got:       {got}")]
    ContentAddressMismatch {
        /// The path that was offered (full path).
        path: String,
        /// The announced content address.
        specified: String,
        /// That of what arrived.
        got: String,
    },
    /// Nobody who is trusted vouches for the path.
    #[error("cannot add path '{0}' because it lacks a signature by a trusted key")]
    Untrusted(String),
    /// A path has, or would have, more signatures than are kept.
    #[error("path '{path}' cannot have more than {limit} signatures")]
    TooManySignatures {
        /// The path (full path).
        path: String,
        /// How many are kept.
        limit: usize,
    },
    /// A signature is longer than any real one.
    #[error("a signature of path '{path}' has more than {limit} bytes")]
    SignatureTooLong {
        /// The path (full path).
        path: String,
        /// The bytes one may have.
        limit: usize,
    },
    /// Nobody who is trusted vouches for the realisation.
    #[error("cannot register realisation '{0}' because it lacks a signature by a trusted key")]
    UntrustedRealisation(String),
    /// An output is known to be another path already.
    #[error("cannot register realisation '{id}' as '{offered}': it is already '{known}'")]
    RealisationConflict {
        /// The output.
        id: String,
        /// Its path (full path).
        known: String,
        /// The path that was offered (full path).
        offered: String,
    },
    /// A realisation is larger than any real one.
    #[error("realisation '{id}' has more than {limit} {what}")]
    RealisationTooLarge {
        /// The output.
        id: String,
        /// What there is too much of.
        what: &'static str,
        /// How much is kept.
        limit: usize,
    },
    /// The NAR is malformed, or its stream broke off.
    #[error("cannot import the archive: {0}")]
    Nar(#[from] nix_compat::nar::NarError),
    /// A NAR could not be rendered or written.
    #[error("cannot write the archive: {0}")]
    WriteNar(#[from] nix_compat::nar::WriteError),
    /// Reading the contents to import, or writing those to export, failed.
    #[error("cannot {action} '{what}': {source}")]
    Stream {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// Of which object.
        what: String,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Bytes follow where the archive has ended.
    #[error("the archive is followed by other bytes")]
    TrailingBytes,
    /// The tree is not one the castore can hold.
    #[error("cannot hold the imported tree: {0}")]
    Tree(String),
    /// The directories of an archive hold more entries at once than fit into memory.
    #[error("cannot hold the imported tree: its open directories need more than {limit} bytes of memory")]
    DirectoriesTooLarge {
        /// The bytes they may need.
        limit: usize,
    },
    /// A flat or text object must be one regular file.
    #[error("cannot hash '{0}' flat: regular file expected")]
    NotAFile(String),
    /// A store path could not be computed from the contents.
    #[error("cannot compute the store path of '{name}': {reason}")]
    Path {
        /// Name of the object.
        name: String,
        /// The rule it breaks.
        reason: String,
    },
    /// A derivation in the store is not one.
    #[error("cannot read derivation '{path}': {reason}")]
    Derivation {
        /// The .drv path (full path).
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Making the index anew was interrupted. To go on with half of it would lose the rest.
    #[error("making the index of this store anew was interrupted; run `castored fsck --rebuild-index` again")]
    RebuildUnfinished,
    /// The index could not be made anew.
    #[error(transparent)]
    Rebuild(#[from] castore::rebuild::RebuildError),
    /// A path whose contents are known not to be what they should be.
    #[error("path '{path}' is quarantined: {reason}")]
    Quarantined {
        /// The path (full path).
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A record of the index does not decode.
    #[error("the record of '{key}' in the index is damaged: {reason}")]
    Record {
        /// Key of the record, in hex.
        key: String,
        /// What the decoder said.
        reason: String,
    },
    /// A path cannot be deleted.
    #[error(
        "Cannot delete path '{0}' since it is still alive. To find out why, use: nix-store --query --roots and nix-store --query --referrers"
    )]
    Alive(String),
    /// Who asked for a collection wants no more of it. What had been deleted by then is.
    #[error("the garbage collection was cancelled")]
    Cancelled,
    /// A collection writes a little before it gives space back, and that is not there.
    #[error(
        "cannot collect garbage: the filesystem of '{}' is full ({free} bytes are free), and the reserve for this is used \
         up. The store is intact. Remove something else from that filesystem, {needed} bytes at least, then collect \
         garbage", dir.display()
    )]
    NoRoomToCollect {
        /// The state directory.
        dir: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that it takes.
        needed: u64,
    },
    /// The store holds as many paths as the mount can number.
    #[error("no path numbers are left")]
    NumbersExhausted,
}

/// The result of an operation of the store.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>, source: impl Into<std::io::Error>) -> Self {
        Self::File { action, path: path.into(), source: source.into() }
    }

    /// Whether it comes from a full disk.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        castore::is_disk_full(self)
    }

    pub(crate) fn path(store_dir: &nix_compat::store_path::StoreDir, path: &StorePath) -> Self {
        Self::NotValid(store_dir.display(path))
    }
}

/// An error with what caused it, but not what it has said of that already.
pub fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
