//! Health routes. `…/health?max_rpo=&max_backup_age=&max_drill_age=` answers 200, or 503 with
//! reasons, for probes that cannot parse JSON. `/health` and `/health/detailed` answer with the
//! components in JSON.

use std::collections::BTreeMap;

use hyper::StatusCode;
use serde::Serialize;
use status::{
    light::{Cause, CauseKind},
    report::ClusterReport,
    state::State,
    units,
};

/// The answer of the health route.
#[derive(Debug, Serialize)]
pub(super) struct Verdict {
    healthy: bool,
    reasons: Vec<String>,
}

impl Verdict {
    pub(super) fn status(&self) -> StatusCode {
        if self.healthy {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        }
    }
}

/// An invalid query. With an answer of 200, a probe with a mistyped limit could never fail.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueryError {
    #[error("unknown parameter \"{0}\"; known are max_rpo, max_backup_age and max_drill_age")]
    Unknown(String),
    #[error("\"{value}\" is no duration for {name}; write 30s, 5min, 26h or 8d")]
    Duration { name: String, value: String },
}

/// Compares `report` with the limits in `query`. An unknown value exceeds its limit.
///
/// A state that is unknown, at risk or broken also fails, and each of its causes is a reason, the
/// worst first. A limit for the RPO replaces the operator's target: with it, an RPO over that
/// target is not a reason, and an unseen primary is none while the RPO is known, the catalog was
/// read and there is a base backup.
pub(super) fn judge(report: &ClusterReport, query: &str) -> Result<Verdict, QueryError> {
    let limits_rpo = query.split('&').any(|pair| pair.starts_with("max_rpo="));
    let knows_rpo = report.durable.remote.rpo_seconds.is_some();
    let is_replaced = |cause: &Cause| match cause.kind {
        CauseKind::Rpo => limits_rpo,
        CauseKind::Unseen => {
            limits_rpo && knows_rpo && report.looked && report.last_backup.is_some()
        }
        CauseKind::NoBackup | CauseKind::Other => false,
    };
    let fails = |cause: &&Cause| !matches!(cause.state, State::Ok | State::Degraded);
    let causes = report.causes.iter().filter(fails);
    let mut reasons: Vec<String> = causes
        .filter(|cause| !is_replaced(cause))
        .map(|cause| cause.reason.clone())
        .collect();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let limit = || {
            seconds(value).ok_or_else(|| QueryError::Duration {
                name: name.to_owned(),
                value: value.to_owned(),
            })
        };
        let (what, age) = match name {
            "max_rpo" => ("rpo", report.durable.remote.rpo_seconds),
            "max_backup_age" => {
                let finished = report.last_backup.as_ref().map(|backup| backup.finished);
                let age = finished.map(|time| units::span(report.as_of, time));
                ("age of the last base backup", age)
            }
            "max_drill_age" => {
                let age = report
                    .last_drill_passed
                    .map(|time| units::span(report.as_of, time));
                ("age of the last restore drill that passed", age)
            }
            _ => return Err(QueryError::Unknown(name.to_owned())),
        };
        let limit = limit()?;
        match age {
            Some(age) if age <= limit => {}
            Some(age) => reasons.push(format!("{what} is {age:.1} s, the limit is {limit:.1} s")),
            None => reasons.push(format!("{what} is not known")),
        }
    }
    Ok(Verdict {
        healthy: reasons.is_empty(),
        reasons,
    })
}

/// The health of one part of a cluster.
#[derive(Debug, Serialize)]
struct Component {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl Component {
    /// Returns a component that is `ok` without a problem and `failing` with one.
    fn new(problem: Option<String>) -> Self {
        Self {
            status: if problem.is_some() { "failing" } else { "ok" },
            detail: problem,
        }
    }

    fn unknown(detail: &str) -> Self {
        Self {
            status: "unknown",
            detail: Some(detail.to_owned()),
        }
    }
}

/// Returns the answer of `/health`: the process serves. It says nothing about the clusters, which
/// unauthorized clients may not see.
pub(super) fn alive() -> serde_json::Value {
    serde_json::json!({ "schema": "v1", "status": "alive", "components": { "process": { "status": "ok" } } })
}

/// Returns the answer of `/health/detailed`: the process serves, and each cluster by component.
pub(super) fn detailed(reports: &[ClusterReport]) -> serde_json::Value {
    let clusters: BTreeMap<&str, serde_json::Value> = reports
        .iter()
        .map(|report| {
            let cluster = serde_json::json!({
                "state": report.state, "reason": report.reason, "components": components(report),
            });
            (report.cluster.as_str(), cluster)
        })
        .collect();
    let mut answer = alive();
    answer["clusters"] = serde_json::json!(clusters);
    answer
}

fn components(report: &ClusterReport) -> BTreeMap<&'static str, Component> {
    let stream = match (report.source.stream_connected, &report.stream_error) {
        (true, _) => Component::new(None),
        (false, Some(error)) => Component::new(Some(error.clone())),
        (false, None) => Component::unknown("no stream was up since the start"),
    };
    let away = report.repositories.iter().find_map(|place| {
        let is = if place.error.is_some() {
            "is away"
        } else {
            "was incomplete"
        };
        Some(format!("{} {is}: {}", place.url, place.problem()?))
    });
    let repository = match report.repository_error.clone().or(away) {
        None if !report.looked => Component::unknown("it was not read since the start"),
        problem => Component::new(problem),
    };
    let restorable = match (&report.window.refusal, report.corrupt_objects) {
        _ if !report.looked => Component::unknown("the catalog was not read since the start"),
        (Some(refusal), _) => Component::new(Some(refusal.clone())),
        (None, Some(objects @ 1..)) => {
            Component::new(Some(format!("{objects} object(s) are damaged or missing")))
        }
        (None, _) => Component::new(None),
    };
    let slot = match &report.slot {
        Some(slot) if slot.wal_status.is_some() => {
            let is_lost = slot.wal_status.as_deref() == Some("lost");
            Component::new(is_lost.then(|| format!("the slot {} is lost", slot.name)))
        }
        _ => Component::unknown("the server was not asked"),
    };
    BTreeMap::from([
        ("stream", stream),
        ("repository", repository),
        ("restorable", restorable),
        ("slot", slot),
    ])
}

/// Parses a duration: `30s`, `500ms`, `5min`, `26h`, `8d` or plain seconds.
fn seconds(text: &str) -> Option<f64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    let factor = match unit {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "min" | "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return None,
    };
    number.parse::<f64>().ok().map(|number| number * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        assert_eq!(seconds("30s"), Some(30.0));
        assert_eq!(seconds("5min"), Some(300.0));
        assert_eq!(seconds("2"), Some(2.0));
        for bad in ["", "s", "-1s", "1x", "1.2.3s"] {
            assert_eq!(seconds(bad), None, "{bad:?}");
        }
    }
}
