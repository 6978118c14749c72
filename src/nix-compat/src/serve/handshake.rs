//! How a connection begins: each end says what it is and which version it speaks.

use super::{NEWEST_MINOR, OLDEST_MINOR, Protocol};
use crate::store_path::StoreDir;
use crate::wire::{ReadError, Reader, Writer};

const CLIENT_MAGIC: u64 = 0x390c_9deb;
const SERVER_MAGIC: u64 = 0x5452_eecb;
const MAJOR: u64 = 2;

/// Why no connection comes about.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The first word is not the other end's magic number.
    #[error("protocol mismatch: the other end began with {0:#x}")]
    Magic(u64),
    /// A version that is not spoken here.
    #[error("unsupported version {major}.{minor} of the serve protocol: 2.{OLDEST_MINOR} or a newer 2.x is needed")]
    Version {
        /// Its major version.
        major: u64,
        /// Its minor version.
        minor: u64,
    },
    /// It is not complete, or breaks the rules of encoding.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// The client's beginning. It can be followed by the first request once the answer has come.
pub fn write_greeting(minor: u16, writer: &mut Writer) {
    write(CLIENT_MAGIC, minor, writer);
}

/// The server's answer.
pub fn write_answer(minor: u16, writer: &mut Writer) {
    write(SERVER_MAGIC, minor, writer);
}

fn write(magic: u64, minor: u16, writer: &mut Writer) {
    writer.u64(magic);
    writer.u64(MAJOR << 8 | u64::from(minor));
}

/// Reads a client's greeting; a server of version 2.`minor` goes on with the protocol that it gives.
pub fn read_greeting(reader: &mut Reader<'_>, minor: u16, dir: &StoreDir) -> Result<Protocol, HandshakeError> {
    read(CLIENT_MAGIC, reader, minor, dir)
}

/// Reads a server's answer; a client of version 2.`minor` goes on with the protocol that it gives.
pub fn read_answer(reader: &mut Reader<'_>, minor: u16, dir: &StoreDir) -> Result<Protocol, HandshakeError> {
    read(SERVER_MAGIC, reader, minor, dir)
}

fn read(magic: u64, reader: &mut Reader<'_>, own: u16, dir: &StoreDir) -> Result<Protocol, HandshakeError> {
    let found = reader.u64()?;
    if found != magic {
        return Err(HandshakeError::Magic(found));
    }
    let version = reader.u32()?;
    let (major, minor) = (u64::from(version >> 8), u64::from(version & 0xff));
    if major != MAJOR || minor < OLDEST_MINOR.into() {
        return Err(HandshakeError::Version { major, minor });
    }
    // Not above either of two small numbers.
    let minor = minor.min(own.min(NEWEST_MINOR).into()) as u16;
    Ok(Protocol { minor, store_dir: dir.clone() })
}
