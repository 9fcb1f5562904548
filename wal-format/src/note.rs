//! [`BackupNote`]: `note/{backup}/{id}.json` changes what the operator says about a base backup:
//! that it is kept, that retention decides again, or a description.
//!
//! Each change is a new object. The newest of each kind counts.

use serde::{Deserialize, Serialize};

use crate::{BackupId, ObjectKey, PgTimestamp, SystemIdentifier};

/// The version of the object that this build writes, and the newest that it reads.
pub const BACKUP_NOTE_FORMAT_VERSION: u32 = 1;

/// A change of what the operator says about a base backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupNote {
    /// [`BACKUP_NOTE_FORMAT_VERSION`].
    pub format_version: u32,
    /// The name of the note, spelled as a backup's: its time and four random digits.
    pub id: BackupId,
    /// The backup.
    pub backup: BackupId,
    /// The time of the change.
    pub made: PgTimestamp,
    /// The kind of change.
    pub change: NoteChange,
    /// The reason, or the description.
    pub text: String,
}

/// The kind of a [`BackupNote`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NoteChange {
    /// Retention keeps the backup.
    Keep,
    /// Retention decides about the backup again.
    Release,
    /// The text describes the backup. An empty text removes the description.
    Annotate,
}

impl BackupNote {
    /// Returns the object key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::BackupNote(system, self.backup.clone(), self.id.clone())
    }
}
