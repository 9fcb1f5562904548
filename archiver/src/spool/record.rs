//! The end of the archive while the spool holds no WAL ([`SpoolRecord`]), for a start at which the
//! repository is not reachable.
//!
//! The file `{spool}/{cluster}/position.json` is replaced whenever the last file leaves the spool.
//! Invariant: everything of the branch before `end_lsn` is in the repository. If the spool holds
//! WAL that ends later, its content counts.

use std::{fs, io, path::Path};

use repository::ClusterIdentity;
use serde::{Deserialize, Serialize};
use wal_format::{Branch, Lsn};

use super::{Spool, files::of_the_disk};
use crate::error::{Error, Result};

const RECORD_FILE: &str = "position.json";

/// The identity of the archived WAL, and its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolRecord {
    /// The identity of the cluster.
    pub cluster: ClusterIdentity,
    /// The branch that was streamed.
    pub branch: Branch,
    /// The end of the branch's WAL in the repository.
    pub end_lsn: Lsn,
}

impl Spool {
    /// Returns the record. `None` if none was written, or if it cannot be parsed: the caller then
    /// waits for the repository.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn record(&self) -> Result<Option<SpoolRecord>> {
        let path = self.directory().join(RECORD_FILE);
        match fs::read(&path) {
            Ok(content) => Ok(serde_json::from_slice(&content).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    /// Writes the record durably.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_record(&self, record: &SpoolRecord) -> Result<()> {
        let path = self.directory().join(RECORD_FILE);
        let content = serde_json::to_vec_pretty(record).unwrap_or_default();
        repository::durable::replace(&path, &content).map_err(of_the_disk)
    }
}

/// Removes the record of `{spool}/{cluster}`, because the archive that it describes is not
/// continued.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn remove_record(cluster_directory: &Path) -> Result<()> {
    repository::durable::remove(&cluster_directory.join(RECORD_FILE)).map_err(of_the_disk)
}
