//! Why a command failed, as its user is told.

use std::path::PathBuf;

use remote::ClientError;

/// A command could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Config(#[from] ::daemon::ConfigError),
    #[error(transparent)]
    Feature(#[from] nix_compat::conf::FeatureDisabled),
    #[error(transparent)]
    Listen(#[from] ::daemon::ListenError),
    #[error("trusted-public-keys: {0}")]
    Keys(#[from] nix_compat::signature::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Mount(#[from] mount::MountError),
    #[error(transparent)]
    Url(#[from] rpc_client::UrlError),
    #[error("cannot reach the store at {url}: {source}")]
    Unreachable { url: String, source: rpc_client::ClientError },
    #[error(
        "the daemon of this store serves {}; stop the daemon, which unmounts it, or name another directory",
        .0.display()
    )]
    Served(PathBuf),
    #[error(transparent)]
    Keeper(#[from] keeper::KeeperError),
    #[error(transparent)]
    Replace(#[from] keeper::replace::ReplaceError),
    #[error(transparent)]
    Rpc(#[from] rpc::ServeError),
    #[error(transparent)]
    Http(#[from] http_cache::ListenError),
    #[error(transparent)]
    Upload(#[from] upload::Error),
    #[error(transparent)]
    Tokens(#[from] http_cache::TokenError),
    #[error(
        "{0}. When it is a daemon that runs there, it serves the store over HTTP itself: `castored daemon --http ADDR`, or \
         the setting http-listen"
    )]
    ServedByDaemon(store::Error),
    #[error(transparent)]
    Migrate(#[from] migrate::Error),
    #[error(
        "castored is taking the place of a stock store here and does not have everything yet: run \
         `castored adopt --in-place` or `castored adopt --finish` to its end first"
    )]
    MoveUnfinished,
    #[error(
        "{count} paths were left out{}", if *last {
            "; castored has not taken over. Repair them with stock Nix (`nix-store --repair-path`) and try again, or add \
             --without-damaged"
        } else {
            ""
        }
    )]
    LeftOut { count: usize, last: bool },
    #[error("{0} paths could not be read back from castored's store; castored has not taken over")]
    NotReadBack(usize),
    #[error("cannot {action} '{}': {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cannot {action}: {source}")]
    Process { action: &'static str, source: std::io::Error },
    #[error(
        "'{}' is the database of a stock Nix store; castored keeps its own and will not hide that one. \
         Take that store over with `castored adopt`, or choose another state directory (NIX_STATE_DIR or --root)", .0.display()
    )]
    StockDatabase(PathBuf),
    #[error(
        "the store directory '{}' is not empty; castored mounts its store there and will not hide what it holds", .0.display()
    )]
    StoreDirInUse(PathBuf),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("'{}' is for the daemon's own user, since it shows what everybody builds; try again as that user", .0.display())]
    NotYours(PathBuf),
    #[error("the daemon could not check its store: {0}")]
    Fsck(String),
    #[error(
        "memory-budget is {bytes} bytes; the daemon needs at least {least} ({})", indicatif::HumanBytes(*least)
    )]
    Budget { bytes: u64, least: u64 },
    #[error("the daemon could not fetch: {0}")]
    Prefetch(String),
    #[error("the daemon could not tell sizes: {0}")]
    Sizes(String),
    #[error("{0}")]
    Usage(String),
}

impl Failure {
    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
