//! Store paths over the castore: path infos, roots, garbage collection, NAR in and out, trust.
//!
//! [`Store`] is the one object everybody above holds. Its methods are synchronous and may be called from many
//! threads at once; those that read from the disk or hash belong on a worker thread, not on an async one.

mod claims;
mod costs;
mod damage;
pub mod derivations;
mod entries;
mod error;
pub mod fsck;
mod gc;
mod git_hash;
mod lazy;
mod lock;
pub mod nar_digest;
mod nar_in;
mod nar_out;
mod nar_tree;
mod quarantine;
mod realisations;
mod rebuild;
mod record;
mod records;
mod register;
mod replace;
mod rewrite;
mod roots;
mod scan;
mod signing;
mod space;
mod store;
mod sweep;
mod temp_roots;
mod trust;
mod uploads;
mod verify;
pub mod view;
mod view_impl;

pub use costs::{MAX_COSTS, PathCost};
pub use damage::DamageListener;
pub use error::{Error, Result, causes};
pub use gc::{GcAction, GcOptions, GcOutcome, GcScope, GcStep, GcWatch};
pub use lazy::{LazyPath, Settled};
pub use nar_in::{AddOptions, Ingested, Pin, Reading};
pub use quarantine::Quarantined;
pub use rebuild::{Dropped, Rebuilt};
pub use record::Entry;
pub use register::{MAX_SIGNATURE_LENGTH, MAX_SIGNATURES, NewPath};
pub use roots::{FileId, GcRoot, Recognise, RootNote};
pub use scan::ReferenceScanner;
pub use signing::Signer;
pub use space::Space;
pub use space::auto::AutoGc;
pub use store::{Config, Durability, Store};
pub use sweep::LastSweep;
pub use temp_roots::TempRoots;
pub use trust::SignaturePolicy;
pub use uploads::{Coming, MAX_QUEUED, UploadTarget};
pub use verify::Damage;
