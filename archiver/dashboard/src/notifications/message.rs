//! Formats notifications for each kind of receiver.

use std::fmt::Write;

use serde_json::{Value, json};
use status::{alert::Severity, alerts, report::ClusterReport, units};

use super::notification::{Links, Notification};

/// Returns a one-line summary. For the end of an alert, the summary is in the past tense and
/// contains the duration.
pub(super) fn headline(notification: &Notification) -> String {
    let alert = &notification.alert;
    let (what, summary) = match (notification.ended, alert.severity) {
        (Some(ended), _) => ("RESOLVED", past(notification, ended)),
        (None, Severity::Critical) => ("CRITICAL", alert.summary.clone()),
        (None, Severity::Warning) => ("WARNING", alert.summary.clone()),
    };
    let still = if notification.is_reminder {
        ", still"
    } else {
        ""
    };
    format!(
        "[{what}{still}] {} {}: {summary}",
        notification.cluster, alert.name
    )
}

fn past(notification: &Notification, ended: wal_format::PgTimestamp) -> String {
    let alert = &notification.alert;
    let past = alerts::rule(alert.name).map_or("The alert fired", |rule| rule.past);
    let seconds = units::span(ended, alert.since);
    format!("{past} for {}.", units::seconds(Some(seconds.max(0.0))))
}

pub(super) fn webhook(notification: &Notification, links: &Links) -> Value {
    let alert = &notification.alert;
    let summary = match notification.ended {
        Some(ended) => past(notification, ended),
        None => alert.summary.clone(),
    };
    json!({
        "schema": "v1",
        "key": notification.key(&links.host),
        "status": if notification.fires() { "firing" } else { "resolved" },
        "reminder": notification.is_reminder,
        "cluster": notification.cluster,
        "system_identifier": notification.system_identifier,
        "host": links.host,
        "alert": alert.name,
        "severity": alert.severity,
        "summary": summary,
        "runbook": alert.runbook,
        "runbook_url": links.runbook_of(notification),
        "url": links.page_of(notification),
        "since": alert.since,
        "ended": notification.ended,
    })
}

pub(super) fn slack(notification: &Notification, links: &Links) -> Value {
    // The three characters that Slack's markup reserves.
    let escape = |text: &str| {
        text.replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
    };
    let mut text = format!("*{}*", escape(&headline(notification)));
    if notification.fires() {
        text.push('\n');
        text.push_str(&escape(notification.alert.runbook));
    }
    let links: Vec<String> = named_links(notification, links)
        .map(|(name, link)| format!("<{}|{name}>", escape(&link)))
        .collect();
    if !links.is_empty() {
        let _ = write!(text, "\n{}", links.join(" "));
    }
    json!({ "text": text })
}

pub(super) fn pagerduty(notification: &Notification, links: &Links, routing_key: &str) -> Value {
    let alert = &notification.alert;
    let all: Vec<Value> = named_links(notification, links)
        .map(|(name, link)| json!({ "href": link, "text": name }))
        .collect();
    let mut event = json!({
        "routing_key": routing_key,
        "event_action": if notification.fires() { "trigger" } else { "resolve" },
        "dedup_key": notification.key(&links.host),
        "client": "Tidemark",
        "links": all,
        "payload": {
            "summary": headline(notification),
            "source": format!("{}/{}", links.host, notification.cluster),
            "severity": alert.severity,
            "timestamp": alert.since,
            "component": "tidemark",
            "custom_details": {
                "runbook": alert.runbook,
                "runbook_url": links.runbook_of(notification),
            },
        },
    });
    // Events API v2 takes a text here and no null.
    if let Some(page) = links.page_of(notification) {
        event["client_url"] = page.into();
    }
    event
}

/// Returns the links of a notification with their names. A link without a configured address is
/// left out.
fn named_links(
    notification: &Notification,
    links: &Links,
) -> impl Iterator<Item = (&'static str, String)> {
    let named = [
        ("Page", links.page_of(notification)),
        ("Runbook", links.runbook_of(notification)),
    ];
    named
        .into_iter()
        .filter_map(|(name, link)| Some((name, link?)))
}

/// Subject and text of a mail.
pub(super) fn mail(notification: &Notification, links: &Links) -> (String, String) {
    let alert = &notification.alert;
    let (what, todo) = match notification.ended {
        Some(ended) => (
            past(notification, ended),
            format!("\n\nIt began with: {}", alert.summary),
        ),
        None => (
            alert.summary.clone(),
            format!("\n\nWhat to do: {}", alert.runbook),
        ),
    };
    let mut text = format!(
        "{what}\n\nCluster {} on {}, since {}.{todo}\n",
        notification.cluster, links.host, alert.since,
    );
    for (index, (name, link)) in named_links(notification, links).enumerate() {
        let separator = if index == 0 { "\n" } else { "" };
        let _ = writeln!(text, "{separator}{name}: {link}");
    }
    (headline(notification), text)
}

/// Returns the body of a heartbeat. The receiver need not read it.
pub(super) fn heartbeat(links: &Links) -> Value {
    json!({ "schema": "v1", "status": "alive", "host": links.host })
}

/// Returns the subject and the text of the daily summary.
pub(super) fn summary(reports: &[ClusterReport], links: &Links) -> (String, String) {
    let alerts: usize = reports.iter().map(|report| report.alerts.len()).sum();
    let mut text = String::new();
    for report in reports {
        let time = |time: Option<wal_format::PgTimestamp>| {
            time.map_or_else(|| "unknown".to_owned(), |time| time.to_string())
        };
        let rpo = units::seconds(report.durable.remote.rpo_seconds);
        let greatest = units::seconds(report.rpo_max_24h_seconds);
        let backup = report.last_backup.as_ref().map(|backup| backup.finished);
        let _ = write!(
            text,
            "Cluster {}: {}, {}.\n  RPO {rpo}, greatest in 24 h {greatest}.\n  Restorable from {} to {}.\n  \
             Newest base backup {}. Last drill that passed {}.\n",
            report.cluster,
            report.state.name().replace('_', " "),
            report.reason.trim_end_matches('.'),
            time(report.window.earliest),
            time(report.window.latest),
            time(backup),
            time(report.last_drill_passed),
        );
        for alert in &report.alerts {
            let (severity, name) = (alert.severity.name(), alert.name);
            let _ = writeln!(
                text,
                "  {severity} {name} since {}: {}",
                alert.since, alert.summary
            );
        }
        if let Some(link) = links.cluster(report.cluster.as_str()) {
            let _ = writeln!(text, "  {link}");
        }
    }
    let count = match alerts {
        0 => "no alert".to_owned(),
        1 => "1 alert".to_owned(),
        alerts => format!("{alerts} alerts"),
    };
    (format!("Tidemark on {}: {count}", links.host), text)
}
