//! Target times in the notations of PostgreSQL, `date`, mail and ISO 8601.
//!
//! A time without an offset means another instant on every machine, so it is refused unless a zone
//! is named. An abbreviation such as CET or EST is refused as well: several zones use it. A local
//! time that a clock change skipped or repeated is refused too.

use jiff::{
    Span, Timestamp, civil,
    fmt::{rfc2822, strtime},
    tz::TimeZone,
};
use wal_format::PgTimestamp;

/// A text that names no instant. The message shows a valid notation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TimeError(String);

/// Names of UTC that may follow a time.
const UTC: [&str; 5] = ["UTC", "GMT", "UCT", "Zulu", "Z"];

/// Parses a target time. `now` is the current time, so that this function reads no clock.
///
/// # Errors
/// [`TimeError`] that shows a valid notation.
pub fn parse_time(
    text: &str,
    zone: Option<&str>,
    now: Timestamp,
) -> Result<PgTimestamp, TimeError> {
    let text = text.trim();
    let wrong = |why: &str| {
        TimeError(format!(
            "target time \"{text}\" {why}; write it with an offset, as '2026-11-21 10:00:00+00', or \
             name --time-zone"
        ))
    };
    if is_now(text) {
        return Ok(PgTimestamp::from_jiff(now));
    }
    if let Some(ago) = span_before(text) {
        let span: Span = ago.parse().map_err(|_| wrong("is not a span of time"))?;
        // Days are 24 hours: "1 day ago" must not depend on where this runs.
        let duration = span
            .to_duration(jiff::SpanRelativeTo::days_are_24_hours())
            .map_err(|_| wrong("is not a span of time"))?;
        if duration.is_negative() {
            return Err(wrong("lies in the future"));
        }
        let then = now
            .checked_sub(duration)
            .map_err(|_| wrong("is out of range"))?;
        return Ok(PgTimestamp::from_jiff(then));
    }
    let exact = |time| exact(time).ok_or_else(|| wrong("is finer than PostgreSQL's microseconds"));
    if let Some(time) = with_offset(text) {
        return exact(time);
    }
    // As in PostgreSQL, the name of a time zone may follow the time.
    let (local, named) = match text.rsplit_once(char::is_whitespace) {
        Some((local, name)) if name.contains('/') => (local.trim_end(), Some(name)),
        _ => (text, zone),
    };
    let local: civil::DateTime = match local.parse() {
        Ok(local) => local,
        Err(_) if has_abbreviation(text) => {
            return Err(wrong(
                "names its zone by an abbreviation, which several zones have",
            ));
        }
        Err(_) => return Err(wrong("is not a time")),
    };
    let Some(name) = named else {
        return Err(wrong("has no offset"));
    };
    let zone = TimeZone::get(name).map_err(|_| {
        TimeError(format!(
            "time zone \"{name}\" is not known; write Europe/Berlin or UTC"
        ))
    })?;
    let time = zone
        .to_ambiguous_timestamp(local)
        .unambiguous()
        .map_err(|_| wrong("exists twice or not at all in that time zone (the clocks changed)"))?;
    exact(time)
}

/// Returns true if the text names a time by its distance to now: `now` or `5 minutes ago`.
#[must_use]
pub fn is_relative(text: &str) -> bool {
    let text = text.trim();
    is_now(text) || span_before(text).is_some()
}

fn is_now(text: &str) -> bool {
    text.eq_ignore_ascii_case("now")
}

/// Returns the span of `SPAN ago`.
fn span_before(text: &str) -> Option<&str> {
    text.strip_suffix("ago").map(str::trim)
}

/// Parses a time that is the same instant everywhere.
fn with_offset(text: &str) -> Option<Timestamp> {
    if let Ok(time) = text.parse() {
        return Some(time);
    }
    // `date -R`, and mail.
    if let Ok(time) = rfc2822::parse(text) {
        return Some(time.timestamp());
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    // `date` in the C locale, in UTC.
    if let [weekday, month, day, clock, zone, year] = words[..]
        && is_utc(zone)
    {
        let text = format!("{weekday} {month} {day} {clock} {year}");
        let local = strtime::parse("%a %b %d %H:%M:%S %Y", text).ok()?;
        return local
            .to_datetime()
            .ok()?
            .to_zoned(TimeZone::UTC)
            .ok()
            .map(Timestamp::from);
    }
    // A blank before the offset, as of `date '+%F %T %z'`, or a name of UTC, as in PostgreSQL's
    // log.
    if let Some((local, offset)) = text.rsplit_once(char::is_whitespace)
        && offset.starts_with(['+', '-'])
    {
        return format!("{}{offset}", local.trim_end()).parse().ok();
    }
    let local = UTC.iter().find_map(|name| {
        let (local, end) = text.split_at_checked(text.len().checked_sub(name.len())?)?;
        end.eq_ignore_ascii_case(name).then(|| local.trim_end())
    })?;
    format!("{local}Z").parse().ok()
}

fn is_utc(zone: &str) -> bool {
    UTC.iter().any(|name| name.eq_ignore_ascii_case(zone))
}

/// Returns true if a word of letters follows the time of day.
fn has_abbreviation(text: &str) -> bool {
    let mut words = text
        .split_whitespace()
        .skip_while(|word| !word.contains(':'));
    let follows = words.nth(1);
    follows.is_some_and(|word| word.len() > 1 && word.chars().all(char::is_alphabetic))
}

fn exact(time: Timestamp) -> Option<PgTimestamp> {
    (time.subsec_nanosecond() % 1000 == 0).then(|| PgTimestamp::from_jiff(time))
}

/// Formats a time in UTC and in the time zone of this machine, with its distance to `now`.
#[must_use]
pub fn explain_time(time: PgTimestamp, now: Timestamp) -> String {
    let Some(timestamp) = time.to_jiff() else {
        return time.to_string();
    };
    let local = timestamp.to_zoned(TimeZone::system());
    let seconds = now.as_second().saturating_sub(timestamp.as_second());
    let (distance, side) = if seconds < 0 {
        (seconds.unsigned_abs(), "from now")
    } else {
        (seconds.unsigned_abs(), "ago")
    };
    let (hours, minutes, seconds) = (distance / 3600, distance / 60 % 60, distance % 60);
    let local = local.strftime("%Y-%m-%d %H:%M:%S%:z");
    format!("{time} (local {local}, {hours} h {minutes} min {seconds} s {side})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, zone: Option<&str>) -> Result<String, TimeError> {
        let now = "2026-11-21T12:00:00Z".parse().expect("a time");
        parse_time(text, zone, now).map(|time| time.to_string())
    }

    #[test]
    fn times_with_an_offset_are_one_instant() {
        for (text, expected) in [
            ("2026-11-21 10:00:00+00", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21T10:00:00Z", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21 10:00:00 UTC", "2026-11-21T10:00:00.000000Z"),
            (
                "2026-11-21 10:00:00.123456+05:30",
                "2026-11-21T04:30:00.123456Z",
            ),
            ("2026-11-21 10:00:00-0800", "2026-11-21T18:00:00.000000Z"),
            ("2026-11-21 10:00:00+00:00", "2026-11-21T10:00:00.000000Z"),
            (" 2026-11-21 10:00:00+00 ", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21 10:00:00 +0000", "2026-11-21T10:00:00.000000Z"),
            (
                "2026-11-21 15:30:00.5 +05:30",
                "2026-11-21T10:00:00.500000Z",
            ),
            ("2026-11-21 02:00:00 -08", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21 10:00:00 GMT", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21 10:00:00.123 UTC", "2026-11-21T10:00:00.123000Z"),
            ("2026-11-21 10:00:00 Z", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21 10:00:00 utc", "2026-11-21T10:00:00.000000Z"),
            ("2026-11-21 10:00:00UTC", "2026-11-21T10:00:00.000000Z"),
            (
                "Sat, 21 Nov 2026 11:00:00 +0100",
                "2026-11-21T10:00:00.000000Z",
            ),
            (
                "Sat, 21 Nov 2026 10:00:00 GMT",
                "2026-11-21T10:00:00.000000Z",
            ),
            (
                "Sat Nov 21 10:00:00 UTC 2026",
                "2026-11-21T10:00:00.000000Z",
            ),
            (
                "Sat Nov  7 10:00:00 UTC 2026",
                "2026-11-07T10:00:00.000000Z",
            ),
            (
                "2026-11-21 11:00:00 Europe/Berlin",
                "2026-11-21T10:00:00.000000Z",
            ),
            ("now", "2026-11-21T12:00:00.000000Z"),
            ("5 s ago", "2026-11-21T11:59:55.000000Z"),
            ("10 minutes ago", "2026-11-21T11:50:00.000000Z"),
            ("1 day ago", "2026-11-20T12:00:00.000000Z"),
        ] {
            assert_eq!(parse(text, None).expect(text), expected, "{text}");
        }
        let berlin = parse("2026-11-21 10:00:00", Some("Europe/Berlin"));
        assert_eq!(
            berlin.expect("it has a zone"),
            "2026-11-21T09:00:00.000000Z"
        );
    }

    #[test]
    fn what_is_ambiguous_is_refused_with_a_remedy() {
        for (text, zone) in [
            ("2026-11-21 10:00:00", None),
            ("2026-10-25 02:30:00", Some("Europe/Berlin")),
            ("2026-03-29 02:30:00", Some("Europe/Berlin")),
            ("2026-11-21 10:00:00.1234567+00", None),
            ("tomorrow", None),
            ("2026-11-21 10:00:00 CET", None),
            ("2026-11-21 10:00:00 EST", None),
            ("Sat Nov 21 10:00:00 CET 2026", None),
            ("2026-11-21 10:00:00 Mars/Olympus", None),
            ("Z", None),
            ("+00", None),
            ("10 bananas ago", None),
            ("-10 minutes ago", None),
            ("", None),
            ("2026-13-01 00:00:00+00", None),
        ] {
            let error = parse(text, zone).expect_err(text).to_string();
            let remedy = ["+00'", "Europe/Berlin or UTC"];
            assert!(
                remedy.iter().any(|one| error.contains(one)),
                "{text}: {error}"
            );
        }
        assert!(parse("2026-11-21 10:00:00", Some("Mars/Olympus")).is_err());
    }
}
