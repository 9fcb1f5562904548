//! The head of a cluster's page: the name and the state, and the two questions of an operator in
//! large type. What is lost if the primary fails now, and how long is it until it is back?

use std::fmt::Write as _;

use status::{report::ClusterReport, state::State};

use super::{
    badge::badge_html,
    format::{bytes, details, duration, escape, instant, span, text},
    view::View,
};

pub(super) fn render(out: &mut String, view: &View<'_>) {
    let report = view.report;
    let fleet = if view.of_fleet {
        "<p class=\"crumb\"><a href=\"/\">← All clusters</a></p>"
    } else {
        ""
    };
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "<section class=\"hero {state}\" id=\"hero\" data-live aria-label=\"Summary\">{fleet}\
         <div class=\"hero-line\"><h1>{name}</h1>{badge}<span class=\"as-of\">as of {as_of}</span></div>\
         <p class=\"answer\" id=\"sentence\">{lines}</p>\
         <p class=\"reason\" id=\"reason\">{reason}</p>{more}<p class=\"facts\">{facts}</p></section>",
        state = report.state.name(),
        name = report.cluster,
        badge = badge_html(report.state),
        as_of = instant(report.as_of),
        lines = lines(report),
        reason = details(&reason(report)),
        more = more(report),
        facts = facts(report).join(" <span aria-hidden=\"true\">·</span> "),
    );
}

/// Returns the answers to the two questions.
pub(in crate::http) fn lines(report: &ClusterReport) -> String {
    let back = back(report);
    let mark = if back.is_estimate {
        " <small class=\"estimate\">estimate</small>"
    } else {
        ""
    };
    // The colour belongs to this answer. The state may have another reason.
    let tone = if loses_too_much(report) {
        " class=\"bad\""
    } else {
        ""
    };
    format!(
        "<span{tone}>{}.</span> <span>{}.{mark}</span>",
        escape(&loss(report)),
        escape(&back.text)
    )
}

/// Returns the facts about the server.
fn facts(report: &ClusterReport) -> Vec<String> {
    let mut facts = Vec::new();
    if let Some(version) = &report.source.server_version {
        facts.push(format!("PostgreSQL {}", escape(version)));
    }
    if let Some(timeline) = report.source.timeline {
        facts.push(format!("timeline {timeline}"));
    }
    if let Some(slot) = &report.slot {
        let active = if slot.active { "active" } else { "not active" };
        facts.push(format!("slot {} ({active})", escape(&slot.name)));
    }
    let lsn = report.source.flush_lsn;
    let lsn = lsn.map_or_else(|| "unknown".to_owned(), |lsn| lsn.to_string());
    facts.push(format!("flush LSN {lsn}"));
    facts
}

/// Lists the other causes of the state that no alert names.
fn more(report: &ClusterReport) -> String {
    let is_alert = |reason: &str| {
        let mut alerts = report.alerts.iter();
        alerts.any(|alert| alert.summary.contains(reason) || reason.contains(&alert.summary))
    };
    let others = report.causes.iter().skip(1);
    let others: String = others
        .filter(|cause| !is_alert(&cause.reason))
        .map(|cause| format!("<li>{}</li>", details(&capitalised(&cause.reason))))
        .collect();
    if others.is_empty() {
        return String::new();
    }
    format!("<ul class=\"causes\" aria-label=\"Other causes\">{others}</ul>")
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
