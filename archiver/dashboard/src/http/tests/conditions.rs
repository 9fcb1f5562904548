//! Tests of the alerts on protections that are missing, behind or about to run out.

use status::{
    alerts,
    light::{Cause, CauseKind},
    report::{ArchiveCommandReport, SlotReport},
    schedule::ScheduleReport,
    standby::StandbyReport,
};
use wal_format::{Outcome, OutcomeKind};

use super::*;

fn slot(active: bool) -> SlotReport {
    SlotReport {
        name: "tidemark_main".to_owned(),
        active,
        wal_status: Some("reserved".to_owned()),
        retained_bytes: Some(0),
        safe_wal_bytes: None,
        full_in_seconds: None,
    }
}

fn verified(report: &ClusterReport, seconds_ago: i64) -> Outcome {
    let finished = PgTimestamp(report.as_of.0 - seconds_ago * 1_000_000);
    let id = "20261121T101500Z-9f3c".parse().expect("an id");
    Outcome::new(
        OutcomeKind::Verify,
        id,
        finished,
        finished,
        true,
        String::new(),
    )
}

/// Checks that an alert does not fire after `change(report, false)`, and fires after
/// `change(report, true)`.
#[track_caller]
fn check(alert: &str, change: impl Fn(&mut ClusterReport, bool)) {
    for expected in [false, true] {
        let mut report = report();
        report.source.stream_connected = true;
        change(&mut report, expected);
        let found = alerts::firing(&report);
        let fires = found.iter().any(|(name, _)| *name == alert);
        assert_eq!(fires, expected, "{alert} in {found:?}");
    }
}

#[test]
fn each_missing_protection_raises_its_alert() {
    check("PitrFailoverLoss", |report, is_bad| {
        let age = if is_bad { 3600 } else { 2 * 86_400 };
        report.failover_loss = Some("12 commits were lost".to_owned());
        report.last_failover_loss = Some(PgTimestamp(report.as_of.0 - age * 1_000_000));
    });
    check("PitrOffsiteBehind", |report, is_bad| {
        report.repositories = vec![repository::store::MemberState {
            url: "s3://far/away".to_owned(),
            queued_objects: 1,
            queued_bytes: 1,
            behind: true,
            lag_seconds: if is_bad { 901.0 } else { 60.0 },
            error: None,
            older: None,
        }];
    });
    check("PitrPushFailing", |report, is_bad| {
        report.archive_command = Some(ArchiveCommandReport {
            failing: is_bad,
            failed_count: 3,
            last_failed_wal: Some("000000010000000000000007".to_owned()),
        });
    });
    check("PitrSlotMissing", |report, is_bad| {
        report.slot_missing = is_bad;
    });
    check("PitrSlotInactive", |report, is_bad| {
        report.slot = Some(slot(!is_bad));
    });
    // Without an answer of the server nothing is known about the slot.
    check("PitrSlotInactive", |report, is_bad| {
        report.slot = Some(SlotReport {
            wal_status: is_bad.then(|| "reserved".to_owned()),
            ..slot(false)
        });
    });
    check("PitrStandbySlot", |report, is_bad| {
        report.standbys = vec![StandbyReport {
            server: "standby".to_owned(),
            restart_lsn: None,
            problem: is_bad.then(|| "connection refused".to_owned()),
        }];
    });
    check("PitrSpoolFilling", |report, is_bad| {
        report.spool_full_in_seconds = Some(if is_bad { 3600.0 } else { 5.0 * 3600.0 });
    });
    check("PitrDrillWithoutResult", |report, is_bad| {
        let mut drills = ScheduleReport::new("0 3 1 * *".to_owned(), "UTC".to_owned());
        drills.last_error = is_bad.then(|| "pitr-restore was not found".to_owned());
        report.drill_schedule = Some(drills);
    });
    check("PitrVerifyOverdue", |report, is_bad| {
        report.verify_max_age_seconds = Some(86_400.0);
        report.last_verify = Some(verified(report, if is_bad { 90_000 } else { 80_000 }));
    });
    check("PitrVerifyOverdue", |report, is_bad| {
        report.verify_max_age_seconds = Some(86_400.0);
        report.looked = is_bad;
    });
    check("PitrWindowShort", |report, is_bad| {
        report.window_missing_seconds = Some(if is_bad { 7200.0 } else { 60.0 });
    });
    check("PitrRtoOverTarget", |report, is_bad| {
        report.rto.target_seconds = Some(600.0);
        report.rto.estimate_seconds = Some(if is_bad { 601.0 } else { 599.0 });
    });
}

#[test]
fn an_unknown_fact_decides_nothing() {
    let decided = |alert: &str, change: fn(&mut ClusterReport)| {
        let mut report = report();
        report.source.stream_connected = true;
        change(&mut report);
        alerts::is_decided(alert, &report)
    };
    assert!(decided("PitrRpoOverTarget", |_| {}));
    assert!(!decided("PitrRpoOverTarget", |report| {
        report.durable.remote.rpo_seconds = None;
    }));
    assert!(!decided("PitrSlotLost", |report| report.slot = None));
    assert!(decided("PitrSlotLost", |report| report.slot = Some(slot(true))));
    assert!(decided("PitrBackupOverdue", |_| {}));
    assert!(!decided("PitrBackupOverdue", |report| report.looked = false));
    // A restarted daemon has not tried the drill that failed before yet.
    let drills = |next_seconds: Option<i64>, runs: bool, report: &mut ClusterReport| {
        let later = |seconds| PgTimestamp(report.as_of.0 + seconds * 1_000_000);
        let mut drills = ScheduleReport::new("0 3 1 * *".to_owned(), "UTC".to_owned());
        drills.next_run = next_seconds.map(later);
        drills.running_since = runs.then(|| later(0));
        report.drill_schedule = Some(drills);
    };
    for (next, runs, expected) in [
        (None, false, false),
        (Some(-60), false, false),
        (Some(60), true, false),
        (Some(60), false, true),
    ] {
        let mut report = report();
        drills(next, runs, &mut report);
        let found = alerts::is_decided("PitrDrillWithoutResult", &report);
        assert_eq!(found, expected, "{next:?} {runs}");
    }
    assert!(!decided("PitrBroken", |report| report.state = State::Unknown));
    assert!(!decided("PitrRepositoryFailing", |report| {
        report.source.stream_connected = false;
    }));
}

/// Sets the causes of a report, the worst first.
pub(super) fn because(report: &mut ClusterReport, causes: &[(State, CauseKind, &str)]) {
    report.causes = causes
        .iter()
        .map(|(state, kind, reason)| Cause {
            state: *state,
            reason: (*reason).to_owned(),
            kind: *kind,
        })
        .collect();
    report.settle();
}

#[test]
fn health_without_limits_follows_the_state() {
    let healthy = |change: &dyn Fn(&mut ClusterReport), query: &str| {
        let mut report = report();
        change(&mut report);
        health::judge(&report, query).expect("a query").status() == StatusCode::OK
    };
    assert!(healthy(&|_| (), ""));
    for (state, expected) in [
        (State::Degraded, true),
        (State::Broken, false),
        (State::AtRisk, false),
        (State::Unknown, false),
    ] {
        let state =
            |report: &mut ClusterReport| because(report, &[(state, CauseKind::Other, "it is so")]);
        for query in ["", "max_backup_age=1d", "max_rpo=1d"] {
            assert_eq!(healthy(&state, query), expected);
        }
    }
    // The caller's limit for the RPO replaces the operator's target and nothing else. It applies
    // also to an unseen primary, as long as the RPO is known.
    let late = |report: &mut ClusterReport| {
        because(report, &[(State::AtRisk, CauseKind::Rpo, "it lags")]);
        report.durable.remote.rpo_seconds = Some(20.0);
    };
    assert!(!healthy(&late, ""));
    assert!(healthy(&late, "max_rpo=1min"));
    assert!(!healthy(&late, "max_rpo=10s"));
    let unseen = |report: &mut ClusterReport| {
        because(report, &[(State::Unknown, CauseKind::Unseen, "unseen")]);
    };
    assert!(healthy(&unseen, "max_rpo=1min"));
    let never_reached = |report: &mut ClusterReport| {
        unseen(report);
        report.durable.remote.rpo_seconds = None;
    };
    assert!(!healthy(&never_reached, "max_rpo=1d"));
}

#[test]
fn a_limit_for_the_rpo_hides_no_other_cause() {
    let mut report = report();
    report.durable.remote.rpo_seconds = Some(20.0);
    let causes = [
        (State::Broken, CauseKind::Other, "the slot is lost"),
        (State::AtRisk, CauseKind::Rpo, "it lags"),
        (State::AtRisk, CauseKind::Other, "the drill failed"),
        (State::Degraded, CauseKind::Other, "a warning"),
    ];
    because(&mut report, &causes);
    let reasons = |query: &str| {
        let verdict = health::judge(&report, query).expect("a query");
        serde_json::to_value(verdict).expect("JSON")["reasons"].clone()
    };
    let all = serde_json::json!(["the slot is lost", "it lags", "the drill failed"]);
    assert_eq!(reasons(""), all);
    let others = serde_json::json!(["the slot is lost", "the drill failed"]);
    assert_eq!(reasons("max_rpo=1min"), others);
}
