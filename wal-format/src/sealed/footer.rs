//! The end of an object: the summary frame and the footer frame. The footer contains a copy of the
//! header, the seek index and a trailer of fixed length, so that one or two range GETs of the end
//! describe the whole object.

use std::ops::Range;

use bytes::BufMut;

use super::{
    container::{
        FORMAT_VERSION, FORMAT_VERSION_WITH_TABLESPACES, MAGIC, SKIPPABLE_HEADER_BYTES,
        SKIPPABLE_MAGIC, SealedError, SealedPart, check_crc, check_version, field,
    },
    frame::FrameEntry,
    header::{HEADER_BYTES, SealedHeader, skippable_len},
};
use crate::{Lsn, PgTimestamp, SegmentSummary};

/// The number of bytes of an object's end to fetch first: enough for the footer and summary of
/// nearly every object.
pub const FOOTER_LEN_HINT: u64 = 64 << 10;

/// The first bytes of the footer's payload.
const FOOTER_MAGIC: [u8; 8] = *b"TMFOOTER";
/// The first bytes of the summary's payload.
const SUMMARY_MAGIC: [u8; 8] = *b"TMSUMMRY";

/// The offset of the header's copy, after the skippable header and the magic.
const HEADER_AT: usize = SKIPPABLE_HEADER_BYTES + 8;
/// The offset of `proven` and the frame count.
const PROVEN_AT: usize = HEADER_AT + HEADER_BYTES;
/// The offset of the seek index.
const FIXED_BYTES: usize = PROVEN_AT + 8 + 4;
/// The length of an entry in the seek index.
const ENTRY_BYTES: usize = 12;
/// Footer length, summary length, format version, reserved, CRC-32, magic.
const TRAILER_BYTES: usize = 4 + 4 + 2 + 2 + 4 + 8;
/// The end of the trailer from its CRC on, which the CRC cannot cover.
const UNCOVERED_BYTES: usize = 4 + 8;

/// Skippable header, magic, encoding, reserved, decoded length.
const SUMMARY_FIXED_BYTES: usize = SKIPPABLE_HEADER_BYTES + 8 + 1 + 3 + 4;
const SUMMARY_PLAIN: u8 = 0;
const SUMMARY_ZSTD: u8 = 1;
/// zstd's level for summaries, which are small.
const SUMMARY_LEVEL: i32 = 9;
/// A summary is at most this much longer than the WAL that it describes. Bounds the memory that a
/// reader must allocate.
const SUMMARY_SLACK_BYTES: u64 = 1 << 20;
/// The maximum lengths of a footer and of a stored summary. The footer of a 1 GiB segment has 1024
/// frames, and its summary is at most [`SUMMARY_SLACK_BYTES`] longer than the WAL. A reader fetches
/// no more of an object's end.
const FOOTER_BYTES_MAX: usize = 16 << 20;
const SUMMARY_STORED_BYTES_MAX: usize = (1 << 30) + (2 << 20);

/// The stored value of `proven` for `None`.
const NOT_PROVEN: i64 = i64::MIN;

/// Everything in a container except its WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SealedFooter {
    header: SealedHeader,
    format_version: u16,
    frame_bytes: usize,
    proven: Option<PgTimestamp>,
    entries: Vec<FrameEntry>,
    summary: SegmentSummary,
    object_bytes: u64,
}

/// The result of parsing the end of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FooterFromTail {
    /// The complete footer.
    Complete(Box<SealedFooter>),
    /// More bytes are needed: read the object's last `bytes` bytes.
    NeedMore {
        /// The number of bytes at the end to read.
        bytes: u64,
    },
}

/// The lengths in the trailer.
struct Trailer {
    footer_bytes: usize,
    summary_bytes: usize,
}

impl SealedFooter {
    /// Parses the object's end. `tail` is the last bytes of an object of `object_bytes`. Start with
    /// [`FOOTER_LEN_HINT`] bytes.
    ///
    /// # Errors
    /// [`SealedError`] when the end is damaged or has a format version that this build does not
    /// know.
    pub fn from_tail(object_bytes: u64, tail: &[u8]) -> Result<FooterFromTail, SealedError> {
        let part = SealedPart::Footer;
        let found = tail.len() as u64;
        if object_bytes < (HEADER_BYTES + TRAILER_BYTES) as u64 {
            return Err(SealedError::NotSealed { part });
        }
        if found < TRAILER_BYTES as u64 {
            let bytes = FOOTER_LEN_HINT.min(object_bytes);
            return Ok(FooterFromTail::NeedMore { bytes });
        }
        let trailer = Trailer::parse(tail)?;
        let needed = (trailer.footer_bytes as u64).saturating_add(trailer.summary_bytes as u64);
        if needed.saturating_add(HEADER_BYTES as u64) > object_bytes {
            return Err(SealedError::Truncated {
                part,
                needed: needed.saturating_add(HEADER_BYTES as u64),
                found: object_bytes,
            });
        }
        if found < needed {
            return Ok(FooterFromTail::NeedMore { bytes: needed });
        }
        let (rest, footer) = tail
            .split_at_checked(tail.len().saturating_sub(trailer.footer_bytes))
            .unwrap_or_default();
        let (_, summary) = rest
            .split_at_checked(rest.len().saturating_sub(trailer.summary_bytes))
            .unwrap_or_default();
        Self::parse(object_bytes, footer, summary)
            .map(|footer| FooterFromTail::Complete(Box::new(footer)))
    }

    fn parse(object_bytes: u64, footer: &[u8], summary: &[u8]) -> Result<Self, SealedError> {
        let part = SealedPart::Footer;
        let malformed = |problem| SealedError::Malformed { part, problem };
        let truncated = || SealedError::Truncated {
            part,
            needed: (FIXED_BYTES + TRAILER_BYTES) as u64,
            found: footer.len() as u64,
        };
        let crc_at = footer.len().saturating_sub(UNCOVERED_BYTES);
        let covered = footer.get(..crc_at).ok_or_else(truncated)?;
        let stored = field(footer, crc_at).ok_or_else(truncated)?;
        check_crc(part, u32::from_le_bytes(stored), covered)?;

        check_skippable(part, footer, FOOTER_MAGIC)?;
        let header = footer.get(HEADER_AT..).ok_or_else(truncated)?;
        let (header, frame_bytes, format_version) = SealedHeader::parse(header)?;
        let proven = i64::from_le_bytes(field(footer, PROVEN_AT).ok_or_else(truncated)?);
        let count = u32::from_le_bytes(field(footer, PROVEN_AT + 8).ok_or_else(truncated)?);
        if u64::from(count) != header.raw_bytes().div_ceil(frame_bytes as u64) {
            return Err(malformed("the number of frames does not fit the range"));
        }
        let index = footer
            .get(FIXED_BYTES..footer.len().saturating_sub(TRAILER_BYTES))
            .ok_or_else(truncated)?;
        let (index, rest) = index.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() || index.len() as u64 != u64::from(count) {
            return Err(malformed(
                "the seek index does not fit the number of frames",
            ));
        }
        let entries: Vec<FrameEntry> = index.iter().map(parse_entry).collect();
        let frames: u64 = entries
            .iter()
            .map(|entry| u64::from(entry.stored_bytes))
            .fold(0, u64::saturating_add);
        let whole = [
            HEADER_BYTES as u64,
            frames,
            summary.len() as u64,
            footer.len() as u64,
        ]
        .into_iter()
        .fold(0, u64::saturating_add);
        if whole != object_bytes {
            return Err(malformed("the parts do not add up to the object's length"));
        }
        Ok(Self {
            header,
            format_version,
            frame_bytes,
            proven: (proven != NOT_PROVEN).then_some(PgTimestamp(proven)),
            entries,
            summary: parse_summary(&header, summary)?,
            object_bytes,
        })
    }

    /// The content of the header.
    #[must_use]
    pub fn header(&self) -> &SealedHeader {
        &self.header
    }

    /// The format version of the object.
    #[must_use]
    pub fn format_version(&self) -> u16 {
        self.format_version
    }

    /// Returns true if the summary records every tablespace that the range creates or drops. An
    /// object of an earlier version says nothing about them.
    #[must_use]
    pub fn records_tablespaces(&self) -> bool {
        self.format_version >= FORMAT_VERSION_WITH_TABLESPACES
    }

    /// The time at which the source was last seen to have no WAL beyond this range, if that was
    /// ever seen.
    #[must_use]
    pub fn proven(&self) -> Option<PgTimestamp> {
        self.proven
    }

    /// The summary of the range.
    #[must_use]
    pub fn summary(&self) -> &SegmentSummary {
        &self.summary
    }

    /// Returns the summary and drops the rest.
    #[must_use]
    pub fn into_summary(self) -> SegmentSummary {
        self.summary
    }

    /// The object's length.
    #[must_use]
    pub fn object_bytes(&self) -> u64 {
        self.object_bytes
    }

    /// The raw bytes in every frame except the last.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        self.frame_bytes
    }

    /// The seek index.
    #[must_use]
    pub fn entries(&self) -> &[FrameEntry] {
        &self.entries
    }

    /// Returns the number of bytes of WAL in frame `number`, or 0 if there is no such frame.
    #[must_use]
    pub fn frame_raw_bytes(&self, number: u32) -> usize {
        let start = u64::from(number).saturating_mul(self.frame_bytes as u64);
        let left = self.header.raw_bytes().saturating_sub(start);
        usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(self.frame_bytes)
    }

    /// Returns the LSN where the WAL of frame `number` starts.
    #[must_use]
    pub fn frame_start_lsn(&self, number: u32) -> Lsn {
        let offset = u64::from(number).saturating_mul(self.frame_bytes as u64);
        self.header.start_lsn.add(offset)
    }

    /// Returns the byte range of frame `number` in the object, for a range GET, or `None` if there
    /// is no such frame.
    #[must_use]
    pub fn frame_range(&self, number: u32) -> Option<Range<u64>> {
        let number = usize::try_from(number).ok()?;
        let entry = self.entries.get(number)?;
        let start = self
            .entries
            .iter()
            .take(number)
            .map(|before| u64::from(before.stored_bytes))
            .fold(HEADER_BYTES as u64, u64::saturating_add);
        Some(start..start.saturating_add(u64::from(entry.stored_bytes)))
    }
}

impl Trailer {
    fn parse(tail: &[u8]) -> Result<Self, SealedError> {
        let part = SealedPart::Footer;
        let at = tail.len().saturating_sub(TRAILER_BYTES);
        let read = || {
            Some((
                u32::from_le_bytes(field(tail, at)?),
                u32::from_le_bytes(field(tail, at.checked_add(4)?)?),
                u16::from_le_bytes(field(tail, at.checked_add(8)?)?),
                field(tail, at.checked_add(16)?)?,
            ))
        };
        let (footer, summary, format, magic) = read().ok_or(SealedError::NotSealed { part })?;
        if magic != MAGIC {
            return Err(SealedError::NotSealed { part });
        }
        check_version(format)?;
        let footer_bytes = usize::try_from(footer).unwrap_or(usize::MAX);
        let summary_bytes = usize::try_from(summary).unwrap_or(usize::MAX);
        let malformed = |problem| Err(SealedError::Malformed { part, problem });
        if footer_bytes < FIXED_BYTES + TRAILER_BYTES {
            return malformed("its length is too small");
        }
        if footer_bytes > FOOTER_BYTES_MAX || summary_bytes > SUMMARY_STORED_BYTES_MAX {
            return malformed("its length or the summary's is more than any writer makes");
        }
        Ok(Self {
            footer_bytes,
            summary_bytes,
        })
    }
}

fn parse_entry(bytes: &[u8; ENTRY_BYTES]) -> FrameEntry {
    let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
    FrameEntry {
        stored_bytes: u32::from_le_bytes([a, b, c, d]),
        stored_crc: u32::from_le_bytes([e, f, g, h]),
        raw_crc: u32::from_le_bytes([i, j, k, l]),
    }
}

/// Checks a skippable frame's own header and the magic at the start of its payload.
fn check_skippable(part: SealedPart, frame: &[u8], magic: [u8; 8]) -> Result<(), SealedError> {
    let skippable = field(frame, 0).map(u32::from_le_bytes);
    if skippable != Some(SKIPPABLE_MAGIC) || field(frame, SKIPPABLE_HEADER_BYTES) != Some(magic) {
        return Err(SealedError::NotSealed { part });
    }
    if field(frame, 4).map(u32::from_le_bytes) != Some(skippable_len(frame.len())) {
        return Err(SealedError::Malformed {
            part,
            problem: "its length is not that of its skippable frame",
        });
    }
    Ok(())
}

fn summary_bytes_max(header: &SealedHeader) -> u64 {
    header.raw_bytes().saturating_add(SUMMARY_SLACK_BYTES)
}

fn parse_summary(header: &SealedHeader, frame: &[u8]) -> Result<SegmentSummary, SealedError> {
    let part = SealedPart::Summary;
    let truncated = || SealedError::Truncated {
        part,
        needed: (SUMMARY_FIXED_BYTES + 4) as u64,
        found: frame.len() as u64,
    };
    let malformed = |problem| SealedError::Malformed { part, problem };
    let (covered, stored) = frame.split_last_chunk::<4>().ok_or_else(truncated)?;
    check_crc(part, u32::from_le_bytes(*stored), covered)?;
    check_skippable(part, frame, SUMMARY_MAGIC)?;
    let body = covered.get(SUMMARY_FIXED_BYTES..).ok_or_else(truncated)?;
    let [encoding, reserved @ ..] = field::<4>(frame, 16).ok_or_else(truncated)?;
    let decoded_bytes = u32::from_le_bytes(field(frame, 20).ok_or_else(truncated)?);
    if reserved != [0; 3] {
        return Err(malformed("a reserved field is not zero"));
    }
    if u64::from(decoded_bytes) > summary_bytes_max(header) {
        return Err(malformed("it is longer than its WAL allows"));
    }
    let expected = usize::try_from(decoded_bytes).unwrap_or(usize::MAX);
    let decompressed;
    let decoded = match encoding {
        SUMMARY_PLAIN if body.len() == expected => body,
        SUMMARY_ZSTD => {
            // The zstd frame also contains its decompressed length. Compare it before memory is
            // allocated.
            let announced = zstd::zstd_safe::get_frame_content_size(body);
            if announced.ok().flatten() != Some(u64::from(decoded_bytes)) {
                return Err(SealedError::Decompress { part, expected });
            }
            let mut buffer = vec![0; expected];
            match zstd::bulk::decompress_to_buffer(body, &mut buffer) {
                Ok(written) if written == expected => {}
                _ => return Err(SealedError::Decompress { part, expected }),
            }
            decompressed = buffer;
            &decompressed
        }
        SUMMARY_PLAIN => return Err(malformed("its length is not the one announced")),
        _ => return Err(malformed("its encoding is unknown")),
    };
    Ok(SegmentSummary::decode(header.start_lsn, decoded)?)
}

/// Encodes the summary's skippable frame.
pub(super) fn encode_summary(
    header: &SealedHeader,
    summary: &SegmentSummary,
) -> Result<Vec<u8>, SealedError> {
    let part = SealedPart::Summary;
    let plain = summary.encode(header.start_lsn);
    if plain.len() as u64 > summary_bytes_max(header) {
        return Err(SealedError::Malformed {
            part,
            problem: "it is longer than its WAL allows",
        });
    }
    let packed = zstd::bulk::compress(&plain, SUMMARY_LEVEL)
        .map_err(|source| SealedError::Compress { part, source })?;
    let (encoding, body) = if packed.len() < plain.len() {
        (SUMMARY_ZSTD, &packed)
    } else {
        (SUMMARY_PLAIN, &plain)
    };
    let length = SUMMARY_FIXED_BYTES
        .saturating_add(body.len())
        .saturating_add(4);
    let mut out = Vec::with_capacity(length);
    out.put_u32_le(SKIPPABLE_MAGIC);
    out.put_u32_le(skippable_len(length));
    out.put_slice(&SUMMARY_MAGIC);
    out.put_u8(encoding);
    out.put_slice(&[0; 3]);
    out.put_u32_le(u32::try_from(plain.len()).expect("BUG: a summary of 4 GiB"));
    out.put_slice(body);
    let crc = crc32fast::hash(&out);
    out.put_u32_le(crc);
    Ok(out)
}

/// Encodes the footer's skippable frame.
pub(super) fn encode_footer(
    encoded_header: &[u8],
    proven: Option<PgTimestamp>,
    entries: &[FrameEntry],
    summary_bytes: usize,
) -> Vec<u8> {
    let length = entries
        .len()
        .saturating_mul(ENTRY_BYTES)
        .saturating_add(FIXED_BYTES + TRAILER_BYTES);
    let as_u32 = |bytes: usize| u32::try_from(bytes).expect("BUG: a part of 4 GiB");
    let mut out = Vec::with_capacity(length);
    out.put_u32_le(SKIPPABLE_MAGIC);
    out.put_u32_le(skippable_len(length));
    out.put_slice(&FOOTER_MAGIC);
    out.put_slice(encoded_header);
    out.put_i64_le(proven.map_or(NOT_PROVEN, |time| time.0));
    out.put_u32_le(as_u32(entries.len()));
    for entry in entries {
        out.put_u32_le(entry.stored_bytes);
        out.put_u32_le(entry.stored_crc);
        out.put_u32_le(entry.raw_crc);
    }
    out.put_u32_le(as_u32(length));
    out.put_u32_le(as_u32(summary_bytes));
    out.put_u16_le(FORMAT_VERSION);
    out.put_u16_le(0);
    let crc = crc32fast::hash(&out);
    out.put_u32_le(crc);
    out.put_slice(&MAGIC);
    out
}
