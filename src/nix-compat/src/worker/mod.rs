//! The worker protocol: what Nix's clients and daemons say to each other, as values and their encodings.
//!
//! One connection: [`handshake`] negotiates a [`Protocol`]; then the client sends one [`Request`] after the other, some
//! followed by a [`Payload`]; the server sends any number of [`stderr`] messages, the last of which says whether a
//! [`Response`] follows. All encodings depend on the negotiated minor version and features, from 1.18 (Nix 2.0) to 1.38.
//!
//! Both directions are here, so that clients and tests use what the server uses. Nothing does I/O: see [`crate::wire`] for
//! how messages that have not fully arrived are handled.

mod build_result;
mod derivation;
mod derived_path;
mod gc;
pub mod handshake;
mod method;
mod operation;
mod options;
mod payload;
mod protocol;
mod realisation;
mod request;
mod request_codec;
mod response;
pub mod stderr;
mod values;

pub use crate::realisation::{DrvOutput, Realisation, RealisationError};
pub use build_result::{BuildMode, BuildResult, BuildStatus, BuiltOutput};
pub(crate) use build_result::{read_outputs_by_hash, write_outputs_by_hash};
pub(crate) use derivation::{read_derivation, write_derivation};
pub use derived_path::{DerivedPath, DerivedPathError, OutputsSpec};
pub use gc::{CollectGarbage, GcAction, GcTargets, UNLIMITED};
pub use method::MethodText;
pub use operation::Operation;
pub use options::ClientOptions;
pub use payload::Payload;
pub use protocol::{Features, NEWEST_MINOR, OLDEST_MINOR, Protocol};
pub use request::{AddToStore, AddToStoreNar, MAX_REQUEST, Request};
pub use response::{Missing, Response, SubstitutableInfo};
pub use values::{Value, read_path_info, read_unkeyed_path_info, write_path_info, write_unkeyed_path_info};
