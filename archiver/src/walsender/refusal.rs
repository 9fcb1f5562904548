//! [`Refusal`]: an error that is sent to the client.

use crate::error::Error;

/// An error that is sent to the client.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) code: &'static str,
    pub(super) words: String,
}

impl Refusal {
    pub(super) fn new(code: &'static str, words: String) -> Self {
        Self { code, words }
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::new("58030", error.to_string())
    }
}
