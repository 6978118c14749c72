//! What holds for any input whatever: one function for each format, which panics where it does not hold.
//!
//! The fuzz targets call these with what the fuzzer thinks up, `tests/corpus.rs` with the inputs that are kept. Besides
//! that nothing panics they demand that what is read is written back to something that reads the same, that no reader
//! takes more than its own message, and that it makes no difference in which pieces the input comes.

mod archives;
mod files;
mod messages;
mod texts;

pub use archives::nar;
pub use files::{conf, derivation, machines, narinfo};
pub use messages::{frames, request, serve};
pub use texts::{content_address, signature, store_path};
