//! Arbitrary bytes as WAL, and arbitrary bytes as records with correct CRCs. The result must not
//! depend on how they are cut.
//!
//! Input: version (1 byte), length of the cuts (1), 0 for WAL or 1 for records (1), then the WAL,
//! or for each record its resource manager, its info, the length of its body (2) and the body.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wal_format::{Lsn, PgVersion, WalIndexer, error::DecodeErrorKind};

#[path = "../../tests/main/writer.rs"]
#[allow(dead_code, reason = "the tests need more of it")]
mod writer;

use writer::{START, WalWriter, decode};

/// Writes records with these bodies.
fn records(version: PgVersion, mut input: &[u8]) -> WalWriter {
    let mut wal = WalWriter::new(version, START);
    while let [manager, info, low, high, rest @ ..] = input {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, rest) = rest.split_at(length);
        // A switch fills its segment, which would slow the test down.
        let kind = if (*manager, info & 0xF0) == writer::SWITCH {
            (21, 0)
        } else {
            (*manager, *info)
        };
        wal.record_of(kind, body);
        input = rest;
    }
    wal
}

fuzz_target!(|input: &[u8]| {
    let [version, cuts, mode, input @ ..] = input else {
        return;
    };
    let version = PgVersion::ALL[usize::from(*version) % PgVersion::ALL.len()];
    let is_records = mode % 2 == 1;
    let wal = if is_records {
        records(version, input)
    } else {
        let mut wal = WalWriter::new(version, START);
        // Seeds are real WAL, so take the start and the cluster from it.
        wal.bytes = input.to_vec();
        if let Some(page) = wal_format::page::PageHeader::parse(input) {
            wal.start = Lsn(page.address.0 & !((1 << 20) - 1));
            if let Some(long) = page.long {
                wal.identity.system_identifier =
                    wal_format::SystemIdentifier(long.system_identifier);
            }
        }
        wal
    };
    let cuts = usize::from(*cuts) * 33 + 1;
    let (identity, start) = (wal.identity, wal.start);
    let whole = decode(identity, start, usize::MAX, [wal.bytes.as_slice()]);
    let cut = decode(identity, start, usize::MAX, wal.bytes.chunks(cuts));
    assert!(whole == cut, "cut into pieces of {cuts}");
    if is_records && let Some(error) = whole.error {
        use DecodeErrorKind::{Body, ResourceManager};
        assert!(
            matches!(error.kind, Body | ResourceManager { .. }),
            "{error}"
        );
    }
    let mut indexer = WalIndexer::new(identity, start, None);
    let error = indexer.push(&wal.bytes).err();
    let summary = indexer.take_summary();
    assert!(summary.record_count as usize <= whole.seen.len());
    // The summary builder also refuses records whose body it cannot parse.
    assert!(error.is_some() || whole.error.is_none());
    let encoded = summary.encode(start);
    assert_eq!(
        wal_format::SegmentSummary::decode(start, &encoded).as_ref(),
        Ok(&summary)
    );
});
