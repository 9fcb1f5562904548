//! Runs work that blocks, such as I/O on a disk or a store, outside of the tasks.

use tokio::task;

use crate::error::{Error, Result};

/// Runs blocking work on another thread than the caller's task.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(Error::ThreadStopped {
            name: "blocking",
            reason: error.to_string(),
        })
    })
}
