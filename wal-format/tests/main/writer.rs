//! A small WAL writer that divides records into pages and segments as PostgreSQL does, and a sink
//! that keeps every record.

use std::ops::Range;

use wal_format::{
    DecodeError, Lsn, PgVersion, RecordHeader, RecordSink, SegmentSize, SystemIdentifier,
    WalDecoder, WalIdentity, WalRecord,
};

pub(crate) const PAGE: usize = 8192;
pub(crate) const SHORT: usize = 24;
pub(crate) const LONG: usize = 40;
pub(crate) const SEGMENT: u64 = 1 << 20;
/// The start of a segment.
pub(crate) const START: Lsn = Lsn(5 << 20);
/// A record of the resource manager `LogicalMessage`, whose content is not interpreted.
pub(crate) const OPAQUE: (u8, u8) = (21, 0);
pub(crate) const SWITCH: (u8, u8) = (0, 0x40);
pub(crate) const OVERWRITE_CONTRECORD: (u8, u8) = (0, 0xD0);

pub(crate) fn identity(version: PgVersion) -> WalIdentity {
    WalIdentity {
        version,
        system_identifier: SystemIdentifier(0x0123_4567_89AB_CDEF),
        segment_size: SegmentSize::new(SEGMENT).expect("1 MiB"),
    }
}

#[derive(Clone, Debug)]
pub(crate) struct WalWriter {
    pub(crate) identity: WalIdentity,
    pub(crate) start: Lsn,
    pub(crate) bytes: Vec<u8>,
    pub(crate) previous: Lsn,
    pub(crate) timeline: u32,
    /// Ranges of `bytes` without a meaning: padding, and the bytes after a switch.
    pub(crate) meaningless: Vec<Range<usize>>,
}

impl WalWriter {
    pub(crate) fn new(version: PgVersion, start: Lsn) -> Self {
        Self {
            identity: identity(version),
            start,
            bytes: Vec::new(),
            previous: Lsn(start.0 - 8),
            timeline: 1,
            meaningless: Vec::new(),
        }
    }

    pub(crate) fn position(&self) -> Lsn {
        self.start.add(self.bytes.len() as u64)
    }

    /// Returns the bytes left on the page, 0 at its end.
    pub(crate) fn left(&self) -> usize {
        (PAGE - self.bytes.len() % PAGE) % PAGE
    }

    /// Writes a page header if the position is the start of a page.
    pub(crate) fn page(&mut self, flags: u16, remaining: usize) {
        if !self.bytes.len().is_multiple_of(PAGE) {
            return;
        }
        let lsn = self.position();
        let long = lsn.0.is_multiple_of(SEGMENT);
        let flags = flags | u16::from(remaining > 0) | if long { 2 } else { 0 };
        let magic = self.identity.version.page_magic();
        self.bytes.extend(magic.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(self.timeline.to_le_bytes());
        self.bytes.extend(lsn.0.to_le_bytes());
        self.bytes.extend((remaining as u32).to_le_bytes());
        let at = self.bytes.len();
        self.meaningless.push(at..at + 4);
        self.bytes.extend([0; 4]);
        if long {
            let sysid = self.identity.system_identifier.0;
            self.bytes.extend(sysid.to_le_bytes());
            self.bytes.extend((SEGMENT as u32).to_le_bytes());
            self.bytes.extend((PAGE as u32).to_le_bytes());
        }
    }

    /// Returns the start of the next record.
    pub(crate) fn next_record(&mut self) -> Lsn {
        self.page(0, 0);
        self.position()
    }

    /// Writes a record with main data only. Returns its start.
    pub(crate) fn record(&mut self, kind: (u8, u8), main_data: &[u8]) -> Lsn {
        self.record_of(kind, &body(main_data))
    }

    /// Writes a record with this body. Returns its start.
    pub(crate) fn record_of(&mut self, kind: (u8, u8), body: &[u8]) -> Lsn {
        let lsn = self.next_record();
        let record = self.encode(kind, body);
        self.lay(&record);
        self.pad();
        self.previous = lsn;
        lsn
    }

    /// Returns the bytes that a record would have here.
    pub(crate) fn encode(&self, (rmid, info): (u8, u8), body: &[u8]) -> Vec<u8> {
        let mut record = Vec::new();
        record.extend(((24 + body.len()) as u32).to_le_bytes());
        record.extend(741_u32.to_le_bytes());
        record.extend(self.previous.0.to_le_bytes());
        record.extend([info, rmid, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend(crc.to_le_bytes());
        record.extend(body);
        record
    }

    /// Writes bytes to as many pages as they need.
    pub(crate) fn lay(&mut self, record: &[u8]) {
        let mut rest = record;
        while !rest.is_empty() {
            self.page(
                0,
                if rest.len() < record.len() {
                    rest.len()
                } else {
                    0
                },
            );
            let (now, later) = rest.split_at(rest.len().min(self.left()));
            self.bytes.extend(now);
            rest = later;
        }
    }

    pub(crate) fn pad(&mut self) {
        let end = self.bytes.len().next_multiple_of(8);
        self.meaningless.push(self.bytes.len()..end);
        self.bytes.resize(end, 0);
    }

    /// Fills the page with an opaque record until exactly `left` bytes are left on it. `left` is a
    /// multiple of 8.
    pub(crate) fn fill(&mut self, left: usize) {
        self.next_record();
        let room = self.left() - left;
        assert!(room >= 32 && room.is_multiple_of(8), "no room: {room}");
        // The header of long main data takes five bytes.
        let body = room - 24;
        let body = if body < 260 {
            self::body(&vec![7; body - 2])
        } else {
            self::body(&vec![7; body - 5])
        };
        self.record_of(OPAQUE, &body);
        assert_eq!(self.left(), left);
    }

    /// Writes a switch, and the unused rest of the segment with pages as PostgreSQL initialises
    /// them.
    pub(crate) fn switch(&mut self) -> Lsn {
        let lsn = self.record_of(SWITCH, &[]);
        while !self.position().0.is_multiple_of(SEGMENT) {
            self.page(0, 0);
            let (at, left) = (self.bytes.len(), self.left());
            self.meaningless.push(at..at + left);
            self.bytes.resize(at + left, 0);
        }
        lsn
    }
}

/// Returns a body with main data only.
pub(crate) fn body(main_data: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    match u8::try_from(main_data.len()) {
        Ok(0) => {}
        Ok(short) => body.extend([255, short]),
        Err(_) => {
            body.push(254);
            body.extend((main_data.len() as u32).to_le_bytes());
        }
    }
    body.extend(main_data);
    body
}

/// A record as the sink received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) lsn: Lsn,
    pub(crate) end_lsn: Lsn,
    pub(crate) header: RecordHeader,
    pub(crate) body: Vec<u8>,
}

/// Keeps every record, with `window` bytes of each body.
#[derive(Debug)]
pub(crate) struct Remember {
    pub(crate) window: usize,
    pub(crate) seen: Vec<Seen>,
}

impl RecordSink for Remember {
    fn window(&mut self, _: &RecordHeader) -> usize {
        self.window
    }

    fn record(&mut self, record: &WalRecord<'_>) -> Result<(), wal_format::error::DecodeErrorKind> {
        self.seen.push(Seen {
            lsn: record.lsn,
            end_lsn: record.end_lsn,
            header: record.header,
            body: record.body.to_vec(),
        });
        Ok(())
    }
}

/// The result of decoding.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) seen: Vec<Seen>,
    pub(crate) error: Option<DecodeError>,
    pub(crate) valid_end_lsn: Lsn,
    pub(crate) open_record_lsn: Option<Lsn>,
}

/// Decodes `pieces` one after the other.
pub(crate) fn decode<'a>(
    identity: WalIdentity,
    start: Lsn,
    window: usize,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Outcome {
    let mut decoder = WalDecoder::new(identity, start, None);
    let seen = Vec::new();
    let mut sink = Remember { window, seen };
    let mut pieces = pieces.into_iter();
    let error = pieces.find_map(|piece| decoder.push(piece, &mut sink).err());
    Outcome {
        seen: sink.seen,
        error,
        valid_end_lsn: decoder.valid_end_lsn(),
        open_record_lsn: decoder.open_record_lsn(),
    }
}

pub(crate) fn decode_whole(wal: &WalWriter) -> Outcome {
    decode(wal.identity, wal.start, usize::MAX, [wal.bytes.as_slice()])
}
