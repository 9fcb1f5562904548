//! [`Failure`]: how a thread that can not go on tells the session that it must end.

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
    /// Raises an error; the first one counts, the others are logged.
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

    /// Returns when an error is raised.
    pub async fn raised(&self) -> Error {
        loop {
            // The permit of `notify_one` is kept, so an error raised between the two lines is not missed.
            if let Some(error) = self.take() {
                return error;
            }
            self.raised.notified().await;
        }
    }
}
