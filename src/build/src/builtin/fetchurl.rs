//! `builtin:fetchurl`: a file from somewhere else, which a hash in the derivation identifies.

use std::fs::{self, File, Permissions};
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::decompress::decompressed;
use super::error::{Error, On};
use super::http::Files;
use super::unnar::unpack;
use super::{Fixity, Task};

/// Where an archive lies until it is unpacked, in the build directory.
const ARCHIVE: &str = "download.nar";

pub(super) fn build(task: &Task) -> Result<(), Error> {
    let out = task.outputs.get("out").ok_or(Error::FetchurlOutput)?.as_path();
    if task.fixity == Fixity::None {
        return Err(Error::NotFixed);
    }
    let url = task.attributes.text("url")?;
    let is_set = |name| task.attributes.find(name).is_some_and(|value| *value == *b"1");
    let (unpacked, executable) = (is_set("unpack"), is_set("executable"));
    let Some(settings) = &task.download else { return Err(Error::NoSettings) };
    let client = Files::new(settings);
    let fetch = |url: &str| {
        if unpacked {
            let archive = Path::new(ARCHIVE);
            client.fetch(url, archive)?;
            let file = BufReader::new(File::open(archive).on("open", archive)?);
            unpack(decompressed(file).on("read", archive)?, out)?;
            fs::remove_file(archive).on("remove", archive)?;
        } else {
            client.fetch(url, out)?;
        }
        if executable {
            fs::set_permissions(out, Permissions::from_mode(0o755)).on("make executable", out)?;
        }
        Ok(())
    };

    if let Fixity::Flat { algorithm, digest } = &task.fixity {
        for mirror in &settings.hashed_mirrors {
            let result: Result<(), Error> = fetch(&format!("{}/{algorithm}/{digest}", mirror.trim_end_matches('/')));
            if result.is_ok() {
                return Ok(());
            }
            // A mirror need not have everything.
            let _ = (fs::remove_file(out), fs::remove_dir_all(out), fs::remove_file(ARCHIVE));
        }
    }
    fetch(&url)
}
