//! Tests of the container: round trip, every flipped bit, hostile lengths, and reading only the end
//! of an object.

use super::{footer::encode_summary, *};
use crate::{
    Branch, Lsn, PgTimestamp, PgVersion, SegmentNo, SegmentSize, SegmentSummary, SystemIdentifier,
    TransactionEnd, TransactionEndKind,
};

fn header(start: u64, end: u64) -> SealedHeader {
    SealedHeader {
        system_identifier: SystemIdentifier(7_432_188_851_234_567_890),
        version: PgVersion::V17,
        branch: Branch::FIRST,
        segment_size: SegmentSize::DEFAULT,
        start_lsn: Lsn(start),
        end_lsn: Lsn(end),
    }
}

/// Returns bytes that compress about as well as WAL: half of them are noise.
fn wal_like(bytes: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    (0..bytes)
        .map(|index| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if index % 8 < 4 { 0 } else { state as u8 }
        })
        .collect()
}

fn summary() -> SegmentSummary {
    SegmentSummary {
        record_count: 3,
        last_record_lsn: Some(Lsn(0x100_0040)),
        transactions: vec![TransactionEnd {
            lsn: Lsn(0x100_0040),
            xid: 742,
            time: PgTimestamp(815_000_000_000_000),
            kind: TransactionEndKind::Commit,
        }],
        ..SegmentSummary::default()
    }
}

fn seal_at_once(header: SealedHeader, wal: &[u8]) -> Vec<u8> {
    let mut compressor = FrameCompressor::new(1).expect("a compressor");
    seal(
        &mut compressor,
        header,
        wal,
        &summary(),
        Some(PgTimestamp(5)),
    )
    .expect("it seals")
}

/// Reads everything. Returns `Ok` only if no damage is detected.
fn read(object: &[u8]) -> Result<Vec<u8>, SealedError> {
    let mut wal = Vec::new();
    SealedReader::open(object)?.read_all(&mut wal)?;
    Ok(wal)
}

#[test]
fn a_segment_comes_back_whole_by_frame_and_by_lsn() {
    let size = SegmentSize::DEFAULT;
    let wal = wal_like(size.len());
    let whole = header(0x100_0000, 0x200_0000);
    let object = seal_at_once(whole, &wal);
    let reader = SealedReader::open(&object).expect("it opens");
    assert_eq!(*reader.header(), whole);
    assert_eq!(*reader.summary(), summary());
    assert_eq!(reader.proven(), Some(PgTimestamp(5)));
    assert!(read(&object).expect("it reads") == wal);

    let mut frames = reader.frames().expect("a decompressor");
    let mut position = whole.start_lsn;
    while let Some(frame) = frames.next() {
        let (lsn, raw) = frame.expect("the frame is sound");
        assert_eq!(lsn, position);
        position = position.add(raw.len() as u64);
    }
    assert_eq!(position, whole.end_lsn);

    let frame = FRAME_BYTES as u64;
    for (offset, bytes) in [
        (0, 1),
        (frame - 1, 2),
        (frame, FRAME_BYTES),
        (frame / 2, 3 * FRAME_BYTES),
        ((wal.len() - 1) as u64, 1),
        (0, wal.len()),
        (7, 0),
    ] {
        let read = reader
            .read_at(whole.start_lsn.add(offset), bytes)
            .expect("it is held");
        assert!(read == wal[offset as usize..offset as usize + bytes]);
    }
    assert!(matches!(
        reader.read_at(whole.end_lsn, 1),
        Err(SealedError::OutOfRange { .. })
    ));
}

#[test]
fn pieces_and_frames_of_other_threads_give_the_same_object() {
    let wal = wal_like(3 * FRAME_BYTES + 5000);
    let header = header(0x100_2000, 0x100_2000 + wal.len() as u64);
    let at_once = seal_at_once(header, &wal);

    let mut writer = SealedWriter::new(header, 1).expect("a writer");
    for piece in wal.chunks(131_071) {
        writer.push(piece).expect("it fits");
    }
    let pieces = writer
        .finish(&summary(), Some(PgTimestamp(5)))
        .expect("it ends");
    assert!(pieces == at_once);

    let frames: Vec<EncodedFrame> = std::thread::scope(|scope| {
        let threads: Vec<_> = wal
            .chunks(FRAME_BYTES)
            .map(|raw| {
                scope.spawn(|| {
                    FrameCompressor::new(1)
                        .expect("one each")
                        .compress(raw)
                        .expect("it compresses")
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    let mut writer = SealedWriter::new(header, 1).expect("a writer");
    for frame in &frames {
        writer.push_frame(frame).expect("in order");
    }
    let threads = writer
        .finish(&summary(), Some(PgTimestamp(5)))
        .expect("it ends");
    assert!(threads == at_once);
}

#[test]
fn a_writer_refuses_what_its_header_does_not_announce() {
    let header = header(0x100_0000, 0x100_2000);
    let mut writer = SealedWriter::new(header, 1).expect("a writer");
    writer.push(&[0; 8000]).expect("it fits");
    assert!(matches!(
        writer.push(&[0; 193]),
        Err(SealedError::Length {
            expected: 8192,
            found: 8193
        })
    ));
    assert!(matches!(
        writer.finish(&summary(), None),
        Err(SealedError::Length {
            expected: 8192,
            found: 8000
        })
    ));
    for (start, end) in [(1, 1), (2, 1), (0xFF_FFFF, 0x100_0001)] {
        let header = self::header(start, end);
        assert!(matches!(
            SealedWriter::new(header, 1),
            Err(SealedError::Range { .. })
        ));
    }
}

#[test]
fn every_flipped_bit_and_every_truncation_of_a_small_container_is_noticed() {
    let wal = wal_like(3000);
    let object = seal_at_once(header(0x100_0000, 0x100_0000 + 3000), &wal);
    assert!(read(&object).expect("it reads") == wal);
    let mut flipped = object.clone();
    for at in 0..object.len() {
        for bit in 0..8 {
            flipped[at] ^= 1 << bit;
            assert!(
                read(&flipped).is_err(),
                "bit {bit} of byte {at} went unnoticed"
            );
            flipped[at] = object[at];
        }
        assert!(read(&object[..at]).is_err(), "cut off at {at}, unnoticed");
        assert!(
            read(&object[at + 1..]).is_err(),
            "{} bytes lost in front, unnoticed",
            at + 1
        );
    }
    flipped.push(0);
    assert!(read(&flipped).is_err(), "a byte too many went unnoticed");
}

#[test]
fn every_flipped_bit_behind_the_frames_is_noticed_by_the_end_alone() {
    let wal = wal_like(2 * FRAME_BYTES + 77);
    let end = 0x100_0000 + wal.len() as u64;
    let object = seal_at_once(header(0x100_0000, end), &wal);
    let total = object.len() as u64;
    let whole = SealedFooter::from_tail(total, &object).expect("sound");
    let FooterFromTail::Complete(footer) = whole else {
        panic!("the whole object is enough");
    };
    let frames_end = footer.frame_range(2).expect("a third frame").end as usize;
    let mut tail = object[frames_end..].to_vec();
    for at in 0..tail.len() {
        for bit in 0..8 {
            tail[at] ^= 1 << bit;
            let read = SealedFooter::from_tail(total, &tail);
            // A length that became larger requests more bytes, which do not contain the footer
            // either.
            let refused = match read {
                Ok(FooterFromTail::NeedMore { bytes }) => {
                    let mut whole = object[..frames_end].to_vec();
                    whole.extend(&tail);
                    bytes > total || SealedFooter::from_tail(total, &whole).is_err()
                }
                Ok(FooterFromTail::Complete(_)) => false,
                Err(_) => true,
            };
            assert!(
                refused,
                "bit {bit} of byte {at} behind the frames went unnoticed"
            );
            tail[at] ^= 1 << bit;
        }
    }
    // The object has another length than when it was stored.
    assert!(SealedFooter::from_tail(total + 1, &tail).is_err());
    assert!(SealedFooter::from_tail(total - 1, &tail).is_err());
}

#[test]
fn random_flipped_bits_of_a_whole_segment_are_noticed() {
    let wal = wal_like(SegmentSize::DEFAULT.len());
    let mut object = seal_at_once(header(0x100_0000, 0x200_0000), &wal);
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    for _ in 0..60 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let bit = (state % (object.len() as u64 * 8)) as usize;
        object[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&object).is_err(), "bit {bit} went unnoticed");
        object[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(read(&object).expect("sound again") == wal);
}

#[test]
fn the_objects_end_alone_tells_everything_but_the_wal() {
    let wal = wal_like(2 * FRAME_BYTES);
    let header = header(0x100_0000, 0x120_0000);
    let object = seal_at_once(header, &wal);
    let total = object.len() as u64;
    let tail = |bytes: u64| &object[object.len() - bytes as usize..];
    let FooterFromTail::NeedMore { bytes } =
        SealedFooter::from_tail(total, tail(10)).expect("short")
    else {
        panic!("10 bytes cannot be enough");
    };
    assert_eq!(bytes, FOOTER_LEN_HINT);
    let FooterFromTail::NeedMore { bytes } =
        SealedFooter::from_tail(total, tail(40)).expect("short")
    else {
        panic!("40 bytes cannot be enough");
    };
    assert!(bytes < 400, "{bytes} for a small footer");
    let FooterFromTail::Complete(footer) =
        SealedFooter::from_tail(total, tail(bytes)).expect("sound")
    else {
        panic!("what it asked for is enough");
    };
    assert_eq!((*footer.header(), footer.summary()), (header, &summary()));

    // A range GET of a single frame.
    let range = footer.frame_range(1).expect("a second frame");
    let stored = &object[range.start as usize..range.end as usize];
    let mut raw = Vec::new();
    FrameDecompressor::new()
        .expect("a decompressor")
        .append(
            1,
            footer.entries()[1],
            stored,
            footer.frame_raw_bytes(1),
            &mut raw,
        )
        .expect("the frame is sound");
    assert!(raw == wal[FRAME_BYTES..]);
    assert_eq!(footer.frame_range(2), None);
}

#[test]
fn foreign_and_newer_objects_are_named_as_such() {
    for foreign in [
        &b""[..],
        b"x",
        &[0; 500],
        b"\x28\xB5\x2F\xFD\x24\x00\x01\x00\x00\x99\xE9\xD8\x51",
    ] {
        assert!(matches!(read(foreign), Err(SealedError::NotSealed { .. })));
    }
    let mut newer = seal_at_once(header(0x100_0000, 0x100_0010), &[7; 16]);
    newer[16] = 3;
    let error = read(&newer).expect_err("a newer format");
    assert!(error.to_string().contains("format version 3"), "{error}");
    let last = newer.len();
    newer[last - 16] = 9;
    let error = SealedFooter::from_tail(last as u64, &newer).expect_err("a newer format");
    assert!(error.to_string().contains("format version 9"), "{error}");
}

/// Sets the format version of an object to `version` and updates the checksums.
fn set_version(object: &mut [u8], version: u16) {
    let length = object.len();
    let footer_bytes: [u8; 4] = object[length - 24..length - 20]
        .try_into()
        .expect("4 bytes");
    let footer = length - u32::from_le_bytes(footer_bytes) as usize;
    for header in [0, footer + 16] {
        object[header + 16..header + 18].copy_from_slice(&version.to_le_bytes());
        let sum = crc32fast::hash(&object[header..header + 64]);
        object[header + 64..header + 68].copy_from_slice(&sum.to_le_bytes());
    }
    object[length - 16..length - 14].copy_from_slice(&version.to_le_bytes());
    let sum = crc32fast::hash(&object[footer..length - 12]);
    object[length - 12..length - 8].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn version_1_is_read_and_says_nothing_of_tablespaces() {
    let wal = wal_like(100_000);
    let object = seal_at_once(header(0x100_0000, 0x100_0000 + 100_000), &wal);
    let reader = SealedReader::open(&object).expect("it opens");
    assert!(reader.footer().records_tablespaces());
    let mut old = object.clone();
    set_version(&mut old, 1);
    let reader = SealedReader::open(&old).expect("it opens");
    assert!(!reader.footer().records_tablespaces());
    assert_eq!(*reader.summary(), summary());
    assert!(read(&old).expect("it reads") == wal);
    set_version(&mut old, 0);
    assert!(matches!(
        read(&old),
        Err(SealedError::UnsupportedFormat { found: 0 })
    ));
    // The header and the footer have different versions.
    let mut mixed = object;
    mixed[16..18].copy_from_slice(&1_u16.to_le_bytes());
    let sum = crc32fast::hash(&mixed[..64]);
    mixed[64..68].copy_from_slice(&sum.to_le_bytes());
    assert!(matches!(read(&mixed), Err(SealedError::Malformed { .. })));
}

#[test]
fn lengths_that_no_writer_makes_are_refused_before_they_are_read() {
    let mut object = seal_at_once(header(0x100_0000, 0x100_0010), &[7; 16]);
    let length = object.len();
    let huge = 42_u64 << 30;
    for at in [length - 24, length - 20] {
        let before = object.clone();
        object[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        let found = SealedFooter::from_tail(huge, &object[length - 24..]);
        assert!(
            matches!(found, Err(SealedError::Malformed { .. })),
            "{found:?}"
        );
        object = before;
    }
}

#[test]
fn a_zstd_bomb_is_bounded_by_the_header() {
    // A frame of 64 MiB where the header announces 3000 bytes, with correct checksums.
    let bomb = FrameCompressor::new(1)
        .expect("a compressor")
        .compress(&vec![0; 64 << 20])
        .expect("it compresses");
    let small = header(0x100_0000, 0x100_0000 + 3000);
    let mut lie = bomb;
    lie.raw_bytes = 3000;
    let mut writer = SealedWriter::new(small, 1).expect("a writer");
    writer
        .push_frame(&lie)
        .expect("the lie is not looked at here");
    let object = writer.finish(&summary(), None).expect("it ends");
    assert!(matches!(
        read(&object),
        Err(SealedError::Decompress { expected: 3000, .. })
    ));
}

#[test]
fn a_summary_longer_than_its_wal_allows_is_refused_when_it_is_written() {
    let transaction = summary().transactions[0];
    let summary = SegmentSummary {
        transactions: vec![transaction; 500_000],
        ..SegmentSummary::default()
    };
    let result = encode_summary(&header(0x100_0000, 0x100_0001), &summary);
    assert!(matches!(result, Err(SealedError::Malformed { .. })));
    assert!(
        encode_summary(
            &SealedHeader::of_segment(
                SystemIdentifier(1),
                PgVersion::V13,
                Branch::FIRST,
                SegmentSize::DEFAULT,
                SegmentNo(1),
            ),
            &summary
        )
        .is_ok()
    );
}
