//! The lower half of the page: waiting WAL, alerts and their remedies, backups, drills, events.

use std::fmt::Write as _;

use repository::store::MemberState;
use wal_format::OutcomeKind;

use super::{
    View,
    format::{amount, bytes, code, duration, escape, instant, seconds, span},
};
use crate::{
    alerts::Severity,
    report::{ClusterReport, SlotReport, words},
};

/// The maximum number of rows in a table. The API has all of them.
const ROWS_MAX: usize = 20;
const EVENTS_MAX: usize = 30;

/// Renders the cards for slot, spool, queue and repository.
pub(super) fn flow(out: &mut String, view: &View<'_>) {
    let report = view.report;
    let counters = &report.counters;
    out.push_str("<section class=\"quad\" id=\"flow\" data-live aria-label=\"Where WAL waits\">");
    let (slot, slot_bar, slot_notes) = slot(report.slot.as_ref(), report.wal_bytes_per_second);
    card(out, "Slot headroom", &slot, slot_bar, &slot_notes);
    let used = counters.spool_used_bytes as f64;
    let share = counters
        .spool_limit_bytes
        .map(|limit| used / (limit as f64).max(1.0));
    card(
        out,
        "Spool",
        &bytes(Some(counters.spool_used_bytes)),
        share,
        &[format!(
            "of {} that its disk has for it",
            bytes(counters.spool_limit_bytes)
        )],
    );
    let left = if counters.upload_queue_bytes == 0 {
        "nothing waits"
    } else {
        "waits for the repository"
    };
    card(
        out,
        "Upload queue",
        &bytes(Some(counters.upload_queue_bytes)),
        None,
        &[
            left.to_owned(),
            format!(
                "{} segments stored since the start",
                counters.segments_completed
            ),
        ],
    );
    let state = if report.repository_fails() {
        "✖ failing"
    } else {
        "✓ answers"
    };
    let mut notes = if report.repositories.is_empty() {
        vec![escape(&report.repository)]
    } else {
        let place = |state| place(state, &report.reason);
        report.repositories.iter().map(place).collect()
    };
    let error = report.repository_error.as_deref();
    let members = report.repositories.iter().map(|place| &place.error);
    let mut shown: Vec<&str> = members.filter_map(Option::as_deref).collect();
    shown.push(&report.reason);
    notes.extend(error.map(|error| escape(&words::shorten(error, &shown))));
    notes.push(match report.corrupt_objects {
        None => "not verified yet: run <code>wal-archiver verify</code>".to_owned(),
        Some(0) => "no damaged object found".to_owned(),
        Some(objects) => format!("<strong>{objects} damaged object(s)</strong>"),
    });
    card(out, "Repository", state, None, &notes);
    out.push_str("</section>");
}

fn slot(slot: Option<&SlotReport>, rate: Option<f64>) -> (String, Option<f64>, Vec<String>) {
    let Some(slot) = slot else {
        return (
            "unknown".to_owned(),
            None,
            vec!["the server was not asked yet".to_owned()],
        );
    };
    let status = slot.wal_status.as_deref().unwrap_or("unknown");
    let mut notes = vec![format!(
        "{}: {}, keeps {}",
        escape(&slot.name),
        escape(status),
        bytes(slot.retained_bytes)
    )];
    if slot.wal_status.is_none() {
        notes.push("its limit is unknown while the server is not asked".to_owned());
        return ("unknown".to_owned(), None, notes);
    }
    let Some(safe) = slot.safe_wal_bytes else {
        notes.push(
            "max_slot_wal_keep_size sets no limit: PostgreSQL keeps WAL until its disk is full"
                .to_owned(),
        );
        return ("no limit".to_owned(), None, notes);
    };
    let retained = slot.retained_bytes.unwrap_or_default() as f64;
    let share = retained / (retained + safe as f64).max(1.0);
    notes.push(format!("{} may still be written", bytes(Some(safe))));
    let time = match (slot.full_in_seconds, rate) {
        (Some(left), Some(rate)) => {
            notes.push(format!(
                "at {}/s, the mean of the last minute",
                amount(rate)
            ));
            if left > 7.0 * 86_400.0 {
                "over 7 d <small>to full</small>".to_owned()
            } else {
                format!("{} <small>to full</small>", duration(left))
            }
        }
        (None, Some(_)) => "idle <small>no WAL is written</small>".to_owned(),
        (_, None) => "unknown".to_owned(),
    };
    (time, Some(share), notes)
}

/// Describes one of several repositories, and the WAL that it lacks. Shortens an error that
/// `reason` contains.
fn place(place: &MemberState, reason: &str) -> String {
    let how = match (&place.error, place.queued_bytes, place.behind) {
        (Some(error), ..) => {
            let error = words::shorten(error, &[reason]);
            format!("<strong>✖ away</strong>: {}", escape(&error))
        }
        (None, 1.., _) => format!("▲ {} wait for it", bytes(Some(place.queued_bytes as u64))),
        (None, 0, true) => "▲ catching up from another".to_owned(),
        (None, 0, false) => "✓ in step".to_owned(),
    };
    format!("{}: {how}", escape(&place.url))
}

fn card(out: &mut String, title: &str, value: &str, share: Option<f64>, notes: &[String]) {
    let meter = share.map_or_else(String::new, |share| {
        format!(
            "<meter min=\"0\" max=\"1\" low=\"0.75\" high=\"0.9\" optimum=\"0\" value=\"{share:.3}\" aria-label=\"{title} used\">{:.0} %</meter>",
            share * 100.0
        )
    });
    let notes: String = notes.iter().map(|note| format!("<p>{note}</p>")).collect();
    let _ = write!(
        out,
        "<div class=\"card\"><h2>{title}</h2><p class=\"value\">{value}</p>{meter}<div class=\"notes\">{notes}</div></div>"
    );
}

/// Returns the long texts that the page shows in full in its sentence and in the repository's card.
fn displayed(report: &ClusterReport) -> Vec<&str> {
    let members = report.repositories.iter().map(|place| &place.error);
    let errors = members.chain([&report.repository_error]);
    let errors = errors.filter_map(Option::as_deref);
    errors.chain([report.reason.as_str()]).collect()
}

pub(super) fn alerts(out: &mut String, report: &ClusterReport) {
    let _ = write!(
        out,
        "<section class=\"card\" id=\"alerts\" data-live aria-labelledby=\"alerts-title\"><h2 id=\"alerts-title\">Alerts \
         <span class=\"count\">{}</span></h2>",
        report.alerts.len()
    );
    if report.alerts.is_empty() {
        out.push_str("<p class=\"empty\">Nothing needs you.</p></section>");
        return;
    }
    let displayed = displayed(report);
    out.push_str("<ul class=\"alerts\">");
    for alert in &report.alerts {
        let (shape, word) = match alert.severity {
            Severity::Critical => ("✖", "critical"),
            Severity::Warning => ("▲", "warning"),
        };
        let _ = write!(
            out,
            "<li class=\"{word}\"><p class=\"alert-line\"><span class=\"severity\"><span aria-hidden=\"true\">{shape}</span> {word}</span> \
             <strong>{}</strong> <span class=\"as-of\">since {}</span></p><p>{}</p><p class=\"runbook\">{}</p></li>",
            alert.name,
            instant(alert.since),
            code(&words::shorten(&alert.summary, &displayed)),
            code(alert.runbook)
        );
    }
    out.push_str("</ul></section>");
}

/// Renders a table. If it is empty, renders how to get its first row.
fn table(out: &mut String, id: &str, title: &str, columns: &[&str], rows: &[String], empty: &str) {
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
        "<div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-labelledby=\"{id}-title\"><table><thead><tr>{head}</tr></thead><tbody>{}</tbody></table></div></section>",
        rows.concat()
    );
}

pub(super) fn backups(out: &mut String, view: &View<'_>) {
    let newest = view.details.backups.iter().rev().take(ROWS_MAX);
    let rows: Vec<String> = newest
        .map(|backup| {
            format!(
                "<tr><th scope=\"row\">{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
                backup.id,
                instant(backup.finished),
                duration(span(backup.finished, backup.started)),
                bytes(Some(backup.stored_bytes)),
                backup.timeline
            )
        })
        .collect();
    let columns = ["Backup", "Restorable since", "Took", "Stored", "Timeline"];
    let empty = "None yet, so nothing can be restored. Run `wal-archiver backup`.";
    table(out, "backups", "Base backups", &columns, &rows, empty);
}

pub(super) fn drills(out: &mut String, view: &View<'_>) {
    let drills: Vec<_> = view.details.of_kind(OutcomeKind::Drill).collect();
    let longest = drills
        .iter()
        .filter_map(|drill| drill.rto_seconds)
        .fold(0.0, f64::max);
    let rows: Vec<String> = drills
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
            format!(
                "<tr><th scope=\"row\">{}</th><td>{verdict}</td><td>{bar}{}</td><td>{}</td><td>{}</td></tr>",
                instant(drill.finished),
                seconds(drill.rto_seconds),
                seconds(drill.loss_seconds),
                escape(&drill.message)
            )
        })
        .collect();
    let columns = ["When", "Verdict", "RTO", "Lost", "Found"];
    let empty = "None yet: nothing has proved that a restore works. Restore to an empty directory with `pitr-restore --target-dir DIR --start`.";
    table(out, "drills", "Restore drills", &columns, &rows, empty);
}

pub(super) fn events(out: &mut String, view: &View<'_>) {
    let events = view.cluster.events().after(0);
    let displayed = displayed(view.report);
    let rows: Vec<String> = events
        .iter()
        .rev()
        .take(EVENTS_MAX)
        .map(|event| {
            format!(
                "<tr class=\"{}\"><td>{}</td><td>{}</td><td>{}</td></tr>",
                escape(&event.severity),
                instant(event.time),
                escape(&event.kind),
                code(&words::shorten(&event.message, &displayed))
            )
        })
        .collect();
    let columns = ["Time", "Kind", "What happened"];
    table(
        out,
        "events",
        "Events",
        &columns,
        &rows,
        "Nothing has happened yet.",
    );
}
