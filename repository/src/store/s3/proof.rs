//! Verifies that a put object is stored, without reading it again, by the checksum that the store
//! keeps.
//!
//! Some stores answer 200 before they know the result, or for objects that they have lost since.
//! Invariant: if the object differs, this very call put it, so it may be deleted and put again.

use aws_sdk_s3::types::ChecksumMode;

use super::{
    S3Store, checksum,
    errors::{Action, Failure},
};
use crate::{Error, ObjectStore, Result, store::RequestKind};

impl S3Store {
    /// Verifies that the object that was just created exists and equals `body`. An object that
    /// differs is removed.
    pub(super) fn prove(&self, key: &str, body: &[u8]) -> Result<()> {
        let problem = match self.is_stored(key, body) {
            Ok(true) => return Ok(()),
            Ok(false) | Err(Error::Damaged { .. }) => {
                self.withdraw(key)?;
                "the store has other bytes than it was sent"
            }
            Err(error) if error.is_not_found() => "the store said that it took it, and has it not",
            Err(error) => return Err(error),
        };
        Err(self.failed(Action::Put, key, Failure::transient(problem)))
    }

    /// If two writers can use the same name, the object may be another host's, so it stays.
    fn withdraw(&self, key: &str) -> Result<()> {
        if !self.honours_conditions()? {
            return Ok(());
        }
        self.delete(key).map_err(|error| {
            let problem =
                format!("the store has other bytes than it was sent, which stay: {error}");
            self.damaged(key, &problem)
        })
    }

    /// Compares length and checksum or, if the store keeps no checksum of the whole object, the
    /// bytes.
    fn is_stored(&self, key: &str, body: &[u8]) -> Result<bool> {
        if self.checksums {
            let full_key = self.full_key(Action::Head, key)?;
            let head = self
                .client()
                .head_object()
                .bucket(&self.bucket)
                .key(full_key)
                .checksum_mode(ChecksumMode::Enabled);
            match self.request(RequestKind::Head, head.send()) {
                Ok(answer) => {
                    let length = answer.content_length();
                    if length.and_then(|length| usize::try_from(length).ok()) != Some(body.len()) {
                        return Ok(false);
                    }
                    // A checksum of the parts' checksums ends with their number.
                    if let Some(sum) = answer.checksum_crc32_c().filter(|sum| !sum.contains('-')) {
                        return Ok(sum == checksum(body));
                    }
                }
                // The answer cannot say what is missing.
                Err(failure) if failure.status() == Some(404) => {}
                Err(failure) => return Err(self.failed(Action::Head, key, failure)),
            }
        }
        Ok(self.get(key)? == body)
    }
}
