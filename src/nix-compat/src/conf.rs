//! `nix.conf`: its grammar, and its settings with stock Nix's names and defaults.
//!
//! [`parse`] turns a file's text into names and values, in order; [`Settings::set`] takes one of these at a time, so
//! that the same rules hold for files, `NIX_CONFIG`, command lines and what clients send.
//!
//! ```
//! use nix_compat::conf::{Settings, parse};
//!
//! let mut settings = Settings::new(8);
//! let text = "max-jobs = auto # all of them\nextra-trusted-users = @wheel\n";
//! for (name, value) in parse(text, "nix.conf", &mut |_, _| Ok(None))? {
//!     settings.set(&name, &value)?;
//! }
//! assert_eq!(settings.max_jobs, 8);
//! assert_eq!(settings.trusted_users, ["root", "@wheel"]);
//! # Ok::<(), nix_compat::conf::Error>(())
//! ```

mod file;
mod other;
mod settings;
mod value;

pub use file::{MAX_INCLUDE_DEPTH, MAX_INCLUSIONS, parse};
pub use settings::Settings;
pub use value::{Sandbox, SandboxPath, bytes};

/// Something was asked for that needs an experimental feature (stock's words).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("experimental Nix feature '{0}' is disabled; add '--extra-experimental-features {0}' to enable it")]
pub struct FeatureDisabled(pub &'static str);

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A line that is neither `name = value` nor an inclusion.
    #[error("illegal configuration line '{line}' in '{origin}'")]
    Line {
        /// the line, without its comment
        line: String,
        /// the file it is in
        origin: String,
    },
    /// A file that must be included cannot be read.
    #[error("cannot include '{path}' in '{origin}': {reason}")]
    Include {
        /// the file to include
        path: String,
        /// the file it is included in
        origin: String,
        /// why not
        reason: String,
    },
    /// Files include each other more than [`MAX_INCLUDE_DEPTH`] deep.
    #[error("'{0}' is included more than {MAX_INCLUDE_DEPTH} files deep")]
    IncludeDepth(String),
    /// Files are included more than [`MAX_INCLUSIONS`] times.
    #[error("'{0}' includes files although {MAX_INCLUSIONS} were included before")]
    Inclusions(String),
    /// A value that does not fit its setting.
    #[error("setting '{name}' has value '{value}', which is not {expected}")]
    Value {
        /// the setting
        name: String,
        /// its value
        value: String,
        /// what it should be
        expected: &'static str,
    },
}
