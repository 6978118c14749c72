//! The command line of `castored`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use ::daemon::Locations;
use clap::{Args, Parser, Subcommand};

use crate::budget::Budget;
use crate::failure::Failure;
use crate::mount::MountArgs;
use crate::moving::{AdoptArgs, ExportArgs};
use crate::serve::ServeArgs;
use crate::umount::UmountArgs;
use crate::{daemon, du, fsck, import, kept, mount, moving, prefetch, serve, stats, status, umount};

/// A drop-in replacement for nix-daemon: a content-addressed, deduplicated, compressed Nix store.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    place: Place,
}

/// Which store a command is about.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// Keep everything (store, state, logs, configuration) below this directory instead of in the places the
    /// NIX_* variables name.
    #[arg(long, global = true, value_name = "DIR", env = "CASTORED_ROOT")]
    root: Option<PathBuf>,
}

impl Place {
    pub(crate) fn locations(&self) -> Result<Locations, Failure> {
        Ok(match &self.root {
            Some(root) => {
                let root = std::path::absolute(root).map_err(Failure::file("find", root))?;
                Locations::below(&root)?
            }
            None => Locations::from_env(|name| std::env::var_os(name))?,
        })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the store: the nix-daemon socket, the mount, and gRPC.
    Daemon(DaemonArgs),
    /// Add files or directories to the store and print their store paths.
    Import(ImportArgs),
    Adopt(AdoptArgs),
    ExportStore(ExportArgs),
    Serve(ServeArgs),
    Mount(MountArgs),
    Umount(UmountArgs),
    /// Show what a running daemon is doing.
    Status(FormatArgs),
    /// Check the store: every object, table and path. Exits with 0 when it is sound, 2 when all damage was repaired, 3 when
    /// damage is left.
    Fsck(FsckArgs),
    /// Show how much the store holds and what it takes on disk.
    Stats(StatsArgs),
    /// Show what store paths cost on disk, alone and with all they need: what only they use, and what they share with others.
    Du(DuArgs),
    /// Fetch what is still elsewhere of store paths from lazy sources, and of all they need. Exits with 3 when some of it could
    /// not be had.
    Prefetch(PrefetchArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Address for gRPC (loopback only), or "none".
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000")]
    grpc_listen: String,
    /// Address at which the store is served as a binary cache, or "none"; instead of the setting http-listen.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Take what those push over HTTP who know a token that is a line of this file: the setting http-push-token-file.
    #[arg(long, value_name = "FILE")]
    http_push_token_file: Option<String>,
    /// Override a setting of nix.conf.
    #[arg(long, num_args = 2, value_names = ["NAME", "VALUE"], action = clap::ArgAction::Append)]
    option: Vec<String>,
    /// Share out so much memory, in bytes (K, M and G are understood): the setting memory-budget of castored.conf.
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<String>,
    /// Record every session in this directory: both directions, byte by byte, with all that is added and read. For
    /// reports of bugs.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// Have this castored take the place of the one that runs: it ends in order, this one goes on with the same arguments,
    /// and neither the mount nor those who connect meanwhile notice. (Under systemd without a keeper, `systemctl restart
    /// castored` does that.) Other arguments take effect when castored is stopped and started, so they are refused here.
    #[arg(long, conflicts_with_all = ["grpc_listen", "http", "http_push_token_file", "option", "memory_budget", "record"])]
    replace: bool,
    /// Serve from this very process. Otherwise it only keeps the mount and the sockets, for a process of its own that serves
    /// and is started again when it dies.
    #[arg(long, conflicts_with = "replace")]
    no_keeper: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// What to add.
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct FsckArgs {
    /// Fetch or build damaged paths again. What cannot be had is quarantined: it stays valid, and what of it is damaged
    /// cannot be read.
    #[arg(long)]
    repair: bool,
    /// Make the index anew from the packs. The daemon must not run.
    #[arg(long, conflicts_with_all = ["repair", "paths"])]
    rebuild_index: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Check these store paths only.
    #[arg(value_name = "PATH")]
    paths: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    format: FormatArgs,
    /// Draw where the bytes go, as SVG.
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DuArgs {
    #[command(flatten)]
    format: FormatArgs,
    /// The store paths, 32 at most.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct PrefetchArgs {
    /// The store paths, or links to them.
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct FormatArgs {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

impl Cli {
    pub(crate) fn run(self) -> Result<ExitCode, Failure> {
        let locations = self.place.locations()?;
        match self.command {
            Command::Daemon(DaemonArgs { replace: true, .. }) => {
                // What it would fail at is better said here.
                let settings = daemon::settings(&locations, &[])?;
                Budget::new(::daemon::memory_budget(&settings)?)?;
                kept::replace(&locations)
            }
            Command::Daemon(args) => {
                let grpc = listen("--grpc-listen", &args.grpc_listen)?;
                let http = args.http.map(|address| listen("--http", &address)).transpose()?;
                let (mut overrides, record, keeper) = (pairs(&args.option), args.record, !args.no_keeper);
                overrides.extend(args.memory_budget.map(|bytes| ("memory-budget".to_owned(), bytes)));
                overrides.extend(args.http_push_token_file.map(|file| ("http-push-token-file".to_owned(), file)));
                daemon::run(daemon::Options { locations, grpc, http, overrides, record, forced_trust: None, keeper })
            }
            Command::Import(args) => import::run(&locations, &args.paths),
            Command::Adopt(args) => moving::adopt(&locations, &args),
            Command::ExportStore(args) => moving::export(&locations, &args),
            Command::Serve(args) => serve::run(&locations, &args),
            Command::Mount(args) => mount::run(&locations, &args),
            Command::Umount(args) => umount::run(&locations, args),
            Command::Status(args) => status::run(&locations, args.json),
            Command::Fsck(FsckArgs { repair, rebuild_index, json, paths }) => {
                fsck::run(&locations, fsck::Options { repair, rebuild_index, json, paths })
            }
            Command::Stats(args) => stats::run(&locations, args.format.json, args.plot.as_deref()),
            Command::Du(args) => du::run(&locations, args.format.json, &args.paths),
            Command::Prefetch(args) => prefetch::run(&locations, &args.paths),
        }
    }
}

/// Where to listen, if at all.
fn listen(flag: &str, address: &str) -> Result<Option<SocketAddr>, Failure> {
    let wrong = || Failure::Usage(format!("{flag}: '{address}' is neither an address with a port nor 'none'"));
    ::daemon::parse_listen(address).ok_or_else(wrong)
}

/// Names and values of settings, which come one after the other.
fn pairs(options: &[String]) -> Vec<(String, String)> {
    options.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
}
