//! The schedules of the daemon: `backup_schedule`, `drill_schedule` and their keys.

use std::path::PathBuf;

use serde::Deserialize;

use crate::{
    Error, Result,
    schedule::{Schedule, ScheduleError},
};

/// Default of the time zones.
const ZONE_DEFAULT: &str = "UTC";

/// The schedules of the daemon for one cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct ScheduleSettings {
    /// The times at which the daemon takes a base backup. Default: never.
    pub backup: Option<Schedule>,
    /// True if a base backup that was missed is taken as soon as possible. Default: true.
    pub backup_catch_up: bool,
    /// The times at which the daemon starts a restore drill. Default: never.
    pub drill: Option<Schedule>,
    /// The directory for the reports of these drills. Default: no reports.
    pub drill_report_dir: Option<PathBuf>,
}

/// The keys as typed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct ScheduleTable {
    backup_catch_up: Option<bool>,
    backup_schedule: Option<String>,
    backup_time_zone: Option<String>,
    drill_report_dir: Option<PathBuf>,
    drill_schedule: Option<String>,
    drill_time_zone: Option<String>,
}

impl ScheduleTable {
    /// Returns the settings: this table's, and those of `defaults` where this table has none.
    pub(super) fn resolve(&self, defaults: &Self) -> Result<ScheduleSettings> {
        let either = |own: &Option<String>, default: &Option<String>| {
            own.as_ref().or(default.as_ref()).cloned()
        };
        let backup_zone = either(&self.backup_time_zone, &defaults.backup_time_zone);
        let drill_zone = either(&self.drill_time_zone, &defaults.drill_time_zone);
        let report = self.drill_report_dir.as_ref();
        let drill_report_dir = report.or(defaults.drill_report_dir.as_ref()).cloned();
        if let Some(path) = drill_report_dir.as_ref().filter(|path| path.is_relative()) {
            return Err(Error::config(format!(
                "drill_report_dir = \"{}\" is not an absolute path",
                path.display()
            )));
        }
        Ok(ScheduleSettings {
            backup: schedule(
                ("backup_schedule", "backup_time_zone"),
                either(&self.backup_schedule, &defaults.backup_schedule).as_deref(),
                backup_zone.as_deref(),
            )?,
            backup_catch_up: self
                .backup_catch_up
                .or(defaults.backup_catch_up)
                .unwrap_or(true),
            drill: schedule(
                ("drill_schedule", "drill_time_zone"),
                either(&self.drill_schedule, &defaults.drill_schedule).as_deref(),
                drill_zone.as_deref(),
            )?,
            drill_report_dir,
        })
    }
}

/// Parses a schedule. A time zone without a schedule is checked, too.
fn schedule(
    (key, zone_key): (&str, &str),
    text: Option<&str>,
    zone: Option<&str>,
) -> Result<Option<Schedule>> {
    let zone = zone.unwrap_or(ZONE_DEFAULT);
    let parsed = Schedule::parse(text.unwrap_or("0 0 * * *"), zone);
    let parsed = parsed.map_err(|error| {
        let key = match &error {
            ScheduleError::Fields { .. } => key,
            ScheduleError::Zone { .. } => zone_key,
        };
        Error::config(format!("{key} = {error}"))
    })?;
    Ok(text.map(|_| parsed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ClusterSettings, CommonArgs, Settings, file::ConfigFile};

    fn cluster(text: &str) -> Result<ClusterSettings> {
        let text = format!("repository = 'file:///r'\n{text}");
        let file = ConfigFile::parse(&text)?;
        let settings = Settings::from_file(&CommonArgs::default(), &file)?;
        Ok(settings.cluster()?.clone())
    }

    #[test]
    fn a_cluster_overrides_the_schedules_of_all() {
        let settings = cluster(
            "backup_schedule = '0 2 * * *'\nbackup_time_zone = 'Europe/Berlin'\n\
             drill_schedule = '0 3 1 * *'\n[cluster.main]\nbackup_schedule = ' 30  1 * * SUN '\n\
             backup_catch_up = false\nbackup_rate_limit = 50000000\n",
        );
        let settings = settings.expect("valid");
        let shown = |schedule: &Option<Schedule>| schedule.as_ref().map(ToString::to_string);
        let schedules = &settings.schedules;
        let backup = shown(&schedules.backup);
        assert_eq!(backup.as_deref(), Some("30 1 * * SUN Europe/Berlin"));
        assert_eq!(shown(&schedules.drill).as_deref(), Some("0 3 1 * * UTC"));
        assert!(!schedules.backup_catch_up);
        assert_eq!(settings.backup_rate_limit, Some(50_000_000));
        let none = cluster("").expect("valid");
        assert_eq!(
            (none.schedules.backup, none.backup_rate_limit),
            (None, None)
        );
        assert!(none.schedules.backup_catch_up);
    }

    #[test]
    fn a_wrong_value_is_refused_with_its_key_and_an_example() {
        for (text, parts) in [
            (
                "backup_schedule = 'at two'",
                ["backup_schedule = \"at two\"", "\"0 2 * * *\""],
            ),
            (
                "drill_schedule = '0 3 32 * *'",
                ["drill_schedule = \"0 3 32 * *\"", "found 32"],
            ),
            (
                "backup_schedule = '0 2 * * *'\nbackup_time_zone = 'CEST+2'",
                ["backup_time_zone = \"CEST+2\"", "Europe/Berlin"],
            ),
            (
                "drill_time_zone = 'Mars'",
                ["drill_time_zone = \"Mars\"", "\"UTC\""],
            ),
            (
                "backup_rate_limit = 1000",
                ["backup_rate_limit = 1000 ", "50000000"],
            ),
            (
                "backup_rate_limit = 2000000000",
                ["backup_rate_limit = 2000000000 ", "1073741824"],
            ),
            (
                "drill_report_dir = 'reports'",
                ["drill_report_dir = \"reports\"", "absolute"],
            ),
            (
                "backup_shedule = '0 2 * * *'",
                ["\"backup_shedule\"", "did you mean \"backup_schedule\""],
            ),
        ] {
            let error = cluster(text).expect_err(text).to_string();
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
        }
    }

    #[test]
    fn a_program_that_only_reads_the_repository_does_not_parse_schedules() {
        let mut file = ConfigFile::parse("repository = 'file:///r'\nbackup_schedule = 'x'\n");
        let file = file.as_mut().expect("its syntax is right");
        file.forget_daemon();
        let settings = Settings::from_file(&CommonArgs::default(), file).expect("valid");
        let cluster = settings.cluster().expect("one cluster");
        assert_eq!(cluster.schedules.backup, None);
    }
}
