//! The description of a declared loss.

use wal_format::DeclaredGap;

/// The reason of a gap that the operator declared after `pg_resetwal`.
pub const RESETWAL: &str =
    "pg_resetwal was run on the server, so its WAL does not continue the archived WAL";

/// Describes a loss for users: the range, the last commit before it, and the remedy.
#[must_use]
pub fn describe_loss(gap: &DeclaredGap) -> String {
    let since = gap
        .last_commit
        .map_or_else(String::new, |time| format!(", after {time}"));
    format!(
        "WAL {} to {} of timeline branch {} is lost{since}: {}. A restore to a later time needs a base backup taken after \
         it, which the archiver takes now",
        gap.from_lsn, gap.to_lsn, gap.branch, gap.reason
    )
}
