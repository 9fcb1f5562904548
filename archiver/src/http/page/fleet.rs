//! The page of all clusters in one table, the worst first.

use std::fmt::Write as _;

use super::{
    Refresh, badge_html, document,
    format::{bytes, escape, instant, seconds, span},
    sentence,
};
use crate::report::{ClusterReport, State};

/// Returns the position of a state in the order, the worst first.
fn rank(state: State) -> u8 {
    match state {
        State::Broken => 0,
        State::AtRisk => 1,
        State::Unknown => 2,
        State::Degraded => 3,
        State::Ok => 4,
    }
}

pub(in crate::http) fn fleet(reports: &[ClusterReport], guarded: bool) -> String {
    let mut sorted: Vec<&ClusterReport> = reports.iter().collect();
    // An unknown RPO is worse than any number.
    let rpo = |report: &ClusterReport| report.durable.remote.rpo_seconds.unwrap_or(f64::INFINITY);
    sorted.sort_by(|one, other| {
        rank(one.state)
            .cmp(&rank(other.state))
            .then(rpo(other).total_cmp(&rpo(one)))
            .then(one.cluster.cmp(&other.cluster))
    });
    let bad = sorted
        .iter()
        .filter(|report| report.state != State::Ok)
        .count();
    let summary = match (sorted.len(), bad) {
        (0, _) => "No cluster is configured.".to_owned(),
        (all, 0) => format!("All {all} clusters are within their targets."),
        (all, bad) => format!("{bad} of {all} clusters need a look."),
    };
    let mut body = format!(
        "<section class=\"hero\" id=\"hero\" data-live><h1>Clusters</h1><p class=\"sentence\">{summary}</p></section>\
         <section class=\"card\" id=\"fleet\" data-live><div class=\"scroll\" tabindex=\"0\" role=\"group\" aria-label=\"Clusters, the worst first\">\
         <table><thead><tr><th scope=\"col\">Cluster</th><th scope=\"col\">State</th><th scope=\"col\">RPO now</th>\
         <th scope=\"col\">Lag</th><th scope=\"col\">Restorable to</th><th scope=\"col\">Last backup</th><th scope=\"col\">Alerts</th></tr></thead><tbody>"
    );
    for report in sorted {
        let backup = report.last_backup.as_ref().map_or_else(
            || "none yet".to_owned(),
            |backup| format!("{} ago", seconds(Some(span(report.as_of, backup.finished)))),
        );
        let latest = report
            .window
            .latest
            .map_or_else(|| "unknown".to_owned(), instant);
        let _ = write!(
            body,
            "<tr><th scope=\"row\"><a href=\"/clusters/{name}\">{name}</a></th><td>{badge}<p class=\"reason\">{reason}</p></td>\
             <td>{rpo}</td><td>{lag}</td><td>{latest}</td><td>{backup}</td><td>{alerts}</td></tr>",
            name = report.cluster,
            badge = badge_html(report.state),
            reason = escape(&sentence(report)),
            rpo = seconds(report.durable.remote.rpo_seconds),
            lag = bytes(report.durable.remote.lag_bytes),
            alerts = report.alerts.len(),
        );
    }
    body.push_str("</tbody></table></div></section>");
    document(
        "Clusters · Tidemark",
        "",
        &body,
        guarded,
        Refresh::WithoutScript,
    )
}
