//! Takes the base backups that make the archive complete again: after lost WAL, and when no backup
//! leads to the server's present.
//!
//! Invariant: one backup for one cause. A judgement from before the catalog listed the last backup
//! does not cause another one.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use repository::config::ClusterSettings;
use status::cluster_status::ClusterStatus;
use wal_format::BackupId;

use crate::{
    base_backup::{self, BaseBackupError, WhenBusy},
    core::shutdown::Shutdown,
    error::Error,
};

/// The interval at which a loss is checked for.
const LOSS_POLL: Duration = Duration::from_millis(500);
/// The time for which the catalog may take to list a base backup that was taken.
const BACKUP_LISTED_MAX: Duration = Duration::from_secs(60);
/// The pause while another base backup of the server runs.
const BUSY_PAUSE: Duration = Duration::from_secs(5);
/// The pause after a failed base backup. It is long enough for the cause to pass.
const BACKUP_RETRY: Duration = Duration::from_secs(30);

/// Takes a base backup whenever WAL was declared lost, or no backup leads to the server's present.
/// Restores are complete again only from that backup on.
pub(super) async fn take_repairing_backups(settings: ClusterSettings, status: Arc<ClusterStatus>) {
    let mut said = String::new();
    let mut taken: Option<(BackupId, Instant)> = None;
    loop {
        tokio::time::sleep(LOSS_POLL).await;
        let facts = status.facts();
        let reason = facts.lost.as_ref().or(facts.unreached.as_ref());
        // A backup in an older copy of the repository would be missing in the right one.
        let Some(reason) = reason.filter(|_| facts.connected && !facts.repository_gone) else {
            continue;
        };
        // A judgement from before the catalog knew the last backup does not count.
        if let Some((id, when)) = &taken
            && when.elapsed() < BACKUP_LISTED_MAX
            && status.details().backups.iter().all(|known| known.id != *id)
        {
            continue;
        }
        tracing::info!(cluster = %settings.name, reason, "taking a base backup that makes the archive whole again");
        let began = jiff::Timestamp::now();
        let busy = WhenBusy::GiveUp;
        let never = Shutdown::never();
        match base_backup::attempt(&settings, "repair", busy, &|_| {}, never).await {
            Ok(backup) => {
                said.clear();
                tracing::info!(cluster = %settings.name, backup = %backup.id, "the archive is whole again from this backup on");
                // WAL that was lost during this backup needs another one.
                status.note(|now| {
                    if now.lost == facts.lost {
                        now.lost = None;
                    }
                    if now.unreached == facts.unreached {
                        now.unreached = None;
                    }
                });
                taken = Some((backup.id, Instant::now()));
            }
            // The other backup may make the archive whole, too.
            Err(Error::BaseBackup(error @ BaseBackupError::AlreadyRuns { .. })) => {
                tracing::debug!(cluster = %settings.name, %error, "the repair waits");
                tokio::time::sleep(BUSY_PAUSE).await;
            }
            Err(error) => {
                tracing::error!(cluster = %settings.name, %error, "the base backup that makes the archive whole again failed; it is tried again");
                let message = error.to_string();
                // Only a new error is recorded, because each record is an object in the repository.
                if message != said && !base_backup::is_of_wrong_place(&error) {
                    base_backup::record_failure(&settings, began, &message).await;
                    said = message;
                }
                wait_to_retry(&status).await;
            }
        }
    }
}

/// Waits before a failed base backup is retried. Returns at once when a repository that failed
/// works again.
async fn wait_to_retry(status: &ClusterStatus) {
    let began = Instant::now();
    let fails = || status.facts().repository_error.is_some();
    let failed = fails();
    while began.elapsed() < BACKUP_RETRY && (!failed || fails()) {
        tokio::time::sleep(LOSS_POLL).await;
    }
}
