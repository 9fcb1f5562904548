//! [`undo`]: withdraws expiry records while all of their objects still exist.
//!
//! Invariant: a record is withdrawn only before a sweep may process it, with a margin for clocks
//! that differ. After that time some of its objects may have been removed.

use std::time::Duration;

use wal_format::{Expired, PgTimestamp, SystemIdentifier};

use super::ExpiredSet;
use crate::{Repository, Result};

/// The maximum margin before the end of the grace period in which no record is withdrawn.
const MARGIN_MAX: Duration = Duration::from_secs(60);

/// The result of [`undo`]. It does not contain records that were swept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// The records that were withdrawn. Their backups and their WAL can be restored again.
    pub withdrawn: Vec<Expired>,
    /// The records that are too old: a sweep may have removed objects, or may begin within the
    /// margin.
    pub late: Vec<Expired>,
}

/// Withdraws every record of `expired` that was not swept and that was marked less than `grace`
/// ago, minus a margin: a tenth of `grace`, at most one minute.
///
/// # Errors
/// [`Error::Locked`](crate::Error::Locked) if the store does not delete a record,
/// [`Error::Store`](crate::Error::Store), [`Error::S3`](crate::Error::S3).
pub fn undo(
    place: &Repository,
    system: SystemIdentifier,
    expired: &ExpiredSet,
    grace: Duration,
    now: PgTimestamp,
) -> Result<Undone> {
    let undone = divide(expired, grace, now);
    for record in &undone.withdrawn {
        place.delete(&record.key(system))?;
    }
    Ok(undone)
}

/// Divides the records that were not swept into those that can be withdrawn and those that are too
/// old.
fn divide(expired: &ExpiredSet, grace: Duration, now: PgTimestamp) -> Undone {
    let swept = expired.part(|record| record.swept.is_some());
    let margin = MARGIN_MAX.min(grace / 10);
    let limit = i64::try_from((grace - margin).as_micros()).unwrap_or(i64::MAX);
    let mut undone = Undone::default();
    for record in expired.records() {
        if record.swept.is_some() || swept.names_all_of(record) {
            continue;
        }
        if now.micros_since(record.marked) < limit {
            undone.withdrawn.push(record.clone());
        } else {
            undone.late.push(record.clone());
        }
    }
    undone
}

#[cfg(test)]
mod tests {
    use wal_format::{EXPIRED_FORMAT_VERSION, ExpiredBackup};

    use super::*;

    fn record(id: &str, marked: i64, swept: Option<i64>, backup: &str) -> Expired {
        Expired {
            format_version: EXPIRED_FORMAT_VERSION,
            id: id.parse().expect("a name"),
            marked: PgTimestamp(marked),
            swept: swept.map(PgTimestamp),
            policy: String::new(),
            backups: vec![ExpiredBackup {
                id: backup.parse().expect("a name"),
                finished: PgTimestamp(0),
            }],
            wal: Vec::new(),
            windows: Vec::new(),
        }
    }

    #[test]
    fn only_what_no_sweep_can_have_begun_with_is_withdrawn() {
        const SECOND: i64 = 1_000_000;
        let grace = Duration::from_secs(3600);
        let now = PgTimestamp(10_000 * SECOND);
        let names = |records: &[Expired]| -> Vec<String> {
            records.iter().map(|one| one.id.to_string()).collect()
        };
        let set: ExpiredSet = vec![
            record(
                "20261101T000000Z-0001",
                now.0 - 3541 * SECOND,
                None,
                "20261001T000000Z-0001",
            ),
            record(
                "20261101T000000Z-0002",
                now.0 - 3539 * SECOND,
                None,
                "20261001T000000Z-0002",
            ),
            record(
                "20261101T000000Z-0003",
                now.0 - SECOND,
                Some(now.0),
                "20261001T000000Z-0003",
            ),
            // A crash left this record next to the record that replaced it.
            record(
                "20261101T000000Z-0004",
                now.0 - SECOND,
                None,
                "20261001T000000Z-0003",
            ),
            // The clock was set back.
            record(
                "20261101T000000Z-0005",
                now.0 + SECOND,
                None,
                "20261001T000000Z-0005",
            ),
        ]
        .into();
        let undone = divide(&set, grace, now);
        assert_eq!(
            names(&undone.withdrawn),
            ["20261101T000000Z-0002", "20261101T000000Z-0005"]
        );
        assert_eq!(names(&undone.late), ["20261101T000000Z-0001"]);
    }
}
