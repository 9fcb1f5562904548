//! Reads a container in memory, frame by frame or by LSN, and checks every byte that it returns.

use super::{
    container::{SealedError, SealedPart},
    footer::{FooterFromTail, SealedFooter},
    frame::FrameDecompressor,
    header::{HEADER_BYTES, SealedHeader},
};
use crate::{Lsn, PgTimestamp, SegmentSummary};

/// A container whose header, summary and footer were checked. Its frames are checked when they are
/// read.
#[derive(Debug)]
pub struct SealedReader<'a> {
    object: &'a [u8],
    footer: SealedFooter,
}

impl<'a> SealedReader<'a> {
    /// Opens a container.
    ///
    /// # Errors
    /// [`SealedError`] when header, summary or footer are damaged, contradict each other, or have a
    /// format version that this build does not know.
    pub fn open(object: &'a [u8]) -> Result<Self, SealedError> {
        let (header, frame_bytes, format) = SealedHeader::parse(object)?;
        let footer = match SealedFooter::from_tail(object.len() as u64, object)? {
            FooterFromTail::Complete(footer) => *footer,
            FooterFromTail::NeedMore { bytes } => {
                return Err(SealedError::Truncated {
                    part: SealedPart::Footer,
                    needed: bytes,
                    found: object.len() as u64,
                });
            }
        };
        if *footer.header() != header
            || footer.frame_bytes() != frame_bytes
            || footer.format_version() != format
        {
            return Err(SealedError::Malformed {
                part: SealedPart::Footer,
                problem: "it repeats another header than the object begins with",
            });
        }
        Ok(Self { object, footer })
    }

    /// The content of the header.
    #[must_use]
    pub fn header(&self) -> &SealedHeader {
        self.footer.header()
    }

    /// Everything except the WAL.
    #[must_use]
    pub fn footer(&self) -> &SealedFooter {
        &self.footer
    }

    /// The summary of the range.
    #[must_use]
    pub fn summary(&self) -> &SegmentSummary {
        self.footer.summary()
    }

    /// The time at which the source was last seen to have no WAL beyond this range, if that was
    /// ever seen.
    #[must_use]
    pub fn proven(&self) -> Option<PgTimestamp> {
        self.footer.proven()
    }

    /// Returns the frames in order. Each is checked and decompressed when it is requested.
    ///
    /// # Errors
    /// [`SealedError::Decompress`] when zstd has no memory.
    pub fn frames(&self) -> Result<Frames<'_>, SealedError> {
        Ok(Frames {
            reader: self,
            decompressor: FrameDecompressor::new()?,
            next: 0,
            offset: HEADER_BYTES,
            buffer: Vec::new(),
        })
    }

    /// Appends the whole range to `out`. After an error `out` is unchanged.
    ///
    /// # Errors
    /// [`SealedError`] when a frame is damaged.
    pub fn read_all(&self, out: &mut Vec<u8>) -> Result<(), SealedError> {
        let before = out.len();
        self.append_frames(0..self.frame_count(), out)
            .inspect_err(|_| out.truncate(before))
    }

    /// Returns `bytes` bytes of WAL from `lsn` on. Decompresses only the frames that contain them.
    ///
    /// # Errors
    /// [`SealedError::OutOfRange`] when the object does not contain them, another [`SealedError`]
    /// when it is damaged.
    pub fn read_at(&self, lsn: Lsn, bytes: usize) -> Result<Vec<u8>, SealedError> {
        let header = self.header();
        let end_lsn = lsn.add(bytes as u64);
        if lsn < header.start_lsn || end_lsn > header.end_lsn {
            return Err(SealedError::OutOfRange {
                start_lsn: lsn,
                end_lsn,
                held_start: header.start_lsn,
                held_end: header.end_lsn,
            });
        }
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let offset = lsn.bytes_since(header.start_lsn);
        let frame_bytes = self.footer.frame_bytes() as u64;
        let number_of = |offset: u64| {
            let number = offset.checked_div(frame_bytes).unwrap_or_default();
            u32::try_from(number).unwrap_or(u32::MAX)
        };
        let first = number_of(offset);
        let last = number_of(offset.saturating_add(bytes as u64).saturating_sub(1));
        let mut wal = Vec::new();
        self.append_frames(first..last.saturating_add(1), &mut wal)?;
        let skip = lsn.bytes_since(self.footer.frame_start_lsn(first));
        wal.drain(..usize::try_from(skip).unwrap_or(usize::MAX).min(wal.len()));
        wal.truncate(bytes);
        Ok(wal)
    }

    fn frame_count(&self) -> u32 {
        u32::try_from(self.footer.entries().len()).unwrap_or(u32::MAX)
    }

    fn append_frames(
        &self,
        numbers: std::ops::Range<u32>,
        out: &mut Vec<u8>,
    ) -> Result<(), SealedError> {
        let mut decompressor = FrameDecompressor::new()?;
        let range = self.footer.frame_range(numbers.start);
        let mut offset = range.map_or(0, |range| {
            usize::try_from(range.start).unwrap_or(usize::MAX)
        });
        for number in numbers {
            self.append_frame(&mut decompressor, number, &mut offset, out)?;
        }
        Ok(())
    }

    /// Appends frame `number`, which is at `offset`, and moves `offset` past it.
    fn append_frame(
        &self,
        decompressor: &mut FrameDecompressor,
        number: u32,
        offset: &mut usize,
        out: &mut Vec<u8>,
    ) -> Result<(), SealedError> {
        let cut_off = SealedError::Malformed {
            part: SealedPart::Frame(number),
            problem: "it lies outside of the object",
        };
        let entry = usize::try_from(number)
            .ok()
            .and_then(|index| self.footer.entries().get(index));
        let Some(entry) = entry.copied() else {
            return Err(cut_off);
        };
        let end = offset.saturating_add(usize::try_from(entry.stored_bytes).unwrap_or(usize::MAX));
        let Some(stored) = self.object.get(*offset..end) else {
            return Err(cut_off);
        };
        let raw_bytes = self.footer.frame_raw_bytes(number);
        decompressor.append(number, entry, stored, raw_bytes, out)?;
        *offset = end;
        Ok(())
    }
}

/// The frames of a container, in order. [`Frames::next`] lends one after the other.
#[derive(Debug)]
pub struct Frames<'r> {
    reader: &'r SealedReader<'r>,
    decompressor: FrameDecompressor,
    next: u32,
    offset: usize,
    buffer: Vec<u8>,
}

impl Frames<'_> {
    /// Returns the start of the next frame and its checked WAL, or `None` after the last.
    ///
    /// # Errors
    /// [`SealedError`] when the frame is damaged. Further calls return the same error.
    #[expect(
        clippy::should_implement_trait,
        reason = "the frame is lent, which Iterator cannot"
    )]
    pub fn next(&mut self) -> Option<Result<(Lsn, &[u8]), SealedError>> {
        if self.next >= self.reader.frame_count() {
            return None;
        }
        self.buffer.clear();
        let result = self.reader.append_frame(
            &mut self.decompressor,
            self.next,
            &mut self.offset,
            &mut self.buffer,
        );
        if let Err(error) = result {
            return Some(Err(error));
        }
        let lsn = self.reader.footer.frame_start_lsn(self.next);
        self.next = self.next.saturating_add(1);
        Some(Ok((lsn, &self.buffer)))
    }
}
