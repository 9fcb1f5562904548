//! Uploads large objects in parts. The object appears when its upload is completed, and only if no
//! object has its name by then.
//!
//! A failed part is sent again on its own. An upload that cannot be completed is aborted. Uploads
//! left by a crash are aborted by a later start.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use aws_sdk_s3::{
    primitives::ByteStream,
    types::{ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart},
};
use bytes::Bytes;

use super::{
    S3Store, checksum,
    errors::{Action, Failure},
};
use crate::{
    ObjectStore, PutOutcome, Result,
    store::{RequestKind, retry::RetryPolicy},
};

/// The size of a part, and of the largest object that is put in one request. S3 requires at least 5
/// MiB and at most 10,000 parts, so this suffices for objects of 156 GiB.
pub(super) const PART_BYTES: usize = 16 << 20;
/// The number of parts that are uploaded concurrently.
const PARTS_IN_FLIGHT: usize = 4;

impl S3Store {
    /// Uploads `body` in parts and checks the result.
    pub(super) fn put_parts(
        &self,
        key: &str,
        full_key: &str,
        body: &Bytes,
        condition: bool,
    ) -> Result<PutOutcome> {
        let outcome = self
            .upload_parts(full_key, body, condition)
            .map_err(|failure| self.failed(Action::Put, key, failure))?;
        if outcome == PutOutcome::Created {
            // Some stores report completion before they know the result.
            let stored = self.head(key)?.map(|object| object.size);
            if stored != Some(body.len() as u64) {
                let failure = Failure::transient(
                    "the upload was completed, but the object is not there in its whole length",
                );
                return Err(self.failed(Action::Put, key, failure));
            }
        }
        Ok(outcome)
    }

    pub(super) fn upload_parts(
        &self,
        full_key: &str,
        body: &Bytes,
        condition: bool,
    ) -> std::result::Result<PutOutcome, Failure> {
        let create = self
            .client()
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(full_key)
            .content_type("application/octet-stream")
            .set_checksum_algorithm(self.checksums.then_some(ChecksumAlgorithm::Crc32C))
            .set_checksum_type(self.checksums.then_some(ChecksumType::FullObject));
        let upload = self.request(RequestKind::Put, create.send())?;
        let Some(id) = upload.upload_id() else {
            return Err(Failure::refused("the store gave the upload no number"));
        };
        let outcome = self
            .send_parts(full_key, id, body)
            .and_then(|parts| self.complete(full_key, id, parts, body, condition));
        if !matches!(outcome, Ok(PutOutcome::Created)) {
            self.abort(full_key, id);
        }
        outcome
    }

    fn send_parts(
        &self,
        full_key: &str,
        id: &str,
        body: &Bytes,
    ) -> std::result::Result<Vec<CompletedPart>, Failure> {
        let count = body.len().div_ceil(PART_BYTES).max(1);
        let next = AtomicUsize::new(0);
        let worker = || {
            let mut sent = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                if at >= count {
                    return Ok(sent);
                }
                let end = body.len().min((at + 1) * PART_BYTES);
                let part = self.send_part(full_key, id, at, &body.slice(at * PART_BYTES..end));
                if part.is_err() {
                    next.store(count, Ordering::Relaxed);
                }
                sent.push(part?);
            }
        };
        let mut parts = thread::scope(|scope| {
            let workers: Vec<_> = (0..count.min(PARTS_IN_FLIGHT))
                .map(|_| scope.spawn(worker))
                .collect();
            let mut parts = Vec::with_capacity(count);
            for worker in workers {
                let sent: std::result::Result<Vec<_>, Failure> = worker
                    .join()
                    .unwrap_or_else(|_| Err(Failure::refused("a thread panicked")));
                parts.extend(sent?);
            }
            Ok::<_, Failure>(parts)
        })?;
        parts.sort_by_key(CompletedPart::part_number);
        Ok(parts)
    }

    fn send_part(
        &self,
        full_key: &str,
        id: &str,
        at: usize,
        bytes: &Bytes,
    ) -> std::result::Result<CompletedPart, Failure> {
        let number = i32::try_from(at + 1)
            .map_err(|_| Failure::refused("the object has more parts than S3 can count"))?;
        let sum = self.checksums.then(|| checksum(bytes));
        let mut last = None;
        let sent = RetryPolicy::default().run(|| {
            let part = self
                .client()
                .upload_part()
                .bucket(&self.bucket)
                .key(full_key)
                .upload_id(id)
                .part_number(number)
                .set_checksum_crc32_c(sum.clone())
                .body(ByteStream::from(bytes.clone()));
            self.request(RequestKind::Put, part.send())
                .map_err(|failure| {
                    last = Some(failure.clone());
                    self.failed(Action::Put, full_key, failure)
                })
        });
        match (sent, last) {
            (Ok(answer), _) => Ok(CompletedPart::builder()
                .part_number(number)
                .set_e_tag(answer.e_tag().map(str::to_owned))
                .set_checksum_crc32_c(sum)
                .build()),
            (Err(_), Some(failure)) => Err(failure),
            (Err(error), None) => Err(Failure::refused(&error.to_string())),
        }
    }

    fn complete(
        &self,
        full_key: &str,
        id: &str,
        parts: Vec<CompletedPart>,
        body: &Bytes,
        condition: bool,
    ) -> std::result::Result<PutOutcome, Failure> {
        let parts = CompletedMultipartUpload::builder()
            .set_parts(Some(parts))
            .build();
        let complete = self
            .client()
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(full_key)
            .upload_id(id)
            .set_if_none_match(condition.then(|| "*".to_owned()))
            .set_checksum_crc32_c(self.checksums.then(|| checksum(body)))
            .set_checksum_type(self.checksums.then_some(ChecksumType::FullObject))
            .multipart_upload(parts);
        match self.request(RequestKind::Put, complete.send()) {
            Ok(_) => Ok(PutOutcome::Created),
            Err(failure) if condition && failure.is_taken() => Ok(PutOutcome::AlreadyExists),
            Err(failure) => Err(failure),
        }
    }

    /// Aborts an upload if possible. Otherwise a later start aborts it.
    pub(super) fn abort(&self, full_key: &str, id: &str) {
        let abort = self
            .client()
            .abort_multipart_upload()
            .bucket(&self.bucket)
            .key(full_key)
            .upload_id(id);
        match self.request(RequestKind::Delete, abort.send()) {
            Err(failure) if !failure.is_no_upload() => {
                let error = self.failed(Action::Abort, full_key, failure);
                tracing::debug!(%error, "an upload is left to a later start");
            }
            _ => {}
        }
    }
}
