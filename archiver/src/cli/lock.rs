//! `wal-archiver lock extend`: extends the locks on what the kept backups need, in buckets with
//! Object Lock. Run by an operator or a timer.
//!
//! [`locks`](crate::upkeep::locks) decides what is needed. With `lock_days`, the daemon runs it
//! automatically.

use jiff::{SignedDuration, Timestamp};
use repository::{
    KnownLocks,
    config::{LOCK_DAYS_MAX, Settings},
    store::{LockMode, LockSpan},
};
use wal_format::BackupId;

use super::output;
use crate::{
    error::{Error, Result},
    upkeep::locks::{self, Locked},
};

pub(super) fn extend(
    settings: &Settings,
    days: u32,
    oldest: Option<&BackupId>,
    mode: LockMode,
    dry_run: bool,
) -> Result<()> {
    let usage = |message: String| Error::Usage { message };
    if !(1..=LOCK_DAYS_MAX).contains(&days) {
        return Err(usage(format!(
            "--days {days} is not between 1 and {LOCK_DAYS_MAX}"
        )));
    }
    let until = Timestamp::now()
        .checked_add(SignedDuration::from_hours(24 * i64::from(days)))
        .map_err(|error| usage(format!("--days {days}: {error}")))?;
    let span = LockSpan::until(until, mode);
    let mut known = KnownLocks::default();
    let mut damaged = None;
    let mut has_locks = false;
    for cluster in &settings.clusters {
        let extended = locks::extend(cluster, oldest, span, &mut known, dry_run)?;
        damaged = damaged.or(extended.damaged);
        for Locked { place, report } in extended.places {
            let name = &cluster.name;
            has_locks |= report.is_some();
            output::line(&match report {
                None => format!("cluster {name}: {place} is a folder, which has no locks"),
                Some(report) => {
                    let verb = if dry_run { "would be" } else { "are" };
                    format!(
                        "cluster {name}: {} objects {verb} locked until {until} in {place}; {} were for longer already, \
                         {} are not needed by a kept backup",
                        report.extended, report.already, report.left
                    )
                }
            });
        }
    }
    if let Some(error) = damaged {
        return Err(error.into());
    }
    if has_locks {
        return Ok(());
    }
    Err(usage(
        "nothing was locked: no repository of these clusters is a bucket, and only a bucket with Object Lock has locks"
            .to_owned(),
    ))
}
