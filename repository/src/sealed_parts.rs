//! Reads parts of a sealed object without the rest of it: its footer, and the end of its WAL.
//!
//! Invariant: damaged data is an error and never returned.

use wal_format::{
    Lsn, ObjectKey,
    sealed::{FOOTER_LEN_HINT, FooterFromTail, FrameDecompressor, SealedError, SealedFooter},
};

#[cfg(doc)]
use crate::Error;
use crate::{Repository, Result};

impl Repository {
    /// Reads the footer of the object under `key`, which has `size` bytes.
    ///
    /// # Errors
    /// As [`Repository::get_range`]; [`Error::Damaged`].
    pub fn footer(&self, key: &ObjectKey, size: u64) -> Result<SealedFooter> {
        let mut wanted = FOOTER_LEN_HINT.min(size);
        loop {
            let tail = self.get_range(key, size - wanted..size)?;
            let footer = SealedFooter::from_tail(size, &tail);
            match footer.map_err(|error| self.damaged(key, error.to_string()))? {
                FooterFromTail::Complete(footer) => return Ok(*footer),
                FooterFromTail::NeedMore { bytes } if bytes > wanted && bytes <= size => {
                    wanted = bytes;
                }
                FooterFromTail::NeedMore { .. } => {
                    let problem = "its footer does not fit its length".to_owned();
                    return Err(self.damaged(key, problem));
                }
            }
        }
    }

    /// Reads the WAL from `lsn` to the end of the object under `key`, whose footer is `footer`.
    /// Only the frames that contain it are read.
    ///
    /// # Errors
    /// As [`Repository::get_range`]; [`Error::Damaged`].
    pub fn wal_from(&self, key: &ObjectKey, footer: &SealedFooter, lsn: Lsn) -> Result<Vec<u8>> {
        let outside = || self.damaged(key, format!("{lsn} lies outside of it"));
        let skip = lsn.0.checked_sub(footer.header().start_lsn.0);
        let first = skip.and_then(|skip| skip.checked_div(footer.frame_bytes() as u64));
        let first = first.ok_or_else(outside)?;
        let first_number = u32::try_from(first).map_err(|_| outside())?;
        let index = usize::try_from(first).map_err(|_| outside())?;
        let entries = footer.entries().get(index..).unwrap_or_default();
        let stored: u64 = entries
            .iter()
            .map(|entry| u64::from(entry.stored_bytes))
            .sum();
        let range = footer.frame_range(first_number).ok_or_else(outside)?;
        let object = self.get_range(key, range.start..range.start + stored)?;
        let mut wal = Vec::new();
        decompress(&object, footer, first_number, &mut wal)
            .map_err(|error| self.damaged(key, error.to_string()))?;
        let before = lsn.bytes_since(footer.frame_start_lsn(first_number));
        let before = usize::try_from(before).unwrap_or(usize::MAX);
        wal.drain(..before.min(wal.len()));
        Ok(wal)
    }
}

/// Decompresses the frames from `first` on.
fn decompress(
    mut stored: &[u8],
    footer: &SealedFooter,
    first: u32,
    wal: &mut Vec<u8>,
) -> std::result::Result<(), SealedError> {
    let mut decompressor = FrameDecompressor::new()?;
    let index = usize::try_from(first).unwrap_or(usize::MAX);
    let entries = footer.entries().get(index..).unwrap_or_default();
    for (number, entry) in (first..).zip(entries) {
        let bytes = usize::try_from(entry.stored_bytes).unwrap_or(usize::MAX);
        let (frame, behind) = stored.split_at(bytes.min(stored.len()));
        decompressor.append(number, *entry, frame, footer.frame_raw_bytes(number), wal)?;
        stored = behind;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use wal_format::{
        Branch, ClusterName, PgVersion, SealedHeader, SealedWriter, SegmentNo, SegmentSize,
        SegmentSummary, SystemIdentifier,
    };

    use super::*;

    #[test]
    fn the_end_of_an_object_comes_without_the_rest_and_never_damaged() {
        let folder = tempfile::tempdir().expect("a folder");
        let url = crate::config::RepositoryUrl::Folder(folder.path().to_owned());
        let cluster = "main".parse::<ClusterName>().expect("a name");
        let repository = Repository::open(&url.into(), &cluster).expect("it opens");
        let header = SealedHeader::of_segment(
            SystemIdentifier(7),
            PgVersion::try_from(17).expect("a version"),
            Branch::FIRST,
            SegmentSize::new(4 << 20).expect("a size"),
            SegmentNo(3),
        );
        let wal: Vec<u8> = (0..4_u32 << 20).map(|n| (n / 7 % 251) as u8).collect();
        let mut writer = SealedWriter::new(header, 1).expect("a writer");
        writer.push(&wal).expect("it has room");
        let object = writer
            .finish(&SegmentSummary::default(), None)
            .expect("whole");
        let key = header.key();
        repository.put(&key, &object).expect("it is stored");

        let footer = repository
            .footer(&key, object.len() as u64)
            .expect("its end");
        assert_eq!(*footer.header(), header);
        for skip in [0, 8192, 1 << 20, (3 << 20) + 8192, (4 << 20) - 1] {
            let lsn = header.start_lsn.add(skip as u64);
            let end = repository.wal_from(&key, &footer, lsn).expect("its WAL");
            assert!(end == wal[skip..], "{skip}");
        }
        for lsn in [Lsn(0), header.end_lsn.add(1 << 20)] {
            assert!(repository.wal_from(&key, &footer, lsn).is_err(), "{lsn}");
        }

        let path = folder.path().join(format!("main/{key}"));
        let mut broken = object.clone();
        let last = footer.frame_range(3).expect("a frame").start;
        broken[usize::try_from(last).expect("small") + 100] ^= 1;
        std::fs::write(&path, &broken).expect("a bit is flipped");
        let (early, late) = (header.start_lsn, header.start_lsn.add(3 << 20));
        assert!(repository.wal_from(&key, &footer, early).is_err());
        assert!(repository.wal_from(&key, &footer, late).is_err());
        broken.truncate(object.len() - 1);
        std::fs::write(&path, &broken).expect("it is cut short");
        assert!(repository.footer(&key, broken.len() as u64).is_err());
    }
}
