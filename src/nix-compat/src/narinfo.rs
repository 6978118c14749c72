//! Narinfos: how a binary cache describes a store object and the file its NAR is in.
//!
//! A text of lines `Field: value`. [`NarInfo::parse`] reads what stock Nix's caches write, in any order, and passes over
//! fields it does not know; [`NarInfo::to_text`] writes the lines that stock writes, in stock's order.
//!
//! ```
//! use nix_compat::narinfo::{Compression, NarInfo};
//! use nix_compat::store_path::StoreDir;
//!
//! let text = "\
//! StorePath: /nix/store/h6haz8fcxqy67i7c7n03iwh4jx13hhxx-f
//! URL: nar/1xmr8jicvzszfzpz46g37mlpvbzjl2wpwvl2b05psipssyp1sm8h.nar
//! Compression: none
//! NarHash: sha256:1xmr8jicvzszfzpz46g37mlpvbzjl2wpwvl2b05psipssyp1sm8h
//! NarSize: 120
//! References: \n";
//! let narinfo = NarInfo::parse(&StoreDir::default(), text)?;
//! assert_eq!((narinfo.info.nar_size, narinfo.compression), (120, Compression::None));
//! assert_eq!(narinfo.to_text(&StoreDir::default()), text);
//! # Ok::<(), nix_compat::narinfo::Error>(())
//! ```

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::str::FromStr;

use crate::content_address::{self, ContentAddress};
use crate::hash::{self, Algorithm, Hash, NarHash};
use crate::path_info::PathInfo;
use crate::signature::{self, Signature};
use crate::store_path::{self, StoreDir, StorePath};

/// What very old caches have for a deriver they do not know.
const UNKNOWN_DERIVER: &str = "unknown-deriver";

/// Why a text is not a narinfo.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A line without a colon.
    #[error("narinfo has the line '{0}', which is no field")]
    Line(String),
    /// The last line has no end: perhaps there was more.
    #[error("narinfo ends in the middle of a line")]
    Truncated,
    /// A field that there can only be one of.
    #[error("narinfo has the field '{0}' twice")]
    Repeated(&'static str),
    /// A field without which a narinfo is of no use.
    #[error("narinfo lacks the field '{0}'")]
    Missing(&'static str),
    /// A number that is none, or does not fit 64 bits.
    #[error("narinfo has '{value}' for the number '{field}'")]
    Number {
        /// the field
        field: &'static str,
        /// its value
        value: String,
    },
    /// A NAR of no bytes, which does not exist.
    #[error("narinfo says that the NAR is empty")]
    EmptyNar,
    /// A URL that is empty or more than a line.
    #[error("'{0}' cannot be a narinfo's URL")]
    Url(String),
    /// A compression that stock Nix does not have.
    #[error("unknown compression '{0}'")]
    Compression(String),
    /// A store path, whole or a base name, that is none.
    #[error("store path of a narinfo")]
    Path(#[from] store_path::Error),
    /// A hash that is none.
    #[error("hash of a narinfo")]
    Hash(#[from] hash::Error),
    /// A signature that is none.
    #[error("signature of a narinfo")]
    Signature(#[from] signature::Error),
    /// A content address that is none.
    #[error("content address of a narinfo")]
    ContentAddress(#[from] content_address::Error),
}

/// Declares [`Compression`] with the names its members have in narinfos.
macro_rules! compressions {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// How the file with the NAR is compressed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Compression { $($(#[$doc])* $variant,)* }

        impl Compression {
            /// Every member.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name in narinfos.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

compressions! {
    /// Not at all.
    None = "none",
    /// bzip2: what is meant when nothing is said.
    Bzip2 = "bzip2",
    /// Brotli.
    Brotli = "br",
    /// The `compress` of old Unix.
    Compress = "compress",
    /// grzip.
    Grzip = "grzip",
    /// gzip.
    Gzip = "gzip",
    /// lrzip.
    Lrzip = "lrzip",
    /// LZ4.
    Lz4 = "lz4",
    /// lzip.
    Lzip = "lzip",
    /// LZMA without the container of xz.
    Lzma = "lzma",
    /// lzop.
    Lzop = "lzop",
    /// xz: what stock writes unless told otherwise.
    Xz = "xz",
    /// Zstandard.
    Zstd = "zstd",
}

impl Compression {
    /// What follows `.nar` in the names that stock gives files; nothing for those it has no ending for.
    pub const fn file_ending(self) -> &'static str {
        match self {
            Self::Xz => ".xz",
            Self::Bzip2 => ".bz2",
            Self::Zstd => ".zst",
            Self::Lzip => ".lzip",
            Self::Lz4 => ".lz4",
            Self::Brotli => ".br",
            _ => "",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Compression {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "" => Ok(Self::Bzip2),
            _ => Self::ALL
                .iter()
                .copied()
                .find(|compression| compression.as_str() == name)
                .ok_or_else(|| Error::Compression(name.to_owned())),
        }
    }
}

/// A store object in a binary cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    /// What it is. A cache says neither when it was registered nor that it is trusted: 0 and false.
    pub info: PathInfo,
    url: String,
    /// How the file is compressed.
    pub compression: Compression,
    /// Hash of the file, if it is known.
    pub file_hash: Option<Hash>,
    /// Length of the file in bytes, if it is known.
    pub file_size: Option<u64>,
}

impl NarInfo {
    /// An object whose NAR is at `url`, which is neither empty nor of several lines. Relative ones are seen from the
    /// cache's own.
    pub fn new(info: PathInfo, url: impl Into<String>, compression: Compression) -> Result<Self, Error> {
        let url = url.into();
        if url.is_empty() || url.contains('\n') {
            return Err(Error::Url(url));
        }
        Ok(Self { info, url, compression, file_hash: None, file_size: None })
    }

    /// Where the file with the NAR is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Reads a narinfo. Each line must be ended, so that one that was cut off is not taken for a whole one.
    pub fn parse(dir: &StoreDir, text: &str) -> Result<Self, Error> {
        let mut fields = Fields::default();
        let lines = match text.strip_suffix('\n') {
            Some(lines) => lines,
            None if text.is_empty() => return Err(Error::Missing("StorePath")),
            None => return Err(Error::Truncated),
        };
        for line in lines.split('\n') {
            let (name, value) = line.split_once(':').ok_or_else(|| Error::Line(line.to_owned()))?;
            fields.take(dir, name, value.strip_prefix(' ').unwrap_or(value))?;
        }
        fields.finish()
    }

    /// Writes what [`parse`](Self::parse) reads. A signature by a key with a line break in its name cannot be expressed
    /// and is left out.
    pub fn to_text(&self, dir: &StoreDir) -> String {
        let info = &self.info;
        let mut lines = Lines(String::new());
        lines.put("StorePath", dir.display(&info.path));
        lines.put("URL", &self.url);
        lines.put("Compression", self.compression);
        if let Some(hash) = &self.file_hash {
            lines.put("FileHash", hash.to_prefixed_nix32());
        }
        if let Some(size) = self.file_size {
            lines.put("FileSize", size);
        }
        lines.put("NarHash", info.nar_hash);
        lines.put("NarSize", info.nar_size);
        let references: Vec<&str> = info.references.iter().map(StorePath::base_name).collect();
        lines.put("References", references.join(" "));
        if let Some(deriver) = &info.deriver {
            lines.put("Deriver", deriver);
        }
        for signature in info.signatures.iter().filter(|signature| !signature.name().contains('\n')) {
            lines.put("Sig", signature);
        }
        if let Some(ca) = &info.ca {
            lines.put("CA", ca);
        }
        lines.0
    }
}

/// The text as far as it is written.
struct Lines(String);

impl Lines {
    fn put(&mut self, field: &str, value: impl fmt::Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{field}: {value}");
    }
}

/// The fields seen so far.
#[derive(Default)]
struct Fields {
    path: Option<StorePath>,
    url: Option<String>,
    compression: Option<Compression>,
    file_hash: Option<Hash>,
    file_size: Option<u64>,
    nar_hash: Option<NarHash>,
    nar_size: Option<u64>,
    references: Option<BTreeSet<StorePath>>,
    deriver: Option<Option<StorePath>>,
    signatures: BTreeSet<Signature>,
    ca: Option<Option<ContentAddress>>,
}

impl Fields {
    fn take(&mut self, dir: &StoreDir, name: &str, value: &str) -> Result<(), Error> {
        match name {
            "StorePath" => once(&mut self.path, "StorePath", dir.parse(value)?),
            "URL" => once(&mut self.url, "URL", value.to_owned()),
            "Compression" => once(&mut self.compression, "Compression", value.parse()?),
            "FileHash" => once(&mut self.file_hash, "FileHash", Hash::parse(value, None)?),
            "FileSize" => once(&mut self.file_size, "FileSize", number("FileSize", value)?),
            "NarHash" => once(&mut self.nar_hash, "NarHash", nar_hash(value)?),
            "NarSize" => once(&mut self.nar_size, "NarSize", number("NarSize", value)?),
            "References" => {
                let references = value.split(' ').filter(|name| !name.is_empty()).map(StorePath::from_base_name);
                once(&mut self.references, "References", references.collect::<Result<_, _>>()?)
            }
            "Deriver" => {
                let deriver = if value == UNKNOWN_DERIVER { None } else { Some(value.parse()?) };
                once(&mut self.deriver, "Deriver", deriver)
            }
            "Sig" => {
                self.signatures.insert(value.parse()?);
                Ok(())
            }
            "CA" => {
                let ca = if value.is_empty() { None } else { Some(value.parse()?) };
                once(&mut self.ca, "CA", ca)
            }
            _ => Ok(()),
        }
    }

    fn finish(self) -> Result<NarInfo, Error> {
        let info = PathInfo {
            path: self.path.ok_or(Error::Missing("StorePath"))?,
            deriver: self.deriver.flatten(),
            nar_hash: self.nar_hash.ok_or(Error::Missing("NarHash"))?,
            references: self.references.unwrap_or_default(),
            registration_time: 0,
            nar_size: self.nar_size.ok_or(Error::Missing("NarSize"))?,
            ultimate: false,
            signatures: self.signatures,
            ca: self.ca.flatten(),
        };
        if info.nar_size == 0 {
            return Err(Error::EmptyNar);
        }
        let url = self.url.ok_or(Error::Missing("URL"))?;
        let narinfo = NarInfo::new(info, url, self.compression.unwrap_or(Compression::Bzip2))?;
        Ok(NarInfo { file_hash: self.file_hash, file_size: self.file_size, ..narinfo })
    }
}

fn once<T>(field: &mut Option<T>, name: &'static str, value: T) -> Result<(), Error> {
    match field.replace(value) {
        None => Ok(()),
        Some(_) => Err(Error::Repeated(name)),
    }
}

fn number(field: &'static str, value: &str) -> Result<u64, Error> {
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let number = value.parse().ok().filter(|_| digits);
    number.ok_or_else(|| Error::Number { field, value: value.to_owned() })
}

/// Unlike [`NarHash::parse`] wants the algorithm named.
fn nar_hash(text: &str) -> Result<NarHash, Error> {
    match Hash::parse(text, None)? {
        Hash::Sha256(digest) => Ok(digest.into()),
        _ => Err(hash::Error::OtherAlgorithm { text: text.to_owned(), wanted: Algorithm::Sha256 }.into()),
    }
}
