use std::collections::BTreeMap;

use proptest::prelude::*;
use wal_format::{
    BackupKind, PgVersion, SegmentNo, SystemIdentifier, TimelineId, TransactionEndKind,
};

use super::*;
use crate::WalRangeKind;

/// WAL per segment.
const SEGMENT: u64 = 8;

/// An index in memory: per branch, ranges of one LSN each, with one commit each at its LSN; and the
/// LSN at which a server had `wal_level = minimal`.
#[derive(Debug, Default)]
struct Memory(BTreeMap<Branch, Vec<u64>>, Option<u64>);

impl WalIndex for Memory {
    type Error = std::convert::Infallible;

    fn ranges(&self, branch: Branch, from: Lsn, to: Lsn) -> Result<Vec<WalRange>, Self::Error> {
        let held = self.0.get(&branch).into_iter().flatten();
        let wanted = held.filter(|at| **at >= from.0 && **at < to.0);
        Ok(wanted.map(|at| range(branch, *at)).collect())
    }

    fn transactions(&self, range: &WalRange) -> Result<Vec<TransactionEnd>, Self::Error> {
        Ok(vec![TransactionEnd {
            lsn: range.start_lsn,
            time: time(range.start_lsn.0),
            xid: 1,
            kind: TransactionEndKind::Commit,
        }])
    }

    fn events(&self, range: &WalRange) -> Result<Vec<(Lsn, WalEvent)>, Self::Error> {
        let level = i32::from(self.1 != Some(range.start_lsn.0));
        Ok(vec![(range.start_lsn, WalEvent::WalLevel { level })])
    }
}

fn time(lsn: u64) -> PgTimestamp {
    PgTimestamp(i64::try_from(lsn).expect("small") * 1000)
}

fn range(branch: Branch, at: u64) -> WalRange {
    WalRange {
        branch,
        segment: SegmentNo(at / SEGMENT),
        start_lsn: Lsn(at),
        end_lsn: Lsn(at + 1),
        kind: WalRangeKind::Tail,
        stored_bytes: 1,
        record_count: 1,
        transaction_count: 1,
        prepare_count: Some(0),
        tablespace_count: Some(0),
        minimal_count: None,
        first_record_lsn: Some(Lsn(at)),
        last_record_lsn: Some(Lsn(at)),
        last_record_end_lsn: Some(Lsn(at + 1)),
        open_record_lsn: None,
        min_time: Some(time(at)),
        max_time: Some(time(at)),
        proven: None,
    }
}

fn backup(number: usize, branch: Branch, start: u64, stop: u64) -> BackupInfo {
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
        branch,
        start_lsn: Lsn(start),
        checkpoint_lsn: Lsn(start),
        stop_lsn: Lsn(stop),
        started: time(start),
        finished: time(stop),
        from_standby: false,
        tablespaces: Vec::new(),
        slices: Vec::new(),
        manifest_sha256: String::new(),
        backup_label_sha256: None,
        tablespace_map_sha256: None,
        warnings: Vec::new(),
        manifest_bytes: 0,
        raw_bytes: 0,
        stored_bytes: 0,
    }
}

type Known = Vec<KnownTimeline<Vec<u8>>>;

/// Timeline 1 and its child, which left it at `fork`.
fn timelines(fork: u64) -> Known {
    let second = TimelineId::new(2).expect("a timeline");
    let content = format!("1\t{}\tno recovery target specified\n", Lsn(fork)).into_bytes();
    let history = TimelineHistory::parse(second, &content).expect("it parses");
    let branch = Branch::of_history(second, &content);
    vec![
        (Branch::FIRST, None, Vec::new()),
        (branch, Some(history), content),
    ]
}

struct Case {
    known: Known,
    path: Vec<PathPart>,
    index: Memory,
}

/// Both timelines, with WAL of each at these LSNs.
fn case(fork: u64, first: impl Iterator<Item = u64>, second: impl Iterator<Item = u64>) -> Case {
    let known = timelines(fork);
    let child = known[1].0;
    let path = timeline_path(&known, child).expect("a path");
    let held = [(Branch::FIRST, first.collect()), (child, second.collect())];
    Case {
        known,
        path,
        index: Memory(held.into_iter().collect(), None),
    }
}

impl Case {
    fn restorable(&self, backups: &[BackupInfo]) -> (Vec<(u64, u64)>, Option<Refusal>) {
        let found = Restorable::along(&self.index, &self.path, backups, SEGMENT);
        let found = found.expect("it is read");
        let ends = |stretch: &Stretch| (stretch.from_lsn.0, stretch.to_lsn.0);
        (found.stretches.iter().map(ends).collect(), found.refusal)
    }
}

#[test]
fn a_backup_beyond_the_fork_leads_nowhere_on_the_new_timeline() {
    let case = case(20, 0..40, 16..60);
    let late = backup(1, Branch::FIRST, 24, 28);
    assert_eq!(
        case.restorable(std::slice::from_ref(&late)),
        (Vec::new(), Some(Refusal::NoBackupOnPath))
    );
    assert_eq!(case.restorable(&[]), (Vec::new(), Some(Refusal::NoBackup)));
    let early = backup(0, Branch::FIRST, 3, 5);
    let both = [early, late];
    assert_eq!(case.restorable(&both), (vec![(5, 60)], None));
    let default = default_timelines(&case.index, &case.known, &both).expect("it is read");
    assert_eq!(default, [case.known[1].0]);
}

#[test]
fn wal_that_is_missing_at_the_fork_ends_what_can_be_restored() {
    // The segment of the switch is whole on the new timeline; the one before it ends too early.
    let case = case(20, 0..14, 16..60);
    let early = backup(0, Branch::FIRST, 3, 5);
    let gap = Refusal::Gap {
        branch: Branch::FIRST,
        from_lsn: Lsn(14),
    };
    assert_eq!(
        case.restorable(std::slice::from_ref(&early)),
        (vec![(5, 14)], Some(gap))
    );
    let mended = [early, backup(1, case.known[1].0, 30, 33)];
    assert_eq!(case.restorable(&mended), (vec![(5, 14), (33, 60)], None));
}

#[test]
fn commits_that_the_fork_cut_off_are_not_the_last_ones() {
    let case = case(20, 0..40, 16..20);
    let backups = [backup(0, Branch::FIRST, 3, 5)];
    let found = Restorable::along(&case.index, &case.path, &backups, SEGMENT).expect("it is read");
    let last = found.last_commit(&case.index, &case.path);
    assert_eq!(last, Ok(Some(time(19))));
}

#[test]
fn no_backup_leads_over_wal_of_a_minimal_level() {
    let mut case = case(40, 0..20, 40..40);
    case.path.truncate(1);
    case.index.1 = Some(10);
    let (first, later) = (
        backup(1, Branch::FIRST, 2, 4),
        backup(2, Branch::FIRST, 12, 13),
    );
    let refusal = Refusal::MinimalWal {
        branch: Branch::FIRST,
        from_lsn: Lsn(10),
    };
    let alone = case.restorable(std::slice::from_ref(&first));
    assert_eq!(alone, (vec![(4, 10)], Some(refusal)));
    let both = [first, later];
    let path_of_first = timeline_path(&case.known, Branch::FIRST).expect("a path");
    let found = Restorable::along(&case.index, &path_of_first, &both, SEGMENT).expect("read");
    assert_eq!(found.refusal, None);
    assert_eq!(found.minimal, [(Branch::FIRST, Lsn(10))]);
    let ends = |stretch: &Stretch| (stretch.from_lsn.0, stretch.to_lsn.0);
    let stretches: Vec<_> = found.stretches.iter().map(ends).collect();
    assert_eq!(stretches, [(4, 10), (13, 20)]);
    // The last commit before the record, not the last one of its range.
    let last = found.stretches[0].last_time(&case.index, &path_of_first, (Lsn::ZERO, Lsn::MAX));
    assert_eq!(last, Ok(Some(time(9))));
}

proptest! {
    /// Against what a plan does: from the newest backup on, the first from which the way is whole.
    #[test]
    fn it_is_what_a_plan_accepts(
        fork in 1u64..60,
        minimal in prop::option::of(0u64..80),
        lost in prop::collection::vec((0u64..80, 1u64..6, prop::bool::ANY), 0..4),
        backups in prop::collection::vec((0u64..70, 1u64..8, prop::bool::ANY), 0..5),
    ) {
        let has = |second: bool| {
            let lost = lost.clone();
            move |at: &u64| !lost.iter().any(|(from, length, of)| *of == second && (*from..from + length).contains(at))
        };
        let mut case = case(fork, (0..80).filter(has(false)), (fork / SEGMENT * SEGMENT..80).filter(has(true)));
        case.index.1 = minimal;
        let backups: Vec<_> = (0..).zip(&backups).map(|(number, (start, length, second))| {
            let of = if *second { case.known[1].0 } else { Branch::FIRST };
            let start = if *second { (*start).max(fork) } else { *start };
            backup(number, of, start, start + length)
        }).collect();
        let (stretches, refusal) = case.restorable(&backups);
        let mut leading: Vec<_> = backups.iter().filter(|backup| leads_to(&case.path, backup)).collect();
        leading.sort_by_key(|backup| backup.start_lsn);
        let ways: Vec<_> = leading.iter().map(|backup| {
            let wal = follow_wal(&case.index, &case.path, backup.start_lsn, SEGMENT).expect("it is read");
            // A way that reaches the record ends there.
            let is_on_way = minimal.is_some_and(|at| at >= backup.start_lsn.0);
            prop_assert!(!is_on_way || Some(wal.end_lsn.0) <= minimal);
            prop_assert_eq!(wal.minimal, is_on_way && Some(wal.end_lsn.0) == minimal && wal.gap
                && wal.ranges.last().is_some_and(|last| Some(last.start_lsn.0) == minimal));
            Ok((backup.stop_lsn.0, wal.end_lsn.0, wal.gap))
        }).collect::<Result<_, TestCaseError>>()?;
        let accepted = ways.iter().any(|(stop, end, gap)| end >= stop && !gap);
        prop_assert_eq!(refusal.is_none(), accepted);
        for at in 0..80 {
            let planned = ways.iter().any(|(stop, end, _)| (*stop..*end).contains(&at));
            let shown = stretches.iter().any(|(from, to)| (*from..*to).contains(&at));
            prop_assert_eq!(shown, planned, "LSN {}", at);
        }
        prop_assert!(stretches.windows(2).all(|pair| pair[0].1 < pair[1].0));
    }
}
