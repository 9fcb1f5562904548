//! [`Alert`]: a condition that requires an operator's action, and the entry of the table that it
//! comes from ([`Rule`]).

use serde::Serialize;
use wal_format::PgTimestamp;

/// The severity of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// An operator should act soon.
    Warning,
    /// An operator should act now.
    Critical,
}

impl Severity {
    /// The name in JSON, events and notifications.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// A condition that requires an operator's action.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alert {
    /// The name, which is also that of the Prometheus rule.
    pub name: &'static str,
    /// The severity.
    pub severity: Severity,
    /// The problem, as a sentence.
    pub summary: String,
    /// The remedy.
    pub runbook: &'static str,
    /// The time since which the condition holds.
    pub since: PgTimestamp,
}

/// An entry of the table of alerts.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The name of the alert and of the Prometheus rule.
    pub name: &'static str,
    /// The severity.
    pub severity: Severity,
    /// The condition with its threshold, in words.
    pub condition: &'static str,
    /// The seconds for which the condition must hold before the alert fires, here and in
    /// Prometheus.
    pub patience_seconds: u32,
    /// The same condition as a Prometheus expression.
    pub expression: &'static str,
    /// The summary in Prometheus.
    pub rule_summary: &'static str,
    /// The condition in the past tense, for the notification that it has ended.
    pub past: &'static str,
    /// Alerts that have the same cause. While one of their conditions holds, the page shows this
    /// alert and no notification begins for it, so that one fault pages once.
    pub inhibited_by: &'static [&'static str],
    /// The remedy.
    pub runbook: &'static str,
}
