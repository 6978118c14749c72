//! Nix's data formats and worker protocol: pure, without I/O.
//!
//! Everything here is a function from bytes to values or back. Nothing opens a file or a socket, spawns a thread or
//! needs an async runtime, so the crate can be used by a daemon, a client, a test or a fuzzer alike. The only contact
//! with the outside are the [`std::io::Read`] and [`std::io::Write`] a NAR is walked over, and the callbacks through
//! which [`conf`] asks for included files and [`derivation`] for the derivations it depends on.
//!
//! | to deal with | look at |
//! |---|---|
//! | `/nix/store/<hash>-<name>` | [`store_path`], which also computes paths in all four ways |
//! | `sha256:…`, `sha256-…=`, Nix's own base 32 | [`hash`], [`nixbase32`] |
//! | `fixed:r:sha256:…` | [`content_address`] |
//! | what is known of a store object, and its signatures | [`path_info`], [`signature`] |
//! | what an output of a derivation turned out to be | [`realisation`] |
//! | the archive format | [`nar`] |
//! | what binary caches say of a store object | [`narinfo`] |
//! | `nix-store --export` | [`export`] |
//! | `.drv` files, output paths, placeholders | [`derivation`] |
//! | `nix.conf` | [`conf`] |
//! | a list of machines to build on, a store's URI | [`machines`], [`store_uri`] |
//! | the bytes on the daemon's socket | [`wire`], [`worker`] |
//! | what `nix-store --serve` speaks | [`serve`] |
//!
//! Three rules hold throughout. Types are valid by construction: a [`StorePath`](store_path::StorePath) that exists is
//! a legal one. What comes from outside is never trusted for a size: no allocation follows a length that was read.
//! And a store directory is always an argument ([`StoreDir`](store_path::StoreDir)), never assumed.
//!
//! ```
//! use nix_compat::store_path::{StoreDir, text_path};
//!
//! let dir = StoreDir::default();
//! let path = text_path(&dir, "hello.txt", b"hi\n", &Default::default())?;
//! assert_eq!(dir.display(&path), "/nix/store/0n8rj1cflhzhh0min74l7ml0ck57hkcc-hello.txt");
//! # Ok::<(), nix_compat::store_path::Error>(())
//! ```

pub mod conf;
pub mod content_address;
pub mod derivation;
pub mod export;
pub mod hash;
pub mod machines;
pub mod nar;
pub mod narinfo;
pub mod nixbase32;
pub mod path_info;
pub mod realisation;
pub mod serve;
pub mod signature;
pub mod store_path;
pub mod store_uri;
pub mod wire;
pub mod worker;
