//! [`DecodeError`]: why bytes are not valid WAL, and where.

use crate::Lsn;

/// Bytes that are not valid WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{lsn}: {kind}")]
pub struct DecodeError {
    /// Where: the start of the page, or of the record.
    pub lsn: Lsn,
    /// Why.
    pub kind: DecodeErrorKind,
}

/// Why bytes are not valid WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeErrorKind {
    /// The page's magic number is of another version, or none.
    #[error("page magic {found:#06X}, expected {expected:#06X}")]
    PageMagic {
        /// What the version writes.
        expected: u16,
        /// What is there.
        found: u16,
    },
    /// The page header has flags that do not exist, or the wrong kind of header for its place.
    #[error("page header flags {found:#06X} are invalid here")]
    PageFlags {
        /// What is there.
        found: u16,
    },
    /// The page says that it belongs elsewhere: a recycled segment's old content.
    #[error("page address {found}, which is not where the page is")]
    PageAddress {
        /// What is there.
        found: Lsn,
    },
    /// The timeline went back from one page to the next, or is none.
    #[error("page of timeline {found} after timeline {latest}")]
    PageTimeline {
        /// The timeline of the page before.
        latest: u32,
        /// `xlp_tli`.
        found: u32,
    },
    /// The page belongs to another cluster.
    #[error("page of system identifier {found}")]
    SystemIdentifier {
        /// What is there.
        found: u64,
    },
    /// The page belongs to WAL of another segment size or page size.
    #[error("page of segment size {segment_bytes} and page size {page_bytes}")]
    Sizes {
        /// `xlp_seg_size`.
        segment_bytes: u32,
        /// `xlp_xlog_blcksz`.
        page_bytes: u32,
    },
    /// A record has to continue on this page and does not, or the reverse, or with another length.
    #[error("the page continues {found} bytes of a record, expected {expected}")]
    Continuation {
        /// What is left of the record.
        expected: u32,
        /// `xlp_rem_len`.
        found: u32,
    },
    /// No record begins here: zero is how WAL ends.
    #[error("record length {found}")]
    RecordLength {
        /// `xl_tot_len`.
        found: u32,
    },
    /// The record does not follow the one before.
    #[error("record's previous is {found}, expected {expected}")]
    Previous {
        /// The start of the record before.
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
    /// The record's bytes are not what was written.
    #[error("record CRC {found:#010X}, recorded {expected:#010X}")]
    Crc {
        /// `xl_crc`.
        expected: u32,
        /// Of the bytes.
        found: u32,
    },
    /// The lengths in the record contradict each other, or a record of a kind we read does not have the layout of its
    /// version.
    #[error("record body is malformed")]
    Body,
    /// The page voids the record before it, but its first record is no `XLOG_OVERWRITE_CONTRECORD`.
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
    /// An earlier error: nothing more is decoded.
    #[error("decoding has stopped at an earlier error")]
    Stopped,
}
