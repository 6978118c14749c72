//! SetOptions: which of a client's settings are granted.
//!
//! The twelve fixed fields count for everybody. Of the named settings a trusted client may set any; an untrusted
//! one those that harm nobody (the rules of Nix 2.34).

use std::sync::Arc;

use nix_compat::conf::Settings;
use nix_compat::signature::PublicKey;
use nix_compat::worker::ClientOptions;
use nix_compat::worker::stderr::Verbosity;

use crate::events::Events;

/// Settings that are the daemon's own whoever asks.
const NOT_FROM_CLIENTS: [&str; 4] = ["ssh-auth-sock", "experimental-features", "plugin-files", "store"];
/// Settings that anybody may change for their own connection.
const HARMLESS: [&str; 4] = ["timeout", "connect-timeout", "max-silent-time", "build-poll-interval"];

/// The settings of a connection whose client sent `options`.
pub(crate) fn apply(daemon: &Settings, options: &ClientOptions, trusted: bool, events: &Events) -> Settings {
    events.set_verbosity(options.verbosity);
    let mut settings = daemon.clone();
    settings.keep_failed = options.keep_failed;
    settings.keep_going = options.keep_going;
    settings.fallback = options.try_fallback;
    settings.max_jobs = options.max_build_jobs.into();
    settings.max_silent_time = options.max_silent_time.into();
    settings.cores = options.build_cores.into();
    settings.substitute = options.use_substitutes;
    for (name, value) in &options.overrides {
        if NOT_FROM_CLIENTS.contains(&name.as_str()) {
            continue;
        }
        if trusted || HARMLESS.contains(&name.as_str()) || (name == "builders" && value.is_empty()) {
            if let Err(error) = settings.set(name, value) {
                events.log(Verbosity::Warn, format!("warning: {error}"));
            }
        } else if name == "substituters" || name == "binary-caches" {
            settings.substituters = granted_substituters(daemon, value, events);
        } else {
            events.log(
                Verbosity::Debug,
                format!(
                    "ignoring the client-specified setting '{name}', because it is a restricted setting and you are \
                     not a trusted user"
                ),
            );
        }
    }
    settings
}

/// The keys of a client's settings; `None`, and a warning, when one of them is none.
pub(crate) fn public_keys(settings: &Settings, events: &Events) -> Option<Arc<[PublicKey]>> {
    match settings.public_keys() {
        Ok(keys) => Some(keys.into()),
        Err(error) => {
            events.log(Verbosity::Warn, format!("warning: ignoring 'trusted-public-keys': {error}"));
            None
        }
    }
}

/// Those the daemon uses itself or trusts, with or without a slash at the end.
fn granted_substituters(daemon: &Settings, value: &str, events: &Events) -> Vec<String> {
    let known = |url: &str| {
        let bare = url.trim_end_matches('/');
        daemon.substituters.iter().chain(&daemon.trusted_substituters).any(|s| s.trim_end_matches('/') == bare)
    };
    let mut granted = Vec::new();
    for url in value.split_whitespace() {
        if known(url) {
            granted.push(url.to_owned());
        } else {
            events.log(
                Verbosity::Warn,
                format!(
                    "warning: ignoring untrusted substituter '{url}', you are not a trusted user.\nRun `man nix.conf` \
                     for more information on the `substituters` configuration option."
                ),
            );
        }
    }
    granted
}
