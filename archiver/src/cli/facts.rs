//! One screen of `wal-archiver status`: the same facts in the same words as the dashboard, from the
//! daemon's report.

use serde_json::Value;
use status::units;

/// Returns the report on one cluster as lines.
pub(super) fn lines(report: &Value) -> Vec<String> {
    let of = Of(report);
    let shorten = |text: &str, more: &[&str]| {
        let displayed = [of.displayed(), more.to_vec()].concat();
        units::shorten(text, &displayed)
    };
    let mut lines = vec![format!("cluster {}", of.text("/cluster"))];
    let mut add = |name: &str, value: String| lines.push(format!("  {name:<13} {value}"));
    add(
        "state",
        format!("{}: {}", of.text("/state"), of.text("/reason")),
    );
    add("as of", of.instant("/as_of"));
    add(
        "server",
        format!(
            "PostgreSQL {}, timeline {}, system identifier {}, flush LSN {}",
            of.text("/source/server_version"),
            of.text("/source/timeline"),
            of.text("/source/system_identifier"),
            of.text("/source/flush_lsn"),
        ),
    );
    add(
        "rpo",
        format!(
            "{}; target {}, greatest in 24 h {}",
            of.seconds("/durable/remote/rpo_seconds"),
            of.seconds("/rpo_target_seconds"),
            of.seconds("/rpo_max_24h_seconds"),
        ),
    );
    for (name, tier) in [("local", "local"), ("remote", "remote")] {
        add(
            name,
            format!(
                "{}, {} and {} behind",
                of.text(&format!("/durable/{tier}/lsn")),
                of.seconds(&format!("/durable/{tier}/rpo_seconds")),
                of.bytes(&format!("/durable/{tier}/lag_bytes")),
            ),
        );
    }
    add("restorable", of.restorable(|text| shorten(text, &[])));
    add(
        "rto",
        format!(
            "measured {}, estimated now {}, target {}. {}",
            of.seconds("/rto/measured_seconds"),
            of.seconds("/rto/estimate_seconds"),
            of.seconds("/rto/target_seconds"),
            of.string("/rto/advice")
                .unwrap_or_else(|| of.text("/rto/how")),
        ),
    );
    add("last drill", of.drill());
    if let Some(schedule) = of.schedule("/drill_schedule") {
        add("next drill", schedule);
    }
    add("last backup", of.backup());
    if let Some(schedule) = of.schedule("/backup_schedule") {
        add("next backup", schedule);
    }
    if let Some(progress) = of.backup_progress() {
        add("backup runs", progress);
    }
    add("slot", of.slot());
    add(
        "spool",
        format!(
            "{} of {}; queue {}",
            of.bytes("/counters/spool_used_bytes"),
            of.bytes("/counters/spool_limit_bytes"),
            of.bytes("/counters/upload_queue_bytes"),
        ),
    );
    add(
        "stored",
        format!(
            "{} segments since the start",
            of.text("/counters/segments_completed")
        ),
    );
    add("requests", requests(report));
    if let Some(count @ 1..) = report["counters"]["objects_locked"].as_u64() {
        let why = "superfluous objects stay: the repository lets nothing go";
        add("locked", format!("{count} {why}"));
    }
    let damaged = match report.pointer("/corrupt_objects").and_then(Value::as_u64) {
        None => "not verified yet: run `wal-archiver verify`".to_owned(),
        Some(0) => "no damaged object found".to_owned(),
        Some(count) => format!("{count} damaged object(s)"),
    };
    let error = of
        .string("/repository_error")
        .map(|error| format!("failing: {}; ", shorten(&error, &[])));
    add(
        "repository",
        format!(
            "{}; {}{damaged}",
            of.text("/repository"),
            error.unwrap_or_default()
        ),
    );
    for place in of.list("/repositories") {
        let place = Of(place);
        let how = match place.string("/error") {
            Some(error) => {
                let of_the_first = of.0["repository_error"].as_str();
                let shown = of_the_first.into_iter().collect::<Vec<_>>();
                format!("away: {}", shorten(&error, &shown))
            }
            None if place.string("/older").is_some() => {
                let older = place.string("/older").unwrap_or_default();
                format!("was incomplete: {}", shorten(&older, &[]))
            }
            None if place.text("/behind") == "true" => "catching up from another".to_owned(),
            None => format!("{} wait for it", place.bytes("/queued_bytes")),
        };
        let lag = place.seconds("/lag_seconds");
        add("", format!("{}: {how}; {lag} behind", place.text("/url")));
    }
    for standby in of.list("/standbys").map(Of) {
        let value = match standby.string("/problem") {
            Some(problem) => format!("{}: {problem}", standby.text("/server")),
            None => format!(
                "{} keeps WAL from {}",
                standby.text("/server"),
                standby.text("/restart_lsn")
            ),
        };
        add("standby", value);
    }
    for alert in of.list("/alerts").map(Of) {
        let name = alert.text("/name");
        let repository_errors = of.repository_errors();
        let summary = shorten(&alert.text("/summary"), &repository_errors);
        add(
            &alert.text("/severity"),
            format!("{name} since {}: {summary}", alert.instant("/since")),
        );
        add("", alert.text("/runbook"));
    }
    lines
}

/// Returns the number of requests that the daemon sent to its buckets, by the kinds that a store's
/// operator bills.
fn requests(report: &Value) -> String {
    let Some(requests) = report.get("requests").filter(|value| value.is_object()) else {
        return "a folder costs none".to_owned();
    };
    let counts = |which: &str| {
        let names = ["put", "get", "head", "list", "delete"];
        let count = |name: &str| format!("{} {name}", requests[which][name]);
        names.map(count).join(", ")
    };
    let minutes = requests["seconds"].as_u64().unwrap_or_default() / 60;
    let hour = match minutes {
        60.. => "last hour".to_owned(),
        _ => format!("last {} min", minutes + 1),
    };
    format!(
        "{hour}: {}; since the start: {}",
        counts("last_hour"),
        counts("total")
    )
}

/// Access to the values of a JSON document. A missing value is shown as unknown.
#[derive(Clone, Copy)]
struct Of<'a>(&'a Value);

impl<'a> Of<'a> {
    fn text(self, pointer: &str) -> String {
        match self.0.pointer(pointer) {
            None | Some(Value::Null) => "unknown".to_owned(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        }
    }

    /// Returns the long texts that the line with the state contains in full.
    fn displayed(self) -> Vec<&'a str> {
        let text = |pointer: &str| self.0.pointer(pointer).and_then(Value::as_str);
        let reason = text("/reason").unwrap_or_default();
        let mut displayed = vec![reason];
        let errors = [text("/stream_error"), text("/window/refusal")];
        let errors = errors.into_iter().flatten().chain(self.repository_errors());
        displayed.extend(errors.filter(|error| reason.contains(error)));
        displayed
    }

    /// Returns the errors of the repository and its members. The line of each contains its error.
    fn repository_errors(self) -> Vec<&'a str> {
        let members = self.list("/repositories").map(|place| &place["error"]);
        let errors = members.chain(self.0.get("repository_error"));
        errors.filter_map(Value::as_str).collect()
    }

    fn string(self, pointer: &str) -> Option<String> {
        Some(self.0.pointer(pointer)?.as_str()?.to_owned())
    }

    fn seconds(self, pointer: &str) -> String {
        units::seconds(self.0.pointer(pointer).and_then(Value::as_f64))
    }

    fn bytes(self, pointer: &str) -> String {
        units::bytes(self.0.pointer(pointer).and_then(Value::as_u64))
    }

    fn rate(self, pointer: &str) -> String {
        let rate = self.0.pointer(pointer).and_then(Value::as_f64);
        rate.map_or_else(
            || "unknown".to_owned(),
            |rate| format!("{}/s", units::amount(rate)),
        )
    }

    fn time(self, pointer: &str) -> Option<jiff::Timestamp> {
        self.0.pointer(pointer)?.as_str()?.parse().ok()
    }

    /// Formats a time to the second, like the dashboard.
    fn instant(self, pointer: &str) -> String {
        self.time(pointer).map_or_else(
            || "unknown".to_owned(),
            |time| time.strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        )
    }

    /// Formats the time between two instants.
    fn between(self, earlier: &str, later: &str) -> String {
        let span = self.time(earlier).zip(self.time(later));
        units::seconds(span.map(|(earlier, later)| later.duration_since(earlier).as_secs_f64()))
    }

    /// Describes the restorable window. Leaves out what is not known, unless nothing is known.
    fn restorable(self, shorten: impl Fn(&str) -> String) -> String {
        let mut parts = Vec::new();
        if let Some(refusal) = self.string("/window/refusal") {
            parts.push(format!("REFUSED: {}", shorten(&refusal)));
        }
        if self.time("/window/earliest").is_some() || self.time("/window/latest").is_some() {
            parts.push(format!(
                "{}, {} to {}",
                self.between("/window/earliest", "/window/latest"),
                self.instant("/window/earliest"),
                self.instant("/window/latest"),
            ));
        }
        let count = |pointer: &str| self.0.pointer(pointer).and_then(Value::as_u64);
        if let Some(gaps) = count("/window/gaps") {
            let open = count("/window/open_gaps").unwrap_or(0);
            parts.push(match open {
                0 => format!("gaps: {gaps}"),
                open => format!("gaps: {gaps}, {open} of them without a later backup"),
            });
        }
        if self.time("/caught_up_as_of").is_some() {
            parts.push(format!(
                "complete as of {}",
                self.instant("/caught_up_as_of")
            ));
        }
        match parts.is_empty() {
            true => "unknown".to_owned(),
            false => parts.join("; "),
        }
    }

    fn list(self, pointer: &str) -> impl Iterator<Item = &'a Value> {
        self.0
            .pointer(pointer)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
    }

    fn drill(self) -> String {
        let when = format!("{} ago", self.between("/last_drill/finished", "/as_of"));
        match self
            .0
            .pointer("/last_drill/passed")
            .and_then(Value::as_bool)
        {
            None => "none yet: run `pitr-restore drill`".to_owned(),
            Some(true) => {
                format!(
                    "passed {when}, lost {}",
                    self.seconds("/last_drill/loss_seconds")
                )
            }
            Some(false) => format!("failed {when}: {}", self.text("/last_drill/message")),
        }
    }

    fn backup(self) -> String {
        let Some(id) = self.string("/last_backup/id") else {
            return "none yet, so nothing can be restored: run `wal-archiver backup`".to_owned();
        };
        format!(
            "{id}, restorable since {}, took {}, stored {}",
            self.instant("/last_backup/finished"),
            self.between("/last_backup/started", "/last_backup/finished"),
            self.bytes("/last_backup/stored_bytes"),
        )
    }

    /// Describes a periodic operation of the daemon. `None` if it has no schedule.
    fn schedule(self, pointer: &str) -> Option<String> {
        let of = Of(self.0.pointer(pointer).filter(|value| value.is_object())?);
        let (schedule, zone) = (of.text("/schedule"), of.text("/time_zone"));
        let next = of.instant("/next_run");
        let state = if of.string("/running_since").is_some() {
            format!(", runs since {}", of.instant("/running_since"))
        } else if let Some(reason) = of.string("/waits_for") {
            format!(", waits: {reason}")
        } else if let Some(error) = of.string("/last_error") {
            format!(", failed at {}: {error}", of.instant("/last_error_at"))
        } else {
            String::new()
        };
        Some(format!("{next} ({schedule} {zone}){state}"))
    }

    /// Returns the progress of the base backup that runs. `None` if none runs.
    fn backup_progress(self) -> Option<String> {
        let phase = self.string("/backup_progress/phase")?;
        let number = |name: &str| self.0["backup_progress"][name].as_u64();
        let rate = self.0["backup_progress"]["bytes_per_second"].as_f64();
        let (streamed, total) = (number("streamed_bytes"), number("total_bytes"));
        Some(units::progress(&phase, streamed, total, rate))
    }

    fn slot(self) -> String {
        let Some(name) = self.string("/slot/name") else {
            return "unknown: the server was not asked yet".to_owned();
        };
        let active = if self.text("/slot/active") == "true" {
            "active"
        } else {
            "not active"
        };
        let safe = self
            .0
            .pointer("/slot/safe_wal_bytes")
            .and_then(Value::as_u64);
        let is_known = self.string("/slot/wal_status").is_some();
        let room = match safe {
            None if !is_known => "its limit is unknown".to_owned(),
            None => "no limit".to_owned(),
            Some(safe) => format!(
                "{} of {} may still be written, full in {} at {}",
                units::bytes(Some(safe)),
                units::bytes(
                    self.0
                        .pointer("/slot/retained_bytes")
                        .and_then(Value::as_u64)
                        .map(|kept| kept.saturating_add(safe))
                ),
                self.seconds("/slot/full_in_seconds"),
                self.rate("/wal_bytes_per_second")
            ),
        };
        format!(
            "{name} ({active}): {}, keeps {}, {room}",
            self.text("/slot/wal_status"),
            self.bytes("/slot/retained_bytes")
        )
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_window_that_is_refused_has_no_unknown_numbers() {
        let restorable = |window: Value| {
            let report = json!({ "window": window, "caught_up_as_of": "2026-11-30T10:00:00Z" });
            let line = lines(&report)
                .into_iter()
                .find(|line| line.contains("  restorable"));
            line.expect("a line")
                .trim()
                .replace("restorable ", "")
                .trim()
                .to_owned()
        };
        assert_eq!(
            restorable(json!({ "refusal": "there is no base backup" })),
            "REFUSED: there is no base backup; complete as of 2026-11-30 10:00:00Z"
        );
        assert_eq!(
            restorable(json!({
                "earliest": "2026-11-30T09:00:00Z", "latest": "2026-11-30T09:59:59Z", "gaps": 2, "open_gaps": 1
            })),
            "59 min 59 s, 2026-11-30 09:00:00Z to 2026-11-30 09:59:59Z; gaps: 2, 1 of them without a later backup; \
             complete as of 2026-11-30 10:00:00Z"
        );
    }

    #[test]
    fn a_long_error_is_printed_in_full_once() {
        let error = format!("/backup is not mounted. {}", "Mount it again. ".repeat(20));
        let error = error.trim_end().trim_end_matches('.');
        for reason in [
            error.to_owned(),
            format!("losing the primary loses 7 s: {error}"),
            "the stream is down".to_owned(),
        ] {
            let report = json!({
                "state": "broken",
                "reason": reason,
                "repository_error": error,
                "repositories": [{ "url": "file:///backup", "error": error }],
                "alerts": [
                    { "name": "PitrBroken", "summary": format!("{reason}.") },
                    { "name": "PitrRepositoryFailing", "summary": format!("It fails: {error}.") },
                ],
            });
            let text = lines(&report).join("\n");
            assert_eq!(text.matches(error).count(), 1, "{text}");
            assert!(text.contains("It fails: /backup is not mounted (in full above)."));
        }
    }
}
