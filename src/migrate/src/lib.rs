//! Moving in from a stock Nix store, and out into one.
//!
//! * [`adopt`] reads a stock store (its files and its database) into castored's; [`switch`] makes castored its successor
//!   in the same place.
//! * [`export`] writes a stock store.
//! * [`tripwire`] is what stops a stock client that would use castored's store without its daemon.
//!
//! Nothing here prints: whoever calls gets told through [`Progress`].

pub mod adopt;
mod database;
mod error;
pub mod export;
mod links;
mod places;
mod progress;
mod schema;
pub mod switch;
pub mod tripwire;

pub use error::{Error, Result};
pub use places::StockPlaces;
pub use progress::{Progress, Silent, Stage};
