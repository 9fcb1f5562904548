//! The periodic operations of the daemon: base backups and restore drills.

use status::schedule::ScheduleReport;

use super::{
    format::{escape, instant, seconds, span},
    tables::table,
    view::View,
};

/// Renders a table with a row for each schedule. Renders nothing without a schedule.
pub(super) fn render(out: &mut String, view: &View<'_>) {
    let report = view.report;
    let schedules = [
        ("Base backup", &report.backup_schedule),
        ("Restore drill", &report.drill_schedule),
    ];
    let rows: Vec<[String; 4]> = schedules
        .into_iter()
        .filter_map(|(name, schedule)| {
            let schedule = schedule.as_ref()?;
            Some([
                name.to_owned(),
                format!(
                    "<code>{}</code> {}",
                    escape(&schedule.schedule),
                    escape(&schedule.time_zone)
                ),
                schedule
                    .next_run
                    .map_or_else(|| "not known yet".to_owned(), instant),
                state(schedule, view),
            ])
        })
        .collect();
    if rows.is_empty() {
        return;
    }
    let columns = ["Operation", "Schedule", "Next run", "State"];
    table(out, ("schedules", "Schedules"), columns, &rows, "");
}

fn state(schedule: &ScheduleReport, view: &View<'_>) -> String {
    let now = view.report.as_of;
    if let Some(since) = schedule.running_since {
        return format!("runs since {}", seconds(Some(span(now, since))));
    }
    if let Some(reason) = &schedule.waits_for {
        return format!("waits: {}", escape(reason));
    }
    match &schedule.last_error {
        Some(error) => {
            let when = schedule.last_error_at.map(|time| span(now, time));
            format!("✖ failed {} ago: {}", seconds(when), escape(error))
        }
        None => "waits for its time".to_owned(),
    }
}
