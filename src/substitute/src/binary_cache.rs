//! The files of a binary cache, in a directory or on a server. Everything here blocks.

use std::io;
use std::path::{Component, Path};

use fetch::{Retry, Sink, Upload, copy_file};
use nix_compat::narinfo::NarInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::store_path::{StoreDir, StorePath};
use url::Url;

use crate::error::Error;
use crate::location::Place;
use crate::origin::{Origin, SourceInfo};

/// The file in which a cache tells of itself.
pub(crate) const CACHE_INFO: &str = "nix-cache-info";
/// The directory of what outputs turned out to be.
pub(crate) const REALISATIONS: &str = "realisations";
/// Longest `nix-cache-info`, in bytes.
const MAX_CACHE_INFO: usize = 64 << 10;
/// Longest narinfo, in bytes: room for ten thousand references.
const MAX_NARINFO: usize = 1 << 20;
/// Longest realisation, in bytes.
const MAX_REALISATION: usize = 1 << 20;
/// Of caches that say nothing else; smaller ones are asked first.
const DEFAULT_PRIORITY: u64 = 50;

/// The file that says what an output turned out to be: JSON.
pub(crate) fn realisation_file(id: &DrvOutput) -> String {
    format!("{REALISATIONS}/{id}.doi")
}

/// A cache's files.
pub(crate) struct BinaryCache {
    uri: String,
    place: Place,
    client: fetch::Client,
}

/// What a cache says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct CacheInfo {
    says: SourceInfo,
    store_dir: Option<String>,
}

impl CacheInfo {
    fn parse(text: &str) -> Self {
        let says = SourceInfo { priority: DEFAULT_PRIORITY, want_mass_query: false };
        let mut info = Self { says, store_dir: None };
        for (name, value) in text.lines().filter_map(|line| line.split_once(':')) {
            let value = value.trim();
            match name {
                "StoreDir" => info.store_dir = Some(value.to_owned()),
                "WantMassQuery" => info.says.want_mass_query = value == "1",
                "Priority" => info.says.priority = value.parse().unwrap_or(DEFAULT_PRIORITY),
                _ => {}
            }
        }
        info
    }
}

impl BinaryCache {
    pub(crate) fn new(uri: String, place: Place, client: fetch::Client) -> Self {
        Self { uri, place, client }
    }

    /// What it says of itself, if it is a cache yet; it must be for the store directory `wanted`.
    pub(crate) fn info_if_there(&self, wanted: &StoreDir) -> Result<Option<SourceInfo>, Error> {
        let Some(text) = self.text(CACHE_INFO, MAX_CACHE_INFO)? else { return Ok(None) };
        let info = CacheInfo::parse(&text);
        match &info.store_dir {
            Some(theirs) if theirs.trim_end_matches('/') != wanted.as_str() => Err(Error::StoreDir {
                uri: self.uri.clone(),
                theirs: theirs.clone(),
                wanted: wanted.as_str().to_owned(),
            }),
            _ => Ok(Some(info.says)),
        }
    }

    /// Where it is.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Puts a file on its server.
    pub(crate) fn put(&self, name: &str, body: &Upload<'_>, content_type: &str) -> Result<(), Error> {
        Ok(self.client.put(&self.url(name)?, body, content_type)?)
    }

    /// Where a file is that the cache itself names: below it, or on another server.
    fn url(&self, name: &str) -> Result<Url, Error> {
        let wrong = || Error::FileUrl { uri: self.uri.clone(), url: name.to_owned() };
        match &self.place {
            Place::Directory(directory) => {
                let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                if !Path::new(name).components().all(inside) {
                    return Err(wrong());
                }
                Url::from_file_path(directory.join(name)).map_err(|()| wrong())
            }
            Place::Server(base) if name.starts_with("http://") || name.starts_with("https://") => {
                let url = Url::parse(name).map_err(|_| wrong())?;
                // What was encrypted so far stays so.
                if base.scheme() == "https" && url.scheme() != "https" { Err(wrong()) } else { Ok(url) }
            }
            // Not joined: a name with a colon would be taken for a URL of its own.
            Place::Server(base) => Url::parse(&format!("{base}{}", name.trim_start_matches('/'))).map_err(|_| wrong()),
            Place::Bucket(_) | Place::Peer(..) | Place::Castore(_) => Err(wrong()),
        }
    }

    fn text(&self, name: &str, limit: usize) -> Result<Option<String>, Error> {
        let mut sink = Text { bytes: Vec::new(), limit };
        match self.get(&self.url(name)?, &mut sink, Retry::IfReached) {
            Ok(()) => String::from_utf8(sink.bytes).map(Some).map_err(|_| Error::NotText(self.file(name))),
            Err(error) if error.cause.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn get(&self, url: &Url, sink: &mut dyn Sink, retry: Retry) -> Result<(), fetch::DownloadError> {
        if url.scheme() == "file" { copy_file(url, sink) } else { self.client.fetch(url, sink, retry) }
    }
}

impl Origin for BinaryCache {
    fn is_local(&self) -> bool {
        matches!(self.place, Place::Directory(_))
    }

    fn info(&self, wanted: &StoreDir) -> Result<SourceInfo, Error> {
        match self.info_if_there(wanted)? {
            Some(says) => Ok(says),
            // A directory without it is one into which nobody has written yet.
            None if self.is_local() => Ok(CacheInfo::parse("").says),
            None => Err(Error::NoCache(self.uri.clone())),
        }
    }

    fn narinfo(&self, dir: &StoreDir, path: &StorePath) -> Result<Option<NarInfo>, Error> {
        let name = format!("{}.narinfo", path.hash_part());
        let Some(text) = self.text(&name, MAX_NARINFO)? else { return Ok(None) };
        let corrupt = |source| Error::NarInfo { file: self.file(&name), source };
        NarInfo::parse(dir, &text).map(Some).map_err(corrupt)
    }

    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, Error> {
        let name = realisation_file(id);
        let Some(text) = self.text(&name, MAX_REALISATION)? else { return Ok(None) };
        let corrupt = |source| Error::Realisation { file: self.file(&name), source };
        let realisation = Realisation::from_json(&text).map_err(corrupt)?;
        if realisation.id != *id {
            let (wanted, got) = (id.to_string(), realisation.id.to_string());
            return Err(Error::OtherRealisation { uri: self.uri.clone(), wanted, got });
        }
        Ok(Some(realisation))
    }

    fn copy(&self, narinfo: &NarInfo, sink: &mut dyn Sink) -> Result<(), Error> {
        Ok(self.get(&self.url(narinfo.url())?, sink, Retry::Always)?)
    }

    fn file(&self, name: &str) -> String {
        self.url(name).map_or_else(|_| name.to_owned(), |url| fetch::without_password(url.as_str()))
    }
}

/// A small file in memory.
struct Text {
    bytes: Vec<u8>,
    limit: usize,
}

impl Sink for Text {
    fn begin(&mut self, offset: u64, _: u64) -> io::Result<()> {
        self.bytes.truncate(usize::try_from(offset).unwrap_or(usize::MAX));
        Ok(())
    }

    fn take(&mut self, piece: &[u8]) -> io::Result<()> {
        if self.bytes.len() + piece.len() > self.limit {
            return Err(io::Error::other(format!("it is longer than {} bytes", self.limit)));
        }
        self.bytes.extend_from_slice(piece);
        Ok(())
    }

    fn can_restart(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_cache_says_of_itself() {
        let info = CacheInfo::parse("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\nOther: x\n");
        let says = SourceInfo { priority: 40, want_mass_query: true };
        let expected = CacheInfo { says, store_dir: Some("/nix/store".into()) };
        assert_eq!(info, expected);
        assert_eq!(CacheInfo::parse("Priority: x").says.priority, DEFAULT_PRIORITY);
    }

    #[test]
    fn files_stay_in_their_cache() {
        let cache = |text: &str| {
            let at = crate::location::Location::parse(text).unwrap();
            let settings = nix_compat::conf::Settings::default();
            let download = fetch::Download::gather(&fetch::DownloadOptions::new(&settings), &|_| None);
            BinaryCache::new(at.uri, at.place, fetch::Client::new(download.into()))
        };
        let url = |cache: &BinaryCache, name: &str| cache.url(name).map(String::from).ok();
        let here = cache("file:///some dir");
        assert_eq!(url(&here, "nar/x.nar.xz").as_deref(), Some("file:///some%20dir/nar/x.nar.xz"));
        for outside in ["../x", "/etc/passwd", "nar/../../x"] {
            assert_eq!(url(&here, outside), None);
        }
        let there = cache("https://host/a");
        assert_eq!(
            url(&there, "realisations/sha256:0!out.doi").unwrap(),
            "https://host/a/realisations/sha256:0!out.doi"
        );
        assert_eq!(url(&there, "https://other/x").unwrap(), "https://other/x");
        assert_eq!(url(&there, "http://other/x"), None);
        assert_eq!(url(&there, "file:///etc/passwd").unwrap(), "https://host/a/file:///etc/passwd");
    }
}
