//! `wal-archiver status --nagios`: one line, performance data, and an exit code for Nagios and
//! Icinga.
//!
//! The exit codes are those of Nagios: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN. If no daemon runs,
//! nothing is archived, and the result is CRITICAL.

use repository::config::Settings;
use serde_json::Value;

use super::{daemon, output};
use crate::error::{Error, Result};

/// A Nagios state, with its exit code. [`Level::rank`] is the order for choosing the worst of
/// several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    Unknown = 3,
}

impl Level {
    fn rank(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Warning => 1,
            Self::Unknown => 2,
            Self::Critical => 3,
        }
    }

    fn of(report: &Value) -> Self {
        let of_alerts = report["alerts"].as_array().map_or(Self::Ok, |alerts| {
            if alerts.iter().any(|alert| alert["severity"] == "critical") {
                Self::Critical
            } else if alerts.is_empty() {
                Self::Ok
            } else {
                Self::Warning
            }
        });
        let of_state = match report["state"].as_str() {
            Some("ok") => Self::Ok,
            Some("degraded") => Self::Warning,
            Some("at_risk" | "broken") => Self::Critical,
            _ => Self::Unknown,
        };
        [of_alerts, of_state]
            .into_iter()
            .max_by_key(|level| level.rank())
            .unwrap_or(Self::Unknown)
    }

    fn word(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Warning => "WARNING",
            Self::Critical => "CRITICAL",
            Self::Unknown => "UNKNOWN",
        }
    }
}

pub(super) fn nagios(settings: &Settings) -> Result<()> {
    let reports = daemon::reports(settings);
    let mut worst = Level::Ok;
    let (mut texts, mut data) = (Vec::new(), Vec::new());
    for cluster in &settings.clusters {
        let report = reports
            .iter()
            .find(|report| report["cluster"] == cluster.name.as_str());
        let level = report.map_or(Level::Critical, Level::of);
        if level.rank() > worst.rank() {
            worst = level;
        }
        match report {
            None => texts.push(format!(
                "{}: no daemon answers, nothing is archived",
                cluster.name
            )),
            Some(report) => {
                texts.push(format!("{}: {}", cluster.name, reasons(report)));
                data.push(performance(cluster.name.as_str(), report));
            }
        }
    }
    // `|` would begin the performance data, and a line break the long output.
    let text = texts
        .join("; ")
        .replace('|', "/")
        .replace(['\n', '\r'], " ");
    output::line(&format!(
        "TIDEMARK {} - {text} | {}",
        worst.word(),
        data.join(" ")
    ));
    match worst {
        Level::Ok => Ok(()),
        worst => Err(Error::Nagios { code: worst as u8 }),
    }
}

/// Returns the reason of the state, then the alerts that it does not contain. One of them decided
/// the level.
fn reasons(report: &Value) -> String {
    let reason = report["reason"].as_str().unwrap_or("unknown");
    let mut texts = vec![reason];
    for alert in report["alerts"].as_array().into_iter().flatten() {
        let summary = alert["summary"].as_str().unwrap_or_default();
        if !texts.iter().any(|text| text.contains(summary)) {
            texts.push(summary);
        }
    }
    texts.join("; ")
}

/// Returns performance data, `'name'=value;warning;critical;minimum`. `U` is Nagios's unknown
/// value.
fn performance(cluster: &str, report: &Value) -> String {
    // The unknown value has no unit.
    let number = |pointer: &str, unit: &str| match report.pointer(pointer).and_then(Value::as_f64) {
        Some(number) => format!("{number}{unit}"),
        None => "U".to_owned(),
    };
    let target = number("/rpo_target_seconds", "");
    format!(
        "'{cluster}_rpo'={};;{target};0 '{cluster}_lag'={};;;0 '{cluster}_spool'={};;;0",
        number("/durable/remote/rpo_seconds", "s"),
        number("/durable/remote/lag_bytes", "B"),
        number("/counters/spool_used_bytes", "B"),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_worst_of_state_and_alerts_counts() {
        let check = |report: Value, expected| assert_eq!(Level::of(&report), expected, "{report}");
        check(json!({ "state": "ok", "alerts": [] }), Level::Ok);
        check(
            json!({ "state": "ok", "alerts": [{ "severity": "warning" }] }),
            Level::Warning,
        );
        check(
            json!({ "state": "unknown", "alerts": [{ "severity": "critical" }] }),
            Level::Critical,
        );
        check(json!({ "state": "broken", "alerts": [] }), Level::Critical);
        check(json!({}), Level::Unknown);
        let report = json!({ "reason": "streaming", "alerts": [
            { "summary": "the newest backup is 9 days old" }, { "summary": "streaming" }
        ] });
        assert_eq!(
            reasons(&report),
            "streaming; the newest backup is 9 days old"
        );
        let data = performance("main", &json!({ "rpo_target_seconds": 5.0 }));
        assert!(data.starts_with("'main_rpo'=U;;5;0"), "{data}");
    }
}
