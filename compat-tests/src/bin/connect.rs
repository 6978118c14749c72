//! Connects the socket that is its standard input to the path that is its argument. The peer of a connection is who
//! connects it, whoever uses it afterwards.

use std::process::ExitCode;

use nix::sys::socket::{UnixAddr, connect};

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("usage: compat-connect SOCKET, with a socket as standard input");
        return ExitCode::FAILURE;
    };
    match UnixAddr::new(path.as_os_str()).and_then(|address| connect(0, &address)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("connecting to {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
