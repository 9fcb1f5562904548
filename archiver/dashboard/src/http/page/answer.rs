//! The head of a cluster's page: the name and the state, and the two questions of an operator in
//! large type. What is lost if the primary fails now, and how long is it until it is back?

use maud::{Markup, html};
use status::{report::ClusterReport, state::State};

use super::{
    badge::badge_html,
    format::{bytes, details, duration, instant, span, text},
    view::View,
};

pub(super) fn render(view: &View<'_>) -> Markup {
    let report = view.report;
    html! {
        section class={ "hero " (report.state.name()) } id="hero" data-live aria-label="Summary" {
            @if view.of_fleet {
                p class="crumb" { a href="/" { "← All clusters" } }
            }
            div class="hero-line" {
                h1 { (report.cluster) }
                (badge_html(report.state))
                span class="as-of" { "as of " (instant(report.as_of)) }
            }
            p class="answer" id="sentence" { (lines(report)) }
            p class="reason" id="reason" { (details(&reason(report))) }
            (more(report))
            p class="facts" {
                @for (number, fact) in facts(report).iter().enumerate() {
                    @if number > 0 { " " span aria-hidden="true" { "·" } " " }
                    (fact)
                }
            }
        }
    }
}

/// Renders the answers to the two questions.
pub(in crate::http) fn lines(report: &ClusterReport) -> Markup {
    let back = back(report);
    // The colour belongs to this answer. The state may have another reason.
    let tone = loses_too_much(report).then_some("bad");
    html! {
        span class=[tone] { (loss(report)) "." }
        " "
        span {
            (back.text) "."
            @if back.is_estimate { " " small class="estimate" { "estimate" } }
        }
    }
}

/// Returns the facts about the server.
fn facts(report: &ClusterReport) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(version) = &report.source.server_version {
        facts.push(format!("PostgreSQL {version}"));
    }
    if let Some(timeline) = report.source.timeline {
        facts.push(format!("timeline {timeline}"));
    }
    if let Some(slot) = &report.slot {
        let active = if slot.active { "active" } else { "not active" };
        facts.push(format!("slot {} ({active})", slot.name));
    }
    let lsn = report.source.flush_lsn;
    let lsn = lsn.map_or_else(|| "unknown".to_owned(), |lsn| lsn.to_string());
    facts.push(format!("flush LSN {lsn}"));
    facts
}

/// Lists the other causes of the state that no alert names.
fn more(report: &ClusterReport) -> Markup {
    let is_alert = |reason: &str| {
        let mut alerts = report.alerts.iter();
        alerts.any(|alert| alert.summary.contains(reason) || reason.contains(&alert.summary))
    };
    let others = report.causes.iter().skip(1);
    let others = others.filter(|cause| !is_alert(&cause.reason));
    let others: Vec<_> = others.map(|cause| capitalised(&cause.reason)).collect();
    html! {
        @if !others.is_empty() {
            ul class="causes" aria-label="Other causes" {
                @for other in &others { li { (details(other)) } }
            }
        }
    }
}

/// Returns the summary of a cluster for the fleet's page.
pub(super) fn sentence(report: &ClusterReport) -> String {
    format!("{}. {}", loss(report), reason(report))
}

/// Returns true if more would be lost than the target allows.
fn loses_too_much(report: &ClusterReport) -> bool {
    let has_none = report.looked && report.last_backup.is_none();
    let rpo = report.durable.remote.rpo_seconds;
    has_none
        || report.window.refusal.is_some()
        || rpo.is_some_and(|rpo| rpo > report.rpo_target_seconds)
}

/// Answers what is lost if the primary fails now.
fn loss(report: &ClusterReport) -> String {
    match report.durable.remote.rpo_seconds {
        _ if report.looked && report.last_backup.is_none() => {
            "Losing the primary now loses everything".to_owned()
        }
        _ if report.window.refusal.is_some() => match report.window.latest {
            Some(latest) => format!(
                "Losing the primary now loses everything after {}",
                text(latest, "%Y-%m-%d %H:%M:%S UTC")
            ),
            None => "Losing the primary now loses everything".to_owned(),
        },
        None => "What losing the primary now would lose is not known".to_owned(),
        Some(rpo) if report.state == State::Unknown => {
            format!(
                "The primary was last proved safe {} ago; what it wrote since is not known",
                duration(rpo)
            )
        }
        Some(0.0) => "Losing the primary now loses nothing that it had flushed".to_owned(),
        Some(rpo) => format!("Losing the primary now loses up to {}", duration(rpo)),
    }
}

/// The answer to how long a restore takes.
struct Back {
    text: String,
    /// True if the text contains an estimate.
    is_estimate: bool,
}

fn back(report: &ClusterReport) -> Back {
    let known = |text: &str| Back {
        text: text.to_owned(),
        is_estimate: false,
    };
    let Some(backup) = &report.last_backup else {
        return known(match report.looked {
            true => "Nothing can be restored yet",
            false => "What can be restored is not known yet",
        });
    };
    // The estimates are those of a restore to the present, which the plan refuses.
    if report.window.refusal.is_some() {
        return known(match report.window.latest {
            Some(_) => "How long a restore to that time takes is not known",
            None => "Nothing can be restored",
        });
    }
    if let Some(estimate) = report.rto.estimate_seconds {
        return Back {
            text: format!("A restore takes about {}", duration(estimate)),
            is_estimate: true,
        };
    }
    // No drill has measured a restore. Fetching a backup takes about as long as storing it.
    let fetch = duration(span(backup.finished, backup.started).max(1.0));
    let replay = match report.rto.wal_since_backup_bytes {
        Some(wal) => format!("the replay of {}", bytes(Some(wal))),
        None => "the replay of WAL".to_owned(),
    };
    Back {
        text: format!("A restore takes about {fetch} plus {replay}"),
        is_estimate: true,
    }
}

/// Returns the reason for the state as a sentence.
fn reason(report: &ClusterReport) -> String {
    let reason = capitalised(report.reason.trim_end_matches('.'));
    let end = if reason.ends_with(['?', '!']) {
        ""
    } else {
        "."
    };
    format!("{reason}{end}")
}

pub(super) fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}
