//! `castored serve`: the store as a binary cache over HTTP, where no daemon runs.

use std::net::SocketAddr;
use std::process::ExitCode;

use ::daemon::Locations;
use clap::Args;
use http_cache::{Limits, Server};

use crate::budget::Budget;
use crate::daemon::{self, Termination, start_logging};
use crate::failure::Failure;
use crate::state;

/// Serve the store as a binary cache over HTTP, with pages for browsers; read-only unless http-push-token-file is set. For a store that no daemon runs on: a
/// daemon does the same with --http.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Address and port; one of [::] or 0.0.0.0 lets other machines in.
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
}

pub(crate) fn run(locations: &Locations, args: &ServeArgs) -> Result<ExitCode, Failure> {
    start_logging();
    let settings = daemon::settings(locations, &[])?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|source| Failure::Process { action: "start the runtime", source })?;
    let (termination, server) = {
        let _inside = runtime.enter();
        (Termination::catch(false)?, Server::bind(args.listen)?)
    };
    state::prepare(locations)?;
    let budget = Budget::new(::daemon::memory_budget(&settings)?)?;
    let store =
        daemon::open_store(locations, ::daemon::durability(&settings)?, &budget).map_err(|failure| match failure {
            Failure::Store(error @ store::Error::InUse { .. }) => Failure::ServedByDaemon(error),
            other => other,
        })?;
    let served = daemon::served_over_http(&store, &settings, locations)?;
    let address = server.address().unwrap_or(args.listen);
    tracing::info!(store = locations.store_dir.as_str(), "serving on http://{address}");
    runtime.block_on(server.serve(served, Limits::default(), async {
        termination.wait().await;
    }));
    drop(runtime);
    store.sync()?;
    Ok(ExitCode::SUCCESS)
}
