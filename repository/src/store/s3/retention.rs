//! Retention locks: the time until which the bucket refuses to delete an object.
//!
//! A lock is only ever extended. An object that is locked until a later time stays as it is.

use aws_sdk_s3::{
    primitives::DateTime,
    types::{ObjectLockRetention, ObjectLockRetentionMode},
};
use jiff::Timestamp;

use super::{S3Store, errors::Action};
use crate::{
    Result,
    store::{LockMode, LockOutcome, LockSpan, RequestKind},
};

impl S3Store {
    pub(super) fn extend_lock(&self, key: &str, span: LockSpan) -> Result<LockOutcome> {
        let full_key = self.full_key(Action::Lock, key)?;
        let failed = |failure| self.failed(Action::Lock, key, failure);
        let head = self
            .client()
            .head_object()
            .bucket(&self.bucket)
            .key(&full_key);
        let head = self
            .request(RequestKind::Head, head.send())
            .map_err(failed)?;
        let kept = head.object_lock_retain_until_date().map(DateTime::secs);
        let kept = kept.and_then(|kept| Timestamp::from_second(kept).ok());
        // Stores report whole seconds.
        if let Some(kept) = kept
            && kept.as_second() >= span.at_least.as_second()
        {
            return Ok(LockOutcome::AlreadyLonger(kept));
        }
        // A lock that nobody may lift is never replaced by one that somebody may lift.
        let compliance = head
            .object_lock_mode()
            .is_some_and(|mode| mode.as_str() == "COMPLIANCE");
        let mode = match span.mode {
            LockMode::Governance if !compliance => ObjectLockRetentionMode::Governance,
            _ => ObjectLockRetentionMode::Compliance,
        };
        let retention = ObjectLockRetention::builder()
            .mode(mode)
            .retain_until_date(DateTime::from_secs(span.until.as_second()))
            .build();
        let put = self
            .client()
            .put_object_retention()
            .bucket(&self.bucket)
            .key(&full_key)
            .retention(retention);
        self.request(RequestKind::Put, put.send()).map_err(failed)?;
        Ok(LockOutcome::Extended)
    }
}
