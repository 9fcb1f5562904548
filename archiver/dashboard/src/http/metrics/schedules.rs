//! Metrics of the periodic operations of the daemon.

use status::{report::ClusterReport, schedule::ScheduleReport};

use super::{Page, flag, unix_seconds};

impl Page<'_> {
    pub(super) fn schedules(&mut self) {
        for (name, help, schedule) in [
            (
                "pitr_backup_next_run_timestamp_seconds",
                "When the next scheduled base backup begins; in the past while it cannot; NaN without backup_schedule",
                backups as fn(&ClusterReport) -> Option<&ScheduleReport>,
            ),
            (
                "pitr_drill_next_run_timestamp_seconds",
                "When the next scheduled restore drill begins; in the past while it cannot; NaN without drill_schedule",
                drills,
            ),
        ] {
            self.gauge(name, help, |report| {
                unix_seconds(schedule(report)?.next_run)
            });
        }
        self.gauge(
            "pitr_drill_running",
            "Whether a scheduled restore drill runs; NaN without drill_schedule",
            |report| Some(flag(drills(report)?.running_since.is_some())),
        );
        self.gauge(
            "pitr_drill_without_result",
            "Whether the last scheduled restore drill ended without a result",
            |report| {
                let error = drills(report).and_then(|drills| drills.last_error.as_ref());
                Some(flag(error.is_some()))
            },
        );
    }
}

fn backups(report: &ClusterReport) -> Option<&ScheduleReport> {
    report.backup_schedule.as_ref()
}

fn drills(report: &ClusterReport) -> Option<&ScheduleReport> {
    report.drill_schedule.as_ref()
}
