//! A service manager for one server: it keeps the server's descriptors open and starts it again when it dies.
//!
//! systemd can do that as well, and the server does not see a difference: it is handed descriptors by name
//! (`LISTEN_FDS`, `LISTEN_FDNAMES`) and says in messages of `sd_notify` which ones are to be kept for its successor
//! (`FDSTORE=1`) and when it is ready (`READY=1`).
//!
//! ```text
//!  keeper (one thread, a few hundred KiB)                 server
//!    | fork, exec, with all kept descriptors ────────────>|  Manager::take: goes on with what it finds,
//!    |<── FDSTORE=1, FDNAME=mount-device, descriptor ─────|  or makes it and has it kept
//!    |<── READY=1 ────────────────────────────────────────|
//!    |        … it dies …
//!    | kills what it left running, starts the next ──────>|
//! ```
//!
//! * [`Keeper`] is the parent's side, [`Manager`] the server's.
//! * **A server that ends in order takes its descriptors out first** (`FDSTOREREMOVE=1`). So the keeper ends when a server has
//!   ended and nothing is kept, and starts it anew in every other case.
//! * [`image`] makes a copy of a program in memory, for one that lies in a filesystem it serves itself.
//! * [`replace`] has another program take the server's place.

mod backoff;
mod channel;
pub mod image;
mod keeper;
mod manager;
mod orphans;
pub mod replace;
mod spawn;

pub use backoff::Limits;
pub use keeper::{Config, End, Keeper, KeeperError};
pub use manager::{Manager, by_keeper, by_service_manager, given};
