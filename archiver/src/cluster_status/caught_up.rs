//! [`CaughtUp`]: the last times at which everything was held, kept across restarts.
//!
//! `{spool}/{cluster}/caught_up.json`, replaced every few seconds by the monitor. It is not fsynced:
//! one that is lost makes the first age after a power loss count from the restart, and one that is
//! old makes it greater.

use std::{fs, path::Path};

use serde::{Deserialize, Serialize};
use wal_format::PgTimestamp;

const FILE: &str = "caught_up.json";

/// When each tier last held everything that the server had flushed, by this host's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaughtUp {
    /// The spool.
    pub(crate) local: Option<PgTimestamp>,
    /// The repository.
    pub(crate) remote: Option<PgTimestamp>,
}

impl CaughtUp {
    /// Reads what an earlier run kept in the cluster's directory; nothing where that cannot be
    /// understood.
    pub(crate) fn read(directory: &Path) -> Self {
        let content = fs::read(directory.join(FILE)).unwrap_or_default();
        serde_json::from_slice(&content).unwrap_or_default()
    }

    /// Replaces what is kept.
    pub(crate) fn write(&self, directory: &Path) -> std::io::Result<()> {
        let content = serde_json::to_vec(self).unwrap_or_default();
        let new = directory.join(format!("{FILE}.new"));
        fs::write(&new, content)?;
        rustix::fs::rename(&new, directory.join(FILE))?;
        Ok(())
    }
}
