//! The header: the origin of the WAL, its range, and its division into frames.
//!
//! It is a skippable zstd frame of fixed length. The footer repeats it, so that the object's end
//! alone describes the object. Magic, format version and CRC have the same position in every
//! version of the format.

use bytes::BufMut;

use super::container::{
    FORMAT_VERSION, FRAME_BYTES_MAX, MAGIC, SKIPPABLE_HEADER_BYTES, SKIPPABLE_MAGIC, SealedError,
    SealedPart, check_crc, check_version, field,
};
use crate::{
    Branch, Lsn, ObjectKey, PgVersion, SegmentName, SegmentNo, SegmentSize, SystemIdentifier,
    TimelineId,
};

/// zstd, the only codec.
const CODEC_ZSTD: u8 = 1;

/// The length of the whole header, including the skippable frame.
pub(super) const HEADER_BYTES: usize = 68;

/// The offset of the header's CRC-32, which covers everything before it.
const CRC_AT: usize = 64;

/// The content of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedHeader {
    /// The system identifier.
    pub system_identifier: SystemIdentifier,
    /// The PostgreSQL version.
    pub version: PgVersion,
    /// The timeline, with the digest of its history.
    pub branch: Branch,
    /// The cluster's `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// The first byte of WAL.
    pub start_lsn: Lsn,
    /// The first byte after the range. At most the end of the segment that contains `start_lsn`.
    pub end_lsn: Lsn,
}

impl SealedHeader {
    /// The header of a whole segment.
    #[must_use]
    pub fn of_segment(
        system_identifier: SystemIdentifier,
        version: PgVersion,
        branch: Branch,
        segment_size: SegmentSize,
        segment: SegmentNo,
    ) -> Self {
        Self {
            system_identifier,
            version,
            branch,
            segment_size,
            start_lsn: segment.start_lsn(segment_size),
            end_lsn: segment.end_lsn(segment_size),
        }
    }

    /// The segment that contains the range.
    #[must_use]
    pub fn segment(&self) -> SegmentNo {
        self.segment_size.segment_of(self.start_lsn)
    }

    /// The file name of the segment that contains the range.
    #[must_use]
    pub fn segment_name(&self) -> SegmentName {
        SegmentName::new(self.branch.timeline, self.segment(), self.segment_size)
    }

    /// Bytes of WAL.
    #[must_use]
    pub fn raw_bytes(&self) -> u64 {
        self.end_lsn.bytes_since(self.start_lsn)
    }

    /// Returns true if the range is a whole segment, not a tail.
    #[must_use]
    pub fn is_whole_segment(&self) -> bool {
        self.raw_bytes() == self.segment_size.bytes()
    }

    /// Returns the object's key in the repository.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let (system, name) = (self.system_identifier, self.segment_name());
        if self.is_whole_segment() {
            ObjectKey::Segment(system, self.branch, name)
        } else {
            ObjectKey::Tail(system, self.branch, name, self.start_lsn, self.end_lsn)
        }
    }

    /// Refuses a range that is empty or not inside one segment.
    pub(super) fn check_range(&self) -> Result<(), SealedError> {
        let inside = self.start_lsn < self.end_lsn
            && self.end_lsn <= self.segment().end_lsn(self.segment_size);
        if inside {
            Ok(())
        } else {
            Err(SealedError::Range {
                start_lsn: self.start_lsn,
                end_lsn: self.end_lsn,
            })
        }
    }

    /// Encodes the header, which is stored at the object's start and again in its footer.
    pub(super) fn encode(&self, frame_bytes: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.put_u32_le(SKIPPABLE_MAGIC);
        out.put_u32_le(skippable_len(HEADER_BYTES));
        out.put_slice(&MAGIC);
        out.put_u16_le(FORMAT_VERSION);
        out.put_u8(CODEC_ZSTD);
        out.put_u8(0);
        out.put_u16_le(self.version.major());
        out.put_u16_le(0);
        out.put_u64_le(self.system_identifier.0);
        out.put_u32_le(self.branch.timeline.get());
        out.put_slice(&self.branch.digest);
        out.put_u64_le(self.start_lsn.0);
        out.put_u64_le(self.end_lsn.0);
        out.put_u32_le(u32::from(self.segment_size));
        out.put_u32_le(u32::try_from(frame_bytes).expect("BUG: a frame of 4 GiB"));
        let crc = crc32fast::hash(&out);
        out.put_u32_le(crc);
        debug_assert_eq!(out.len(), HEADER_BYTES, "BUG: the header's length changed");
        out
    }

    /// Parses the header at the start of `bytes`. Returns the header, the raw bytes per frame and
    /// the format version.
    pub(super) fn parse(bytes: &[u8]) -> Result<(Self, usize, u16), SealedError> {
        let part = SealedPart::Header;
        let truncated = || SealedError::Truncated {
            part,
            needed: HEADER_BYTES as u64,
            found: bytes.len() as u64,
        };
        let magic = field(bytes, 0).map(u32::from_le_bytes);
        if magic != Some(SKIPPABLE_MAGIC) || field(bytes, SKIPPABLE_HEADER_BYTES) != Some(MAGIC) {
            return Err(SealedError::NotSealed { part });
        }
        let format = check_version(u16::from_le_bytes(field(bytes, 16).ok_or_else(truncated)?))?;
        let covered = bytes.get(..CRC_AT).ok_or_else(truncated)?;
        let stored = u32::from_le_bytes(field(bytes, CRC_AT).ok_or_else(truncated)?);
        check_crc(part, stored, covered)?;

        let malformed = |problem| SealedError::Malformed { part, problem };
        let u16_at = |at| {
            field(bytes, at)
                .map(u16::from_le_bytes)
                .ok_or_else(truncated)
        };
        let u32_at = |at| {
            field(bytes, at)
                .map(u32::from_le_bytes)
                .ok_or_else(truncated)
        };
        let u64_at = |at| {
            field(bytes, at)
                .map(u64::from_le_bytes)
                .ok_or_else(truncated)
        };
        if u32_at(4)? != skippable_len(HEADER_BYTES) {
            return Err(malformed("its length is not a header's"));
        }
        let [codec, reserved] = field(bytes, 18).ok_or_else(truncated)?;
        if codec != CODEC_ZSTD {
            return Err(SealedError::UnsupportedCodec { found: codec });
        }
        if reserved != 0 || u16_at(22)? != 0 {
            return Err(malformed("a reserved field is not zero"));
        }
        let timeline = TimelineId::new(u32_at(32)?).ok_or_else(|| malformed("timeline 0"))?;
        let segment_size = SegmentSize::try_from(u32_at(56)?)
            .map_err(|_| malformed("the segment size is none of PostgreSQL's"))?;
        let header = Self {
            system_identifier: SystemIdentifier(u64_at(24)?),
            version: PgVersion::try_from(u16_at(20)?)?,
            branch: Branch {
                timeline,
                digest: field(bytes, 36).ok_or_else(truncated)?,
            },
            segment_size,
            start_lsn: Lsn(u64_at(40)?),
            end_lsn: Lsn(u64_at(48)?),
        };
        header.check_range()?;
        let frame_bytes = usize::try_from(u32_at(60)?).unwrap_or(usize::MAX);
        if frame_bytes == 0 || frame_bytes > FRAME_BYTES_MAX {
            return Err(malformed("the frame size is not between 1 byte and 16 MiB"));
        }
        Ok((header, frame_bytes, format))
    }
}

/// Returns the length field of a skippable frame with a total length of `frame_bytes`.
pub(super) fn skippable_len(frame_bytes: usize) -> u32 {
    u32::try_from(frame_bytes.saturating_sub(SKIPPABLE_HEADER_BYTES))
        .expect("BUG: a skippable frame of 4 GiB")
}
