//! Formats notifications for each kind of receiver.

use serde_json::{Value, json};

use super::Notification;
use crate::alerts::Severity;

/// A one-line summary.
pub(super) fn headline(notification: &Notification) -> String {
    let alert = &notification.alert;
    let what = match (notification.fires, alert.severity) {
        (false, _) => "RESOLVED",
        (true, Severity::Critical) => "CRITICAL",
        (true, Severity::Warning) => "WARNING",
    };
    format!(
        "[{what}] {} {}: {}",
        notification.cluster, alert.name, alert.summary
    )
}

pub(super) fn webhook(notification: &Notification) -> Value {
    let alert = &notification.alert;
    json!({
        "schema": "v1",
        "key": notification.key(),
        "status": if notification.fires { "firing" } else { "resolved" },
        "cluster": notification.cluster,
        "alert": alert.name,
        "severity": alert.severity,
        "summary": alert.summary,
        "runbook": alert.runbook,
        "since": alert.since,
    })
}

pub(super) fn slack(notification: &Notification) -> Value {
    // The three characters that Slack's markup reserves.
    let escape = |text: &str| {
        text.replace('&', "&amp;")
            .replace('<', "&lt;")
            .replace('>', "&gt;")
    };
    let mut text = format!("*{}*", escape(&headline(notification)));
    if notification.fires {
        text.push('\n');
        text.push_str(&escape(notification.alert.runbook));
    }
    json!({ "text": text })
}

pub(super) fn pagerduty(notification: &Notification, routing_key: &str) -> Value {
    let alert = &notification.alert;
    json!({
        "routing_key": routing_key,
        "event_action": if notification.fires { "trigger" } else { "resolve" },
        "dedup_key": notification.key(),
        "payload": {
            "summary": headline(notification),
            "source": notification.cluster,
            "severity": alert.severity,
            "timestamp": alert.since,
            "component": "tidemark",
            "custom_details": { "runbook": alert.runbook },
        },
    })
}

/// Subject and text of a mail.
pub(super) fn mail(notification: &Notification) -> (String, String) {
    let alert = &notification.alert;
    let todo = if notification.fires {
        format!("\n\nWhat to do: {}", alert.runbook)
    } else {
        String::new()
    };
    let text = format!(
        "{}\n\nCluster {}, since {}.{todo}\n",
        alert.summary, notification.cluster, alert.since
    );
    (headline(notification), text)
}
