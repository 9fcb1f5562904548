//! [`RecoveryTarget`]: where a person wants recovery to stop, and how a time is written.
//!
//! A time without an offset means another instant on every machine, so it is refused unless a zone is named; a local
//! time that a clock change skipped or repeated is refused too.

use jiff::{Span, Timestamp, civil, tz::TimeZone};
use wal_format::{Lsn, PgTimestamp};

use crate::{Error, Result};

/// Where recovery stops (`recovery_target*` of PostgreSQL).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecoveryTarget {
    /// At the end of the archive.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// Before the first transaction end with a later time; with `inclusive` off, with this time or a later one.
    Time {
        /// The time.
        time: PgTimestamp,
        /// True if transactions of exactly this time are kept.
        inclusive: bool,
    },
    /// After the first record at or after the LSN; with `inclusive` off, before it.
    Lsn {
        /// The position.
        lsn: Lsn,
        /// True if the record is kept.
        inclusive: bool,
    },
    /// After the end of this transaction; with `inclusive` off, before it.
    Xid {
        /// The transaction.
        xid: u32,
        /// True if it is kept.
        inclusive: bool,
    },
    /// After the first restore point of this name.
    Name(String),
}

/// Reads a target time. `now` is passed in, so that this stays testable.
///
/// # Errors
/// [`Error::Usage`] that shows how to write it.
pub fn parse_time(text: &str, zone: Option<&str>, now: Timestamp) -> Result<PgTimestamp> {
    let text = text.trim();
    let wrong = |why: &str| {
        Error::usage(format!(
            "target time \"{text}\" {why}; write it with an offset, as '2026-11-21 10:00:00+00', or name --time-zone"
        ))
    };
    if text.eq_ignore_ascii_case("now") {
        return Ok(PgTimestamp::from_jiff(now));
    }
    if let Some(ago) = text.strip_suffix("ago") {
        let span: Span = ago
            .trim()
            .parse()
            .map_err(|_| wrong("is no span of time"))?;
        // Days are 24 hours: "1 day ago" must not depend on where this runs.
        let duration = span
            .to_duration(jiff::SpanRelativeTo::days_are_24_hours())
            .map_err(|_| wrong("is no span of time"))?;
        if duration.is_negative() {
            return Err(wrong("lies in the future"));
        }
        let then = now
            .checked_sub(duration)
            .map_err(|_| wrong("is out of range"))?;
        return Ok(PgTimestamp::from_jiff(then));
    }
    let text_utc = text.strip_suffix(" UTC").map(|text| format!("{text}Z"));
    if let Ok(time) = text_utc.as_deref().unwrap_or(text).parse::<Timestamp>() {
        return exact(time).ok_or_else(|| wrong("is finer than PostgreSQL's microseconds"));
    }
    let local: civil::DateTime = text.parse().map_err(|_| wrong("is no time"))?;
    let Some(zone) = zone else {
        return Err(wrong("has no offset"));
    };
    let zone = TimeZone::get(zone).map_err(|_| {
        Error::usage(format!(
            "--time-zone \"{zone}\" is not known; write Europe/Berlin or UTC"
        ))
    })?;
    let time = zone
        .to_ambiguous_timestamp(local)
        .unambiguous()
        .map_err(|_| wrong("exists twice or not at all in that time zone (the clocks changed)"))?;
    exact(time).ok_or_else(|| wrong("is finer than PostgreSQL's microseconds"))
}

fn exact(time: Timestamp) -> Option<PgTimestamp> {
    (time.subsec_nanosecond() % 1000 == 0).then(|| PgTimestamp::from_jiff(time))
}

/// UTC, the time zone of this machine, and the distance to `now`.
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

    fn parse(text: &str, zone: Option<&str>) -> Result<String> {
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
            ("now", "2026-11-21T12:00:00.000000Z"),
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
            ("10 bananas ago", None),
            ("-10 minutes ago", None),
            ("", None),
            ("2026-13-01 00:00:00+00", None),
        ] {
            let error = parse(text, zone).expect_err(text).to_string();
            assert!(error.contains("+00'"), "{text}: {error}");
        }
        assert!(parse("2026-11-21 10:00:00", Some("Mars/Olympus")).is_err());
    }
}
