//! Tests of the spool with generated WAL: torn at every byte, sent twice, sent with different
//! bytes, continued over segments.

use std::path::Path;

use proptest::prelude::*;
use wal_format::{
    Branch, ClusterName, Lsn, PgVersion, SegmentSize, SystemIdentifier, WalIdentity, WalIndexer,
};

use super::{
    Spool,
    before::Before,
    branch::BranchSpool,
    writer::{CompletedSegment, SpoolWriter},
};
use crate::error::Error;

const PAGE: usize = 8192;
const START: Lsn = Lsn(1 << 20);

fn identity() -> WalIdentity {
    WalIdentity {
        version: PgVersion::V17,
        system_identifier: SystemIdentifier(7),
        segment_size: SegmentSize::new(1 << 20).expect("1 MiB"),
    }
}

/// Returns WAL of no-op records of these lengths from [`START`] on, and the end of each record.
fn wal(lengths: &[usize]) -> (Vec<u8>, Vec<Lsn>) {
    let mut bytes = Vec::new();
    let mut ends = Vec::new();
    let mut previous = 0;
    for length in lengths {
        page_header(&mut bytes, 0);
        let start = START.0 + bytes.len() as u64;
        let body = body(*length);
        let mut record = Vec::new();
        record.extend(u32::try_from(24 + body.len()).expect("short").to_le_bytes());
        record.extend(0_u32.to_le_bytes());
        record.extend(u64::to_le_bytes(previous));
        // A logical message, which the decoder does not parse.
        record.extend([0, 21, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            page_header(
                &mut bytes,
                rest.len() * usize::from(rest.len() < record.len()),
            );
            let (now, later) = rest.split_at(rest.len().min(PAGE - bytes.len() % PAGE));
            bytes.extend(now);
            rest = later;
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        previous = start;
        ends.push(START.add(bytes.len() as u64));
    }
    (bytes, ends)
}

/// Returns a record body of `length` bytes, or one more, that contains only main data.
fn body(length: usize) -> Vec<u8> {
    let mut body = match length {
        0 => return Vec::new(),
        1..5 => vec![255, u8::try_from(length.max(2) - 2).expect("short")],
        _ => {
            let main_data = u32::try_from(length - 5).expect("short");
            [&[254][..], &main_data.to_le_bytes()].concat()
        }
    };
    body.resize(length.max(2), 0xAB);
    body
}

/// Appends a page header if a page begins here.
fn page_header(bytes: &mut Vec<u8>, continues: usize) {
    if !bytes.len().is_multiple_of(PAGE) {
        return;
    }
    let lsn = START.0 + bytes.len() as u64;
    let long = lsn.is_multiple_of(1 << 20);
    let flags = u16::from(continues > 0) | if long { 2 } else { 0 };
    bytes.extend(PgVersion::V17.page_magic().to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(1_u32.to_le_bytes());
    bytes.extend(lsn.to_le_bytes());
    bytes.extend(u32::try_from(continues).expect("short").to_le_bytes());
    bytes.extend([0; 4]);
    if long {
        bytes.extend(7_u64.to_le_bytes());
        bytes.extend((1_u32 << 20).to_le_bytes());
        bytes.extend(8192_u32.to_le_bytes());
    }
}

fn spool(directory: &Path) -> Spool {
    let name: ClusterName = "main".parse().expect("a name");
    Spool::open(directory, &name).expect("a spool")
}

fn open(branch: &BranchSpool) -> (SpoolWriter, Vec<CompletedSegment>) {
    SpoolWriter::open(branch, &identity(), START, Lsn::ZERO, |_| Ok(None)).expect("it opens")
}

fn push(writer: &mut SpoolWriter, bytes: &[u8]) -> Result<Vec<CompletedSegment>, Error> {
    let mut completed = Vec::new();
    let mut at = writer.incoming();
    for chunk in bytes.chunks(100_000) {
        writer.push(at, chunk, "the server", &mut completed, &mut || false)?;
        at = at.add(chunk.len() as u64);
    }
    Ok(completed)
}

#[test]
fn a_spool_has_one_archiver() {
    let directory = tempfile::tempdir().expect("a directory");
    let first = spool(directory.path());
    let name: ClusterName = "main".parse().expect("a name");
    let second = Spool::open(directory.path(), &name);
    assert!(
        matches!(second, Err(Error::SpoolLocked { .. })),
        "{second:?}"
    );
    drop(first);
    Spool::open(directory.path(), &name).expect("it is free again");
}

#[test]
fn the_identity_is_read_from_the_first_page() {
    let directory = tempfile::tempdir().expect("a directory");
    let spool = spool(directory.path());
    assert_eq!(spool.identity().expect("readable"), None);
    let (mut writer, _) = open(&spool.branch(&identity(), Branch::FIRST));
    push(&mut writer, &wal(&[100; 10]).0).expect("valid WAL");
    assert_eq!(spool.identity().expect("readable"), Some(identity()));
}

#[test]
fn a_crash_before_the_renames_begins_again_at_the_first_of_them() {
    let directory = tempfile::tempdir().expect("a directory");
    let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
    let (bytes, _) = wal(&[60_000; 40]);
    let (mut writer, _) = open(&branch);
    let unfinished = push(&mut writer, &bytes).expect("valid WAL");
    assert_eq!(unfinished.len(), 2);
    drop((unfinished, writer));
    let left = branch.segments().expect("they are listed");
    assert_eq!(left.unacknowledged.len(), 2, "{left:?}");
    // The first segment is complete or cut after its last whole record. The others were never
    // acknowledged and are removed.
    let (again, completed) = open(&branch);
    assert!(
        again.written() > START && again.written() <= Lsn(2 << 20),
        "{again:?}"
    );
    for segment in &completed {
        segment.file.finish().expect("it is renamed");
    }
    drop(again);
    assert_eq!(
        branch.segments().expect("they are listed").unacknowledged,
        []
    );
    let (mut again, _) = open(&branch);
    let from = usize::try_from(again.incoming().bytes_since(START)).expect("short");
    let completed = push(&mut again, &bytes[from..]).expect("valid WAL");
    let last = completed.last().map(|segment| segment.file.segment().0);
    assert_eq!(last, Some(2));
}

#[test]
fn segments_complete_at_their_end_and_say_what_they_hold() {
    let directory = tempfile::tempdir().expect("a directory");
    let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
    let (bytes, ends) = wal(&[60_000; 40]);
    let (mut writer, _) = open(&branch);
    let completed = push(&mut writer, &bytes).expect("valid WAL");
    assert_eq!(completed.len(), 2);
    for segment in &completed {
        segment.file.finish().expect("it is renamed");
    }
    let counted: u64 = completed
        .iter()
        .map(|segment| segment.summary.record_count)
        .sum();
    let tail = writer.cut_tail().expect("a tail");
    assert_eq!(counted + tail.summary.record_count, ends.len() as u64);
    assert_eq!(tail.start_lsn, Lsn(3 << 20));
    assert_eq!(Some(&tail.end_lsn), ends.last());
    assert!(completed[0].summary.open_record_lsn.is_some());
    // After it is opened again, the writer knows the start of the record that continues from the
    // previous segment.
    let (mut again, _) = open(&branch);
    assert_eq!(again.written(), tail.end_lsn);
    let first = again.cut_tail().expect("a tail").summary.first_record_lsn;
    assert_eq!(first, completed[1].summary.open_record_lsn);
}

#[test]
fn the_overlap_is_compared_and_nothing_is_written_over() {
    let directory = tempfile::tempdir().expect("a directory");
    let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
    let (bytes, _) = wal(&[500; 300]);
    let (mut writer, _) = open(&branch);
    push(&mut writer, &bytes[..100_000]).expect("valid WAL");
    writer.begin(START).expect("the start of the segment");
    push(&mut writer, &bytes).expect("the same again, and more");
    assert_eq!(writer.written(), START.add(bytes.len() as u64));
    let (mut writer, _) = open(&branch);
    writer.begin(START).expect("the start of the segment");
    let mut other = bytes.clone();
    other[77_777] ^= 1;
    let error = push(&mut writer, &other).expect_err("they differ");
    assert!(
        matches!(error, Error::Wal(intake::Error::Divergence { lsn, .. }) if lsn == START.add(77_777)),
        "{error}"
    );
    assert!(begins_with(&branch, &bytes));
}

/// Returns true if the open segment's file begins with these bytes. Zeros may follow.
fn begins_with(branch: &BranchSpool, bytes: &[u8]) -> bool {
    let file = std::fs::read(branch.partial_path(START_SEGMENT)).expect("readable");
    file.starts_with(bytes)
}

const START_SEGMENT: wal_format::SegmentNo = wal_format::SegmentNo(1);

#[test]
fn a_damaged_record_is_neither_written_nor_counted() {
    let directory = tempfile::tempdir().expect("a directory");
    let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
    let (mut bytes, ends) = wal(&[500; 100]);
    let damaged = usize::try_from(ends[50].bytes_since(START)).expect("small") + 100;
    bytes[damaged] ^= 0x10;
    let (mut writer, _) = open(&branch);
    let error = push(&mut writer, &bytes).expect_err("a record is damaged");
    assert!(
        matches!(error, Error::Wal(intake::Error::Decode { .. })),
        "{error}"
    );
    let (writer, _) = open(&branch);
    assert!(writer.written() <= ends[50]);
}

#[test]
fn a_stream_may_not_leave_a_gap() {
    let directory = tempfile::tempdir().expect("a directory");
    let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
    let (mut writer, _) = open(&branch);
    assert!(writer.begin(START.add(8192)).is_err());
    let (bytes, _) = wal(&[100]);
    let skipped = writer.push(
        START.add(8),
        &bytes,
        "the server",
        &mut Vec::new(),
        &mut || false,
    );
    assert!(
        matches!(skipped, Err(Error::StreamOutOfOrder { .. })),
        "{skipped:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_torn_end_is_cut_at_the_last_valid_record_and_streamed_again(
        lengths in prop::collection::vec(1_usize..20_000, 2..20),
        torn in 0_usize..300_000,
        garbage in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let directory = tempfile::tempdir().expect("a directory");
        let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
        let (bytes, ends) = wal(&lengths);
        let torn = torn % bytes.len();
        let (mut writer, _) = open(&branch);
        push(&mut writer, &bytes).expect("valid WAL");
        drop(writer);
        let mut content = bytes[..torn].to_vec();
        content.extend(&garbage);
        std::fs::write(branch.partial_path(START_SEGMENT), &content).expect("it is torn");
        let (mut writer, _) = open(&branch);
        // Never more than the bytes that are equal, and never less than the whole records in them.
        let written = writer.written();
        let same = bytes.iter().zip(&content).take_while(|(a, b)| a == b).count();
        let whole = ends.iter().rfind(|end| **end <= START.add(same as u64)).copied().unwrap_or(START);
        prop_assert!(written >= whole, "{written} {whole}");
        prop_assert!(written <= START.add(same as u64).align_up(8), "{written} {same}");
        writer.begin(START).expect("the start of the segment");
        push(&mut writer, &bytes).expect("the same WAL again");
        prop_assert!(begins_with(&branch, &bytes));
    }

    #[test]
    fn garbage_in_the_padding_behind_the_last_record_is_no_divergence(
        lengths in prop::collection::vec(6_usize..3_000, 2..20),
        record in any::<prop::sample::Index>(),
        cut in any::<prop::sample::Index>(),
        garbage in prop::collection::vec(1_u8.., 8..600),
    ) {
        let directory = tempfile::tempdir().expect("a directory");
        let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
        let (bytes, ends) = wal(&lengths);
        let (mut writer, _) = open(&branch);
        push(&mut writer, &bytes).expect("valid WAL");
        drop(writer);
        let end = *record.get(&ends);
        let aligned = usize::try_from(end.bytes_since(START)).expect("short");
        // These records have main data, so the last byte of each is not zero.
        let padding = bytes[..aligned].iter().rev().take_while(|byte| **byte == 0).count();
        let torn = aligned - cut.index(padding + 1);
        let content = [&bytes[..torn], &garbage].concat();
        std::fs::write(branch.partial_path(START_SEGMENT), content).expect("it is torn");
        let (mut writer, _) = open(&branch);
        prop_assert_eq!(writer.written(), end);
        writer.begin(START).expect("the start of the segment");
        push(&mut writer, &bytes).expect("the same WAL again");
        prop_assert!(begins_with(&branch, &bytes));
    }

    #[test]
    fn fed_byte_by_byte_the_indexer_says_the_same(
        lengths in prop::collection::vec(1_usize..20_000, 2..12),
        cut in 1_usize..9000,
    ) {
        let (bytes, _) = wal(&lengths);
        let index = |size: usize| {
            let mut indexer = WalIndexer::new(identity(), START, None);
            bytes.chunks(size).try_for_each(|chunk| indexer.push(chunk)).expect("valid WAL");
            (indexer.valid_end_lsn(), indexer.position(), indexer.take_summary())
        };
        let whole = index(bytes.len());
        prop_assert_eq!(&whole, &index(1));
        prop_assert_eq!(&whole, &index(cut));
        prop_assert_eq!(whole.2.record_count, lengths.len() as u64);
    }
}

#[test]
fn the_zeros_ahead_of_small_writes_are_no_content() {
    let directory = tempfile::tempdir().expect("a directory");
    let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
    let (bytes, ends) = wal(&[5_000; 30]);
    let (mut writer, _) = open(&branch);
    for piece in bytes.chunks(6_000) {
        push(&mut writer, piece).expect("valid WAL");
    }
    drop(writer);
    let file = branch.partial_path(START_SEGMENT);
    let on_disk = std::fs::metadata(file).expect("it is there").len();
    assert!(
        on_disk > bytes.len() as u64,
        "nothing is ahead: {on_disk} bytes"
    );
    let content = branch.read(START_SEGMENT).expect("it is readable");
    let content = content.expect("it is there");
    let (written, padding) = bytes.split_at(content.len());
    assert_eq!(content, written);
    assert!(padding.iter().all(|byte| *byte == 0) && padding.len() < 8);
    let (again, _) = open(&branch);
    assert_eq!(Some(&again.written()), ends.last());
}

const SEGMENT: usize = 1 << 20;

/// Puts a complete segment 1 and an open segment 2 with this content into a spool.
fn leave_open(branch: &BranchSpool, bytes: &[u8], content: &[u8]) {
    let (mut writer, _) = open(branch);
    let completed = push(&mut writer, &bytes[..SEGMENT]).expect("valid WAL");
    completed[0].file.finish().expect("it is renamed");
    std::fs::write(branch.partial_path(START_SEGMENT.next()), content).expect("a file");
}

#[test]
fn an_open_segment_without_a_whole_record_is_compared_with_the_one_before() {
    let (bytes, ends) = wal(&[60_000; 40]);
    // The first record that ends in segment 2 began in segment 1.
    let boundary = START.add(SEGMENT as u64);
    let end = ends.iter().find(|end| **end > boundary);
    let crossing = usize::try_from(end.expect("one crosses").bytes_since(boundary)).expect("short");
    assert!(crossing > 1000, "{crossing}");
    let zeros = vec![0; SEGMENT / 2];
    let torn = &bytes[SEGMENT..];
    for content in [&[][..], &zeros, &torn[..20], &torn[..crossing - 8]] {
        let directory = tempfile::tempdir().expect("a directory");
        let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
        leave_open(&branch, &bytes, content);
        let (mut writer, _) = open(&branch);
        assert_eq!(writer.written(), boundary);
        let before = std::fs::File::open(branch.path(START_SEGMENT)).expect("a file");
        writer.hold_before(Some(Before::of_file(before).expect("a file")));
        assert_eq!(writer.compare_lsn(), START);
        writer.begin(START).expect("the segment before is at hand");
        let completed = push(&mut writer, &bytes).expect("the same WAL, and more");
        assert_eq!(completed.len(), 1);
        completed[0].file.finish().expect("it is renamed");
        let second = std::fs::read(branch.path(START_SEGMENT.next())).expect("a file");
        assert!(second == bytes[SEGMENT..2 * SEGMENT]);
    }
}

#[test]
fn what_holds_no_wal_is_discarded_and_the_later_segments_with_it() {
    let (bytes, _) = wal(&[60_000; 40]);
    let directory = tempfile::tempdir().expect("a directory");
    let branch = spool(directory.path()).branch(&identity(), Branch::FIRST);
    let (second, third) = (START_SEGMENT.next(), START_SEGMENT.next().next());
    leave_open(&branch, &bytes, &[0; 9000]);
    std::fs::write(branch.partial_path(third), &bytes[..100]).expect("a file");
    let copy = branch.path(second).with_extension("new");
    std::fs::write(&copy, &bytes[..100]).expect("a file");
    branch.discard_leftovers().expect("it works");
    let left = branch.segments().expect("they are listed");
    assert_eq!(
        (left.complete, left.open, left.unacknowledged),
        (vec![START_SEGMENT], None, vec![])
    );
    assert!(!copy.exists());
    // An open segment with content stays.
    std::fs::write(branch.partial_path(second), &bytes[SEGMENT..SEGMENT + 9]).expect("a file");
    branch.discard_leftovers().expect("it works");
    assert!(branch.partial_path(second).exists());
    // An empty open segment on its own does not show where the archive ends.
    std::fs::write(branch.partial_path(second), [0; 9]).expect("a file");
    branch.remove(START_SEGMENT).expect("it goes");
    assert_eq!(branch.end_lsn().expect("readable"), None);
}
