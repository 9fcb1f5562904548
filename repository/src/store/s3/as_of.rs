//! [`S3AsOf`]: a versioned bucket as of an earlier time, whatever was deleted or overwritten since.
//!
//! The store's own clock dates the versions, so a view does not depend on our clock.
//! Invariant: nothing is written, and every read names a version. An object that an attacker wrote
//! later is never returned.

use std::{
    collections::{BTreeMap, HashMap},
    ops::{ControlFlow, Range},
    sync::{Mutex, PoisonError},
};

use bytes::Bytes;
use jiff::Timestamp;

use super::{
    S3Store,
    errors::{Action, Failure},
    listing::Pages,
};
use crate::{
    Error, ObjectMeta, ObjectStore, PutOutcome, Result,
    config::S3Settings,
    store::{
        RequestKind, RequestMeter,
        retry::{Patience, Retrying},
    },
};

/// The version ID in a bucket that never had versioning.
const NO_VERSION: &str = "null";

/// A version of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version {
    id: String,
    size: u64,
}

/// A change of a key, with its time.
struct Event {
    when: Timestamp,
    is_latest: bool,
    /// `None` for a deletion.
    version: Option<Version>,
}

impl Event {
    /// Returns true if this event is later than another event of the same key. Many stores have
    /// times in whole seconds; among equal times the version that the store calls the latest is
    /// later, and an object is put before it is deleted.
    fn is_after(&self, other: &Self) -> bool {
        let rank = |event: &Self| (event.when, event.is_latest, event.version.is_none());
        rank(self) > rank(other)
    }
}

/// A bucket as of a time.
#[derive(Debug)]
pub struct S3AsOf {
    store: S3Store,
    at: Timestamp,
    /// Versions that were looked up. The past does not change.
    known: Mutex<HashMap<String, Option<Version>>>,
}

impl S3AsOf {
    /// Opens the bucket as of `at`.
    ///
    /// # Errors
    /// [`Error::Config`] when the settings cannot be used.
    pub fn open(
        bucket: &str,
        prefix: &str,
        settings: &S3Settings,
        requests: RequestMeter,
        patience: Patience,
        at: Timestamp,
    ) -> Result<Retrying<Self>> {
        let mut store = S3Store::without_retries(bucket, prefix, settings)?;
        store.requests = requests;
        let view = Self {
            store,
            at,
            known: Mutex::default(),
        };
        Ok(Retrying::new(view, patience.into()))
    }

    /// Returns the version of every key below a prefix.
    fn versions(&self, prefix: &str) -> Result<BTreeMap<String, Option<Version>>> {
        let root = self.store.place("");
        let full_prefix = self.store.place(prefix);
        let mut events: BTreeMap<String, Event> = BTreeMap::new();
        let mut marker = (None, None);
        let mut pages = Pages::new();
        let mut versioned = false;
        let mut seen = 0_usize;
        loop {
            let list = self
                .store
                .client()
                .list_object_versions()
                .bucket(&self.store.bucket)
                .prefix(&full_prefix)
                .set_key_marker(marker.0)
                .set_version_id_marker(marker.1);
            let page = self
                .store
                .request(RequestKind::List, list.send())
                .map_err(|failure| self.store.failed(Action::ListVersions, prefix, failure))?;
            let objects = page.versions().iter().map(|version| {
                let size = version.size().and_then(|size| u64::try_from(size).ok());
                let id = version.version_id().unwrap_or(NO_VERSION).to_owned();
                let object = size.map(|size| Version { id, size });
                (
                    version.key(),
                    version.last_modified(),
                    version.is_latest(),
                    object,
                )
            });
            let deletions = page.delete_markers().iter().map(|marker| {
                (
                    marker.key(),
                    marker.last_modified(),
                    marker.is_latest(),
                    None,
                )
            });
            for (key, when, is_latest, version) in objects.chain(deletions) {
                let key = key.and_then(|key| key.strip_prefix(&root));
                let when = when.and_then(|when| {
                    let nanos = i32::try_from(when.subsec_nanos()).unwrap_or(0);
                    Timestamp::new(when.secs(), nanos).ok()
                });
                let (Some(key), Some(when)) = (key, when) else {
                    continue;
                };
                seen += 1;
                versioned |= version
                    .as_ref()
                    .is_none_or(|version| version.id != NO_VERSION);
                let event = Event {
                    when,
                    is_latest: is_latest == Some(true),
                    version,
                };
                if event.when <= self.at
                    && events.get(key).is_none_or(|known| event.is_after(known))
                {
                    events.insert(key.to_owned(), event);
                }
            }
            let next = page.next_key_marker().map(|key| {
                let version = page.next_version_id_marker().map(str::to_owned);
                (key.to_owned(), version)
            });
            let next = pages
                .next(page.is_truncated(), next)
                .map_err(|failure| self.store.failed(Action::ListVersions, prefix, failure))?;
            let Some((key, version)) = next else {
                break;
            };
            marker = (Some(key), version);
        }
        if seen > 0 && !versioned {
            tracing::warn!(
                repository = %self.url(),
                "this bucket keeps no versions: what was deleted or overwritten since is gone"
            );
        }
        let found: BTreeMap<_, _> = events
            .into_iter()
            .map(|(key, event)| (key, event.version))
            .collect();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.extend(
            found
                .iter()
                .map(|(key, version)| (key.clone(), version.clone())),
        );
        Ok(found)
    }

    /// Returns the version of a key.
    fn version(&self, action: Action, key: &str) -> Result<Option<Version>> {
        self.store.full_key(action, key)?;
        let known = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.get(key).cloned()
        };
        match known {
            Some(version) => Ok(version),
            None => Ok(self.versions(key)?.remove(key).flatten()),
        }
    }

    fn existing(&self, key: &str) -> Result<Version> {
        let version = self.version(Action::Get, key)?;
        version.ok_or_else(|| Error::NotFound {
            key: key.to_owned(),
            url: self.url(),
        })
    }

    fn read_only(&self) -> Error {
        Error::config(format!(
            "{} is looked at as it was; nothing is written there",
            self.url()
        ))
    }
}

impl ObjectStore for S3AsOf {
    fn put_if_absent(&self, _: &str, _: &[u8]) -> Result<PutOutcome> {
        Err(self.read_only())
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        let version = self.existing(key)?;
        self.store.read_whole(key, Some(&version.id))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let version = self.existing(key)?;
        if range.start == range.end && range.end <= version.size {
            return Ok(Bytes::new());
        }
        if range.start >= range.end || range.end > version.size {
            let failure = Failure::refused("the range is not inside");
            return Err(self.store.failed(Action::Get, key, failure));
        }
        self.store.read_part(key, range, Some(&version.id))
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        let version = self.version(Action::Head, key)?;
        Ok(version.map(|version| ObjectMeta {
            key: key.to_owned(),
            size: version.size,
        }))
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        for (key, version) in self.versions(prefix)? {
            let Some(version) = version.filter(|_| crate::store::is_sound_key(&key)) else {
                continue;
            };
            let size = version.size;
            if visit(ObjectMeta { key, size }).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn delete(&self, _: &str) -> Result<()> {
        Err(self.read_only())
    }

    fn ready_to_write(&self) -> Result<()> {
        Err(self.read_only())
    }

    fn url(&self) -> String {
        format!("{} as of {}", self.store.url(), self.at)
    }

    crate::plain_store_methods!();
}
