//! Compares an object in the repository with the WAL that it must contain, and stores WAL.
//!
//! Invariant: a range counts as stored only if its object contains all of it, byte for byte.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use repository::{CrashPoint, Repository, is_sound};
use wal_format::{
    ObjectKey, PgTimestamp, SealedHeader, SealedReader, SealedWriter, SegmentSummary,
    sealed::{FRAME_BYTES, ProvedCompressor, SealedError},
};

use crate::error::{Error, Result};

/// A range of WAL in a file, from which an object is made or with which it is compared.
#[derive(Clone, Copy, Debug)]
pub struct WalSource<'a> {
    /// The open file.
    pub file: &'a File,
    /// The file's path, for messages.
    pub path: &'a Path,
    /// The offset in the file at which the range begins.
    pub offset: u64,
    /// A description of the source, for messages.
    pub from: &'static str,
}

impl WalSource<'_> {
    /// Reads from `offset` in the range.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        self.file
            .read_exact_at(bytes, self.offset + offset)
            .map_err(Error::io("read", self.path))
    }
}

/// Compresses the range of `header`. Every frame is verified to contain its WAL.
///
/// # Errors
/// [`Error::Io`]; [`Error::Sealed`] when this machine computes incorrectly or has no memory.
pub fn seal_range(
    compression_level: i32,
    header: SealedHeader,
    summary: &SegmentSummary,
    proven: Option<PgTimestamp>,
    source: &WalSource<'_>,
) -> Result<Vec<u8>> {
    let broken = |source| Error::Sealed {
        object: header.key().to_string(),
        source,
    };
    let length = header.raw_bytes();
    let mut writer = SealedWriter::new(header, compression_level).map_err(broken)?;
    let mut compressor = ProvedCompressor::new(compression_level).map_err(broken)?;
    let mut buffer = vec![0; FRAME_BYTES];
    for number in 0.. {
        let offset = u64::from(number) * FRAME_BYTES as u64;
        if offset >= length {
            break;
        }
        let count = usize::try_from(length - offset).unwrap_or(FRAME_BYTES);
        let wal = &mut buffer[..count.min(FRAME_BYTES)];
        source.read_at(wal, offset)?;
        let frame = compressor.compress(number, wal).map_err(broken)?;
        writer.push_frame(&frame).map_err(broken)?;
    }
    writer.finish(summary, proven).map_err(broken)
}

/// Stores a sealed range of verified frames and reads it back. Returns its size in the repository.
/// Either the object reads back byte for byte as it was stored, or it is compared with the WAL of
/// `source`. After a whole segment, whose other copies are removed next, verifies that the
/// repository is that of this cluster.
///
/// # Errors
/// [`Error::Divergence`] when the repository has other WAL under this name; [`Error::Repository`].
pub fn put_wal(
    repository: &Repository,
    header: &SealedHeader,
    object: &[u8],
    source: &WalSource<'_>,
) -> Result<u64> {
    let key = header.key();
    match repository.put_unproved(&key, object) {
        // The existing object may differ in its compression or its `proven` time. Only its WAL
        // counts. A damaged object is handled below.
        Err(error) if error.is_conflict() => {}
        Err(repository::Error::Damaged { .. }) => {}
        outcome => {
            outcome?;
        }
    }
    let name = format!("{key} in {}", repository.url());
    let compare = || -> Result<u64> {
        let reached = CrashPoint::StoreReadBack.reach();
        reached.map_err(repository::Error::store("read back", &name))?;
        if repository.holds(&key, object)? {
            return Ok(object.len() as u64);
        }
        let stored = repository.get(&key)?;
        compare_wal(&stored, &name, header, source)?;
        Ok(stored.len() as u64)
    };
    let stored_bytes = match compare() {
        Err(error) if is_damage(&error) => {
            tracing::error!(%error, "a damaged object is put again");
            replace_damaged(repository, &key, object)?;
            // If the new object is damaged too, report it as a damaged object. The caller retries
            // it like any failed request.
            compare().map_err(|error| match error {
                Error::Sealed { source, .. } => Error::Repository(repository::Error::Damaged {
                    key: key.to_string(),
                    url: repository.url(),
                    problem: source.to_string(),
                }),
                error => error,
            })
        }
        outcome => outcome,
    }?;
    if header.is_whole_segment() {
        repository.confirm()?;
    }
    Ok(stored_bytes)
}

/// Returns true if an object cannot be what was stored, because its checksums do not match. Intact
/// bytes of another history are not damage.
fn is_damage(error: &Error) -> bool {
    matches!(
        error,
        Error::Sealed { .. } | Error::Repository(repository::Error::Damaged { .. })
    )
}

/// Replaces an object if it is damaged in every mirror.
fn replace_damaged(repository: &Repository, key: &ObjectKey, object: &[u8]) -> Result<()> {
    // Read it again: the bits may have changed during the transfer.
    match repository.get(key) {
        Ok(stored) if is_sound(key, &stored) => return Ok(()),
        Ok(_) | Err(repository::Error::Damaged { .. } | repository::Error::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    repository.delete(key)?;
    match repository.put(key, object) {
        Err(error) if error.is_conflict() => Ok(()),
        outcome => Ok(outcome.map(drop)?),
    }
}

/// Compares the object `name` with the range of `header` in `source`. The object may continue after
/// the range.
///
/// # Errors
/// [`Error::Divergence`] when it contains other WAL; [`Error::Sealed`] when it is damaged or does
/// not contain the whole range.
pub fn compare_wal(
    object: &[u8],
    name: &str,
    header: &SealedHeader,
    source: &WalSource<'_>,
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
        source.read_at(&mut ours, lsn.bytes_since(header.start_lsn))?;
        // Compare whole frames first. The byte-by-byte search is slow and needed only if they
        // differ.
        if ours != bytes
            && let Some(index) = ours.iter().zip(bytes).position(|(new, old)| new != old)
        {
            return Err(Error::Divergence {
                branch: header.branch,
                lsn: lsn.add(index as u64),
                from: source.from,
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

    /// The range does not begin at the start of the file.
    const OFFSET: u64 = 3;

    fn file(wal: &[u8]) -> File {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(wal, OFFSET).expect("it has room");
        file
    }

    fn source(file: &File) -> WalSource<'_> {
        WalSource {
            file,
            path: Path::new("it"),
            offset: OFFSET,
            from: "a test",
        }
    }

    fn object(wal: &[u8]) -> Vec<u8> {
        let mut writer = SealedWriter::new(header(wal.len() as u64), 1).expect("a writer");
        writer.push(wal).expect("it has room");
        writer
            .finish(&SegmentSummary::default(), None)
            .expect("it is whole")
    }

    /// A damaged object is replaced while its WAL is available. Intact bytes of another history
    /// stay.
    #[test]
    fn a_damaged_object_is_put_again_and_another_history_is_not() {
        let folder = tempfile::tempdir().expect("a directory");
        let url: repository::config::RepositoryUrl = format!("file://{}", folder.path().display())
            .parse()
            .expect("a URL");
        let cluster = "main".parse().expect("a name");
        let repository = Repository::open(&url.into(), &cluster).expect("it opens");
        let wal: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let (header, good) = (header(wal.len() as u64), object(&wal));
        let path = folder.path().join(format!("main/{}", header.key()));
        let file = file(&wal);
        let put = || put_wal(&repository, &header, &good, &source(&file));
        put().expect("it is put");
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for damage in [&flipped[..], &good[..good.len() - 9], b"", b"<Error/>"] {
            std::fs::remove_file(&path).expect("it goes");
            std::fs::write(&path, damage).expect("a file");
            put().expect("it is put again");
            assert!(std::fs::read(&path).expect("an object") == good);
        }
        let mut other = wal;
        other[250_000] ^= 1;
        std::fs::remove_file(&path).expect("it goes");
        std::fs::write(&path, object(&other)).expect("a file");
        let refused = put().expect_err("another history");
        assert!(matches!(refused, Error::Divergence { .. }), "{refused}");
        assert!(std::fs::read(&path).expect("an object") == object(&other));
    }

    #[test]
    fn a_range_is_held_only_when_all_of_it_is_there_and_equal() {
        let wal: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let compare = |held: &[u8], asked: &[u8]| {
            let header = header(asked.len() as u64);
            compare_wal(&object(held), "it", &header, &source(&file(asked)))
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
