//! Daily, weekly and monthly backups.
//!
//! A backup belongs to the period in which it ended, in UTC. Only periods that contain a backup
//! count, so a pause of the archiver does not use any up. The last backup of each period is kept.

use std::collections::BTreeSet;

use jiff::{civil::Date, tz::TimeZone};
use wal_format::PgTimestamp;

/// A division of time into periods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Period {
    Day,
    Week,
    Month,
}

impl Period {
    /// Returns the first day of the period that contains `time`, or `None` outside of the
    /// calendar's range.
    pub(super) fn of(self, time: PgTimestamp) -> Option<Date> {
        let date = time.to_jiff()?.to_zoned(TimeZone::UTC).date();
        match self {
            Self::Day => Some(date),
            Self::Week => date
                .checked_sub(jiff::Span::new().days(date.weekday().to_monday_zero_offset()))
                .ok(),
            Self::Month => Some(date.first_of_month()),
        }
    }

    /// Chooses the backups to keep, given newest first: index, and first day of the period.
    pub(super) fn choose(self, newest_first: &[PgTimestamp], count: u32) -> Vec<(usize, Date)> {
        let mut seen = BTreeSet::new();
        let mut chosen = Vec::new();
        for (index, time) in newest_first.iter().enumerate() {
            let Some(period) = self.of(*time) else {
                continue;
            };
            if seen.len() >= usize::try_from(count).unwrap_or(usize::MAX) {
                break;
            }
            if seen.insert(period) {
                chosen.push((index, period));
            }
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> PgTimestamp {
        PgTimestamp::from_jiff(text.parse().expect("a time"))
    }

    fn check(period: Period, times: &[&str], count: u32, expect: &[usize]) {
        let times: Vec<_> = times.iter().map(|text| at(text)).collect();
        let chosen: Vec<_> = period.choose(&times, count).iter().map(|c| c.0).collect();
        assert_eq!(chosen, expect, "{period:?}");
    }

    #[test]
    fn a_day_is_one_of_utc_and_keeps_its_last_backup() {
        let times = [
            "2026-11-21T23:59:59Z",
            "2026-11-21T00:00:00Z",
            // The same day in UTC, although local clocks differ.
            "2026-11-21T00:30:00+02:00",
            "2026-11-18T12:00:00Z",
        ];
        check(Period::Day, &times, 7, &[0, 2, 3]);
        check(Period::Day, &times, 2, &[0, 2]);
        check(Period::Day, &times, 0, &[]);
    }

    #[test]
    fn a_week_begins_on_monday_and_a_year_does_not_cut_it() {
        // 2026-12-28 is a Monday, 2027-01-03 a Sunday.
        let times = [
            "2027-01-04T00:00:00Z",
            "2027-01-03T23:00:00Z",
            "2026-12-28T00:00:00Z",
            "2026-12-27T23:59:59Z",
        ];
        check(Period::Week, &times, 4, &[0, 1, 3]);
    }

    #[test]
    fn a_pause_uses_up_no_months() {
        let times = [
            "2026-11-01T00:00:00Z",
            "2026-10-31T23:59:59Z",
            "2024-02-29T10:00:00Z",
            "2024-02-01T10:00:00Z",
            "2023-02-01T10:00:00Z",
        ];
        check(Period::Month, &times, 3, &[0, 1, 2]);
        check(Period::Month, &times, 12, &[0, 1, 2, 4]);
    }
}
