//! Plans compared with a brute-force implementation of PostgreSQL's rule, on archives in memory.

use std::collections::BTreeMap;

use proptest::prelude::*;
use repository::{ClusterIdentity, Damage, DamagedBackups, WalRange, WalRangeKind};
use wal_format::{
    BackupKind, Branch, CheckpointKind, PgVersion, SealedHeader, SegmentSize, SegmentSummary,
    SystemIdentifier, TimelineHistory, TransactionEndKind, WalEvent,
};

use super::*;

/// The length of a range in bytes. The planner does not require whole segments.
const RANGE: u64 = 4096;

struct Memory {
    identity: ClusterIdentity,
    backups: Vec<BackupInfo>,
    ranges: BTreeMap<u64, (WalRange, SegmentSummary)>,
    prepared: Vec<u32>,
    damaged: DamagedBackups,
}

impl Inventory for Memory {
    fn identity(&self) -> &ClusterIdentity {
        &self.identity
    }

    fn backups(&self) -> Result<Vec<BackupInfo>> {
        Ok(self.backups.clone())
    }

    fn damaged_backups(&self) -> &DamagedBackups {
        &self.damaged
    }

    fn branches(&self) -> Result<Vec<(Branch, Option<TimelineHistory>, Vec<u8>)>> {
        Ok(vec![(Branch::FIRST, None, Vec::new())])
    }

    fn ranges(&self, _: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>> {
        let ranges = self.ranges.values().map(|(range, _)| range.clone());
        Ok(ranges
            .filter(|range| range.end_lsn > from && range.start_lsn < to)
            .collect())
    }

    fn summary(&self, range: &WalRange) -> Result<SegmentSummary> {
        Ok(self.ranges[&range.start_lsn.0].1.clone())
    }

    fn restore_points(&self) -> Result<Vec<(Branch, Lsn, PgTimestamp, String)>> {
        Ok(vec![(
            Branch::FIRST,
            Lsn(RANGE * 3 + 8),
            PgTimestamp(0),
            "here".to_owned(),
        )])
    }

    fn prepared_in(&self, _: &BackupInfo) -> Result<Vec<u32>> {
        Ok(self.prepared.clone())
    }

    fn record_at_or_after(&self, ranges: &[(WalRange, Lsn)], lsn: Lsn) -> Result<Option<Lsn>> {
        Ok(self.records(ranges).into_iter().find(|start| *start >= lsn))
    }

    fn record_before(&self, ranges: &[(WalRange, Lsn)], lsn: Lsn) -> Result<Option<Lsn>> {
        Ok(self.records(ranges).into_iter().rfind(|start| *start < lsn))
    }
}

impl Memory {
    /// Returns the starts of the records that the summaries name.
    fn records(&self, ranges: &[(WalRange, Lsn)]) -> Vec<Lsn> {
        let mut starts = Vec::new();
        for (range, _) in ranges {
            let summary = &self.ranges[&range.start_lsn.0].1;
            starts.extend(summary.transactions.iter().map(|end| end.lsn));
            starts.extend(summary.events.iter().map(|(lsn, _)| *lsn));
        }
        starts.sort_unstable();
        starts
    }
}

fn backup(number: u64, start: u64, stop: u64) -> BackupInfo {
    BackupInfo {
        format_version: 1,
        id: format!("20261121T1015{number:02}Z-0000")
            .parse()
            .expect("an id"),
        label: String::new(),
        kind: BackupKind::Full,
        system_identifier: SystemIdentifier(1),
        postgresql_major: PgVersion::V17,
        server_version: "17.0".to_owned(),
        branch: Branch::FIRST,
        start_lsn: Lsn(start),
        checkpoint_lsn: Lsn(start),
        stop_lsn: Lsn(stop),
        started: PgTimestamp(i64::try_from(number).expect("small")),
        finished: PgTimestamp(i64::try_from(number).expect("small")),
        from_standby: false,
        tablespaces: Vec::new(),
        slices: Vec::new(),
        manifest_sha256: String::new(),
        manifest_bytes: 0,
        backup_label_sha256: None,
        tablespace_map_sha256: None,
        warnings: Vec::new(),
        raw_bytes: 0,
        stored_bytes: 0,
    }
}

/// Creates an archive with the transaction ends `(lsn / 8, time, commit)` and ranges up to `end`,
/// proved up to `proven`.
fn memory(ends: &[(u64, i64, bool)], backups: Vec<BackupInfo>, end: u64, proven: i64) -> Memory {
    let identity = ClusterIdentity {
        format_version: 1,
        cluster: "main".parse().expect("a name"),
        system_identifier: SystemIdentifier(1),
        postgresql_major: PgVersion::V17,
        wal_segment_size: SegmentSize::DEFAULT,
        created: PgTimestamp(0),
    };
    let mut ranges = BTreeMap::new();
    for start in (0..end).step_by(usize::try_from(RANGE).expect("small")) {
        let inside = ends
            .iter()
            .enumerate()
            .filter(|(_, (at, _, _))| (start..start + RANGE).contains(&(at * 8)));
        let transactions: Vec<TransactionEnd> = inside
            .map(|(index, (at, time, commit))| TransactionEnd {
                lsn: Lsn(at * 8),
                xid: u32::try_from(index).expect("small") + 1000,
                time: PgTimestamp(*time),
                kind: if *commit {
                    TransactionEndKind::Commit
                } else {
                    TransactionEndKind::Abort
                },
            })
            .collect();
        let summary = SegmentSummary {
            record_count: transactions.len() as u64,
            first_record_lsn: transactions.first().map(|end| end.lsn),
            last_record_lsn: transactions.last().map(|end| end.lsn),
            last_record_end_lsn: transactions.last().map(|end| end.lsn.add(8)),
            transactions,
            ..SegmentSummary::default()
        };
        let header = SealedHeader {
            system_identifier: SystemIdentifier(1),
            version: PgVersion::V17,
            branch: Branch::FIRST,
            segment_size: SegmentSize::DEFAULT,
            start_lsn: Lsn(start),
            end_lsn: Lsn(start + RANGE),
        };
        let proven = (start + RANGE >= end).then_some(PgTimestamp(proven));
        let range = WalRange::of_summary(&header, WalRangeKind::Tail, 1, &summary, proven);
        ranges.insert(start, (range, summary));
    }
    Memory {
        identity,
        backups,
        ranges,
        prepared: Vec::new(),
        damaged: DamagedBackups::new(),
    }
}

fn time(time: i64) -> RecoveryTarget {
    RecoveryTarget::Time {
        time: PgTimestamp(time),
        inclusive: true,
        relative: false,
    }
}

fn point(name: &str) -> RecoveryTarget {
    RecoveryTarget::Name {
        name: name.to_owned(),
        at_lsn: None,
    }
}

fn refusal(archive: &Memory, target: &RecoveryTarget) -> PlanError {
    match plan_restore(archive, target, &Wishes::default()) {
        Err(Error::Plan(error)) => error,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

proptest! {
    /// Recovery stops before the first transaction end later than T, in WAL order from the backup's
    /// redo LSN on.
    #[test]
    fn the_stop_is_postgresqls(
        steps in prop::collection::vec((1u64..200, -30i64..90, any::<bool>()), 1..120),
        start in 0u64..4000,
        target in -50i64..5000,
        inclusive: bool,
    ) {
        let (mut at, mut clock) = (0, 0);
        let ends: Vec<(u64, i64, bool)> = steps
            .into_iter()
            .map(|(step, tick, commit)| {
                at += step;
                clock += tick;
                (at, clock, commit)
            })
            .collect();
        let end = (at * 8 + RANGE) / RANGE * RANGE;
        let redo = (start * 8).min(at * 8);
        let archive = memory(&ends, vec![backup(1, redo, redo)], end, clock);
        let wanted = RecoveryTarget::Time { time: PgTimestamp(target), inclusive, relative: false };
        let later = |time: i64| time > target || (!inclusive && time == target);
        let behind: Vec<_> = ends.iter().filter(|(at, _, _)| at * 8 >= redo).collect();
        let oracle = behind.iter().position(|(_, time, _)| later(*time));
        let plan = plan_restore(&archive, &wanted, &Wishes::default());
        // A backup after the target would keep later transactions. The last range with transaction
        // ends before the redo LSN shows this.
        let before = |(at, _, _): &&(u64, i64, bool)| at * 8 < redo;
        let last = ends.iter().rev().find(before).map(|(at, _, _)| at * 8 / RANGE);
        let inside = ends.iter().filter(|end| before(end) && Some(end.0 * 8 / RANGE) == last);
        let too_new = inside.map(|(_, time, _)| *time).max().is_some_and(later);
        match oracle {
            _ if too_new => {
                let refused = matches!(plan, Err(Error::Plan(PlanError::TooEarly { .. } | PlanError::BeyondArchive { .. })));
                prop_assert!(refused, "the backup holds what is later");
            }
            Some(index) => {
                let plan = plan.expect("it is reachable");
                let lsn = Lsn(behind[index].0 * 8);
                prop_assert_eq!(plan.stop, Stop::Before { lsn });
                let kept = behind[..index].iter().rev().find(|(_, _, commit)| *commit);
                prop_assert_eq!(plan.last_kept.map(|end| end.lsn.0), kept.map(|(at, _, _)| at * 8));
                let late = behind[index..].iter().filter(|(_, time, commit)| *commit && !later(*time)).count();
                prop_assert_eq!(plan.late_commit_count, late as u64);
            }
            None if behind.iter().map(|(_, time, _)| *time).max().max(Some(clock)) >= Some(target) => {
                let plan = plan.expect("it is proved that nothing came after");
                prop_assert_eq!(plan.stop, Stop::After { lsn: Lsn(at * 8) });
            }
            None => {
                let refused = matches!(plan, Err(Error::Plan(PlanError::BeyondArchive { .. })));
                prop_assert!(refused, "the archive is proved only up to {clock}");
            }
        }
    }
}

const ENDS: [(u64, i64, bool); 5] = [
    (600, 10, true),
    (700, 20, true),
    (1600, 30, false),
    (1700, 25, true),
    (2600, 40, true),
];

#[test]
fn the_newest_backup_that_ends_before_the_stop_is_chosen() {
    let backups = vec![backup(1, 4000, 5000), backup(2, 8000, 13000)];
    let archive = memory(&ENDS, backups, RANGE * 6, 50);
    let chosen = |target: &RecoveryTarget| {
        plan_restore(&archive, target, &Wishes::default()).map(|plan| plan.backup.to_string())
    };
    assert_eq!(
        chosen(&RecoveryTarget::Latest).expect("it is reachable"),
        "20261121T101502Z-0000"
    );
    // The stop lies inside the second backup, which is not consistent there.
    assert_eq!(
        chosen(&time(25)).expect("it is reachable"),
        "20261121T101501Z-0000"
    );
    let early = refusal(
        &archive,
        &RecoveryTarget::Lsn {
            lsn: Lsn(4100),
            inclusive: false,
        },
    );
    assert!(
        matches!(
            early,
            PlanError::BeyondArchive { .. } | PlanError::TooEarly { .. }
        ),
        "{early}"
    );
}

/// The segment of the redo LSN may begin with records before it, which a server under load writes
/// between the segment switch of a backup and its checkpoint. `wal-fetch` refused such a segment.
#[test]
fn a_tablespace_that_was_created_before_the_redo_position_needs_no_name_in_the_plan() {
    let archive = memory(&ENDS, vec![backup(1, 4000, 4400)], RANGE * 6, 50);
    let plan = plan_restore(&archive, &time(26), &Wishes::default()).expect("it is reachable");
    let created_at = |lsn| SegmentSummary {
        events: vec![(
            Lsn(lsn),
            WalEvent::TablespaceCreate {
                oid: 16_400,
                location: "/elsewhere".to_owned(),
            },
        )],
        ..SegmentSummary::default()
    };
    let admit = |lsn| crate::tablespaces::admit(&plan, Branch::FIRST, &created_at(lsn), None);
    assert_eq!(admit(3992).expect("it is not replayed"), None);
    let error = admit(4008).expect_err("it is replayed").to_string();
    assert!(
        error.contains("the plan of this restore does not name it"),
        "{error}"
    );
}

#[test]
fn aborts_stop_recovery_and_late_commits_are_listed() {
    let archive = memory(&ENDS, vec![backup(1, 4000, 4400)], RANGE * 6, 50);
    let plan = plan_restore(&archive, &time(26), &Wishes::default()).expect("it is reachable");
    assert_eq!(plan.stop, Stop::Before { lsn: Lsn(1600 * 8) });
    assert_eq!(
        plan.first_dropped.map(|end| end.kind),
        Some(TransactionEndKind::Abort)
    );
    assert_eq!(plan.last_kept.map(|end| end.lsn), Some(Lsn(700 * 8)));
    assert_eq!(
        (plan.late_commit_count, plan.late_commits[0].lsn),
        (1, Lsn(1700 * 8))
    );
}

#[test]
fn a_time_in_missing_wal_before_a_backup_is_not_reached() {
    const SECOND: i64 = 1_000_000;
    // A commit at 10 s, a commit at 20 s whose WAL is missing, a backup at 30 s, and a commit at 40
    // s.
    let ends = [
        (10, 10 * SECOND, true),
        (600, 20 * SECOND, true),
        (1800, 40 * SECOND, true),
    ];
    let newer = backup(3, 3 * RANGE, 3 * RANGE + 80);
    let mut archive = memory(&ends, vec![newer], 4 * RANGE, 50 * SECOND);
    let (range, summary) = archive.ranges.get_mut(&(3 * RANGE)).expect("a range");
    let checkpoint = WalEvent::Checkpoint {
        kind: CheckpointKind::Online,
        redo_lsn: Lsn(3 * RANGE),
        timeline: wal_format::TimelineId::FIRST,
        time: PgTimestamp(30 * SECOND),
        next_xid: 1000,
    };
    summary.events.push((Lsn(3 * RANGE), checkpoint));
    range.first_record_lsn = Some(Lsn(3 * RANGE));
    archive.ranges.remove(&RANGE);
    let found = plan_restore(&archive, &time(35 * SECOND), &Wishes::default());
    assert!(found.is_ok(), "{found:?}");
    // The state at 15 s does not contain the commit at 20 s, but the backup does.
    let error = refusal(&archive, &time(15 * SECOND));
    assert!(matches!(error, PlanError::TooEarly { .. }), "{error}");
}

#[test]
fn a_clock_that_went_back_makes_the_target_ambiguous() {
    const SECOND: i64 = 1_000_000;
    let ends = [
        (600, 100 * SECOND, true),
        (700, 110 * SECOND, true),
        (1200, 50 * SECOND, true),
        (1600, 105 * SECOND, true),
    ];
    let backups = vec![backup(1, 4000, 4400), backup(2, 8000, 8400)];
    let archive = memory(&ends, backups, RANGE * 4, 200 * SECOND);
    let error = refusal(&archive, &time(101 * SECOND));
    assert!(matches!(error, PlanError::Ambiguous { .. }), "{error}");
    let id = archive.backups[1].id.clone();
    let wishes = Wishes {
        backup: Some(id),
        timeline: None,
    };
    let plan = plan_restore(&archive, &time(101 * SECOND), &wishes).expect("it was chosen");
    assert_eq!(plan.stop, Stop::Before { lsn: Lsn(1600 * 8) });
}

/// Makes the server announce `wal_level = minimal` at `minimal`, after a shutdown at `shutdown`.
fn restarted_minimal(archive: &mut Memory, shutdown: (Lsn, i64), minimal: Lsn) {
    let checkpoint = WalEvent::Checkpoint {
        kind: CheckpointKind::Shutdown,
        redo_lsn: shutdown.0,
        timeline: wal_format::TimelineId::new(1).expect("a timeline"),
        time: PgTimestamp(shutdown.1),
        next_xid: 1,
    };
    let level = WalEvent::WalLevel { level: 0 };
    for (lsn, event) in [(shutdown.0, checkpoint), (minimal, level)] {
        let found = archive.ranges.range_mut(..=lsn.0).next_back();
        let (range, summary) = found.expect("a range").1;
        summary.events.push((lsn, event));
        range.minimal_count = None;
    }
}

#[test]
fn wal_of_a_minimal_level_is_never_replayed() {
    let backups = vec![backup(1, 4000, 4400), backup(48, 2400 * 8, 2450 * 8)];
    let mut archive = memory(&ENDS, backups, RANGE * 6, 50);
    // After the transaction of the time 20 at 1100 and before that of 40 at 1700.
    let (shutdown, minimal) = (Lsn(1300 * 8), Lsn(1320 * 8));
    restarted_minimal(&mut archive, (shutdown, 25), minimal);
    let times = ENDS.map(|(at, time, _)| (at, time));
    let before = times.into_iter().rfind(|(at, _)| at * 8 < minimal.0);
    let (_, last_commit) = before.expect("a commit before");
    let nearest = [
        format!(
            "--target-lsn {minimal} --target-exclusive (last commit {})",
            PgTimestamp(last_commit)
        ),
        format!(
            "--backup {} --target-immediate ({})",
            archive.backups[1].id,
            PgTimestamp(48)
        ),
    ];
    let refused = PlanError::MinimalWal {
        branch: Branch::FIRST,
        lsn: minimal,
        since: Some(PgTimestamp(last_commit.max(25))),
        nearest: nearest.to_vec(),
    };
    let after = times
        .into_iter()
        .position(|(at, _)| at * 8 > minimal.0)
        .expect("one after");
    let xid = 1000 + u32::try_from(after).expect("small");
    let inside = RecoveryTarget::Xid {
        xid: xid.into(),
        inclusive: true,
    };
    assert_eq!(refusal(&archive, &inside), refused);
    assert_eq!(
        refusal(
            &archive,
            &RecoveryTarget::Lsn {
                lsn: minimal,
                inclusive: true
            }
        ),
        refused
    );
    let nowhere = RecoveryTarget::Xid {
        xid: 7,
        inclusive: true,
    };
    let unknown = refusal(&archive, &nowhere);
    assert!(matches!(unknown, PlanError::Unknown { .. }), "{unknown}");
    // The first transaction after the record is later than these times.
    let (_, first_after) = times[after];
    let mut between = last_commit.max(20)..first_after;
    assert!(!between.is_empty());
    let is_planned = |asked| {
        let plan = plan_restore(&archive, &time(asked), &Wishes::default()).expect("a plan");
        assert_eq!(plan.first_dropped.map(|end| end.xid), Some(xid));
        plan.backup == archive.backups[0].id && matches!(plan.stop, Stop::Before { .. })
    };
    assert!(between.all(is_planned));
    archive.backups.pop();
    let late = refusal(&archive, &time(first_after));
    assert!(matches!(late, PlanError::MinimalWal { .. }), "{late}");
    let words = refusal(&archive, &RecoveryTarget::Latest).to_string();
    assert!(words.contains("take a base backup"), "{words}");
    assert!(words.contains(&nearest[0]), "{words}");
}

#[test]
fn missing_wal_is_named() {
    let mut archive = memory(&ENDS, vec![backup(1, 4000, 4400)], RANGE * 6, 50);
    archive.ranges.remove(&(RANGE * 4));
    let error = refusal(&archive, &time(45));
    assert_eq!(
        error,
        PlanError::Gap {
            branch: Branch::FIRST,
            from: Lsn(RANGE * 4),
            last: Some(Lsn(1700 * 8)),
        }
    );
    let latest = refusal(&archive, &RecoveryTarget::Latest);
    assert!(matches!(latest, PlanError::Gap { .. }), "{latest}");
    let is_reached = |asked| plan_restore(&archive, &time(asked), &Wishes::default()).is_ok();
    assert!(is_reached(15), "it lies before the gap");
    // The time of the last transaction before the gap is reached, and nothing after it.
    assert!(is_reached(30) && !is_reached(31));
}

/// The last transaction proves the archive up to its own time, even if the server reported no later
/// one.
#[test]
fn the_time_of_the_last_transaction_is_reached() {
    let archive = memory(&ENDS, vec![backup(1, 4000, 4400)], RANGE * 6, 0);
    let plan = |asked| plan_restore(&archive, &time(asked), &Wishes::default());
    let stop = plan(40).expect("it is reachable").stop;
    assert_eq!(stop, Stop::After { lsn: Lsn(2600 * 8) });
    let beyond = refusal(&archive, &time(41));
    assert!(
        matches!(beyond, PlanError::BeyondArchive { .. }),
        "{beyond}"
    );
}

/// The newest backup has no consistent state, so the refusal is that of the older one.
#[test]
fn a_backup_whose_own_wal_is_missing_does_not_hide_the_nearest_target() {
    let backups = vec![
        backup(1, 4000, 4400),
        backup(2, RANGE * 4 - 8, RANGE * 4 + 80),
    ];
    let mut archive = memory(&ENDS, backups, RANGE * 6, 50);
    archive.ranges.remove(&(RANGE * 4));
    for target in [RecoveryTarget::Latest, time(45)] {
        let error = refusal(&archive, &target);
        let words = error.to_string();
        let nearest = format!(
            "the nearest reachable target is --target-lsn {}",
            Lsn(1700 * 8)
        );
        assert!(words.contains(&nearest), "{words}");
    }
}

#[test]
fn other_targets_stop_at_their_record() {
    let archive = memory(&ENDS, vec![backup(1, 4000, 4400)], RANGE * 6, 50);
    let stop = |target| plan_restore(&archive, &target, &Wishes::default()).map(|plan| plan.stop);
    let at = |lsn: u64| Lsn(lsn * 8);
    let xid = |xid, inclusive| RecoveryTarget::Xid { xid, inclusive };
    assert_eq!(
        stop(xid(1001, true)).expect("it ended"),
        Stop::After { lsn: at(700) }
    );
    assert_eq!(
        stop(xid(1001, false)).expect("it ended"),
        Stop::Before { lsn: at(700) }
    );
    let lsn = |lsn, inclusive| RecoveryTarget::Lsn { lsn, inclusive };
    assert_eq!(
        stop(lsn(at(650), true)).expect("held"),
        Stop::After { lsn: at(700) }
    );
    assert_eq!(
        stop(lsn(at(700), false)).expect("held"),
        Stop::Before { lsn: at(700) }
    );
    assert_eq!(
        stop(RecoveryTarget::Immediate).expect("held"),
        Stop::Consistent
    );
    assert_eq!(
        stop(RecoveryTarget::Latest).expect("held"),
        Stop::After { lsn: at(2600) }
    );
    let name = point("here");
    assert_eq!(
        stop(name).expect("held"),
        Stop::After {
            lsn: Lsn(RANGE * 3 + 8)
        }
    );
    for target in [xid(1, true), point("there")] {
        assert!(matches!(
            refusal(&archive, &target),
            PlanError::Unknown { .. }
        ));
    }
    let none = memory(&ENDS, Vec::new(), RANGE, 0);
    assert_eq!(refusal(&none, &RecoveryTarget::Latest), PlanError::NoBackup);
}

#[test]
fn prepared_transactions_without_an_end_before_the_stop_are_in_doubt() {
    let mut archive = memory(&ENDS, vec![backup(1, 8000, 8400)], RANGE * 6, 50);
    let prepare = |lsn: u64, xid: u32| {
        let event = WalEvent::Prepare {
            xid,
            time: PgTimestamp(0),
            gid: format!("gid {xid}"),
        };
        (Lsn(lsn), event)
    };
    let end = |lsn: u64, xid: u32, kind: TransactionEndKind| TransactionEnd {
        lsn: Lsn(lsn),
        xid,
        time: PgTimestamp(1),
        kind,
    };
    let mut put = |range: u64, prepares: &[(u64, u32)], ends: &[TransactionEnd]| {
        let (range, summary) = archive.ranges.get_mut(&(range * RANGE)).expect("a range");
        let events = prepares.iter().map(|(lsn, xid)| prepare(*lsn, *xid));
        summary.events.extend(events);
        summary.transactions.extend(ends);
        summary.transactions.sort_by_key(|end| end.lsn);
        range.prepare_count = Some(prepares.len() as u64);
        range.first_record_lsn = Some(range.start_lsn);
    };
    let (commit, abort) = (
        TransactionEndKind::CommitPrepared,
        TransactionEndKind::AbortPrepared,
    );
    // 1 and 2 were prepared before the backup, and 2 ends after it. 3 ends before the stop, 4 ends
    // after it, and 5 is prepared after it.
    put(1, &[(4200, 1), (4300, 2)], &[]);
    put(2, &[(8500, 3), (8600, 4)], &[end(8700, 2, abort)]);
    put(3, &[], &[end(12400, 3, commit)]);
    put(4, &[(20000, 5)], &[end(20100, 4, commit)]);
    archive.prepared = vec![1, 2, 9];
    let plan = |lsn: u64| {
        let lsn = RecoveryTarget::Xid {
            xid: lsn,
            inclusive: true,
        };
        let plan = plan_restore(&archive, &lsn, &Wishes::default()).expect("it is reachable");
        let in_doubt = plan.in_doubt.into_iter();
        in_doubt
            .map(|one| (one.xid, one.gid.unwrap_or_default()))
            .collect::<Vec<_>>()
    };
    let named = |xid: u32| (xid, format!("gid {xid}"));
    let unnamed = (9, String::new());
    assert_eq!(plan(3), [named(1), named(4), unnamed.clone()]);
    assert_eq!(plan(1004), [named(1), named(5), unnamed]);
}

#[test]
fn a_backup_that_is_newer_than_the_target_is_not_chosen() {
    // No transaction ends while the second backup is taken, nor between it and the transactions
    // around the target.
    let ends = [(600, 10, true), (700, 20, true), (1700, 40, true)];
    let (older, newer) = (backup(1, 4000, 4400), backup(2, 8000, 8400));
    let archive = memory(&ends, vec![older, newer.clone()], RANGE * 4, 50);
    let plan = plan_restore(&archive, &time(15), &Wishes::default()).expect("it is reachable");
    assert_eq!(plan.stop, Stop::Before { lsn: Lsn(700 * 8) });
    let plan = plan_restore(&archive, &time(30), &Wishes::default()).expect("it is reachable");
    assert_eq!(plan.backup, newer.id);
    assert_eq!(plan.stop, Stop::Before { lsn: Lsn(1700 * 8) });
    let alone = memory(&ends, vec![newer.clone()], RANGE * 4, 50);
    let error = refusal(&alone, &time(15));
    assert!(matches!(error, PlanError::TooEarly { .. }), "{error}");

    // Without any WAL before the backup, the time of its checkpoint decides, which is truncated to
    // seconds.
    let mut alone = memory(
        &[(1700, 4_000_000, true)],
        vec![newer],
        RANGE * 4,
        5_000_000,
    );
    let checkpoint = WalEvent::Checkpoint {
        kind: CheckpointKind::Online,
        redo_lsn: Lsn(8000),
        timeline: Branch::FIRST.timeline,
        time: PgTimestamp(2_000_000),
        next_xid: 700,
    };
    let (range, summary) = alone.ranges.get_mut(&RANGE).expect("a range");
    summary.events.push((Lsn(8000), checkpoint));
    (range.first_record_lsn, range.last_record_lsn) = (Some(Lsn(8000)), Some(Lsn(8000)));
    assert!(matches!(
        refusal(&alone, &time(2_999_999)),
        PlanError::TooEarly { .. }
    ));
    let plan = plan_restore(&alone, &time(3_000_000), &Wishes::default());
    assert!(plan.is_ok(), "{plan:?}");
}

#[test]
fn only_the_newest_backup_is_called_so_and_a_damaged_one_gives_way() {
    let backups = vec![
        backup(1, 4000, 4400),
        backup(2, 8000, 8400),
        backup(3, 15000, 15400),
    ];
    let mut archive = memory(&ENDS, backups, RANGE * 6, 50);
    let id = |archive: &Memory, at: usize| archive.backups[at].id.clone();
    let plan = |archive: &Memory, target: &RecoveryTarget, wishes: &Wishes| {
        plan_restore(archive, target, wishes)
    };
    let none = Wishes::default();
    let latest = plan(&archive, &RecoveryTarget::Latest, &none).expect("a plan");
    assert_eq!(
        (latest.backup, latest.reason.as_str(), latest.not_chosen),
        (id(&archive, 2), "the newest backup", Vec::new())
    );
    let lsn = RecoveryTarget::Lsn {
        lsn: Lsn(1600 * 8),
        inclusive: true,
    };
    let early = plan(&archive, &lsn, &none).expect("a plan");
    assert_eq!(early.backup, id(&archive, 1));
    assert_eq!(early.reason, "the newest backup that ends before the stop");
    let named = Wishes {
        backup: Some(id(&archive, 1)),
        timeline: None,
    };
    let wished = plan(&archive, &RecoveryTarget::Latest, &named).expect("a plan");
    assert_eq!(wished.reason, "the one that --backup names");

    let damage = |at: u64| Damage {
        object: format!("backup/{at}/base.000001.tar.zst"),
        problem: "it is damaged".to_owned(),
    };
    archive.damaged.insert(id(&archive, 2), damage(3));
    let older = plan(&archive, &RecoveryTarget::Latest, &none).expect("a plan");
    assert_eq!(older.backup, id(&archive, 1));
    assert!(older.reason.contains("usable"), "{}", older.reason);
    let expected = NotChosen {
        backup: id(&archive, 2),
        reason: damage(3).to_string(),
    };
    assert_eq!(older.not_chosen, [expected]);
    let early = plan(&archive, &lsn, &none).expect("a plan");
    assert_eq!(early.not_chosen, [], "it would not have been chosen");

    archive.damaged.insert(id(&archive, 1), damage(2));
    let wished = plan(&archive, &RecoveryTarget::Latest, &named);
    let said = wished.expect_err("it is damaged").to_string();
    assert!(
        said.contains("backup/2/") && said.contains("--force"),
        "{said}"
    );
    archive.damaged.insert(id(&archive, 0), damage(1));
    let refused = plan(&archive, &RecoveryTarget::Latest, &none);
    match refused {
        Err(Error::Damaged { object, problem }) => {
            assert_eq!(object, damage(3).object);
            assert!(problem.contains("no other backup"), "{problem}");
        }
        other => panic!("damage was expected: {other:?}"),
    }

    // A description that cannot be read is not among the backups.
    let mut archive = memory(&ENDS, vec![backup(1, 4000, 4400)], RANGE * 6, 50);
    let unreadable = backup(2, 8000, 8400).id;
    archive.damaged.insert(unreadable.clone(), damage(2));
    let older = plan(&archive, &RecoveryTarget::Latest, &none).expect("a plan");
    assert_eq!(older.not_chosen[0].backup, unreadable);
    assert!(older.reason.contains("usable"), "{}", older.reason);
}
