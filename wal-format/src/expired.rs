//! [`Expired`]: `expired/….json`, our word that backups and WAL are no longer kept: whoever reads the repository takes
//! them for absent from then on, and after a grace they are removed.
//!
//! Written once, before anything is removed. What counts is the union of all that lie there: a removal that was cut off
//! goes on from it, and a hole in the WAL that it names is no gap. Each of several repositories has its own.

use serde::{Deserialize, Serialize};

use crate::{BackupId, Branch, Lsn, ObjectKey, PgTimestamp, SystemIdentifier};

/// The version that this build writes, and the newest that it reads.
pub const EXPIRED_FORMAT_VERSION: u32 = 1;

/// What one application of a retention policy gave up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expired {
    /// [`EXPIRED_FORMAT_VERSION`].
    pub format_version: u32,
    /// Its name: spelled as a backup's, from the time it was written.
    pub id: BackupId,
    /// When this was decided; the objects stay for a grace from then on.
    pub marked: PgTimestamp,
    /// When every object of it was removed; it then only says what was there.
    #[serde(default)]
    pub swept: Option<PgTimestamp>,
    /// The policy, in words.
    pub policy: String,
    /// The base backups.
    pub backups: Vec<ExpiredBackup>,
    /// The WAL, in whole segments.
    pub wal: Vec<ExpiredWal>,
    /// The moments that can not be restored any more.
    pub windows: Vec<ExpiredWindow>,
}

/// A base backup that is no longer kept.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpiredBackup {
    /// Its name.
    pub id: BackupId,
    /// When it was complete.
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

/// A stretch of moments that could be restored until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpiredWindow {
    /// The branch.
    pub branch: Branch,
    /// From where on.
    pub from_lsn: Lsn,
    /// Up to where.
    pub to_lsn: Lsn,
    /// About when that was: the end of the backup before it.
    pub from: Option<PgTimestamp>,
    /// About when that was: the end of the backup behind it, or the last commit.
    pub to: Option<PgTimestamp>,
}

impl Expired {
    /// Its key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::Expired(system, self.id.clone())
    }
}
