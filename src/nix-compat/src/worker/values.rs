//! The encodings of the store's own types.

use std::collections::{BTreeMap, BTreeSet};

use super::Protocol;
use crate::content_address::ContentAddress;
use crate::derivation::OutputName;
use crate::hash::NarHash;
use crate::path_info::PathInfo;
use crate::signature::Signature;
use crate::store_path::StorePath;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

/// A value with one encoding for each protocol, whatever message it is part of.
///
/// Messages are made of these. They can also be read and written on their own, for a part of a message or in a test.
pub trait Value: Sized {
    /// Takes the value from the front of what is left.
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError>;
    /// Appends the value.
    fn write(&self, protocol: &Protocol, writer: &mut Writer);
}

/// A value that travels as one string of text.
pub(super) trait Text: Sized {
    fn from_text(text: &str, protocol: &Protocol) -> Result<Self, Invalid>;
    fn to_text(&self, protocol: &Protocol) -> String;
}

/// Reads whatever value the context asks for.
pub(super) fn read<T: Value>(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<T, ReadError> {
    T::read(reader, protocol)
}

/// Reads a store path that is sent without its directory.
pub(super) fn read_base_name(reader: &mut Reader<'_>) -> Result<StorePath, ReadError> {
    StorePath::from_base_name(reader.text(MAX_STRING)?).map_err(|error| Invalid::StorePath(error).into())
}

/// Reads a path info in the layout of 1.16 with its path in front (ValidPathInfo), as AddToStore answers it and as it
/// stands before each NAR inside AddMultipleToStore.
pub fn read_path_info(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<PathInfo, ReadError> {
    let path = read(reader, protocol)?;
    read_unkeyed_path_info(reader, protocol, path)
}

/// The way back from [`read_path_info`].
pub fn write_path_info(info: &PathInfo, protocol: &Protocol, writer: &mut Writer) {
    info.path.write(protocol, writer);
    write_unkeyed_path_info(info, protocol, writer);
}

/// Reads what is known about `path`, which the reader of the message knows already (UnkeyedValidPathInfo).
pub fn read_unkeyed_path_info(
    reader: &mut Reader<'_>,
    protocol: &Protocol,
    path: StorePath,
) -> Result<PathInfo, ReadError> {
    Ok(PathInfo {
        path,
        deriver: read(reader, protocol)?,
        nar_hash: read(reader, protocol)?,
        references: read(reader, protocol)?,
        registration_time: reader.u63()?,
        nar_size: reader.u64()?,
        ultimate: reader.bool()?,
        signatures: read(reader, protocol)?,
        ca: read(reader, protocol)?,
    })
}

/// The way back from [`read_unkeyed_path_info`]: everything but the path.
pub fn write_unkeyed_path_info(info: &PathInfo, protocol: &Protocol, writer: &mut Writer) {
    info.deriver.write(protocol, writer);
    info.nar_hash.write(protocol, writer);
    info.references.write(protocol, writer);
    writer.u64(info.registration_time);
    writer.u64(info.nar_size);
    writer.bool(info.ultimate);
    info.signatures.write(protocol, writer);
    info.ca.write(protocol, writer);
}

impl<T: Text> Value for T {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        Ok(T::from_text(reader.text(MAX_STRING)?, protocol)?)
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        writer.bytes(self.to_text(protocol));
    }
}

/// "" is none.
impl<T: Text> Value for Option<T> {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        match reader.text(MAX_STRING)? {
            "" => Ok(None),
            text => Ok(Some(T::from_text(text, protocol)?)),
        }
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        match self {
            Some(value) => value.write(protocol, writer),
            None => writer.bytes(""),
        }
    }
}

impl<T: Text> Value for Vec<T> {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let mut list = Vec::new();
        reader.each_of_strings(1, |reader| {
            list.push(T::read(reader, protocol)?);
            Ok(())
        })?;
        Ok(list)
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        writer.list(self, |writer, value| value.write(protocol, writer));
    }
}

/// Elements may come in any order and more than once.
impl<T: Text + Ord> Value for BTreeSet<T> {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let mut set = BTreeSet::new();
        reader.each_of_strings(1, |reader| {
            set.insert(T::read(reader, protocol)?);
            Ok(())
        })?;
        Ok(set)
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        writer.list(self, |writer, value| value.write(protocol, writer));
    }
}

/// The last of several equal keys counts. A missing value is "".
impl<K: Text + Ord, V: Text> Value for BTreeMap<K, Option<V>> {
    fn read(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Self, ReadError> {
        let mut map = BTreeMap::new();
        reader.each_of_strings(2, |reader| {
            let key = K::read(reader, protocol)?;
            map.insert(key, Option::read(reader, protocol)?);
            Ok(())
        })?;
        Ok(map)
    }

    fn write(&self, protocol: &Protocol, writer: &mut Writer) {
        writer.list(self, |writer, (key, value)| {
            key.write(protocol, writer);
            value.write(protocol, writer);
        });
    }
}

impl Text for StorePath {
    fn from_text(text: &str, protocol: &Protocol) -> Result<Self, Invalid> {
        Ok(protocol.store_dir.parse(text)?)
    }

    fn to_text(&self, protocol: &Protocol) -> String {
        protocol.store_dir.display(self)
    }
}

/// Bare base16 out, any form in.
impl Text for NarHash {
    fn from_text(text: &str, _: &Protocol) -> Result<Self, Invalid> {
        Ok(NarHash::parse(text)?)
    }

    fn to_text(&self, _: &Protocol) -> String {
        self.to_base16()
    }
}

impl Text for Signature {
    fn from_text(text: &str, _: &Protocol) -> Result<Self, Invalid> {
        Ok(Signature::parse(text)?)
    }

    fn to_text(&self, _: &Protocol) -> String {
        self.to_string()
    }
}

impl Text for ContentAddress {
    fn from_text(text: &str, _: &Protocol) -> Result<Self, Invalid> {
        Ok(ContentAddress::parse(text)?)
    }

    fn to_text(&self, _: &Protocol) -> String {
        self.to_string()
    }
}

impl Text for OutputName {
    fn from_text(text: &str, _: &Protocol) -> Result<Self, Invalid> {
        Ok(text.parse()?)
    }

    fn to_text(&self, _: &Protocol) -> String {
        self.to_string()
    }
}
