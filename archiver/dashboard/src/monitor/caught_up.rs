//! Keeps the last times at which everything was held ([`CaughtUp`]) across restarts.
//!
//! The monitor replaces `{spool}/{cluster}/caught_up.json` every few seconds without an fsync. If a
//! power loss removes the file, the first age counts from the restart. An old file makes that age
//! greater.

use std::{fs, io, path::Path};

use status::cluster_status::CaughtUp;

const FILE: &str = "caught_up.json";

/// Reads the times that an earlier run wrote to the cluster's directory. Empty if the file
/// cannot be read or parsed.
#[must_use]
pub fn read(directory: &Path) -> CaughtUp {
    let content = fs::read(directory.join(FILE)).unwrap_or_default();
    serde_json::from_slice(&content).unwrap_or_default()
}

/// Replaces the file by a rename, without an fsync.
pub(super) fn write(times: &CaughtUp, directory: &Path) -> io::Result<()> {
    let content = serde_json::to_vec(times).unwrap_or_default();
    let new = directory.join(format!("{FILE}.new"));
    fs::write(&new, content)?;
    rustix::fs::rename(&new, directory.join(FILE))?;
    Ok(())
}
