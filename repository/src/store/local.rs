//! A folder as an object store: one file per object, written beside its name and linked to it when durable.

use std::{
    fs::{self, File},
    io::{self, Write},
    ops::{ControlFlow, Range},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use super::{ObjectMeta, ObjectStore, PutOutcome, is_sound_key};
use crate::{CrashPoint, Error, Result, durable};

/// Where files are written before they have a name. On the same file system, and no key can begin with a dot.
const TEMPORARY: &str = ".tidemark-tmp";
/// A temporary file as old as this was left by a crash: no put takes a day.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 3600);

/// Objects in a folder.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
}

impl LocalStore {
    /// Opens a folder, creating it when missing, and sweeps what a crash left.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn open(root: &Path) -> Result<Self> {
        let store = Self {
            root: root.to_owned(),
        };
        durable::create_dir_all(root)?;
        Ok(store)
    }

    /// The folder of temporary files, created at the first write: a reader may have no right to write.
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

    /// The file of a key. Keys come from our own types, but also from listings and tests: none may leave the folder.
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
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory if self.root.is_dir() => {
                Error::NotFound {
                    key: key.to_owned(),
                    url: self.url(),
                }
            }
            _ => Error::store(action, path)(error),
        }
    }
}

impl ObjectStore for LocalStore {
    fn put_if_absent(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        let path = self.path(key)?;
        let directory = path.parent().unwrap_or(&self.root);
        if !directory.is_dir() {
            durable::create_dir_all(directory)?;
        }
        let temporary = tempfile::Builder::new()
            .tempfile_in(self.temporary()?)
            .and_then(|file| CrashPoint::StoreFileCreated.reach().map(|()| file))
            .map_err(Error::store("create a file for", &path))?;
        let mut file = temporary.as_file();
        file.write_all(body)
            .and_then(|()| CrashPoint::StoreFileWritten.reach())
            .map_err(Error::store("write", &path))?;
        file.sync_all()
            .and_then(|()| CrashPoint::StoreFileSynced.reach())
            .map_err(Error::store("fsync", &path))?;
        let linked = fs::hard_link(temporary.path(), &path);
        match linked.and_then(|()| CrashPoint::StoreFileLinked.reach()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // It is durable already, or its writer is about to make it so; our caller compares and may rely on it.
                durable::sync_dir(directory)?;
                return Ok(PutOutcome::AlreadyExists);
            }
            Err(error) => return Err(Error::store("create", path)(error)),
        }
        durable::sync_dir(directory)?;
        let reached = CrashPoint::StoreFileDurable.reach();
        reached.map_err(Error::store("create", path))?;
        Ok(PutOutcome::Created)
    }

    /// What was fsynced needs no other proof.
    fn put_proved(&self, key: &str, body: &[u8]) -> Result<PutOutcome> {
        self.put_if_absent(key, body)
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        let path = self.path(key)?;
        fs::read(&path)
            .map(Bytes::from)
            .map_err(|error| self.failed("read", key, path, error))
    }

    /// Piece by piece: as a whole it would take fresh memory, which costs more than the comparison.
    fn holds(&self, key: &str, body: &[u8]) -> Result<bool> {
        const PIECE_BYTES: usize = 128 << 10;
        let path = self.path(key)?;
        let compare = || {
            let file = File::open(&path)?;
            if file.metadata()?.len() != body.len() as u64 {
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
        let read = File::open(&path).and_then(|file| {
            let end = file.metadata()?.len();
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
        // Whole directories of the prefix are entered directly; the rest is a filter.
        let (directory, _) = prefix.rsplit_once('/').unwrap_or(("", prefix));
        let start = if directory.is_empty() {
            self.root.clone()
        } else {
            self.path(directory)?
        };
        let _ = walk(&start, directory, prefix, visit)?;
        Ok(())
    }

    fn folders(&self, prefix: &str) -> Result<Vec<String>> {
        let Some(directory) = prefix.strip_suffix('/') else {
            return Ok(Vec::new());
        };
        let directory = self.path(directory)?;
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::store("list", &directory))?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::store("list", &directory))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let key = format!("{prefix}{name}/");
            // A directory stays when its last object was removed; it is not a folder of a bucket.
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
        Ok(names)
    }

    fn delete(&self, key: &str) -> Result<()> {
        durable::remove(&self.path(key)?)
    }

    fn ready_to_write(&self) -> Result<()> {
        self.temporary().map(drop)
    }

    fn url(&self) -> String {
        format!("file://{}", self.root.display())
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
            // Deleted since it was listed.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::store::testing::conformance;

    #[test]
    fn the_folder_passes_the_conformance_suite() {
        let directory = tempfile::tempdir().expect("a directory");
        let store: Arc<dyn ObjectStore> =
            Arc::new(LocalStore::open(directory.path()).expect("a store"));
        conformance(&store, 20);
    }
}
