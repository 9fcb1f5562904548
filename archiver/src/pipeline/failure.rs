//! [`Failure`]: carries the error of a thread that cannot continue to the session, which then ends.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::error::Error;

/// The first error that a thread raised.
#[derive(Debug, Default)]
pub struct Failure {
    error: Mutex<Option<Error>>,
    raised: Notify,
}

impl Failure {
    /// Raises an error. Only the first one is stored; later ones are logged.
    pub fn raise(&self, error: Error) {
        let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_some() {
            tracing::error!(%error, "a further failure");
            return;
        }
        *first = Some(error);
        drop(first);
        self.raised.notify_one();
    }

    /// Takes the error, if one was raised.
    pub fn take(&self) -> Option<Error> {
        self.error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Waits until an error is raised and returns it.
    pub async fn raised(&self) -> Error {
        loop {
            // The permit of `notify_one` is kept, so an error raised between the two lines is not
            // missed.
            if let Some(error) = self.take() {
                return error;
            }
            self.raised.notified().await;
        }
    }
}
