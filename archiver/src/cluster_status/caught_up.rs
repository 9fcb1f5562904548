//! The last times at which everything was held ([`CaughtUp`]), kept across restarts.
//!
//! The monitor replaces `{spool}/{cluster}/caught_up.json` every few seconds without an fsync. If a
//! power loss removes the file, the first age counts from the restart. An old file makes that age
//! greater.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use wal_format::PgTimestamp;

const FILE: &str = "caught_up.json";

/// The last time at which each tier held everything that the server had flushed, by this host's
/// clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaughtUp {
    /// The spool.
    pub(crate) local: Option<PgTimestamp>,
    /// The repository.
    pub(crate) remote: Option<PgTimestamp>,
}

impl CaughtUp {
    /// Reads the times that an earlier run wrote to the cluster's directory. Empty if the file
    /// cannot be read or parsed.
    pub(crate) fn read(directory: &Path) -> Self {
        let content = fs::read(directory.join(FILE)).unwrap_or_default();
        serde_json::from_slice(&content).unwrap_or_default()
    }

    /// Replaces the file by a rename, without an fsync.
    pub(crate) fn write(&self, directory: &Path) -> std::io::Result<()> {
        let content = serde_json::to_vec(self).unwrap_or_default();
        let new = directory.join(format!("{FILE}.new"));
        fs::write(&new, content)?;
        rustix::fs::rename(&new, directory.join(FILE))?;
        Ok(())
    }
}
