//! The tables of base backups and drills.

use std::fmt::Write as _;

use wal_format::OutcomeKind;

use super::{
    format::{bytes, code, duration, escape, instant, seconds, span},
    view::View,
};
use status::units::{self, DRILL_ADVICE};

/// The maximum number of rows in a table. The API has all of them.
const ROWS_MAX: usize = 20;

/// Renders a table, whose rows are stacked on a narrow screen. If it is empty, renders how to get
/// its first row.
pub(super) fn table<const N: usize>(
    out: &mut String,
    (id, title): (&str, &str),
    columns: [&str; N],
    rows: &[[String; N]],
    empty: &str,
) {
    let _ = write!(
        out,
        "<section class=\"card\" id=\"{id}\" data-live aria-labelledby=\"{id}-title\"><h2 id=\"{id}-title\">{title}</h2>"
    );
    if rows.is_empty() {
        let _ = write!(out, "<p class=\"empty\">{}</p></section>", code(empty));
        return;
    }
    let head: String = columns
        .iter()
        .map(|column| format!("<th scope=\"col\">{column}</th>"))
        .collect();
    let _ = write!(
        out,
        "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-labelledby=\"{id}-title\">\
         <table class=\"stack\"><thead><tr>{head}</tr></thead><tbody>"
    );
    for row in rows {
        out.push_str("<tr>");
        for (number, (name, cell)) in columns.iter().zip(row).enumerate() {
            let _ = match number {
                0 => write!(out, "<th scope=\"row\">{cell}</th>"),
                _ => write!(out, "<td data-name=\"{name}\">{cell}</td>"),
            };
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div></section>");
}

/// Renders the progress of the base backup that runs on the server.
fn progress(out: &mut String, view: &View<'_>) {
    let Some(progress) = &view.report.backup_progress else {
        return;
    };
    let (streamed, total) = (progress.streamed_bytes, progress.total_bytes);
    let bar = match (streamed, total) {
        (Some(streamed), Some(total)) if total > 0 => format!(
            "<progress max=\"{total}\" value=\"{}\" aria-label=\"Progress of the base backup\"></progress>",
            streamed.min(total)
        ),
        _ => "<progress aria-label=\"Progress of the base backup\"></progress>".to_owned(),
    };
    let (phase, rate) = (&progress.phase, progress.bytes_per_second);
    let text = units::progress(phase, streamed, total, rate);
    let _ = write!(
        out,
        "<section class=\"card\" id=\"progress\" aria-labelledby=\"progress-title\"><h2 id=\"progress-title\">A base backup runs</h2>\
         {bar}<p class=\"hint\">{}</p></section>",
        escape(&text)
    );
}

pub(super) fn backups(out: &mut String, view: &View<'_>) {
    out.push_str("<div class=\"live\" id=\"running\" data-live>");
    progress(out, view);
    out.push_str("</div>");
    let newest = view.details.backups.iter().rev().take(ROWS_MAX);
    let rows: Vec<[String; 5]> = newest
        .map(|backup| {
            [
                backup.id.to_string(),
                instant(backup.finished),
                duration(span(backup.finished, backup.started)),
                bytes(Some(backup.stored_bytes)),
                backup.timeline.to_string(),
            ]
        })
        .collect();
    let columns = ["Backup", "Restorable since", "Took", "Stored", "Timeline"];
    let empty = match view.report.looked {
        true => "None yet, so nothing can be restored. Run `wal-archiver backup`.",
        false => "Not known yet.",
    };
    table(out, ("backups", "Base backups"), columns, &rows, empty);
}

pub(super) fn drills(out: &mut String, view: &View<'_>) {
    let drills: Vec<_> = view.details.of_kind(OutcomeKind::Drill).collect();
    let longest = drills
        .iter()
        .filter_map(|drill| drill.rto_seconds)
        .fold(0.0, f64::max);
    let rows: Vec<[String; 5]> = drills
        .iter()
        .rev()
        .take(ROWS_MAX)
        .map(|drill| {
            let verdict = if drill.passed { "✓ passed" } else { "✖ failed" };
            // Shows the trend by a bar with a length proportional to the RTO.
            let bar = drill.rto_seconds.filter(|_| longest > 0.0).map_or_else(String::new, |rto| {
                format!(
                    "<svg class=\"bar-cell\" width=\"90\" height=\"10\" aria-hidden=\"true\"><rect width=\"{:.0}\" height=\"10\" rx=\"2\"/></svg> ",
                    rto / longest * 90.0
                )
            });
            [
                instant(drill.finished),
                verdict.to_owned(),
                format!("{bar}{}", seconds(drill.rto_seconds)),
                seconds(drill.loss_seconds),
                escape(&drill.message),
            ]
        })
        .collect();
    let columns = ["When", "Verdict", "RTO", "Lost", "Found"];
    let empty = format!("None yet: nothing has proved that a restore works. {DRILL_ADVICE}");
    table(out, ("drills", "Restore drills"), columns, &rows, &empty);
}
