//! Records in the repository how an operation ended, for the audit trail and every archiver's
//! dashboard, and tells the daemon of this host at once: an idle archiver polls a bucket only once
//! an hour.

pub(crate) use repository::outcome_mark as mark;
use repository::{LossRecord, Repository, config::ClusterSettings};
use status::outcomes::ended;
use wal_format::{BackupId, BackupInfo, Outcome, OutcomeKind};

use crate::{blocking::blocking, error::Result};

/// Something new is in the repository.
pub(crate) fn tell_the_daemon(settings: &ClusterSettings, id: &BackupId) {
    let mark = mark(settings);
    if let Err(error) = std::fs::write(&mark, id.as_str()) {
        tracing::debug!(%error, path = %mark.display(), "the daemon of this host sees it within an hour");
    }
}

/// Records an action that has ended, where the repository can be reached and knows the cluster. A
/// failure to do so is logged: the action itself has ended already.
pub(crate) fn record(
    settings: &ClusterSettings,
    kind: OutcomeKind,
    began: jiff::Timestamp,
    result: std::result::Result<&str, &str>,
) {
    let (passed, message) = match result {
        Ok(message) => (true, message),
        Err(message) => (false, message),
    };
    match ended(kind, began, passed, message) {
        Some(outcome) => store(settings, &outcome),
        None => tracing::warn!(
            event = "action_not_recorded", %kind,
            "the clock gives no year of four digits: this action is not recorded"
        ),
    }
}

fn store(settings: &ClusterSettings, outcome: &Outcome) {
    let stored = (|| -> Result<Option<BackupId>> {
        let repository = Repository::open_known(settings)?;
        let Some(identity) = repository.identity()? else {
            return Ok(None);
        };
        // In an older state of the repository it would be lost.
        LossRecord::of(settings).check_newest(&repository)?;
        Ok(Some(
            repository.put_outcome(identity.system_identifier, outcome)?,
        ))
    })();
    match stored {
        Ok(Some(id)) => tell_the_daemon(settings, &id),
        Ok(None) => {}
        Err(error) => tracing::warn!(
            event = "action_not_recorded", cluster = %settings.name, kind = %outcome.kind,
            passed = outcome.passed, message = outcome.message, %error,
            "this action could not be recorded in the repository"
        ),
    }
}

/// Records an action from an asynchronous task.
pub(crate) async fn record_later(
    settings: &ClusterSettings,
    kind: OutcomeKind,
    began: jiff::Timestamp,
    result: std::result::Result<String, String>,
) {
    let settings = settings.clone();
    let recorded = blocking(move || {
        let result = result.as_deref().map_err(String::as_str);
        record(&settings, kind, began, result);
        Ok(())
    });
    if let Err(error) = recorded.await {
        tracing::warn!(event = "action_not_recorded", %kind, %error, "this action is not recorded");
    }
}

/// Records a base backup.
pub(crate) async fn record_backup(
    settings: &ClusterSettings,
    began: jiff::Timestamp,
    info: &BackupInfo,
) {
    let mut message = format!("backup {} is complete", info.id);
    if !info.label.is_empty() {
        message += &format!(": {}", info.label);
    }
    let Some(mut outcome) = ended(OutcomeKind::Backup, began, true, &message) else {
        return;
    };
    outcome.backup = Some(info.id.clone());
    let settings = settings.clone();
    let recorded = blocking(move || {
        store(&settings, &outcome);
        Ok(())
    });
    if let Err(error) = recorded.await {
        tracing::warn!(event = "action_not_recorded", %error, "the base backup is not recorded");
    }
}

/// Records a base backup that failed.
pub(crate) async fn record_failed_backup(
    settings: &ClusterSettings,
    began: jiff::Timestamp,
    message: &str,
) {
    record_later(
        settings,
        OutcomeKind::Backup,
        began,
        Err(message.to_owned()),
    )
    .await;
}
