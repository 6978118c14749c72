//! Why a derivation was not built, in the words of Nix 2.34.

use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::worker::stderr::ErrorMessage;
use nix_compat::worker::{BuildResult, BuildStatus, DerivedPath};
use store::Store;

use crate::attributes::AttributeError;

/// A build that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Failure {
    pub(crate) status: BuildStatus,
    pub(crate) message: String,
    /// Whether it follows from the settings of the client that wanted it first; another's may allow it.
    pub(crate) by_settings: bool,
    /// Whether the watchers of the goal have it in their logs already.
    pub(crate) told: bool,
    /// What a check has made otherwise.
    pub(crate) differs: Option<Differing>,
}

/// An output that a check has made otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Differing {
    /// The valid path.
    pub(crate) valid: StorePath,
    /// The path under which it was built again: another one if it is addressed by its contents.
    pub(crate) made: StorePath,
}

/// Base of the exit statuses that tell build failures apart.
const BUILD_FAILURE_BASE: u64 = 0x60;
/// Added for any failed build.
const BUILD_FAILED: u64 = 0x04;
/// Added when a build took too long.
const TIMED_OUT: u64 = 0x01;
/// Added when a fixed output had another hash.
const HASH_MISMATCH: u64 = 0x02;
/// Added when a build gave another result than before.
const NOT_DETERMINISTIC: u64 = 0x08;

/// How a hash mismatch begins. It is the only output rejection with an exit status of its own, and results carry no
/// finer status than "output rejected".
const HASH_MISMATCH_TEXT: &str = "hash mismatch in fixed-output derivation";

impl Failure {
    pub(crate) fn new(status: BuildStatus, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), by_settings: false, told: false, differs: None }
    }

    /// The same, for a failure that another client's settings might avoid.
    pub(crate) fn by_settings(self) -> Self {
        Self { by_settings: true, ..self }
    }

    /// The same, for one that the goal's watchers know of.
    pub(crate) fn told(self) -> Self {
        Self { told: true, ..self }
    }

    /// The same, for an output that differs from this valid one.
    pub(crate) fn differs(self, valid: StorePath, made: StorePath) -> Self {
        Self { differs: Some(Differing { valid, made }), ..self }
    }

    /// The same with what can be done about a full disk, if the disk is full just now.
    pub(crate) fn with_advice(self, store: &Store) -> Self {
        Self { message: store.advise_if_full(self.message), ..self }
    }

    pub(crate) fn misc(message: impl ToString) -> Self {
        Self::new(BuildStatus::MiscFailure, message.to_string())
    }

    pub(crate) fn rejected(message: impl Into<String>) -> Self {
        Self::new(BuildStatus::InputRejected, message)
    }

    pub(crate) fn cancelled() -> Self {
        Self::misc("interrupted by the user")
    }

    /// The form common to everything that keeps a derivation from being built.
    pub(crate) fn cannot_build(status: BuildStatus, drv: &str, reason: &str) -> Self {
        Self::new(status, format!("Cannot build '{drv}'.\nReason: {reason}"))
    }

    /// The builder ran, and failed.
    pub(crate) fn builder(
        status: BuildStatus,
        drv: &str,
        reason: &str,
        outputs: &[String],
        last_lines: &[String],
    ) -> Self {
        let mut failure = Self::cannot_build(status, drv, reason);
        let text = &mut failure.message;
        if !outputs.is_empty() {
            text.push_str("\nOutput paths:");
        }
        for output in outputs {
            text.push_str("\n  ");
            text.push_str(output);
        }
        if !last_lines.is_empty() {
            text.push_str(&format!("\nLast {} log lines:", last_lines.len()));
            for line in last_lines {
                text.push_str("\n> ");
                text.push_str(line);
            }
            text.push_str(&format!("\nFor full logs, run:\n  nix log {drv}"));
        }
        failure
    }

    pub(crate) fn no_substituter(dir: &StoreDir, path: &StorePath) -> Self {
        Self::new(
            BuildStatus::NoSubstituters,
            format!("path '{}' is required, but there is no substituter that can build it", dir.display(path)),
        )
    }

    pub(crate) fn no_derivation(dir: &StoreDir, drv: &StorePath) -> Self {
        Self::misc(format!("failed to obtain derivation of '{}'", dir.display(drv)))
    }

    pub(crate) fn attributes(drv: &str, error: &AttributeError) -> Self {
        Self::rejected(format!("cannot obey the attributes of '{drv}': {error}"))
    }

    pub(crate) fn hash_mismatch(drv: &str, specified: &str, got: &str) -> Self {
        Self::new(
            BuildStatus::OutputRejected,
            format!("{HASH_MISMATCH_TEXT} '{drv}':\n  specified: {specified}\n     got:    {got}"),
        )
    }
}

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Self {
        Self::misc(error)
    }
}

/// The exit status that tells old clients what kind of failure a result is.
pub fn exit_status(result: &BuildResult) -> u64 {
    let kind = match result.status {
        BuildStatus::TimedOut => BUILD_FAILED | TIMED_OUT,
        BuildStatus::NotDeterministic => NOT_DETERMINISTIC,
        BuildStatus::OutputRejected if result.error.starts_with(HASH_MISMATCH_TEXT) => BUILD_FAILED | HASH_MISMATCH,
        BuildStatus::PermanentFailure
        | BuildStatus::TransientFailure
        | BuildStatus::InputRejected
        | BuildStatus::LogLimitExceeded
        | BuildStatus::DependencyFailed => BUILD_FAILED,
        _ => return nix_compat::worker::stderr::GENERAL_FAILURE,
    };
    BUILD_FAILURE_BASE | kind
}

/// What a request that must not fail (BuildPaths) answers: nothing when all went well, else the one error there is room
/// for. Of several failures the texts are given as well, to be logged before it.
pub fn request_error(
    store_dir: &StoreDir,
    results: &[(DerivedPath, BuildResult)],
) -> Option<(Vec<String>, ErrorMessage)> {
    let failed: Vec<_> = results.iter().filter(|(_, result)| !result.status.is_success()).collect();
    let (first, rest) = failed.split_first()?;
    let mut error = if rest.is_empty() {
        ErrorMessage::new(first.1.error.clone())
    } else {
        let names: Vec<String> =
            failed.iter().map(|(path, _)| format!("'{}'", store_dir.display(path.base()))).collect();
        ErrorMessage::new(format!("build of {} failed", names.join(", ")))
    };
    error.status = failed.iter().map(|(_, result)| exit_status(result)).fold(0, |all, status| {
        // Bits of build failures add up; a general failure among them says nothing more.
        if status >= BUILD_FAILURE_BASE { all | status } else { all.max(status) }
    });
    let reasons = failed.iter().map(|(_, result)| result.error.clone()).filter(|text| !text.is_empty());
    let texts = if rest.is_empty() { Vec::new() } else { reasons.collect() };
    Some((texts, error))
}

/// An error as it looks in a log: "error:" in front, further lines indented below it.
pub(crate) fn render(message: &str) -> String {
    format!("error: {}", message.replace('\n', "\n       "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_builder_as_stock_tells_it() {
        // Nix 2.34.8, its indentation removed.
        let expected = "Cannot build '/nix/store/ck9x0f58gazaimyxgv1037hv5ziciq98-fail.drv'.\n\
             Reason: builder failed with exit code 3.\nOutput paths:\n  \
             /nix/store/b2h6zcmffi63l3vzljnb7a2jp05ii0q6-fail\nLast 2 log lines:\n> line 1\n> line 2\n\
             For full logs, run:\n  nix log /nix/store/ck9x0f58gazaimyxgv1037hv5ziciq98-fail.drv";
        let failure = Failure::builder(
            BuildStatus::PermanentFailure,
            "/nix/store/ck9x0f58gazaimyxgv1037hv5ziciq98-fail.drv",
            "builder failed with exit code 3.",
            &["/nix/store/b2h6zcmffi63l3vzljnb7a2jp05ii0q6-fail".into()],
            &["line 1".into(), "line 2".into()],
        );
        assert_eq!(failure.message, expected);
    }

    #[test]
    fn exit_statuses() {
        let status = |status, text: &str| exit_status(&BuildResult::new(status, text));
        assert_eq!(status(BuildStatus::PermanentFailure, ""), 100);
        assert_eq!(status(BuildStatus::TimedOut, ""), 101);
        assert_eq!(status(BuildStatus::OutputRejected, "hash mismatch in fixed-output derivation 'x'"), 102);
        assert_eq!(status(BuildStatus::OutputRejected, "output 'x' is not allowed to refer to 'y'"), 1);
        assert_eq!(status(BuildStatus::NotDeterministic, ""), 104);
        assert_eq!(status(BuildStatus::MiscFailure, ""), 1);
    }
}
