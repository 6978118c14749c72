//! What is measured: the things people do with a store directory.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;

use compat_tests::error::Context;
use compat_tests::{Error, Result, Room};

/// Files of the row of small files, and how long one may be, in bytes.
const SMALL_FILES: usize = 10_000;
const SMALL: u64 = 16 << 10;
/// Bytes asked for at a time.
const PIECE: usize = 1 << 20;
/// Source files of the project that is compiled.
const SOURCES: usize = 12;
/// Where the project is in the tree.
const PROJECT: &str = "project";

fn run(what: &str, command: &mut Command) -> Result<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().doing("running", what)?;
    if status.success() { Ok(()) } else { Err(Error::Wrong(format!("`{what}` failed: {status}"))) }
}

/// Looks at everything.
pub(crate) fn walk(tree: &Path) -> Result<()> {
    run("find -ls", Command::new("find").arg(tree).arg("-ls"))
}

/// Reads everything, one file after the other.
pub(crate) fn archive(tree: &Path) -> Result<()> {
    let script = r#"tar -c -C "$1" . | cat >/dev/null"#;
    run("tar", Command::new("/bin/sh").args(["-euc", script, "sh"]).arg(tree))
}

fn files_below(dir: &Path, each: &mut dyn FnMut(PathBuf, u64)) -> Result<()> {
    for entry in fs::read_dir(dir).doing("listing", dir)? {
        let entry = entry.doing("listing", dir)?;
        let kind = entry.file_type().doing("looking at", entry.path())?;
        if kind.is_dir() {
            files_below(&entry.path(), each)?;
        } else if kind.is_file() {
            let length = entry.metadata().doing("looking at", entry.path())?.len();
            each(entry.path(), length);
        }
    }
    Ok(())
}

fn read(path: &Path, buffer: &mut [u8]) -> Result<()> {
    let mut file = File::open(path).doing("opening", path)?;
    while file.read(buffer).doing("reading", path)? > 0 {}
    Ok(())
}

/// Reads everything with two readers, of which each takes every second file.
pub(crate) fn read_all(tree: &Path) -> Result<()> {
    let readers: Vec<_> = (0..2)
        .map(|reader| {
            let tree = tree.to_owned();
            thread::spawn(move || {
                let (mut turn, mut buffer, mut outcome) = (0, vec![0; PIECE], Ok(()));
                files_below(&tree, &mut |path, _| {
                    turn += 1;
                    if turn % 2 == reader && outcome.is_ok() {
                        outcome = read(&path, &mut buffer);
                    }
                })?;
                outcome
            })
        })
        .collect();
    readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| Error::Wrong("a reader panicked".into()))?)
}

/// Reads a file from its beginning to its end.
pub(crate) fn read_large(file: &Path) -> Result<()> {
    read(file, &mut vec![0; PIECE])
}

/// Opens and reads small files in a random order, the same each time. Their names are known beforehand.
pub(crate) fn small_files(tree: &Path) -> Result<()> {
    let mut buffer = vec![0; PIECE];
    small_names(tree)?.iter().try_for_each(|name| read(&tree.join(name), &mut buffer))
}

/// The names of the small files. The first tree that is asked for is searched, and the answer kept: to search is not what
/// is measured, so whoever measures calls this before.
pub(crate) fn small_names(tree: &Path) -> Result<&'static [PathBuf]> {
    static NAMES: OnceLock<Vec<PathBuf>> = OnceLock::new();
    if let Some(names) = NAMES.get() {
        return Ok(names);
    }
    let mut names = Vec::new();
    files_below(tree, &mut |path, length| {
        if (1..=SMALL).contains(&length) {
            names.extend(path.strip_prefix(tree).ok().map(Path::to_owned));
        }
    })?;
    names.sort();
    // A shuffle (Fisher and Yates) by xorshift.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..names.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        names.swap(last, (state % (last as u64 + 1)) as usize);
    }
    names.truncate(SMALL_FILES);
    Ok(NAMES.get_or_init(|| names))
}

/// Writes a small C project into the tree.
pub(crate) fn write_project(tree: &Path) -> Result<()> {
    let dir = tree.join(PROJECT);
    fs::create_dir_all(&dir).doing("creating", &dir)?;
    for number in 0..SOURCES {
        let mut text = String::new();
        for header in ["stdio", "stdlib", "string", "math", "pthread", "unistd", "sys/socket", "netinet/in", "locale"] {
            text.push_str(&format!("#include <{header}.h>\n"));
        }
        for function in 0..20 {
            text.push_str(&format!(
                "double f{number}_{function}(const char *s, int n) {{\n    double sum = {function};\n    for (int i = 0; \
                 i < n; i++) sum += sqrt((double)strlen(s) * i) + s[i % (strlen(s) + 1)];\n    if (n > 9) \
                 printf(\"%f\\n\", sum);\n    return sum;\n}}\n"
            ));
        }
        let file = dir.join(format!("part{number}.c"));
        fs::write(&file, text).doing("writing", &file)?;
    }
    let file = dir.join("main.c");
    fs::write(&file, "double f0_0(const char *, int);\nint main(void) { return f0_0(\"x\", 1) != 120; }\n")
        .doing("writing", &file)
}

/// Compiles the project with the tree's own compiler, headers and libraries: its `usr` is put over the machine's.
pub(crate) fn compile(room: &Room, tree: &Path) -> Result<()> {
    let script = r#"
        mount --bind "$1/usr" /usr
        for source in "$1"/project/*.c; do gcc -O1 -c "$source" -o "$2/$(basename "$source").o"; done
        gcc -o "$2/program" "$2"/*.o -lm -lpthread
        "$2/program"
    "#;
    let out = room.tmp("out");
    fs::create_dir_all(&out).doing("creating", &out)?;
    let mut command = Command::new("unshare");
    command.args(["-m", "--", "/bin/sh", "-euc", script, "sh"]).arg(tree).arg(&out);
    run("gcc", &mut command)
}
