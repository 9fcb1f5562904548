//! Base backups by `backup_schedule`.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use repository::config::ClusterSettings;
use status::{cluster_status::ClusterStatus, schedule::ScheduleReport};

use super::{LastRun, Operation, Plan, Ran, keep, of_backup, recorded, without_repository};
use crate::{
    base_backup::{self, BaseBackupError, Progress, WhenBusy},
    core::shutdown::Shutdown,
    error::{Error, Result},
};

/// The first and the longest pause after a failed base backup. Each attempt costs the server a
/// checkpoint and the reading of its data.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(3600));

/// Takes base backups by `backup_schedule` until a stop is requested. Returns at once if it is not
/// set.
pub(crate) async fn take(settings: ClusterSettings, status: Arc<ClusterStatus>, stop: Shutdown) {
    let Some(schedule) = settings.schedules.backup.clone() else {
        return;
    };
    let plan = Plan {
        schedule,
        catch_up: settings.schedules.backup_catch_up,
        retry: RETRY,
    };
    let noted = Arc::clone(&status);
    let note = move |report: &ScheduleReport| {
        noted.note(|facts| facts.backup_schedule = Some(report.clone()));
    };
    let mut backups = Backups {
        settings,
        status,
        recorded: String::new(),
    };
    keep(&plan, &mut backups, &note, stop).await;
}

struct Backups {
    settings: ClusterSettings,
    status: Arc<ClusterStatus>,
    /// The error that was recorded last. Each record is an object in the repository.
    recorded: String,
}

impl Operation for Backups {
    fn obstacle(&self) -> Option<String> {
        let facts = self.status.facts();
        if let Some(obstacle) = without_repository(&facts) {
            return Some(obstacle);
        }
        if !facts.connected {
            let error = facts.stream_error;
            let error = error.map_or_else(String::new, |error| format!(": {error}"));
            return Some(format!("the server is not connected{error}"));
        }
        None
    }

    async fn last_run(&mut self) -> Result<LastRun> {
        let found = recorded(&self.settings, "backup", of_backup).await?;
        Ok(found.map_or(LastRun::Never, |(_, newest)| LastRun::At(newest)))
    }

    async fn run(&mut self, stop: Shutdown) -> Ran {
        let cluster = &self.settings.name;
        let began = Timestamp::now();
        let progress = |progress| {
            if progress == Progress::Checkpoint {
                tracing::info!(
                    event = "scheduled_backup_begins", %cluster,
                    "taking a scheduled base backup"
                );
            }
        };
        let busy = WhenBusy::GiveUp;
        match base_backup::attempt(&self.settings, "scheduled", busy, &progress, stop).await {
            Ok(backup) => {
                self.recorded.clear();
                tracing::info!(
                    event = "scheduled_backup_done", %cluster, backup = %backup.id,
                    "the scheduled base backup is complete"
                );
                Ran::Done
            }
            Err(Error::BaseBackup(error @ BaseBackupError::AlreadyRuns { .. })) => {
                Ran::NotBegun(error.to_string())
            }
            Err(Error::BaseBackup(BaseBackupError::Interrupted)) => {
                Ran::NotBegun("the daemon ends".to_owned())
            }
            Err(error) => {
                let message = error.to_string();
                tracing::error!(
                    event = "scheduled_backup_failed", %cluster, %error,
                    "the scheduled base backup failed; it is tried again"
                );
                if message != self.recorded && !base_backup::is_of_wrong_place(&error) {
                    base_backup::record_failure(&self.settings, began, &message).await;
                    self.recorded.clone_from(&message);
                }
                Ran::Failed(message)
            }
        }
    }
}
