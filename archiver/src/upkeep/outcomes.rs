//! Records in the repository how an operation ended, where every archiver's dashboard reads it, and
//! tells the daemon of this host at once: an idle archiver polls a bucket only once an
//! hour.

pub(crate) use repository::outcome_mark as mark;
use repository::{LossRecord, Repository, config::ClusterSettings};
use status::outcomes::ended;
use wal_format::{BackupId, OutcomeKind};

use crate::{blocking::blocking, error::Result};

/// Something new is in the repository.
pub(crate) fn tell_the_daemon(settings: &ClusterSettings, id: &BackupId) {
    let mark = mark(settings);
    if let Err(error) = std::fs::write(&mark, id.as_str()) {
        tracing::debug!(%error, path = %mark.display(), "the daemon of this host sees it within an hour");
    }
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
        // In an older state of the repository it would be lost.
        LossRecord::of(&known).check_newest(&repository)?;
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
