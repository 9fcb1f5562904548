//! Leaves in the repository how something ended, where every archiver's dashboard reads it, and
//! tells the daemon of this host at once: an idle archiver asks a repository for news only once an
//! hour.

use std::path::PathBuf;

use repository::{Repository, config::ClusterSettings};
use wal_format::{BackupId, OUTCOME_FORMAT_VERSION, Outcome, OutcomeKind, PgTimestamp};

use crate::{error::Result, pipeline::blocking};

/// The file in the spool's directory that changes with each backup and outcome of this host.
pub(crate) fn mark(settings: &ClusterSettings) -> PathBuf {
    settings
        .spool
        .join(settings.name.as_str())
        .join("newest-backup")
}

/// Something new is in the repository.
pub(crate) fn tell_the_daemon(settings: &ClusterSettings, id: &BackupId) {
    let mark = mark(settings);
    if let Err(error) = std::fs::write(&mark, id.as_str()) {
        tracing::debug!(%error, path = %mark.display(), "the daemon of this host sees it within an hour");
    }
}

/// A name from the time at which something began: the second, and 65536ths of it in hexadecimal.
/// Names are in the order of the times, because the newest of a kind is the last by name.
pub(crate) fn name(began: jiff::Timestamp) -> Option<BackupId> {
    let nanoseconds = i64::from(began.subsec_nanosecond()).max(0);
    let part = nanoseconds * 0x1_0000 / 1_000_000_000;
    format!("{}-{part:04x}", began.strftime("%Y%m%dT%H%M%SZ"))
        .parse()
        .ok()
}

/// The outcome of `kind` at this moment, without measurements.
pub(crate) fn ended(
    kind: OutcomeKind,
    began: jiff::Timestamp,
    passed: bool,
    message: &str,
) -> Option<Outcome> {
    Some(Outcome {
        format_version: OUTCOME_FORMAT_VERSION,
        kind,
        id: name(began)?,
        started: PgTimestamp::from_jiff(began),
        finished: PgTimestamp::from_jiff(jiff::Timestamp::now()),
        passed,
        message: message.to_owned(),
        backup: None,
        rto_seconds: None,
        fetched_bytes: None,
        fetch_seconds: None,
        replayed_bytes: None,
        replay_seconds: None,
        loss_seconds: None,
        damaged: Vec::new(),
    })
}

/// Records a base backup that failed, where the repository can be reached and knows the cluster.
/// One that succeeded is its own proof.
pub(crate) async fn record_failed_backup(
    settings: &ClusterSettings,
    began: jiff::Timestamp,
    message: &str,
) {
    let Some(outcome) = ended(OutcomeKind::Backup, began, false, message) else {
        return;
    };
    let known = settings.clone();
    let id = outcome.id.clone();
    let stored = blocking(move || -> Result<bool> {
        let repository = Repository::open_known(&known)?;
        let Some(identity) = repository.identity()? else {
            return Ok(false);
        };
        repository.put_outcome(identity.system_identifier, &outcome)?;
        Ok(true)
    })
    .await;
    match stored {
        Ok(true) => tell_the_daemon(settings, &id),
        Ok(false) => {}
        Err(error) => {
            tracing::warn!(%error, "the failure of the base backup could not be recorded in the repository");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_second_are_in_the_order_of_their_times() {
        let names: Vec<BackupId> = [0, 1_000, 20_000, 500_000, 999_999]
            .map(|micros| 1_700_000_000_000_000 + micros)
            .map(|micros| jiff::Timestamp::from_microsecond(micros).expect("a time"))
            .map(|time| name(time).expect("a name"))
            .to_vec();
        assert!(names.is_sorted(), "{names:?}");
        let distinct: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(distinct.len(), names.len(), "{names:?}");
    }
}
