//! [`WalIndexer`]: WAL bytes in, as they arrive; every page and record checked; a [`SegmentSummary`] out.
//!
//! Memory is bounded: of a record it holds the header and, for the few kinds a restore has to know, the first
//! [`WINDOW_BYTES`]. Invariant: what counts as complete passed its CRC-32C, and follows the record before by `xl_prev`.

use crate::{
    Lsn, PgVersion, SegmentSize, SegmentSummary, SystemIdentifier,
    error::{DecodeError, DecodeErrorKind},
    lsn::PAGE_SIZE,
    rmgr,
};

/// `SizeOfXLogRecord`.
const RECORD_HEADER_BYTES: usize = 24;
/// `SizeOfXLogShortPHD` and `SizeOfXLogLongPHD`.
const SHORT_HEADER_BYTES: usize = 24;
const LONG_HEADER_BYTES: usize = 40;
/// `XLogRecordMaxSize` (16+), which no record of an older version reaches either.
const RECORD_BYTES_MAX: u32 = 1020 << 20;
/// How much of a record's body is kept for its meaning: a commit with 10,000 subtransactions and dropped files fits.
pub const WINDOW_BYTES: usize = 256 << 10;

const FIRST_IS_CONTRECORD: u16 = 1;
const LONG_HEADER: u16 = 2;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 8;
const ALL_FLAGS: u16 = 0xF;

/// Whose WAL it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalIdentity {
    /// The major version, which decides about layouts.
    pub version: PgVersion,
    /// The cluster.
    pub system_identifier: SystemIdentifier,
    /// Its segment size.
    pub segment_size: SegmentSize,
}

/// A streaming decoder and summary builder.
#[derive(Debug)]
pub struct WalIndexer {
    identity: WalIdentity,
    position: Lsn,
    page_header: Vec<u8>,
    state: State,
    /// The start of the record before, for `xl_prev`.
    previous: Option<Lsn>,
    valid_end_lsn: Lsn,
    summary: SegmentSummary,
    failed: bool,
}

#[derive(Debug)]
enum State {
    /// The first page has not said yet whether it continues a record.
    Start,
    /// The rest of a record whose start is not known.
    Skip { left: u32 },
    /// Between records; padding up to 8 is skipped.
    Between,
    /// Inside a record.
    Record(Box<Record>),
    /// After a switch: the rest of the segment is unused.
    Switched,
}

#[derive(Debug)]
struct Record {
    start_lsn: Lsn,
    header: Vec<u8>,
    /// Known as soon as its four bytes are there; they are never split.
    total: u32,
    got: u32,
    crc: u32,
    keep: bool,
    window: Vec<u8>,
}

impl WalIndexer {
    /// Starts at `start_lsn`, the start of a page. `previous` is the start of the record before, where known.
    #[must_use]
    pub fn new(identity: WalIdentity, start_lsn: Lsn, previous: Option<Lsn>) -> Self {
        Self {
            identity,
            position: start_lsn,
            page_header: Vec::with_capacity(LONG_HEADER_BYTES),
            state: State::Start,
            previous,
            valid_end_lsn: start_lsn,
            summary: SegmentSummary::default(),
            failed: false,
        }
    }

    /// The end of what was pushed.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The end of the last complete valid record, aligned to 8; the start, while there is none.
    #[must_use]
    pub fn valid_end_lsn(&self) -> Lsn {
        self.valid_end_lsn
    }

    /// What was completed since the last call, or since the start.
    pub fn take_summary(&mut self) -> SegmentSummary {
        let mut summary = std::mem::take(&mut self.summary);
        summary.open_record_lsn = match &self.state {
            State::Record(record) => Some(record.start_lsn),
            _ => None,
        };
        summary
    }

    /// Decodes the next bytes.
    ///
    /// # Errors
    /// [`DecodeError`] at the first invalid page or record; after it nothing more is decoded.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        if self.failed {
            return Err(self.error(self.position, DecodeErrorKind::Stopped));
        }
        let outcome = self.decode(bytes);
        self.failed = outcome.is_err();
        outcome
    }

    fn decode(&mut self, mut bytes: &[u8]) -> Result<(), DecodeError> {
        while !bytes.is_empty() {
            let page_offset = usize::try_from(self.position.page_offset()).unwrap_or_default();
            let header_bytes = self.page_header_bytes();
            if page_offset < header_bytes {
                let wanted = header_bytes.saturating_sub(page_offset);
                let (now, rest) = split(bytes, wanted);
                self.page_header.extend_from_slice(now);
                self.advance(now.len());
                bytes = rest;
                if self.page_header.len() == header_bytes {
                    self.page()?;
                    self.page_header.clear();
                }
                continue;
            }
            let page_bytes = usize::try_from(PAGE_SIZE).unwrap_or_default();
            let (mut now, rest) = split(bytes, page_bytes.saturating_sub(page_offset));
            bytes = rest;
            while !now.is_empty() {
                let taken = self.page_data(now)?;
                self.advance(taken);
                now = now.get(taken..).unwrap_or_default();
                self.complete()?;
            }
        }
        Ok(())
    }

    fn page_header_bytes(&self) -> usize {
        let page = self.position.align_down(PAGE_SIZE);
        if self.identity.segment_size.offset_of(page) == 0 {
            LONG_HEADER_BYTES
        } else {
            SHORT_HEADER_BYTES
        }
    }

    fn advance(&mut self, bytes: usize) {
        self.position = self.position.add(bytes as u64);
    }

    fn error(&self, lsn: Lsn, kind: DecodeErrorKind) -> DecodeError {
        DecodeError { lsn, kind }
    }

    /// Checks a page header that is complete (`XLogPageHeaderData`).
    fn page(&mut self) -> Result<(), DecodeError> {
        let header = self.page_header.as_slice();
        let page = self.position.align_down(PAGE_SIZE);
        // The position stands behind the header, which for a header that fills to a page end can not happen.
        let fail = |kind| Err(DecodeError { lsn: page, kind });
        let unused = matches!(self.state, State::Switched) && header.iter().all(|byte| *byte == 0);
        if unused && header.len() == SHORT_HEADER_BYTES {
            // Behind a switch the server may leave pages that it never initialised.
            return Ok(());
        }
        let magic = u16_at(header, 0);
        let expected = self.identity.version.page_magic();
        if magic != expected {
            return fail(DecodeErrorKind::PageMagic {
                expected,
                found: magic,
            });
        }
        let flags = u16_at(header, 2);
        let long = header.len() == LONG_HEADER_BYTES;
        if flags & !ALL_FLAGS != 0 || (flags & LONG_HEADER != 0) != long {
            return fail(DecodeErrorKind::PageFlags { found: flags });
        }
        let address = Lsn(u64_at(header, 8));
        if address != page {
            return fail(DecodeErrorKind::PageAddress { found: address });
        }
        if long {
            let found = u64_at(header, 24);
            if found != self.identity.system_identifier.0 {
                return fail(DecodeErrorKind::SystemIdentifier { found });
            }
            let (segment_bytes, page_bytes) = (u32_at(header, 32), u32_at(header, 36));
            if u64::from(segment_bytes) != self.identity.segment_size.bytes()
                || u64::from(page_bytes) != PAGE_SIZE
            {
                return fail(DecodeErrorKind::Sizes {
                    segment_bytes,
                    page_bytes,
                });
            }
        }
        let continues = flags & FIRST_IS_CONTRECORD != 0;
        let found = if continues { u32_at(header, 16) } else { 0 };
        let expected = match &self.state {
            State::Start => {
                self.state = if found > 0 {
                    State::Skip { left: found }
                } else {
                    State::Between
                };
                return Ok(());
            }
            State::Switched => {
                if self.identity.segment_size.offset_of(page) == 0 {
                    self.state = State::Between;
                }
                0
            }
            State::Between => 0,
            State::Skip { left } => *left,
            State::Record(record) => record.total.saturating_sub(record.got),
        };
        if expected > 0 && flags & FIRST_IS_OVERWRITE_CONTRECORD != 0 {
            // The server crashed inside this record: it is void, and the page begins anew (`CreateOverwriteContrecordRecord`).
            self.state = State::Between;
            return Ok(());
        }
        if expected != found {
            return fail(DecodeErrorKind::Continuation { expected, found });
        }
        Ok(())
    }

    /// Takes bytes of a page behind its header; how many.
    fn page_data(&mut self, bytes: &[u8]) -> Result<usize, DecodeError> {
        match &mut self.state {
            State::Switched => Ok(bytes.len()),
            State::Start | State::Between => self.between(bytes),
            State::Skip { left } => {
                let taken = bytes.len().min(*left as usize);
                *left = left.saturating_sub(u32::try_from(taken).unwrap_or(u32::MAX));
                if *left == 0 {
                    self.state = State::Between;
                }
                Ok(taken)
            }
            State::Record(record) => {
                let in_header = record.header.len() < RECORD_HEADER_BYTES;
                let wanted = if in_header {
                    RECORD_HEADER_BYTES.saturating_sub(record.header.len())
                } else {
                    record.total.saturating_sub(record.got) as usize
                };
                let (now, _) = split(bytes, wanted);
                record.got = record
                    .got
                    .saturating_add(u32::try_from(now.len()).unwrap_or(u32::MAX));
                if in_header {
                    record.header.extend_from_slice(now);
                    if record.header.len() == RECORD_HEADER_BYTES {
                        self.record_header()?;
                    } else if record.total == 0 && record.header.len() >= 4 {
                        record.total = total_of(record)?;
                    }
                } else {
                    record.crc = crc32c::crc32c_append(record.crc, now);
                    if record.keep {
                        let room = WINDOW_BYTES.saturating_sub(record.window.len());
                        record.window.extend_from_slice(split(now, room).0);
                    }
                }
                Ok(now.len())
            }
        }
    }

    /// Skips padding, or begins a record.
    fn between(&mut self, bytes: &[u8]) -> Result<usize, DecodeError> {
        let padding = self.position.align_up(8).bytes_since(self.position);
        if padding > 0 {
            return Ok(bytes
                .len()
                .min(usize::try_from(padding).unwrap_or_default()));
        }
        self.state = State::Record(Box::new(Record {
            start_lsn: self.position,
            header: Vec::with_capacity(RECORD_HEADER_BYTES),
            total: 0,
            got: 0,
            crc: 0,
            keep: false,
            window: Vec::new(),
        }));
        Ok(0)
    }

    /// Checks a record header that is complete (`XLogRecord`, `ValidXLogRecordHeader`).
    fn record_header(&mut self) -> Result<(), DecodeError> {
        let State::Record(record) = &mut self.state else {
            return Ok(());
        };
        record.total = total_of(record)?;
        let fail = |kind| {
            Err(DecodeError {
                lsn: record.start_lsn,
                kind,
            })
        };
        let found = Lsn(u64_at(&record.header, 8));
        match self.previous {
            Some(expected) if found != expected => {
                return fail(DecodeErrorKind::Previous { expected, found });
            }
            None if found >= record.start_lsn => {
                let expected = record.start_lsn;
                return fail(DecodeErrorKind::Previous { expected, found });
            }
            _ => {}
        }
        let (info, rmid) = (u8_at(&record.header, 16), u8_at(&record.header, 17));
        let custom = rmid >= 128 && self.identity.version >= PgVersion::V15;
        if rmid > 21 && !custom {
            return fail(DecodeErrorKind::ResourceManager { found: rmid });
        }
        record.keep = rmgr::is_of_interest(rmid, info);
        Ok(())
    }

    /// Completes the record whose last byte was taken.
    fn complete(&mut self) -> Result<(), DecodeError> {
        let done = matches!(&self.state, State::Record(record)
            if record.header.len() == RECORD_HEADER_BYTES && record.got == record.total);
        if !done {
            return Ok(());
        }
        let State::Record(record) = std::mem::replace(&mut self.state, State::Between) else {
            return Ok(());
        };
        let expected = u32_at(&record.header, 20);
        let found = crc32c::crc32c_append(record.crc, record.header.get(..20).unwrap_or_default());
        let start_lsn = record.start_lsn;
        if found != expected {
            return Err(self.error(start_lsn, DecodeErrorKind::Crc { expected, found }));
        }
        let (xid, info, rmid) = (
            u32_at(&record.header, 4),
            u8_at(&record.header, 16),
            u8_at(&record.header, 17),
        );
        if record.keep {
            let facts = rmgr::RecordFacts {
                version: self.identity.version,
                lsn: start_lsn,
                xid,
                info,
                rmid,
                body: &record.window,
                whole: record.window.len().saturating_add(RECORD_HEADER_BYTES)
                    == record.total as usize,
            };
            rmgr::read(&facts, &mut self.summary)
                .ok_or_else(|| self.error(start_lsn, DecodeErrorKind::Body))?;
        }
        let mut end = self.position.align_up(8);
        if rmgr::is_switch(rmid, info) {
            self.state = State::Switched;
            let size = self.identity.segment_size;
            if size.offset_of(end) != 0 {
                end = size.segment_of(end).end_lsn(size);
            } else {
                self.state = State::Between;
            }
        }
        self.previous = Some(start_lsn);
        self.valid_end_lsn = self.position.align_up(8);
        let summary = &mut self.summary;
        summary.record_count = summary.record_count.saturating_add(1);
        summary.first_record_lsn.get_or_insert(start_lsn);
        summary.last_record_lsn = Some(start_lsn);
        summary.last_record_end_lsn = Some(end);
        Ok(())
    }
}

/// `xl_tot_len`, checked.
fn total_of(record: &Record) -> Result<u32, DecodeError> {
    let found = u32_at(&record.header, 0);
    if (found as usize) < RECORD_HEADER_BYTES || found > RECORD_BYTES_MAX {
        return Err(DecodeError {
            lsn: record.start_lsn,
            kind: DecodeErrorKind::RecordLength { found },
        });
    }
    Ok(found)
}

fn split(bytes: &[u8], at: usize) -> (&[u8], &[u8]) {
    bytes.split_at_checked(at).unwrap_or((bytes, &[]))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn u8_at(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or_default()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}
