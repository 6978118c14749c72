//! Called as `nix-daemon`: stock's command line.
//!
//! Scripts, units and `ssh-ng://` call it so. What stock understands and castored has no use for is accepted.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;

use ::daemon::Locations;
use ::daemon::client::ClientError;

use crate::daemon;
use crate::failure::Failure;

/// The gRPC port stays closed unless this says otherwise: several daemons may run side by side under stock's name.
const GRPC_VARIABLE: &str = "CASTORED_GRPC_LISTEN";

/// What the arguments ask for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    stdio: bool,
    version: bool,
    overrides: Vec<(String, String)>,
}

pub(crate) fn run(arguments: &[OsString]) -> Result<ExitCode, Failure> {
    let asked = parse(arguments)?;
    if asked.version {
        println!("nix-daemon (castored) {}", env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    let locations = Locations::from_env(|name| std::env::var_os(name))?;
    if asked.stdio {
        return splice(&locations);
    }
    let grpc = match std::env::var(GRPC_VARIABLE) {
        Ok(address) => Some(address.parse().map_err(|e| Failure::Usage(format!("{GRPC_VARIABLE}: {e}")))?),
        Err(_) => None,
    };
    daemon::run(daemon::Options { locations, grpc, overrides: asked.overrides })
}

fn parse(arguments: &[OsString]) -> Result<Asked, Failure> {
    let mut asked = Asked::default();
    let mut rest = arguments.iter().map(|argument| argument.to_string_lossy().into_owned());
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| Failure::Usage(format!("'{argument}' needs an argument")));
        match argument.as_str() {
            "--daemon" | "--verbose" | "-v" | "--quiet" | "--debug" | "--process-ops" => {}
            // Through the running daemon, its view of who connects decides.
            "--force-trusted" | "--default-trust" => {}
            "--force-untrusted" => {
                return Err(Failure::Usage(
                    "'--force-untrusted' is not supported; refusing rather than trusting".into(),
                ));
            }
            "--stdio" => asked.stdio = true,
            "--version" => asked.version = true,
            "--option" => {
                let name = value()?;
                let value = rest.next().ok_or_else(|| Failure::Usage("'--option' needs two arguments".into()))?;
                asked.overrides.push((name, value));
            }
            "--store" | "--log-format" => drop(value()?),
            other => match other.strip_prefix("--") {
                // Every setting is an option, booleans also with "no-" in front.
                Some(name) if is_boolean(name) => asked.overrides.push((name.to_owned(), "true".to_owned())),
                Some(name) if name.strip_prefix("no-").is_some_and(is_boolean) => {
                    asked.overrides.push((name["no-".len()..].to_owned(), "false".to_owned()));
                }
                Some(name) => {
                    let name = name.to_owned();
                    asked.overrides.push((name, value()?));
                }
                None => return Err(Failure::Usage(format!("nix-daemon does not know the argument '{other}'"))),
            },
        }
    }
    Ok(asked)
}

fn is_boolean(name: &str) -> bool {
    matches!(
        name,
        "keep-failed" | "keep-going" | "fallback" | "sandbox" | "require-sigs" | "keep-outputs" | "keep-derivations"
    )
}

/// `--stdio`: the protocol on standard input and output, by way of the running daemon. Its view of who connects
/// decides about trust.
fn splice(locations: &Locations) -> Result<ExitCode, Failure> {
    let path = &locations.socket;
    let socket = UnixStream::connect(path).map_err(|source| ClientError::NoDaemon { path: path.clone(), source })?;
    let broken = |source| Failure::Process { action: "pass on the connection", source };
    let mut sending = socket.try_clone().map_err(broken)?;
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            let _ = pass_on(&mut io::stdin(), &mut sending);
            // The daemon sees that nothing more comes and still answers what it has.
            let _ = sending.shutdown(std::net::Shutdown::Write);
        })
        .map_err(broken)?;
    let mut receiving = socket;
    pass_on(&mut receiving, &mut io::stdout()).map_err(broken)?;
    Ok(ExitCode::SUCCESS)
}

/// Copies and flushes after each read: the other end waits for small messages.
fn pass_on(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..n])?;
        to.flush()?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Asked {
        parse(&arguments.iter().map(OsString::from).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn stocks_arguments_are_understood() {
        assert!(parsed(&["--stdio", "--store", "daemon"]).stdio);
        assert_eq!(
            parsed(&[
                "--daemon",
                "--option",
                "cores",
                "3",
                "--extra-experimental-features",
                "nix-command",
                "--no-sandbox"
            ])
            .overrides,
            [("cores", "3"), ("extra-experimental-features", "nix-command"), ("sandbox", "false")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
        );
        assert!(parse(&[OsString::from("frobnicate")]).is_err());
        assert!(parse(&[OsString::from("--stdio"), OsString::from("--force-untrusted")]).is_err());
    }
}
