//! Arbitrary bytes as a sealed object and as a summary. Also an object that is built here, in which
//! a flipped bit or a cut must be detected.
//!
//! Input: 0 for an object, 1 for a summary, 2 for an object built here (1 byte). For the last, the
//! position and the bit (3 bytes) precede the WAL.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wal_format::{
    Branch, Lsn, PgVersion, SealedFooter, SealedHeader, SealedReader, SealedWriter, SegmentSize,
    SegmentSummary, SystemIdentifier,
};

fn read(object: &[u8]) -> Option<Vec<u8>> {
    let mut wal = Vec::new();
    SealedReader::open(object).ok()?.read_all(&mut wal).ok()?;
    Some(wal)
}

fuzz_target!(|input: &[u8]| {
    let Some((mode, input)) = input.split_first() else {
        return;
    };
    match mode % 3 {
        0 => {
            let wal = read(input);
            let tail = &input[input.len() / 2..];
            let _ = SealedFooter::from_tail(input.len() as u64, tail);
            if wal.is_some() {
                assert!(SealedFooter::from_tail(input.len() as u64, input).is_ok());
            }
        }
        1 => {
            let base = Lsn(1 << 24);
            if let Ok(summary) = SegmentSummary::decode(base, input) {
                let again = SegmentSummary::decode(base, &summary.encode(base));
                assert_eq!(again.as_ref(), Ok(&summary));
            }
        }
        _ => {
            let [low, high, bit, wal @ ..] = input else {
                return;
            };
            if wal.is_empty() {
                return;
            }
            let header = SealedHeader {
                system_identifier: SystemIdentifier(7),
                version: PgVersion::V18,
                branch: Branch::FIRST,
                segment_size: SegmentSize::DEFAULT,
                start_lsn: Lsn(1 << 24),
                end_lsn: Lsn((1 << 24) + wal.len() as u64),
            };
            let mut writer = SealedWriter::new(header, 1).expect("a writer");
            writer.push(wal).expect("it fits");
            let mut object = writer
                .finish(&SegmentSummary::default(), None)
                .expect("it ends");
            assert!(read(&object).as_deref() == Some(wal));
            let at = usize::from(u16::from_le_bytes([*low, *high])) % object.len();
            assert!(read(&object[..at]).is_none(), "cut at {at}");
            object[at] ^= 1 << (bit % 8);
            assert!(read(&object).is_none(), "bit {} of byte {at}", bit % 8);
        }
    }
});
