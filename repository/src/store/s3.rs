//! A bucket as an object store: AWS S3, or any store that speaks its protocol.
//!
//! The SDK is asynchronous and the trait is not, so every request runs on a small runtime that
//! belongs to the store. The store may therefore be called from any thread. The SDK's own retries
//! are off; [`Retrying`](super::retry::Retrying) retries instead.
//! Invariant: only `NoSuchKey` proves that an object is absent. A 403, any other 404 and a
//! truncated answer are errors.

use std::{
    future::Future,
    ops::{ControlFlow, Range},
    sync::{Mutex, mpsc},
    time::Duration,
};

use aws_sdk_s3::{
    error::{ProvideErrorMetadata, SdkError},
    operation::get_object::GetObjectOutput,
    primitives::ByteStream,
};
use bytes::{Bytes, BytesMut};
use tokio::runtime::{Builder, Runtime};

use self::{
    client::Signer,
    errors::{Action, Failure, HttpResponse},
    notation::{checksum, parse_content_range},
    probe::Conditional,
};
use super::{
    LockOutcome, LockSpan, ObjectMeta, ObjectStore, PutOutcome, RequestKind, RequestMeter,
    bounds::{object_bytes_max, too_long},
    is_sound_key,
    retry::{Patience, Retrying},
};
use crate::{Error, Result, config::S3Settings};

mod as_of;
mod client;
mod errors;
mod listing;
mod multipart;
mod notation;
mod probe;
mod proof;
mod retention;
#[cfg(test)]
mod tests;

pub use as_of::S3AsOf;

/// The maximum duration of one attempt: a part of 16 MiB at 56 kB/s.
const ATTEMPT_MAX: Duration = Duration::from_secs(300);
/// The maximum time without progress while a body is read, where progress means `PACE_BYTES`. A
/// body that trickles is treated like one that has stalled.
const STANDSTILL_MAX: Duration = Duration::from_secs(30);
const PACE_BYTES: usize = 64 << 10;
/// The number of reads of an object with a wrong checksum. The second read distinguishes a faulty
/// transfer from a damaged object.
const READS_MAX: u32 = 2;
/// The maximum memory reserved in advance for a body, whatever length the store announces.
const BODY_ROOM_MAX: u64 = 64 << 20;

/// The objects in a bucket that have a common prefix.
#[derive(Debug)]
pub struct S3Store {
    signer: Mutex<Signer>,
    settings: S3Settings,
    runtime: Option<Runtime>,
    bucket: String,
    prefix: String,
    checksums: bool,
    requests: RequestMeter,
    conditional: Mutex<Conditional>,
    /// The maximum time for each [`PACE_BYTES`] of a body.
    standstill_max: Duration,
    /// Locks that replace the missing condition in a store without conditional writes: within this
    /// process, one writer at a time per key.
    turns: [Mutex<()>; 16],
}

impl S3Store {
    /// Opens a store that retries transient failures. The first request is made only when it is
    /// needed.
    ///
    /// # Errors
    /// [`Error::Config`] when the settings cannot be used.
    pub fn open(
        bucket: &str,
        prefix: &str,
        settings: &S3Settings,
        requests: RequestMeter,
        patience: Patience,
    ) -> Result<Retrying<Self>> {
        let mut store = Self::without_retries(bucket, prefix, settings)?;
        store.requests = requests;
        Ok(Retrying::new(store, patience.into()))
    }

    /// Opens a store that makes every request once.
    ///
    /// # Errors
    /// As [`S3Store::open`].
    pub fn without_retries(bucket: &str, prefix: &str, settings: &S3Settings) -> Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("s3")
            .enable_all()
            .build()
            .map_err(|error| Error::config(format!("start threads for S3: {error}")))?;
        let signer = Mutex::new(Signer::new(&runtime, settings)?);
        Ok(Self {
            signer,
            settings: settings.clone(),
            runtime: Some(runtime),
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            checksums: settings.checksums,
            requests: RequestMeter::default(),
            conditional: Mutex::default(),
            standstill_max: STANDSTILL_MAX,
            turns: Default::default(),
        })
    }

    /// Runs a request to completion on the store's runtime.
    fn request<T, E>(
        &self,
        kind: RequestKind,
        request: impl Future<Output = std::result::Result<T, SdkError<E, HttpResponse>>>
        + Send
        + 'static,
    ) -> std::result::Result<T, Failure>
    where
        T: Send + 'static,
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        self.requests.count(kind);
        let request = Box::pin(request);
        let answer = self.drive(async move {
            match tokio::time::timeout(ATTEMPT_MAX, request).await {
                Ok(answer) => answer.map_err(|error| Failure::of(&error)),
                Err(_) => Err(Failure::transient("it took longer than any request may")),
            }
        });
        answer.map_err(|failure| self.with_new_credentials(failure))
    }

    fn drive<T: Send + 'static>(
        &self,
        work: impl Future<Output = std::result::Result<T, Failure>> + Send + 'static,
    ) -> std::result::Result<T, Failure> {
        let (reply, answer) = mpsc::sync_channel(1);
        let gone = || Failure::transient("the threads for S3 have ended");
        let runtime = self.runtime.as_ref().ok_or_else(gone)?;
        runtime.spawn(async move {
            // The receiver is gone if the caller's thread has ended.
            let _gone = reply.send(work.await);
        });
        answer.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Returns the key in the bucket. Keys come from our own types, but also from listings and
    /// tests. A key must not leave the prefix.
    fn full_key(&self, action: Action, key: &str) -> Result<String> {
        if !is_sound_key(key) {
            let failure = Failure::refused("not a key of this store");
            return Err(self.failed(action, key, failure));
        }
        Ok(self.place(key))
    }

    fn place(&self, key: &str) -> String {
        if self.prefix.is_empty() {
            key.to_owned()
        } else {
            format!("{}/{key}", self.prefix)
        }
    }

    fn failed(&self, action: Action, key: &str, failure: Failure) -> Error {
        if failure.is_absent() {
            return Error::NotFound {
                key: key.to_owned(),
                url: self.url(),
            };
        }
        failure.into_error(action, key, self.url())
    }

    fn damaged(&self, key: &str, problem: &str) -> Error {
        Error::Damaged {
            key: key.to_owned(),
            url: self.url(),
            problem: problem.to_owned(),
        }
    }

    /// Sends one `PutObject`.
    fn put_object(
        &self,
        full_key: &str,
        body: Bytes,
        condition: bool,
    ) -> std::result::Result<PutOutcome, Failure> {
        let sum = self.checksums.then(|| checksum(&body));
        let put = self
            .client()
            .put_object()
            .bucket(&self.bucket)
            .key(full_key)
            .content_type("application/octet-stream")
            .set_if_none_match(condition.then(|| "*".to_owned()))
            .set_checksum_crc32_c(sum.clone())
            .body(ByteStream::from(body));
        match self.request(RequestKind::Put, put.send()) {
            Ok(answer) => match (sum, answer.checksum_crc32_c()) {
                (Some(sent), Some(stored)) if sent != stored => Err(Failure::transient(
                    "the store took other bytes than were sent: their checksums differ",
                )),
                // Every stored object has an ETag. This is a proxy's page, or an error document
                // with a success status.
                _ if answer.e_tag().is_none() => Err(Failure::transient(
                    "the store's answer to a put names no ETag, so it is none; s3_endpoint may be a web page or a \
                     proxy: name the address of the store's S3 interface",
                )),
                _ => Ok(PutOutcome::Created),
            },
            Err(failure) if condition && failure.is_taken() => Ok(PutOutcome::AlreadyExists),
            Err(failure) => Err(failure),
        }
    }

    /// Puts an object in a store without conditional writes: checks that it is absent, writes,
    /// reads back. Two hosts that write the same name at once may both write it, but each reads
    /// back the final object, and every object of ours is determined by its content.
    fn put_unconditionally(&self, key: &str, full_key: &str, body: &Bytes) -> Result<PutOutcome> {
        let turn = key.bytes().fold(0usize, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(usize::from(byte))
        });
        let _turn = self.turns[turn % self.turns.len()]
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.head(key)?.is_some() {
            return Ok(PutOutcome::AlreadyExists);
        }
        if body.len() > multipart::PART_BYTES {
            self.put_parts(key, full_key, body, false)?;
        } else {
            self.put_object(full_key, body.clone(), false)
                .map_err(|failure| self.failed(Action::Put, key, failure))?;
        }
        if self.get(key)? == body {
            Ok(PutOutcome::Created)
        } else {
            Ok(PutOutcome::AlreadyExists)
        }
    }

    /// Sends one `GetObject`. Returns the body and the checksum that was stored with it.
    fn get_object(
        &self,
        full_key: &str,
        range: Option<&Range<u64>>,
        version: Option<&str>,
    ) -> std::result::Result<Body, Failure> {
        let get = self
            .client()
            .get_object()
            .bucket(&self.bucket)
            .key(full_key)
            .set_version_id(version.map(str::to_owned))
            .set_range(range.map(|range| format!("bytes={}-{}", range.start, range.end - 1)));
        self.requests.count(RequestKind::Get);
        // The checksum is compared here: the SDK's own comparison does not distinguish damage from
        // a lost connection.
        let wanted = self.checksums && range.is_none();
        let request = Box::pin(async move {
            if !wanted {
                return get.send().await;
            }
            let ask = |request: &mut aws_sdk_s3::config::http::HttpRequest| {
                request
                    .headers_mut()
                    .insert("x-amz-checksum-mode", "ENABLED");
            };
            get.customize().mutate_request(ask).send().await
        });
        let standstill_max = self.standstill_max;
        let bytes_max = match range {
            Some(range) => range.end.saturating_sub(range.start),
            None => object_bytes_max(full_key),
        };
        let body = self.drive(async move {
            let answer = match tokio::time::timeout(ATTEMPT_MAX, request).await {
                Ok(answer) => answer.map_err(|error| Failure::of(&error))?,
                Err(_) => return Err(Failure::transient("it did not answer")),
            };
            Box::pin(Body::collect(answer, standstill_max, bytes_max)).await
        });
        body.map_err(|failure| self.with_new_credentials(failure))
    }

    /// Reads a whole object, or one of its versions.
    fn read_whole(&self, key: &str, version: Option<&str>) -> Result<Bytes> {
        let full_key = self.full_key(Action::Get, key)?;
        for _ in 0..READS_MAX {
            let body = self
                .get_object(&full_key, None, version)
                .map_err(|failure| self.failed(Action::Get, key, failure))?;
            if let Some(problem) = &body.too_long {
                return Err(self.damaged(key, problem));
            }
            if body
                .checksum
                .is_none_or(|stored| stored == checksum(&body.bytes))
            {
                return Ok(body.bytes);
            }
            tracing::warn!(key, "an object was read with a wrong checksum");
        }
        Err(self.damaged(
            key,
            "its bytes do not have the checksum that was stored with them",
        ))
    }

    /// Reads a non-empty range.
    fn read_part(&self, key: &str, range: Range<u64>, version: Option<&str>) -> Result<Bytes> {
        let full_key = self.full_key(Action::Get, key)?;
        let outside = || {
            let failure = Failure::refused("the range is not inside");
            self.failed(Action::Get, key, failure)
        };
        let body = self
            .get_object(&full_key, Some(&range), version)
            .map_err(|failure| self.failed(Action::Get, key, failure))?;
        let answered = body.content_range.as_deref().and_then(parse_content_range);
        match answered {
            // At the end of the object S3 returns the bytes that exist.
            Some(answered) if answered.start == range.start && answered.end < range.end => {
                Err(outside())
            }
            Some(answered)
                if answered == range && body.bytes.len() as u64 == range.end - range.start =>
            {
                Ok(body.bytes)
            }
            _ => {
                let failure = Failure::refused("the store answered with another range");
                Err(self.failed(Action::Get, key, failure))
            }
        }
    }
}

/// The result of a `GetObject`.
struct Body {
    bytes: Bytes,
    /// The message for a body that exceeds its maximum length; `bytes` is then empty.
    too_long: Option<String>,
    content_range: Option<String>,
    checksum: Option<String>,
}

impl Body {
    async fn collect(
        answer: GetObjectOutput,
        standstill_max: Duration,
        bytes_max: u64,
    ) -> std::result::Result<Self, Failure> {
        let announced = answer
            .content_length()
            .and_then(|length| u64::try_from(length).ok());
        let content_range = answer.content_range().map(str::to_owned);
        // A checksum of the parts' checksums ends with their number. It cannot be compared here.
        let checksum = answer
            .checksum_crc32_c()
            .filter(|sum| !sum.contains('-'))
            .map(str::to_owned);
        let too_long = |found: u64| Self {
            bytes: Bytes::new(),
            too_long: Some(too_long(found, bytes_max)),
            content_range: None,
            checksum: None,
        };
        if let Some(announced) = announced.filter(|announced| *announced > bytes_max) {
            return Ok(too_long(announced));
        }
        let room = announced.unwrap_or(0).min(BODY_ROOM_MAX);
        let mut bytes = BytesMut::with_capacity(usize::try_from(room).unwrap_or(0));
        let mut body = answer.body;
        let mut paced = (tokio::time::Instant::now() + standstill_max, PACE_BYTES);
        loop {
            match tokio::time::timeout_at(paced.0, body.try_next()).await {
                Ok(Ok(Some(chunk))) => {
                    bytes.extend_from_slice(&chunk);
                    if bytes.len() as u64 > bytes_max {
                        return Ok(too_long(bytes.len() as u64));
                    }
                    if bytes.len() >= paced.1 {
                        let until = tokio::time::Instant::now() + standstill_max;
                        paced = (until, bytes.len() + PACE_BYTES);
                    }
                }
                Ok(Ok(None)) => break,
                Ok(Err(error)) => {
                    let problem = format!("its body broke off: {}", errors::chain(&error));
                    return Err(Failure::transient(&problem));
                }
                Err(_) => return Err(Failure::transient("its body stood still, or all but")),
            }
        }
        if announced.is_some_and(|announced| announced != bytes.len() as u64) {
            return Err(Failure::transient("its body is not as long as announced"));
        }
        Ok(Self {
            bytes: bytes.freeze(),
            too_long: None,
            content_range,
            checksum,
        })
    }
}

impl ObjectStore for S3Store {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let full_key = self.full_key(Action::Put, key)?;
        let body = Bytes::copy_from_slice(body);
        if !self.honours_conditions()? {
            return self.put_unconditionally(key, &full_key, &body);
        }
        if body.len() > multipart::PART_BYTES {
            if !self.honours_conditions_on_parts()? {
                return self.put_unconditionally(key, &full_key, &body);
            }
            // Avoids uploading a large object in vain.
            if self.head(key)?.is_some() {
                return Ok(PutOutcome::AlreadyExists);
            }
            return self.put_parts(key, &full_key, &body, true);
        }
        match self.put_object(&full_key, body, true) {
            // Where overwriting is forbidden, a refusal may only mean that the name is taken.
            Err(failure) if failure.is_denied() && matches!(self.head(key), Ok(Some(_))) => {
                Ok(PutOutcome::AlreadyExists)
            }
            outcome => outcome.map_err(|failure| self.failed(Action::Put, key, failure)),
        }
    }

    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let outcome = self.put_if_absent(key, body)?;
        if outcome == PutOutcome::Created {
            self.prove(key, body)?;
        }
        Ok(outcome)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.read_whole(key, None)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() {
            // S3 has no error for this case.
            return match self.head(key)? {
                Some(object) if range.start == range.end && range.end <= object.size => {
                    Ok(Bytes::new())
                }
                Some(_) => {
                    let failure = Failure::refused("the range is not inside");
                    Err(self.failed(Action::Get, key, failure))
                }
                None => Err(Error::NotFound {
                    key: key.to_owned(),
                    url: self.url(),
                }),
            };
        }
        self.read_part(key, range, None)
    }

    /// Sends a `HeadObject`. An answer without a body cannot say *what* is missing; absence is
    /// proved by the error document of a `GetObject`.
    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        let full_key = self.full_key(Action::Head, key)?;
        let head = self
            .client()
            .head_object()
            .bucket(&self.bucket)
            .key(&full_key);
        match self.request(RequestKind::Head, head.send()) {
            Ok(answer) => {
                let size = answer
                    .content_length()
                    .and_then(|size| u64::try_from(size).ok());
                match size {
                    Some(size) => Ok(Some(ObjectMeta {
                        key: key.to_owned(),
                        size,
                    })),
                    None => {
                        let failure = Failure::refused("the store does not say its length");
                        Err(self.failed(Action::Head, key, failure))
                    }
                }
            }
            Err(failure) if failure.status() == Some(404) => {
                match self.get_object(&full_key, None, None) {
                    Ok(body) => Ok(Some(ObjectMeta {
                        key: key.to_owned(),
                        size: body.bytes.len() as u64,
                    })),
                    Err(failure) if failure.is_absent() => Ok(None),
                    Err(failure) => Err(self.failed(Action::Head, key, failure)),
                }
            }
            Err(failure) => Err(self.failed(Action::Head, key, failure)),
        }
    }

    /// Reads the whole listing before the first visit.
    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        for object in self.objects(prefix)? {
            if visit(object).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        self.common_prefixes(prefix)
    }

    fn delete(&self, key: &str) -> Result<()> {
        let full_key = self.full_key(Action::Delete, key)?;
        let delete = self
            .client()
            .delete_object()
            .bucket(&self.bucket)
            .key(full_key);
        match self.request(RequestKind::Delete, delete.send()) {
            Ok(_) => Ok(()),
            Err(failure) if failure.is_absent() => Ok(()),
            Err(failure) if failure.is_denied() => Err(Error::Locked {
                key: key.to_owned(),
                url: self.url(),
                problem: failure
                    .into_error(Action::Delete, key, self.url())
                    .to_string(),
            }),
            Err(failure) => Err(self.failed(Action::Delete, key, failure)),
        }
    }

    fn lock(&self, key: &str, span: LockSpan) -> Result<LockOutcome> {
        self.extend_lock(key, span)
    }

    fn ready_to_write(&self) -> Result<()> {
        self.honours_conditions().map(drop)
    }

    fn url(&self) -> String {
        if self.prefix.is_empty() {
            format!("s3://{}", self.bucket)
        } else {
            format!("s3://{}/{}", self.bucket, self.prefix)
        }
    }

    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        Ok(self.get(key)? == body)
    }

    fn get_sound(&self, key: &str, _sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        self.get(key)
    }

    crate::unpinned_store_methods!();
}

impl Drop for S3Store {
    fn drop(&mut self) {
        // A runtime must not be dropped, which waits for its threads, inside another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
