//! [`Shutdown`]: the wish to stop, seen by every task and thread.
//!
//! The daemon asks each cluster once, for SIGTERM or for a changed configuration; a stage finishes
//! what it holds and ends. Nothing is cut off.

use std::{future::Future, time::Duration};

use tokio::sync::watch;

/// A handle on the wish to stop; clones see the same wish.
#[derive(Clone, Debug)]
pub struct Shutdown {
    requested: watch::Receiver<bool>,
}

/// The side that asks.
#[derive(Debug)]
pub struct ShutdownRequest {
    request: watch::Sender<bool>,
}

impl Shutdown {
    /// A wish not yet made, and the side that makes it.
    #[must_use]
    pub fn new() -> (ShutdownRequest, Self) {
        let (request, requested) = watch::channel(false);
        (ShutdownRequest { request }, Self { requested })
    }

    /// A wish that is never made.
    #[must_use]
    pub fn never() -> Self {
        Self::new().1
    }

    /// Returns true if it was asked.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.requested.borrow()
    }

    /// Returns when a stop is requested. Never returns if the requesting side is dropped without a
    /// request.
    pub async fn requested(&mut self) {
        if self.requested.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Sleeps; cut short by the wish, and then false.
    pub async fn sleep(&mut self, duration: Duration) -> bool {
        self.until(tokio::time::sleep(duration)).await.is_some()
    }

    /// Runs `work` to its end, or drops it when the wish comes first.
    pub async fn until<F: Future>(&mut self, work: F) -> Option<F::Output> {
        tokio::select! {
            biased;
            () = self.requested() => None,
            output = work => Some(output),
        }
    }
}

impl ShutdownRequest {
    /// Returns true if it asked.
    #[must_use]
    pub fn is_requested(&self) -> bool {
        *self.request.borrow()
    }

    /// Asks.
    pub fn request(&self) {
        self.request.send_replace(true);
    }
}
