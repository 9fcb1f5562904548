//! [`Schedule`]: the times at which a periodic operation is due, from five cron fields and a time
//! zone. Pure: nothing here reads a clock.
//!
//! Daylight saving neither skips nor doubles a run. A run whose local time does not exist is due
//! at the end of the gap. A run whose local time exists twice is due at the first of the two. A
//! schedule with `*` as the hour is the exception that needs none of this: it follows the elapsed
//! time, so an hour that exists twice has its runs twice.

use std::fmt;

use cronexpr::{Crontab, FallbackTimezoneOption, MakeTimestamp, ParseOptions};
use jiff::{
    SignedDuration, Timestamp,
    civil::DateTime,
    tz::{AmbiguousOffset, TimeZone},
};

/// An example for error messages.
const EXAMPLE: &str =
    "\"0 2 * * *\" (each day at 02:00) or \"0 3 1 * *\" (on the first of each month at 03:00)";
/// The maximum number of local times that are tried for the next run. A change of the clock can
/// pass over at most two hours of them.
const TRIES_MAX: usize = 1440;

/// The times at which a periodic operation is due.
#[derive(Clone)]
pub struct Schedule {
    text: String,
    zone_name: String,
    /// Evaluated on local times, which are presented to it as times in UTC.
    cron: Crontab,
    zone: TimeZone,
    /// True if every hour has its runs.
    is_hourly: bool,
}

impl Schedule {
    /// Parses five cron fields and the IANA name of a time zone.
    ///
    /// # Errors
    /// The reason, with an example.
    pub fn parse(text: &str, zone_name: &str) -> Result<Self, ScheduleError> {
        let zone = parse_zone(zone_name)?;
        let refused = |reason: String| ScheduleError::Fields {
            text: text.to_owned(),
            reason,
        };
        let fields: Vec<&str> = text.split_ascii_whitespace().collect();
        if fields.len() != 5 {
            return Err(refused(format!("it has {} fields", fields.len())));
        }
        let mut options = ParseOptions::default();
        options.fallback_timezone_option = FallbackTimezoneOption::UTC;
        let text = fields.join(" ");
        let cron = cronexpr::parse_crontab_with(&text, options).map_err(|error| {
            let message = error.to_string();
            // The library draws an arrow below the text. Its reason follows the arrow.
            let reason = message.rsplit_once("^ ").map(|(_, reason)| reason.trim());
            refused(reason.unwrap_or("it is malformed").to_owned())
        })?;
        let is_hourly = matches!(fields[1], "*" | "*/1" | "0-23");
        let schedule = Self {
            is_hourly,
            cron,
            zone,
            zone_name: zone_name.to_owned(),
            text,
        };
        if schedule
            .next_local(DateTime::constant(2024, 1, 1, 0, 0, 0, 0))
            .is_none()
        {
            return Err(refused("no date matches it".to_owned()));
        }
        Ok(schedule)
    }

    /// Returns the five fields, separated by single spaces.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Returns the name of the time zone.
    #[must_use]
    pub fn zone_name(&self) -> &str {
        &self.zone_name
    }

    /// Returns the first time after `time` at which a run is due. `None` at the end of the
    /// calendar.
    #[must_use]
    pub fn next_after(&self, time: Timestamp) -> Option<Timestamp> {
        if self.is_hourly {
            self.next_by_elapsed_time(time)
        } else {
            self.next_by_local_time(time)
        }
    }

    /// Returns true if a run was due after `last`, the begin of the last run, and not after `now`.
    #[must_use]
    pub fn is_missed(&self, last: Timestamp, now: Timestamp) -> bool {
        self.next_after(last).is_some_and(|next| next <= now)
    }

    fn next_by_local_time(&self, time: Timestamp) -> Option<Timestamp> {
        let mut local = self.zone.to_datetime(time);
        for _ in 0..TRIES_MAX {
            local = self.next_local(local)?;
            let due = match self.zone.to_ambiguous_timestamp(local).offset() {
                AmbiguousOffset::Unambiguous { offset } => offset.to_timestamp(local).ok()?,
                AmbiguousOffset::Fold { before, .. } => before.to_timestamp(local).ok()?,
                AmbiguousOffset::Gap { before, .. } => {
                    // The last change of the clock up to this instant is the one with the gap.
                    let within = before.to_timestamp(local).ok()?;
                    let within = within.checked_add(SignedDuration::from_secs(1)).ok()?;
                    self.zone.preceding(within).next()?.timestamp()
                }
            };
            // The first of two equal local times may have passed.
            if due > time {
                return Some(due);
            }
        }
        None
    }

    fn next_by_elapsed_time(&self, time: Timestamp) -> Option<Timestamp> {
        let mut local = self.zone.to_datetime(time);
        let mut offset = self.zone.to_offset(time);
        for change in self.zone.following(time) {
            let due = self.due_at(local, offset)?;
            if due < change.timestamp() {
                return Some(due);
            }
            // A run may be due at the moment of the change.
            offset = change.offset();
            let before = offset.to_datetime(change.timestamp());
            local = before.checked_sub(SignedDuration::from_secs(1)).ok()?;
        }
        self.due_at(local, offset)
    }

    fn due_at(&self, local: DateTime, offset: jiff::tz::Offset) -> Option<Timestamp> {
        offset.to_timestamp(self.next_local(local)?).ok()
    }

    /// Returns the first local time after `local` that matches the fields.
    fn next_local(&self, local: DateTime) -> Option<DateTime> {
        let as_utc = TimeZone::UTC.to_timestamp(local).ok()?;
        let next = self.cron.find_next(MakeTimestamp(as_utc)).ok()?;
        Some(next.datetime())
    }
}

fn parse_zone(name: &str) -> Result<TimeZone, ScheduleError> {
    if name.eq_ignore_ascii_case("UTC") {
        return Ok(TimeZone::UTC);
    }
    TimeZone::get(name).map_err(|_| ScheduleError::Zone {
        name: name.to_owned(),
    })
}

/// The reason why a schedule is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// The cron fields are wrong.
    #[error(
        "\"{text}\" is not a schedule: {reason}; write five fields (minute, hour, day of month, month, day of week), for \
         example {EXAMPLE}"
    )]
    Fields {
        /// The text as typed.
        text: String,
        /// The reason.
        reason: String,
    },
    /// The time zone is unknown.
    #[error(
        "\"{name}\" is not a time zone that this system knows; write an IANA name such as \"Europe/Berlin\" or \"UTC\". All \
         names except UTC need the package tzdata"
    )]
    Zone {
        /// The name as typed.
        name: String,
    },
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        (&self.text, &self.zone_name) == (&other.text, &other.zone_name)
    }
}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Schedule({self})")
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.text, self.zone_name)
    }
}

#[cfg(test)]
mod tests;
