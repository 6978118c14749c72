//! The browser from Debian's packages, with its libraries and a font.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::apt::{PrivateApt, remove_left, run};
use crate::error::{Context, Result};
use crate::releases::{bind_to, copy, copy_libraries};

/// The Debian suite whose browser is taken: with few libraries, and still supplied with new versions.
const SUITE: &str = "bookworm";
/// The package.
const PACKAGE: &str = "chromium-headless-shell";
/// Where it is in the package.
const PROGRAMS: &str = "usr/lib/chromium";
/// Files beside the program that it reads, by how their names end.
const DATA: [&str; 3] = [".pak", ".dat", ".bin"];
/// A font, without which no text has a width.
const FONT: &str = "usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";
/// What is unpacked, by how the names of packages begin, and what of that is not.
const UNPACKED: [&str; 4] = ["chromium-", "lib", "zlib", "fonts-dejavu"];
const LEFT_OUT: [&str; 4] = ["libllvm", "libgl1-mesa-dri", "libz3", "libicu"];
/// Libraries that are loaded by name when it runs.
const LOADED: [&str; 4] = ["libsoftokn3.so", "libfreebl3.so", "libfreeblpriv3.so", "libnssckbi.so"];

/// Fetches it if it is missing below `cache`; answers its directory. The caller holds the cache's lock.
pub(super) fn fetch(cache: &Path) -> Result<PathBuf> {
    let place = cache.join("chromium");
    if place.is_dir() {
        return Ok(place);
    }
    println!("fetching {PACKAGE} from Debian {SUITE}");
    let (work, new) = (cache.join(".apt"), cache.join(".new"));
    remove_left(&[&work, &new])?;
    let root = work.join("root");
    let (bin, lib) = (new.join("bin"), new.join("lib"));
    for dir in [&root, &bin, &lib, &new.join("fonts")] {
        fs::create_dir_all(dir).doing("creating", dir)?;
    }
    let is_wanted = |name: &str| {
        let begins = |list: &[&str]| list.iter().any(|begin| name.starts_with(begin));
        begins(&UNPACKED) && !begins(&LEFT_OUT)
    };
    PrivateApt::new(&work, "deb", SUITE)?.unpack_closure(&[PACKAGE], &root, is_wanted)?;
    let programs = root.join(PROGRAMS);
    copy_libraries(&root, &programs.join(PACKAGE), &lib)?;
    for file in fs::read_dir(&lib).doing("listing", &lib)?.flatten().map(|entry| entry.path()) {
        // One names the directory where Debian would have put it.
        run(Command::new("patchelf").arg("--remove-rpath").arg(file))?;
    }
    for entry in fs::read_dir(&programs).doing("listing", &programs)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == PACKAGE || DATA.iter().any(|end| name.ends_with(end)) {
            copy(&entry.path(), &bin.join(name))?;
        }
    }
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    for name in LOADED {
        let found = [libraries.join(name), libraries.join("nss").join(name)].into_iter().find(|file| file.exists());
        if let Some(file) = found {
            copy(&file, &lib.join(name))?;
        }
    }
    bind_to(&bin.join(PACKAGE), &place.join("lib"))?;
    copy(&root.join(FONT), &new.join("fonts/sans.ttf"))?;
    let fonts = format!(
        "<?xml version=\"1.0\"?>\n<!DOCTYPE fontconfig SYSTEM \"fonts.dtd\">\n<fontconfig><dir>{}</dir><cachedir \
         prefix=\"xdg\">fontconfig</cachedir></fontconfig>\n",
        place.join("fonts").display()
    );
    fs::write(new.join("fonts.conf"), fonts).doing("writing", new.join("fonts.conf"))?;
    fs::rename(&new, &place).doing("moving into place", &place)?;
    fs::remove_dir_all(&work).doing("removing", &work)?;
    Ok(place)
}
