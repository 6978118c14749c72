//! The settings a build depends on, taken from a client's [`Settings`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix_compat::conf::{FeatureDisabled, Sandbox, SandboxPath, Settings};

use crate::failure::Failure;
use crate::hooks::Hooks;
use crate::recursive::FEATURE;
use crate::users::UserSource;
use fetch::DownloadOptions;

/// Where a shell for the sandbox may be found: it must need no library.
const SANDBOX_SHELLS: [&str; 2] = ["/usr/bin/busybox", "/bin/busybox"];

/// What a build needs to know of the settings.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Builds at the same time that this client allows.
    pub(crate) max_jobs: usize,
    pub(crate) cores: u64,
    pub(crate) timeout: Option<Duration>,
    pub(crate) max_silent_time: Option<Duration>,
    pub(crate) max_log_size: Option<u64>,
    pub(crate) keep_failed: bool,
    pub(crate) keep_going: bool,
    pub(crate) log_lines: usize,
    pub(crate) keep_log: bool,
    pub(crate) compress_log: bool,
    pub(crate) sandbox: Sandbox,
    pub(crate) sandbox_paths: BTreeMap<String, SandboxPath>,
    /// Where derivations may ask for files of the machine.
    pub(crate) impure_host_deps: Vec<String>,
    pub(crate) sandbox_build_dir: String,
    pub(crate) shm_size: String,
    pub(crate) build_dir: Option<PathBuf>,
    pub(crate) system: String,
    pub(crate) extra_platforms: BTreeSet<String>,
    pub(crate) features: BTreeSet<String>,
    pub(crate) experimental: BTreeSet<String>,
    pub(crate) secret_key_files: Vec<String>,
    pub(crate) users: UserSource,
    pub(crate) downloads: DownloadOptions,
    pub(crate) sandbox_fallback: bool,
    pub(crate) filter_system_calls: bool,
    pub(crate) new_privileges: bool,
    pub(crate) linux_26: bool,
    pub(crate) cgroups: bool,
    /// Variables that go before the daemon's own where a derivation asks for some.
    pub(crate) impure_env: BTreeMap<String, String>,
    pub(crate) hooks: Hooks,
    /// The client's user, if the kernel has told.
    pub(crate) client_uid: Option<u32>,
    /// Other machines, as `builders` names them.
    pub(crate) builders: String,
    pub(crate) builders_use_substitutes: bool,
    /// Whether to build what could not be substituted.
    pub(crate) fallback: bool,
    /// Whether to substitute also what derivations do not want to be.
    pub(crate) always_allow_substitutes: bool,
}

impl Options {
    pub(crate) fn new(settings: &Settings) -> Self {
        let limit = |number: u64| (number != 0).then_some(number);
        let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let processors = || std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let enabled = |feature| settings.experimental_features.contains(feature);
        let auto_allocate = settings.auto_allocate_uids && enabled("auto-allocate-uids");
        let mut sandbox_paths = settings.sandbox_paths.clone();
        if !sandbox_paths.contains_key("/bin/sh")
            && !sandbox_paths.contains_key("/bin")
            && let Some(shell) = SANDBOX_SHELLS.into_iter().find(|path| is_static(Path::new(path)))
        {
            // Stock Nix is built with such a default.
            sandbox_paths.insert("/bin/sh".into(), SandboxPath { source: shell.into(), optional: true });
        }
        Self {
            max_jobs: number(settings.max_jobs),
            cores: limit(settings.cores).unwrap_or_else(processors),
            timeout: limit(settings.timeout).map(Duration::from_secs),
            max_silent_time: limit(settings.max_silent_time).map(Duration::from_secs),
            max_log_size: limit(settings.max_build_log_size),
            keep_failed: settings.keep_failed,
            keep_going: settings.keep_going,
            log_lines: number(settings.log_lines),
            keep_log: settings.keep_build_log,
            compress_log: settings.compress_build_log,
            sandbox: settings.sandbox,
            sandbox_paths,
            impure_host_deps: settings.allowed_impure_host_deps.clone(),
            sandbox_build_dir: settings.sandbox_build_dir.clone(),
            shm_size: settings.sandbox_dev_shm_size.clone(),
            build_dir: settings.build_dir.clone().map(PathBuf::from),
            system: settings.system.clone(),
            extra_platforms: settings.extra_platforms.clone(),
            features: features(settings),
            experimental: settings.experimental_features.clone(),
            secret_key_files: settings.secret_key_files.clone(),
            builders: settings.builders.clone(),
            builders_use_substitutes: settings.builders_use_substitutes,
            fallback: settings.fallback,
            always_allow_substitutes: settings.always_allow_substitutes,
            users: UserSource {
                group: settings.build_users_group.clone().filter(|_| !auto_allocate),
                auto: auto_allocate,
                first_id: u32::try_from(settings.start_id).unwrap_or(u32::MAX),
                id_count: u32::try_from(settings.id_count).unwrap_or(u32::MAX),
            },
            downloads: DownloadOptions::new(settings),
            sandbox_fallback: settings.sandbox_fallback,
            filter_system_calls: settings.filter_syscalls,
            new_privileges: settings.allow_new_privileges,
            linux_26: settings.impersonate_linux_26,
            cgroups: settings.use_cgroups && enabled("cgroups"),
            impure_env: if enabled("configurable-impure-env") { pairs(&settings.impure_env) } else { BTreeMap::new() },
            hooks: Hooks::new(settings),
            client_uid: None,
        }
    }

    /// Whether an experimental feature is enabled.
    pub(crate) fn has_feature(&self, name: &str) -> bool {
        self.experimental.contains(name)
    }

    /// Refuses what needs an experimental feature that is not enabled.
    pub(crate) fn require_feature(&self, name: &'static str) -> Result<(), Failure> {
        if self.experimental.contains(name) { Ok(()) } else { Err(Failure::misc(FeatureDisabled(name))) }
    }

    /// Whether derivations for this system can be built here.
    pub(crate) fn builds_for(&self, system: &[u8]) -> bool {
        system == b"builtin"
            || system == self.system.as_bytes()
            || self.extra_platforms.iter().any(|platform| platform.as_bytes() == system)
    }
}

/// The system features that builds here have. Some come with experimental features, as in stock.
fn features(settings: &Settings) -> BTreeSet<String> {
    let implied = ["ca-derivations", FEATURE].into_iter().filter(|name| settings.experimental_features.contains(*name));
    settings.system_features.iter().cloned().chain(implied.map(str::to_owned)).collect()
}

/// `name=value` words; without a value it is empty.
fn pairs(words: &[String]) -> BTreeMap<String, String> {
    let pair = |word: &String| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    words.iter().filter_map(pair).collect()
}

/// Whether a program names no dynamic linker: only then does it run where there is nothing else.
fn is_static(program: &Path) -> bool {
    /// Program headers and the interpreter's name lie at the front of the file.
    const HEAD: u64 = 4096;
    let mut head = Vec::new();
    let Ok(file) = std::fs::File::open(program) else { return false };
    if std::io::Read::read_to_end(&mut std::io::Read::take(file, HEAD), &mut head).is_err() {
        return false;
    }
    head.starts_with(b"\x7fELF") && !head.windows(4).any(|w| w == b"/ld-")
}
