//! The settings, each with its name, older names and default.

use std::collections::{BTreeMap, BTreeSet};

use super::value::Value;
use super::{Error, FeatureDisabled, Sandbox, SandboxPath, other};
use crate::signature::{self, PublicKey};

/// Declares [`Settings`]: each field with its documentation, type, default, name in `nix.conf`, and aliases.
macro_rules! settings {
    ($($(#[$doc:meta])* $field:ident: $type:ty = $default:expr, $name:literal $(| $alias:literal)*;)*) => {
        /// What the daemon is told by `nix.conf`, by its command line, and by clients for their own operations.
        ///
        /// [`Default`] has stock Nix's defaults (2.34).
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Settings {
            $($(#[$doc])* #[doc = concat!("\n\n`", $name, "`")] pub $field: $type,)*
            /// What `max-jobs = auto` means: the number of processors.
            pub processors: u64,
            /// All settings that have no field, as they were given: the client's side of stock Nix's, and unknown ones.
            pub other: BTreeMap<String, String>,
        }

        impl Default for Settings {
            fn default() -> Self {
                Self { $($field: $default,)* processors: 1, other: BTreeMap::new() }
            }
        }

        impl Settings {
            /// Replaces the value of the field named so. `None` if there is none.
            fn replace(&mut self, name: &str, value: &str) -> Option<Result<(), &'static str>> {
                match name {
                    $($name $(| $alias)* => Some(match <$type as Value>::parse(value) {
                        Some(value) => { self.$field = value; Ok(()) }
                        None => Err(<$type as Value>::EXPECTED),
                    }),)*
                    _ => None,
                }
            }

            /// Adds to the value of the field named so. `None` if there is none or it cannot be added to.
            fn add_to(&mut self, name: &str, value: &str) -> Option<Result<(), &'static str>> {
                match name {
                    $($name $(| $alias)* => {
                        let legal = self.$field.add(value)?;
                        Some(if legal { Ok(()) } else { Err(<$type as Value>::EXPECTED) })
                    })*
                    _ => None,
                }
            }

            /// Adds names and values of the fields that differ from those of `other`.
            fn differing(&self, other: &Self, found: &mut BTreeMap<String, String>) {
                $(if self.$field != other.$field {
                    found.insert($name.to_owned(), self.$field.render());
                })*
            }
        }
    };
}

settings! {
    // Building: how much at once, how long.

    /// How many builds may run at once; 0 means none here, only remotely. `auto` is [`processors`](Self::processors).
    max_jobs: u64 = 1, "max-jobs" | "build-max-jobs";
    /// How many processors a build is told to use (`NIX_BUILD_CORES`); 0 means all.
    cores: u64 = 0, "cores" | "build-cores";
    /// Seconds a build may take; 0 means any time.
    timeout: u64 = 0, "timeout" | "build-timeout";
    /// Seconds a build may be silent; 0 means any time.
    max_silent_time: u64 = 0, "max-silent-time" | "build-max-silent-time";
    /// Seconds between attempts to get a lock or a remote builder.
    build_poll_interval: u64 = 5, "build-poll-interval";
    /// Bytes of log after which a build is killed; 0 means any number.
    max_build_log_size: u64 = 0, "max-build-log-size" | "build-max-log-size";
    /// Whether logs are kept.
    keep_build_log: bool = true, "keep-build-log" | "build-keep-log";
    /// Whether kept logs are compressed.
    compress_build_log: bool = true, "compress-build-log" | "build-compress-log";
    /// Lines of log shown with a failed build.
    log_lines: u64 = 25, "log-lines";
    /// Whether a failed build's directory is kept.
    keep_failed: bool = false, "keep-failed";
    /// Whether to go on after a failed build with those that do not depend on it.
    keep_going: bool = false, "keep-going";
    /// Whether to build what cannot be substituted because of an error.
    fallback: bool = false, "fallback" | "build-fallback";
    /// Whether clients list what will be built or fetched.
    print_missing: bool = true, "print-missing";

    // Building: where and as whom.

    /// Whether builds are isolated.
    sandbox: Sandbox = Sandbox::On, "sandbox" | "build-use-chroot" | "build-use-sandbox";
    /// What of the machine builds may see, by its path in the sandbox.
    sandbox_paths: BTreeMap<String, SandboxPath> = BTreeMap::new(), "sandbox-paths" | "build-chroot-dirs" | "build-sandbox-paths";
    /// Whether to build without sandbox where the kernel cannot make one.
    sandbox_fallback: bool = true, "sandbox-fallback";
    /// Where the build directory is in the sandbox.
    sandbox_build_dir: String = "/build".to_owned(), "sandbox-build-dir";
    /// Size of `/dev/shm` in the sandbox, as tmpfs takes it.
    sandbox_dev_shm_size: String = "50%".to_owned(), "sandbox-dev-shm-size";
    /// Where build directories are made; the daemon's own choice if not set.
    build_dir: Option<String> = None, "build-dir";
    /// Whether setuid and other syscalls that would mark files specially are forbidden.
    filter_syscalls: bool = true, "filter-syscalls";
    /// Whether builds may gain privileges by running setuid programs.
    allow_new_privileges: bool = false, "allow-new-privileges";
    /// Whether to insist on giving up supplementary groups.
    require_drop_supplementary_groups: bool = true, "require-drop-supplementary-groups";
    /// The group whose members builds run as. None: builds run as the daemon's own user.
    build_users_group: Option<String> = Some("nixbld".to_owned()), "build-users-group";
    /// Whether builds get user ids of their own from a range instead.
    auto_allocate_uids: bool = false, "auto-allocate-uids";
    /// First user id of that range.
    start_id: u64 = 872_415_232, "start-id";
    /// Number of user ids in that range.
    id_count: u64 = 8_388_608, "id-count";
    /// Whether builds run in cgroups of their own.
    use_cgroups: bool = false, "use-cgroups";
    /// Whether builds are told they run on Linux 2.6.
    impersonate_linux_26: bool = false, "impersonate-linux-26" | "build-impersonate-linux-26";
    /// The system built for.
    system: String = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS), "system";
    /// Other systems whose programs run here.
    extra_platforms: BTreeSet<String> = default_platforms(), "extra-platforms";
    /// What derivations may require of the machine. Whether it has `kvm` is for the daemon to find out.
    system_features: BTreeSet<String> = default_features(), "system-features";
    /// Experimental features switched on.
    experimental_features: BTreeSet<String> = BTreeSet::new(), "experimental-features";
    /// Environment variables given to impure derivations, as `name=value`.
    impure_env: Vec<String> = Vec::new(), "impure-env";
    /// Paths of the machine a derivation may ask to see (`__impureHostDeps`).
    allowed_impure_host_deps: Vec<String> = Vec::new(), "allowed-impure-host-deps";
    /// Machines to build on, or `@file`.
    builders: String = "@/etc/nix/machines".to_owned(), "builders";
    /// Whether these fetch inputs themselves.
    builders_use_substitutes: bool = false, "builders-use-substitutes";
    /// A program asked before each build for more paths the sandbox should have.
    pre_build_hook: Option<String> = None, "pre-build-hook";
    /// A program run after each build.
    post_build_hook: Option<String> = None, "post-build-hook";
    /// A program shown what differs between two builds of the same.
    diff_hook: Option<String> = None, "diff-hook";
    /// Whether it is run.
    run_diff_hook: bool = false, "run-diff-hook";

    // Who may do what.

    /// Users that are trusted: names, `@group`, or `*`.
    trusted_users: Vec<String> = list(["root"]), "trusted-users";
    /// Users that may connect at all: names, `@group`, or `*`.
    allowed_users: Vec<String> = list(["*"]), "allowed-users";
    /// Whether what others add has to be signed by one of [`trusted_public_keys`](Self::trusted_public_keys).
    require_sigs: bool = true, "require-sigs";
    /// The keys, as `name:base64`.
    trusted_public_keys: Vec<String> = list(["cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="]), "trusted-public-keys" | "binary-cache-public-keys";
    /// Files with the keys that sign what is built here.
    secret_key_files: Vec<String> = Vec::new(), "secret-key-files";

    // Substitution and downloads.

    /// Whether to fetch what others have built.
    substitute: bool = true, "substitute" | "build-use-substitutes";
    /// From where, in order.
    substituters: Vec<String> = list(["https://cache.nixos.org/"]), "substituters" | "binary-caches";
    /// From where else untrusted users may ask to fetch.
    trusted_substituters: Vec<String> = Vec::new(), "trusted-substituters" | "trusted-binary-caches";
    /// Whether to substitute also what derivations ask to be built locally.
    always_allow_substitutes: bool = false, "always-allow-substitutes";
    /// How many paths are fetched at once.
    max_substitution_jobs: u64 = 16, "max-substitution-jobs" | "substitution-max-jobs";
    /// Connections at once to fetch over; 0 means any number.
    http_connections: u64 = 25, "http-connections" | "binary-caches-parallel-connections";
    /// Seconds a connection may take to be made; 0 means any time.
    connect_timeout: u64 = 15, "connect-timeout";
    /// Seconds a download may stand still.
    stalled_download_timeout: u64 = 300, "stalled-download-timeout";
    /// How often a download is tried.
    download_attempts: u64 = 5, "download-attempts";
    /// KiB per second a download may take; 0 means any number.
    download_speed: u64 = 0, "download-speed";
    /// Whether HTTP/2 is spoken with servers that offer it.
    http2: bool = true, "http2";
    /// Seconds to remember that a cache has a path.
    narinfo_cache_positive_ttl: u64 = 2_592_000, "narinfo-cache-positive-ttl";
    /// Seconds to remember that a cache does not have a path.
    narinfo_cache_negative_ttl: u64 = 3_600, "narinfo-cache-negative-ttl";
    /// Seconds to remember what a cache says of itself.
    narinfo_cache_meta_ttl: u64 = 604_800, "narinfo-cache-meta-ttl";
    /// Where fixed outputs are looked for by their hash before their own URL.
    hashed_mirrors: Vec<String> = Vec::new(), "hashed-mirrors";
    /// File with passwords for downloads.
    netrc_file: String = "/etc/nix/netrc".to_owned(), "netrc-file";
    /// File with the certificates that are trusted.
    ssl_cert_file: String = "/etc/ssl/certs/ca-certificates.crt".to_owned(), "ssl-cert-file";

    // Garbage collection.

    /// Whether the outputs of live derivations are live.
    keep_outputs: bool = false, "keep-outputs" | "gc-keep-outputs";
    /// Whether the derivations of live outputs are live.
    keep_derivations: bool = true, "keep-derivations" | "gc-keep-derivations";
    /// Bytes of free space below which garbage is collected without being asked for; 0 is never. Not set in stock Nix
    /// means 0; here the store chooses by the size of the filesystem.
    min_free: Option<u64> = None, "min-free";
    /// Bytes of free space at which that collection stops.
    max_free: Option<u64> = None, "max-free";
    /// Seconds between looks at the free space.
    min_free_check_interval: u64 = 5, "min-free-check-interval";
}

impl Settings {
    /// The defaults, for a machine with so many processors.
    pub fn new(processors: u64) -> Self {
        Self { processors, ..Self::default() }
    }

    /// Sets one by its name or an alias of it; `extra-<name>` adds to what a list holds.
    ///
    /// Says whether stock Nix has such a setting. What has no field here is kept in [`other`](Self::other) either way.
    pub fn set(&mut self, name: &str, value: &str) -> Result<bool, Error> {
        if matches!(name, "max-jobs" | "build-max-jobs") && value == "auto" {
            self.max_jobs = self.processors;
            return Ok(true);
        }
        // In this order, for `extra-platforms` is a whole name.
        let mut done = self.replace(name, value);
        if let (None, Some(name)) = (&done, name.strip_prefix("extra-")) {
            done = self.add_to(name, value);
        }
        match done {
            Some(Ok(())) => Ok(true),
            Some(Err(expected)) => Err(Error::Value { name: name.to_owned(), value: value.to_owned(), expected }),
            None => {
                self.other.insert(name.to_owned(), value.to_owned());
                Ok(other::is_known(name))
            }
        }
    }

    /// The settings that are not at their defaults, with values as `nix.conf` has them. Unknown names are left out.
    pub fn changed(&self) -> BTreeMap<String, String> {
        let mut changed: BTreeMap<String, String> =
            self.other.iter().filter(|(name, _)| other::is_known(name)).map(|(n, v)| (n.clone(), v.clone())).collect();
        self.differing(&Self::default(), &mut changed);
        changed
    }

    /// Refuses what needs an experimental feature that is not enabled.
    ///
    /// # Errors
    /// [`FeatureDisabled`].
    pub fn require_feature(&self, name: &'static str) -> Result<(), FeatureDisabled> {
        if self.experimental_features.contains(name) { Ok(()) } else { Err(FeatureDisabled(name)) }
    }

    /// [`trusted_public_keys`](Self::trusted_public_keys), read.
    pub fn public_keys(&self) -> Result<Vec<PublicKey>, signature::Error> {
        self.trusted_public_keys.iter().map(|key| PublicKey::parse(key)).collect()
    }
}

fn default_platforms() -> BTreeSet<String> {
    match (std::env::consts::ARCH, std::env::consts::OS) {
        ("x86_64", "linux") => words(["i686-linux"]),
        _ => BTreeSet::new(),
    }
}

fn default_features() -> BTreeSet<String> {
    let mut features = words(["nixos-test", "benchmark", "big-parallel"]);
    if std::env::consts::OS == "linux" {
        features.insert("uid-range".to_owned());
    }
    features
}

fn list<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).into()
}

fn words<const N: usize>(words: [&str; N]) -> BTreeSet<String> {
    words.map(str::to_owned).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_aliases_and_additions() {
        let mut settings = Settings::new(6);
        assert_eq!(settings.set("build-max-jobs", "auto"), Ok(true));
        assert_eq!(settings.set("max-free", "3g"), Ok(true));
        assert_eq!(settings.set("sandbox", "relaxed"), Ok(true));
        assert_eq!(settings.set("build-users-group", ""), Ok(true));
        assert_eq!(settings.set("extra-binary-caches", "a  b"), Ok(true));
        assert_eq!(settings.set("extra-platforms", "x"), Ok(true));
        assert_eq!(settings.set("extra-extra-platforms", "y"), Ok(true));
        assert_eq!(settings.set("extra-sandbox-paths", "/bin/sh=/s/sh? /etc"), Ok(true));
        assert_eq!((settings.max_jobs, settings.max_free), (6, Some(3 << 30)));
        assert_eq!((settings.sandbox, &settings.build_users_group), (Sandbox::Relaxed, &None));
        assert_eq!(settings.substituters, ["https://cache.nixos.org/", "a", "b"]);
        assert_eq!(settings.extra_platforms, words(["x", "y"]));
        let paths = [("/bin/sh", "/s/sh", true), ("/etc", "/etc", false)];
        let paths = paths
            .map(|(target, source, optional)| (target.to_owned(), SandboxPath { source: source.to_owned(), optional }));
        assert_eq!(settings.sandbox_paths, paths.into());
        assert!(settings.other.is_empty());
    }

    #[test]
    fn other_settings_are_kept() {
        let mut settings = Settings::default();
        assert_eq!(settings.set("warn-dirty", "false"), Ok(true));
        assert_eq!(settings.set("no-such-setting", "1"), Ok(false));
        // What is no list cannot be added to.
        assert_eq!(settings.set("extra-cores", "1"), Ok(false));
        assert_eq!(settings.other.len(), 3);
    }

    #[test]
    fn what_was_changed_reads_back_as_the_same() {
        let mut settings = Settings::default();
        assert!(settings.changed().is_empty());
        for (name, value) in [
            ("cores", "2K"),
            ("sandbox", "relaxed"),
            ("build-users-group", ""),
            ("extra-substituters", "a b"),
            ("system-features", "x y"),
            ("keep-going", "true"),
            ("sandbox-paths", "/a /b=/c?"),
            ("warn-dirty", "false"),
            ("no-such-setting", "1"),
        ] {
            settings.set(name, value).unwrap();
        }
        let changed = settings.changed();
        assert_eq!((changed["cores"].as_str(), changed["sandbox-paths"].as_str()), ("2048", "/a=/a /b=/c?"));
        let mut back = Settings::default();
        changed.iter().for_each(|(name, value)| assert_eq!(back.set(name, value), Ok(true)));
        settings.other.remove("no-such-setting");
        assert_eq!(back, settings);
    }

    #[test]
    fn values_that_do_not_fit() {
        let mut settings = Settings::default();
        for (name, value) in [
            ("cores", "many"),
            ("cores", "-1"),
            ("cores", "+1"),
            ("cores", ""),
            ("cores", "K"),
            ("cores", "1é"),
            ("max-free", "18446744073709551615T"),
            ("min-free", ""),
            ("sandbox", "maybe"),
            ("fallback", "True"),
        ] {
            assert!(matches!(settings.set(name, value), Err(Error::Value { .. })), "{name} = {value}");
        }
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn the_default_key_is_one() {
        assert_eq!(Settings::default().public_keys().unwrap()[0].name(), "cache.nixos.org-1");
    }
}
