//! [`ObjectStore`]: the operations that Tidemark needs from a store of objects.
//!
//! Contract, for every implementation: `put_if_absent` is durable when it returns and never
//! replaces an object. A reader sees the whole object or none. `list` visits the keys in ascending
//! byte order. [`Error::NotFound`] means *proved* absent; a refusal or a failure is another error.

use std::{fmt, ops::ControlFlow, ops::Range};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

#[cfg(doc)]
use crate::Error;
use crate::{Result, known_archive::RecordedPlace};

mod bounds;
mod encrypted;
mod local;
mod mirrored;
mod observed;
mod pinned;
#[doc(hidden)]
pub mod plain;
mod requests;
pub mod retry;
mod s3;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub(crate) use encrypted::SUFFIX as ENCRYPTED_SUFFIX;
pub use encrypted::{Conversion, EncryptedStore, EncryptionState};
pub use local::LocalStore;
pub use mirrored::{MemberState, MirroredStore};
pub use observed::{ObservedStore, Observer, OpenPuts, REQUESTS};
pub use pinned::PinnedStore;
pub use requests::{RequestCounts, RequestKind, RequestMeter, RequestReport};
pub use retry::Patience;
pub use s3::{S3AsOf, S3Store};

/// The outcome of a `put`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is new.
    Created,
    /// An object of that name existed and is unchanged.
    AlreadyExists,
}

/// The kinds of retention locks, by who may lift them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// A user with the permission for it may lift the lock.
    Governance,
    /// Nobody may lift the lock.
    Compliance,
}

/// The time for which an object is to be locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockSpan {
    /// A lock that lasts at least until this time is left as it is.
    pub at_least: Timestamp,
    /// Any other lock is set to, or extended to, this time.
    pub until: Timestamp,
    /// The kind of the lock.
    pub mode: LockMode,
}

impl LockSpan {
    /// Requests a lock that lasts until `until`; a longer lock is left as it is.
    #[must_use]
    pub fn until(until: Timestamp, mode: LockMode) -> Self {
        Self {
            at_least: until,
            until,
            mode,
        }
    }
}

/// The outcome of a request for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockOutcome {
    /// The object had no lock or a shorter lock; its lock now lasts as long as requested.
    Extended,
    /// The object was already locked long enough, until this time.
    AlreadyLonger(Timestamp),
}

/// An object by which a place is recognised: its key and the digest of its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// The key as stored, with the suffix of an encrypted object.
    pub key: String,
    /// SHA-256 of the stored bytes, in hexadecimal digits.
    pub sha256: String,
}

impl Witness {
    /// Returns the witness for an object with these stored bytes.
    #[must_use]
    pub fn new(key: &str, stored: &[u8]) -> Self {
        Self {
            key: key.to_owned(),
            sha256: hex::encode(Sha256::digest(stored)),
        }
    }
}

/// The objects that identify a place. The place must contain at least one of them before anything
/// is written to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The objects. They are written once, so their bytes never change.
    pub witnesses: Vec<Witness>,
    /// The system identifier of the archive, for messages.
    pub system: String,
    /// The record from which the witnesses were read. Another process may have replaced it since.
    pub(crate) record: Option<RecordedPlace>,
}

impl Pin {
    /// Checks that the place contains one of the witnesses. If it contains none, reads the record
    /// again, because `verify --repair` writes a lost identity and the record while other processes
    /// run.
    ///
    /// # Errors
    /// [`Error::Gone`] when the place contains no witness; the errors of `read`.
    fn check(&self, url: &str, read: impl Fn(&str) -> Result<Option<Bytes>>) -> Result<()> {
        // Bytes corrupted in transit do not mean that the place belongs to another archive. Two
        // reads of such bytes differ, so read an unexpected object twice.
        let read_twice = |key: &str, expected: &Witness| -> Result<Option<Bytes>> {
            let first = read(key)?;
            match &first {
                Some(stored) if Witness::new(key, stored) != *expected => {}
                _ => return Ok(first),
            }
            let second = read(key)?;
            let is_expected = |stored: &Bytes| Witness::new(key, stored) == *expected;
            if second != first && !second.as_ref().is_some_and(is_expected) {
                return Err(crate::Error::Damaged {
                    key: key.to_owned(),
                    url: url.to_owned(),
                    problem: "two readings of it differ".to_owned(),
                });
            }
            Ok(second)
        };
        let Some(problem) = missing(&self.witnesses, read_twice)? else {
            return Ok(());
        };
        let record = self.record.as_ref();
        if let Some(newer) = record.and_then(|record| record.witnesses(&self.system))
            && newer != self.witnesses
            && missing(&newer, read_twice)?.is_none()
        {
            // A program that was started without the key would write plain objects.
            if is_encrypted(&newer) && !is_encrypted(&self.witnesses) {
                let problem = "its objects are encrypted now; name their key in encryption_key_file and start this \
                               program again";
                return Err(self.gone(url, problem.to_owned()));
            }
            return Ok(());
        }
        Err(self.gone(url, problem))
    }

    fn gone(&self, url: &str, problem: String) -> crate::Error {
        crate::Error::Gone {
            url: url.to_owned(),
            system: self.system.clone(),
            problem,
        }
    }
}

/// Returns true if the witnesses are encrypted objects.
fn is_encrypted(witnesses: &[Witness]) -> bool {
    witnesses
        .iter()
        .any(|witness| witness.key.ends_with(ENCRYPTED_SUFFIX))
}

/// Looks for the witnesses. Returns `None` if one of them is there, otherwise the problem.
fn missing(
    witnesses: &[Witness],
    read: impl Fn(&str, &Witness) -> Result<Option<Bytes>>,
) -> Result<Option<String>> {
    let mut problem = "no object is known by which it could be recognised".to_owned();
    for witness in witnesses {
        let key = &witness.key;
        match read(key, witness)? {
            Some(stored) if Witness::new(key, &stored) == *witness => return Ok(None),
            Some(_) => problem = format!("{key} belongs to another archive"),
            None => problem = format!("{key} is not there (not mounted, emptied or replaced)"),
        }
    }
    Ok(Some(problem))
}

/// An entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    /// The key, from the store's root.
    pub key: String,
    /// The length in bytes.
    pub size: u64,
}

/// A store of objects. All calls block; see the crate's documentation.
///
/// No method has a default body: a store that wraps another one and forgets to pass a call on does
/// not compile. A store without locks and without a place of its own takes these methods from
/// `plain_store_methods!`.
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// Stores `body` under `key` unless an object of that name exists. Durable when it returns.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome>;

    /// Like [`ObjectStore::put_if_absent`], for objects that the caller does not read back. Proves,
    /// as cheaply as the store can, that an object that it created is `body`.
    ///
    /// # Errors
    /// As [`ObjectStore::put_if_absent`]; [`Error::Damaged`] when the store acknowledged the object
    /// but contains other bytes.
    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome>;

    /// Reads the whole object.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Store`], [`Error::S3`], [`Error::Damaged`].
    fn get(&self, key: &str) -> Result<Bytes>;

    /// Reads the object back and returns true if it equals `body`.
    ///
    /// # Errors
    /// As [`ObjectStore::get`].
    fn holds(&self, key: &str, body: &[u8]) -> Result<bool>;

    /// Reads the object. A store with several places reads it from the first place with a copy that
    /// `sound` accepts. If no copy is intact, returns the bytes of a damaged one.
    ///
    /// # Errors
    /// As [`ObjectStore::get`].
    fn get_sound(&self, key: &str, sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes>;

    /// Reads the bytes of `range`, which must lie within the object.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Store`], [`Error::S3`], [`Error::Damaged`].
    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes>;

    /// Returns the object's metadata, or `None` when the object is proved absent.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn head(&self, key: &str) -> Result<Option<ObjectMeta>>;

    /// Visits the objects whose keys begin with `prefix`, ascending, until `visit` breaks.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()>;

    /// Returns the names of the folders directly below `prefix`, which ends in `/`, in ascending
    /// order. Some stores also name a folder whose last object was removed (`SeaweedFS` for a
    /// while), so a folder proves nothing until an object in it is listed.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn folders(&self, prefix: &str) -> Result<Vec<String>>;

    /// Removes an object. Succeeds when the object does not exist.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn delete(&self, key: &str) -> Result<()>;

    /// Locks an object against deletion for the time of the span. A lock that lasts long enough is
    /// left as it is.
    ///
    /// # Errors
    /// [`Error::Config`] where the store has no locks, [`Error::S3`].
    fn lock(&self, key: &str, span: LockSpan) -> Result<LockOutcome>;

    /// Checks whether writing would work, as far as that can be known without writing an object.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`], which say what is missing.
    fn ready_to_write(&self) -> Result<()>;

    /// Returns the location of the store, for messages.
    fn url(&self) -> String;

    /// Returns true if the place itself exists. Only a folder can be missing without being
    /// unreachable.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Gone`] when the store was pinned.
    fn exists(&self) -> Result<bool>;

    /// Creates the place itself. Only the creation of an archive calls this: a folder that is
    /// missing later is not mounted.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn create_place(&self) -> Result<()>;

    /// Returns the witness for the object, or `None` when the object is proved absent.
    ///
    /// # Errors
    /// As [`ObjectStore::get`].
    fn witness(&self, key: &str) -> Result<Option<Witness>>;

    /// Tells the store that no archive is known to exist there. From then until a pin, a folder
    /// that does not exist counts as empty.
    fn expect_new(&self);

    /// Makes every later write, and every answer "absent", fail with [`Error::Gone`] while the
    /// place does not contain one of the witnesses. A folder checks this before and after each
    /// write, a bucket from time to time.
    fn pin(&self, pin: Pin);

    /// Checks now that the place contains a witness. Objects that were put before this succeeds are
    /// in the right place.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Store`], [`Error::S3`] when the check itself fails.
    fn confirm(&self) -> Result<()>;

    /// Like [`ObjectStore::confirm`], but only where the check costs no request. Other stores
    /// succeed without a check.
    ///
    /// # Errors
    /// As [`ObjectStore::confirm`].
    fn confirm_free(&self) -> Result<()>;

    /// Stores the wrapped keys of an encrypted store again, if they were lost since they were read.
    /// Returns the names of those that were lost. Other stores have none.
    ///
    /// # Errors
    /// Those of the requests.
    fn put_back_keys(&self) -> Result<Vec<String>>;
}

/// Returns true if a text is a valid key: parts between single slashes, none of which is empty or
/// begins with a dot. So no key is hidden or leads out of the store.
fn is_sound_key(key: &str) -> bool {
    !key.is_empty()
        && key
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.'))
}
