//! The scratch directory of a drill.
//!
//! Its name is that of the cluster, so a drill finds what a killed one has left. It is locked with
//! `flock` while a drill runs. Invariant: only a directory with [`MARKER`] in it, or an empty one,
//! is ever removed.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, OFlags, flock},
    process::{Pid, Signal, getuid, kill_process},
};
use wal_format::{BackupId, ClusterName, SystemIdentifier};

use crate::{Error, Result, execute::lock_holder};

/// The file that marks a directory as a drill's.
const MARKER: &str = "TIDEMARK_DRILL";
const MARKER_TEXT: &str = "Made by `pitr-restore drill`, which removes this directory.\n";
/// The number of times that the directory is opened again because another drill has just removed
/// it.
const TRIES_MAX: u32 = 100;
/// The time in which a server ends by itself after SIGQUIT.
const QUIT_MAX: Duration = Duration::from_secs(30);
/// The time in which files appear again in a directory that is removed: a thread that copies has
/// not ended yet.
const REMOVE_MAX: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// A locked scratch directory. It is removed when this value is dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    /// The copy's directory, which stays.
    kept: Option<PathBuf>,
    _lock: File,
    is_removed: bool,
}

impl Scratch {
    /// Creates and locks the scratch directory below `base`, and removes what a killed drill of the
    /// same cluster has left in it.
    ///
    /// # Errors
    /// [`Error::Usage`] if another drill runs, and for a directory that is not a drill's.
    pub(crate) fn take(
        base: &Path,
        cluster: &ClusterName,
        system: SystemIdentifier,
        tell: &dyn Fn(&str),
    ) -> Result<Self> {
        let path = base.join(format!("tidemark-drill-{cluster}-{system}"));
        fs::create_dir_all(base).map_err(Error::io("create directory", base))?;
        for _ in 0..TRIES_MAX {
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                created => created.map_err(Error::io("create directory", &path))?,
            }
            let Some(lock) = lock(&path)? else {
                continue;
            };
            let scratch = Self {
                kept: None,
                _lock: lock,
                // Until the marker is known to be ours, nothing is removed.
                is_removed: true,
                path,
            };
            return scratch.prepared(tell);
        }
        Err(Error::usage(format!(
            "{} is removed again and again; name another directory with --scratch",
            path.display()
        )))
    }

    fn prepared(mut self, tell: &dyn Fn(&str)) -> Result<Self> {
        let path = &self.path;
        let marker = path.join(MARKER);
        let is_empty = names(path)?.is_empty();
        // A drill that was killed while it wrote the marker left a part of it.
        let is_ours = fs::read_to_string(&marker).is_ok_and(|text| MARKER_TEXT.starts_with(&text));
        if !is_empty && !is_ours {
            return Err(Error::usage(format!(
                "{} contains files and no marker of a drill, so nothing of it is touched: remove it, or name another directory \
                 with --scratch",
                path.display()
            )));
        }
        if !is_empty {
            tell(&format!(
                "a drill was killed here: what it left in {} is removed",
                path.display()
            ));
            end_processes(path);
            empty(path)?;
        }
        fs::write(&marker, MARKER_TEXT).map_err(Error::io("write", &marker))?;
        self.is_removed = false;
        Ok(self)
    }

    /// Returns the directory for the copy. With `keep`, it is a directory next to the scratch
    /// directory that stays.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn directory(&mut self, keep: bool, id: &BackupId) -> Result<PathBuf> {
        let directory = if keep {
            self.path
                .with_file_name(format!("tidemark-drill-kept-{id}"))
        } else {
            self.path.join("drill")
        };
        DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(Error::io("create directory", &directory))?;
        if keep {
            self.kept = Some(directory.clone());
        }
        Ok(directory)
    }

    /// Ends every process of the copy, and removes the directory.
    ///
    /// # Errors
    /// [`Error::Io`] with the file that cannot be removed.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.is_removed = true;
        remove(&self.path, self.kept.as_deref())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.is_removed
            && let Err(error) = remove(&self.path, self.kept.as_deref())
        {
            tracing::warn!(%error, "the scratch directory of the drill stays; the next drill removes it");
        }
    }
}

/// Locks the directory. `None` if it was removed meanwhile.
fn lock(path: &Path) -> Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed())
        .open(path);
    let file = match opened {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::io("open", path))?,
    };
    let metadata = file.metadata().map_err(Error::io("read", path))?;
    if metadata.uid() != getuid().as_raw() || metadata.mode() & 0o022 != 0 {
        return Err(Error::usage(format!(
            "{} belongs to another user or can be written by others; name another directory with --scratch",
            path.display()
        )));
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let holder = lock_holder(&file).map_or_else(
                || "another process".to_owned(),
                |process| format!("process {process}"),
            );
            return Err(Error::usage(format!(
                "another drill of this cluster is under way ({holder} holds the lock on {}); wait until it has ended",
                path.display()
            )));
        }
        Err(error) => {
            let error = io::Error::from(error);
            return Err(Error::usage(format!(
                "{} cannot be locked ({error}), so two drills could meet there; name a directory of a local file system with \
                 --scratch",
                path.display()
            )));
        }
    }
    // Another drill may have removed the directory between the opening and the lock.
    let is_same = fs::symlink_metadata(path)
        .is_ok_and(|now| (now.dev(), now.ino()) == (metadata.dev(), metadata.ino()));
    Ok(is_same.then_some(file))
}

fn remove(path: &Path, kept: Option<&Path>) -> Result<()> {
    end_processes(path);
    if let Some(kept) = kept {
        end_processes(kept);
        // Fails, as intended, if the directory is not empty: a drill that was refused leaves none.
        drop(fs::remove_dir(kept));
    }
    empty(path)?;
    let marker = path.join(MARKER);
    fs::remove_file(&marker).map_err(Error::io("remove", &marker))?;
    fs::remove_dir(path).map_err(Error::io("remove", path))
}

/// Removes everything in the directory except the marker. A kill in between leaves the marker, so
/// that the next drill continues.
fn empty(path: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        let mut failure = None;
        for name in names(path)? {
            let entry = path.join(&name);
            let is_directory = fs::symlink_metadata(&entry).is_ok_and(|found| found.is_dir());
            let removed = if is_directory {
                fs::remove_dir_all(&entry)
            } else if name == MARKER {
                Ok(())
            } else {
                fs::remove_file(&entry)
            };
            match removed {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    failure = Some(Error::io("remove", entry)(error));
                }
                _ => {}
            }
        }
        match failure {
            None => return Ok(()),
            Some(error) if began.elapsed() > REMOVE_MAX => return Err(error),
            Some(_) => thread::sleep(POLL),
        }
    }
}

fn names(path: &Path) -> Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(path).map_err(Error::io("read directory", path))?;
    let names = entries.map(|entry| entry.map(|entry| entry.file_name()));
    names
        .collect::<io::Result<_>>()
        .map_err(Error::io("read directory", path))
}

/// Ends the server and the programs of a drill that run below `path`. Only programs of PostgreSQL
/// and our own are ended: a user's shell may be there, too.
fn end_processes(path: &Path) {
    let Ok(path) = fs::canonicalize(path) else {
        return;
    };
    let running = |only_server: bool| -> Vec<Pid> {
        processes_below(&path)
            .into_iter()
            .filter(|(_, name)| {
                let is_server = name == "postgres";
                let is_ours = name.starts_with("pg_") || name.starts_with("pitr-restore");
                is_server || (!only_server && is_ours)
            })
            .map(|(pid, _)| pid)
            .collect()
    };
    let send = |pids: Vec<Pid>, signal| {
        for pid in pids {
            if let Err(error) = kill_process(pid, signal) {
                tracing::debug!(%error, "a process of the drill had ended already");
            }
        }
    };
    // A server that ends by itself removes its shared memory.
    send(running(true), Signal::QUIT);
    let began = Instant::now();
    while !running(true).is_empty() && began.elapsed() < QUIT_MAX {
        thread::sleep(POLL);
    }
    let began = Instant::now();
    while !running(false).is_empty() && began.elapsed() < QUIT_MAX {
        send(running(false), Signal::KILL);
        thread::sleep(POLL);
    }
}

/// Returns the processes whose working directory is below `path`, with the names of their programs,
/// without this process and without those that have ended.
fn processes_below(path: &Path) -> Vec<(Pid, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let pid = Pid::from_raw(pid).filter(|pid| *pid != rustix::process::getpid())?;
            let directory = fs::read_link(entry.path().join("cwd")).ok()?;
            if !directory.starts_with(path) {
                return None;
            }
            // The link `exe` has another name after an upgrade of the program.
            let name = fs::read_to_string(entry.path().join("comm")).ok()?;
            Some((pid, name.trim().to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn take(base: &Path) -> Result<Scratch> {
        let cluster = "main".parse().expect("a name");
        Scratch::take(base, &cluster, SystemIdentifier(7), &|_| {})
    }

    #[test]
    fn one_drill_at_once_and_nothing_is_left() {
        let base = tempfile::tempdir().expect("a directory");
        let is_empty = || names(base.path()).expect("it is read").is_empty();
        let mut scratch = take(base.path()).expect("it is free");
        let second = take(base.path()).expect_err("it is locked").to_string();
        assert!(
            second.contains("another drill of this cluster is under way"),
            "{second}"
        );
        let id = "20261121T101500Z-9f3c".parse().expect("an ID");
        let copy = scratch.directory(false, &id).expect("a directory");
        fs::create_dir(copy.join("data")).expect("a directory");
        scratch.remove().expect("it is removed");
        assert!(is_empty());
        // Also without a call, as after a panic.
        drop(take(base.path()).expect("it is free"));
        assert!(is_empty());
    }

    #[test]
    fn only_what_a_drill_has_marked_is_removed() {
        let base = tempfile::tempdir().expect("a directory");
        let path = base.path().join("tidemark-drill-main-7");
        let own = path.join("drill/data");
        // A killed drill.
        fs::create_dir_all(&own).expect("a directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("chmod");
        fs::write(path.join(MARKER), MARKER_TEXT).expect("a marker");
        drop(take(base.path()).expect("it was a drill's"));
        assert!(!path.exists());
        // Somebody's files.
        fs::create_dir_all(&own).expect("a directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("chmod");
        for marker in [None, Some("another text")] {
            if let Some(text) = marker {
                fs::write(path.join(MARKER), text).expect("a file");
            }
            let refused = take(base.path()).expect_err("it is not ours").to_string();
            assert!(refused.contains("no marker of a drill"), "{refused}");
            assert!(own.exists());
        }
        // A link to them.
        let elsewhere = base.path().join("elsewhere");
        #[expect(clippy::disallowed_methods, reason = "a test's directory")]
        fs::rename(&path, &elsewhere).expect("moved");
        std::os::unix::fs::symlink(&elsewhere, &path).expect("a link");
        take(base.path()).expect_err("it is a link");
        assert!(elsewhere.join("drill/data").exists());
    }
}
