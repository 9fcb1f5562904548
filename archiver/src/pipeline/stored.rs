//! What lies in the repository under a name, compared with the WAL that it has to hold.
//!
//! Invariant: nothing counts as stored whose object does not cover its whole range, byte for byte.

use repository::Repository;
use wal_format::{SealedHeader, SealedReader, sealed::SealedError};

use crate::error::{Error, Result};

/// Puts a sealed range, reads it back and compares it with the WAL it was made of; its size in the repository.
///
/// # Errors
/// [`Error::Divergence`] when the repository has other WAL under this name; [`Error::Repository`].
pub fn put_wal(
    repository: &Repository,
    header: &SealedHeader,
    object: &[u8],
    from: &'static str,
    wal: &dyn Fn(&mut [u8], u64) -> Result<()>,
) -> Result<u64> {
    let key = header.key();
    match repository.put(&key, object) {
        // Made again it may differ in its compression or its proof; what counts is the WAL in it.
        Err(error) if error.is_conflict() => {}
        outcome => {
            outcome?;
        }
    }
    let stored = repository.get(&key)?;
    let name = format!("{key} in {}", repository.url());
    compare_wal(&stored, &name, header, from, wal)?;
    Ok(stored.len() as u64)
}

/// Compares the object `name` with the range of `header` as `wal` yields it, by the offset from its start. The object may
/// go on behind the range.
///
/// # Errors
/// [`Error::Divergence`] when it holds other WAL; [`Error::Sealed`] when it is damaged or does not hold the whole range.
pub fn compare_wal(
    object: &[u8],
    name: &str,
    header: &SealedHeader,
    from: &'static str,
    wal: &dyn Fn(&mut [u8], u64) -> Result<()>,
) -> Result<()> {
    let damaged = |source| Error::Sealed {
        object: name.to_owned(),
        source,
    };
    let reader = SealedReader::open(object).map_err(damaged)?;
    let held = reader.header();
    if held.start_lsn != header.start_lsn || held.end_lsn < header.end_lsn {
        return Err(damaged(SealedError::OutOfRange {
            start_lsn: header.start_lsn,
            end_lsn: header.end_lsn,
            held_start: held.start_lsn,
            held_end: held.end_lsn,
        }));
    }
    let mut ours = Vec::new();
    let mut frames = reader.frames().map_err(damaged)?;
    while let Some(frame) = frames.next() {
        let (lsn, bytes) = frame.map_err(damaged)?;
        if lsn >= header.end_lsn {
            break;
        }
        let wanted = usize::try_from(header.end_lsn.bytes_since(lsn)).unwrap_or(usize::MAX);
        let bytes = &bytes[..wanted.min(bytes.len())];
        ours.resize(bytes.len(), 0);
        wal(&mut ours, lsn.bytes_since(header.start_lsn))?;
        // The whole first: looking for the place byte by byte is for the day when they differ.
        if ours != bytes
            && let Some(index) = ours.iter().zip(bytes).position(|(new, old)| new != old)
        {
            return Err(Error::Divergence {
                branch: header.branch,
                lsn: lsn.add(index as u64),
                from,
                ours: name.to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use wal_format::{
        Branch, Lsn, PgVersion, SealedWriter, SegmentSize, SegmentSummary, SystemIdentifier,
    };

    use super::*;

    const START: u64 = 1 << 20;

    fn header(bytes: u64) -> SealedHeader {
        SealedHeader {
            system_identifier: SystemIdentifier(7),
            version: PgVersion::try_from(17).expect("a version"),
            branch: Branch::FIRST,
            segment_size: SegmentSize::new(1 << 20).expect("a size"),
            start_lsn: Lsn(START),
            end_lsn: Lsn(START + bytes),
        }
    }

    fn object(wal: &[u8]) -> Vec<u8> {
        let mut writer = SealedWriter::new(header(wal.len() as u64), 1).expect("a writer");
        writer.push(wal).expect("it has room");
        writer
            .finish(&SegmentSummary::default(), None)
            .expect("it is whole")
    }

    #[test]
    fn a_range_is_held_only_when_all_of_it_is_there_and_equal() {
        let wal: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let compare = |held: &[u8], asked: &[u8]| {
            let header = header(asked.len() as u64);
            let read = |bytes: &mut [u8], offset: u64| {
                let offset = usize::try_from(offset).expect("it is small");
                bytes.copy_from_slice(&asked[offset..offset + bytes.len()]);
                Ok(())
            };
            compare_wal(&object(held), "it", &header, "a test", &read)
        };
        compare(&wal, &wal).expect("the same");
        compare(&wal, &wal[..1000]).expect("its beginning");
        let short = compare(&wal[..200_000], &wal).expect_err("it ends before");
        assert!(matches!(short, Error::Sealed { .. }), "{short}");
        let mut other = wal.clone();
        other[250_000] ^= 1;
        let Err(Error::Divergence { lsn, .. }) = compare(&wal, &other) else {
            panic!("a difference was passed over");
        };
        assert_eq!(lsn, Lsn(START + 250_000));
    }
}
