//! The cards that show where WAL waits: slot, spool, queue and repository.

use std::fmt::Write as _;

use repository::store::MemberState;
use status::{report::SlotReport, units};

use super::{
    format::{bytes, details, duration, escape},
    view::View,
};

/// Renders the cards for slot, spool, queue and repository.
pub(super) fn render(out: &mut String, view: &View<'_>) {
    let report = view.report;
    let counters = &report.counters;
    out.push_str("<section class=\"quad\" id=\"flow\" data-live aria-label=\"Where WAL waits\">");
    let (slot, slot_bar, slot_notes) = slot(report.slot.as_ref());
    card(out, "Slot", &slot, slot_bar, &slot_notes);
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
    let is_away = report
        .repositories
        .iter()
        .any(|place| place.problem().is_some());
    let state = match report.repository_error.is_some() {
        true => "✖ failing",
        false if is_away => "▲ one is away or incomplete",
        false => "✓ answers",
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
    notes.extend(error.map(|error| details(&units::shorten(error, &shown))));
    notes.push(match report.corrupt_objects {
        None => "not verified yet: run <code>wal-archiver verify</code>".to_owned(),
        Some(0) => "no damaged object found".to_owned(),
        Some(objects) => format!("<strong>{objects} damaged object(s)</strong>"),
    });
    card(out, "Repository", state, None, &notes);
    out.push_str("</section>");
}

/// Returns the value, the used share and the notes of the slot's card.
fn slot(slot: Option<&SlotReport>) -> (String, Option<f64>, Vec<String>) {
    let Some(slot) = slot else {
        return (
            "unknown".to_owned(),
            None,
            vec!["the server was not asked yet".to_owned()],
        );
    };
    let name = escape(&slot.name);
    let Some(status) = &slot.wal_status else {
        let note = "its limit is unknown while the server is not asked".to_owned();
        return ("unknown".to_owned(), None, vec![name, note]);
    };
    let mut notes = vec![format!("{name}: {}", escape(status))];
    let Some(safe) = slot.safe_wal_bytes else {
        notes.push(
            "max_slot_wal_keep_size sets no limit: PostgreSQL keeps WAL until its disk is full"
                .to_owned(),
        );
        let value = format!(
            "{} <small>used, no limit</small>",
            bytes(slot.retained_bytes)
        );
        return (value, None, notes);
    };
    let retained = slot.retained_bytes.unwrap_or_default();
    let limit = retained.saturating_add(safe);
    let share = retained as f64 / (limit as f64).max(1.0);
    let value = format!(
        "{} <small>of {} used</small>",
        bytes(slot.retained_bytes),
        bytes(Some(limit))
    );
    // The forecast is of interest only if nothing is archived any more.
    notes.push(match slot.full_in_seconds {
        Some(left) if left > 7.0 * 86_400.0 => "not full within 7 d if archiving stops".to_owned(),
        Some(left) => format!("full in {} if archiving stops", duration(left)),
        None => "no WAL is written".to_owned(),
    });
    (value, Some(share), notes)
}

/// Describes one of several repositories, and the WAL that it lacks. Shortens an error that
/// `reason` contains.
fn place(place: &MemberState, reason: &str) -> String {
    let how = match (&place.error, place.queued_bytes, place.behind) {
        (Some(error), ..) => {
            let error = units::shorten(error, &[reason]);
            format!("<strong>✖ away</strong>: {}", details(&error))
        }
        (None, ..) if place.older.is_some() => {
            let older = place.older.as_deref().unwrap_or_default();
            let older = units::shorten(older, &[reason]);
            format!("<strong>▲ was incomplete</strong>: {}", details(&older))
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
    let notes: String = notes
        .iter()
        .map(|note| format!("<span>{note}</span>"))
        .collect();
    let _ = write!(
        out,
        "<div class=\"card\"><h2>{title}</h2><p class=\"value\">{value}</p>{meter}<div class=\"notes\">{notes}</div></div>"
    );
}
