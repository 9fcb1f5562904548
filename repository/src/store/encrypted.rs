//! [`EncryptedStore`]: wraps a store so that its operator can read only the names and sizes of
//! objects and the names of the keys.
//!
//! An object `x` is stored as `x.enc` ([`object`]), so an encrypted object and a plain one are
//! never confused. The cluster's data keys are stored, wrapped, in `keys/` ([`keys`]). Reading a
//! range costs one more request, for the header.

use std::{
    collections::BTreeMap,
    ops::{ControlFlow, Range},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use wal_format::ObjectKey;

pub use self::conversion::{Conversion, EncryptionState};
use self::{
    keys::{DataKey, DataKeyId, KeyStore, Keys},
    object::{HEADER_BYTES, Header, SealError},
};
use super::{LockOutcome, LockSpan, ObjectMeta, ObjectStore, Pin, PutOutcome, Witness};
use crate::{Error, Result, encryption::KeyRing};

mod conversion;
mod keys;
mod object;
#[cfg(test)]
mod tests;

/// The suffix of an encrypted object's name.
pub(crate) const SUFFIX: &str = ".enc";

/// A cluster's objects, encrypted.
#[derive(Debug)]
pub struct EncryptedStore {
    keys: KeyStore,
    known: Mutex<Option<Keys>>,
    /// The time at which a conversion was last seen to be unfinished.
    converting: Mutex<Option<Instant>>,
}

impl EncryptedStore {
    /// Encrypts the objects that a cluster puts into `store`. The keys are read at the first
    /// request.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, cluster: &str, ring: Arc<KeyRing>) -> Self {
        let root = format!("{cluster}/");
        Self {
            keys: KeyStore { store, ring, root },
            known: Mutex::default(),
            converting: Mutex::default(),
        }
    }

    /// Checks that the configured keys can unwrap every data key of the cluster.
    ///
    /// # Errors
    /// [`Error::Key`], which names the missing keys.
    pub fn check_keys(&self) -> Result<()> {
        let keys = self.keys.load()?;
        self.keys.check(&keys)?;
        *self.known() = Some(keys);
        Ok(())
    }

    /// Wraps every data key with every configured key. New objects use the first key. Returns the
    /// number of wrapped keys that were added. No object changes.
    ///
    /// # Errors
    /// [`Error::Key`] when no configured key can unwrap a data key.
    pub fn rewrap(&self) -> Result<usize> {
        self.check_keys()?;
        self.writer()?;
        let keys = self.keys.load()?;
        self.keys.rewrap(&keys)
    }

    /// Returns the wrapped data keys of which one copy is lost or damaged, and whether the other
    /// copy is intact. With `mend`, the intact copy replaces the broken one.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn broken_keys(&self, mend: bool) -> Result<Vec<(String, bool)>> {
        let mut broken = Vec::new();
        for (name, sound) in self.keys.broken()? {
            if let (true, Some(sound)) = (mend, &sound) {
                self.keys.mend(&name, sound)?;
            }
            broken.push((name, sound.is_some()));
        }
        Ok(broken)
    }

    /// Returns the names of the cluster's objects that are not encrypted. They are ignored: another
    /// program wrote them. Until a conversion is done, only objects that are not part of an archive
    /// are returned.
    ///
    /// # Errors
    /// [`Error::Store`], [`Error::S3`].
    pub fn plain_objects(&self) -> Result<Vec<String>> {
        let (mut ours, mut foreign) = self.plain_names()?;
        if ours.is_empty() || self.accepts_plain()? {
            return Ok(foreign);
        }
        foreign.append(&mut ours);
        foreign.sort_unstable();
        Ok(foreign)
    }

    /// Returns whether a name, without the suffix of an encrypted object, is that of an epoch's
    /// file.
    fn is_epoch(&self, name: &str) -> bool {
        let key = name.strip_prefix(&self.keys.root);
        let key = key.and_then(|key| key.parse().ok());
        matches!(key, Some(ObjectKey::Epoch(_) | ObjectKey::EpochCopy(_)))
    }

    /// Refuses a cluster that is archived without encryption. If data keys and encrypted objects
    /// are stored, the cluster is encrypted: then `plain` is an object that another program wrote,
    /// and is ignored. Data keys alone are left by a conversion that ended at once.
    fn refuse_plain(&self, plain: &str) -> Result<()> {
        if self.keys.has_data_keys()? && self.first_encrypted()?.is_some() {
            tracing::warn!(
                event = "plain_object_ignored",
                key = plain,
                repository = %self.url(),
                "the object is not encrypted and is ignored; `wal-archiver verify` names all of its kind"
            );
            return Ok(());
        }
        Err(self.keys.problem(format!(
            "{plain} is not encrypted, and a key is configured: `wal-archiver key encrypt` encrypts what is there; without \
             it, encrypt under a new --cluster name or in another repository"
        )))
    }

    /// Refuses to create a data key in a cluster that has encrypted objects and no data key: its
    /// keys are lost, and with a new one the objects would be taken for damaged.
    fn refuse_lost_keys(&self) -> Result<()> {
        self.first_encrypted()?.map_or(Ok(()), |object| {
            Err(self.keys.problem(format!(
                "{object} is encrypted, and every copy of the wrapped data keys is lost: {}",
                self.keys.remedy()
            )))
        })
    }

    fn first_encrypted(&self) -> Result<Option<String>> {
        let mut encrypted = None;
        self.store().list(&self.keys.root, &mut |object| {
            if object.key.ends_with(SUFFIX) {
                encrypted = Some(object.key);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        Ok(encrypted)
    }

    fn converting(&self) -> MutexGuard<'_, Option<Instant>> {
        let converting = self.converting.lock();
        converting.unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if a conversion has not encrypted this object yet.
    fn is_still_plain(&self, key: &str) -> Result<bool> {
        Ok(self.accepts_plain()? && self.store().head(key)?.is_some())
    }

    fn range_of_encrypted(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let name = stored(key);
        let damaged = |error: SealError| self.damaged(key, error.to_string());
        let header = match self.store().get_range(&name, 0..HEADER_BYTES) {
            Ok(header) => header,
            Err(error) if error.is_not_found() => return Err(self.plain_name(error)),
            Err(error) => match self.store().head(&name)? {
                Some(object) if object.size < HEADER_BYTES => {
                    return Err(damaged(SealError::NotEncrypted));
                }
                _ => return Err(error),
            },
        };
        let header = Header::parse(&header).map_err(damaged)?;
        if range.start > range.end || range.end > header.plain_bytes {
            return Err(self.damaged(
                key,
                format!(
                    "bytes {} to {} are not inside of its {}",
                    range.start, range.end, header.plain_bytes
                ),
            ));
        }
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let (first, place) = header.place(&range);
        if header.stored_bytes().is_none() || place.is_empty() {
            return Err(self.damaged(key, "its header names an impossible length".to_owned()));
        }
        let frames = match self.store().get_range(&name, place) {
            Ok(frames) => frames,
            Err(error) => {
                self.check_length(key, &header)?;
                return Err(self.plain_name(error));
            }
        };
        let data = self.reader(header.data_key, key)?;
        let plain = header
            .open_frames(&data, key, first, &frames)
            .map_err(damaged)?;
        // The first byte of the first frame that was read.
        let begin = object::frame_start(first);
        let inside = |at: u64| usize::try_from(at - begin).unwrap_or(usize::MAX);
        let wanted = plain.get(inside(range.start)..inside(range.end));
        let wanted = wanted.ok_or_else(|| damaged(SealError::Frame(first)))?;
        Ok(Bytes::copy_from_slice(wanted))
    }

    fn store(&self) -> &dyn ObjectStore {
        &*self.keys.store
    }

    fn known(&self) -> MutexGuard<'_, Option<Keys>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the data key for new objects. A new first key creates a new data key, so an older
    /// key cannot decrypt objects from then on.
    fn writer(&self) -> Result<Arc<DataKey>> {
        let mut known = self.known();
        let first = self.keys.ring.first().id;
        let keys = match known.take() {
            Some(keys) => keys,
            None => self.keys.load()?,
        };
        self.keys.check(&keys)?;
        if let Some(data) = keys.made_by(first) {
            *known = Some(keys);
            return Ok(data);
        }
        if keys.is_empty() {
            // A data key marks the cluster as encrypted, so none may be created where the cluster
            // is archived without encryption. `list` fails in that case.
            drop(known);
            self.list(&format!("{}epoch", self.keys.root), &mut |_| {
                ControlFlow::Break(())
            })?;
            self.refuse_lost_keys()?;
            known = self.known();
            // Another thread may have created it meanwhile.
            if let Some(data) = known.as_ref().and_then(|keys| keys.made_by(first)) {
                return Ok(data);
            }
        }
        let made = self.keys.make()?;
        *known = Some(self.keys.load()?);
        Ok(Arc::new(made))
    }

    /// Returns the data key that an object names. Another archiver may have created it since the
    /// keys were read.
    fn reader(&self, id: DataKeyId, name: &str) -> Result<Arc<DataKey>> {
        let mut known = self.known();
        if let Some(data) = known.as_ref().and_then(|keys| keys.open(id)) {
            return Ok(data);
        }
        let keys = self.keys.load()?;
        let data = keys.open(id);
        let closed = if keys.is_closed(id) {
            self.keys.check(&keys)
        } else {
            Ok(())
        };
        let problem = match keys.problem_of(id) {
            Some(problem) => format!("its data key {id} is lost: {problem}"),
            None => format!(
                "it names data key {id}, which does not exist: {}",
                self.keys.remedy()
            ),
        };
        *known = Some(keys);
        closed?;
        data.ok_or_else(|| self.damaged(name, problem))
    }

    fn seal(&self, key: &str, body: &[u8]) -> Result<Vec<u8>> {
        let data = self.writer()?;
        let mut salt = [0; 32];
        self.keys.random(&mut salt)?;
        object::seal(&data, &salt, key, body).map_err(|error| self.keys.problem(error.to_string()))
    }

    fn damaged(&self, name: &str, problem: String) -> Error {
        Error::Damaged {
            key: name.to_owned(),
            url: self.url(),
            problem,
        }
    }

    fn plain_name(&self, error: Error) -> Error {
        match error {
            Error::NotFound { key, url } => Error::NotFound {
                key: key.strip_suffix(SUFFIX).unwrap_or(&key).to_owned(),
                url,
            },
            error => error,
        }
    }

    /// Checks the object's length against its header after a range of it could not be read.
    fn check_length(&self, name: &str, header: &Header) -> Result<()> {
        let expected = header.stored_bytes().unwrap_or(u64::MAX);
        match self.store().head(&stored(name))? {
            Some(object) if object.size != expected => {
                let found = object.size;
                let problem = SealError::Length { expected, found }.to_string();
                Err(self.damaged(name, problem))
            }
            _ => Ok(()),
        }
    }

    /// Decrypts a whole object.
    fn open(&self, key: &str, object: &[u8]) -> Result<Bytes> {
        let damaged = |error: SealError| self.damaged(key, error.to_string());
        let header = Header::parse(object).map_err(damaged)?;
        let data = self.reader(header.data_key, key)?;
        let plain = object::open(&header, &data, key, object).map_err(damaged)?;
        Ok(plain.into())
    }
}

fn stored(name: &str) -> String {
    format!("{name}{SUFFIX}")
}

impl ObjectStore for EncryptedStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        if self.is_still_plain(key)? {
            return Ok(PutOutcome::AlreadyExists);
        }
        self.store()
            .put_if_absent(&stored(key), &self.seal(key, body)?)
    }

    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        if self.is_still_plain(key)? {
            return Ok(PutOutcome::AlreadyExists);
        }
        self.store()
            .put_proved(&stored(key), &self.seal(key, body)?)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.in_either_form(|| self.get_encrypted(key), || self.store().get(key))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.in_either_form(
            || self.range_of_encrypted(key, range.clone()),
            || self.store().get_range(key, range.clone()),
        )
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        let encrypted = || {
            let object = self.store().head(&stored(key))?;
            Ok::<_, Error>(object.map(|object| ObjectMeta {
                key: key.to_owned(),
                size: object::plain_bytes(object.size).unwrap_or(0),
            }))
        };
        let first = encrypted()?;
        if first.is_some() || !self.accepts_plain()? {
            return Ok(first);
        }
        match self.store().head(key)? {
            None => encrypted(),
            plain => Ok(plain),
        }
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        // Without its suffix a name sorts differently.
        let mut objects = BTreeMap::new();
        let (mut plain, mut still_plain, mut is_encrypted) = (None, Vec::new(), false);
        let accepts_plain = self.accepts_plain()?;
        // A listing of a folder may miss an object that is converted meanwhile in both forms. The
        // second listing finds its encrypted form.
        for _ in 0..if accepts_plain { 2 } else { 1 } {
            self.store().list(prefix, &mut |object| {
                match object.key.strip_suffix(SUFFIX) {
                    Some(key) => {
                        is_encrypted |= self.is_epoch(key);
                        let size = object::plain_bytes(object.size).unwrap_or(0);
                        objects.insert(key.to_owned(), size);
                    }
                    None if accepts_plain
                        && (self.keys.is_wrapped_key(&object.key) || self.is_mark(&object.key)) => {
                    }
                    None if accepts_plain => still_plain.push(object),
                    None if self.is_epoch(&object.key) => plain = Some(object.key),
                    None => {}
                }
                ControlFlow::Continue(())
            })?;
        }
        if let Some(plain) = plain.filter(|_| !is_encrypted) {
            self.refuse_plain(&plain)?;
        }
        for object in still_plain {
            objects.entry(object.key).or_insert(object.size);
        }
        for (key, size) in objects {
            if visit(ObjectMeta { key, size }).is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Leaves out the folders of the data keys, which belong to the store and not to the cluster.
    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let mut names = self.store().folders(prefix)?;
        if prefix == self.keys.root {
            names.retain(|name| !keys::FOLDERS.contains(&name.as_str()));
        }
        Ok(names)
    }

    fn delete(&self, key: &str) -> Result<()> {
        let mut known = self.known();
        if known.is_none() {
            *known = Some(self.keys.load()?);
        }
        if let Some(keys) = known.as_ref() {
            self.keys.check(keys)?;
        }
        drop(known);
        // In this order the conversion of this object cannot leave an encrypted form behind.
        if self.accepts_plain()? {
            self.store().delete(key)?;
        }
        self.store().delete(&stored(key))
    }

    fn ready_to_write(&self) -> Result<()> {
        self.store().ready_to_write()?;
        self.check_keys()
    }

    fn url(&self) -> String {
        self.store().url()
    }

    fn exists(&self) -> Result<bool> {
        self.store().exists()
    }

    fn create_place(&self) -> Result<()> {
        self.store().create_place()
    }

    fn witness(&self, key: &str) -> Result<Option<Witness>> {
        match self.store().witness(&stored(key))? {
            None if self.accepts_plain()? => self.store().witness(key),
            witness => Ok(witness),
        }
    }

    fn expect_new(&self) {
        self.store().expect_new();
    }

    fn pin(&self, pin: Pin) {
        self.store().pin(pin);
    }

    fn confirm(&self) -> Result<()> {
        self.store().confirm()
    }

    fn confirm_free(&self) -> Result<()> {
        self.store().confirm_free()
    }

    fn put_back_keys(&self) -> Result<Vec<String>> {
        // Locked only for the copy: a store that does not answer must not keep requests waiting.
        let known = self.known().clone();
        known.map_or_else(|| Ok(Vec::new()), |keys| self.keys.put_back(&keys))
    }

    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        Ok(self.get(key)? == body)
    }

    fn get_sound(&self, key: &str, sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        let is_sound = |object: &Bytes| self.open(key, object).is_ok_and(|plain| sound(&plain));
        let encrypted = || {
            let object = self.store().get_sound(&stored(key), &is_sound);
            self.open(key, &object.map_err(|error| self.plain_name(error))?)
        };
        self.in_either_form(encrypted, || self.store().get_sound(key, sound))
    }

    fn lock(&self, key: &str, span: LockSpan) -> Result<LockOutcome> {
        self.store().lock(&stored(key), span)
    }
}
