//! The reason why an expired moment cannot be restored: what expired, when, and by which policy.

use repository::ExpiredSet;
use wal_format::{BackupId, Expired, ExpiredWindow, PgTimestamp};

use crate::{Error, PlanError, Result, inventory::Archive, target::RecoveryTarget};

/// The maximum number of windows that a refusal names.
const WINDOWS_MAX: usize = 3;

/// Refuses a backup that the operator named and that has expired.
///
/// # Errors
/// [`PlanError::ExpiredBackup`].
pub(crate) fn refuse_backup(archive: &Archive, id: &BackupId) -> Result<()> {
    let expired = archive.catalog.expired()?;
    if !expired.backups().contains(id) {
        return Ok(());
    }
    let named = expired.records().iter().find_map(|record| {
        let backup = record.backups.iter().find(|backup| backup.id == *id)?;
        Some((record, backup))
    });
    match named {
        Some((record, backup)) => Err(PlanError::ExpiredBackup {
            backup: backup.id.clone(),
            finished: backup.finished,
            marked: record.marked,
            policy: format!("kept is {}", record.policy),
        }
        .into()),
        None => Ok(()),
    }
}

/// Adds to a refusal what has expired there.
pub(crate) fn explain(archive: &Archive, target: &RecoveryTarget, refusal: Error) -> Error {
    let Error::Plan(plan) = refusal else {
        return refusal;
    };
    let Ok(expired) = archive.catalog.expired() else {
        return plan.into();
    };
    match because_of(&expired, target, &plan) {
        Some(words) => PlanError::Expired {
            refusal: Box::new(plan),
            expired: words,
        }
        .into(),
        None => plan.into(),
    }
}

fn because_of(expired: &ExpiredSet, target: &RecoveryTarget, plan: &PlanError) -> Option<String> {
    if expired.is_empty() {
        return None;
    }
    let is_it = match plan {
        PlanError::Gap { branch, from, .. } => {
            expired.not_expired(*branch, *from, from.add(1)).is_empty()
        }
        PlanError::NoBackup
        | PlanError::NoBackupOnPath { .. }
        | PlanError::TooEarly { .. }
        | PlanError::Unknown { .. } => true,
        _ => false,
    };
    if !is_it {
        return None;
    }
    let all = || {
        let records = expired.records().iter();
        records.flat_map(|record| record.windows.iter().map(move |window| (record, window)))
    };
    let holding: Vec<_> = all().filter(|(_, window)| holds(window, target)).collect();
    let named = if holding.is_empty() {
        all().collect()
    } else {
        holding
    };
    let words = |(record, window): &(&Expired, &ExpiredWindow)| {
        let time =
            |time: Option<PgTimestamp>| time.map_or_else(|| "?".to_owned(), |t| t.to_string());
        format!(
            "{} to {} (WAL {} to {} of timeline {}), given up {}",
            time(window.from),
            time(window.to),
            window.from_lsn,
            window.to_lsn,
            window.branch,
            record.marked
        )
    };
    let more = named.len().saturating_sub(WINDOWS_MAX);
    let mut said: Vec<String> = named.iter().take(WINDOWS_MAX).map(words).collect();
    if more > 0 {
        said.push(format!("and {more} more"));
    }
    (!said.is_empty()).then(|| said.join("; "))
}

/// Returns true if a window contains the target. False for targets other than a time or an LSN.
fn holds(window: &ExpiredWindow, target: &RecoveryTarget) -> bool {
    match target {
        RecoveryTarget::Time { time, .. } => {
            window.from.is_some_and(|from| from <= *time) && window.to.is_none_or(|to| *time <= to)
        }
        RecoveryTarget::Lsn { lsn, .. } => (window.from_lsn..window.to_lsn).contains(lsn),
        _ => false,
    }
}
