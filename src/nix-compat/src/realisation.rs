//! Realisations: which store path an output of a derivation turned out to be.
//!
//! Up to Nix 2.34 an output is named by the hash of its derivation modulo fixed-output inputs, and a realisation is
//! written as JSON; since 2.35 the derivation's path names it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::derivation::{self, OutputName};
use crate::hash::{self, Algorithm, Hash};
use crate::signature::{self, PublicKey, SecretKey, Signature};
use crate::store_path::{self, StorePath};

/// Names an output of a derivation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrvOutput {
    /// As up to Nix 2.34; printed `sha256:<base16>!<output>`.
    Modulo {
        /// The derivation's hash modulo.
        hash: [u8; 32],
        /// The output.
        output: OutputName,
    },
    /// As since Nix 2.35.
    Path {
        /// The derivation.
        drv: StorePath,
        /// The output.
        output: OutputName,
    },
}

/// Why a text is no realisation or names no derivation output.
#[derive(Debug, thiserror::Error)]
pub enum RealisationError {
    /// No "!".
    #[error("'{0}' is not a derivation output: it has no '!'")]
    NoOutput(String),
    /// A hash of another kind than SHA-256, or none.
    #[error("invalid hash in derivation output: {0}")]
    Hash(#[from] hash::Error),
    /// What follows the "!" cannot be an output's name.
    #[error("invalid name in derivation output: {0}")]
    Output(#[from] derivation::Error),
    /// Not the JSON expected.
    #[error("realisation is not valid JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// A path in the JSON is not the base name of a store path.
    #[error("invalid path in realisation: {0}")]
    Path(#[from] store_path::Error),
    /// A signature in the JSON is none.
    #[error("invalid signature in realisation: {0}")]
    Signature(#[from] signature::Error),
}

impl DrvOutput {
    /// The output's name.
    pub fn output(&self) -> &OutputName {
        match self {
            Self::Modulo { output, .. } | Self::Path { output, .. } => output,
        }
    }
}

/// The old form. An output named by its derivation has none, and prints like the new form's parts joined by `^`.
impl fmt::Display for DrvOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Modulo { hash, output } => write!(f, "{}!{output}", Hash::Sha256(*hash).to_prefixed_base16()),
            Self::Path { drv, output } => write!(f, "{drv}^{output}"),
        }
    }
}

impl FromStr for DrvOutput {
    type Err = RealisationError;

    fn from_str(text: &str) -> Result<Self, RealisationError> {
        let (hash, output) = text.split_once('!').ok_or_else(|| RealisationError::NoOutput(text.to_owned()))?;
        let hash = match Hash::parse(hash, Some(Algorithm::Sha256))? {
            Hash::Sha256(hash) => hash,
            other => {
                return Err(hash::Error::OtherAlgorithm {
                    text: other.to_prefixed_base16(),
                    wanted: Algorithm::Sha256,
                }
                .into());
            }
        };
        Ok(Self::Modulo { hash, output: output.parse()? })
    }
}

/// What an output turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Realisation {
    /// The output.
    pub id: DrvOutput,
    /// Where it is.
    pub out_path: StorePath,
    /// Signatures of [`Realisation::fingerprint`].
    pub signatures: BTreeSet<Signature>,
    /// The realisations this one was built with. Only the JSON form has it, and stock leaves it empty since 2.34.
    pub dependencies: BTreeMap<DrvOutput, StorePath>,
}

/// The JSON form; its fields in the order that stock's signatures cover.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Json {
    #[serde(default)]
    dependent_realisations: BTreeMap<String, String>,
    id: String,
    out_path: String,
    #[serde(default)]
    signatures: BTreeSet<String>,
}

impl Realisation {
    /// A realisation without signatures.
    pub fn new(id: DrvOutput, out_path: StorePath) -> Self {
        Self { id, out_path, signatures: BTreeSet::new(), dependencies: BTreeMap::new() }
    }

    /// The compact JSON of old protocols.
    pub fn to_json(&self) -> String {
        let json = Json {
            dependent_realisations: self
                .dependencies
                .iter()
                .map(|(id, path)| (id.to_string(), path.to_string()))
                .collect(),
            id: self.id.to_string(),
            out_path: self.out_path.to_string(),
            signatures: self.signatures.iter().map(Signature::to_string).collect(),
        };
        // Strings and maps of strings: there is nothing in it that JSON could not express.
        serde_json::to_string(&json).unwrap_or_default()
    }

    /// Parses the JSON of old protocols.
    pub fn from_json(text: &str) -> Result<Self, RealisationError> {
        let json: Json = serde_json::from_str(text)?;
        let dependency = |(id, path): (&String, &String)| -> Result<_, RealisationError> {
            Ok((id.parse()?, StorePath::from_base_name(path)?))
        };
        Ok(Self {
            id: json.id.parse()?,
            out_path: StorePath::from_base_name(&json.out_path)?,
            signatures: json.signatures.iter().map(|text| text.parse()).collect::<Result<_, signature::Error>>()?,
            dependencies: json.dependent_realisations.iter().map(dependency).collect::<Result<_, _>>()?,
        })
    }

    /// What signatures cover: JSON without white space. For an output named by hash it is that of [`Realisation::to_json`]
    /// without the signatures (Nix up to 2.34), for one named by its derivation `{"key":…,"value":…}` (since 2.35).
    pub fn fingerprint(&self) -> String {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct ByHash<'a> {
            dependent_realisations: &'a BTreeMap<String, String>,
            id: String,
            out_path: &'a str,
        }
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Key<'a> {
            drv_path: &'a str,
            output_name: &'a str,
        }
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Value<'a> {
            out_path: &'a str,
        }
        #[derive(Serialize)]
        struct ByPath<'a> {
            key: Key<'a>,
            value: Value<'a>,
        }
        let out_path = self.out_path.base_name();
        // As in `to_json`: nothing in it that JSON could not express.
        match &self.id {
            DrvOutput::Modulo { .. } => {
                let dependencies =
                    self.dependencies.iter().map(|(id, path)| (id.to_string(), path.to_string())).collect();
                let text = ByHash { dependent_realisations: &dependencies, id: self.id.to_string(), out_path };
                serde_json::to_string(&text).unwrap_or_default()
            }
            DrvOutput::Path { drv, output } => {
                let key = Key { drv_path: drv.base_name(), output_name: output.as_str() };
                serde_json::to_string(&ByPath { key, value: Value { out_path } }).unwrap_or_default()
            }
        }
    }

    /// Whether one of `keys` made one of the signatures.
    pub fn is_signed_by(&self, keys: &[PublicKey]) -> bool {
        let fingerprint = self.fingerprint();
        let signed = |signature| keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature));
        self.signatures.iter().any(signed)
    }

    /// Adds a signature by `key`.
    pub fn sign(&mut self, key: &SecretKey) {
        self.signatures.insert(key.sign(self.fingerprint().as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_hash() -> Realisation {
        let id = format!("sha256:{}!out", "ab".repeat(32)).parse().unwrap();
        Realisation::new(id, StorePath::from_base_name("g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-foo").unwrap())
    }

    fn key(seed: u8) -> SecretKey {
        let public = ed25519_dalek::SigningKey::from_bytes(&[seed; 32]).verifying_key();
        let both = [[seed; 32], public.to_bytes()].concat();
        SecretKey::parse(&format!("test-{seed}:{}", data_encoding::BASE64.encode(&both))).unwrap()
    }

    #[test]
    fn fingerprints() {
        let mut realisation = by_hash();
        let id = format!("sha256:{}!out", "ab".repeat(32));
        let expected =
            format!(r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-foo"}}"#);
        assert_eq!(realisation.fingerprint(), expected);
        realisation.id = DrvOutput::Path {
            drv: StorePath::from_base_name("g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-foo.drv").unwrap(),
            output: "out".parse().unwrap(),
        };
        assert_eq!(
            realisation.fingerprint(),
            r#"{"key":{"drvPath":"g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-foo.drv","outputName":"out"},"value":{"outPath":"g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-foo"}}"#
        );
    }

    #[test]
    fn a_signature_covers_the_path_and_not_the_other_signatures() {
        let mut realisation = by_hash();
        realisation.sign(&key(1));
        realisation.sign(&key(2));
        assert!(realisation.is_signed_by(&[key(2).public_key()]));
        assert!(!realisation.is_signed_by(&[key(3).public_key()]));
        realisation.out_path = StorePath::from_base_name("g1w7hy3qg1w7hy3qg1w7hy3qg1w7hy3q-bar").unwrap();
        assert!(!realisation.is_signed_by(&[key(2).public_key()]));
        assert_eq!(Realisation::from_json(&realisation.to_json()).unwrap(), realisation);
    }
}
