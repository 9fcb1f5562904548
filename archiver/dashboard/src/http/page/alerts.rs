//! The alerts that need a person, with their remedies.

use maud::{Markup, html};
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

pub(in crate::http) fn render(report: &ClusterReport) -> Markup {
    if report.alerts.is_empty() {
        return none(report);
    }
    let displayed = displayed(report);
    html! {
        section class="card" id="alerts" data-live aria-labelledby="alerts-title" {
            h2 id="alerts-title" {
                "Alerts " span class="count" { (report.alerts.len()) }
            }
            ul class="alerts" {
                @for alert in &report.alerts {
                    @let (shape, word) = match alert.severity {
                        Severity::Critical => ("✖", "critical"),
                        Severity::Warning => ("▲", "warning"),
                    };
                    li class=(word) {
                        p class="alert-line" {
                            span class="severity" {
                                span aria-hidden="true" { (shape) } " " (word)
                            }
                            " " strong { (alert.name) }
                            " " span class="as-of" { "since " (instant(alert.since)) }
                        }
                        div class="summary" {
                            (details(&capitalised(&units::shorten(&alert.summary, &displayed))))
                        }
                        p class="runbook" { (code(alert.runbook)) }
                    }
                }
            }
        }
    }
}

/// Renders the card without an alert. A cause can exist all the same: the alert's patience lasts,
/// or nothing is known yet.
fn none(report: &ClusterReport) -> Markup {
    let all_well = report.causes.is_empty();
    html! {
        section class={ "quiet-alerts" @if all_well { " all-well" } } id="alerts" data-live
            aria-label="Alerts" {
            p class="empty" {
                @if all_well {
                    span aria-hidden="true" { "✓" } " No alerts. Nothing needs you."
                } @else {
                    "No alert has fired. The reason for the state is above."
                }
            }
        }
    }
}
