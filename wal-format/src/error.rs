//! [`DecodeError`]: the reason and the position at which bytes are not valid WAL.

use crate::Lsn;

/// Bytes that are not valid WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{lsn}: {kind}")]
pub struct DecodeError {
    /// The start of the page or of the record.
    pub lsn: Lsn,
    /// The reason.
    pub kind: DecodeErrorKind,
}

/// The reason why bytes are not valid WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeErrorKind {
    /// The page's magic number belongs to another version, or to none.
    #[error("page magic {found:#06X}, expected {expected:#06X}")]
    PageMagic {
        /// The magic number of the version.
        expected: u16,
        /// The number found.
        found: u16,
    },
    /// The page header has unknown flags, or is of the wrong kind for its place.
    #[error("page header flags {found:#06X} are invalid here")]
    PageFlags {
        /// The flags found.
        found: u16,
    },
    /// The page's address differs from its position: old content of a recycled segment.
    #[error("page address {found}, which is not where the page is")]
    PageAddress {
        /// The address found.
        found: Lsn,
    },
    /// The timeline decreased from one page to the next, or is 0.
    #[error("page of timeline {found} after timeline {latest}")]
    PageTimeline {
        /// The timeline of the previous page.
        latest: u32,
        /// `xlp_tli`.
        found: u32,
    },
    /// The page belongs to another cluster.
    #[error("page of system identifier {found}")]
    SystemIdentifier {
        /// The system identifier found.
        found: u64,
    },
    /// The page belongs to WAL with another segment size or page size.
    #[error("page of segment size {segment_bytes} and page size {page_bytes}")]
    Sizes {
        /// `xlp_seg_size`.
        segment_bytes: u32,
        /// `xlp_xlog_blcksz`.
        page_bytes: u32,
    },
    /// The page does not continue a record that must continue on it, or continues an unexpected
    /// one, or one of another length.
    #[error("the page continues {found} bytes of a record, expected {expected}")]
    Continuation {
        /// The number of bytes left of the record.
        expected: u32,
        /// `xlp_rem_len`.
        found: u32,
    },
    /// No record begins here. A length of zero marks the end of WAL.
    #[error("record length {found}")]
    RecordLength {
        /// `xl_tot_len`.
        found: u32,
    },
    /// The record does not follow the previous one.
    #[error("record's previous is {found}, expected {expected}")]
    Previous {
        /// The start of the previous record.
        expected: Lsn,
        /// `xl_prev`.
        found: Lsn,
    },
    /// The resource manager does not exist.
    #[error("resource manager {found}")]
    ResourceManager {
        /// `xl_rmid`.
        found: u8,
    },
    /// The record's bytes are not those that were written.
    #[error("record CRC {found:#010X}, recorded {expected:#010X}")]
    Crc {
        /// `xl_crc`.
        expected: u32,
        /// The checksum of the bytes.
        found: u32,
    },
    /// The lengths in the record contradict each other, or a record of a known kind does not have
    /// the layout of its version.
    #[error("record body is malformed")]
    Body,
    /// The page voids the record before it, but its first record is not
    /// `XLOG_OVERWRITE_CONTRECORD`.
    #[error("the page voids the record before it, and its first record does not say so")]
    NoOverwrittenContrecord,
    /// `XLOG_OVERWRITE_CONTRECORD` names another record than the one that its page voids.
    #[error("the record voids {found}, and the record that is incomplete began at {expected}")]
    OverwrittenContrecord {
        /// The start of the incomplete record.
        expected: Lsn,
        /// `overwritten_lsn`.
        found: Lsn,
    },
    /// An error occurred earlier. Nothing more is decoded.
    #[error("decoding has stopped at an earlier error")]
    Stopped,
}
