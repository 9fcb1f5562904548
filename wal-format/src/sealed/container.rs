//! The constants, the parts and the errors of the container, and the checks that all of its parts
//! share.

use crate::{Lsn, summary::DecodeSummaryError, system::UnsupportedVersion};

/// The version of the container that this build writes, and the newest that it reads.
///
/// Version 2 has the same layout as version 1. Its summary also records tablespaces, so a summary
/// without such an event proves that the range creates and drops none.
pub const FORMAT_VERSION: u16 = 2;
/// The oldest version that this build reads.
const FORMAT_VERSION_MIN: u16 = 1;
/// The first version whose summary records tablespaces.
pub(super) const FORMAT_VERSION_WITH_TABLESPACES: u16 = 2;

/// The raw bytes in every frame except the last. Frames of 256 KiB need 2 % more space, frames of 4
/// MiB 1 % less.
pub const FRAME_BYTES: usize = 1 << 20;

/// The maximum raw bytes in a frame by any writer, and so the memory that a reader must be able to
/// allocate.
pub const FRAME_BYTES_MAX: usize = 16 << 20;

/// The zstd level for new objects, unless configured.
///
/// Measured once on pgbench WAL of PostgreSQL 17, frames of 1 MiB, one core; ratio and MB/s of raw
/// WAL:
///
/// | | 256 MiB with full page images | 64 MiB without any |
/// |---|---|---|
/// | lz4 -1, linked blocks of 64 KiB | 7.69 | 2.00 |
/// | zstd 1 | 13.21, 990 | 2.92, 350 |
/// | zstd 3 | 13.60, 720 | 2.93, 200 |
/// | zstd 6 | 14.51, 150 | 3.07, 73 |
/// | our level 1 | 13.54, 970 | 2.97, 340 |
/// | our levels 2 to 4 | 13.65, 860 | 2.99, 290 |
///
/// Long-distance matching and frames of 4 MiB gain less than 1 % and cost up to half of the speed.
pub const DEFAULT_LEVEL: i32 = 1;

/// Magic number of our skippable frames (zstd reserves 0x184D2A50 to 0x184D2A5F).
pub(super) const SKIPPABLE_MAGIC: u32 = 0x184D_2A54;

/// Bytes before a skippable frame's payload: the magic number and the payload's length.
pub(super) const SKIPPABLE_HEADER_BYTES: usize = 8;

/// The first bytes in the header's payload and the last in the object.
pub(super) const MAGIC: [u8; 8] = *b"TIDEMARK";

/// A part of the container, for errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealedPart {
    /// The header.
    Header,
    /// The zstd frame with this number, from 0.
    Frame(u32),
    /// The summary.
    Summary,
    /// The footer.
    Footer,
}

impl std::fmt::Display for SealedPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::Frame(number) => write!(f, "frame {number}"),
            Self::Summary => f.write_str("summary"),
            Self::Footer => f.write_str("footer"),
        }
    }
}

/// The reason why a container cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SealedError {
    /// The part's bytes are not those that were written.
    #[error("{part} is damaged: CRC-32 is {found:08x}, stored is {stored:08x}")]
    Checksum {
        /// The part.
        part: SealedPart,
        /// The stored checksum.
        stored: u32,
        /// The checksum of the bytes that were read.
        found: u32,
    },
    /// The compressor failed, for lack of memory.
    #[error("compress {part}: {source}")]
    Compress {
        /// The part.
        part: SealedPart,
        /// The compressor's error.
        source: std::io::Error,
    },
    /// The part's compressed bytes do not decompress to the announced length.
    #[error("{part} does not decompress to the {expected} bytes announced")]
    Decompress {
        /// The part.
        part: SealedPart,
        /// The announced number of bytes.
        expected: usize,
    },
    /// The amount of WAL differs from the header.
    #[error("the header announces {expected} bytes of WAL, {found} were given")]
    Length {
        /// The number of bytes in the header.
        expected: u64,
        /// The number of bytes given.
        found: u64,
    },
    /// The part's checksum is correct but its content contradicts itself or other parts.
    #[error("{part} is malformed: {problem}")]
    Malformed {
        /// The part.
        part: SealedPart,
        /// The problem.
        problem: &'static str,
    },
    /// The bytes are not a container of ours, or the beginning or the end is missing.
    #[error("no sealed WAL: the {part}'s magic is missing; the object is foreign or was cut off")]
    NotSealed {
        /// The part that was expected.
        part: SealedPart,
    },
    /// The requested WAL is not in this object.
    #[error(
        "{start_lsn} to {end_lsn} was asked of an object that holds {held_start} to {held_end}"
    )]
    OutOfRange {
        /// The requested start.
        start_lsn: Lsn,
        /// The requested end.
        end_lsn: Lsn,
        /// The start of the object's WAL.
        held_start: Lsn,
        /// The end of the object's WAL.
        held_end: Lsn,
    },
    /// The header's range is empty or not inside one segment.
    #[error("{start_lsn} to {end_lsn} is no range inside one WAL segment")]
    Range {
        /// The start.
        start_lsn: Lsn,
        /// The end.
        end_lsn: Lsn,
    },
    /// The summary cannot be decoded.
    #[error("summary is malformed: {0}")]
    Summary(#[from] DecodeSummaryError),
    /// The object is too short.
    #[error("{part} is cut off: it needs {needed} bytes, {found} are left")]
    Truncated {
        /// The part.
        part: SealedPart,
        /// The number of bytes needed.
        needed: u64,
        /// The number of bytes available.
        found: u64,
    },
    /// The object is compressed with a codec that this build does not know.
    #[error("codec {found} is unknown to this build; a newer Tidemark wrote the object")]
    UnsupportedCodec {
        /// The codec's number.
        found: u8,
    },
    /// The object was written by a newer Tidemark.
    #[error(
        "sealed WAL of format version {found}; this build reads up to version {FORMAT_VERSION}, use the Tidemark that wrote it or a newer one"
    )]
    UnsupportedFormat {
        /// The object's format version.
        found: u16,
    },
    /// The PostgreSQL version is unknown to this build.
    #[error(transparent)]
    UnsupportedPostgres(#[from] UnsupportedVersion),
}

/// Refuses a version that this build does not read.
pub(super) fn check_version(found: u16) -> Result<u16, SealedError> {
    if (FORMAT_VERSION_MIN..=FORMAT_VERSION).contains(&found) {
        Ok(found)
    } else {
        Err(SealedError::UnsupportedFormat { found })
    }
}

pub(super) fn check_crc(part: SealedPart, stored: u32, bytes: &[u8]) -> Result<(), SealedError> {
    let found = crc32fast::hash(bytes);
    if found == stored {
        Ok(())
    } else {
        Err(SealedError::Checksum {
            part,
            stored,
            found,
        })
    }
}

/// Returns the fixed-length field at `at`, or `None` if `bytes` is too short.
pub(super) fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}
