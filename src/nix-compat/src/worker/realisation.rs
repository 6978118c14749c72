//! Realisations on the wire. Below 1.38 with its feature a realisation travels as JSON, and before 1.31 not even so.

use std::collections::BTreeMap;

use super::values::{Value, read, read_base_name};
use super::{Features, Protocol};
use crate::realisation::{DrvOutput, Realisation};
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

/// From this minor on a realisation is JSON.
const JSON: u16 = 31;

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

impl Realisation {
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
