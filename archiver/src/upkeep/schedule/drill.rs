//! Restore drills by `drill_schedule`: `pitr-restore drill` as a child process.
//!
//! The child records its result in the repository. A child that ends without a result has tested
//! nothing: that is an error of the schedule, with an alert, and it is tried again.

use std::{ffi::OsString, sync::Arc, time::Duration};

use jiff::Timestamp;
use repository::{config::ClusterSettings, outcome_time};
use status::{cluster_status::ClusterStatus, schedule::ScheduleReport};
use wal_format::{ObjectKey, OutcomeKind};

use super::{
    LastRun, Operation, Plan, Ran, keep, of_backup,
    program::{self, Ended},
    recorded, without_repository,
};
use crate::{core::shutdown::Shutdown, error::Result};

/// The first and the longest pause after a drill without a result. Usually a person has to act
/// first.
const RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(6 * 3600));

/// Starts restore drills by `drill_schedule` until a stop is requested. Returns at once if it is
/// not set.
pub(crate) async fn start(settings: ClusterSettings, status: Arc<ClusterStatus>, stop: Shutdown) {
    let Some(schedule) = settings.schedules.drill.clone() else {
        return;
    };
    let plan = Plan {
        schedule,
        catch_up: true,
        retry: RETRY,
    };
    let noted = Arc::clone(&status);
    let note = move |report: &ScheduleReport| {
        noted.note(|facts| facts.drill_schedule = Some(report.clone()));
    };
    keep(&plan, &mut Drills { settings, status }, &note, stop).await;
}

struct Drills {
    settings: ClusterSettings,
    status: Arc<ClusterStatus>,
}

impl Drills {
    /// Returns the begin of the newest drill with a result.
    async fn newest(&self) -> Result<Option<Timestamp>> {
        let found = recorded(&self.settings, "outcome/drill", |key| match key {
            ObjectKey::Outcome(_, OutcomeKind::Drill, id) => outcome_time(id),
            _ => None,
        });
        Ok(found.await?.map(|(_, newest)| newest))
    }

    /// Returns the arguments of the child. The values equal those of the daemon's own flags, where
    /// it has some, and those of the file else.
    fn arguments(&self) -> Vec<OsString> {
        let settings = &self.settings;
        let mut arguments = Vec::new();
        let mut add = |flag: &str, value: OsString| {
            arguments.extend([flag.into(), value]);
        };
        if let Some(file) = &settings.file {
            add("--config", file.into());
        }
        add("--cluster", settings.name.as_str().into());
        add("--repository", settings.repository.url.to_string().into());
        add("--spool", settings.spool.clone().into());
        arguments.push("drill".into());
        if let Some(directory) = &settings.schedules.drill_report_dir {
            arguments.extend(["--report".into(), directory.into()]);
        }
        arguments
    }
}

impl Operation for Drills {
    fn obstacle(&self) -> Option<String> {
        let facts = self.status.facts();
        if let Some(obstacle) = without_repository(&facts) {
            return Some(obstacle);
        }
        if !facts.looked {
            return Some("the base backups are not known yet".to_owned());
        }
        if facts.last_backup.is_none() {
            return Some("there is no base backup yet".to_owned());
        }
        None
    }

    async fn last_run(&mut self) -> Result<LastRun> {
        if let Some(newest) = self.newest().await? {
            return Ok(LastRun::At(newest));
        }
        // Before the first drill, the schedule counts from the first base backup.
        let backups = recorded(&self.settings, "backup", of_backup).await?;
        let first = backups.map(|(oldest, _)| oldest);
        Ok(LastRun::At(first.unwrap_or_else(Timestamp::now)))
    }

    async fn run(&mut self, stop: Shutdown) -> Ran {
        let cluster = &self.settings.name;
        let known = match self.newest().await {
            Ok(known) => known,
            Err(error) => return Ran::NotBegun(error.to_string()),
        };
        let program = match program::find() {
            Ok(program) => program,
            Err(reason) => return failed(cluster, reason),
        };
        tracing::info!(
            event = "scheduled_drill_begins", %cluster, program = %program.display(),
            "starting a scheduled restore drill"
        );
        let ended = match program::run(program.clone(), self.arguments(), stop.clone()).await {
            Ok(ended) => ended,
            Err(error) => {
                return failed(
                    cluster,
                    format!("{} cannot be run: {error}", program.display()),
                );
            }
        };
        if stop.is_requested() {
            return Ran::NotBegun("the daemon ends".to_owned());
        }
        let recorded = match self.newest().await {
            Ok(newest) => newest > known,
            Err(error) => {
                tracing::warn!(%cluster, %error, "the result of the drill is not known");
                false
            }
        };
        if !recorded {
            return failed(cluster, without_result(&ended));
        }
        tracing::info!(
            event = "scheduled_drill_done", %cluster, status = %ended.status,
            "the scheduled restore drill has ended; its result is in the repository"
        );
        Ran::Done
    }
}

fn failed(cluster: &wal_format::ClusterName, reason: String) -> Ran {
    tracing::error!(
        event = "scheduled_drill_failed", %cluster, reason,
        "the scheduled restore drill has no result; it is tried again"
    );
    Ran::Failed(reason)
}

/// Describes a child that ended without a result.
fn without_result(ended: &Ended) -> String {
    let message = match ended.message.as_str() {
        "" => "it printed no message",
        message => message,
    };
    format!(
        "`pitr-restore drill` ended without a result ({}): {message}",
        ended.status
    )
}
