//! [`undo`]: withdraws records of expiry while all of their objects are still there.
//!
//! Invariant: a record is withdrawn only before a sweep may begin with it, with a margin for clocks
//! that differ. Afterwards some of its objects may be gone.

use std::time::Duration;

use wal_format::{Expired, PgTimestamp, SystemIdentifier};

use super::ExpiredSet;
use crate::{Repository, Result};

/// The longest margin before the end of the grace in which nothing is undone.
const MARGIN_MAX: Duration = Duration::from_secs(60);

/// The records that [`undo`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// Those that were withdrawn: their backups and their WAL count again.
    pub withdrawn: Vec<Expired>,
    /// Those that came too late: a sweep may have begun, or begins soon.
    pub late: Vec<Expired>,
}

/// Withdraws every record of `expired` that was marked less than `grace` ago.
///
/// # Errors
/// [`Error::Locked`](crate::Error::Locked) for a record that the store does not let go,
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

/// Divides the records that were not swept yet into those that can be withdrawn and those that
/// cannot.
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
            // A crash left it beside the record that replaced it.
            record(
                "20261101T000000Z-0004",
                now.0 - SECOND,
                None,
                "20261001T000000Z-0003",
            ),
            // The clock went back.
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
