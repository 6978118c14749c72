//! castored: a drop-in replacement for nix-daemon.
//!
//! One executable with three names. As `castored` it has the commands of [`cli`]; as `nix-daemon` it takes what
//! stock's takes ([`stock`]); as `castored-sandbox` it is the helper that a build runs in, and nothing else.

mod bar;
mod budget;
mod cli;
mod daemon;
mod du;
mod failure;
mod fsck;
mod idle;
mod import;
mod kept;
mod mending;
mod mount;
mod moving;
mod peer;
mod plot;
mod prefetch;
mod serve;
mod sizes;
mod sockets;
mod state;
mod stats;
mod status;
mod stock;
mod umount;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

/// Threads hand blocks and pieces of archives to each other all the time. What glibc's allocator keeps of them for the
/// thread that first had them came to 500 MiB in a daemon that sent a closure of 1 GB, and comes to 170 MiB with this one.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let called_as = arguments.first().and_then(|name| Path::new(name).file_name()).and_then(|name| name.to_str());
    let result = match called_as {
        Some(build::sandbox::HELPER_NAME) => build::sandbox_main(),
        Some("nix-daemon") => stock::run(&arguments[1..]),
        _ => cli::Cli::parse().run(),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}
