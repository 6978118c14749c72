//! Called as `nix-daemon`: stock's command line.
//!
//! Scripts, units and `ssh-ng://` call it so. What stock understands and castored has no use for is accepted.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use ::daemon::{Locations, Trust};
use remote::ClientError;

use crate::daemon;
use crate::failure::Failure;

/// The gRPC port stays closed unless this says otherwise: several daemons may run side by side under stock's name.
const GRPC_VARIABLE: &str = "CASTORED_GRPC_LISTEN";

/// What the arguments ask for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    stdio: bool,
    version: bool,
    /// Trust that does not depend on who connects.
    forced_trust: Option<Trust>,
    /// The store to serve, if another than this machine's.
    store: Option<String>,
    overrides: Vec<(String, String)>,
}

pub(crate) fn run(arguments: &[OsString]) -> Result<ExitCode, Failure> {
    let asked = parse(arguments)?;
    if asked.version {
        // Scripts take the third word for the version of Nix.
        println!("nix-daemon (castored) {}", ::daemon::NIX_VERSION);
        return Ok(ExitCode::SUCCESS);
    }
    let locations = Locations::from_env(|name| std::env::var_os(name))?;
    if asked.stdio {
        return splice(&socket(&locations, &asked)?);
    }
    if let Some(store) = &asked.store {
        if main_socket(&locations, store)? != locations.socket {
            return Err(Failure::Usage(format!("cannot serve the store '{store}': castored serves its own")));
        }
        eprintln!("warning: ignoring '--store {store}': a daemon is not its own client");
    }
    let grpc = match std::env::var(GRPC_VARIABLE) {
        Ok(address) => Some(address.parse().map_err(|e| Failure::Usage(format!("{GRPC_VARIABLE}: {e}")))?),
        Err(_) => None,
    };
    let Asked { overrides, forced_trust, .. } = asked;
    daemon::run(daemon::Options { locations, grpc, http: None, overrides, record: None, forced_trust, keeper: true })
}

fn parse(arguments: &[OsString]) -> Result<Asked, Failure> {
    let mut asked = Asked::default();
    let mut rest = arguments.iter().map(|argument| argument.to_string_lossy().into_owned());
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| Failure::Usage(format!("'{argument}' needs an argument")));
        match argument.as_str() {
            "--daemon" | "--verbose" | "-v" | "--quiet" | "--debug" | "--process-ops" => {}
            "--force-trusted" => asked.forced_trust = Some(Trust::Trusted),
            "--force-untrusted" => asked.forced_trust = Some(Trust::Untrusted),
            "--default-trust" => asked.forced_trust = None,
            "--stdio" => asked.stdio = true,
            "--version" => asked.version = true,
            "--option" => {
                let name = value()?;
                let value = rest.next().ok_or_else(|| Failure::Usage("'--option' needs two arguments".into()))?;
                asked.overrides.push((name, value));
            }
            "--store" => asked.store = Some(value()?),
            "--log-format" => drop(value()?),
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

/// The socket of the daemon that `--stdio` is to pass the connection on to.
///
/// That daemon decides about trust by who called us. `--force-untrusted` goes to the socket where nobody is trusted;
/// `--force-trusted` cannot give more than the daemon would.
fn socket(locations: &Locations, asked: &Asked) -> Result<PathBuf, Failure> {
    if asked.forced_trust.is_some() {
        daemon::settings(locations, &asked.overrides)?.require_feature(daemon::TRUST_OVERRIDE)?;
    }
    let main = main_socket(locations, asked.store.as_deref().unwrap_or("auto"))?;
    Ok(match asked.forced_trust {
        Some(Trust::Untrusted) => main.with_file_name("untrusted"),
        Some(Trust::Trusted) | None => main,
    })
}

/// The socket of the daemon that serves a store.
fn main_socket(locations: &Locations, store: &str) -> Result<PathBuf, Failure> {
    match (store, store.strip_prefix("unix://")) {
        ("" | "auto" | "daemon" | "local" | "unix://", _) => Ok(locations.socket.clone()),
        (_, Some(path)) => Ok(PathBuf::from(path.split_once('?').map_or(path, |(path, _)| path))),
        (_, None) => chroot_socket(store),
    }
}

/// The socket of the daemon that serves the store below another root (`--store /ROOT` or `local?root=/ROOT`).
fn chroot_socket(store: &str) -> Result<PathBuf, Failure> {
    let root = store.strip_prefix("local?root=").or_else(|| store.strip_prefix("local://")).unwrap_or(store);
    let root = Path::new(root.split_once(['?', '&']).map_or(root, |(root, _)| root));
    if !root.is_absolute() {
        return Err(Failure::Usage(format!(
            "cannot serve the store '{store}': castored passes on connections to a castored on this machine"
        )));
    }
    Ok(root.join("nix/var/nix/daemon-socket/socket"))
}

/// `--stdio`: the protocol on standard input and output, by way of the running daemon.
fn splice(path: &Path) -> Result<ExitCode, Failure> {
    let socket = UnixStream::connect(path).map_err(|source| ClientError::NoDaemon { path: path.to_owned(), source })?;
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
        assert_eq!(parsed(&["--stdio", "--force-untrusted"]).forced_trust, Some(Trust::Untrusted));
        assert_eq!(parsed(&["--force-untrusted", "--default-trust", "--process-ops"]).forced_trust, None);
    }

    #[test]
    fn stdio_goes_to_the_daemon_of_the_store_that_is_asked_for() {
        let locations = Locations::below(Path::new("/x")).unwrap();
        let to = |store: Option<&str>, trust: &str| {
            let mut arguments = vec!["--stdio", trust, "--extra-experimental-features", "daemon-trust-override"];
            arguments.extend(store.into_iter().flat_map(|store| ["--store", store]));
            socket(&locations, &parsed(&arguments))
        };
        let main = Path::new("/x/var/nix/daemon-socket/socket");
        for store in [None, Some("auto"), Some("daemon"), Some("unix://")] {
            assert_eq!(to(store, "--default-trust").unwrap(), main);
        }
        assert_eq!(to(None, "--force-untrusted").unwrap(), main.with_file_name("untrusted"));
        assert_eq!(to(Some("unix:///a/b?root=c"), "--force-trusted").unwrap(), Path::new("/a/b"));
        let below_root = Path::new("/r/nix/var/nix/daemon-socket/socket");
        for store in ["/r", "local?root=/r", "local?root=/r&trusted=1"] {
            assert_eq!(to(Some(store), "--default-trust").unwrap(), below_root);
        }
        assert!(to(Some("ssh-ng://elsewhere"), "--default-trust").is_err());
        let refused = socket(&locations, &parsed(&["--stdio", "--force-trusted"]));
        assert!(refused.unwrap_err().to_string().contains("daemon-trust-override"));
    }
}
