//! [`ArchiveQueries`]: what only the archive of a running cluster can answer.

use std::fmt;

use repository::store::MemberState;
use status::locate::Located;
use wal_format::PgTimestamp;

/// Answers queries about the archive of one cluster, from the catalog on this host.
pub trait ArchiveQueries: fmt::Debug + Send + Sync {
    /// Returns the members of the repository, if there are several. Empty while no archive is open.
    fn places(&self) -> Vec<MemberState>;

    /// Finds the restore that leads to `time`, a time by the server's clock. Blocks on the disk.
    ///
    /// # Errors
    /// The reason, as text, also while no archive is open.
    fn locate(&self, time: PgTimestamp) -> Result<Located, String>;
}
