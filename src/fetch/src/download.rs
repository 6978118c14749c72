//! What the daemon knows about downloads and a builder could not read: settings, passwords, certificates.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix_compat::conf::Settings;
use serde::{Deserialize, Serialize};

/// Largest file of passwords, in bytes.
const MAX_NETRC: u64 = 1 << 20;
/// Largest file of certificates, in bytes. What distributions ship has a quarter of a megabyte.
const MAX_CERTIFICATES: u64 = 16 << 20;

/// Variables of the daemon's environment that name proxies, as curl takes them. `HTTP_PROXY` is none of them: a client
/// of a CGI program could set it.
const PROXY_VARIABLES: [&str; 7] =
    ["http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"];

/// Where the certificates are when the settings do not say.
const CERTIFICATE_FILES: [&str; 2] =
    ["/etc/ssl/certs/ca-certificates.crt", "/nix/var/nix/profiles/default/etc/ssl/certs/ca-bundle.crt"];

/// The settings that downloads obey.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DownloadOptions {
    attempts: u64,
    connect_timeout: u64,
    stalled_timeout: u64,
    speed: u64,
    http2: bool,
    hashed_mirrors: Vec<String>,
    netrc_file: PathBuf,
    ssl_cert_file: PathBuf,
    user_agent_suffix: String,
}

impl DownloadOptions {
    /// Those of a client.
    pub fn new(settings: &Settings) -> Self {
        Self {
            attempts: settings.download_attempts,
            connect_timeout: settings.connect_timeout,
            stalled_timeout: settings.stalled_download_timeout,
            speed: settings.download_speed,
            http2: settings.http2,
            hashed_mirrors: settings.hashed_mirrors.clone(),
            netrc_file: settings.netrc_file.clone().into(),
            ssl_cert_file: settings.ssl_cert_file.clone().into(),
            user_agent_suffix: settings.other.get("user-agent-suffix").cloned().unwrap_or_default(),
        }
    }

    /// The files of passwords and of certificates.
    pub fn secrets(&self) -> (&Path, &Path) {
        (&self.netrc_file, &self.ssl_cert_file)
    }
}

/// All that a download depends on beside its URL.
#[derive(Clone, Serialize, Deserialize)]
pub struct Download {
    /// How often it is tried.
    pub attempts: u64,
    /// Seconds a connection may take to be made; 0 means any time.
    pub connect_timeout: u64,
    /// Seconds it may stand still; 0 means any time.
    pub stalled_timeout: u64,
    /// KiB per second it may take; 0 means any number.
    pub speed: u64,
    /// Whether HTTP/2 is spoken with servers that offer it in TLS.
    pub http2: bool,
    /// Where contents are looked for by their hash.
    pub hashed_mirrors: Vec<String>,
    /// The text of the netrc file.
    pub netrc: String,
    /// The trusted certificates, in PEM.
    pub certificates: String,
    /// Names and values of variables that name proxies.
    pub proxies: Vec<(String, String)>,
    /// What is appended to the user agent.
    pub user_agent_suffix: String,
}

impl fmt::Debug for Download {
    /// Without what may have passwords in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Download").field("hashed_mirrors", &self.hashed_mirrors).finish_non_exhaustive()
    }
}

impl Download {
    /// Reads the files. One that is not there or cannot be read is empty: whoever needs it says so. Blocks.
    pub fn gather(options: &DownloadOptions, variable: &dyn Fn(&str) -> Option<String>) -> Self {
        let proxies = PROXY_VARIABLES.iter().filter_map(|name| Some(((*name).to_owned(), variable(name)?))).collect();
        let certificates = certificate_file(&options.ssl_cert_file, variable);
        Self {
            attempts: options.attempts.max(1),
            connect_timeout: options.connect_timeout,
            stalled_timeout: options.stalled_timeout,
            speed: options.speed,
            http2: options.http2,
            hashed_mirrors: options.hashed_mirrors.clone(),
            netrc: read(&options.netrc_file, MAX_NETRC),
            certificates: read(&certificates, MAX_CERTIFICATES),
            proxies,
            user_agent_suffix: options.user_agent_suffix.clone(),
        }
    }
}

/// The setting, unless it has its default: then the environment's, as stock has it.
fn certificate_file(setting: &Path, variable: &dyn Fn(&str) -> Option<String>) -> PathBuf {
    if setting != Path::new(CERTIFICATE_FILES[0]) {
        return setting.to_owned();
    }
    let named = ["NIX_SSL_CERT_FILE", "SSL_CERT_FILE"].into_iter().find_map(variable).filter(|file| !file.is_empty());
    let present = || CERTIFICATE_FILES.into_iter().find(|file| Path::new(file).exists());
    named.map(PathBuf::from).or_else(|| present().map(PathBuf::from)).unwrap_or_else(|| setting.to_owned())
}

/// A file's text; nothing of one that is longer than `limit` bytes or cannot be read.
pub(crate) fn read(path: &Path, limit: u64) -> String {
    let read = || -> io::Result<String> {
        let mut bytes = Vec::new();
        File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("longer than {limit} bytes")));
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_else(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            tracing::warn!("cannot read {} for a download: {error}", path.display());
        }
        String::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_variables_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let (netrc, pem) = (dir.path().join("netrc"), dir.path().join("pem"));
        std::fs::write(&netrc, "machine x").unwrap();
        std::fs::write(&pem, "certificates").unwrap();
        let mut settings = Settings::default();
        assert!(settings.set("netrc-file", netrc.to_str().unwrap()).unwrap());
        let variable = |name: &str| match name {
            "NIX_SSL_CERT_FILE" => Some(pem.to_str().unwrap().to_owned()),
            "no_proxy" | "HTTP_PROXY" => Some("here".to_owned()),
            _ => None,
        };
        let download = Download::gather(&DownloadOptions::new(&settings), &variable);
        assert_eq!((download.netrc.as_str(), download.certificates.as_str()), ("machine x", "certificates"));
        assert_eq!(download.proxies, [("no_proxy".to_owned(), "here".to_owned())]);

        assert!(!format!("{download:?}").contains("machine"));

        // What the settings name is more than what the environment names.
        assert!(settings.set("ssl-cert-file", dir.path().join("none").to_str().unwrap()).unwrap());
        let download = Download::gather(&DownloadOptions::new(&settings), &variable);
        assert_eq!(download.certificates, "");
    }

    #[test]
    fn a_file_that_never_ends_is_not_read() {
        assert_eq!(read(Path::new("/dev/zero"), 1000), "");
    }
}
