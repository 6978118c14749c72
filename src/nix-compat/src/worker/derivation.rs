//! BuildDerivation's derivation: as in a `.drv` file, but with its inputs already resolved to store paths.

use std::collections::BTreeMap;

use super::Protocol;
use super::values::{Value, read};
use crate::content_address::{ContentAddress, Method};
use crate::derivation::{BasicDerivation, Output, OutputName};
use crate::hash::Hash;
use crate::store_path::StorePath;
use crate::wire::{Invalid, MAX_STRING, ReadError, Reader, Writer};

/// Stands in place of an output's hash when the output may differ with each build.
const IMPURE: &str = "impure";

/// Reads the derivation of `drv_path`, whose name is not sent.
pub(super) fn read_derivation(
    reader: &mut Reader<'_>,
    protocol: &Protocol,
    drv_path: &StorePath,
) -> Result<BasicDerivation, ReadError> {
    let mut outputs = BTreeMap::new();
    reader.each_of_strings(4, |reader| {
        let name: OutputName = read(reader, protocol)?;
        outputs.insert(name, read_output(reader, protocol)?);
        Ok(())
    })?;
    let name = drv_path.name().strip_suffix(".drv").ok_or_else(|| Invalid::NotADerivation(drv_path.clone()))?;
    Ok(BasicDerivation {
        name: name.to_owned(),
        outputs,
        input_srcs: read(reader, protocol)?,
        platform: reader.bytes(MAX_STRING)?.to_vec(),
        builder: reader.bytes(MAX_STRING)?.to_vec(),
        args: reader.list(1, |reader| Ok(reader.bytes(MAX_STRING)?.to_vec()))?,
        env: {
            let mut env = BTreeMap::new();
            reader.each_of_strings(2, |reader| {
                let key = reader.bytes(MAX_STRING)?.to_vec();
                env.insert(key, reader.bytes(MAX_STRING)?.to_vec());
                Ok(())
            })?;
            env
        },
    })
}

/// The way back from [`read_derivation`].
pub(super) fn write_derivation(derivation: &BasicDerivation, protocol: &Protocol, writer: &mut Writer) {
    writer.list(&derivation.outputs, |writer, (name, output)| {
        name.write(protocol, writer);
        write_output(output, protocol, writer);
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

/// An output by its three strings: path, hash algorithm with the method's prefix, and hash.
fn read_output(reader: &mut Reader<'_>, protocol: &Protocol) -> Result<Output, ReadError> {
    let path: Option<StorePath> = read(reader, protocol)?;
    let algorithm = reader.text(MAX_STRING)?;
    let hash = reader.text(MAX_STRING)?;
    Ok(Output::from_fields(path, algorithm, hash).map_err(Invalid::Derivation)?)
}

fn write_output(output: &Output, protocol: &Protocol, writer: &mut Writer) {
    let algorithm = |method: Method, algorithm| format!("{}{algorithm}", method.prefix());
    let (path, algorithm, hash) = match output {
        Output::InputAddressed(path) => (Some(path), String::new(), String::new()),
        Output::Fixed { path, ca: ContentAddress { method, hash } } => {
            (Some(path), algorithm(*method, hash.algorithm()), Hash::to_base16(hash))
        }
        Output::Floating { method, algo } => (None, algorithm(*method, *algo), String::new()),
        Output::Deferred => (None, String::new(), String::new()),
        Output::Impure { method, algo } => (None, algorithm(*method, *algo), IMPURE.to_owned()),
    };
    match path {
        Some(path) => path.write(protocol, writer),
        None => writer.bytes(""),
    }
    writer.bytes(algorithm);
    writer.bytes(hash);
}
