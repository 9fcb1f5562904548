//! [`NotifyError`]: the reasons why a notification is not delivered.

use std::time::Duration;

/// The maximum duration of an attempt.
pub(super) const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(15);

/// The reason why a notification could not be delivered. Never contains the secret part of an
/// address.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// The address or the certificate authority is invalid.
    #[error("{0}")]
    Settings(String),
    /// A network error.
    #[error("{what}: {source}")]
    Io {
        /// The attempted operation.
        what: &'static str,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The receiver refused.
    #[error("{what} was refused: {answer}")]
    Refused {
        /// The refused operation.
        what: &'static str,
        /// The first line of the answer.
        answer: String,
    },
    /// The receiver did not answer in time.
    #[error("no answer within {ATTEMPT_TIMEOUT:?}")]
    Timeout,
}
