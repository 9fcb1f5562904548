//! WAL of real servers, 13 to 18, and the output of `pg_waldump` for it.
//!
//! `fixtures` contains the first 304 KiB of a segment with every index type, prepared transactions,
//! subtransactions and page images of every compression. The text lists the records that end in it,
//! printed with `TZ=UTC`.
//! `TIDEMARK_FIXTURES=DIR cargo test --release -p benches --test decoder golden` creates them
//! again, and `zstd -19` compresses them.

use std::path::Path;

use wal_format::{
    Lsn, PgVersion, SegmentSize, SystemIdentifier, TransactionEndKind, WalEvent, WalIdentity,
    page::PageHeader,
};

use crate::waldump::{self, Line};

/// Reads a fixture that is not compressed.
pub(crate) fn read_plain(name: &str) -> Vec<u8> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::fs::read(directory.join(name)).expect(name)
}

/// Reads a compressed fixture.
pub(crate) fn read(name: &str) -> Vec<u8> {
    zstd::decode_all(read_plain(name).as_slice()).expect(name)
}

/// Returns the identity, the start and the bytes of this version's WAL.
pub(crate) fn wal(version: PgVersion) -> (WalIdentity, Lsn, Vec<u8>) {
    let bytes = read(&format!("pg{version}.wal.zst"));
    let page = PageHeader::parse(&bytes).expect("a page header");
    let long = page.long.expect("of a segment's first page");
    let identity = WalIdentity {
        version: PgVersion::from_page_magic(page.magic).expect("a known version"),
        system_identifier: SystemIdentifier(long.system_identifier),
        segment_size: SegmentSize::new(u64::from(long.segment_bytes)).expect("a size"),
    };
    assert_eq!(identity.version, version);
    (identity, page.address, bytes)
}

#[test]
fn every_record_is_the_one_that_pg_waldump_printed() {
    for version in PgVersion::ALL {
        let (identity, start, bytes) = wal(version);
        let text = String::from_utf8(read(&format!("pg{version}.waldump.zst"))).expect("text");
        let theirs = text.lines().map(|line| Line::parse(line).expect(line));
        for pieces in [bytes.len(), 8192, 100, 1] {
            let (ours, _) = waldump::lines(identity, start, bytes.chunks(pieces)).expect("WAL");
            for (ours, theirs) in ours.iter().zip(theirs.clone()) {
                assert_eq!(*ours, theirs, "PostgreSQL {version}");
            }
            assert_eq!(ours.len(), theirs.clone().count(), "PostgreSQL {version}");
            assert!(ours.len() > 900, "PostgreSQL {version}: {}", ours.len());
        }
    }
}

#[test]
fn the_summary_knows_every_end_of_a_transaction() {
    for version in PgVersion::ALL {
        let (identity, start, bytes) = wal(version);
        let (lines, summary) = waldump::lines(identity, start, [bytes.as_slice()]).expect("WAL");
        let ends = lines.iter().filter(|line| line.end.is_some()).count();
        let prepared = summary
            .events
            .iter()
            .filter(|(_, event)| matches!(event, WalEvent::Prepare { .. }));
        assert_eq!(summary.transactions.len() + prepared.count(), ends);
        let of = |kind| {
            summary
                .transactions
                .iter()
                .filter(move |end| end.kind == kind)
                .count()
        };
        assert!(of(TransactionEndKind::Commit) > 5 && of(TransactionEndKind::Abort) > 5);
        assert!(
            of(TransactionEndKind::CommitPrepared) > 0,
            "PostgreSQL {version}"
        );
        assert_eq!(summary.record_count, lines.len() as u64);
    }
}
