//! The API routes below one cluster, except its report: series, events, backups, drills, locate.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::StatusCode;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json as object;
use status::{locate::Located, report::ClusterReport, units::DRILL_ADVICE};
use tokio::task;
use wal_format::{OutcomeKind, PgTimestamp};

use super::answer::{Answer, json, problem};
use crate::{
    clock::unix_second,
    monitor::{
        Watched,
        series::{METRICS, POINTS_MAX},
    },
};

/// The maximum time to wait until an instant of the last seconds is proved. The server is polled
/// once a second.
const PROOF_MAX: Duration = Duration::from_secs(3);
const PROOF_POLL: Duration = Duration::from_millis(250);

/// Returns a query's pairs, percent-decoded. A name that is not in `known` is an error, so that a
/// mistyped limit is not ignored.
pub(super) fn parameters(query: &str, known: &[&str]) -> Result<Vec<(String, String)>, String> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (name, value) = (decode(name), decode(value));
            if known.contains(&name.as_str()) {
                Ok((name, value))
            } else {
                Err(format!(
                    "unknown parameter \"{name}\"; known are {}",
                    known.join(", ")
                ))
            }
        })
        .collect()
}

/// Decodes `+` and `%XX`. An invalid escape is kept as it is.
pub(super) fn decode(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let escaped = tail
            .get(..2)
            .filter(|_| *first == b'%')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        if let Some(byte) = escaped {
            bytes.push(byte);
            rest = &tail[2..];
        } else {
            bytes.push(if *first == b'+' { b' ' } else { *first });
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Parses a time: RFC 3339, the format of a browser's date field (in UTC), or seconds of the Unix
/// epoch.
pub(super) fn instant(text: &str) -> Option<Timestamp> {
    if let Ok(seconds) = text.parse::<i64>() {
        return Timestamp::from_second(seconds).ok();
    }
    // An unescaped plus sign of an offset arrives as a space.
    let text = text.trim().replace(' ', "+");
    text.parse()
        .ok()
        .or_else(|| format!("{text}Z").parse().ok())
        .or_else(|| format!("{text}:00Z").parse().ok())
}

/// The greatest number of words in a time at the beginning of a log line.
const TIME_WORDS_MAX: usize = 4;

/// Parses what a person types or pastes: everything that the command line accepts, with UTC if no
/// offset is given, and the time at the beginning of a log line.
pub(super) fn typed_instant(text: &str) -> Result<Timestamp, String> {
    if let Some(time) = instant(text) {
        return Ok(time);
    }
    let now = Timestamp::now();
    let parse = |text: &str| repository::parse_time(text, Some("UTC"), now);
    let words: Vec<&str> = text.split_whitespace().collect();
    let begins = (1..=TIME_WORDS_MAX.min(words.len())).rev();
    let mut begins = begins.filter_map(|count| parse(&words[..count].join(" ")).ok());
    let time = match parse(text) {
        Ok(time) => time,
        Err(error) => begins.next().ok_or_else(|| error.to_string())?,
    };
    time.to_jiff()
        .ok_or_else(|| "the time is out of range".to_owned())
}

pub(super) fn series(cluster: &Watched, query: &str) -> Answer {
    let asked = match parameters(query, &["metric", "from", "to", "points"]) {
        Ok(asked) => asked,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &error),
    };
    let value = |name: &str| {
        asked
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    };
    let second = |name: &str, default: u64| match value(name) {
        None => Some(default),
        Some(text) => instant(text).and_then(|time| u64::try_from(time.as_second()).ok()),
    };
    let bad = |detail: &str| problem(StatusCode::BAD_REQUEST, detail);
    let Some(to) = second("to", unix_second() + 1) else {
        return bad("\"to\" is no time; write 2026-11-21T10:00:00Z");
    };
    let Some(from) = second("from", to.saturating_sub(900)) else {
        return bad("\"from\" is no time; write 2026-11-21T10:00:00Z");
    };
    if from >= to {
        return bad("\"from\" is not before \"to\"");
    }
    let points = match value("points").map(|text| text.parse::<usize>()) {
        None => 300,
        Some(Ok(points @ 1..=POINTS_MAX)) => points,
        Some(_) => return bad("\"points\" is not from 1 to 2000"),
    };
    let metric = value("metric").map_or("rpo_remote", String::as_str);
    let Some(found) = cluster.series().query(metric, from, to, points) else {
        return bad(&format!("no such metric; known are {}", METRICS.join(", ")));
    };
    let rfc3339 = |second: u64| {
        i64::try_from(second)
            .ok()
            .and_then(|second| Timestamp::from_second(second).ok())
            .map(|time| time.to_string())
    };
    let points: Vec<_> = found
        .iter()
        .map(|point| object!({ "time": rfc3339(point.time), "max": point.max }))
        .collect();
    json(
        StatusCode::OK,
        &object!({ "schema": "v1", "metric": metric, "points": points }),
    )
}

pub(super) fn events(cluster: &Watched, query: &str) -> Answer {
    let after = match parameters(query, &["after"]).map(|mut asked| asked.pop()) {
        Ok(None) => 0,
        Ok(Some((_, text))) => match text.parse() {
            Ok(after) => after,
            Err(_) => return problem(StatusCode::BAD_REQUEST, "\"after\" is the id of an event"),
        },
        Err(error) => return problem(StatusCode::BAD_REQUEST, &error),
    };
    let events = cluster.events().after(after);
    json(
        StatusCode::OK,
        &object!({ "schema": "v1", "events": events }),
    )
}

pub(super) fn window(cluster: &Watched, report: &ClusterReport) -> Answer {
    let details = cluster.status().details();
    json(
        StatusCode::OK,
        &object!({
            "schema": "v1",
            "earliest": report.window.earliest,
            "latest": report.window.latest,
            "latest_commit": report.window.latest_commit,
            "refusal": report.window.refusal,
            "caught_up_as_of": report.caught_up_as_of,
            "ranges": details.ranges,
            "restorable": details.restorable,
            "gaps": details.gaps,
            "failover_losses": details.failover_losses,
            "marks": details.marks,
        }),
    )
}

pub(super) fn backups(cluster: &Watched) -> Answer {
    let details = cluster.status().details();
    let hint = "none yet: run `wal-archiver backup`";
    json(StatusCode::OK, &listed("backups", &details.backups, hint))
}

pub(super) fn drills(cluster: &Watched) -> Answer {
    let details = cluster.status().details();
    let drills: Vec<_> = details.of_kind(OutcomeKind::Drill).collect();
    json(StatusCode::OK, &listed("drills", &drills, DRILL_ADVICE))
}

/// Makes a list. If it is empty, adds how to get its first entry.
fn listed<T: Serialize>(name: &str, entries: &[T], hint: &str) -> serde_json::Value {
    let hint = entries.is_empty().then_some(hint);
    object!({ "schema": "v1", name: entries, "hint": hint })
}

/// Returns the restore that leads to an instant, from the catalog on this host. If the instant is
/// in the last [`PROOF_MAX`], waits until it is proved.
pub(super) async fn nearest(cluster: &Watched, time: Timestamp) -> Result<Located, String> {
    let until = Instant::now() + PROOF_MAX;
    loop {
        let archive = Arc::clone(cluster.archive());
        let of_server = PgTimestamp::from_jiff(time);
        let located = task::spawn_blocking(move || archive.locate(of_server)).await;
        let located =
            located.map_err(|error| format!("the blocking thread stopped: {error}"))??;
        let ago = Timestamp::now().duration_since(time);
        let is_now = !ago.is_negative() && ago.unsigned_abs() <= PROOF_MAX;
        if located.flags.is_some() || !is_now || Instant::now() >= until {
            return Ok(located);
        }
        tokio::time::sleep(PROOF_POLL).await;
    }
}

pub(super) async fn locate(cluster: &Watched, query: &str) -> Answer {
    let asked = match parameters(query, &["time"]) {
        Ok(asked) => asked,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &error),
    };
    let text = asked.first().map_or("", |(_, text)| text.as_str());
    let time = match typed_instant(text) {
        Ok(time) => time,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &error),
    };
    match nearest(cluster, time).await {
        Err(error) => problem(StatusCode::SERVICE_UNAVAILABLE, &error),
        Ok(located) => {
            let command = |flags: &String| restore_command(cluster, flags);
            let nearest = located.nearest.iter();
            let nearest =
                nearest.map(|near| object!({ "time": near.time, "command": command(&near.flags) }));
            json(
                StatusCode::OK,
                &object!({
                    "schema": "v1", "time": located.time, "before": located.before, "after": located.after,
                    "command": located.flags.as_ref().map(command), "plan": located.chosen,
                    "refusal": located.refusal,
                    "nearest": nearest.collect::<Vec<_>>(),
                }),
            )
        }
    }
}

/// Returns the shell command that restores with these flags.
pub(super) fn restore_command(cluster: &Watched, flags: &str) -> String {
    let settings = cluster.settings();
    // Only the file contains keys, endpoints and further repositories.
    let file = settings.file.as_ref().map_or_else(String::new, |file| {
        format!("--config {} ", quote(&file.to_string_lossy()))
    });
    format!(
        "pitr-restore {file}--repository {} --cluster {} {flags} --target-dir /var/lib/postgresql/restore",
        quote(&settings.repository.url.to_string()),
        settings.name
    )
}

/// Returns an argument of a shell command, in quotes if the shell needs them.
fn quote(argument: &str) -> String {
    let is_plain = |one: char| one.is_ascii_alphanumeric() || "_-./:@%+=,".contains(one);
    if !argument.is_empty() && argument.chars().all(is_plain) {
        return argument.to_owned();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_come_in_the_spellings_of_people_and_browsers() {
        let expected: Timestamp = "2026-11-21T10:00:00Z".parse().expect("a time");
        for text in [
            "2026-11-21T10:00:00Z",
            "2026-11-21T10:00:00",
            "2026-11-21T10:00",
            "2026-11-21T15:30:00 05:30",
            "1795255200",
        ] {
            assert_eq!(instant(text), Some(expected), "{text}");
        }
        for text in ["", "now", "2026-13-01T00:00:00Z"] {
            assert_eq!(instant(text), None, "{text}");
        }
    }

    #[test]
    fn a_person_may_type_what_the_command_line_takes() {
        let expected: Timestamp = "2026-11-21T10:00:00Z".parse().expect("a time");
        for text in [
            "2026-11-21 10:00:00",
            "2026-11-21 15:30:00+05:30",
            "2026-11-21 10:00:00.000 UTC [4711] LOG:  statement: DROP TABLE a",
            "2026-11-21 11:00:00 Europe/Berlin",
        ] {
            assert_eq!(typed_instant(text), Ok(expected), "{text}");
        }
        let ago = typed_instant("10 min ago").expect("a time");
        let age = Timestamp::now().duration_since(ago).as_secs();
        assert!((600..660).contains(&age), "{age}");
        let error = typed_instant("yesterday").expect_err("no time");
        assert!(error.contains("write it with an offset"), "{error}");
    }

    #[test]
    fn a_shell_reads_an_argument_as_one_word() {
        assert_eq!(quote("s3://bucket/a-b_c.1"), "s3://bucket/a-b_c.1");
        assert_eq!(quote("file:///a b/$(x)"), "'file:///a b/$(x)'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn escapes_are_decoded_and_broken_ones_kept() {
        assert_eq!(decode("a%20b+c%zz%"), "a b c%zz%");
        assert!(parameters("metrik=x", &["metric"]).is_err());
    }
}
