//! The command that reaches another machine's store.

use std::io;

use nix_compat::machines::decode_host_key;
use nix_compat::store_uri::StoreUri;

use crate::error::{ClientError, Result};

/// The name by which stock means this machine: the command is run without ssh.
const THIS_MACHINE: &str = "localhost";
/// Options for ssh, as a shell would split them.
const OPTIONS_VARIABLE: &str = "NIX_SSHOPTS";

/// A daemon has nobody to ask for a password, and must learn of it when the other machine is gone.
const OWN_OPTIONS: [&str; 3] = ["-oBatchMode=yes", "-oServerAliveInterval=30", "-oServerAliveCountMax=4"];

/// Which protocol, and with it which program, is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `nix-store --serve --write`
    Serve,
    /// `nix-daemon --stdio`
    Worker,
}

/// A command, and the file it needs.
#[derive(Debug)]
pub(crate) struct SshCommand {
    pub(crate) words: Vec<String>,
    /// The known hosts it goes by; must live as long as the process.
    pub(crate) known_hosts: Option<tempfile::NamedTempFile>,
}

impl SshCommand {
    /// The command for a store. `options` is what `NIX_SSHOPTS` says.
    pub(crate) fn new(uri: &StoreUri, kind: Kind, options: Option<&str>) -> Result<Self> {
        let wrong = |reason: String| ClientError::Uri { uri: uri.to_string(), reason };
        let destination = uri.authority.as_str();
        if destination.is_empty() || destination.starts_with('-') {
            return Err(wrong(format!("invalid SSH host name '{destination}'")));
        }
        let remote = remote_command(uri, kind);
        if destination == THIS_MACHINE {
            return Ok(Self { words: remote, known_hosts: None });
        }

        let (destination, port) = split_port(destination);
        let mut words = vec!["ssh".to_owned(), destination.clone(), "-x".to_owned()];
        if let Some(port) = port {
            words.push(format!("-p{port}"));
        }
        // Of several values of an option ssh takes the first, so ours come last.
        words.extend(split_words(options.unwrap_or_default()).map_err(|reason| wrong(reason.to_owned()))?);
        words.extend(OWN_OPTIONS.map(str::to_owned));
        if let Some(key) = uri.param("ssh-key").filter(|key| !key.is_empty()) {
            words.extend(["-i".to_owned(), key.to_owned()]);
        }
        let mut known_hosts = None;
        if let Some(key) = uri.param("base64-ssh-public-host-key").filter(|key| !key.is_empty()) {
            let key = decode_host_key(key).map_err(|e| wrong(e.to_string()))?;
            let host = destination.rsplit('@').next().unwrap_or_default();
            let file = write_known_hosts(host, port, &key).map_err(|source| wrong(source.to_string()))?;
            words.push(format!("-oUserKnownHostsFile={}", file.path().display()));
            known_hosts = Some(file);
        }
        if uri.param("compress") == Some("true") {
            words.push("-C".to_owned());
        }
        words.push("--".to_owned());
        // ssh joins the words, and a shell at the other end takes them apart again.
        words.extend(remote.iter().map(|word| quoted(word)));
        Ok(Self { words, known_hosts })
    }

    /// The same with the options of the environment.
    pub(crate) fn from_environment(uri: &StoreUri, kind: Kind) -> Result<Self> {
        Self::new(uri, kind, std::env::var(OPTIONS_VARIABLE).ok().as_deref())
    }
}

/// What runs at the other end.
fn remote_command(uri: &StoreUri, kind: Kind) -> Vec<String> {
    let (program, arguments): (_, &[&str]) = match kind {
        Kind::Serve => ("nix-store", &["--serve", "--write"]),
        Kind::Worker => ("nix-daemon", &["--stdio"]),
    };
    let program = uri.param("remote-program").filter(|program| !program.trim().is_empty()).unwrap_or(program);
    let mut words: Vec<String> = program.split_whitespace().map(str::to_owned).collect();
    words.extend(arguments.iter().map(|&word| word.to_owned()));
    if let Some(store) = uri.param("remote-store").filter(|store| !store.is_empty()) {
        words.extend(["--store".to_owned(), store.to_owned()]);
    }
    words
}

/// `user@host:22`; also `user@[::1]:22`, but not `::1`, which is all address.
fn split_port(destination: &str) -> (String, Option<u16>) {
    let (user, host) = destination.rsplit_once('@').map_or((None, destination), |(user, host)| (Some(user), host));
    let (host, port) = match host.rsplit_once(':') {
        Some((host, port)) if !host.contains(':') || host.ends_with(']') => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (host, None),
        },
        _ => (host, None),
    };
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    (user.map_or_else(|| host.to_owned(), |user| format!("{user}@{host}")), port)
}

fn write_known_hosts(host: &str, port: Option<u16>, key: &[u8]) -> io::Result<tempfile::NamedTempFile> {
    let mut file = tempfile::Builder::new().prefix("castored-known-hosts-").tempfile()?;
    let name = port.map_or_else(|| host.to_owned(), |port| format!("[{host}]:{port}"));
    let line = [name.as_bytes(), b" ", key, b"\n"].concat();
    io::Write::write_all(&mut file, &line)?;
    Ok(file)
}

/// The words of a text as a POSIX shell would find them, without expanding anything.
fn split_words(text: &str) -> std::result::Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => words.extend(word.take()),
            '\'' | '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        None => return Err("NIX_SSHOPTS has a quote without its end"),
                        Some(end) if end == c => break,
                        Some('\\') if c == '"' => word.extend(chars.next()),
                        Some(other) => word.push(other),
                    }
                }
            }
            '\\' => word.get_or_insert_default().extend(chars.next()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    Ok(words)
}

/// A word that a shell takes for itself.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=+,@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(uri: &str, kind: Kind, options: &str) -> Vec<String> {
        SshCommand::new(&StoreUri::parse(uri).unwrap(), kind, Some(options)).unwrap().words
    }

    fn with_own<'a>(before: &[&'a str], after: &[&'a str]) -> Vec<&'a str> {
        [before, &OWN_OPTIONS, after].concat()
    }

    #[test]
    fn plain() {
        assert_eq!(
            words("ssh://a@b", Kind::Serve, ""),
            with_own(&["ssh", "a@b", "-x"], &["--", "nix-store", "--serve", "--write"])
        );
        assert_eq!(
            words("ssh-ng://b", Kind::Worker, ""),
            with_own(&["ssh", "b", "-x"], &["--", "nix-daemon", "--stdio"])
        );
    }

    #[test]
    fn every_parameter() {
        let uri = "ssh-ng://a@[::1]:2222?compress=true&ssh-key=/k&remote-program=nix%20daemon\
                   &remote-store=/m?system-features=foo%20bar&max-connections=1";
        assert_eq!(
            words(uri, Kind::Worker, "-v '-oX=a b'  -o\\ y \"c'd\""),
            with_own(
                &["ssh", "a@::1", "-x", "-p2222", "-v", "-oX=a b", "-o y", "c'd"],
                &["-i", "/k", "-C", "--", "nix", "daemon", "--stdio", "--store", "'/m?system-features=foo bar'",],
            )
        );
    }

    #[test]
    fn this_machine_needs_no_ssh() {
        assert_eq!(
            words("ssh://localhost?remote-store=/m?system-features=a%20b", Kind::Serve, "-v"),
            ["nix-store", "--serve", "--write", "--store", "/m?system-features=a b"]
        );
    }

    #[test]
    fn the_host_key() {
        let text = "ssh://a@b:7?base64-ssh-public-host-key=c3NoLWVkMjU1MTkgQUFBQQ==";
        let command = SshCommand::new(&StoreUri::parse(text).unwrap(), Kind::Serve, None).unwrap();
        let file = command.known_hosts.unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "[b]:7 ssh-ed25519 AAAA\n");
        assert!(command.words.contains(&format!("-oUserKnownHostsFile={}", file.path().display())));
    }

    #[test]
    fn what_is_no_destination() {
        for uri in ["ssh://-oProxyCommand=x", "ssh://?x=y"] {
            let refused = SshCommand::new(&StoreUri::parse(uri).unwrap(), Kind::Serve, None);
            assert!(matches!(refused, Err(ClientError::Uri { .. })), "{uri}");
        }
        assert!(split_words("'a").is_err());
    }

    #[test]
    fn ports() {
        for (destination, wanted) in [
            ("b", ("b", None)),
            ("a@b:22", ("a@b", Some(22))),
            ("::1", ("::1", None)),
            ("[::1]", ("::1", None)),
            ("a@[fe80::1%25eth0]:1", ("a@fe80::1%25eth0", Some(1))),
        ] {
            assert_eq!(split_port(destination), (wanted.0.to_owned(), wanted.1));
        }
    }

    #[test]
    fn a_shell_takes_quoted_words_for_themselves() {
        let word = "a b'c\"d$e\\f`g*h\n";
        let script = format!("printf %s {}", quoted(word));
        let output = std::process::Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        assert_eq!(split_words(&quoted(word)).unwrap(), [word]);
    }
}
