//! From tonic's tasks to the castore's blocking calls.

use tonic::Status;

/// Runs `work` on a thread that may block.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T, Status>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Status> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => {
            tracing::error!(%error, "a grpc call did not finish");
            Err(Status::internal("the call failed inside the server; its log says more"))
        }
    }
}
