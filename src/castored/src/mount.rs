//! `castored mount`: another store, seen through gRPC, as a directory of this machine.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ::daemon::Locations;
use ::mount::{Mount, Options, require_empty};
use clap::Args;
use rpc_client::RemoteView;

use crate::daemon::{self, Termination, start_logging};
use crate::failure::Failure;
use crate::peer;

/// Threads that answer the kernel: each waits for the other store, so more than there are processors.
const THREADS: usize = 16;
/// How often it is looked whether somebody else has unmounted the directory.
const INTERVAL: Duration = Duration::from_millis(200);

/// Mount another castored's or tvix's store on a directory, read-only. What is read is fetched then and checked against its
/// digest. Runs until it is stopped or the directory is unmounted.
#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// The other store: grpc+http://HOST:PORT, grpc+https://HOST:PORT or grpc+unix:///SOCKET.
    #[arg(long, value_name = "URL")]
    grpc: String,
    /// Where to mount it. The directory is made if it is missing.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(crate) fn run(locations: &Locations, args: &MountArgs) -> Result<ExitCode, Failure> {
    start_logging();
    require_empty(&args.directory)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|source| Failure::Process { action: "start the runtime", source })?;
    let (termination, channel) = {
        let _inside = runtime.enter();
        (Termination::catch(false)?, peer::open(&args.grpc, || daemon::settings(locations, &[]))?)
    };
    let view = RemoteView::new(channel, runtime.handle().clone(), locations.store_dir.clone());
    let view = view.map_err(|source| Failure::Process { action: "start a thread", source })?;
    view.probe().map_err(|source| Failure::Unreachable { url: args.grpc.clone(), source })?;
    let mount = Mount::new(view, &args.directory, Options { threads: THREADS, ..Options::default() })?;
    tracing::info!(store = args.grpc, directory = %mount.mountpoint().display(), "mounted");
    let unmounted = async {
        while !mount.has_ended() {
            tokio::time::sleep(INTERVAL).await;
        }
    };
    runtime.block_on(async {
        tokio::select! {
            _ = termination.wait() => {}
            () = unmounted => tracing::info!("somebody has unmounted the directory"),
        }
    });
    mount.unmount()?;
    // Threads that still serve open files wait in calls; they end with the process.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}
