//! [`Line`]: the one thread that reads, writes, fsyncs and acknowledges a connection's WAL.
//!
//! The thread drives its own sockets, so no other thread has to be woken between the arrival of a
//! byte and its acknowledgement: a synchronous commit needs one thread wake-up, not three.
//! Invariant: no task depends on this thread making progress. [`crate::pipeline::voice`] answers
//! keepalives while a disk write blocks it.

use std::future::Future;

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::JoinSet,
};

use crate::error::{Error, Result};

/// The handle of the thread. Dropping it ends the thread and closes the sockets that were opened on
/// it.
#[derive(Debug)]
pub struct Line {
    handle: Handle,
    _end: oneshot::Sender<()>,
}

impl Line {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`Error::Io`] when the system has no more threads or file descriptors.
    pub fn start() -> Result<Self> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::io("start the runtime of", "stream"))?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("stream".to_owned())
            .spawn(move || {
                // Ends when the other side is dropped.
                drop(runtime.block_on(ended));
                runtime.shutdown_background();
            })
            .map_err(Error::no_thread("stream"))?;
        Ok(Self { handle, _end: end })
    }

    /// Runs `work` on the thread. Dropping the returned future drops `work` on the thread.
    ///
    /// # Errors
    /// [`Error::ThreadStopped`] when it panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T> {
        let mut jobs = JoinSet::new();
        jobs.spawn_on(work, &self.handle);
        let outcome = jobs.join_next().await.expect("BUG: a job was given");
        outcome.map_err(|error| Error::ThreadStopped {
            name: "stream",
            reason: error.to_string(),
        })
    }
}
