//! The kernel's mount table: `/proc/self/mountinfo`.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A mount, as far as we look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MountEntry {
    /// The device of the filesystem, `major:minor`.
    pub(crate) device: String,
    /// Where it is mounted.
    pub(crate) mountpoint: PathBuf,
    /// The filesystem's type, such as `ext4` or `fuse.castored`.
    pub(crate) kind: String,
}

impl MountEntry {
    /// Whether a FUSE server is behind it.
    pub(crate) fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind == "fuseblk" || self.kind.starts_with("fuse.")
    }

    /// The device's major and minor number.
    pub(crate) fn device_numbers(&self) -> Option<(u32, u32)> {
        let (major, minor) = self.device.split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    }
}

/// The mount that is on top at `mountpoint` (an absolute path without symlinks), if any is.
///
/// It does not touch the mounted filesystem, so it works when that one is dead.
pub(crate) fn mount_at(mountpoint: &Path) -> io::Result<Option<MountEntry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    // Later mounts come later in the table and hide earlier ones.
    let mut entries = table.split(|byte| *byte == b'\n').filter_map(parse_line);
    Ok(entries.rfind(|entry| entry.mountpoint == mountpoint))
}

/// Whether the filesystem of that device (`major:minor`) is mounted at `mountpoint`, on top or below others.
pub(crate) fn is_mounted(mountpoint: &Path, device: &str) -> io::Result<bool> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let mut entries = table.split(|byte| *byte == b'\n').filter_map(parse_line);
    Ok(entries.any(|entry| entry.mountpoint == mountpoint && entry.device == device))
}

/// Reads `id parent major:minor root mountpoint options [optional fields] - type source options`.
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = fields.nth(2)?;
    let mountpoint = fields.nth(1)?;
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(MountEntry {
        device: String::from_utf8(device.to_vec()).ok()?,
        mountpoint: PathBuf::from(unescape(mountpoint)),
        kind: String::from_utf8(kind.to_vec()).ok()?,
    })
}

/// Undoes the kernel's `\ooo` for blanks, newlines and backslashes.
fn unescape(text: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(value) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            plain.push(value);
            rest = &after[3..];
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    OsString::from_vec(plain)
}

/// The directory of a mount's tunables in sysfs.
pub(crate) fn tunables(entry: &MountEntry) -> PathBuf {
    Path::new("/sys/class/bdi").join(std::ffi::OsStr::from_bytes(entry.device.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line_with_and_without_optional_fields() {
        let shared = b"36 25 0:32 / /nix/store ro,relatime shared:5 master:1 - fuse.castored castored ro,user_id=0";
        assert_eq!(
            parse_line(shared),
            Some(MountEntry { device: "0:32".into(), mountpoint: "/nix/store".into(), kind: "fuse.castored".into() })
        );
        assert_eq!(parse_line(shared).unwrap().device_numbers(), Some((0, 32)));
        let private = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw";
        assert_eq!(parse_line(private).unwrap().kind, "ext4");
        assert_eq!(parse_line(b""), None);
        assert_eq!(parse_line(b"36 25 0:32 / /x ro"), None);
    }

    #[test]
    fn undoes_escapes() {
        assert_eq!(unescape(br"/a\040b\134c\011"), OsString::from("/a b\\c\t"));
        assert_eq!(unescape(br"\04"), OsString::from(r"\04"));
        assert_eq!(unescape(br"\9zz"), OsString::from(r"\9zz"));
    }

    #[test]
    fn fuse_is_told_from_others() {
        let entry = |kind: &str| MountEntry { device: "0:1".into(), mountpoint: "/".into(), kind: kind.into() };
        assert!(entry("fuse").is_fuse() && entry("fuse.castored").is_fuse());
        assert!(!entry("fusectl").is_fuse() && !entry("ext4").is_fuse());
    }

    #[test]
    fn this_machine_has_a_root() {
        let root = mount_at(Path::new("/")).unwrap().unwrap();
        assert!(is_mounted(&root.mountpoint, &root.device).unwrap());
        assert!(!is_mounted(&root.mountpoint, "0:0").unwrap());
        assert!(mount_at(Path::new("/no/such/mount")).unwrap().is_none());
    }
}
