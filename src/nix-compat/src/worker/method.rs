//! Content-address methods in front of a payload.

use crate::content_address::{self, Method};
use crate::hash::Algorithm;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

/// A content-address method as a client wrote it. Kept as text because it stands in front of a payload: an error in it
/// must not cost the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodText(String);

impl MethodText {
    /// What AddToStore below 1.25 writes as a single number.
    const RECURSIVE_SHA256: &'static str = "fixed:r:sha256";

    /// The text for a method and algorithm.
    pub fn new(method: Method, algorithm: Algorithm) -> Self {
        Self(content_address::method_to_string(method, algorithm))
    }

    /// The method and algorithm, if it names any.
    pub fn resolve(&self) -> Result<(Method, Algorithm), content_address::Error> {
        content_address::parse_method(&self.0)
    }

    /// Reads the field of AddToStore since 1.25.
    pub(super) fn read(reader: &mut Reader<'_>) -> Result<Self, ReadError> {
        Ok(Self(reader.lossy_text(MAX_STRING)?))
    }

    /// Writes the field of AddToStore since 1.25.
    pub(super) fn write(&self, writer: &mut Writer) {
        writer.bytes(&self.0);
    }

    /// Reads the fields of AddToStore below 1.25.
    pub(super) fn read_old(reader: &mut Reader<'_>) -> Result<Self, ReadError> {
        let fixed = reader.bool()?;
        let recursive = match reader.u8()? {
            0 => "",
            1 => "r:",
            tag => return Err(Invalid::UnknownTag { what: "ingestion method", value: tag.into() }.into()),
        };
        let algorithm = reader.lossy_text(MAX_STRING)?;
        Ok(Self(if fixed { format!("fixed:{recursive}{algorithm}") } else { Self::RECURSIVE_SHA256.to_owned() }))
    }

    /// Writes the fields of AddToStore below 1.25, which cannot express text hashing.
    pub(super) fn write_old(&self, writer: &mut Writer) {
        let text = self.0.strip_prefix("fixed:").unwrap_or(&self.0);
        let (recursive, algorithm) = match text.strip_prefix("r:") {
            Some(algorithm) => (true, algorithm),
            None => (false, text),
        };
        writer.bool(self.0 != Self::RECURSIVE_SHA256);
        writer.bool(recursive);
        writer.bytes(algorithm);
    }
}
