use super::*;

fn time(text: &str) -> Timestamp {
    text.parse().expect(text)
}

#[test]
fn a_missed_run_is_due_at_once_and_only_if_it_is_to_be_made_up_for() {
    let at = |text| LastRun::At(time(text));
    let yesterday = at("2026-11-29T02:00:03Z");
    for (last, counted_from, now, due, is_due) in [
        // The run of today is not due yet.
        (
            yesterday,
            None,
            "2026-11-30T01:59:59Z",
            "2026-11-30T02:00:00Z",
            false,
        ),
        (
            yesterday,
            None,
            "2026-11-30T02:00:00Z",
            "2026-11-30T02:00:00Z",
            true,
        ),
        // The daemon was down at 02:00: once, however many were missed.
        (
            at("2026-11-25T02:00:03Z"),
            None,
            "2026-11-30T07:00:00Z",
            "2026-11-26T02:00:00Z",
            true,
        ),
        (
            at("2026-11-30T07:00:04Z"),
            None,
            "2026-11-30T07:01:00Z",
            "2026-12-01T02:00:00Z",
            false,
        ),
        // backup_catch_up = false: only runs since the start count.
        (
            yesterday,
            Some("2026-11-30T06:00:00Z"),
            "2026-11-30T07:00:00Z",
            "2026-12-01T02:00:00Z",
            false,
        ),
        // A run of another host after the start counts, too.
        (
            at("2026-12-01T02:00:01Z"),
            Some("2026-11-30T06:00:00Z"),
            "2026-12-01T02:00:05Z",
            "2026-12-02T02:00:00Z",
            false,
        ),
        // The clock was wrong by years and is right again.
        (
            yesterday,
            Some("2031-01-01T02:00:01Z"),
            "2026-11-30T07:00:00Z",
            "2026-11-30T02:00:00Z",
            true,
        ),
        (
            LastRun::Never,
            None,
            "2026-11-30T07:00:00Z",
            "2026-11-30T07:00:00Z",
            true,
        ),
        (
            LastRun::Never,
            Some("2026-11-30T06:00:00Z"),
            "2026-11-30T07:00:00Z",
            "2026-12-01T02:00:00Z",
            false,
        ),
    ] {
        let plan = Plan {
            schedule: Schedule::parse("0 2 * * *", "UTC").expect("valid"),
            catch_up: counted_from.is_none(),
            retry: (Duration::from_secs(1), Duration::from_secs(2)),
        };
        let found = plan.next(last, counted_from.map(time), time(now));
        let expected = Due {
            at: time(due),
            is_due,
        };
        assert_eq!(found, Some(expected), "{last:?} {counted_from:?} {now}");
    }
}

/// An operation with prepared ends, which counts its runs.
struct Prepared {
    last: LastRun,
    ends: Vec<Ran>,
    runs: usize,
}

impl Operation for Prepared {
    fn obstacle(&self) -> Option<String> {
        None
    }

    async fn last_run(&mut self) -> Result<LastRun> {
        Ok(self.last)
    }

    async fn run(&mut self, _stop: Shutdown) -> Ran {
        self.runs += 1;
        let ran = self.ends.pop().expect("a run that was expected");
        if ran == Ran::Done {
            self.last = LastRun::At(Timestamp::now());
        }
        ran
    }
}

#[tokio::test]
async fn a_failed_run_is_retried_and_ends_with_a_success() {
    let plan = Plan {
        schedule: Schedule::parse("0 2 29 2 *", "UTC").expect("valid"),
        catch_up: true,
        retry: (Duration::from_millis(1), Duration::from_millis(2)),
    };
    let mut operation = Prepared {
        last: LastRun::Never,
        ends: vec![
            Ran::Done,
            Ran::Failed("b".to_owned()),
            Ran::Failed("a".to_owned()),
        ],
        runs: 0,
    };
    let (stop, stopped) = Shutdown::new();
    let reports = std::sync::Mutex::new(Vec::new());
    let note = |report: &ScheduleReport| {
        let mut reports = reports.lock().expect("no panic");
        reports.push(report.clone());
        let is_done = report.last_error.is_none() && report.running_since.is_none();
        if is_done && reports.iter().any(|report| report.last_error.is_some()) {
            stop.request();
        }
    };
    keep(&plan, &mut operation, &note, stopped).await;
    assert_eq!(operation.runs, 3);
    let reports = reports.lock().expect("no panic");
    let errors: Vec<&str> = reports
        .iter()
        .filter_map(|report| report.last_error.as_deref())
        .collect();
    assert!(
        errors.starts_with(&["a"]) && errors.ends_with(&["b"]),
        "{errors:?}"
    );
    let last = reports.last().expect("a report");
    assert!(
        last.next_run > Some(PgTimestamp::from_jiff(Timestamp::now())),
        "{last:?}"
    );
}
