//! URLs of substituters: `file:///dir`, `http(s)://host/path`, `s3://bucket`, `ssh-ng://host`, `ssh://host`, `unix:///socket`, `daemon`,
//! `grpc+http(s)://host`, `grpc+unix:///socket`, with parameters.

use std::path::PathBuf;

use fetch::S3Bucket;
use nix_compat::store_path::StoreDir;
use nix_compat::store_uri::StoreUri;
use url::Url;

use crate::error::Error;

/// What the word `daemon` means.
const DAEMON: &str = "unix:///nix/var/nix/daemon-socket/socket";
/// Connections to a store that speaks a protocol of Nix's, unless its URL has `max-connections`. Stock has one, where a
/// download holds up every question.
const CONNECTIONS: usize = 4;
/// No URL gets more.
const MAX_CONNECTIONS: usize = 64;

/// Where a source is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A directory of this machine.
    Directory(PathBuf),
    /// The URL below which a server has it; ends in a slash.
    Server(Url),
    /// A bucket of S3 with the same files.
    Bucket(S3Bucket),
    /// A store that speaks a protocol of Nix's, over so many connections.
    Peer(StoreUri, usize),
    /// Another castore, by its URL without parameters.
    Castore(String),
}

/// A substituter's URL, taken apart.
#[derive(Clone, Debug)]
pub(crate) struct Location {
    /// Without parameters, as messages have it.
    pub(crate) uri: String,
    pub(crate) place: Place,
    /// What is there is believed without a signature.
    pub(crate) trusted: bool,
    /// Paths are valid as soon as their directories are here, see [`store::Store::expect`].
    pub(crate) lazy: bool,
    pub(crate) priority: Option<u64>,
    pub(crate) want_mass_query: Option<bool>,
    /// Its store directory, where that is not the one of this store.
    pub(crate) store_dir: Option<StoreDir>,
}

impl Location {
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let (base, query) = text.split_once('?').unwrap_or((text, ""));
        let unknown = || Error::UnknownStore(text.to_owned());
        let place = if let Some(path) = base.strip_prefix("file://") {
            let path = percent_encoding::percent_decode_str(path).decode_utf8().map_err(|_| unknown())?;
            if !path.starts_with('/') {
                return Err(unknown());
            }
            Place::Directory(PathBuf::from(path.into_owned()))
        } else if base.starts_with("http://") || base.starts_with("https://") {
            let url = Url::parse(&format!("{}/", base.trim_end_matches('/'))).map_err(|_| unknown())?;
            Place::Server(url)
        } else if let Some(bucket) = base.strip_prefix("s3://") {
            let parameter = |wanted: &str| {
                let mut all = url::form_urlencoded::parse(query.as_bytes());
                all.find(|(name, _)| name == wanted).map(|(_, value)| value.into_owned())
            };
            let bucket = S3Bucket::parse(bucket, &parameter);
            Place::Bucket(bucket.map_err(|source| Error::Bucket { url: text.to_owned(), source })?)
        } else if base == "daemon" || ["ssh-ng://", "ssh://", "unix://"].iter().any(|scheme| base.starts_with(scheme)) {
            let whole = if base == "daemon" { text.replacen(base, DAEMON, 1) } else { text.to_owned() };
            Place::Peer(StoreUri::parse(&whole).map_err(|_| unknown())?, CONNECTIONS)
        } else if ["grpc+http://", "grpc+https://", "grpc+unix:/"].iter().any(|scheme| base.starts_with(scheme)) {
            Place::Castore(base.to_owned())
        } else {
            return Err(unknown());
        };
        let uri = fetch::without_password(base.trim_end_matches('/'));
        let mut location =
            Self { uri, place, trusted: false, lazy: false, priority: None, want_mass_query: None, store_dir: None };
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let wrong = || Error::Parameter { url: text.to_owned(), name: name.to_string(), value: value.to_string() };
            match &*name {
                "trusted" => location.trusted = boolean(&value).ok_or_else(wrong)?,
                "lazy" => location.lazy = boolean(&value).ok_or_else(wrong)?,
                "priority" => location.priority = Some(value.parse().map_err(|_| wrong())?),
                "want-mass-query" => location.want_mass_query = Some(boolean(&value).ok_or_else(wrong)?),
                "store" => location.store_dir = Some(StoreDir::new(&value).map_err(|_| wrong())?),
                "max-connections" => {
                    let wanted: usize = value.parse().map_err(|_| wrong())?;
                    if let Place::Peer(_, connections) = &mut location.place {
                        *connections = wanted.clamp(1, MAX_CONNECTIONS);
                    }
                }
                // Those of writing, and those of newer releases.
                _ => {}
            }
        }
        Ok(location)
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text {
        "true" | "yes" | "1" => Some(true),
        "false" | "no" | "0" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_their_parameters() {
        let at = Location::parse("file:///a%20b/c?store=/fnord/store&priority=3&trusted=1&want-mass-query=no").unwrap();
        assert_eq!((at.uri.as_str(), at.place), ("file:///a%20b/c", Place::Directory("/a b/c".into())));
        assert_eq!((at.trusted, at.priority, at.want_mass_query), (true, Some(3), Some(false)));
        assert_eq!(at.store_dir.unwrap().as_str(), "/fnord/store");
        let at = Location::parse("https://me:secret@host/x//?compression=xz").unwrap();
        assert_eq!(at.uri, "https://me:***@host/x");
        assert_eq!(at.place, Place::Server(Url::parse("https://me:secret@host/x/").unwrap()));
        assert!(!at.trusted);
        let peer = |text: &str| match Location::parse(text).unwrap().place {
            Place::Peer(uri, connections) => (uri.scheme, uri.authority, connections),
            other => panic!("{other:?}"),
        };
        let expect = |scheme: &str, authority: &str, n| (scheme.to_owned(), authority.to_owned(), n);
        assert_eq!(peer("daemon?trusted=1"), expect("unix", "/nix/var/nix/daemon-socket/socket", CONNECTIONS));
        assert_eq!(peer("ssh-ng://me@host?max-connections=0"), expect("ssh-ng", "me@host", 1));
        assert_eq!(peer("ssh://host?max-connections=9999"), expect("ssh", "host", MAX_CONNECTIONS));
        let castore = Location::parse("grpc+unix:///run/grpc?priority=7&trusted=1").unwrap();
        assert_eq!((castore.priority, castore.trusted, castore.lazy), (Some(7), true, false));
        assert!(Location::parse("grpc+unix:///run/grpc?lazy=true").unwrap().lazy);
        assert_eq!(castore.place, Place::Castore("grpc+unix:///run/grpc".to_owned()));
        for wrong in [
            "grpc+ftp://host",
            "s3://",
            "s3://bucket?scheme=ftp",
            "file://host/x",
            "dæmon",
            "ssh-ng://host?max-connections=x",
            "file:///x?trusted=maybe",
            "http://",
            "file:///x?store=y",
            "grpc+http://host?lazy=perhaps",
        ] {
            assert!(Location::parse(wrong).is_err(), "{wrong}");
        }
    }
}
