//! The newest sealed segment that this host stored, for programs that do not read the catalog.
//!
//! `{spool}/{cluster}/newest_segment.json` is replaced whenever a segment is stored. It is only
//! evidence, so it is not synchronized to disk: after a crash it may name an older segment.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use super::{Loss, LossRecord, Missing};
use crate::{Error, Repository, Result, access, durable};

const NEWEST_FILE: &str = "newest_segment.json";
/// The version of the file.
const FORMAT_VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Newest {
    /// Always [`FORMAT_VERSION`].
    format_version: u32,
    /// The segment, as the loss that it would be.
    segment: Loss,
}

impl LossRecord {
    pub(super) fn newest_file(&self) -> PathBuf {
        self.directory.join(NEWEST_FILE)
    }

    /// Records the segment that was just stored, unless a newer one is recorded. A failure is only
    /// logged.
    pub fn note_newest(&self, segment: &Loss) {
        let is_known = self.newest().is_some_and(|known| {
            known.system() == segment.system() && known.wal() >= segment.wal()
        });
        if !is_known && let Err(error) = self.put_newest(segment) {
            tracing::debug!(event = "newest_not_recorded", %error, "the newest segment is not recorded");
        }
    }

    fn put_newest(&self, segment: &Loss) -> Result<()> {
        let path = self.newest_file();
        let json = serde_json::to_vec_pretty(&Newest {
            format_version: FORMAT_VERSION,
            segment: segment.clone(),
        });
        let json = json.map_err(|error| Error::store("write", &path)(io::Error::other(error)))?;
        durable::create_dir_all(&self.directory)?;
        let file = tempfile::Builder::new()
            .prefix(".tidemark-")
            .tempfile_in(&self.directory)
            .map_err(Error::store("write", &path))?;
        File::open(&self.directory)
            .and_then(|directory| access::inherit(file.as_file(), directory))
            .and_then(|()| fs::write(file.path(), json))
            .map_err(Error::store("write", &path))?;
        file.persist(&path)
            .map_err(|error| Error::store("rename", &path)(error.error))?;
        Ok(())
    }

    /// Returns the recorded segment, as the loss that it would be. `None` if there is no record.
    #[must_use]
    pub fn newest(&self) -> Option<Loss> {
        let json = fs::read(self.newest_file()).ok()?;
        let newest: Newest = serde_json::from_slice(&json).ok()?;
        Some(newest.segment)
    }

    /// Checks that the repository holds the newest segment that this host stored. Costs one request
    /// for the metadata of an object.
    ///
    /// # Errors
    /// [`Error::OlderState`] if it does not; errors of the requests.
    pub fn check_newest(&self, repository: &Repository) -> Result<()> {
        let newest = self.newest();
        newest.map_or(Ok(()), |newest| self.check_held(repository, &newest))
    }

    /// Checks that the repository holds the newest segment or tail. What expired or was accepted as
    /// lost does not count, nor does a missing object while one of several places is away.
    ///
    /// # Errors
    /// As [`LossRecord::check_newest`].
    pub fn check_held(&self, repository: &Repository, newest: &Loss) -> Result<()> {
        let (Some(system), Some(size)) = (newest.system(), newest.segment_size()) else {
            return Ok(());
        };
        let is_held = match repository.holds_lost(newest) {
            Err(error) if error.is_transient() && repository.is_partly_away() => true,
            held => held?,
        };
        if is_held {
            return Ok(());
        }
        let is_hidden = repository.expired(system)?.hides(&newest.key(), size);
        let is_accepted = || self.is_accepted(newest).unwrap_or_default();
        if is_hidden || repository.is_partly_away() || is_accepted() {
            return Ok(());
        }
        let missing = Missing {
            losses: vec![newest.clone()],
            newest: Some(newest.clone()),
        };
        missing.older_state(repository).map_or(Ok(()), Err)
    }
}
