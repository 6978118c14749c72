//! Sends what was built to other stores, in the background.
//!
//! | module | |
//! |---|---|
//! | [`uploads`](Uploads) | the destinations of a daemon, and what it tells of them |
//! | `sender` | one destination's thread: what is next, when to try again |
//! | `realisations` | which realisations go with the paths
//! | `destination` | what can be asked of any destination: a binary cache, or a store that speaks a protocol |
//!
//! The queue is the store's ([`store::Store::queue_uploads`]), and so outlives this process. Nobody waits for a destination:
//! one that is gone costs a warning now and then.

mod destination;
mod realisations;
mod sender;
mod uploads;

pub use destination::Error;
pub use uploads::{Uploads, Waiting};
