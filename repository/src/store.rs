//! [`ObjectStore`]: the little that we ask of a place for objects.
//!
//! Contract, for every implementation: `put_if_absent` is durable when it returns and never
//! replaces; a reader sees the whole object or none; `list` is in ascending byte order of the keys;
//! [`Error::NotFound`] means *proved* absent, a refusal or a failure is another error.

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
mod requests;
pub mod retry;
mod s3;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use encrypted::EncryptedStore;
pub(crate) use encrypted::SUFFIX as ENCRYPTED_SUFFIX;
pub use local::LocalStore;
pub use mirrored::{MemberState, MirroredStore};
pub use observed::{ObservedStore, Observer};
pub use pinned::PinnedStore;
pub use requests::{RequestCounts, RequestKind, RequestMeter, RequestReport};
pub use retry::Patience;
pub use s3::{S3AsOf, S3Store};

/// What a `put` found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is new.
    Created,
    /// An object of that name was there and is untouched.
    AlreadyExists,
}

/// Who may lift a retention lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Who has the permission for it.
    Governance,
    /// Nobody.
    Compliance,
}

/// Until when an object is to be locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockSpan {
    /// A lock that lasts until then stays as it is.
    pub at_least: Timestamp,
    /// Another one lasts until then from now on.
    pub until: Timestamp,
    /// Who may lift it.
    pub mode: LockMode,
}

impl LockSpan {
    /// Exactly so long, or longer.
    #[must_use]
    pub fn until(until: Timestamp, mode: LockMode) -> Self {
        Self {
            at_least: until,
            until,
            mode,
        }
    }
}

/// What came of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockOutcome {
    /// The object is locked for longer now.
    Extended,
    /// It was already, until then.
    AlreadyLonger(Timestamp),
}

/// An object by which a place is recognised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Witness {
    /// Its key, as it is stored: with the ending of an encrypted object.
    pub key: String,
    /// SHA-256 of the stored bytes, in hexadecimal digits.
    pub sha256: String,
}

impl Witness {
    /// The witness that an object with these stored bytes is.
    #[must_use]
    pub fn new(key: &str, stored: &[u8]) -> Self {
        Self {
            key: key.to_owned(),
            sha256: hex::encode(Sha256::digest(stored)),
        }
    }
}

/// Objects of which a place has to hold one before anything is written to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// The objects; written once, so their bytes never change.
    pub witnesses: Vec<Witness>,
    /// The system identifier of the archive, for messages.
    pub system: String,
    /// The record that the witnesses were read from. Another process may have replaced it since.
    pub(crate) record: Option<RecordedPlace>,
}

impl Pin {
    /// Checks that one of the witnesses is there. If none is, reads the record again: `verify
    /// --repair` writes a lost identity, and the record, while other processes run.
    ///
    /// # Errors
    /// [`Error::Gone`] when none is; what `read` fails with.
    fn check(&self, url: &str, read: impl Fn(&str) -> Result<Option<Bytes>>) -> Result<()> {
        // Bytes that were changed on their way are not another archive: a second reading of them
        // differs from the first one.
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

/// What a listing says of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Its key, from the store's root.
    pub key: String,
    /// Its length in bytes.
    pub size: u64,
}

/// A place for objects. Blocking; see the crate's documentation.
pub trait ObjectStore: Send + Sync + fmt::Debug {
    /// Stores `body` under `key` unless something is there. Durable when it returns.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome>;

    /// The same, for what nobody reads back: that the object is there and is `body` is proved as
    /// cheaply as the place can.
    ///
    /// # Errors
    /// As [`ObjectStore::put_if_absent`]; [`Error::Damaged`] when the place says that it took it,
    /// and has something else.
    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let outcome = self.put_if_absent(key, body)?;
        if outcome == PutOutcome::Created && self.get(key)? != body {
            return Err(crate::Error::Damaged {
                key: key.to_owned(),
                url: self.url(),
                problem: "what was put there is not what is there".to_owned(),
            });
        }
        Ok(outcome)
    }

    /// The whole object.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Store`], [`Error::S3`], [`Error::Damaged`].
    fn get(&self, key: &str) -> Result<Bytes>;

    /// Returns true if the object is `body`, read back.
    ///
    /// # Errors
    /// As [`ObjectStore::get`].
    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        Ok(self.get(key)? == body)
    }

    /// The object from wherever it is sound, when there are several places; where none is, it comes
    /// as it is.
    ///
    /// # Errors
    /// As [`ObjectStore::get`].
    fn get_sound(&self, key: &str, _sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        self.get(key)
    }

    /// The bytes of `range`, all of which must be inside the object.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Store`], [`Error::S3`], [`Error::Damaged`].
    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes>;

    /// What is there, or `None` when proved absent.
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

    /// The names directly below `prefix`, which ends in `/`, under which objects are stored,
    /// ascending. Some stores also name a folder whose last object was removed (`SeaweedFS` for a
    /// while), so a folder proves nothing until an object in it is listed.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let mut names: Vec<String> = Vec::new();
        self.list(prefix, &mut |object| {
            let below = object.key.strip_prefix(prefix);
            if let Some((name, _)) = below.and_then(|below| below.split_once('/'))
                && names.last().is_none_or(|last| last != name)
            {
                names.push(name.to_owned());
            }
            ControlFlow::Continue(())
        })?;
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    /// Removes an object; one that is not there is fine.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    fn delete(&self, key: &str) -> Result<()>;

    /// Locks an object against everybody for a time, or longer where it is already.
    ///
    /// # Errors
    /// [`Error::Config`] where the place has no locks, [`Error::S3`].
    fn lock(&self, key: &str, _span: LockSpan) -> Result<LockOutcome> {
        Err(crate::Error::config(format!(
            "{key} in {} can not be locked: only a bucket with Object Lock can",
            self.url()
        )))
    }

    /// Finds out whether writing would work, where that can be known without an object.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`] with what is missing.
    fn ready_to_write(&self) -> Result<()>;

    /// Where it is, for people.
    fn url(&self) -> String;

    /// Returns true if the place itself exists. Only a folder can be missing without being
    /// unreachable.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Gone`] when it was pinned.
    fn exists(&self) -> Result<bool> {
        Ok(true)
    }

    /// Creates the place itself. Only the beginning of an archive does so: a folder that is missing
    /// later is not mounted.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn create_place(&self) -> Result<()> {
        Ok(())
    }

    /// The witness that the object is; `None` when it is proved absent.
    ///
    /// # Errors
    /// As [`ObjectStore::get`].
    fn witness(&self, key: &str) -> Result<Option<Witness>> {
        match self.get(key) {
            Ok(stored) => Ok(Some(Witness::new(key, &stored))),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells the store that no archive is known to be there: a folder that does not exist is then an empty one. A pin ends
    /// it.
    fn expect_new(&self) {}

    /// Makes every later write, and every answer "absent", fail with [`Error::Gone`] while the
    /// place does not hold one of the witnesses. A folder checks it before and after each write, a
    /// bucket now and then.
    fn pin(&self, _pin: Pin) {}

    /// Checks now that the place holds a witness. What was put before this succeeds is in the right
    /// place.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::Store`], [`Error::S3`] when that cannot be known.
    fn confirm(&self) -> Result<()> {
        Ok(())
    }

    /// The same where it costs no request; elsewhere it succeeds.
    ///
    /// # Errors
    /// As [`ObjectStore::confirm`].
    fn confirm_free(&self) -> Result<()> {
        Ok(())
    }
}

/// Returns true if a text can be a key: parts between single slashes, none of them hidden or
/// leading out.
fn is_sound_key(key: &str) -> bool {
    !key.is_empty()
        && key
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.'))
}
