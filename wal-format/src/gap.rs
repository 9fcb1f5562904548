//! [`DeclaredGap`]: `gap/….json` records that a range of WAL is lost: no server that could be asked
//! has it any more.
//!
//! Written once, when archiving continues after the range. If the WAL is archived later after all,
//! the range is complete, and the record is only history.

use serde::{Deserialize, Serialize};

use crate::{Branch, Lsn, ObjectKey, PgTimestamp, SystemIdentifier};

/// A range of WAL that was declared lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclaredGap {
    /// The branch.
    pub branch: Branch,
    /// The first missing byte.
    pub from_lsn: Lsn,
    /// The first byte after the range.
    pub to_lsn: Lsn,
    /// The time of the declaration.
    pub declared: PgTimestamp,
    /// The last commit that is archived before the range. Everything lost happened after this time.
    pub last_commit: Option<PgTimestamp>,
    /// The server's answer when it was asked for the range.
    pub reason: String,
}

impl DeclaredGap {
    /// Returns the object key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::Gap(system, self.branch, self.from_lsn, self.to_lsn)
    }
}
