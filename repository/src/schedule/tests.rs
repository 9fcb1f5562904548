use super::*;

fn time(text: &str) -> Timestamp {
    text.parse().expect(text)
}

fn schedule(fields: &str, zone: &str) -> Schedule {
    Schedule::parse(fields, zone).unwrap_or_else(|error| panic!("{fields} {zone}: {error}"))
}

/// Returns the runs after `from` and not after `to`, each found from the one before.
fn runs(schedule: &Schedule, from: &str, to: &str) -> Vec<String> {
    let (mut now, end) = (time(from), time(to));
    let mut found = Vec::new();
    while let Some(next) = schedule.next_after(now).filter(|next| *next <= end) {
        assert!(next > now, "{schedule}: {next} does not follow {now}");
        found.push(next.to_string());
        now = next;
    }
    found
}

/// Zone, fields, begin, end, and the expected runs.
type Case = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static [&'static str],
);

/// Changes of the clock: Berlin 2026-03-29 01:00Z and 2026-10-25 01:00Z, New York 2026-03-08 07:00Z
/// and 2026-11-01 06:00Z (by an hour), Lord Howe 2026-04-04 15:00Z and 2026-10-03 15:30Z (by half
/// an hour).
const CASES: &[Case] = &[
    // No time between 02:00 and 03:00: due at the end of the gap.
    (
        "Europe/Berlin",
        "30 2 * * *",
        "2026-03-28T00:00:00Z",
        "2026-03-30T12:00:00Z",
        &[
            "2026-03-28T01:30:00Z",
            "2026-03-29T01:00:00Z",
            "2026-03-30T00:30:00Z",
        ],
    ),
    // Several runs in the gap are one.
    (
        "Europe/Berlin",
        "0,30 2 * * *",
        "2026-03-29T00:00:00Z",
        "2026-03-29T12:00:00Z",
        &["2026-03-29T01:00:00Z"],
    ),
    // A run right after the gap, and one in it, are one.
    (
        "Europe/Berlin",
        "0 2,3 * * *",
        "2026-03-29T00:00:00Z",
        "2026-03-29T12:00:00Z",
        &["2026-03-29T01:00:00Z"],
    ),
    // 02:30 exists twice: due at the first.
    (
        "Europe/Berlin",
        "30 2 * * *",
        "2026-10-24T12:00:00Z",
        "2026-10-26T12:00:00Z",
        &["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"],
    ),
    // Between the two 02:30 of that day, the next run is on the next day.
    (
        "Europe/Berlin",
        "30 2 * * *",
        "2026-10-25T01:10:00Z",
        "2026-10-26T12:00:00Z",
        &["2026-10-26T01:30:00Z"],
    ),
    (
        "Europe/Berlin",
        "0 3 * * *",
        "2026-10-24T12:00:00Z",
        "2026-10-25T12:00:00Z",
        &["2026-10-25T02:00:00Z"],
    ),
    (
        "America/New_York",
        "30 2 * * *",
        "2026-03-08T00:00:00Z",
        "2026-03-09T12:00:00Z",
        &["2026-03-08T07:00:00Z", "2026-03-09T06:30:00Z"],
    ),
    (
        "America/New_York",
        "30 1 * * *",
        "2026-11-01T00:00:00Z",
        "2026-11-02T12:00:00Z",
        &["2026-11-01T05:30:00Z", "2026-11-02T06:30:00Z"],
    ),
    (
        "Australia/Lord_Howe",
        "15 2 * * *",
        "2026-10-03T12:00:00Z",
        "2026-10-04T16:00:00Z",
        &["2026-10-03T15:30:00Z", "2026-10-04T15:15:00Z"],
    ),
    (
        "Australia/Lord_Howe",
        "45 1 * * *",
        "2026-04-04T12:00:00Z",
        "2026-04-05T16:00:00Z",
        &["2026-04-04T14:45:00Z", "2026-04-05T15:15:00Z"],
    ),
    // Every hour follows the elapsed time, in both directions.
    (
        "Europe/Berlin",
        "30 * * * *",
        "2026-03-28T23:45:00Z",
        "2026-03-29T03:00:00Z",
        &[
            "2026-03-29T00:30:00Z",
            "2026-03-29T01:30:00Z",
            "2026-03-29T02:30:00Z",
        ],
    ),
    (
        "Europe/Berlin",
        "30 * * * *",
        "2026-10-24T23:45:00Z",
        "2026-10-25T03:00:00Z",
        &[
            "2026-10-25T00:30:00Z",
            "2026-10-25T01:30:00Z",
            "2026-10-25T02:30:00Z",
        ],
    ),
    (
        "Australia/Lord_Howe",
        "0 * * * *",
        "2026-10-03T14:00:00Z",
        "2026-10-03T17:00:00Z",
        &[
            "2026-10-03T14:30:00Z",
            "2026-10-03T16:00:00Z",
            "2026-10-03T17:00:00Z",
        ],
    ),
    // Names, steps, and the last day of a month.
    (
        "UTC",
        "0 */8 * * mon-wed",
        "2026-11-28T00:00:00Z",
        "2026-11-30T12:00:00Z",
        &["2026-11-30T00:00:00Z", "2026-11-30T08:00:00Z"],
    ),
    (
        "UTC",
        "0 3 1 JAN,Feb *",
        "2026-11-28T00:00:00Z",
        "2027-03-01T12:00:00Z",
        &["2027-01-01T03:00:00Z", "2027-02-01T03:00:00Z"],
    ),
    (
        "UTC",
        "0 0 29 2 *",
        "2026-11-28T00:00:00Z",
        "2033-01-01T00:00:00Z",
        &["2028-02-29T00:00:00Z", "2032-02-29T00:00:00Z"],
    ),
    // A zone without daylight saving.
    (
        "Asia/Kolkata",
        "* 2 * * *",
        "2026-03-28T20:28:30Z",
        "2026-03-28T20:30:30Z",
        &["2026-03-28T20:30:00Z"],
    ),
];

#[test]
fn a_change_of_the_clock_neither_skips_nor_doubles_a_run() {
    for (zone, fields, from, to, expected) in CASES {
        let found = runs(&schedule(fields, zone), from, to);
        assert_eq!(found, *expected, "{fields} {zone} from {from}");
    }
}

/// A year of a daily schedule, at each half hour of the day: one run a day, 23 to 25 hours apart.
#[test]
fn a_daily_run_is_due_once_on_each_day_of_the_year() {
    for zone in ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"] {
        for half_hour in 0..48 {
            let fields = format!("{} {} * * *", half_hour % 2 * 30, half_hour / 2);
            let schedule = schedule(&fields, zone);
            let local = TimeZone::get(zone).expect(zone);
            let mut now = time("2026-01-01T00:00:00Z");
            let mut day = None;
            for _ in 0..365 {
                now = schedule.next_after(now).expect("a next run");
                let today = local.to_datetime(now).date();
                let expected = day.map(|day: jiff::civil::Date| day.tomorrow().expect("a day"));
                assert_eq!(expected.unwrap_or(today), today, "{schedule}");
                day = Some(today);
            }
        }
    }
}

#[test]
fn a_run_is_missed_if_it_was_due_since_the_last_one() {
    let daily = schedule("0 2 * * *", "Europe/Berlin");
    for (last, now, missed) in [
        ("2026-11-29T01:00:00.4Z", "2026-11-30T00:59:59Z", false),
        ("2026-11-29T01:00:00.4Z", "2026-11-30T01:00:00Z", true),
        ("2026-11-29T00:59:59Z", "2026-11-29T01:00:00Z", true),
        // A backup that a person took during the day does not count for the night.
        ("2026-11-29T12:00:00Z", "2026-11-30T08:00:00Z", true),
        // The clock was set back after the run.
        ("2026-11-29T01:00:00Z", "2026-11-29T00:30:00Z", false),
    ] {
        assert_eq!(
            daily.is_missed(time(last), time(now)),
            missed,
            "{last} {now}"
        );
    }
}

#[test]
fn a_wrong_schedule_is_refused_with_the_reason_and_an_example() {
    for (fields, zone, part) in [
        ("0 2 * *", "UTC", "it has 4 fields"),
        ("@daily", "UTC", "it has 1 fields"),
        ("0 2 * * * Europe/Berlin", "UTC", "it has 6 fields"),
        ("61 2 * * *", "UTC", "0..=59; found 61"),
        (
            "0 2 * * noday",
            "UTC",
            "\"0 2 * * noday\" is not a schedule",
        ),
        ("H 2 * * *", "UTC", "is not a schedule"),
        ("*/0 2 * * *", "UTC", "is not a schedule"),
        ("0 0 30 2 *", "UTC", "no date matches it"),
        ("", "UTC", "it has 0 fields"),
        (
            "0 2 * * *",
            "Europe/Berln",
            "\"Europe/Berln\" is not a time zone",
        ),
        ("0 2 * * *", "", "\"\" is not a time zone"),
    ] {
        let error = Schedule::parse(fields, zone).expect_err(fields).to_string();
        assert!(error.contains(part), "{fields} {zone}: {error}");
        let example = if part.contains("zone") {
            "Europe/Berlin"
        } else {
            "\"0 2 * * *\""
        };
        assert!(error.contains(example) && !error.contains('\n'), "{error}");
    }
}
