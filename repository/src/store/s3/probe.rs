//! Finds out, before anything is written, whether the store keeps `If-None-Match: *`: some answer 200 and overwrite.
//!
//! The probe's object has one name for ever and stays, so that it costs one request at a start, works in buckets that forbid
//! deletes, and two programs that start at once agree.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::{
    S3Store,
    errors::{Action, Failure},
};
use crate::{PutOutcome, Result, store::RequestKind};

/// No key of ours can begin with a dot.
const PROBE: &str = ".tidemark-probe";
const PROBE_OF_PARTS: &str = ".tidemark-probe-parts";
/// An upload as old as this was left by a crash: no put takes a day.
const ABANDONED_AGE: Duration = Duration::from_secs(24 * 3600);

/// What is known of the store.
#[derive(Debug, Default)]
pub(super) struct Conditional {
    put: Option<bool>,
    parts: Option<bool>,
}

impl S3Store {
    /// Whether a `PutObject` can be conditional. Asked once.
    pub(super) fn honours_conditions(&self) -> Result<bool> {
        let mut known = self.known();
        if let Some(honoured) = known.put {
            return Ok(honoured);
        }
        let key = self.place(PROBE);
        let honoured = self.is_refused_twice(&key, || self.put_object(&key, Bytes::new(), true));
        let honoured = honoured.map_err(|failure| self.failed(Action::Put, PROBE, failure))?;
        if !honoured {
            self.warn();
        }
        self.abort_abandoned();
        known.put = Some(honoured);
        Ok(honoured)
    }

    /// Whether a multipart upload can be. Asked once, when the first large object comes.
    pub(super) fn honours_conditions_on_parts(&self) -> Result<bool> {
        let mut known = self.known();
        if let Some(honoured) = known.parts {
            return Ok(honoured);
        }
        let key = self.place(PROBE_OF_PARTS);
        let body = Bytes::from_static(b"?");
        let honoured = self.is_refused_twice(&key, || self.upload_parts(&key, &body, true));
        let honoured =
            honoured.map_err(|failure| self.failed(Action::Put, PROBE_OF_PARTS, failure))?;
        if !honoured {
            self.warn();
        }
        known.parts = Some(honoured);
        Ok(honoured)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Conditional> {
        self.conditional
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// An answer that the name is taken proves it; success proves it only when it does not come twice.
    fn is_refused_twice(
        &self,
        key: &str,
        put: impl Fn() -> std::result::Result<PutOutcome, Failure>,
    ) -> std::result::Result<bool, Failure> {
        for _ in 0..2 {
            match put() {
                Ok(PutOutcome::AlreadyExists) => return Ok(true),
                Ok(PutOutcome::Created) => {}
                Err(failure) if failure.is_not_implemented() => return Ok(false),
                // Where overwriting is forbidden the second put is refused outright.
                Err(failure) if failure.is_denied() && self.is_there(key) => return Ok(true),
                Err(failure) => return Err(failure),
            }
        }
        Ok(false)
    }

    fn is_there(&self, full_key: &str) -> bool {
        self.get_object(full_key, None, None).is_ok()
    }

    fn warn(&self) {
        use crate::ObjectStore as _;
        tracing::warn!(
            repository = %self.url(),
            "this store does not keep If-None-Match: objects are looked for before they are written and read back after; \
             let only one host write to this repository"
        );
    }

    /// Aborts uploads that a crash left below our prefix: their parts cost money and are not listed. A store that does not
    /// let us is no reason not to write.
    fn abort_abandoned(&self) {
        let list = self
            .client()
            .list_multipart_uploads()
            .bucket(&self.bucket)
            .prefix(self.place(""));
        let uploads = match self.request(RequestKind::List, list.send()) {
            Ok(uploads) => uploads,
            Err(failure) => {
                tracing::debug!(?failure, "abandoned uploads can not be listed");
                return;
            }
        };
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let oldest = now.saturating_sub(ABANDONED_AGE).as_secs();
        for upload in uploads.uploads() {
            let began = upload
                .initiated()
                .and_then(|time| u64::try_from(time.secs()).ok());
            let (Some(key), Some(id), Some(began)) = (upload.key(), upload.upload_id(), began)
            else {
                continue;
            };
            if began < oldest {
                tracing::warn!(key, "aborting an upload that a crash left");
                self.abort(key, id);
            }
        }
    }
}
