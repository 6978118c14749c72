//! Realisations: which store path an output of a derivation turned out to be.
//!
//! Below 1.38 with its feature a realisation travels as JSON, and its output is named by the hash of the derivation
//! modulo its fixed-output inputs; with the feature the derivation's path names it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::values::{Value, read, read_base_name};
use super::{Features, Protocol};
use crate::derivation::{self, OutputName};
use crate::hash::{self, Algorithm, Hash};
use crate::signature::{self, Signature};
use crate::store_path::{self, StorePath};
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

/// From this minor on a realisation is JSON.
const JSON: u16 = 31;

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

impl Value for DrvOutput {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        if protocol.has(Features::REALISATION_WITH_PATH) {
            Ok(Self::Path { drv: read(reader, protocol)?, output: read(reader, protocol)? })
        } else {
            Ok(reader.text(MAX_STRING)?.parse().map_err(Invalid::Realisation)?)
        }
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        match self {
            Self::Path { drv, output } if protocol.has(Features::REALISATION_WITH_PATH) => {
                drv.write(protocol, writer);
                output.write(protocol, writer);
            }
            _ => writer.bytes(self.to_string()),
        }
    }
}

/// What an output turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Realisation {
    /// The output.
    pub id: DrvOutput,
    /// Where it is.
    pub out_path: StorePath,
    /// Signatures of the JSON below, without themselves.
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

    fn read_json(reader: &mut Reader<'_>) -> Result<Self, ReadError> {
        Ok(Self::from_json(reader.text(MAX_STRING)?).map_err(Invalid::Realisation)?)
    }

    /// The answer to QueryRealisation about `id`.
    pub(super) fn decode_answer(
        reader: &mut Reader<'_>,
        protocol: &Protocol,
        id: &DrvOutput,
    ) -> Result<Option<Self>, ReadError> {
        if protocol.has(Features::REALISATION_WITH_PATH) {
            return match reader.u8()? {
                0 => Ok(None),
                1 => Self::read_value(reader, protocol, id.clone()).map(Some),
                tag => Err(Invalid::UnknownTag { what: "optional value", value: tag.into() }.into()),
            };
        }
        let mut found = None;
        reader.each_of_strings(1, |reader| {
            found = Some(if protocol.since(JSON) {
                Self::read_json(reader)?
            } else {
                Self::new(id.clone(), read(reader, protocol)?)
            });
            Ok(())
        })?;
        Ok(found)
    }

    pub(super) fn encode_answer(found: Option<&Self>, protocol: &Protocol, writer: &mut Writer) {
        // A tag in the new form, a count in the old ones.
        writer.bool(found.is_some());
        if let Some(found) = found {
            if protocol.has(Features::REALISATION_WITH_PATH) {
                found.write_value(protocol, writer);
            } else if protocol.since(JSON) {
                writer.bytes(found.to_json());
            } else {
                found.out_path.write(protocol, writer);
            }
        }
    }

    fn read_value(reader: &mut Reader<'_>, protocol: &Protocol, id: DrvOutput) -> Result<Self, ReadError> {
        let out_path = read(reader, protocol)?;
        let signatures = read(reader, protocol)?;
        Ok(Self { id, out_path, signatures, dependencies: BTreeMap::new() })
    }

    fn write_value(&self, protocol: &Protocol, writer: &mut Writer) {
        self.out_path.write(protocol, writer);
        self.signatures.write(protocol, writer);
    }
}

/// As the argument of RegisterDrvOutput; the answer to QueryRealisation is a little different.
impl Value for Realisation {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        if protocol.has(Features::REALISATION_WITH_PATH) {
            let id = read(reader, protocol)?;
            Self::read_value(reader, protocol, id)
        } else if protocol.since(JSON) {
            Self::read_json(reader)
        } else {
            Ok(Self::new(read(reader, protocol)?, read_base_name(reader)?))
        }
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        if protocol.has(Features::REALISATION_WITH_PATH) {
            self.id.write(protocol, writer);
            self.write_value(protocol, writer);
        } else if protocol.since(JSON) {
            writer.bytes(self.to_json());
        } else {
            self.id.write(protocol, writer);
            writer.bytes(self.out_path.base_name());
        }
    }
}
