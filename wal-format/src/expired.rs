//! [`Expired`]: `expired/….json` records that backups and WAL are no longer kept. From then on
//! every reader treats them as absent. After a grace period they are removed.
//!
//! Written once, before anything is removed. The union of all stored records applies: an
//! interrupted removal continues from it, and a hole in the WAL that it names is not a gap. Each of
//! several repositories has its own records.

use serde::{Deserialize, Serialize};

use crate::{BackupId, Branch, Lsn, ObjectKey, PgTimestamp, SystemIdentifier};

/// The version that this build writes, and the newest that it reads.
pub const EXPIRED_FORMAT_VERSION: u32 = 1;

/// The data given up by one application of a retention policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expired {
    /// [`EXPIRED_FORMAT_VERSION`].
    pub format_version: u32,
    /// The name, in the form of a backup ID, from the time when it was written.
    pub id: BackupId,
    /// The time of the decision. The grace period begins then.
    pub marked: PgTimestamp,
    /// The time when every named object had been removed. Since then the record is only history.
    #[serde(default)]
    pub swept: Option<PgTimestamp>,
    /// The policy as text.
    pub policy: String,
    /// The base backups.
    pub backups: Vec<ExpiredBackup>,
    /// The WAL, in whole segments.
    pub wal: Vec<ExpiredWal>,
    /// The moments that can no longer be restored.
    pub windows: Vec<ExpiredWindow>,
}

/// A base backup that is no longer kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpiredBackup {
    /// Its name.
    pub id: BackupId,
    /// The time when it was complete.
    pub finished: PgTimestamp,
}

/// WAL that is no longer kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpiredWal {
    /// The branch.
    pub branch: Branch,
    /// The start of a segment.
    pub from_lsn: Lsn,
    /// The end of a segment.
    pub to_lsn: Lsn,
}

/// A range of moments that could be restored until the record was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpiredWindow {
    /// The branch.
    pub branch: Branch,
    /// The start.
    pub from_lsn: Lsn,
    /// The end.
    pub to_lsn: Lsn,
    /// The approximate time of the start: the end of the backup before it.
    pub from: Option<PgTimestamp>,
    /// The approximate time of the end: the end of the backup after it, or the last commit.
    pub to: Option<PgTimestamp>,
}

impl Expired {
    /// Returns the object key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::Expired(system, self.id.clone())
    }
}
