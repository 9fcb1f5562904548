//! The tables of base backups and drills.

use maud::{Markup, html};
use status::units::{self, DRILL_ADVICE};
use wal_format::OutcomeKind;

use super::{
    format::{bytes, code, duration, instant, seconds, span},
    view::View,
};

/// The maximum number of rows in a table. The API has all of them.
const ROWS_MAX: usize = 20;

/// Renders a table, whose rows are stacked on a narrow screen. If it is empty, renders how to get
/// its first row.
pub(super) fn table<const N: usize>(
    (id, title): (&str, &str),
    columns: [&str; N],
    rows: &[[Markup; N]],
    empty: &str,
) -> Markup {
    let title_id = format!("{id}-title");
    html! {
        section class="card" id=(id) data-live aria-labelledby=(title_id) {
            h2 id=(title_id) { (title) }
            @if rows.is_empty() {
                p class="empty" { (code(empty)) }
            } @else {
                div class="scroll" tabindex="0" role="group" aria-labelledby=(title_id) {
                    table class="stack" {
                        thead { tr { @for column in columns { th scope="col" { (column) } } } }
                        tbody { @for row in rows { (line(columns, row)) } }
                    }
                }
            }
        }
    }
}

fn line<const N: usize>(columns: [&str; N], row: &[Markup; N]) -> Markup {
    html! {
        tr {
            @for (number, (name, cell)) in columns.iter().zip(row).enumerate() {
                @if number == 0 {
                    th scope="row" { (cell) }
                } @else {
                    td data-name=(name) { (cell) }
                }
            }
        }
    }
}

/// Renders the progress of the base backup that runs on the server.
fn progress(view: &View<'_>) -> Markup {
    let Some(progress) = &view.report.backup_progress else {
        return html! {};
    };
    let (streamed, total) = (progress.streamed_bytes, progress.total_bytes);
    // Without both numbers, the bar shows only that something runs.
    let known = streamed.zip(total).filter(|(_, total)| *total > 0);
    let value = known.map(|(streamed, total)| streamed.min(total));
    let total_known = known.map(|(_, total)| total);
    let text = units::progress(&progress.phase, streamed, total, progress.bytes_per_second);
    html! {
        section class="card" id="progress" aria-labelledby="progress-title" {
            h2 id="progress-title" { "A base backup runs" }
            progress max=[total_known] value=[value] aria-label="Progress of the base backup" {}
            p class="hint" { (text) }
        }
    }
}

pub(super) fn backups(view: &View<'_>) -> Markup {
    let newest = view.details.backups.iter().rev().take(ROWS_MAX);
    let rows: Vec<[Markup; 5]> = newest
        .map(|backup| {
            [
                html! { (backup.id) },
                instant(backup.finished),
                html! { (duration(span(backup.finished, backup.started))) },
                html! { (bytes(Some(backup.stored_bytes))) },
                html! { (backup.timeline) },
            ]
        })
        .collect();
    let columns = ["Backup", "Restorable since", "Took", "Stored", "Timeline"];
    let empty = match view.report.looked {
        true => "None yet, so nothing can be restored. Run `wal-archiver backup`.",
        false => "Not known yet.",
    };
    html! {
        div class="live" id="running" data-live { (progress(view)) }
        (table(("backups", "Base backups"), columns, &rows, empty))
    }
}

pub(super) fn drills(view: &View<'_>) -> Markup {
    let drills: Vec<_> = view.details.of_kind(OutcomeKind::Drill).collect();
    let longest = drills
        .iter()
        .filter_map(|drill| drill.rto_seconds)
        .fold(0.0, f64::max);
    // Shows the trend by a bar with a length proportional to the RTO.
    let bar = |rto: f64| {
        let width = format!("{:.0}", rto / longest * 90.0);
        html! {
            svg class="bar-cell" width="90" height="10" aria-hidden="true" {
                rect width=(width) height="10" rx="2" {}
            }
            " "
        }
    };
    let rows: Vec<[Markup; 5]> = drills
        .iter()
        .rev()
        .take(ROWS_MAX)
        .map(|drill| {
            let verdict = if drill.passed {
                "✓ passed"
            } else {
                "✖ failed"
            };
            let bar = drill.rto_seconds.filter(|_| longest > 0.0).map(bar);
            [
                instant(drill.finished),
                html! { (verdict) },
                html! { @if let Some(bar) = bar { (bar) } (seconds(drill.rto_seconds)) },
                html! { (seconds(drill.loss_seconds)) },
                html! { (drill.message) },
            ]
        })
        .collect();
    let columns = ["When", "Verdict", "RTO", "Lost", "Found"];
    let empty = format!("None yet: nothing has proved that a restore works. {DRILL_ADVICE}");
    table(("drills", "Restore drills"), columns, &rows, &empty)
}
