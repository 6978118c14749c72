//! The extended attributes that tell digests.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use castore::Node;
use nix::errno::Errno;
use nix::libc;

use crate::fixture::mounted;

const BLOB: &CStr = c"user.tvix.castore.blob.digest";
const DIRECTORY: &CStr = c"user.tvix.castore.directory.digest";

fn get(path: &Path, name: &CStr, room: usize) -> nix::Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut value = vec![0u8; room];
    // SAFETY: both strings end in NUL, and `room` bytes may be written to `value`.
    let len = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), room) };
    let len = Errno::result(len)? as usize;
    Ok(if room == 0 { vec![0; len] } else { value[..len].to_vec() })
}

fn list(path: &Path, room: usize) -> nix::Result<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut names = vec![0u8; room];
    // SAFETY: the path ends in NUL, and `room` bytes may be written to `names`.
    let len = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), room) };
    let len = Errno::result(len)? as usize;
    Ok(if room == 0 { vec![0; len] } else { names[..len].to_vec() })
}

#[test]
fn files_and_directories_tell_their_digests() {
    let Some(store) = mounted() else { return };
    let view = &store.view;
    let file = view.file("x86_64-linux");
    let tree = view.directory([("file", file), ("link", view.symlink("file"))]);
    let Node::Directory { digest, .. } = &tree else { unreachable!() };
    let of_tree = digest.to_string();
    let base = view.add("tree", tree);
    let dir = store.path(&base);
    let (file, link) = (dir.join("file"), dir.join("link"));

    // The digest of these twelve bytes is known from elsewhere.
    let of_file = "b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=";
    assert_eq!(get(&file, BLOB, 100), Ok(of_file.into()));
    assert_eq!(get(&dir, DIRECTORY, 100), Ok(of_tree.into()));
    assert_eq!(get(&file, BLOB, 0).map(|value| value.len()), Ok(47), "size 0 asks for the size");
    assert_eq!(get(&file, BLOB, 46), Err(Errno::ERANGE));
    assert_eq!(get(&file, BLOB, 47), Ok(of_file.into()));

    assert_eq!(get(&file, DIRECTORY, 100), Err(Errno::ENODATA));
    assert_eq!(get(&dir, BLOB, 100), Err(Errno::ENODATA));
    assert_eq!(get(&file, c"user.other", 100), Err(Errno::ENODATA));
    assert_eq!(get(store.root(), DIRECTORY, 100), Err(Errno::ENODATA));

    assert_eq!(list(&file, 100), Ok(BLOB.to_bytes_with_nul().into()));
    assert_eq!(list(&dir, 100), Ok(DIRECTORY.to_bytes_with_nul().into()));
    assert_eq!(list(&dir, 0).map(|names| names.len()), Ok(DIRECTORY.to_bytes_with_nul().len()));
    assert_eq!(list(&dir, 5), Err(Errno::ERANGE));
    assert_eq!(list(&link, 100), Ok(Vec::new()));
    assert_eq!(list(store.root(), 100), Ok(Vec::new()));
}

#[test]
fn getfattr_prints_them() {
    let Some(store) = mounted() else { return };
    let base = store.view.add("file", store.view.file("x86_64-linux"));
    let dump = std::process::Command::new("getfattr").arg("-d").arg(store.path(&base)).output();
    let Ok(dump) = dump else {
        println!("SKIPPED: getfattr is not installed");
        return;
    };
    let text = String::from_utf8(dump.stdout).unwrap();
    let line = r#"user.tvix.castore.blob.digest="b3:KOM3/IHEx7YfInAnlJpAElYezq0Sxn9fRz7xuClwNfA=""#;
    assert!(text.lines().any(|found| found == line), "{text}");
}
