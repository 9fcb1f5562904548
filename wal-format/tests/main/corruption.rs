//! A flipped bit is detected, or it is at a position without a meaning in WAL.
//!
//! Without a meaning are: padding after records, four bytes of padding in a page header,
//! `XLP_BKP_REMOVABLE`, and the data of pages after a switch. A timeline that increases without a
//! reason is detected at the next page, where it decreases again.

use wal_format::PgVersion;

use crate::{
    golden,
    writer::{OPAQUE, Outcome, PAGE, START, WalWriter, decode, decode_whole},
};

/// Returns the offset of every page in `wal`.
fn pages(wal: &WalWriter) -> impl Iterator<Item = usize> {
    (0..wal.bytes.len()).step_by(PAGE)
}

/// Returns true if this bit carries no meaning.
fn is_meaningless(wal: &WalWriter, at: usize, bit: u32) -> bool {
    let in_page = at % PAGE;
    // `XLP_BKP_REMOVABLE`.
    (in_page == 2 && bit == 2) || wal.meaningless.iter().any(|range| range.contains(&at))
}

/// Checks that the records of the flipped WAL are a prefix of the intact ones, and that the decoder
/// detected the flipped bit unless it is meaningless.
fn check(sound: &Outcome, flipped: &Outcome, meaningless: bool, what: &str) {
    assert!(
        flipped.seen.len() <= sound.seen.len()
            && flipped.seen.iter().zip(&sound.seen).all(|(a, b)| a == b),
        "{what} changed a record that was handed on"
    );
    // With a length that became larger, the decoder waits for bytes that never arrive.
    let waits = flipped.error.is_none() && flipped.open_record_lsn.is_some();
    if !meaningless {
        assert!(flipped.error.is_some() || waits, "{what} went unnoticed");
    } else {
        assert!(flipped == sound, "{what} means something after all");
    }
}

#[test]
fn every_flipped_bit_of_valid_wal_is_noticed_or_means_nothing() {
    // The WAL crosses the end of a segment, so that it contains both kinds of page header.
    let mut wal = WalWriter::new(PgVersion::V18, START.add((1 << 20) - 2 * PAGE as u64));
    wal.record(OPAQUE, b"first");
    wal.record((1, 0x00), &7_i64.to_le_bytes());
    wal.record(OPAQUE, &vec![5; PAGE]);
    wal.fill(8);
    wal.record(OPAQUE, &[9; 301]);
    wal.fill(0);
    wal.record(OPAQUE, &[1; 3]);
    // A last page proves the timeline of the pages before it, and a last record completes an open
    // one.
    wal.fill(0);
    let last_page = wal.bytes.len();
    wal.record(OPAQUE, b"last");
    let sound = decode_whole(&wal);
    assert_eq!(sound.error, None);
    assert_eq!(pages(&wal).count(), 5);
    let mut flipped = wal.clone();
    for at in 0..wal.bytes.len() {
        for bit in 0..8 {
            flipped.bytes[at] ^= 1 << bit;
            // Only the timeline of the last page can increase undetected.
            let timeline_of_last = (last_page + 4..last_page + 8).contains(&at);
            let meaningless = is_meaningless(&wal, at, bit)
                || (timeline_of_last && at + bit as usize > last_page + 4);
            check(
                &sound,
                &decode_whole(&flipped),
                meaningless,
                &format!("bit {bit} of byte {at}"),
            );
            flipped.bytes[at] = wal.bytes[at];
        }
    }
}

#[test]
fn behind_a_switch_page_headers_count_and_data_does_not() {
    let mut wal = WalWriter::new(PgVersion::V15, START);
    wal.record(OPAQUE, b"first");
    wal.switch();
    wal.record(OPAQUE, b"next segment");
    let sound = decode_whole(&wal);
    assert_eq!(sound.error, None);
    let mut flipped = wal.clone();
    let unused = PAGE..wal.bytes.len() - PAGE;
    // Every header of an unused page, and every 97th byte of its data.
    for at in unused.filter(|at| at % PAGE < 24 || at % 97 == 0) {
        for bit in 0..8 {
            flipped.bytes[at] ^= 1 << bit;
            check(
                &sound,
                &decode_whole(&flipped),
                is_meaningless(&wal, at, bit),
                &format!("bit {bit} of byte {at}"),
            );
            flipped.bytes[at] = wal.bytes[at];
        }
    }
}

#[test]
fn wal_that_is_cut_off_gives_its_front_and_no_error() {
    let mut wal = WalWriter::new(PgVersion::V16, START);
    for length in [3, 300, PAGE, 40] {
        wal.record(OPAQUE, &vec![1; length]);
    }
    let sound = decode_whole(&wal);
    for length in 0..wal.bytes.len() {
        let cut = WalWriter {
            bytes: wal.bytes[..length].to_vec(),
            ..wal.clone()
        };
        let outcome = decode_whole(&cut);
        assert_eq!(outcome.error, None, "cut at {length}");
        assert!(sound.seen.starts_with(&outcome.seen), "cut at {length}");
        let whole = sound.seen.iter().filter(|seen| {
            let end = seen.lsn.bytes_since(START) as usize + seen.header.total as usize;
            // Each page that it crosses has a header.
            end + 24 * (length / PAGE) <= length
        });
        assert!(outcome.seen.len() >= whole.count(), "cut at {length}");
    }
}

#[test]
fn flipped_bits_of_real_wal_are_noticed_or_mean_nothing() {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    for version in PgVersion::ALL {
        let (identity, start, bytes) = golden::wal(version);
        let decode = |bytes: &[u8]| decode(identity, start, 0, [bytes]);
        // Cut at the end of a record, so that no record stays open.
        let whole = decode(&bytes);
        let last = whole.seen.last().expect("records").clone();
        let end = last.end_lsn.bytes_since(start) as usize;
        let mut bytes = bytes[..end].to_vec();
        let sound = decode(&bytes);
        assert_eq!((sound.error, sound.open_record_lsn), (None, None));
        let last_page = end / PAGE * PAGE;
        let mut noticed = 0;
        for _ in 0..500 {
            let (at, bit) = (random(end), random(8));
            bytes[at] ^= 1 << bit;
            let flipped = decode(&bytes);
            bytes[at] ^= 1 << bit;
            if flipped == sound {
                // These bits have no meaning: padding after a record or in a page header, and the
                // timeline of the last page.
                let lsn = start.add(at as u64);
                let behind = sound.seen.iter().rfind(|seen| seen.lsn <= lsn);
                let padding = behind.is_none_or(|seen| seen.end_lsn.bytes_since(lsn) < 8);
                let in_page = at % PAGE;
                let header =
                    (20..24).contains(&in_page) || in_page == 2 || (at >= last_page && in_page < 8);
                assert!(
                    padding || header,
                    "PostgreSQL {version}: bit {bit} of byte {at} went unnoticed"
                );
            } else {
                check(
                    &sound,
                    &flipped,
                    false,
                    &format!("PostgreSQL {version}: bit {bit} of byte {at}"),
                );
                noticed += 1;
            }
        }
        assert!(noticed > 400, "PostgreSQL {version}: {noticed}");
    }
}
