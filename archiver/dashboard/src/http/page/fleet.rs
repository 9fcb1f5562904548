//! The page of all clusters: one line each, which is a card on a narrow screen. The query chooses
//! the order and a part of the names, so that both work without scripts and survive an update.

use std::fmt::Write as _;

use maud::{Markup, html};
use status::{report::ClusterReport, state::State, units};

use super::{
    answer::sentence,
    badge::badge_html,
    document::{Refresh, document},
    format::{bytes, instant, seconds, span, without_errno},
};

/// The order of the clusters and the part of their names, from the query.
#[derive(Clone, Debug, Default)]
pub(in crate::http) struct Listing {
    /// One of [`COLUMNS`], or anything else for the worst first.
    pub(in crate::http) sort: String,
    pub(in crate::http) filter: String,
}

/// The columns: the name in the query, and the title.
const COLUMNS: [(&str, &str); 7] = [
    ("name", "Cluster"),
    ("state", "State"),
    ("rpo", "RPO now"),
    ("lag", "Lag"),
    ("latest", "Restorable to"),
    ("backup", "Last backup"),
    ("alerts", "Alerts"),
];

/// Returns the RPO for comparisons. An unknown RPO is worse than any number.
fn rpo(report: &ClusterReport) -> f64 {
    report.durable.remote.rpo_seconds.unwrap_or(f64::INFINITY)
}

pub(in crate::http) fn fleet(
    reports: &[ClusterReport],
    listing: &Listing,
    guarded: bool,
) -> String {
    let named = |report: &&ClusterReport| report.cluster.as_str().contains(&listing.filter);
    let mut sorted: Vec<&ClusterReport> = reports.iter().filter(named).collect();
    sorted.sort_by(|one, other| {
        let by_state = one.state.rank().cmp(&other.state.rank());
        let worst = by_state.then(rpo(other).total_cmp(&rpo(one)));
        let lag = |report: &ClusterReport| report.durable.remote.lag_bytes.unwrap_or(u64::MAX);
        let backup = |report: &ClusterReport| {
            let backup = report.last_backup.as_ref();
            backup.map(|backup| backup.finished)
        };
        let chosen = match listing.sort.as_str() {
            "name" => one.cluster.cmp(&other.cluster),
            "rpo" => rpo(other).total_cmp(&rpo(one)),
            "lag" => lag(other).cmp(&lag(one)),
            "latest" => one.window.latest.cmp(&other.window.latest),
            "backup" => backup(one).cmp(&backup(other)),
            "alerts" => other.alerts.len().cmp(&one.alerts.len()),
            _ => worst,
        };
        chosen.then(worst).then(one.cluster.cmp(&other.cluster))
    });
    let body = html! {
        section class="hero" id="hero" data-live {
            h1 { "Clusters" }
            p class="answer" { (summary(reports)) }
        }
        form method="get" class="filter" role="search" {
            label for="filter" { "Part of the name" }
            input id="filter" name="filter" type="search" value=(listing.filter);
            input type="hidden" name="sort" value=(listing.sort);
            button { "Filter" }
        }
        section class="card" id="fleet" data-live {
            div class="scroll" tabindex="0" role="group" aria-label="Clusters" {
                table class="fleet" {
                    thead { tr { @for (name, title) in COLUMNS { (heading(name, title, listing)) } } }
                    tbody { @for report in &sorted { (row(report)) } }
                }
            }
            @if sorted.is_empty() && !reports.is_empty() {
                p class="empty" { "No cluster has this in its name." }
            }
        }
    };
    document("Clusters · Tidemark", None, &body, guarded, Refresh::Live)
}

/// Renders the heading of a column: a link that sorts by it.
fn heading(name: &str, title: &str, listing: &Listing) -> Markup {
    let is_order = listing.sort == name || (name == "state" && !is_column(listing));
    html! {
        th scope="col" aria-sort=[is_order.then_some("descending")] {
            a href={ "?sort=" (name) "&filter=" (encode(&listing.filter)) } {
                (title)
                @if is_order { " " span aria-hidden="true" { "▾" } }
            }
        }
    }
}

fn is_column(listing: &Listing) -> bool {
    COLUMNS.iter().any(|(name, _)| *name == listing.sort)
}

/// Renders the number of clusters that need a person, and the greatest RPO.
fn summary(reports: &[ClusterReport]) -> Markup {
    let bad = reports.iter().filter(|report| report.state != State::Ok);
    let bad = bad.count();
    let first = match (reports.len(), bad) {
        (0, _) => return html! { span { "No cluster is configured." } },
        (all, 0) => format!("All {all} clusters are within their targets."),
        (all, bad) => format!("{bad} of {all} clusters need a person."),
    };
    let mut by_rpo = reports.iter();
    let worst = by_rpo.next().map(|first| {
        by_rpo.fold(first, |worst, one| match rpo(one) > rpo(worst) {
            true => one,
            false => worst,
        })
    });
    html! {
        span { (first) }
        " "
        span {
            @if let Some(worst) = worst {
                "The greatest RPO is " (seconds(worst.durable.remote.rpo_seconds)) ", of "
                (worst.cluster) "."
            }
        }
    }
}

fn row(report: &ClusterReport) -> Markup {
    let none = if report.looked { "none yet" } else { "unknown" };
    let backup = report.last_backup.as_ref();
    let age = backup.map(|backup| seconds(Some(span(report.as_of, backup.finished))));
    let latest = report.window.latest.map(instant);
    html! {
        tr {
            th scope="row" {
                a href={ "/clusters/" (report.cluster) } { (report.cluster) }
            }
            td data-name="State" {
                (badge_html(report.state)) " "
                span class="reason" title=(without_errno(&sentence(report))) {
                    (without_errno(&units::brief(&report.reason)))
                }
            }
            td data-name="RPO now" { (seconds(report.durable.remote.rpo_seconds)) }
            td data-name="Lag" { (bytes(report.durable.remote.lag_bytes)) }
            td data-name="Restorable to" {
                @if let Some(latest) = latest { (latest) } @else { "unknown" }
            }
            td data-name="Last backup" {
                @if let Some(age) = age { (age) " ago" } @else { (none) }
            }
            td data-name="Alerts" { (report.alerts.len()) }
        }
    }
}

/// Encodes a text for a query.
fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                encoded.push(char::from(byte));
            }
            _ => {
                let _ = write!(encoded, "%{byte:02X}");
            }
        }
    }
    encoded
}
