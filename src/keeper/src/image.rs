//! A program in memory.
//!
//! A program that lies in a filesystem which it serves itself would wait for itself when a page of it is read from there.
//! So it runs from a copy that no disk and no mount is needed for.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};
use nix::unistd::execveat;

/// The running program.
const OWN: &str = "/proc/self/exe";

/// `MFD_EXEC` of `linux/memfd.h`, which the nix crate lacks: the copy may be executed, whatever is usual here.
const MFD_EXEC: u32 = 0x10;

/// The running program, opened. It is this one also after its file was replaced or removed.
///
/// # Errors
/// When `/proc` is not there.
pub fn own() -> io::Result<OwnedFd> {
    Ok(File::open(OWN)?.into())
}

/// Whether the running program lies below `store`, under whatever mount of it, or in any filesystem that is served by a
/// process, which might be us.
pub fn lies_in(store: &Path) -> bool {
    let below = std::fs::read_link(OWN).is_ok_and(|path| path.starts_with(store));
    let served = File::open(OWN).ok().and_then(|file| fstatfs(&file).ok());
    below || served.is_some_and(|kind| kind.filesystem_type() == FUSE_SUPER_MAGIC)
}

/// Whether the running program is a [copy](copy_own) in memory.
pub fn is_copy() -> bool {
    std::fs::read_link(OWN).is_ok_and(|path| path.starts_with("/memfd:castored (deleted)"))
}

/// Libraries of the running program (its loader among them) that lie below `store`. They are not copied: a program that
/// serves that directory should be linked statically.
pub fn libraries_in(store: &Path) -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let own = std::fs::read_link(OWN).unwrap_or_default();
    let files = maps.lines().filter_map(|line| line.find('/').map(|at| PathBuf::from(&line[at..])));
    let mut files: Vec<_> = files.filter(|file| file.starts_with(store) && *file != own).collect();
    files.dedup();
    files
}

/// Copies the running program into memory. Nobody can change the copy.
///
/// # Errors
/// When it cannot be read, or there is no memory for it.
pub fn copy_own() -> io::Result<OwnedFd> {
    let mut from = File::open(OWN)?;
    let size = from.metadata()?.size();
    let make = |flags| memfd_create(c"castored", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | flags);
    let copy = match make(MFdFlags::from_bits_retain(MFD_EXEC)) {
        // Kernels before 6.3 do not know the flag, and need none.
        Err(Errno::EINVAL) => make(MFdFlags::empty()),
        made => made,
    }?;
    let mut copy = File::from(copy);
    if io::copy(&mut from, &mut copy)? != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(copy.into())
}

/// Executes an open program in this process's place, with the same arguments and environment.
///
/// # Errors
/// When it cannot be executed.
pub fn become_program(program: impl AsFd) -> io::Result<Infallible> {
    let arguments = arguments(std::env::args_os());
    Ok(execveat(program, c"", &arguments, &environment(&[]), AtFlags::AT_EMPTY_PATH)?)
}

/// Arguments as the kernel takes them. One with a zero byte cannot have come from there and is left out.
pub fn arguments(all: impl Iterator<Item = std::ffi::OsString>) -> Vec<CString> {
    all.filter_map(|argument| CString::new(argument.into_vec()).ok()).collect()
}

/// This process's environment, without some variables.
pub(crate) fn environment(without: &[&str]) -> Vec<CString> {
    let variables = std::env::vars_os().filter(|(name, _)| !without.iter().any(|other| name == other));
    let lines = variables.map(|(name, value)| {
        let mut line = name.into_vec();
        line.push(b'=');
        line.extend(value.into_vec());
        line
    });
    lines.filter_map(|line| CString::new(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_copy_of_ourselves_is_whole_and_cannot_be_changed() {
        let copy = File::from(copy_own().unwrap());
        let (mut ours, mut theirs) = (vec![0; 4096], vec![0; 4096]);
        let size = copy.metadata().unwrap().size();
        assert_eq!(size, std::fs::metadata(OWN).unwrap().size());
        for at in [0, size / 2, size - 4096] {
            File::open(OWN).unwrap().read_exact_at(&mut ours, at).unwrap();
            copy.read_exact_at(&mut theirs, at).unwrap();
            assert!(ours == theirs);
        }
        assert!(copy.write_at(b"x", 0).is_err() && copy.set_len(0).is_err());
    }

    #[test]
    fn we_lie_where_we_lie() {
        let own = std::fs::read_link(OWN).unwrap();
        assert!(lies_in(own.parent().unwrap()));
        assert!(!lies_in(Path::new("/no/such/place")));
        assert!(libraries_in(Path::new("/no/such/place")).is_empty());
        assert!(!libraries_in(Path::new("/")).is_empty());
    }
}
