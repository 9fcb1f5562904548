//! Tests of the catalog with real objects in a folder.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use repository::{
    Missing,
    store::{LocalStore, ObjectStore},
};
use wal_format::{
    FrameCompressor, ObjectKey, PgVersion, SealedHeader, SegmentNo, SegmentSize, SystemIdentifier,
    TransactionEndKind, sealed::seal,
};

use super::*;

mod memory;
mod scale;

const SIZE: SegmentSize = SegmentSize::DEFAULT;

fn identity() -> ClusterIdentity {
    ClusterIdentity {
        format_version: 1,
        cluster: "main".parse().expect("a name"),
        system_identifier: SystemIdentifier(7_000_000_000_000_000_001),
        postgresql_major: PgVersion::V17,
        wal_segment_size: SIZE,
        created: PgTimestamp(0),
    }
}

struct Fixture {
    _directory: TempDir,
    repository: Repository,
    catalog: Catalog,
    path: PathBuf,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().expect("a directory");
    let store: Arc<dyn ObjectStore> =
        Arc::new(LocalStore::open(&directory.path().join("repository")).expect("a store"));
    let repository = Repository::with_store(store, "main".parse().expect("a name"));
    repository.claim(&identity()).expect("the name is free");
    let path = directory.path().join("catalog");
    let catalog = Catalog::open(&path, &identity()).expect("a catalog");
    Fixture {
        _directory: directory,
        repository,
        catalog,
        path,
    }
}

/// A summary with one commit and a restore point, at the start of the range.
fn summary(start: Lsn) -> SegmentSummary {
    SegmentSummary {
        record_count: 2,
        first_record_lsn: Some(start.add(64)),
        last_record_lsn: Some(start.add(128)),
        last_record_end_lsn: Some(start.add(256)),
        transactions: vec![TransactionEnd {
            lsn: start.add(64),
            xid: 700,
            time: PgTimestamp(1000 + i64::try_from(start.0).expect("small")),
            kind: TransactionEndKind::Commit,
        }],
        events: vec![(
            start.add(128),
            WalEvent::RestorePoint {
                time: PgTimestamp(5),
                name: format!("at {start}"),
            },
        )],
        ..SegmentSummary::default()
    }
}

/// Stores a range of zeros with a summary, and records it in the catalog as the archiver does.
fn store(fixture: &Fixture, kind: WalRangeKind, start: u64, end: u64) -> WalRange {
    let identity = identity();
    let header = SealedHeader {
        system_identifier: identity.system_identifier,
        version: identity.postgresql_major,
        branch: Branch::FIRST,
        segment_size: SIZE,
        start_lsn: Lsn(start),
        end_lsn: Lsn(end),
    };
    let summary = summary(header.start_lsn);
    let wal = vec![0; usize::try_from(end - start).expect("it fits")];
    let mut compressor = FrameCompressor::new(1).expect("a compressor");
    let object = seal(
        &mut compressor,
        header,
        &wal,
        &summary,
        Some(PgTimestamp(9)),
    )
    .expect("it seals");
    let size = object.len() as u64;
    let range = WalRange::of_summary(&header, kind, size, &summary, Some(PgTimestamp(9)));
    fixture
        .repository
        .put(&range.key(&identity), &object)
        .expect("it is new");
    fixture
        .catalog
        .put_branch(Branch::FIRST, None)
        .expect("a branch");
    fixture
        .catalog
        .put_range(&range, &summary)
        .expect("a range");
    range
}

fn segment(number: u64) -> (u64, u64) {
    (
        SegmentNo(number).start_lsn(SIZE).0,
        SegmentNo(number).end_lsn(SIZE).0,
    )
}

#[test]
fn a_rebuilt_catalog_is_equal() {
    let fixture = fixture();
    for number in 1..4 {
        let (start, end) = segment(number);
        store(&fixture, WalRangeKind::Sealed, start, end);
    }
    let (start, _) = segment(4);
    store(&fixture, WalRangeKind::Tail, start, start + 5000);
    let tail = store(&fixture, WalRangeKind::Tail, start + 5000, start + 9000);
    let history = b"1\t0/3000148\tno recovery target specified\n";
    let second = Branch::of_history(
        "00000002".parse::<Branch>().expect("a branch").timeline,
        history,
    );
    let system = identity().system_identifier;
    fixture
        .repository
        .put_history(system, second, history)
        .expect("it is new");
    fixture
        .catalog
        .put_branch(second, Some(history))
        .expect("a branch");

    let rebuilt = Catalog::open_for_restore(None, &fixture.repository).expect("it rebuilds");
    assert_eq!(
        rebuilt.dump().expect("a dump"),
        fixture.catalog.dump().expect("a dump")
    );
    assert!(rebuilt.dump().expect("a dump").len() > 12);
    // The catalog of a running archiver is locked, so it is copied. Entries that it lacks are read
    // from the repository.
    fixture.catalog.remove_range(&tail).expect("it forgets");
    let copied =
        Catalog::open_for_restore(Some(&fixture.path), &fixture.repository).expect("it copies");
    assert_eq!(
        copied.dump().expect("a dump"),
        rebuilt.dump().expect("a dump")
    );
    assert_eq!(copied.restore_points().expect("points").len(), 5);
    // Objects that the repository no longer has are removed from the catalog.
    fixture
        .repository
        .delete(&tail.key(&identity()))
        .expect("it goes");
    let report = copied.refresh(&fixture.repository).expect("it refreshes");
    assert_eq!((report.added, report.removed), (0, 1));
    assert_eq!(copied.restore_points().expect("points").len(), 4);
}

#[test]
fn sealed_segments_win_and_gaps_end_the_coverage() {
    let fixture = fixture();
    let (start, end) = segment(1);
    let sealed = store(&fixture, WalRangeKind::Sealed, start, end);
    store(&fixture, WalRangeKind::Tail, start, start + 8192);
    store(&fixture, WalRangeKind::Tail, end, end + 100);
    store(&fixture, WalRangeKind::Tail, end + 50, end + 90);
    store(&fixture, WalRangeKind::Tail, end + 50, end + 300);
    store(&fixture, WalRangeKind::Tail, end + 400, end + 500);
    let catalog = &fixture.catalog;
    let ranges = catalog
        .ranges(Branch::FIRST, Lsn::ZERO, Lsn::MAX)
        .expect("ranges");
    let found: Vec<_> = ranges
        .iter()
        .map(|range| (range.start_lsn.0, range.end_lsn.0))
        .collect();
    assert_eq!(
        found,
        [
            (start, end),
            (end, end + 100),
            (end + 50, end + 300),
            (end + 400, end + 500)
        ]
    );
    assert_eq!(ranges[0], sealed);
    let end_of = |from: u64| {
        catalog
            .contiguous_end(Branch::FIRST, Lsn(from))
            .expect("an end")
            .0
    };
    assert_eq!(end_of(start), end + 300);
    assert_eq!(
        end_of(end + 350),
        end + 350,
        "inside the gap nothing is held"
    );
    assert_eq!(end_of(end + 450), end + 500);
    assert_eq!(
        catalog.transactions(&sealed).expect("transactions").len(),
        1
    );
}

#[test]
fn what_is_sealed_while_a_catalog_is_made_leaves_no_hole() {
    let fixture = fixture();
    let (start, end) = segment(1);
    let sealed = store(&fixture, WalRangeKind::Sealed, start, end).key(&identity());
    let body = fixture.repository.get(&sealed).expect("it is there");
    fixture.repository.delete(&sealed).expect("it goes");
    let tail = store(&fixture, WalRangeKind::Tail, start, start + 5000).key(&identity());
    // Creates a catalog. During the listing with number `seal_after`, the segment replaces its
    // tail.
    let make = |seal_after: usize| {
        let listings = Arc::new(AtomicUsize::new(0));
        let (repository, body) = (fixture.repository.clone(), body.clone());
        let (counted, sealed, tail) = (Arc::clone(&listings), sealed.clone(), tail.clone());
        let observed = fixture.repository.clone().observed(
            Arc::new(move |op, _, _| {
                if op == "list" && counted.fetch_add(1, Ordering::SeqCst) + 1 == seal_after {
                    repository.put(&sealed, &body).expect("it is new");
                    repository.delete(&tail).expect("it goes");
                }
            }),
            Arc::default(),
        );
        let catalog = Catalog::open_for_restore(None, &observed).expect("it is made");
        let held = catalog.contiguous_end(Branch::FIRST, Lsn(start));
        (held.expect("an end"), listings.load(Ordering::SeqCst))
    };
    let (held, listings) = make(usize::MAX);
    assert_eq!(held, Lsn(start + 5000));
    // The last listings are those of the segments, of the backups, and of both copies of the
    // history files.
    let (held, again) = make(listings - 3);
    assert_eq!(held, Lsn(end));
    assert!(again > listings, "it was looked once more");
}

#[test]
fn strangers_and_damage_are_told_apart() {
    let fixture = fixture();
    let other = ClusterIdentity {
        system_identifier: SystemIdentifier(1),
        ..identity()
    };
    let error = fixture
        .repository
        .claim(&other)
        .expect_err("another cluster");
    assert!(
        matches!(error, Error::SystemIdentifierMismatch { .. }),
        "{error}"
    );
    let locked = Catalog::open(&fixture.path, &identity()).expect_err("it is open");
    assert!(locked.is_locked(), "{locked}");
    let (start, end) = segment(7);
    let range = store(&fixture, WalRangeKind::Sealed, start, end);
    let key = range.key(&identity());
    let conflict = fixture
        .repository
        .put(&key, b"other")
        .expect_err("it is taken");
    assert!(conflict.is_conflict(), "{conflict}");
    let junk = ObjectKey::Tail(
        identity().system_identifier,
        Branch::FIRST,
        "000000010000000000000008".parse().expect("a name"),
        Lsn(end),
        Lsn(end + 10),
    );
    fixture
        .repository
        .put(&junk, b"no container at all")
        .expect("it is new");
    let report = fixture
        .catalog
        .refresh(&fixture.repository)
        .expect("it refreshes");
    assert_eq!(report.damaged.len(), 1);
    let Fixture {
        catalog,
        path,
        _directory,
        ..
    } = fixture;
    drop(catalog);
    let error = Catalog::open(&path, &other).expect_err("another cluster's");
    assert!(matches!(error, Error::CatalogMismatch { .. }), "{error}");
    std::fs::write(path.join("CURRENT"), b"junk").expect("a write");
    let error = Catalog::open(&path, &identity())
        .expect_err("it is damaged")
        .to_string();
    assert!(error.contains("catalog rebuild"), "{error}");
}

#[test]
fn a_tail_that_is_removed_leaves_the_catalog_at_once() {
    let fixture = fixture();
    let (start, end) = segment(3);
    let tail = store(&fixture, WalRangeKind::Tail, start, start + 8192);
    let key = tail.key(&identity());
    fixture.repository.delete(&key).expect("it goes");
    fixture.catalog.forget(&key).expect("it is forgotten");
    let ranges = fixture.catalog.ranges(Branch::FIRST, Lsn(start), Lsn(end));
    assert_eq!(ranges.expect("it reads"), []);
    assert_eq!(fixture.catalog.restore_points().expect("it reads"), []);
    fixture.catalog.forget(&key).expect("once more is fine");
}

#[test]
fn what_is_missing_is_told_before_it_is_forgotten() {
    let fixture = fixture();
    let stored: Vec<WalRange> = (1..=4)
        .map(|number| {
            let (start, end) = segment(number);
            store(&fixture, WalRangeKind::Sealed, start, end)
        })
        .collect();
    let delete = |range: &WalRange| {
        let key = range.key(&identity());
        fixture.repository.delete(&key).expect("it goes");
    };
    // The second segment is in the spool, so it is not lost.
    delete(&stored[0]);
    delete(&stored[1]);
    let in_spool = std::cell::Cell::new(2);
    let told = std::cell::RefCell::new(Vec::new());
    let refuse = |missing: &Missing| {
        told.borrow_mut().push(missing.clone());
        Err(Error::config("refused"))
    };
    let guard = Guard {
        is_spooled: &|range| range.segment == SegmentNo(in_spool.get()),
        is_same_place: true,
        missing: &refuse,
    };
    let refused = fixture.catalog.refresh_guarded(&fixture.repository, &guard);
    refused.expect_err("the guard fails");
    let first = |told: &std::cell::RefCell<Vec<Missing>>| told.borrow_mut().remove(0);
    let (start, end) = segment(1);
    let loss = |from, to| fixture.catalog.loss(Branch::FIRST, Lsn(from), Lsn(to));
    let expected = Missing {
        losses: vec![loss(start, end)],
        newest: None,
    };
    assert_eq!(first(&told), expected);
    let known = || fixture.catalog.all_ranges().expect("it reads").len();
    assert_eq!(known(), 4, "nothing was forgotten");

    // The newest segment exists, so the repository is not an older state, although earlier segments
    // are missing.
    delete(&stored[2]);
    in_spool.set(4);
    let refused = fixture.catalog.refresh_guarded(&fixture.repository, &guard);
    refused.expect_err("the guard fails");
    let expected = Missing {
        losses: vec![loss(start, segment(3).1)],
        newest: None,
    };
    assert_eq!(first(&told), expected);

    // The newest segments are missing, so the repository is an older state. A segment that is in
    // the spool does not count.
    delete(&stored[3]);
    let refused = fixture.catalog.refresh_guarded(&fixture.repository, &guard);
    refused.expect_err("the guard fails");
    let newest = segment(3);
    let expected = Missing {
        losses: vec![loss(start, newest.1)],
        newest: Some(loss(newest.0, newest.1)),
    };
    assert_eq!(first(&told), expected);
    in_spool.set(2);
    let refused = fixture.catalog.refresh_guarded(&fixture.repository, &guard);
    refused.expect_err("the guard fails");
    let newest = segment(4);
    let expected = Missing {
        losses: vec![loss(start, end), loss(segment(3).0, newest.1)],
        newest: Some(loss(newest.0, newest.1)),
    };
    assert_eq!(first(&told), expected);
    assert_eq!(known(), 4, "nothing was forgotten");
    fixture
        .catalog
        .refresh(&fixture.repository)
        .expect("without a guard");
    assert_eq!(known(), 0);
}
