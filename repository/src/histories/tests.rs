use std::sync::Arc;

use wal_format::{
    ClusterName, PgTimestamp, PgVersion, SealedHeader, SealedWriter, SegmentNo, SegmentSize,
    SegmentSummary, WalEvent,
};

use super::*;
use crate::store::LocalStore;

const SYSTEM: SystemIdentifier = SystemIdentifier(7);

fn repository(root: &std::path::Path) -> Repository {
    let store = Arc::new(LocalStore::open(root).expect("a store"));
    Repository::with_store(store, "main".parse::<ClusterName>().expect("a name"))
}

fn timeline(number: u32) -> TimelineId {
    TimelineId::new(number).expect("a timeline")
}

/// Stores a segment of `branch` whose summary has these events.
fn put_segment(repository: &Repository, branch: Branch, events: Vec<(wal_format::Lsn, WalEvent)>) {
    let size = SegmentSize::new(1 << 20).expect("a size");
    let header = SealedHeader::of_segment(SYSTEM, PgVersion::V17, branch, size, SegmentNo(3));
    let mut writer = SealedWriter::new(header, 1).expect("a writer");
    writer.push(&vec![0; size.len()]).expect("it has room");
    let summary = SegmentSummary {
        events,
        ..SegmentSummary::default()
    };
    let object = writer.finish(&summary, None).expect("whole");
    repository
        .put(&header.key(), &object)
        .expect("it is stored");
}

fn end_of_recovery(on: u32, from: u32) -> WalEvent {
    WalEvent::EndOfRecovery {
        time: PgTimestamp(0),
        timeline: timeline(on),
        previous_timeline: timeline(from),
    }
}

#[test]
fn wal_of_a_timeline_without_its_history_file_is_a_loss_and_an_empty_folder_is_none() {
    let directory = tempfile::tempdir().expect("a directory");
    let repository = repository(directory.path());
    let content = b"1\t0/300110\tno recovery target specified\n";
    let branch = Branch::of_history(timeline(2), content);
    put_segment(&repository, branch, Vec::new());
    let lost = repository.read_histories(SYSTEM).expect("it lists").lost;
    assert_eq!(lost.len(), 1, "{lost:?}");
    assert_eq!(lost[0].branch, branch);
    assert!(
        lost[0].problem.contains("missing in both copies"),
        "{lost:?}"
    );
    let error = repository
        .histories(SYSTEM)
        .expect_err("a loss")
        .to_string();
    assert!(
        error.contains("--repair") && error.contains("000000020000000000000003"),
        "{error}"
    );
    repository
        .branches_of(SYSTEM, timeline(2))
        .expect_err("this timeline");
    assert!(
        repository
            .branches_of(SYSTEM, timeline(3))
            .expect("another")
            .is_empty()
    );

    repository
        .put_history(SYSTEM, branch, content)
        .expect("stored");
    let found = repository.read_histories(SYSTEM).expect("it lists");
    assert_eq!((found.known.len(), found.lost.len()), (1, 0));
    // A copy that is damaged is written again from content that its name proves.
    let name = format!("main/{}", ObjectKey::HistoryCopy(SYSTEM, branch));
    std::fs::write(directory.path().join(&name), "garbled").expect("it is garbled");
    repository
        .put_history(SYSTEM, branch, content)
        .expect("stored");
    assert_eq!(
        std::fs::read(directory.path().join(&name)).expect("a file"),
        content
    );

    let gone = Branch::of_history(timeline(3), b"1\t0/400110\tx\n");
    let folder = directory
        .path()
        .join(format!("main/{SYSTEM}/wal/{gone}/00000000"));
    std::fs::create_dir_all(folder).expect("an empty folder");
    assert!(
        repository
            .read_histories(SYSTEM)
            .expect("it lists")
            .lost
            .is_empty()
    );
}

#[test]
fn a_lost_history_file_is_rebuilt_from_a_descendant_or_from_the_first_records() {
    let lsn = |text: &str| text.parse().expect("an LSN");
    let second = &b"1\t0/300110\tno recovery target specified\n"[..];
    let at_page = &b"1\t0/302000\treached consistency\n"[..];
    let at_name = &b"1\t0/300110\tat restore point \"before\"\n"[..];
    let before = &b"1\t0/300110\tbefore LSN 0/300110\n\n"[..];
    let after = &b"1\t0/300110\tafter LSN 0/3000D8\n\n"[..];
    let odd = &b"1\t0/300110\tbefore 2026-11-21 10:00:00+00\n"[..];
    let restore_point = (
        lsn("0/300050"),
        WalEvent::RestorePoint {
            time: PgTimestamp(0),
            name: "before".to_owned(),
        },
    );
    for (content, at, rebuilt) in [
        (second, "0/300110", true),
        (at_page, "0/302018", true),
        (at_name, "0/300110", true),
        (before, "0/300110", true),
        (after, "0/300110", true),
        (odd, "0/300110", false),
    ] {
        let directory = tempfile::tempdir().expect("a directory");
        let repository = repository(directory.path());
        let branch = Branch::of_history(timeline(2), content);
        let events = vec![restore_point.clone(), (lsn(at), end_of_recovery(2, 1))];
        put_segment(&repository, branch, events);
        let found = repository
            .rebuilt_history(SYSTEM, branch)
            .expect("it lists");
        let found = found.map(|(content, _)| content);
        assert_eq!(found.as_deref(), rebuilt.then_some(content));
        // Whatever the reason was, a descendant's file has it.
        let third = [content, b"\n2\t0/500000\tno recovery target specified\n"].concat();
        let descendant = Branch::of_history(timeline(3), &third);
        repository
            .put_history(SYSTEM, descendant, &third)
            .expect("stored");
        let found = repository
            .rebuilt_history(SYSTEM, branch)
            .expect("it lists");
        let (found, source) = found.expect("it is rebuilt");
        assert_eq!(&found[..], content);
        assert!(source.contains("timeline 3"), "{source}");
    }
}
