//! The cards that show where WAL waits: slot, spool, queue and repository.

use maud::{Markup, html};
use repository::store::MemberState;
use status::{
    report::{ClusterReport, SlotReport},
    units,
};

use super::{
    format::{bytes, details, duration},
    view::View,
};

/// Renders the cards for slot, spool, queue and repository.
pub(super) fn render(view: &View<'_>) -> Markup {
    let report = view.report;
    html! {
        section class="quad" id="flow" data-live aria-label="Where WAL waits" {
            (slot(report.slot.as_ref()).render())
            (spool(report).render())
            (queue(report).render())
            (repository(report).render())
        }
    }
}

/// A card with a number, the used share if there is a limit, and notes.
struct Card {
    title: &'static str,
    value: Markup,
    share: Option<f64>,
    notes: Vec<Markup>,
}

impl Card {
    fn render(&self) -> Markup {
        html! {
            div class="card" {
                h2 { (self.title) }
                p class="value" { (self.value) }
                @if let Some(share) = self.share {
                    meter min="0" max="1" low="0.75" high="0.9" optimum="0"
                        value=(format!("{share:.3}")) aria-label={ (self.title) " used" } {
                        (format!("{:.0} %", share * 100.0))
                    }
                }
                div class="notes" { @for note in &self.notes { span { (note) } } }
            }
        }
    }
}

fn slot(slot: Option<&SlotReport>) -> Card {
    let card = |value, share, notes| Card {
        title: "Slot",
        value,
        share,
        notes,
    };
    let unknown = html! { "unknown" };
    let Some(slot) = slot else {
        let note = html! { "the server was not asked yet" };
        return card(unknown, None, vec![note]);
    };
    let Some(status) = &slot.wal_status else {
        let note = html! { "its limit is unknown while the server is not asked" };
        return card(unknown, None, vec![html! { (slot.name) }, note]);
    };
    let named = html! { (slot.name) ": " (status) };
    let Some(safe) = slot.safe_wal_bytes else {
        let note = "max_slot_wal_keep_size sets no limit: PostgreSQL keeps WAL until its disk is \
                    full";
        let value = html! { (bytes(slot.retained_bytes)) " " small { "used, no limit" } };
        return card(value, None, vec![named, html! { (note) }]);
    };
    let retained = slot.retained_bytes.unwrap_or_default();
    let limit = retained.saturating_add(safe);
    let share = retained as f64 / (limit as f64).max(1.0);
    let value = html! {
        (bytes(slot.retained_bytes)) " " small { "of " (bytes(Some(limit))) " used" }
    };
    // The forecast is of interest only if nothing is archived any more.
    let forecast = match slot.full_in_seconds {
        Some(left) if left > 7.0 * 86_400.0 => "not full within 7 d if archiving stops".to_owned(),
        Some(left) => format!("full in {} if archiving stops", duration(left)),
        None => "no WAL is written".to_owned(),
    };
    card(value, Some(share), vec![named, html! { (forecast) }])
}

fn spool(report: &ClusterReport) -> Card {
    let (used, limit) = (
        report.counters.spool_used_bytes,
        report.counters.spool_limit_bytes,
    );
    Card {
        title: "Spool",
        value: html! { (bytes(Some(used))) },
        share: limit.map(|limit| used as f64 / (limit as f64).max(1.0)),
        notes: vec![html! { "of " (bytes(limit)) " that its disk has for it" }],
    }
}

fn queue(report: &ClusterReport) -> Card {
    let counters = &report.counters;
    let left = if counters.upload_queue_bytes == 0 {
        "nothing waits"
    } else {
        "waits for the repository"
    };
    Card {
        title: "Upload queue",
        value: html! { (bytes(Some(counters.upload_queue_bytes))) },
        share: None,
        notes: vec![
            html! { (left) },
            html! { (counters.segments_completed) " segments stored since the start" },
        ],
    }
}

fn repository(report: &ClusterReport) -> Card {
    let mut places = report.repositories.iter();
    let is_away = places.any(|place| place.problem().is_some());
    let state = match report.repository_error.is_some() {
        true => "✖ failing",
        false if is_away => "▲ one is away or incomplete",
        false => "✓ answers",
    };
    let mut notes = if report.repositories.is_empty() {
        vec![html! { (report.repository) }]
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
        None => html! { "not verified yet: run " code { "wal-archiver verify" } },
        Some(0) => html! { "no damaged object found" },
        Some(objects) => html! { strong { (objects) " damaged object(s)" } },
    });
    Card {
        title: "Repository",
        value: html! { (state) },
        share: None,
        notes,
    }
}

/// Describes one of several repositories, and the WAL that it lacks. Shortens an error that
/// `reason` contains.
fn place(place: &MemberState, reason: &str) -> Markup {
    let shortened = |text: &str| details(&units::shorten(text, &[reason]));
    let how = match (&place.error, &place.older, place.queued_bytes, place.behind) {
        (Some(error), ..) => html! { strong { "✖ away" } ": " (shortened(error)) },
        (None, Some(older), ..) => {
            html! { strong { "▲ was incomplete" } ": " (shortened(older)) }
        }
        (None, None, 1.., _) => {
            html! { "▲ " (bytes(Some(place.queued_bytes as u64))) " wait for it" }
        }
        (None, None, 0, true) => html! { "▲ catching up from another" },
        (None, None, 0, false) => html! { "✓ in step" },
    };
    html! { (place.url) ": " (how) }
}
