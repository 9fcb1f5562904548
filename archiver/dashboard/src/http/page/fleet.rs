//! The page of all clusters: one line each, which is a card on a narrow screen. The query chooses
//! the order and a part of the names, so that both work without scripts and survive an update.

use std::fmt::Write as _;

use status::{report::ClusterReport, state::State, units};

use super::{
    answer::sentence,
    badge::badge_html,
    document::{Refresh, document},
    format::{bytes, escape, instant, seconds, span, without_errno},
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
    let mut body = format!(
        "<section class=\"hero\" id=\"hero\" data-live><h1>Clusters</h1><p class=\"answer\">{}</p></section>",
        summary(reports)
    );
    let filter = escape(&listing.filter);
    let _ = write!(
        body,
        "<form method=\"get\" class=\"filter\" role=\"search\"><label for=\"filter\">Part of the name</label>\
         <input id=\"filter\" name=\"filter\" type=\"search\" value=\"{filter}\">\
         <input type=\"hidden\" name=\"sort\" value=\"{}\"><button>Filter</button></form>\
         <section class=\"card\" id=\"fleet\" data-live><div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Clusters\">\
         <table class=\"fleet\"><thead><tr>",
        escape(&listing.sort)
    );
    for (name, title) in COLUMNS {
        let (order, mark) = match listing.sort == name || (name == "state" && !is_column(listing)) {
            true => (
                " aria-sort=\"descending\"",
                " <span aria-hidden=\"true\">▾</span>",
            ),
            false => ("", ""),
        };
        let _ = write!(
            body,
            "<th scope=\"col\"{order}><a href=\"?sort={name}&amp;filter={}\">{title}{mark}</a></th>",
            escape(&encode(&listing.filter))
        );
    }
    body.push_str("</tr></thead><tbody>");
    for report in &sorted {
        row(&mut body, report);
    }
    body.push_str("</tbody></table></div>");
    if sorted.is_empty() && !reports.is_empty() {
        body.push_str("<p class=\"empty\">No cluster has this in its name.</p>");
    }
    body.push_str("</section>");
    document("Clusters · Tidemark", "", &body, guarded, Refresh::Live)
}

fn is_column(listing: &Listing) -> bool {
    COLUMNS.iter().any(|(name, _)| *name == listing.sort)
}

/// Returns the number of clusters that need a person, and the greatest RPO.
fn summary(reports: &[ClusterReport]) -> String {
    let bad = reports.iter().filter(|report| report.state != State::Ok);
    let bad = bad.count();
    let first = match (reports.len(), bad) {
        (0, _) => return "<span>No cluster is configured.</span>".to_owned(),
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
    let worst = worst.map_or_else(String::new, |worst| {
        format!(
            "The greatest RPO is {}, of {}.",
            seconds(worst.durable.remote.rpo_seconds),
            worst.cluster
        )
    });
    format!("<span>{first}</span> <span>{worst}</span>")
}

fn row(body: &mut String, report: &ClusterReport) {
    let none = if report.looked { "none yet" } else { "unknown" };
    let backup = report.last_backup.as_ref().map_or_else(
        || none.to_owned(),
        |backup| format!("{} ago", seconds(Some(span(report.as_of, backup.finished)))),
    );
    let latest = report
        .window
        .latest
        .map_or_else(|| "unknown".to_owned(), instant);
    let reason = without_errno(&units::brief(&report.reason));
    let _ = write!(
        body,
        "<tr><th scope=\"row\"><a href=\"/clusters/{name}\">{name}</a></th><td data-name=\"State\">{badge} <span class=\"reason\" title=\"{all}\">{reason}</span></td>\
         <td data-name=\"RPO now\">{rpo}</td><td data-name=\"Lag\">{lag}</td><td data-name=\"Restorable to\">{latest}</td><td data-name=\"Last backup\">{backup}</td><td data-name=\"Alerts\">{alerts}</td></tr>",
        name = report.cluster,
        badge = badge_html(report.state),
        all = escape(&without_errno(&sentence(report))),
        reason = escape(&reason),
        rpo = seconds(report.durable.remote.rpo_seconds),
        lag = bytes(report.durable.remote.lag_bytes),
        alerts = report.alerts.len(),
    );
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
