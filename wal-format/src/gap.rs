//! [`DeclaredGap`]: `gap/….json`, our word that a range of WAL is lost: nobody who could be asked has it any more.
//!
//! Written once, when archiving goes on behind the range. The WAL itself may still be given later; then the range is
//! held, and the declaration is history.

use serde::{Deserialize, Serialize};

use crate::{Branch, Lsn, ObjectKey, PgTimestamp, SystemIdentifier};

/// A range of WAL that was declared lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeclaredGap {
    /// The branch.
    pub branch: Branch,
    /// The first byte that is missing.
    pub from_lsn: Lsn,
    /// The first byte after.
    pub to_lsn: Lsn,
    /// When it was declared.
    pub declared: PgTimestamp,
    /// The last commit that is archived before it: what is lost happened after this time.
    pub last_commit: Option<PgTimestamp>,
    /// What the server said when it was asked for the range.
    pub reason: String,
}

impl DeclaredGap {
    /// Its key.
    #[must_use]
    pub fn key(&self, system: SystemIdentifier) -> ObjectKey {
        ObjectKey::Gap(system, self.branch, self.from_lsn, self.to_lsn)
    }
}
