//! The conversion of a plain cluster into an encrypted one.
//!
//! `keys/encryption-begun` and `keys/encryption-done` are encrypted records. While only the first
//! exists, an object is either encrypted or still plain, and both are read. The order of the steps
//! lets a conversion be killed at any moment and repeated: the data key, the first record, the
//! encrypted identity, the removal of the plain identity, then each other object, then the second
//! record. Invariant: a plain object is removed only after its encrypted form was stored and read
//! back.

use std::{
    ops::ControlFlow,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use wal_format::ObjectKey;

use super::{EncryptedStore, Header, SUFFIX, object, stored};
use crate::{
    Error, Result,
    store::{LockMode, LockOutcome, LockSpan, PutOutcome},
};

/// The names of the records below the cluster's root.
pub(super) const BEGUN: &str = "keys/encryption-begun";
pub(super) const DONE: &str = "keys/encryption-done";
/// The interval at which a program checks whether the conversion is done. After that it ignores
/// plain objects.
const RECHECK_INTERVAL: Duration = Duration::from_secs(30);
const FORMAT_VERSION: u32 = 1;
/// The number of objects that are encrypted at the same time. Each one's bytes are in memory twice.
const WORKERS: usize = 4;

/// The records of a conversion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// True if the first record is listed.
    pub(super) begun: bool,
    /// True if the second record is listed. Any program that can write may have stored it.
    pub(super) done_listed: bool,
    /// True if the second record is authentic. Only [`EncryptedStore::reload`] sets it.
    done: bool,
}

/// The content of both records.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format_version: u32,
    time: String,
    /// The number of objects that the last run encrypted. 0 in the first record.
    objects: usize,
}

/// The state of a cluster's encryption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncryptionState {
    /// The place holds nothing of the cluster.
    Empty,
    /// Every object is plain.
    Plain,
    /// A conversion has begun and is not finished.
    Converting,
    /// Every object is encrypted, and plain ones are ignored.
    Encrypted,
}

/// The result of a run of the conversion.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversion {
    /// The number of objects that were encrypted.
    pub encrypted: usize,
    /// The plain objects that a retention lock protects. Their encrypted form is stored too.
    pub locked: Vec<String>,
    /// The end of the longest of these locks, if the store shows it.
    pub locked_until: Option<Timestamp>,
    /// Objects that are not part of an archive. They are left as they are.
    pub foreign: Vec<String>,
    /// True if no plain object of the archive is left.
    pub is_done: bool,
}

/// The outcome for one object.
enum Converted {
    Encrypted,
    /// Another program removed it meanwhile.
    Removed,
    Locked,
}

impl EncryptedStore {
    /// Returns the state of the cluster's encryption.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`], [`Error::Key`].
    pub fn encryption_state(&self) -> Result<EncryptionState> {
        self.reload()?;
        let keys = self.keys.load()?;
        self.keys.check(&keys)?;
        let marks = self.known().as_ref().map_or(keys.marks, |keys| keys.marks);
        let (mut has_plain, mut has_encrypted) = (false, false);
        let prefix = format!("{}epoch", self.keys.root);
        self.store().list(&prefix, &mut |object| {
            has_encrypted |= object.key.ends_with(SUFFIX);
            has_plain |= self.is_epoch(&object.key);
            ControlFlow::Continue(())
        })?;
        Ok(match marks {
            Marks {
                begun: true,
                done: false,
                ..
            } => EncryptionState::Converting,
            // Killed between the data key and the first record.
            _ if has_plain && !has_encrypted => EncryptionState::Plain,
            _ if has_encrypted || !keys.is_empty() => EncryptionState::Encrypted,
            _ => EncryptionState::Empty,
        })
    }

    /// Begins the conversion of a plain cluster, or goes on with its beginning: afterwards new
    /// objects are encrypted, and a program without the key reads and writes nothing.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`], [`Error::Key`]; [`Error::Damaged`] when the store does not
    /// hold what was put.
    pub fn begin_conversion(&self) -> Result<()> {
        let keys = self.keys.load()?;
        self.keys.check(&keys)?;
        if keys.marks.begun && !self.is_authentic(BEGUN)? {
            let problem = "another program wrote it: remove it, and then the plain objects that \
                           `wal-archiver verify` names";
            return Err(self.damaged(&self.mark(BEGUN), problem.to_owned()));
        }
        if !keys.marks.begun {
            if keys.is_empty() {
                self.refuse_lost_keys()?;
            }
            if keys.made_by(self.keys.ring.first().id).is_none() {
                self.keys.make()?;
            }
            let keys = self.keys.load()?;
            // A run that was killed may have stored only one copy of the wrapped key.
            self.keys.put_back(&keys)?;
            *self.known() = Some(keys);
            self.put_record(BEGUN, 0)?;
        }
        self.reload()?;
        let prefix = format!("{}epoch", self.keys.root);
        let mut epochs = Vec::new();
        self.store().list(&prefix, &mut |object| {
            if self.is_epoch(&object.key) {
                epochs.push(object.key);
            }
            ControlFlow::Continue(())
        })?;
        // The plain identity goes last: until then the cluster has one for each kind of reader.
        for key in &epochs {
            self.encrypt(key)?;
        }
        for key in &epochs {
            match self.store().delete(key) {
                Ok(()) | Err(Error::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Encrypts every object that is still plain, and records the end when none is left. Calls
    /// `progress` with the number of objects encrypted, and the number of those that were plain.
    ///
    /// # Errors
    /// As [`EncryptedStore::begin_conversion`]. The conversion goes on when it is called again.
    pub fn convert(&self, progress: &(dyn Fn(usize, usize) + Sync)) -> Result<Conversion> {
        let mut result = Conversion::default();
        loop {
            let (ours, foreign) = self.plain_names()?;
            result.foreign = foreign;
            let left: Vec<String> = ours
                .into_iter()
                .filter(|key| !result.locked.contains(key))
                .collect();
            if left.is_empty() {
                break;
            }
            let before = result.encrypted;
            let total = before + left.len();
            let (next, encrypted) = (AtomicUsize::new(0), AtomicUsize::new(before));
            let (locked, failed) = (Mutex::new(Vec::new()), Mutex::new(None));
            let work = || {
                while let Some(key) = left.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match self.convert_one(key) {
                        Ok(Converted::Encrypted) => {
                            progress(encrypted.fetch_add(1, Ordering::Relaxed) + 1, total);
                        }
                        Ok(Converted::Removed) => {}
                        Ok(Converted::Locked) => held(&locked).push(key.clone()),
                        Err(error) => {
                            held(&failed).get_or_insert(error);
                            next.store(left.len(), Ordering::Relaxed);
                        }
                    }
                }
            };
            thread::scope(|scope| {
                for _ in 0..WORKERS {
                    scope.spawn(work);
                }
            });
            result.encrypted = encrypted.load(Ordering::Relaxed);
            if let Some(error) = held(&failed).take() {
                return Err(error);
            }
            result.locked.append(&mut held(&locked));
        }
        result.locked.sort_unstable();
        result.locked_until = result
            .locked
            .iter()
            .filter_map(|key| self.locked_until(key))
            .max();
        if result.locked.is_empty() {
            self.put_record(DONE, result.encrypted)?;
            // The second record decides, so a lock on the first one does no harm.
            match self.store().delete(&self.mark(BEGUN)) {
                Ok(()) | Err(Error::Locked { .. }) => {}
                Err(error) => return Err(error),
            }
            result.is_done = !self.reload()?;
        }
        Ok(result)
    }

    /// Returns true while a conversion is not finished, so that plain objects count.
    pub(super) fn accepts_plain(&self) -> Result<bool> {
        if let Some(keys) = self.known().as_ref()
            && !keys.is_empty()
            && (!keys.marks.begun || keys.marks.done)
        {
            return Ok(false);
        }
        let seen = *self.converting();
        if seen.is_some_and(|seen| seen.elapsed() < RECHECK_INTERVAL) {
            return Ok(true);
        }
        self.reload()
    }

    /// Reads the keys and the records again. A record counts only if it is authentic: with a
    /// forged first one plain objects of another program would count, and with a forged second one
    /// the objects that are still plain would not.
    fn reload(&self) -> Result<bool> {
        let keys = self.keys.load()?;
        let marks = keys.marks;
        *self.known() = Some(keys);
        let is_done = marks.begun && marks.done_listed && self.is_authentic(DONE)?;
        if let Some(keys) = self.known().as_mut() {
            keys.marks.done = is_done;
        }
        let accepts = marks.begun && !is_done && self.is_authentic(BEGUN)?;
        *self.converting() = accepts.then(Instant::now);
        Ok(accepts)
    }

    fn is_authentic(&self, record: &str) -> Result<bool> {
        let name = self.mark(record);
        let object = match self.store().get(&name) {
            Ok(object) => object,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error),
        };
        let plain = Header::parse(&object).ok().and_then(|header| {
            let data = self.reader(header.data_key, &name).ok()?;
            object::open(&header, &data, &name, &object).ok()
        });
        let record = plain.and_then(|plain| serde_json::from_slice::<Record>(&plain).ok());
        if record.is_none() {
            tracing::warn!(
                event = "encryption_record_ignored",
                key = name,
                "a record of the encryption is not authentic and is ignored"
            );
        }
        Ok(record.is_some())
    }

    fn put_record(&self, record: &str, objects: usize) -> Result<()> {
        let content = Record {
            format_version: FORMAT_VERSION,
            time: Timestamp::now().to_string(),
            objects,
        };
        let json =
            serde_json::to_vec(&content).map_err(|error| self.keys.problem(error.to_string()))?;
        let name = self.mark(record);
        let sealed = self.seal(&name, &json)?;
        let outcome = self.store().put_proved(&name, &sealed)?;
        if outcome == PutOutcome::AlreadyExists && !self.is_authentic(record)? {
            let problem = "it is not authentic: another program wrote it; remove it";
            return Err(self.damaged(&name, problem.to_owned()));
        }
        Ok(())
    }

    fn mark(&self, record: &str) -> String {
        format!("{}{record}", self.keys.root)
    }

    /// Returns true for the name of a record.
    pub(super) fn is_mark(&self, name: &str) -> bool {
        let name = name.strip_prefix(&self.keys.root);
        name.is_some_and(|name| name == BEGUN || name == DONE)
    }

    /// Returns the plain objects of the archive, and those that are not part of one.
    pub(super) fn plain_names(&self) -> Result<(Vec<String>, Vec<String>)> {
        let (mut ours, mut foreign) = (Vec::new(), Vec::new());
        self.store().list(&self.keys.root, &mut |object| {
            let key = object.key;
            if !key.ends_with(SUFFIX) && !self.keys.is_wrapped_key(&key) && !self.is_mark(&key) {
                let name = key.strip_prefix(&self.keys.root).unwrap_or(&key);
                match name.parse::<ObjectKey>() {
                    Ok(_) => ours.push(key),
                    Err(_) => foreign.push(key),
                }
            }
            ControlFlow::Continue(())
        })?;
        Ok((ours, foreign))
    }

    /// Encrypts an object and removes its plain form.
    fn convert_one(&self, key: &str) -> Result<Converted> {
        if !self.encrypt(key)? {
            return Ok(Converted::Removed);
        }
        match self.store().delete(key) {
            Ok(()) => Ok(Converted::Encrypted),
            Err(Error::Locked { .. }) => Ok(Converted::Locked),
            Err(error) => Err(error),
        }
    }

    /// Stores the encrypted form of an object. Returns false if there is no plain form any more.
    fn encrypt(&self, key: &str) -> Result<bool> {
        let plain = match self.store().get(key) {
            Ok(plain) => plain,
            Err(error) if error.is_not_found() => return Ok(false),
            Err(error) => return Err(error),
        };
        let sealed = self.seal(key, &plain)?;
        let outcome = self.store().put_proved(&stored(key), &sealed)?;
        // A run that was killed here, or a concurrent one, stored it with another salt.
        if outcome == PutOutcome::AlreadyExists && self.get_encrypted(key)? != plain {
            return Err(self.damaged(
                key,
                "it exists plain and encrypted, with different content; both are left as they are"
                    .to_owned(),
            ));
        }
        Ok(true)
    }

    /// Returns the end of an object's retention lock. `None` if the store does not show it.
    fn locked_until(&self, key: &str) -> Option<Timestamp> {
        let now = Timestamp::now();
        let span = LockSpan::until(now, LockMode::Governance);
        match self.store().lock(key, span) {
            Ok(LockOutcome::AlreadyLonger(until)) => Some(until),
            _ => None,
        }
    }

    /// Reads an object in its encrypted form, and in its plain form if a conversion has not
    /// reached it. The object may be converted between two attempts, so the first form is tried
    /// again.
    pub(super) fn in_either_form<T>(
        &self,
        encrypted: impl Fn() -> Result<T>,
        plain: impl Fn() -> Result<T>,
    ) -> Result<T> {
        let first = encrypted();
        match &first {
            Err(error) if error.is_not_found() => {}
            _ => return first,
        }
        if !self.accepts_plain()? {
            return first;
        }
        match plain() {
            Err(error) if error.is_not_found() => encrypted(),
            other => other,
        }
    }

    /// Returns the bytes of an object that is stored encrypted.
    pub(super) fn get_encrypted(&self, key: &str) -> Result<Bytes> {
        let object = self.store().get(&stored(key));
        self.open(key, &object.map_err(|error| self.plain_name(error))?)
    }
}

fn held<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
