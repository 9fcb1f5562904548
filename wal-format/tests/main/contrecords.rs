//! The ways in which a record can be split: by the end of a page inside its header, by several
//! pages, by whole segments, by a crash. Also segment switches.

use wal_format::{Lsn, PgVersion, WalIndexer, error::DecodeErrorKind, summary::WalEvent};

use crate::writer::{
    LONG, OPAQUE, OVERWRITE_CONTRECORD, PAGE, SEGMENT, SHORT, START, WalWriter, decode_whole,
};

fn wal() -> WalWriter {
    WalWriter::new(PgVersion::V18, START)
}

/// Checks that every record of `wal` is decoded, in order and with nothing left over.
fn check_all(wal: &WalWriter, starts: &[Lsn]) {
    let outcome = decode_whole(wal);
    assert_eq!(outcome.error, None);
    let seen: Vec<_> = outcome.seen.iter().map(|seen| seen.lsn).collect();
    assert_eq!(seen, starts);
    assert_eq!(outcome.open_record_lsn, None);
}

#[test]
fn a_header_is_split_by_a_pages_end_at_every_place() {
    for left in (8..=64).step_by(8) {
        let mut wal = wal();
        wal.fill(left);
        let first = START.add(LONG as u64);
        let second = wal.record(OPAQUE, b"over the end");
        let third = wal.record(OPAQUE, b"after it");
        assert_eq!(second.page_offset() as usize, PAGE - left);
        check_all(&wal, &[first, second, third]);
    }
}

#[test]
fn a_record_that_ends_with_its_page_ends_there_and_not_behind_the_next_header() {
    let mut wal = wal();
    wal.fill(0);
    let second = wal.record(OPAQUE, b"x");
    assert_eq!(second, START.add((PAGE + SHORT) as u64));
    let outcome = decode_whole(&wal);
    assert_eq!(outcome.error, None);
    assert_eq!(outcome.seen[0].end_lsn, START.add(PAGE as u64));
}

#[test]
fn a_record_continues_over_pages_and_over_whole_segments() {
    for length in [PAGE, 3 * PAGE, SEGMENT as usize, 3 * SEGMENT as usize] {
        let mut wal = wal();
        let starts = [
            wal.record(OPAQUE, b"before"),
            wal.record(OPAQUE, &vec![0xA5; length]),
            wal.record(OPAQUE, b"after"),
        ];
        check_all(&wal, &starts);
        let outcome = decode_whole(&wal);
        let long = &outcome.seen[1];
        let body = long.header.body_bytes();
        assert_eq!(long.body.len(), body, "as much as the sink requests");
        // Without its last 8 bytes it is open.
        let cut = long.end_lsn.align_down(8).bytes_since(START) as usize - 8;
        let mut shorter = wal.clone();
        shorter.bytes.truncate(cut);
        let outcome = decode_whole(&shorter);
        assert_eq!(
            (outcome.error, outcome.open_record_lsn),
            (None, Some(starts[1]))
        );
        assert_eq!(outcome.seen.len(), 1);
    }
}

#[test]
fn decoding_begins_inside_of_a_record_and_skips_its_rest() {
    let mut wal = wal();
    wal.record(OPAQUE, b"before");
    wal.record(OPAQUE, &vec![1; 5 * PAGE]);
    let after = wal.record(OPAQUE, b"after");
    let from = 2 * PAGE;
    let later = WalWriter {
        start: START.add(from as u64),
        bytes: wal.bytes[from..].to_vec(),
        ..wal
    };
    check_all(&later, &[after]);
}

#[test]
fn a_continuation_that_does_not_fit_is_refused() {
    let mut wal = wal();
    wal.record(OPAQUE, &vec![1; 2 * PAGE]);
    let second_page = START.add(PAGE as u64);
    let kinds = [
        // `xlp_rem_len`: one bit.
        (16, 1_u8),
        // `xlp_info`: no contrecord, then an unknown flag.
        (2, 1),
        (2, 0x10),
        // `xlp_magic`, `xlp_tli`, `xlp_pageaddr`.
        (0, 1),
        (4, 1),
        (8, 0xFF),
    ];
    for (at, bits) in kinds {
        let mut wrong = wal.clone();
        wrong.bytes[PAGE + at] ^= bits;
        let outcome = decode_whole(&wrong);
        let error = outcome.error.expect("it is noticed");
        assert_eq!(error.lsn, second_page, "{error}");
        assert!(outcome.seen.is_empty());
    }
}

#[test]
fn a_switch_ends_its_segment_wherever_it_stands() {
    // In the middle of a page; as the last record of a page; as the last of a segment; with its
    // header split by the end of a page.
    for (pages, left) in [
        (0, 4096),
        (3, 24),
        (SEGMENT as usize / PAGE - 1, 24),
        (5, 8),
        (5, 16),
    ] {
        let mut wal = wal();
        let mut starts = Vec::new();
        for page in 0..=pages {
            starts.push(wal.next_record());
            wal.fill(if page == pages { left } else { 0 });
        }
        starts.push(wal.switch());
        assert!(wal.position().0.is_multiple_of(SEGMENT));
        starts.push(wal.record(OPAQUE, b"in the next segment"));
        check_all(&wal, &starts);
        let outcome = decode_whole(&wal);
        let switch = &outcome.seen[outcome.seen.len() - 2];
        assert_eq!(switch.end_lsn, START.add(SEGMENT));

        let mut indexer = WalIndexer::new(wal.identity, START, None);
        indexer.push(&wal.bytes).expect("valid WAL");
        let summary = indexer.take_summary();
        assert_eq!(summary.events, [(switch.lsn, WalEvent::Switch)]);
        assert_eq!(summary.record_count, starts.len() as u64);
    }
}

#[test]
fn pages_behind_a_switch_may_be_all_zero_but_not_foreign() {
    let mut wal = wal();
    wal.record(OPAQUE, b"x");
    wal.switch();
    wal.record(OPAQUE, b"y");
    let unused = 4 * PAGE..6 * PAGE;
    wal.bytes[unused].fill(0);
    assert_eq!(decode_whole(&wal).error, None);
    wal.bytes[4 * PAGE + 8] = 1;
    let error = decode_whole(&wal).error.expect("a foreign page");
    assert_eq!(error.lsn, START.add(4 * PAGE as u64));
    // Without a switch, such a page is an error.
    let mut wal = self::wal();
    wal.fill(0);
    wal.bytes.resize(2 * PAGE, 0);
    let error = decode_whole(&wal).error.expect("no page");
    assert!(matches!(error.kind, DecodeErrorKind::PageMagic { .. }));
}

/// Returns WAL of a server that crashed inside a record of `length` bytes and continued on a later
/// page, and the start of the voided record.
fn overwritten(length: usize, body: impl FnOnce(Lsn) -> ((u8, u8), Vec<u8>)) -> (WalWriter, Lsn) {
    let mut wal = wal();
    let before = wal.record(OPAQUE, b"before");
    let voided = wal.next_record();
    let record = wal.encode(OPAQUE, &crate::writer::body(&vec![3; length]));
    wal.lay(&record);
    // Whole pages survived the crash, but not the last of them.
    let kept = (wal.bytes.len() - 1) / PAGE * PAGE;
    wal.bytes.truncate(kept);
    wal.page(8, 0);
    assert_eq!(wal.previous, before);
    let (kind, body) = body(voided);
    wal.record(kind, &body);
    wal.record(OPAQUE, b"after");
    (wal, voided)
}

fn says(voided: Lsn) -> Vec<u8> {
    let mut body = voided.0.to_le_bytes().to_vec();
    body.extend(5_i64.to_le_bytes());
    body
}

#[test]
fn a_record_that_a_crash_left_incomplete_is_voided() {
    for length in [PAGE, 3 * PAGE, SEGMENT as usize, 2 * SEGMENT as usize] {
        let (wal, voided) = overwritten(length, |voided| (OVERWRITE_CONTRECORD, says(voided)));
        let outcome = decode_whole(&wal);
        assert_eq!(outcome.error, None);
        assert_eq!(outcome.seen.len(), 3);
        assert_eq!(outcome.seen[1].header.previous, outcome.seen[0].lsn);
        let mut indexer = WalIndexer::new(wal.identity, START, None);
        indexer.push(&wal.bytes).expect("valid WAL");
        let overwritten_lsn = voided;
        assert_eq!(
            indexer.take_summary().events,
            [(
                outcome.seen[1].lsn,
                WalEvent::OverwrittenContrecord { overwritten_lsn }
            )]
        );
        // Decoding that begins on one of the voided pages, or on the page with the flag, finds the
        // same records.
        for page in [
            PAGE,
            outcome.seen[1].lsn.bytes_since(START) as usize / PAGE * PAGE,
        ] {
            let from = WalWriter {
                start: START.add(page as u64),
                bytes: wal.bytes[page..].to_vec(),
                ..wal.clone()
            };
            let later = decode_whole(&from);
            assert_eq!(later.error, None, "from {}", from.start);
            assert_eq!(later.seen, outcome.seen[1..]);
        }
    }
}

#[test]
fn a_voided_record_has_to_be_the_one_that_is_named() {
    let (wal, _) = overwritten(PAGE, |voided| (OVERWRITE_CONTRECORD, says(voided.add(8))));
    let error = decode_whole(&wal).error.expect("another record");
    assert!(
        matches!(error.kind, DecodeErrorKind::OverwrittenContrecord { .. }),
        "{error}"
    );
    let (wal, _) = overwritten(PAGE, |_| (OPAQUE, vec![1; 16]));
    let error = decode_whole(&wal).error.expect("no such record");
    assert_eq!(error.kind, DecodeErrorKind::NoOverwrittenContrecord);
    // The flag on a page that voids no record is refused too.
    let mut wal = self::wal();
    wal.fill(0);
    wal.page(8, 0);
    wal.record(OPAQUE, b"x");
    let error = decode_whole(&wal).error.expect("no such record");
    assert_eq!(error.kind, DecodeErrorKind::NoOverwrittenContrecord);
}

#[test]
fn a_timeline_rises_at_a_page_and_never_falls() {
    let mut wal = wal();
    wal.fill(0);
    wal.timeline = 3;
    wal.fill(0);
    let good = wal.clone();
    wal.timeline = 2;
    wal.record(OPAQUE, b"x");
    assert_eq!(decode_whole(&good).error, None);
    let error = decode_whole(&wal).error.expect("it fell");
    let kind = DecodeErrorKind::PageTimeline {
        latest: 3,
        found: 2,
    };
    assert_eq!((error.lsn, error.kind), (START.add(2 * PAGE as u64), kind));
}
