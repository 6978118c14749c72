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
mod serve;
mod sizes;
mod state;
mod stats;
mod status;
mod stock;
mod umount;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

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
