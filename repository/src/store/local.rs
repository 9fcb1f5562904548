//! A folder as an object store: one file per object, written under a temporary name and linked to
//! its own name once it is durable.
//!
//! Invariant: a write happens below a directory handle of the folder, which contained a witness
//! when the handle was opened ([`entered`]), and succeeds only if the folder's path still leads to
//! that directory afterwards. A disk may be unmounted at any moment, also lazily: no write then
//! goes to its mount point, and no write counts that went to the hidden disk.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    ops::{ControlFlow, Range},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use rustix::{
    fs::{Access, OFlags, access},
    io::Errno,
};

use self::entered::{DurableDirectories, Entered};
use super::{
    LockOutcome, LockSpan, ObjectMeta, ObjectStore, Pin, PutOutcome, Witness,
    bounds::{object_bytes_max, too_long},
    is_sound_key, plain,
};
use crate::{CrashPoint, Error, Result, access::FolderAccess, durable};

mod entered;
#[cfg(test)]
mod tests;

/// The directory of files that do not have their final name yet. It is on the same file system, and
/// no key can begin with a dot.
const TEMPORARY: &str = ".tidemark-tmp";
/// A temporary file of this age was left by a crash: no put takes a day.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 3600);

/// Objects in a folder.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    pin: RwLock<Option<Pin>>,
    /// True if a folder that does not exist counts as empty, because no archive is known to exist
    /// there.
    is_new: AtomicBool,
    /// The group that shares the folder if this store creates it.
    access: Option<FolderAccess>,
    durable: Mutex<DurableDirectories>,
}

impl LocalStore {
    /// Opens a folder, creating it when missing.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn open(root: &Path) -> Result<Self> {
        durable::create_dir_all(root)?;
        Ok(Self::at(root))
    }

    /// Returns the store of a folder without creating the folder. Only
    /// [`ObjectStore::create_place`] creates it.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            pin: RwLock::default(),
            is_new: AtomicBool::new(false),
            access: None,
            durable: Mutex::default(),
        }
    }

    fn durable(&self) -> MutexGuard<'_, DurableDirectories> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets [`ObjectStore::create_place`] give a group access to the folder.
    pub(crate) fn shared_with(self, access: Option<FolderAccess>) -> Self {
        Self { access, ..self }
    }

    fn pinned(&self) -> Option<Pin> {
        let pin = self.pin.read().unwrap_or_else(PoisonError::into_inner);
        pin.clone()
    }

    /// Returns true if the folder does not exist and nothing is known to have been there.
    fn is_new(&self) -> bool {
        self.is_new.load(Ordering::Relaxed) && matches!(self.exists(), Ok(false))
    }

    /// Returns the error for a folder that cannot be opened as a directory.
    fn cannot_open(&self, error: io::Error) -> Error {
        let absent = matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
        );
        match self.pinned().filter(|_| absent) {
            Some(pin) => pin.gone(
                &self.url(),
                format!("the folder cannot be opened ({error})"),
            ),
            None => Error::store("open", &self.root)(error),
        }
    }

    /// Returns the folder of temporary files. Creates it at the first write, because a reader may
    /// have no permission to write.
    fn temporary(&self) -> Result<PathBuf> {
        let directory = self.root.join(TEMPORARY);
        if directory.is_dir() {
            return Ok(directory);
        }
        durable::create_dir_all(&directory)?;
        Ok(directory)
    }

    /// Removes temporary files that a crash left.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn sweep(&self) -> Result<()> {
        let directory = self.temporary()?;
        for entry in fs::read_dir(&directory).map_err(Error::store("list", &directory))? {
            let entry = entry.map_err(Error::store("list", &directory))?;
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let age = modified
                .ok()
                .and_then(|time| SystemTime::now().duration_since(time).ok());
            if age.is_some_and(|age| age > LEFTOVER_AGE) {
                tracing::warn!(file = %entry.path().display(), "removing what a crash left");
                durable::remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Returns the file of a key. Most keys come from our own types, but some come from listings
    /// and tests. Refuses a key that leads out of the folder.
    fn path(&self, key: &str) -> Result<PathBuf> {
        if is_sound_key(key) {
            return Ok(self.root.join(key));
        }
        let source = io::Error::new(io::ErrorKind::InvalidInput, "not a key of this store");
        Err(Error::Store {
            action: "open",
            path: self.root.join("?"),
            source,
        })
    }

    fn failed(&self, action: &'static str, key: &str, path: PathBuf, error: io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => match self.confirm() {
                Ok(()) if self.root.is_dir() || self.is_new() => Error::NotFound {
                    key: key.to_owned(),
                    url: self.url(),
                },
                Ok(()) => Error::store(action, path)(error),
                Err(gone) => gone,
            },
            io::ErrorKind::InvalidData => Error::Damaged {
                key: key.to_owned(),
                url: self.url(),
                problem: error.to_string(),
            },
            _ => Error::store(action, path)(error),
        }
    }
}

/// Opens an object and returns its length. A FIFO, a socket, a device or a directory is not an
/// object: to read it could wait forever.
///
/// # Errors
/// `InvalidData` for what is not a regular file.
fn open_object(path: &Path) -> io::Result<(File, u64)> {
    let irregular = || {
        let problem = "it is not a regular file; remove it, and bring the object back";
        io::Error::new(io::ErrorKind::InvalidData, problem)
    };
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = match File::options().read(true).custom_flags(flags).open(path) {
        // A socket cannot be opened.
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NXIO) => return Err(irregular()),
        opened => opened?,
    };
    let found = file.metadata()?;
    if found.is_file() {
        Ok((file, found.len()))
    } else {
        Err(irregular())
    }
}

impl ObjectStore for LocalStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let path = self.path(key)?;
        let folder = Entered::open(self)?;
        let directory = folder.create_parent(key)?;
        let mut temporary = folder.temporary()?;
        let created = CrashPoint::StoreFileCreated.reach();
        created.map_err(Error::store("create a file for", &path))?;
        let file = temporary.file();
        file.write_all(body)
            .and_then(|()| CrashPoint::StoreFileWritten.reach())
            .map_err(Error::store("write", &path))?;
        file.sync_all()
            .and_then(|()| CrashPoint::StoreFileSynced.reach())
            .map_err(Error::store("fsync", &path))?;
        let linked = temporary.link(&directory, key);
        let outcome = match linked.and_then(|()| CrashPoint::StoreFileLinked.reach()) {
            Ok(()) => PutOutcome::Created,
            // The object is durable already, or its writer is about to make it so. Our caller
            // compares the bytes and may then rely on the object, so fsync the directory in this
            // case too.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => PutOutcome::AlreadyExists,
            Err(error) => return Err(Error::store("create", path)(error)),
        };
        entered::sync(&directory).map_err(Error::store("fsync the directory of", &path))?;
        if outcome == PutOutcome::Created {
            let reached = CrashPoint::StoreFileDurable.reach();
            reached.map_err(Error::store("create", &path))?;
        }
        // An object that is durable in another directory is not enough: only an object that the
        // path leads to is archived.
        folder.leave()?;
        Ok(outcome)
    }

    /// The fsync is the proof; nothing is read back.
    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.put_if_absent(key, body)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        let path = self.path(key)?;
        let bytes_max = object_bytes_max(key);
        let read = || {
            let (mut file, length) = open_object(&path)?;
            if length > bytes_max {
                return Ok(Err(length));
            }
            let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
            (&mut file).take(bytes_max).read_to_end(&mut bytes)?;
            Ok(Ok(Bytes::from(bytes)))
        };
        match read() {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(length)) => Err(Error::Damaged {
                key: key.to_owned(),
                url: self.url(),
                problem: too_long(length, bytes_max),
            }),
            Err(error) => Err(self.failed("read", key, path, error)),
        }
    }

    /// Compares piece by piece: reading the whole object would take fresh memory, which costs more
    /// than the comparison.
    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        const PIECE_BYTES: usize = 128 << 10;
        let path = self.path(key)?;
        let compare = || {
            let (file, length) = open_object(&path)?;
            if length != body.len() as u64 {
                return Ok(false);
            }
            let mut stored = vec![0; PIECE_BYTES.min(body.len())];
            for (piece, offset) in body.chunks(PIECE_BYTES).zip((0..).step_by(PIECE_BYTES)) {
                let stored = stored.get_mut(..piece.len()).unwrap_or_default();
                file.read_exact_at(stored, offset)?;
                if stored != piece {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        compare().map_err(|error| self.failed("read", key, path.clone(), error))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let path = self.path(key)?;
        let length = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX);
        let read = open_object(&path).and_then(|(file, end)| {
            if range.end > end || range.start > range.end {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the range is not inside",
                ));
            }
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, range.start)?;
            Ok(Bytes::from(bytes))
        });
        read.map_err(|error| self.failed("read", key, path, error))
    }

    fn head(&self, key: &str) -> Result<Option<ObjectMeta>> {
        let path = self.path(key)?;
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Some(ObjectMeta {
                key: key.to_owned(),
                size: metadata.len(),
            })),
            Err(error) => match self.failed("look at", key, path, error) {
                Error::NotFound { .. } => Ok(None),
                error => Err(error),
            },
        }
    }

    fn list(
        &self,
        prefix: &str,
        visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
    ) -> Result<()> {
        if self.is_new() {
            return Ok(());
        }
        if !self.exists()? {
            return Err(self.cannot_open(io::ErrorKind::NotFound.into()));
        }
        // Start in the deepest directory that the prefix names completely; the rest of the prefix
        // is a filter.
        let (directory, _) = prefix.rsplit_once('/').unwrap_or(("", prefix));
        let start = if directory.is_empty() {
            self.root.clone()
        } else {
            self.path(directory)?
        };
        let _ = walk(&start, directory, prefix, visit)?;
        // Objects that were not listed may be hidden below a mount point.
        self.confirm()
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let Some(directory) = prefix.strip_suffix('/') else {
            return Ok(Vec::new());
        };
        if self.is_new() {
            return Ok(Vec::new());
        }
        if !self.exists()? {
            return Err(self.cannot_open(io::ErrorKind::NotFound.into()));
        }
        let directory = self.path(directory)?;
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.confirm()?;
                return Ok(Vec::new());
            }
            entries => entries.map_err(Error::store("list", &directory))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::store("list", &directory))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let key = format!("{prefix}{name}/");
            // A directory remains after its last object was removed. A bucket would not list it as
            // a folder, so neither do we.
            let mut is_empty = true;
            if entry.path().is_dir() && is_sound_key(&name) {
                self.list(&key, &mut |_| {
                    is_empty = false;
                    ControlFlow::Break(())
                })?;
            }
            if !is_empty {
                names.push(name);
            }
        }
        names.sort_unstable();
        // Folders that were not listed may be hidden below a mount point.
        self.confirm()?;
        Ok(names)
    }

    fn delete(&self, key: &str) -> Result<()> {
        let path = self.path(key)?;
        let folder = Entered::open(self)?;
        folder.remove(key).map_err(Error::store("remove", path))
    }

    fn ready_to_write(&self) -> Result<()> {
        if self.exists()? {
            self.confirm()?;
            let probed = Entered::open(self)?.probe();
            return probed.map_err(Error::store("create a file in", &self.root));
        }
        // The folder does not exist yet: the creation of an archive creates it. Check the nearest
        // directory above it.
        let mut above = self.root.ancestors();
        let above = above.find(|path| path.is_dir()).unwrap_or(&self.root);
        access(above, Access::WRITE_OK)
            .map_err(|error| Error::store("create a directory in", above)(error.into()))
    }

    fn url(&self) -> String {
        format!("file://{}", self.root.display())
    }

    fn exists(&self) -> Result<bool> {
        match fs::metadata(&self.root) {
            Ok(metadata) if metadata.is_dir() => Ok(true),
            Ok(_) => Err(self.cannot_open(io::ErrorKind::NotADirectory.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.pinned().is_none() => {
                Ok(false)
            }
            Err(error) => Err(self.cannot_open(error)),
        }
    }

    fn create_place(&self) -> Result<()> {
        durable::create_dir_all(&self.root)?;
        let access = self.access.as_ref();
        access.map_or(Ok(()), |access| access.apply(&self.root))
    }

    fn witness(&self, key: &str) -> Result<Option<Witness>> {
        let stored = Entered::open(self)?.read(key)?;
        Ok(stored.map(|stored| Witness::new(key, &stored)))
    }

    fn expect_new(&self) {
        self.is_new.store(true, Ordering::Relaxed);
    }

    fn pin(&self, pin: Pin) {
        *self.pin.write().unwrap_or_else(PoisonError::into_inner) = Some(pin);
    }

    fn confirm(&self) -> Result<()> {
        if self.pinned().is_none() {
            return Ok(());
        }
        Entered::open(self).map(drop)
    }

    fn confirm_free(&self) -> Result<()> {
        self.confirm()
    }

    fn get_sound(&self, key: &str, _sound: &dyn Fn(&Bytes) -> bool) -> Result<Bytes> {
        self.get(key)
    }

    fn lock(&self, key: &str, _span: LockSpan) -> Result<LockOutcome> {
        plain::cannot_lock(self, key)
    }

    fn put_back_keys(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

fn walk(
    directory: &Path,
    key: &str,
    prefix: &str,
    visit: &mut dyn FnMut(ObjectMeta) -> ControlFlow<()>,
) -> Result<ControlFlow<()>> {
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(ControlFlow::Continue(()));
        }
        Err(error) => return Err(Error::store("list", directory)(error)),
    };
    let mut entries = Vec::new();
    for entry in listing {
        let entry = entry.map_err(Error::store("list", directory))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            // The file was deleted after the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::store("look at", entry.path())(error)),
        };
        let key = if key.is_empty() {
            name
        } else {
            format!("{key}/{name}")
        };
        let key = if metadata.is_dir() {
            format!("{key}/")
        } else {
            key
        };
        entries.push((key, entry.path(), metadata.len()));
    }
    entries.sort();
    for (key, path, size) in entries {
        let flow = if let Some(directory) = key.strip_suffix('/') {
            if !key.starts_with(prefix) && !prefix.starts_with(&key) {
                continue;
            }
            walk(&path, directory, prefix, visit)?
        } else if key.starts_with(prefix) {
            visit(ObjectMeta { key, size })
        } else {
            continue;
        };
        if flow.is_break() {
            return Ok(flow);
        }
    }
    Ok(ControlFlow::Continue(()))
}
