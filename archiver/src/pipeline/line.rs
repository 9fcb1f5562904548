//! [`Line`]: the one thread on which a connection's WAL is read, written, fsynced and acknowledged.
//!
//! The thread drives its own sockets, so that between a byte's arrival and its acknowledgement no other thread has to be
//! woken: a commit waits for us once, not three times. Invariant: whoever waits for this thread can do without it: its
//! connection is kept alive by [`super::voice`] while a disk holds it up.

use std::future::Future;

use tokio::{
    runtime::{Builder, Handle},
    sync::oneshot,
    task::JoinSet,
};

use crate::error::{Error, Result};

/// The thread, as its user sees it. Dropped, it ends, and the sockets that were opened on it with it.
#[derive(Debug)]
pub struct Line {
    handle: Handle,
    _end: oneshot::Sender<()>,
}

impl Line {
    /// Starts it.
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

    /// Runs `work` on the thread. Dropped, it is dropped there.
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
