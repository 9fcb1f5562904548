//! The alerts that need a person, with their remedies.

use std::fmt::Write as _;

use status::{alert::Severity, report::ClusterReport, units};

use super::{
    answer::capitalised,
    format::{code, details, instant},
};

/// Returns the long texts that the page shows in full: the reason of the state, and the errors in
/// the repository's card.
pub(super) fn displayed(report: &ClusterReport) -> Vec<&str> {
    let members = report.repositories.iter().map(|place| &place.error);
    let errors = members.chain([&report.repository_error]);
    let errors = errors.filter_map(Option::as_deref);
    errors.chain([report.reason.as_str()]).collect()
}

pub(in crate::http) fn render(out: &mut String, report: &ClusterReport) {
    if report.alerts.is_empty() {
        // A cause can exist without an alert: the alert's patience lasts, or nothing is known yet.
        let (class, text) = match report.causes.is_empty() {
            true => (
                " all-well",
                "<span aria-hidden=\"true\">✓</span> No alerts. Nothing needs you.",
            ),
            false => ("", "No alert has fired. The reason for the state is above."),
        };
        let _ = write!(
            out,
            "<section class=\"quiet-alerts{class}\" id=\"alerts\" data-live aria-label=\"Alerts\">\
             <p class=\"empty\">{text}</p></section>"
        );
        return;
    }
    let _ = write!(
        out,
        "<section class=\"card\" id=\"alerts\" data-live aria-labelledby=\"alerts-title\"><h2 id=\"alerts-title\">Alerts \
         <span class=\"count\">{}</span></h2><ul class=\"alerts\">",
        report.alerts.len()
    );
    let displayed = displayed(report);
    for alert in &report.alerts {
        let (shape, word) = match alert.severity {
            Severity::Critical => ("✖", "critical"),
            Severity::Warning => ("▲", "warning"),
        };
        let _ = write!(
            out,
            "<li class=\"{word}\"><p class=\"alert-line\"><span class=\"severity\"><span aria-hidden=\"true\">{shape}</span> {word}</span> \
             <strong>{}</strong> <span class=\"as-of\">since {}</span></p><div class=\"summary\">{}</div><p class=\"runbook\">{}</p></li>",
            alert.name,
            instant(alert.since),
            details(&capitalised(&units::shorten(&alert.summary, &displayed))),
            code(alert.runbook)
        );
    }
    out.push_str("</ul></section>");
}
