//! A harness that drives unmodified Nix releases against a castored daemon.
//!
//! * [`machine`] brings a fresh Debian machine to the point where tests can run.
//! * [`releases`] fetches the four stock Nix releases that castored promises to serve, [`sources`] the data of stock's
//!   own unit tests.
//! * [`functional`] runs stock Nix's own functional suite.
//! * [`room`] gives a test its own mount namespace with an empty `/nix`, so that nothing outside is touched.
//! * [`subject`] starts and stops the daemon under test: castored, or stock `nix-daemon` to prove a test right.
//! * [`tree`] makes a large real tree to work on, from the machine's own /usr; [`packages`] closures, from Debian packages.
//! * [`ssh`] stands for another machine, [`browser`] for somebody who looks at pages.
//! * [`call`] runs client commands, as root or as an unprivileged user, and shows what they print.
//! * [`wire`], [`raw`] and [`nar`] speak the worker protocol and the NAR format *independently of castored's own code*, so
//!   that a mistake there cannot hide itself; [`grpc`] calls services knowing only what reflection tells.
//! * [`load`] is a client that costs little, for many requests, many connections and large streams, which [`flood`]
//!   makes; [`memory`] asks what processes use.

pub mod apt;
pub mod browser;
pub mod call;
pub mod checks;
pub mod error;
pub mod flood;
pub mod functional;
pub mod grpc;
pub mod load;
pub mod machine;
pub mod memory;
pub mod nar;
pub mod packages;
pub mod raw;
pub mod releases;
pub mod room;
pub mod sources;
pub mod ssh;
pub mod subject;
pub mod toolchain;
pub mod tree;
pub mod wire;

pub use call::{Call, Output, Who};
pub use error::{Error, Result};
pub use releases::Release;
pub use room::Room;
pub use subject::{Daemon, Subject};
