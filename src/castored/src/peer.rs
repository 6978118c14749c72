//! Connections to other castores, by URLs.

use std::path::PathBuf;

use nix_compat::conf::Settings;
use rpc_client::Channel;

use crate::failure::Failure;

/// Opens a channel to the castore at `url`; to be called in a runtime. `settings` are asked only where certificates matter
/// and the environment does not name them.
pub(crate) fn open(url: &str, settings: impl FnOnce() -> Result<Settings, Failure>) -> Result<Channel, Failure> {
    let authorities = if url.starts_with("grpc+https:") { authorities(settings)? } else { Vec::new() };
    Ok(rpc_client::open(url, &authorities)?)
}

/// The certificates by which servers are known here: those the environment names, else those of `ssl-cert-file`.
fn authorities(settings: impl FnOnce() -> Result<Settings, Failure>) -> Result<Vec<u8>, Failure> {
    let named = ["NIX_SSL_CERT_FILE", "SSL_CERT_FILE"].into_iter().find_map(std::env::var_os);
    let file = match named.filter(|file| !file.is_empty()) {
        Some(file) => PathBuf::from(file),
        None => settings()?.ssl_cert_file.into(),
    };
    std::fs::read(&file).map_err(Failure::file("read the trusted certificates in", file))
}
