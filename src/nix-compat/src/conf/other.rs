//! Settings of stock Nix that nothing here acts on: they belong to the client's side, or to things done another way.
//! Known only so that nobody is warned about them.

/// Their names in Nix 2.34, without those in [`Settings`](super::Settings); sorted.
const NAMES: &[&str] = &[
    "abort-on-warn",
    "accept-flake-config",
    "access-tokens",
    "allow-dirty",
    "allow-dirty-locks",
    "allow-import-from-derivation",
    "allow-symlinked-store",
    "allow-unsafe-native-code-during-evaluation",
    "allowed-uris",
    "auto-optimise-store",
    "bash-prompt",
    "bash-prompt-prefix",
    "bash-prompt-suffix",
    "build-hook",
    "commit-lock-file-summary",
    "commit-lockfile-summary",
    "debugger-on-trace",
    "debugger-on-warn",
    "download-buffer-size",
    "env-keep-derivations",
    "eval-attrset-update-layer-rhs-threshold",
    "eval-cache",
    "eval-profile-file",
    "eval-profiler",
    "eval-profiler-frequency",
    "eval-system",
    "external-builders",
    "flake-registry",
    "fsync-metadata",
    "fsync-store-paths",
    "gc-reserved-space",
    "ignore-try",
    "ignored-acls",
    "json-log-path",
    "keep-env-derivations",
    "lint-absolute-path-literals",
    "lint-short-path-literals",
    "lint-url-literals",
    "max-call-depth",
    "nar-buffer-size",
    "nix-path",
    "nix-shell-always-looks-for-shell-nix",
    "nix-shell-shebang-arguments-relative-to-script",
    "plugin-files",
    "preallocate-contents",
    "pure-eval",
    "restrict-eval",
    "show-trace",
    "store",
    "sync-before-registering",
    "tarball-ttl",
    "trace-function-calls",
    "trace-import-from-derivation",
    "trace-verbose",
    "trust-tarballs-from-git-forges",
    "upgrade-nix-store-path-url",
    "use-case-hack",
    "use-registries",
    "use-sqlite-wal",
    "use-xdg-base-directories",
    "user-agent-suffix",
    "warn-dirty",
    "warn-large-path-threshold",
    "warn-short-path-literals",
];

/// Whether stock Nix has a setting of this name, be it with `extra-` before it.
pub(super) fn is_known(name: &str) -> bool {
    let known = |name: &str| NAMES.binary_search(&name).is_ok();
    known(name) || name.strip_prefix("extra-").is_some_and(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted() {
        assert!(NAMES.is_sorted());
        assert!(is_known("warn-dirty") && is_known("extra-access-tokens") && !is_known("no-such-setting"));
    }
}
