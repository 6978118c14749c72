//! Which tests a suite has, as the files say that it is built with.

use std::fs;
use std::path::{Path, PathBuf};

use super::layout::Format;
use crate::error::{Context, Result};

/// Suites that are programs in C++ to be compiled against Nix's libraries; they are no concern of a daemon's.
const COMPILED: [&str; 2] = ["plugins", "libstoreconsumer"];
/// The same in suites that are built with make; or for hardware that not every machine has.
const LEFT_OUT: [&str; 2] = ["main/plugins", "main/compute-levels"];
/// The suite of the tests that lie in the tests' directory itself.
const MAIN: &str = "main";
/// What takes long is started first, so that the end is not spent waiting for it.
const LONG: [&str; 5] = ["main/fetchMercurial", "flakes/mercurial", "main/lang", "flakes/flakes", "main/fetchGit"];

/// One test: a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Case {
    /// For example "main".
    pub(crate) suite: String,
    /// Its directory below the suite's.
    pub(crate) directory: String,
    /// The script's name without `.sh`.
    pub(crate) test: String,
}

impl Case {
    /// Suite and test, for example "main/gc".
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.suite, self.test)
    }

    /// Whether that is its name, with or without the suite's.
    pub(crate) fn is_named(&self, name: &str) -> bool {
        self.test == name || self.name() == name
    }

    /// Whether it is among those asked for.
    pub(crate) fn is_chosen(&self, names: &[String]) -> bool {
        names.is_empty() || names.iter().any(|name| self.is_named(name))
    }

    /// Where its log is.
    pub(crate) fn log(&self, logs: &Path) -> PathBuf {
        logs.join(format!("{}.{}.log", self.suite, self.test))
    }
}

/// All tests of the suites in and directly below a directory, in the order they are best run in.
pub(crate) fn read(tests: &Path, format: Format) -> Result<Vec<Case>> {
    let mut cases = match format {
        Format::Meson => read_meson(tests)?,
        Format::Make => {
            let file = tests.join("local.mk");
            parse_make(&fs::read_to_string(&file).doing("reading", &file)?)
        }
    };
    cases.retain(|case| !COMPILED.contains(&case.suite.as_str()) && !LEFT_OUT.contains(&case.name().as_str()));
    cases.sort_by_key(|case| LONG.iter().position(|name| case.name() == *name).unwrap_or(LONG.len()));
    Ok(cases)
}

fn read_meson(tests: &Path) -> Result<Vec<Case>> {
    let mut directories = vec![String::new()];
    for entry in fs::read_dir(tests).doing("listing", tests)?.flatten() {
        directories.push(entry.file_name().to_string_lossy().into_owned());
    }
    directories.sort();
    let mut cases = Vec::new();
    for directory in directories {
        let file = tests.join(&directory).join("meson.build");
        if file.is_file() {
            parse(&fs::read_to_string(&file).doing("reading", &file)?, &directory, &mut cases);
        }
    }
    Ok(cases)
}

/// A list of words `[DIRECTORY/]NAME.sh` after `nix_tests =`, to the end of its last continued line.
fn parse_make(makefile: &str) -> Vec<Case> {
    let list = makefile.split_once("nix_tests =").map_or("", |(_, rest)| rest).replace("\\\n", " ");
    let words = list.lines().next().unwrap_or_default().split_whitespace();
    let case = |word: &str| {
        let word = word.strip_suffix(".sh")?;
        let (directory, test) = word.split_once('/').unwrap_or(("", word));
        let suite = if directory.is_empty() { MAIN } else { directory };
        Some(Case { suite: suite.to_owned(), directory: directory.to_owned(), test: test.to_owned() })
    };
    words.filter_map(case).collect()
}

/// Each suite is a dictionary: its `'name'`, its `'tests'`, then its `'workdir'`. Strings are in single quotes.
fn parse(meson: &str, directory: &str, cases: &mut Vec<Case>) {
    let (mut suite, mut in_tests, mut awaits_name) = (String::new(), false, false);
    // What follows the suites reads from them.
    let meson = meson.split("\nforeach ").next().unwrap_or_default();
    let uncommented = meson.lines().map(|line| line.split('#').next().unwrap_or_default()).collect::<String>();
    // What is between quotes is every second piece.
    for string in uncommented.split('\'').skip(1).step_by(2) {
        match string {
            "name" => awaits_name = true,
            "tests" => in_tests = true,
            "workdir" => in_tests = false,
            _ if awaits_name => {
                suite = string.to_owned();
                awaits_name = false;
            }
            _ if in_tests => cases.extend(string.strip_suffix(".sh").map(|test| Case {
                suite: suite.clone(),
                directory: directory.to_owned(),
                test: test.to_owned(),
            })),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_read_from_meson() {
        let meson = "suites += {\n  'name': 'ca',\n  'deps': [],\n  'tests': [\n    'gc.sh', # 'no.sh'\n    'build.sh',\n  ],\n  \
                     'workdir': meson.current_source_dir(),\n}\nforeach suite : suites\n \
                     suite['tests']\n 'x.sh'\n";
        let mut cases = Vec::new();
        parse(meson, "ca", &mut cases);
        let names: Vec<String> = cases.iter().map(Case::name).collect();
        assert_eq!(names, ["ca/gc", "ca/build"]);
        assert!(cases[0].is_named("gc") && cases[0].is_named("ca/gc") && !cases[0].is_named("build"));
    }

    #[test]
    fn suites_are_read_from_make() {
        let makefile = "nix_tests = \\\n  gc.sh \\\n  ca/gc.sh\n\nifeq ($(X), 1)\n\tnix_tests += no.sh\nendif\n";
        let cases = parse_make(makefile);
        let names: Vec<String> = cases.iter().map(Case::name).collect();
        assert_eq!(names, ["main/gc", "ca/gc"]);
        assert_eq!((cases[0].directory.as_str(), cases[1].directory.as_str()), ("", "ca"));
    }
}
