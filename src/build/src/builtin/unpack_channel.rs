//! `builtin:unpack-channel`: a channel's tarball becomes a directory of the channel's name.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;

use super::decompress::decompressed;
use super::error::{Error, On};
use super::{Task, tarball};

pub(super) fn build(task: &Task) -> Result<(), Error> {
    let out = task.output("out")?;
    let (name, source) = (task.attributes.text("channelName")?, task.attributes.path("src")?);
    if Path::new(&name).file_name().is_none_or(|file_name| *file_name != *name) {
        return Err(Error::ChannelName(name));
    }
    fs::create_dir(&out).on("make the directory", &out)?;
    let file = BufReader::new(File::open(&source).on("open", &source)?);
    tarball::unpack(decompressed(file).on("read", &source)?, &out)?;

    let mut entries = fs::read_dir(&out).on("read the directory", &out)?;
    let Some(only) = entries.next() else { return Err(Error::EmptyChannel(source)) };
    if entries.next().is_some() {
        return Err(Error::SeveralFiles(source));
    }
    let only = only.on("read the directory", &out)?.path();
    let target = out.join(name);
    fs::rename(&only, &target).map_err(|source| Error::Rename { from: only, to: target, source })
}
