//! The machines to build on: the `builders` setting, and files such as `/etc/nix/machines`.
//!
//! An entry is a line, or a part of one that ends at `;`. Its fields are separated by white space; a field that is
//! missing or `-` has its default:
//!
//! 1. the machine's store; a name that is neither a URI nor a path means `ssh://name`
//! 2. the systems it builds for, separated by commas (this machine's)
//! 3. the file with the key for ssh (ssh's own choice)
//! 4. how many builds it does at once (1)
//! 5. how fast it is, beside others (1)
//! 6. the features it has, separated by commas (none)
//! 7. those of them that a derivation must ask for (none)
//! 8. its public host key in base 64, as it stands in `known_hosts` (as ssh finds it)
//!
//! `@file` stands for the entries of that file; `#` begins a comment.
//!
//! ```
//! use nix_compat::machines::parse;
//!
//! let here = ["x86_64-linux".to_owned()].into();
//! let machines = parse("builder@far x86_64-linux,i686-linux - 8 2.5 kvm", &here, &mut |_| Ok(None))?;
//! assert_eq!(machines[0].store.to_string(), "ssh://builder@far");
//! assert_eq!(machines[0].max_jobs, 8);
//! # Ok::<(), nix_compat::machines::Error>(())
//! ```

use std::collections::BTreeSet;

use crate::store_uri::{self, StoreUri};

/// How deep files may include each other.
pub const MAX_INCLUDE_DEPTH: usize = 32;
/// How many inclusions there may be in all.
pub const MAX_INCLUSIONS: usize = 256;
/// How many machines there may be.
pub const MAX_MACHINES: usize = 10_000;

/// Why a list of machines cannot be used. The texts are stock's where it has any.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An entry without a store.
    #[error("bad machine specification: store URL was not found at the first column of a row: '{0}'")]
    NoStore(String),
    /// A field that should be a number.
    #[error("bad machine specification: failed to convert column #{column} in a row: '{entry}' to '{wanted}'")]
    Number {
        /// Which field, counted from 0.
        column: usize,
        /// The whole entry.
        entry: String,
        /// The kind of number.
        wanted: &'static str,
    },
    /// A host key that is not base 64.
    #[error("bad machine specification: a column #{column} in a row: '{entry}' is not valid base64 string: {reason}")]
    Base64 {
        /// Which field, counted from 0.
        column: usize,
        /// The whole entry.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A machine slower than not at all.
    #[error("speed factor must be >= 0")]
    SpeedFactor,
    /// A store that is none.
    #[error(transparent)]
    Store(#[from] store_uri::Error),
    /// A file that is named by `@` is there and cannot be read.
    #[error("cannot read the machines in '{path}': {reason}")]
    Include {
        /// The file.
        path: String,
        /// Why not.
        reason: String,
    },
    /// Files include each other without end, or nearly so.
    #[error("'{0}' is included although more than {MAX_INCLUSIONS} files, or {MAX_INCLUDE_DEPTH} deep, are")]
    Inclusions(String),
    /// Too many machines.
    #[error("there are more than {MAX_MACHINES} machines")]
    TooMany,
}

/// A machine to build on.
#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    /// How to reach it.
    pub store: StoreUri,
    /// Systems it builds for.
    pub systems: BTreeSet<String>,
    /// File with the key for ssh.
    pub ssh_key: Option<String>,
    /// Builds at the same time.
    pub max_jobs: u32,
    /// How fast it is compared with others; finite and above 0.
    pub speed_factor: f32,
    /// Features it has.
    pub supported_features: BTreeSet<String>,
    /// Features it has, and builds nothing that does not require them all.
    pub mandatory_features: BTreeSet<String>,
    /// Its public host key in base 64.
    pub public_host_key: Option<String>,
}

impl Machine {
    /// Whether it builds derivations for this system with these required features.
    pub fn builds<'a>(&self, system: &str, mut features: impl Iterator<Item = &'a str> + Clone) -> bool {
        let has =
            |feature: &str| self.supported_features.contains(feature) || self.mandatory_features.contains(feature);
        (system == "builtin" || self.systems.contains(system))
            && features.clone().all(has)
            && self.mandatory_features.iter().all(|mandatory| features.any(|feature| feature == mandatory))
    }
}

/// The machines of a list, in order. Entries without a list of systems build for `systems`.
///
/// `include` gives the text of a file that the list names, or `None` if there is no such file, which is no error.
///
/// # Errors
/// [`Error`] for the first entry that cannot be used.
pub fn parse(
    text: &str,
    systems: &BTreeSet<String>,
    include: &mut dyn FnMut(&str) -> Result<Option<String>, String>,
) -> Result<Vec<Machine>, Error> {
    let mut list = List { systems, include, inclusions: 0, machines: Vec::new() };
    list.add(text, 0)?;
    Ok(list.machines)
}

struct List<'a> {
    systems: &'a BTreeSet<String>,
    include: &'a mut dyn FnMut(&str) -> Result<Option<String>, String>,
    inclusions: usize,
    machines: Vec<Machine>,
}

impl List<'_> {
    fn add(&mut self, text: &str, depth: usize) -> Result<(), Error> {
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default();
            for entry in line.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
                match entry.strip_prefix('@') {
                    Some(path) => self.include(path.trim(), depth)?,
                    None if self.machines.len() == MAX_MACHINES => return Err(Error::TooMany),
                    None => self.machines.push(entry_of(entry, self.systems)?),
                }
            }
        }
        Ok(())
    }

    fn include(&mut self, path: &str, depth: usize) -> Result<(), Error> {
        self.inclusions += 1;
        if depth == MAX_INCLUDE_DEPTH || self.inclusions > MAX_INCLUSIONS {
            return Err(Error::Inclusions(path.to_owned()));
        }
        match (self.include)(path) {
            Ok(Some(text)) => self.add(&text, depth + 1),
            Ok(None) => Ok(()),
            Err(reason) => Err(Error::Include { path: path.to_owned(), reason }),
        }
    }
}

/// A character of a host key that base 64 does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid character in Base64 string: '{0}'")]
pub struct NotBase64(pub char);

/// What a host key's base 64 stands for: a line of `known_hosts` without the name in front. As in stock the first `=` ends
/// it, and bits that make no byte are passed over.
///
/// # Errors
/// [`NotBase64`].
pub fn decode_host_key(text: &str) -> Result<Vec<u8>, NotBase64> {
    let mut bytes = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for c in text.chars().take_while(|c| *c != '=') {
        let digit = match c {
            'A'..='Z' => c as u32 - 'A' as u32,
            'a'..='z' => c as u32 - 'a' as u32 + 26,
            '0'..='9' => c as u32 - '0' as u32 + 52,
            '+' => 62,
            '/' => 63,
            _ => return Err(NotBase64(c)),
        };
        (bits, count) = ((bits << 6 | digit) & 0xfff, count + 6);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
    }
    Ok(bytes)
}

fn entry_of(entry: &str, systems: &BTreeSet<String>) -> Result<Machine, Error> {
    let fields: Vec<&str> = entry.split_whitespace().collect();
    let field = |column: usize| fields.get(column).copied().filter(|field| *field != "-");
    let words = |column: usize| -> Option<BTreeSet<String>> {
        let words = field(column)?.split(',').filter(|word| !word.is_empty());
        Some(words.map(str::to_owned).collect())
    };
    let no_number = |column, wanted| Error::Number { column, entry: entry.to_owned(), wanted };
    let store = field(0).ok_or_else(|| Error::NoStore(entry.to_owned()))?;
    let max_jobs = match field(3) {
        Some(text) => text.parse().map_err(|_| no_number(3, "unsigned int"))?,
        None => 1,
    };
    let speed_factor = match field(4) {
        Some(text) => text.parse().ok().filter(|n: &f32| n.is_finite()).ok_or_else(|| no_number(4, "float"))?,
        None => 1.0,
    };
    if speed_factor < 0.0 {
        return Err(Error::SpeedFactor);
    }
    let public_host_key = field(7);
    if let Some(Err(reason)) = public_host_key.map(decode_host_key) {
        return Err(Error::Base64 { column: 7, entry: entry.to_owned(), reason: reason.to_string() });
    }
    Ok(Machine {
        store: store_of(store)?,
        systems: words(1).unwrap_or_else(|| systems.clone()),
        ssh_key: field(2).map(str::to_owned),
        max_jobs,
        speed_factor: if speed_factor == 0.0 { 1.0 } else { speed_factor },
        supported_features: words(5).unwrap_or_default(),
        mandatory_features: words(6).unwrap_or_default(),
        public_host_key: public_host_key.map(str::to_owned),
    })
}

/// Old lists name hosts only.
fn store_of(text: &str) -> Result<StoreUri, store_uri::Error> {
    let word = text.split('?').next().unwrap_or_default();
    if text.contains('/') || matches!(word, "auto" | "daemon" | "local") {
        StoreUri::parse(text)
    } else {
        StoreUri::parse(&format!("ssh://{text}"))
    }
}
