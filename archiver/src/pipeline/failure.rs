//! [`Failure`]: carries the error of a thread that cannot continue to the session, which then ends.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::error::Error;

/// The first error that a thread raised.
#[derive(Debug, Default)]
pub struct Failure {
    state: Mutex<State>,
    raised: Notify,
}

#[derive(Debug, Default)]
struct State {
    error: Option<Error>,
    /// True if an error was ever raised, also when it was taken since.
    was_raised: bool,
}

impl Failure {
    /// Raises an error. Only the first one is stored; later ones are logged. `ThreadStopped` is the
    /// consequence of an earlier error and never replaces it.
    pub fn raise(&self, error: Error) {
        let mut state = self.state();
        let is_consequence = state.was_raised && matches!(error, Error::ThreadStopped { .. });
        if is_consequence {
            tracing::debug!(%error, "a consequence of the failure before");
            return;
        }
        if state.error.is_some() {
            tracing::error!(%error, "a further failure");
            return;
        }
        *state = State {
            error: Some(error),
            was_raised: true,
        };
        drop(state);
        self.raised.notify_one();
    }

    /// Takes the error, if one was raised.
    pub fn take(&self) -> Option<Error> {
        self.state().error.take()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consequence_never_stands_for_its_cause() {
        let stopped = || Error::ThreadStopped {
            name: "flush",
            reason: "see the error before".to_owned(),
        };
        let failure = Failure::default();
        failure.raise(stopped());
        assert!(failure.take().is_some(), "nothing else was raised");
        let failure = Failure::default();
        failure.raise(Error::SpoolFull);
        assert!(matches!(failure.take(), Some(Error::SpoolFull)));
        // The session took the cause before the other thread saw that this one had stopped.
        failure.raise(stopped());
        assert!(failure.take().is_none());
    }
}
