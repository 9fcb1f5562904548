//! The HTML pages. They are rendered here, so that they are readable without JavaScript. `app.js`
//! only updates them and moves the picker.
//!
//! Elements marked `data-live` have an id and are replaced by newer versions. Elements in which a
//! user may be typing are not marked. Invariant: every text from outside goes through
//! [`format::escape`].

use std::{fmt::Write as _, sync::Arc};

use jiff::Timestamp;

use self::format::{bytes, duration, escape, instant, seconds};
use crate::{
    monitor::Watched,
    pipeline::nearest::Located,
    report::{ClusterReport, Details, State, words},
};

mod chart;
mod fleet;
mod format;
mod picker;
mod runbook;
mod strip;
mod tables;

pub(super) use self::{chart::Range, fleet::fleet, runbook::runbook};

/// The style sheet, served as a separate file because the content security policy allows nothing
/// inline.
pub(super) const STYLE: &str = include_str!("page/style.css");
pub(super) const SCRIPT: &str = include_str!("page/app.js");
pub(super) const ICON: &str = include_str!("page/icon.svg");

/// The content of the page of one cluster.
pub(super) struct View<'a> {
    pub(super) report: &'a ClusterReport,
    pub(super) cluster: &'a Watched,
    pub(super) details: Arc<Details>,
    pub(super) range: Range,
    pub(super) picked: Option<(Timestamp, Result<Located, String>)>,
    pub(super) of_fleet: bool,
    pub(super) guarded: bool,
}

/// Renders the page of one cluster.
pub(super) fn cluster(view: &View<'_>) -> String {
    let report = view.report;
    let mut body = String::new();
    header(&mut body, view);
    tiles(&mut body, view);
    strip::render(&mut body, view);
    picker::render(&mut body, view);
    chart::render(&mut body, view);
    tables::flow(&mut body, view);
    tables::alerts(&mut body, report);
    tables::backups(&mut body, view);
    tables::drills(&mut body, view);
    tables::events(&mut body, view);
    let title = format!("{} · {} · Tidemark", badge(report.state).1, report.cluster);
    let attributes = format!(" data-cluster=\"{}\"", escape(report.cluster.as_str()));
    document(
        &title,
        &attributes,
        &body,
        view.guarded,
        Refresh::WithoutScript,
    )
}

/// The times at which a browser reloads a page automatically.
#[derive(Clone, Copy, Debug)]
enum Refresh {
    /// Every five seconds if scripts are disabled.
    WithoutScript,
    Never,
}

/// Renders the frame around every page.
fn document(title: &str, attributes: &str, body: &str, guarded: bool, refresh: Refresh) -> String {
    // A page with a form is never reloaded, because a user may be typing.
    let refresh = match refresh {
        Refresh::WithoutScript => {
            "<noscript><meta http-equiv=\"refresh\" content=\"5\"></noscript>"
        }
        Refresh::Never => "",
    };
    let logout = if guarded {
        "<form method=\"post\" action=\"/logout\"><button class=\"quiet\">Log out</button></form>"
    } else {
        ""
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\"><title>{title}</title>\
         <link rel=\"icon\" href=\"/icon.svg\"><link rel=\"stylesheet\" href=\"/style.css\">\
         <script src=\"/app.js\" defer></script>\
         {refresh}</head><body{attributes}>\
         <a class=\"skip\" href=\"#main\">Skip to content</a>\
         <header class=\"bar\"><a class=\"brand\" href=\"/\"><img src=\"/icon.svg\" alt=\"\" width=\"22\" height=\"22\"> Tidemark</a>\
         <nav aria-label=\"Elsewhere\"><a href=\"/metrics\">Metrics</a><a href=\"/api/v1/clusters\">API</a>\
         <a href=\"/api/v1/openapi.json\">OpenAPI</a>{logout}</nav></header>\
         <p id=\"stale\" role=\"status\" hidden></p><main id=\"main\">{body}</main></body></html>"
    )
}

pub(super) fn login(failed: bool) -> String {
    let wrong = if failed {
        "<p class=\"error\" role=\"alert\">This token is not known.</p>"
    } else {
        ""
    };
    let body = format!(
        "<section class=\"card login\"><h1>Log in</h1>{wrong}<form method=\"post\" action=\"/login\">\
         <label for=\"token\">Access token</label>\
         <input id=\"token\" name=\"token\" type=\"password\" autocomplete=\"current-password\" required>\
         <button>Log in</button></form></section>"
    );
    document("Log in · Tidemark", "", &body, false, Refresh::Never)
}

/// Returns the shape and the word of a state, so that it is recognizable without colours.
pub(super) fn badge(state: State) -> (&'static str, &'static str) {
    match state {
        State::Ok => ("●", "OK"),
        State::Degraded => ("▲", "DEGRADED"),
        State::AtRisk => ("◆", "AT RISK"),
        State::Broken => ("✖", "BROKEN"),
        State::Unknown => ("?", "UNKNOWN"),
    }
}

fn badge_html(state: State) -> String {
    let (shape, word) = badge(state);
    format!(
        "<span class=\"badge {}\"><span aria-hidden=\"true\">{shape}</span> {word}</span>",
        state.name()
    )
}

fn header(out: &mut String, view: &View<'_>) {
    let report = view.report;
    let unknown = || "unknown".to_owned();
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
    let lsn = report
        .source
        .flush_lsn
        .map_or_else(unknown, |lsn| lsn.to_string());
    facts.push(format!("flush LSN {lsn}"));
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
         <p class=\"sentence\" id=\"sentence\">{sentence}</p><p class=\"facts\">{facts}</p></section>",
        state = report.state.name(),
        name = report.cluster,
        badge = badge_html(report.state),
        as_of = instant(report.as_of),
        sentence = escape(&sentence(report)),
        facts = facts.join(" <span aria-hidden=\"true\">·</span> "),
    );
}

fn tiles(out: &mut String, view: &View<'_>) {
    let report = view.report;
    let remote = &report.durable.remote;
    let over = remote
        .rpo_seconds
        .is_none_or(|rpo| rpo > report.rpo_target_seconds);
    let rpo = vec![
        format!("target {}", duration(report.rpo_target_seconds)),
        format!("greatest in 24 h {}", seconds(report.rpo_max_24h_seconds)),
    ];
    let lag = vec![
        format!("this host {}", bytes(report.durable.local.lag_bytes)),
        format!("repository {}", bytes(remote.lag_bytes)),
        format!("queue {}", bytes(Some(report.counters.upload_queue_bytes))),
    ];
    let (window, window_notes) = match (report.window.earliest, report.window.latest) {
        (Some(earliest), Some(latest)) => {
            let span = seconds(Some(format::span(latest, earliest)));
            let gaps = match report.window.gaps {
                Some(0) => "no gap".to_owned(),
                Some(1) => "1 gap".to_owned(),
                Some(gaps) => format!("{gaps} gaps"),
                None => "gaps unknown".to_owned(),
            };
            let mut notes = vec![
                format!("from {}", instant(earliest)),
                format!("to {}", instant(latest)),
                gaps,
            ];
            if let (Some(complete), None) = (report.caught_up_as_of, &report.window.refusal) {
                notes.push(format!("complete as of {}", instant(complete)));
            }
            (span, notes)
        }
        (Some(_), None) => (
            "waiting".to_owned(),
            vec!["for the first commit after the backup".to_owned()],
        ),
        _ if report.last_backup.is_some() => (
            "nothing".to_owned(),
            vec![match &report.window.refusal {
                Some(refusal) => {
                    format::code(&capitalised(&words::shorten(refusal, &[&report.reason])))
                }
                None => "not known yet".to_owned(),
            }],
        ),
        _ => (
            "none yet".to_owned(),
            vec!["run <code>wal-archiver backup</code>".to_owned()],
        ),
    };
    let rto = &report.rto;
    let mut rto_notes = vec![format!("estimated now {}", seconds(rto.estimate_seconds))];
    if let Some(target) = rto.target_seconds {
        rto_notes.push(format!("target {}", duration(target)));
    }
    if let Some(advice) = &rto.advice {
        rto_notes.push(format!("<strong>{}</strong>", format::code(advice)));
    } else if rto.estimate_seconds.is_none() {
        rto_notes.push(format::code(&rto.how));
    }
    let measured = rto
        .measured_seconds
        .map_or_else(|| "not measured".to_owned(), duration);
    let (drill, drill_notes, drill_bad) = match &report.last_drill {
        None => (
            "none yet".to_owned(),
            vec!["no program records a drill yet; try a restore with <code>pitr-restore --target-dir DIR --start</code>".to_owned()],
            false,
        ),
        Some(drill) => (
            if drill.passed {
                "✓ passed"
            } else {
                "✖ failed"
            }
            .to_owned(),
            vec![
                format!(
                    "{} ago",
                    seconds(Some(format::span(report.as_of, drill.finished)))
                ),
                format!("lost {}", seconds(drill.loss_seconds)),
            ],
            !drill.passed,
        ),
    };
    out.push_str("<dl class=\"tiles\" id=\"tiles\" data-live>");
    tile(
        out,
        "rpo",
        "RPO now",
        &seconds(remote.rpo_seconds),
        &rpo,
        over,
    );
    tile(out, "lag", "Lag", &bytes(remote.lag_bytes), &lag, false);
    tile(
        out,
        "window",
        "Restorable",
        &window,
        &window_notes,
        report.window.refusal.is_some(),
    );
    tile(
        out,
        "rto",
        "RTO measured",
        &measured,
        &rto_notes,
        rto.advice.is_some(),
    );
    tile(out, "drill", "Last drill", &drill, &drill_notes, drill_bad);
    out.push_str("</dl>");
}

/// Renders a tile. `notes` are HTML, already escaped where needed.
fn tile(out: &mut String, id: &str, term: &str, value: &str, notes: &[String], bad: bool) {
    let class = if bad { "tile bad" } else { "tile" };
    let notes: String = notes
        .iter()
        .map(|note| format!("<span>{note}</span>"))
        .collect();
    let _ = write!(
        out,
        "<div class=\"{class}\" id=\"tile-{id}\"><dt>{term}</dt><dd><b class=\"value\">{value}</b>\
         <span class=\"notes\">{notes}</span></dd></div>"
    );
}

/// Returns the page's first sentences: what is lost if the primary fails now, how long a restore
/// takes, and why.
pub(crate) fn sentence(report: &ClusterReport) -> String {
    let loss = match report.durable.remote.rpo_seconds {
        _ if report.looked && report.last_backup.is_none() => {
            "Losing the primary now loses everything".to_owned()
        }
        _ if report.window.refusal.is_some() => match report.window.latest {
            Some(latest) => format!("Losing the primary now loses everything after {latest}"),
            None => "Losing the primary now loses everything".to_owned(),
        },
        None => "What losing the primary now would lose is not known".to_owned(),
        Some(rpo) if report.state == State::Unknown => {
            format!(
                "The primary was last proved safe {rpo:.1} s ago; what it wrote since is not known"
            )
        }
        Some(0.0) => "Losing the primary now loses nothing that it had flushed".to_owned(),
        Some(rpo) => format!("Losing the primary now loses up to {rpo:.1} s"),
    };
    let back = match report.rto.estimate_seconds {
        Some(estimate) => format!("A restore would take about {}", duration(estimate)),
        None if report.last_backup.is_none() => "Nothing can be restored yet".to_owned(),
        None => "How long a restore would take was not measured".to_owned(),
    };
    let reason = capitalised(report.reason.trim_end_matches('.'));
    let end = if reason.ends_with(['?', '!']) {
        ""
    } else {
        "."
    };
    format!("{loss}. {back}. {reason}{end}")
}

fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}
