//! Where a release's suite has its parts. Since 2.26 it is built with meson, before with make.

use crate::error::{Error, Result};

/// What differs between the suites of releases.
#[derive(Debug)]
pub(crate) struct Layout {
    /// The release.
    pub(crate) version: &'static str,
    /// The directory of the tests, in the source.
    pub(crate) tests: &'static str,
    /// What the tests use of the source, their directory included.
    pub(crate) parts: &'static [&'static str],
    /// How the suite lists its tests.
    pub(crate) list: Format,
    /// The suite's functions, in the tests' directory; ours are appended.
    pub(crate) functions: &'static str,
    /// What is appended to them.
    pub(crate) appended: &'static str,
    /// Files to be filled in, in the tests' directory; the names end with `.in`.
    pub(crate) templates: &'static [&'static str],
    /// Where they go: a directory of their own, or beside the templates.
    pub(crate) built_apart: bool,
    /// A script in the tests' directory that prepares each test. It runs without the daemon, since it ends with clearing
    /// away what it was given.
    pub(crate) prepare: Option<&'static str>,
    /// How its scripts are run.
    pub(crate) shell_options: &'static [&'static str],
    /// Whether its client looks for its own programs where it was built to be, unless it is told.
    pub(crate) misses_its_programs: bool,
    /// The exit code by which a test says that it was skipped.
    pub(crate) skipped: i32,
}

/// How a suite lists its tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// `meson.build` in each directory.
    Meson,
    /// One `local.mk`.
    Make,
}

const LAYOUTS: [Layout; 2] = [
    Layout {
        version: super::RELEASES[0],
        tests: "tests/functional",
        parts: &["tests/functional", "scripts"],
        list: Format::Meson,
        functions: "common/functions.sh",
        appended: include_str!("../../suites/restart.sh"),
        templates: &["config.nix.in", "ca/config.nix.in", "dyn-drv/config.nix.in", "common/subst-vars.sh.in"],
        built_apart: true,
        prepare: None,
        shell_options: &["-e", "-u", "-o", "pipefail"],
        misses_its_programs: false,
        skipped: 77,
    },
    Layout {
        version: super::RELEASES[1],
        tests: "tests",
        parts: &["tests", "scripts", "src/nix-channel"],
        list: Format::Make,
        functions: "common.sh.in",
        appended: include_str!("../../suites/restart-2.8.0.sh"),
        templates: &["config.nix.in", "ca/config.nix.in", "common.sh.in"],
        built_apart: false,
        prepare: Some("init.sh"),
        shell_options: &["-e"],
        misses_its_programs: true,
        skipped: 99,
    },
];

impl Layout {
    /// That of a release.
    pub(crate) fn of(version: &str) -> Result<&'static Self> {
        let found = LAYOUTS.iter().find(|layout| layout.version == version);
        found.ok_or_else(|| Error::Wrong(format!("the suite of nix {version} cannot be run")))
    }
}
