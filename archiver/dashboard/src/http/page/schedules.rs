//! The periodic operations of the daemon: base backups and restore drills.

use maud::{Markup, html};
use status::schedule::ScheduleReport;

use super::{
    format::{instant, seconds, span},
    tables::table,
    view::View,
};

/// Renders a table with a row for each schedule. Renders nothing without a schedule.
pub(super) fn render(view: &View<'_>) -> Markup {
    let report = view.report;
    let schedules = [
        ("Base backup", &report.backup_schedule),
        ("Restore drill", &report.drill_schedule),
    ];
    let rows: Vec<[Markup; 4]> = schedules
        .into_iter()
        .filter_map(|(name, schedule)| {
            let schedule = schedule.as_ref()?;
            let next = schedule.next_run.map(instant);
            Some([
                html! { (name) },
                html! { code { (schedule.schedule) } " " (schedule.time_zone) },
                next.unwrap_or_else(|| html! { "not known yet" }),
                html! { (state(schedule, view)) },
            ])
        })
        .collect();
    if rows.is_empty() {
        return html! {};
    }
    let columns = ["Operation", "Schedule", "Next run", "State"];
    table(("schedules", "Schedules"), columns, &rows, "")
}

fn state(schedule: &ScheduleReport, view: &View<'_>) -> String {
    let now = view.report.as_of;
    if let Some(since) = schedule.running_since {
        return format!("runs since {}", seconds(Some(span(now, since))));
    }
    if let Some(reason) = &schedule.waits_for {
        return format!("waits: {reason}");
    }
    match &schedule.last_error {
        Some(error) => {
            let when = schedule.last_error_at.map(|time| span(now, time));
            format!("✖ failed {} ago: {error}", seconds(when))
        }
        None => "waits for its time".to_owned(),
    }
}
