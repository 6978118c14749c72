//! The byte layer below Nix's protocols (worker protocol, section "framing"): integers, strings, lists and framed streams.
//!
//! Everything is an unsigned 64-bit little-endian integer, or a string: its length, its bytes, and zero bytes up to the
//! next multiple of eight. Nothing here does I/O. [`Reader`] works on the bytes received so far and answers
//! [`ReadError::Incomplete`] while they do not hold the whole message: the caller receives more and decodes again from the
//! message's start. No decoder allocates by a length or count it was told.

mod enumeration;
mod error;
mod framed;
mod reader;
mod writer;

pub(crate) use enumeration::wire_enum;
pub use error::{Invalid, ReadError};
pub use framed::{Frame, FrameDecoder};
pub use reader::{MAX_ELEMENTS, MAX_STRING, Reader};
pub use writer::{Writer, padded};
