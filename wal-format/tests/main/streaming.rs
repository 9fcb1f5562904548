//! However the bytes are divided into pushes, the records, the summary and the error are the same.

use proptest::prelude::*;
use wal_format::{DecodeError, Lsn, PgVersion, SegmentSummary, WalIdentity, WalIndexer};

use crate::writer::{OPAQUE, Outcome, PAGE, START, WalWriter, decode};

/// A record of random WAL.
#[derive(Clone, Debug)]
enum Item {
    Opaque(usize),
    Commit(u32),
    Abort,
    RestorePoint,
    FillPage(usize),
    Switch,
}

fn item() -> impl Strategy<Value = Item> {
    prop_oneof![
        8 => (0_usize..300).prop_map(Item::Opaque),
        2 => (0_usize..3 * PAGE).prop_map(Item::Opaque),
        1 => (300_usize << 10..1200 << 10).prop_map(Item::Opaque),
        3 => any::<u32>().prop_map(|subtransactions| Item::Commit(subtransactions % 5000)),
        1 => Just(Item::Abort),
        1 => Just(Item::RestorePoint),
        3 => (0_usize..8).prop_map(|eighths| Item::FillPage(eighths * 8)),
        1 => Just(Item::Switch),
    ]
}

fn wal(version: PgVersion, items: &[Item]) -> WalWriter {
    let mut wal = WalWriter::new(version, START);
    for (at, item) in items.iter().enumerate() {
        let time = (at as i64 * 1000).to_le_bytes();
        match item {
            Item::Opaque(length) => {
                wal.record(OPAQUE, &vec![at as u8; *length]);
            }
            Item::Commit(subtransactions) => {
                // XACT_XINFO_HAS_SUBXACTS.
                let mut body = time.to_vec();
                body.extend(2_u32.to_le_bytes());
                body.extend(subtransactions.to_le_bytes());
                body.extend((0..*subtransactions).flat_map(u32::to_le_bytes));
                wal.record((1, 0x80), &body);
            }
            Item::Abort => {
                wal.record((1, 0x20), &time);
            }
            Item::RestorePoint => {
                let mut body = time.to_vec();
                body.extend([b'p'; 63]);
                body.push(0);
                wal.record((0, 0x70), &body);
            }
            Item::FillPage(left) => {
                wal.next_record();
                if wal.left() >= left + 32 {
                    wal.fill(*left);
                }
            }
            Item::Switch => {
                wal.switch();
            }
        }
    }
    wal
}

/// As [`decode`], with the summary builder.
fn index<'a>(
    identity: WalIdentity,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (SegmentSummary, Option<DecodeError>, Lsn) {
    let mut indexer = WalIndexer::new(identity, START, None);
    let mut pieces = pieces.into_iter();
    let error = pieces.find_map(|piece| indexer.push(piece).err());
    let summary = indexer.take_summary();
    (summary, error, indexer.valid_end_lsn())
}

/// Cuts `bytes` into pieces of these lengths, which are repeated.
fn cut<'a>(bytes: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    for length in lengths.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (now, later) = rest.split_at(rest.len().min((*length).max(1)));
        pieces.push(now);
        rest = later;
    }
    pieces
}

/// Checks that the results of the decoder and the summary builder do not depend on the cuts.
fn check(wal: &WalWriter, lengths: &[usize], window: usize) -> Outcome {
    let (identity, bytes) = (wal.identity, wal.bytes.as_slice());
    let whole = decode(identity, START, window, [bytes]);
    let summary = index(identity, [bytes]);
    for lengths in [&[1][..], lengths, &[PAGE], &[7, 8192, 100]] {
        let pieces = cut(bytes, lengths);
        let cut = decode(identity, START, window, pieces.iter().copied());
        assert!(cut == whole, "cut into {lengths:?}");
        assert_eq!(index(identity, pieces), summary, "cut into {lengths:?}");
    }
    whole
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_cuts_do_not_matter(
        version in prop::sample::select(PgVersion::ALL.to_vec()),
        items in prop::collection::vec(item(), 1..60),
        lengths in prop::collection::vec(1_usize..20_000, 1..40),
        window in 0_usize..300_000,
    ) {
        let wal = wal(version, &items);
        let outcome = check(&wal, &lengths, window);
        prop_assert_eq!(outcome.error, None);
        // The unused bytes after a switch are not a record.
        prop_assert!(outcome.valid_end_lsn <= wal.position());
        prop_assert!(outcome.open_record_lsn.is_none());
    }

    #[test]
    fn the_cuts_do_not_matter_where_wal_is_damaged(
        items in prop::collection::vec(item(), 1..30),
        lengths in prop::collection::vec(1_usize..20_000, 1..40),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..=255), 1..4),
        length in any::<prop::sample::Index>(),
    ) {
        let mut wal = wal(PgVersion::V17, &items);
        let length = length.index(wal.bytes.len()) + 1;
        wal.bytes.truncate(length);
        for (at, bits) in damage {
            let at = at.index(length);
            wal.bytes[at] ^= bits;
        }
        check(&wal, &lengths, usize::MAX);
    }

    #[test]
    fn any_bytes_are_refused_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..3 * PAGE),
        lengths in prop::collection::vec(1_usize..20_000, 1..4),
        version in prop::sample::select(PgVersion::ALL.to_vec()),
    ) {
        let mut wal = WalWriter::new(version, START);
        wal.bytes.clone_from(&bytes);
        check(&wal, &lengths, usize::MAX);
        // After a valid page header, the bytes reach the record decoder.
        wal.bytes.clear();
        wal.page(0, 0);
        wal.bytes.extend(bytes);
        check(&wal, &lengths, usize::MAX);
        // In a record with a correct CRC, the bytes reach the decoder of the body's structure.
        let body = wal.bytes.split_off(40);
        wal.record_of((1, 0x80), &body);
        wal.record_of((0, 0x00), &body);
        wal.record_of(OPAQUE, &body);
        check(&wal, &lengths, usize::MAX);
    }
}
