//! BuildDerivation's derivation: as in a `.drv` file, but with its inputs already resolved to store paths.

use std::collections::BTreeMap;

use super::Protocol;
use super::values::{Value, read};
use crate::derivation::{BasicDerivation, Error, Output, OutputName};
use crate::store_path::StorePath;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

/// Reads the derivation of `drv_path`, whose name is not sent.
pub(crate) fn read_derivation(
    reader: &mut Reader<'_>,
    protocol: &Protocol,
    drv_path: &StorePath,
) -> Result<BasicDerivation, ReadError> {
    let mut outputs = BTreeMap::new();
    reader.each_of_strings(4, |reader| {
        let name: OutputName = read(reader, protocol)?;
        let (path, algorithm, hash) = (reader.text(MAX_STRING)?, reader.text(MAX_STRING)?, reader.text(MAX_STRING)?);
        let output = Output::from_fields(&protocol.store_dir, path, algorithm, hash).map_err(Invalid::from)?;
        outputs.insert(name, output);
        Ok(())
    })?;
    let input_srcs = read(reader, protocol)?;
    let platform = reader.bytes(MAX_STRING)?.to_vec();
    let builder = reader.bytes(MAX_STRING)?.to_vec();
    let mut args = Vec::new();
    reader.each_of_strings(1, |reader| {
        args.push(reader.bytes(MAX_STRING)?.to_vec());
        Ok(())
    })?;
    let mut env = BTreeMap::new();
    reader.each_of_strings(2, |reader| {
        let key = reader.bytes(MAX_STRING)?.to_vec();
        env.insert(key, reader.bytes(MAX_STRING)?.to_vec());
        Ok(())
    })?;
    let invalid = |error| ReadError::from(Invalid::Derivation(error));
    let name = drv_path.name().strip_suffix(".drv").ok_or_else(|| invalid(Error::NotADerivation(drv_path.clone())))?;
    if outputs.is_empty() {
        return Err(invalid(Error::NoOutputs(name.to_owned())));
    }
    Ok(BasicDerivation { name: name.to_owned(), outputs, input_srcs, platform, builder, args, env })
}

/// The way back from [`read_derivation`].
pub(crate) fn write_derivation(derivation: &BasicDerivation, protocol: &Protocol, writer: &mut Writer) {
    writer.list(&derivation.outputs, |writer, (name, output)| {
        name.write(protocol, writer);
        let (path, algorithm, hash) = output.to_fields(&protocol.store_dir);
        writer.bytes(path);
        writer.bytes(algorithm);
        writer.bytes(hash);
    });
    derivation.input_srcs.write(protocol, writer);
    writer.bytes(&derivation.platform);
    writer.bytes(&derivation.builder);
    writer.list(&derivation.args, |writer, arg| writer.bytes(arg));
    writer.list(&derivation.env, |writer, (key, value)| {
        writer.bytes(key);
        writer.bytes(value);
    });
}
