//! [`WalDecoder`]: accepts WAL bytes as they arrive and calls a [`RecordSink`] for each complete
//! and valid record.
//!
//! A record that is completely inside the pushed bytes is checked in place. Of any other record the
//! header and the front of the body are kept, as much as the sink requests: [`WINDOW_BYTES`] unless
//! it needs a field after a list of any length.
//! Invariant: a record that is passed on has a valid CRC-32C and follows the previous record by
//! `xl_prev`. How the bytes were divided into pushes does not affect the result.

use crate::{
    Lsn, PgVersion, SegmentSize, SystemIdentifier,
    error::{DecodeError, DecodeErrorKind},
    lsn::PAGE_SIZE,
    page::{LONG_HEADER_BYTES, PageFlags, PageHeader, SHORT_HEADER_BYTES},
    record::{RECORD_HEADER_BYTES, RecordHeader, STRUCTURE_BYTES, WINDOW_BYTES, WalRecord},
    rmgr,
};

/// The origin of WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalIdentity {
    /// The major version, which determines layouts.
    pub version: PgVersion,
    /// The system identifier.
    pub system_identifier: SystemIdentifier,
    /// The segment size.
    pub segment_size: SegmentSize,
}

/// Receives decoded records.
pub trait RecordSink {
    /// Returns the number of bytes of the body that [`record`](Self::record) needs; it may receive
    /// more. The decoder allocates memory for them as they arrive, at most
    /// [`RECORD_BYTES_MAX`](crate::record::RECORD_BYTES_MAX).
    fn window(&mut self, header: &RecordHeader) -> usize {
        let _ = header;
        WINDOW_BYTES
    }

    /// Receives a record that passed every check.
    ///
    /// # Errors
    /// The problem with its content. Decoding ends there.
    fn record(&mut self, record: &WalRecord<'_>) -> Result<(), DecodeErrorKind>;
}

/// A streaming decoder.
#[derive(Debug)]
pub struct WalDecoder {
    identity: WalIdentity,
    position: Lsn,
    state: State,
    /// The start of the previous record, for `xl_prev`.
    previous: Option<Lsn>,
    valid_end_lsn: Lsn,
    /// The end of the last valid record without its padding.
    checked_end_lsn: Lsn,
    /// The timeline of the latest page. It never decreases.
    timeline: u32,
    page: PartialPageHeader,
    open: OpenRecord,
    overwrite: Overwrite,
    failed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first page header, which says whether the page continues a record.
    Start,
    /// Inside a record whose start is unknown.
    Skip { left: u32 },
    /// Between records. Padding to a multiple of 8 is skipped.
    Between,
    /// Inside the record in `open`.
    Record,
    /// After a switch: the rest of the segment is unused.
    Switched,
}

/// A page header that has not arrived completely.
#[derive(Debug)]
struct PartialPageHeader {
    bytes: [u8; LONG_HEADER_BYTES],
    length: usize,
}

/// A record that spans pages, or has not arrived completely. Its buffer is reused for the next
/// record.
#[derive(Debug)]
struct OpenRecord {
    start_lsn: Lsn,
    header_bytes: [u8; RECORD_HEADER_BYTES],
    /// `xl_tot_len`. Known as soon as its four bytes have arrived, which are never split.
    total: u32,
    /// The number of its bytes that have arrived.
    got: u32,
    /// Valid once the header is complete.
    header: RecordHeader,
    crc: u32,
    /// The number of bytes of the body to keep, and the bytes kept so far.
    window_bytes: usize,
    window: Vec<u8>,
}

/// The first record that a page must contain if the page voids the record before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Overwrite {
    /// The page voids no record.
    None,
    /// `XLOG_OVERWRITE_CONTRECORD` for the record that started at this LSN, if it is known.
    Of(Option<Lsn>),
}

impl WalDecoder {
    /// Creates a decoder that starts at `start_lsn`, the start of a page or of a record. `previous`
    /// is the start of the previous record, if known.
    #[must_use]
    pub fn new(identity: WalIdentity, start_lsn: Lsn, previous: Option<Lsn>) -> Self {
        Self {
            identity,
            position: start_lsn,
            state: State::Start,
            previous,
            valid_end_lsn: start_lsn,
            checked_end_lsn: start_lsn,
            timeline: 0,
            page: PartialPageHeader {
                bytes: [0; LONG_HEADER_BYTES],
                length: 0,
            },
            open: OpenRecord {
                start_lsn,
                header_bytes: [0; RECORD_HEADER_BYTES],
                total: 0,
                got: 0,
                header: RecordHeader::parse(&[0; RECORD_HEADER_BYTES]),
                crc: 0,
                window_bytes: 0,
                window: Vec::new(),
            },
            overwrite: Overwrite::None,
            failed: false,
        }
    }

    /// The end of the pushed bytes. After an error, a position in the bytes of the last push.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The end of the last complete valid record, aligned to 8. The start position before the first
    /// record.
    #[must_use]
    pub fn valid_end_lsn(&self) -> Lsn {
        self.valid_end_lsn
    }

    /// The end of the last complete valid record without padding. The bytes from there to
    /// [`WalDecoder::valid_end_lsn`] are padding, which no checksum covers and which PostgreSQL
    /// leaves zero.
    #[must_use]
    pub fn checked_end_lsn(&self) -> Lsn {
        self.checked_end_lsn
    }

    /// The start of the record that has begun and is not complete. `None` after an error.
    #[must_use]
    pub fn open_record_lsn(&self) -> Option<Lsn> {
        (self.state == State::Record && !self.failed).then_some(self.open.start_lsn)
    }

    /// Decodes the next bytes.
    ///
    /// # Errors
    /// [`DecodeError`] at the first invalid page or record, or the error of `sink`. Nothing is
    /// decoded after an error.
    pub fn push<S: RecordSink>(&mut self, bytes: &[u8], sink: &mut S) -> Result<(), DecodeError> {
        if self.failed {
            return Err(DecodeError {
                lsn: self.position,
                kind: DecodeErrorKind::Stopped,
            });
        }
        let outcome = self.decode(bytes, sink);
        self.failed = outcome.is_err();
        outcome
    }

    fn decode<S: RecordSink>(&mut self, mut bytes: &[u8], sink: &mut S) -> Result<(), DecodeError> {
        while !bytes.is_empty() {
            let page = self.position.align_down(PAGE_SIZE);
            let page_offset = as_usize(self.position.page_offset());
            let header_bytes = PageHeader::bytes_at(page, self.identity.segment_size);
            let now;
            if page_offset < header_bytes {
                (now, bytes) = split(bytes, header_bytes.saturating_sub(page_offset));
                self.advance(now.len());
                if now.len() == header_bytes {
                    self.begin_page(page, now)?;
                } else if self.page.take(now) == header_bytes {
                    let whole = self.page.bytes;
                    self.page.length = 0;
                    self.begin_page(page, split(&whole, header_bytes).0)?;
                }
            } else {
                (now, bytes) = split(bytes, as_usize(PAGE_SIZE).saturating_sub(page_offset));
                self.page_data(now, sink)?;
            }
        }
        Ok(())
    }

    fn advance(&mut self, bytes: usize) {
        self.position = self.position.add(bytes as u64);
    }

    /// Checks a page header, also against the open record (`XLogDecodeNextRecord`).
    fn begin_page(&mut self, page: Lsn, bytes: &[u8]) -> Result<(), DecodeError> {
        let fail = |kind| Err(DecodeError { lsn: page, kind });
        let at_segment_start = bytes.len() == LONG_HEADER_BYTES;
        if self.state == State::Switched && !at_segment_start && bytes == [0; SHORT_HEADER_BYTES] {
            // After a switch the server may leave pages that it never initialised.
            return Ok(());
        }
        let Some(header) = PageHeader::parse(bytes) else {
            return fail(DecodeErrorKind::PageMagic {
                expected: self.identity.version.page_magic(),
                found: 0,
            });
        };
        header.check(&self.identity, page)?;
        if header.timeline < self.timeline {
            return fail(DecodeErrorKind::PageTimeline {
                latest: self.timeline,
                found: header.timeline,
            });
        }
        self.timeline = header.timeline;
        let found = header.remaining;
        let expected = match self.state {
            State::Start => found,
            State::Skip { left } => left,
            State::Record => self.open.total.saturating_sub(self.open.got),
            State::Between | State::Switched => 0,
        };
        if header.flags.has(PageFlags::FIRST_IS_OVERWRITE_CONTRECORD) {
            // The server crashed inside a record. The record is void, and the page starts with a
            // new one (`CreateOverwriteContrecordRecord`).
            if self.state == State::Switched && !at_segment_start {
                let found = header.flags.0;
                return fail(DecodeErrorKind::PageFlags { found });
            }
            self.overwrite = Overwrite::Of(self.open_record_lsn());
            self.state = State::Between;
            return Ok(());
        }
        if expected != found {
            return fail(DecodeErrorKind::Continuation { expected, found });
        }
        self.state = match self.state {
            State::Start if found > 0 => State::Skip { left: found },
            State::Start => State::Between,
            State::Switched if at_segment_start => State::Between,
            other => other,
        };
        Ok(())
    }

    /// Consumes bytes of one page after its header.
    fn page_data<S: RecordSink>(
        &mut self,
        mut now: &[u8],
        sink: &mut S,
    ) -> Result<(), DecodeError> {
        while !now.is_empty() {
            let taken = match self.state {
                State::Start | State::Between => {
                    let padding = self.position.align_up(8).bytes_since(self.position);
                    let (_, rest) = split(now, as_usize(padding));
                    self.advance(now.len().saturating_sub(rest.len()));
                    now = rest;
                    if now.is_empty() {
                        break;
                    }
                    self.begin_record(now, sink)?
                }
                State::Skip { left } => {
                    let taken = now.len().min(left as usize);
                    let left = left.saturating_sub(as_u32(taken));
                    self.state = if left == 0 {
                        State::Between
                    } else {
                        State::Skip { left }
                    };
                    taken
                }
                State::Record => self.continue_record(now, sink)?,
                State::Switched => now.len(),
            };
            self.advance(taken);
            now = split(now, taken).1;
        }
        Ok(())
    }

    /// Checks a record that is complete in `bytes`, or begins one that is not. Returns the number
    /// of bytes consumed.
    fn begin_record<S: RecordSink>(
        &mut self,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<usize, DecodeError> {
        let lsn = self.position;
        let Some((header_bytes, rest)) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>() else {
            return self.begin_open_record(bytes, sink);
        };
        let header = RecordHeader::parse(header_bytes);
        let at_record = |kind| DecodeError { lsn, kind };
        RecordHeader::check_total(header.total).map_err(at_record)?;
        let Some(body) = rest.get(..header.body_bytes()) else {
            return self.begin_open_record(bytes, sink);
        };
        header
            .check(self.identity.version, lsn, self.previous)
            .map_err(at_record)?;
        let body_crc = crc32c::crc32c(body);
        let end = lsn.add(u64::from(header.total));
        let body = split(body, window_bytes(sink, &header)).0;
        let mut record = WalRecord::new(self.identity.version, lsn, end, header, body);
        self.end_record(&mut record, body_crc, header_bytes, sink)?;
        Ok(header.total as usize)
    }

    fn begin_open_record<S: RecordSink>(
        &mut self,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<usize, DecodeError> {
        self.state = State::Record;
        self.open.start_lsn = self.position;
        (self.open.total, self.open.got) = (0, 0);
        self.continue_record(bytes, sink)
    }

    /// Consumes bytes of the open record. Returns their number.
    fn continue_record<S: RecordSink>(
        &mut self,
        bytes: &[u8],
        sink: &mut S,
    ) -> Result<usize, DecodeError> {
        let open = &mut self.open;
        let lsn = open.start_lsn;
        let at_record = |kind| DecodeError { lsn, kind };
        let mut body = bytes;
        let got = open.got as usize;
        if got < RECORD_HEADER_BYTES {
            let (now, rest) = split(bytes, RECORD_HEADER_BYTES.saturating_sub(got));
            body = rest;
            let got = copy_at(&mut open.header_bytes, got, now);
            open.got = as_u32(got);
            if open.total == 0 && got >= 4 {
                // The rest of the header has not arrived, and the end of a page may come first.
                let total = RecordHeader::parse(&open.header_bytes).total;
                RecordHeader::check_total(total).map_err(at_record)?;
                open.total = total;
            }
            if got < RECORD_HEADER_BYTES {
                return Ok(now.len());
            }
            open.header = RecordHeader::parse(&open.header_bytes);
            open.header
                .check(self.identity.version, lsn, self.previous)
                .map_err(at_record)?;
            open.crc = 0;
            open.window_bytes = window_bytes(sink, &open.header);
            open.window.clear();
        }
        let before = bytes.len().saturating_sub(body.len());
        let (now, _) = split(body, open.total.saturating_sub(open.got) as usize);
        open.crc = crc32c::crc32c_append(open.crc, now);
        let room = open.window_bytes.saturating_sub(open.window.len());
        open.window.extend_from_slice(split(now, room).0);
        open.got = open.got.saturating_add(as_u32(now.len()));
        let taken = before.saturating_add(now.len());
        if open.got == open.total {
            let header_bytes = open.header_bytes;
            // Returned below, so that its memory is reused for the next record.
            let window = std::mem::take(&mut open.window);
            let end = self.position.add(taken as u64);
            let body_crc = open.crc;
            let mut record = WalRecord::new(self.identity.version, lsn, end, open.header, &window);
            let outcome = self.end_record(&mut record, body_crc, &header_bytes, sink);
            self.open.window = window;
            self.open.window.clear();
            self.open.window.shrink_to(WINDOW_BYTES);
            outcome?;
        }
        Ok(taken)
    }

    /// Performs the checks that need the whole record, and passes it on. `record.end_lsn` is the
    /// end of its last byte. `body_crc` covers the whole body.
    fn end_record<S: RecordSink>(
        &mut self,
        record: &mut WalRecord<'_>,
        body_crc: u32,
        header_bytes: &[u8; RECORD_HEADER_BYTES],
        sink: &mut S,
    ) -> Result<(), DecodeError> {
        let lsn = record.lsn;
        let at_record = |kind| DecodeError { lsn, kind };
        let (before_crc, _) = split(header_bytes, CRC_OFFSET);
        let (expected, found) = (
            record.header.crc,
            crc32c::crc32c_append(body_crc, before_crc),
        );
        if found != expected {
            return Err(at_record(DecodeErrorKind::Crc { expected, found }));
        }
        record.read_structure().map_err(at_record)?;
        let checked_end = record.end_lsn;
        let aligned_end = checked_end.align_up(8);
        record.end_lsn = aligned_end;
        self.state = State::Between;
        if rmgr::is_switch(&record.header) {
            let size = self.identity.segment_size;
            if size.offset_of(aligned_end) != 0 {
                record.end_lsn = size.segment_of(aligned_end).end_lsn(size);
                self.state = State::Switched;
            }
        }
        if let Overwrite::Of(voided) = self.overwrite {
            check_overwrite(voided, record).map_err(at_record)?;
            self.overwrite = Overwrite::None;
        }
        sink.record(record).map_err(at_record)?;
        self.previous = Some(lsn);
        self.valid_end_lsn = aligned_end;
        self.checked_end_lsn = checked_end;
        Ok(())
    }
}

/// `offsetof(XLogRecord, xl_crc)`: the checksum covers the body and then the header up to here.
const CRC_OFFSET: usize = 20;

/// Checks that the first record of a page that voids the record at `voided` is the
/// `XLOG_OVERWRITE_CONTRECORD` for it (`VerifyOverwriteContrecord`).
fn check_overwrite(voided: Option<Lsn>, record: &WalRecord<'_>) -> Result<(), DecodeErrorKind> {
    let found = rmgr::overwritten_lsn(record).ok_or(DecodeErrorKind::NoOverwrittenContrecord)?;
    match voided {
        Some(expected) if expected != found => {
            Err(DecodeErrorKind::OverwrittenContrecord { expected, found })
        }
        _ => Ok(()),
    }
}

impl PartialPageHeader {
    /// Appends `now`. Returns the total length.
    fn take(&mut self, now: &[u8]) -> usize {
        self.length = copy_at(&mut self.bytes, self.length, now);
        self.length
    }
}

/// Returns the number of bytes of a body to keep: at least those that contain its structure.
fn window_bytes<S: RecordSink>(sink: &mut S, header: &RecordHeader) -> usize {
    sink.window(header).max(STRUCTURE_BYTES)
}

/// Copies `from` to the offset `at`. Returns the offset after it.
fn copy_at(to: &mut [u8], at: usize, from: &[u8]) -> usize {
    let end = at.saturating_add(from.len());
    if let Some(place) = to.get_mut(at..end) {
        place.copy_from_slice(from);
    }
    end
}

fn split(bytes: &[u8], at: usize) -> (&[u8], &[u8]) {
    bytes.split_at_checked(at).unwrap_or((bytes, &[]))
}

/// Converts a number that is at most one page.
fn as_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn as_u32(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
