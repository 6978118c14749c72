//! Where things are and what is configured: the NIX_* variables and nix.conf, as stock reads them.

use std::collections::HashMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{AccessFlags, access};
use nix_compat::conf::{self, Settings};
use nix_compat::store_path::StoreDir;
use store::Durability;

/// The default locations of a Nix installation.
const STORE_DIR: &str = "/nix/store";
const STATE_DIR: &str = "/nix/var/nix";
const LOG_DIR: &str = "/nix/var/log/nix";
const CONF_DIR: &str = "/etc/nix";

/// Configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The store directory is not an absolute, canonical path.
    #[error("the store directory '{0}' is not usable: {1}")]
    StoreDir(String, String),
    /// nix.conf, a file it includes, or NIX_CONFIG.
    #[error("{0}")]
    Conf(#[from] conf::Error),
    /// One of castored's own settings has a value that makes no sense.
    #[error("setting '{name}' has the value '{value}', which is neither {expected}")]
    Own {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A configuration file that exists cannot be read.
    #[error("cannot read '{}': {source}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Where a daemon keeps things.
#[derive(Clone, Debug)]
pub struct Locations {
    /// `NIX_STORE_DIR`: what store paths begin with, and where the mount is.
    pub store_dir: StoreDir,
    /// `NIX_STATE_DIR`.
    pub state_dir: PathBuf,
    /// `NIX_LOG_DIR`.
    pub log_dir: PathBuf,
    /// `NIX_CONF_DIR`.
    pub conf_dir: PathBuf,
    /// `NIX_DAEMON_SOCKET_PATH`, or `<state>/daemon-socket/socket`.
    pub socket: PathBuf,
}

/// Who may open it has the feature `kvm`, unless `system-features` says otherwise.
const KVM: &str = "/dev/kvm";

impl Locations {
    /// What a Nix client of this daemon needs in its environment.
    pub fn client_env(&self) -> Vec<(OsString, OsString)> {
        let all: [(&str, OsString); 6] = [
            ("NIX_REMOTE", "daemon".into()),
            ("NIX_DAEMON_SOCKET_PATH", self.socket.clone().into()),
            ("NIX_STORE_DIR", self.store_dir.as_str().into()),
            ("NIX_STATE_DIR", self.state_dir.clone().into()),
            ("NIX_LOG_DIR", self.log_dir.clone().into()),
            ("NIX_CONF_DIR", self.conf_dir.clone().into()),
        ];
        all.map(|(name, value)| (name.into(), value)).into()
    }

    /// Where everybody is untrusted: beside the socket where clients look.
    pub fn untrusted_socket(&self) -> PathBuf {
        self.socket.with_file_name("untrusted")
    }

    /// Reads the variables through `var`, so that tests need not change the process's environment.
    ///
    /// # Errors
    /// [`ConfigError::StoreDir`].
    pub fn from_env(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        let path = |name: &str, default: &str| var(name).map_or_else(|| PathBuf::from(default), PathBuf::from);
        let store_dir = path("NIX_STORE_DIR", STORE_DIR);
        let state_dir = path("NIX_STATE_DIR", STATE_DIR);
        Self::new(
            &store_dir,
            path("NIX_LOG_DIR", LOG_DIR),
            path("NIX_CONF_DIR", CONF_DIR),
            var("NIX_DAEMON_SOCKET_PATH").map(PathBuf::from),
            state_dir,
        )
    }

    /// Everything below one directory, as an ordinary user runs it from a checkout.
    ///
    /// # Errors
    /// [`ConfigError::StoreDir`].
    pub fn below(root: &Path) -> Result<Self, ConfigError> {
        let state_dir = root.join("var/nix");
        Self::new(&root.join("store"), root.join("var/log/nix"), root.join("etc/nix"), None, state_dir)
    }

    fn new(
        store_dir: &Path,
        log_dir: PathBuf,
        conf_dir: PathBuf,
        socket: Option<PathBuf>,
        state_dir: PathBuf,
    ) -> Result<Self, ConfigError> {
        let text = store_dir.to_string_lossy().into_owned();
        let store_dir = StoreDir::new(&text).map_err(|e| ConfigError::StoreDir(text, e.to_string()))?;
        let socket = socket.unwrap_or_else(|| state_dir.join("daemon-socket/socket"));
        Ok(Self { store_dir, state_dir, log_dir, conf_dir, socket })
    }
}

/// The file with castored's own settings, beside nix.conf and of the same form: in nix.conf, stock's clients would warn of
/// each. Settings of nix.conf may stand in it too, for the daemon alone.
const OWN_CONF: &str = "castored.conf";

/// Reads nix.conf in `conf_dir` with what it includes, castored.conf, the text of `NIX_CONFIG`, then single overrides
/// from the command line. Gives warnings about what is not understood beside the settings.
///
/// # Errors
/// When a file is there but cannot be read, or does not parse.
pub fn load_settings(
    conf_dir: &Path,
    nix_config: Option<&str>,
    overrides: &[(String, String)],
    processors: u64,
) -> Result<(Settings, Vec<String>), ConfigError> {
    let mut settings = Settings::new(processors);
    if access(KVM, AccessFlags::R_OK | AccessFlags::W_OK).is_ok() {
        settings.system_features.insert("kvm".to_owned());
    }
    settings.builders = format!("@{}", conf_dir.join("machines").display());
    let mut warnings = Vec::new();
    let mut lines = Vec::new();
    for name in ["nix.conf", OWN_CONF] {
        let file = conf_dir.join(name);
        if let Some(text) = read_if_there(&file)? {
            lines.extend(parse(&text, &file)?);
        }
    }
    if let Some(text) = nix_config {
        lines.extend(parse(text, Path::new("NIX_CONFIG"))?);
    }
    lines.extend_from_slice(overrides);
    let mut last = HashMap::new();
    for (name, value) in &lines {
        last.insert(name.as_str(), value.as_str());
        match settings.set(name, value) {
            Ok(_) => {}
            Err(error) => warnings.push(error.to_string()),
        }
    }
    if last.get("store").is_some_and(|store| matches!(*store, "daemon" | "auto") || store.starts_with("unix://")) {
        warnings.push("ignoring the setting 'store': a daemon that connects to itself never ends".into());
    }
    Ok((settings, warnings))
}

/// castored's own setting `durability`: `grouped` (the default) or `immediate`. Stock's `fsync-store-paths = true`, which
/// asks for the same of stock, counts as `immediate` where `durability` is not set.
///
/// # Errors
/// [`ConfigError::Own`].
pub fn durability(settings: &Settings) -> Result<Durability, ConfigError> {
    let other = |name: &str| settings.other.get(name).map(String::as_str);
    match (other("durability"), other("fsync-store-paths")) {
        (Some("immediate"), _) | (None, Some("true")) => Ok(Durability::Immediate),
        (Some("grouped") | None, _) => Ok(Durability::Grouped),
        (Some(value), _) => {
            let expected = "'grouped' nor 'immediate'";
            Err(ConfigError::Own { name: "durability", value: value.to_owned(), expected })
        }
    }
}

/// castored's own setting `http-listen`: the address at which the store is served as a binary cache, or `none`, which is
/// also the default.
///
/// # Errors
/// [`ConfigError::Own`].
pub fn http_listen(settings: &Settings) -> Result<Option<SocketAddr>, ConfigError> {
    const NAME: &str = "http-listen";
    settings.other.get(NAME).map_or(Ok(None), |value| {
        let expected = "an address with a port nor 'none'";
        parse_listen(value).ok_or_else(|| ConfigError::Own { name: NAME, value: value.clone(), expected })
    })
}

/// castored's own setting `http-push-token-file`: the file with the tokens of those who may push over HTTP. None when it is
/// not set, or empty: then nobody may.
pub fn http_push_token_file(settings: &Settings) -> Option<&Path> {
    settings.other.get("http-push-token-file").filter(|file| !file.is_empty()).map(Path::new)
}

/// castored's own setting `upload-to`: URLs of the stores that everything built is sent to.
pub fn upload_to(settings: &Settings) -> Vec<String> {
    settings.other.get("upload-to").map_or_else(Vec::new, |urls| urls.split_whitespace().map(str::to_owned).collect())
}

/// An address with a port, or `none`.
pub fn parse_listen(text: &str) -> Option<Option<SocketAddr>> {
    match text {
        "none" => Some(None),
        address => address.parse().ok().map(Some),
    }
}

/// castored's own setting `memory-budget`: a number of bytes, as stock's settings have them. None when it is not set.
///
/// # Errors
/// [`ConfigError::Own`].
pub fn memory_budget(settings: &Settings) -> Result<Option<u64>, ConfigError> {
    let Some(text) = settings.other.get("memory-budget") else { return Ok(None) };
    let expected = "a number of bytes nor one with K, M, G or T behind it";
    let wrong = || ConfigError::Own { name: "memory-budget", value: text.clone(), expected };
    conf::bytes(text).map(Some).ok_or_else(wrong)
}

/// castored's own setting `optimise-when-idle`: after so many seconds without a client, a build or much else to do for the
/// processors, contents are packed more densely. 0, which is also the default, is never.
///
/// # Errors
/// [`ConfigError::Own`].
pub fn optimise_when_idle(settings: &Settings) -> Result<Option<Duration>, ConfigError> {
    const NAME: &str = "optimise-when-idle";
    let Some(text) = settings.other.get(NAME) else { return Ok(None) };
    let wrong = |_| ConfigError::Own { name: NAME, value: text.clone(), expected: "a number of seconds" };
    let seconds: u32 = text.parse().map_err(wrong)?;
    Ok((seconds > 0).then(|| Duration::from_secs(seconds.into())))
}

fn parse(text: &str, origin: &Path) -> Result<Vec<(String, String)>, ConfigError> {
    let dir = origin.parent().unwrap_or(Path::new("/")).to_owned();
    let mut include = |path: &str, optional: bool| -> Result<Option<String>, String> {
        let path = dir.join(path);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && optional => Ok(None),
            Err(e) => Err(e.to_string()),
        }
    };
    Ok(conf::parse(text, &origin.display().to_string(), &mut include)?)
}

fn read_if_there(path: &Path) -> Result<Option<String>, ConfigError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_are_honoured() {
        let vars = HashMap::from([("NIX_STORE_DIR", "/x/store"), ("NIX_STATE_DIR", "/x/state")]);
        let at = Locations::from_env(|name| vars.get(name).map(OsString::from)).unwrap();
        assert_eq!(at.store_dir.as_str(), "/x/store");
        assert_eq!(at.socket, Path::new("/x/state/daemon-socket/socket"));
        assert_eq!(at.log_dir, Path::new(LOG_DIR));
        // A client with this environment is at the same place.
        let vars: HashMap<_, _> = at.client_env().into_iter().collect();
        let again = Locations::from_env(|name| vars.get(std::ffi::OsStr::new(name)).cloned()).unwrap();
        assert_eq!((again.store_dir, again.socket, again.conf_dir), (at.store_dir, at.socket, at.conf_dir));
    }

    #[test]
    fn includes_are_read_beside_the_file_and_nix_config_comes_last() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("nix.conf"), "cores = 2\ninclude more.conf\n!include missing.conf\n").unwrap();
        std::fs::write(dir.path().join("more.conf"), "trusted-users = root alice\ncores = 3\n").unwrap();
        let (settings, warnings) = load_settings(dir.path(), Some("cores = 4"), &[], 1).unwrap();
        assert_eq!(settings.trusted_users, ["root", "alice"]);
        assert_eq!(settings.cores, 4);
        assert!(warnings.is_empty(), "{warnings:?}");
    }

    #[test]
    fn castoreds_own_settings_have_a_file_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let load = |nix_config| load_settings(dir.path(), nix_config, &[], 1).unwrap().0;
        assert_eq!(durability(&load(None)).unwrap(), Durability::Grouped);
        assert_eq!(durability(&load(Some("fsync-store-paths = true"))).unwrap(), Durability::Immediate);
        std::fs::write(dir.path().join("castored.conf"), "durability = immediate\n").unwrap();
        assert_eq!(durability(&load(None)).unwrap(), Durability::Immediate);
        let grouped = load(Some("durability = grouped\nfsync-store-paths = true"));
        assert_eq!(durability(&grouped).unwrap(), Durability::Grouped);
        assert!(matches!(durability(&load(Some("durability = maybe"))), Err(ConfigError::Own { .. })));
        assert_eq!(memory_budget(&load(None)).unwrap(), None);
        assert_eq!(memory_budget(&load(Some("memory-budget = 256M"))).unwrap(), Some(256 << 20));
        assert!(matches!(memory_budget(&load(Some("memory-budget = much"))), Err(ConfigError::Own { .. })));
    }

    #[test]
    fn where_to_push_and_who_may() {
        let dir = tempfile::tempdir().unwrap();
        let load = |text: &str| load_settings(dir.path(), Some(text), &[], 1).unwrap().0;
        let settings = load("http-push-token-file = /etc/tokens\nupload-to = file:///a  http://b?compression=none");
        assert_eq!(http_push_token_file(&settings), Some(Path::new("/etc/tokens")));
        assert_eq!(upload_to(&settings), ["file:///a", "http://b?compression=none"]);
        for settings in [load(""), load("http-push-token-file =\nupload-to =")] {
            assert_eq!((http_push_token_file(&settings), upload_to(&settings)), (None, Vec::new()));
        }
    }

    #[test]
    fn when_nobody_is_here() {
        let dir = tempfile::tempdir().unwrap();
        let after = |text| optimise_when_idle(&load_settings(dir.path(), text, &[], 1).unwrap().0);
        assert_eq!(after(None).unwrap(), None);
        assert_eq!(after(Some("optimise-when-idle = 0")).unwrap(), None);
        assert_eq!(after(Some("optimise-when-idle = 600")).unwrap(), Some(Duration::from_secs(600)));
        assert!(matches!(after(Some("optimise-when-idle = often")), Err(ConfigError::Own { .. })));
    }

    #[test]
    fn where_to_serve_over_http() {
        let dir = tempfile::tempdir().unwrap();
        let listen = |text| http_listen(&load_settings(dir.path(), text, &[], 1).unwrap().0);
        assert_eq!(listen(None).unwrap(), None);
        assert_eq!(listen(Some("http-listen = none")).unwrap(), None);
        assert_eq!(listen(Some("http-listen = [::1]:80")).unwrap(), Some("[::1]:80".parse().unwrap()));
        assert!(matches!(listen(Some("http-listen = 80")), Err(ConfigError::Own { .. })));
    }

    #[test]
    fn a_store_that_would_be_this_daemon_is_warned_of() {
        let dir = tempfile::tempdir().unwrap();
        let (_, warnings) = load_settings(dir.path(), Some("store = daemon"), &[], 1).unwrap();
        assert_eq!(warnings.len(), 1);
    }
}
