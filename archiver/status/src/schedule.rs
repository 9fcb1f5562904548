//! [`ScheduleReport`]: a periodic operation of the daemon.

use serde::Serialize;
use wal_format::PgTimestamp;

/// A periodic operation of the daemon: its schedule, its next run and the result of the last one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ScheduleReport {
    /// The five cron fields.
    pub schedule: String,
    /// The time zone of the schedule.
    pub time_zone: String,
    /// The time of the next run. In the past while a run that is due cannot begin. `None` until the
    /// last run is known.
    pub next_run: Option<PgTimestamp>,
    /// The time at which the present run began. `None` while none runs.
    pub running_since: Option<PgTimestamp>,
    /// The reason why a run that is due has not begun. `None` if none is due.
    pub waits_for: Option<String>,
    /// The error of the last run of this daemon. `None` if the run succeeded, and before the first.
    pub last_error: Option<String>,
    /// The time of `last_error`.
    pub last_error_at: Option<PgTimestamp>,
}

impl ScheduleReport {
    /// Returns the report on an operation of which nothing is known yet.
    #[must_use]
    pub fn new(schedule: String, time_zone: String) -> Self {
        Self {
            schedule,
            time_zone,
            next_run: None,
            running_since: None,
            waits_for: None,
            last_error: None,
            last_error_at: None,
        }
    }
}
