//! Finds out, before anything is written, whether the store honours `If-None-Match: *`. Some stores
//! answer 200 and overwrite.
//!
//! The probe's object always has the same name and is never deleted. The probe therefore costs one
//! request at a start, works in buckets that forbid deletes, and gives two programs that start at
//! once the same result.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::{
    S3Store,
    errors::{Action, Failure},
};
use crate::{PutOutcome, Result, store::RequestKind};

/// None of our keys can begin with a dot.
const PROBE: &str = ".tidemark-probe";
const PROBE_OF_PARTS: &str = ".tidemark-probe-parts";
/// An upload of this age was left by a crash, because no put takes a day.
const ABANDONED_AGE: Duration = Duration::from_secs(24 * 3600);

/// The known properties of the store.
#[derive(Debug, Default)]
pub(super) struct Conditional {
    put: Option<bool>,
    parts: Option<bool>,
}

impl S3Store {
    /// Returns whether a `PutObject` can be conditional. Tested once.
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

    /// Returns whether a multipart upload can be conditional. Tested once, when the first large
    /// object is put.
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

    /// A refusal because the name is taken proves support. Two successes prove the lack of it.
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

    /// Aborts uploads below our prefix that a crash left: their parts cost money and are not
    /// listed. Failure here does not prevent writing.
    fn abort_abandoned(&self) {
        let list = self
            .client()
            .list_multipart_uploads()
            .bucket(&self.bucket)
            .prefix(self.place(""));
        let uploads = match self.request(RequestKind::List, list.send()) {
            Ok(uploads) => uploads,
            Err(failure) => {
                tracing::debug!(?failure, "abandoned uploads cannot be listed");
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
