//! Writes a container. The input is streamed; memory holds the WAL of one frame and the object so
//! far.

use super::{
    container::{FRAME_BYTES, SealedError, SealedPart},
    footer::{encode_footer, encode_summary},
    frame::{EncodedFrame, FrameCompressor, FrameEntry},
    header::SealedHeader,
};
use crate::{PgTimestamp, SegmentSummary};

/// Writes one container from WAL that arrives in pieces.
#[derive(Debug)]
pub struct SealedWriter {
    assembly: Assembly,
    compressor: FrameCompressor,
    /// WAL of the incomplete frame.
    pending: Vec<u8>,
}

impl SealedWriter {
    /// Creates a writer for the range that `header` names.
    ///
    /// # Errors
    /// [`SealedError::Range`] when the range is empty or not inside one segment.
    pub fn new(header: SealedHeader, level: i32) -> Result<Self, SealedError> {
        Self::with_compressor(header, FrameCompressor::new(level)?)
    }

    /// As [`SealedWriter::new`], with an existing compressor.
    ///
    /// # Errors
    /// [`SealedError::Range`] when the range is empty or not inside one segment.
    pub fn with_compressor(
        header: SealedHeader,
        compressor: FrameCompressor,
    ) -> Result<Self, SealedError> {
        Ok(Self {
            assembly: Assembly::new(header)?,
            compressor,
            pending: Vec::new(),
        })
    }

    /// Appends WAL.
    ///
    /// # Errors
    /// [`SealedError::Length`] when it is more than the header announces.
    pub fn push(&mut self, mut wal: &[u8]) -> Result<(), SealedError> {
        self.assembly.check_room(self.pending.len(), wal.len())?;
        while !wal.is_empty() {
            if self.pending.is_empty() && wal.len() >= FRAME_BYTES {
                let (frame, rest) = wal.split_at_checked(FRAME_BYTES).unwrap_or((wal, &[]));
                self.assembly.compress(&mut self.compressor, frame)?;
                wal = rest;
                continue;
            }
            let room = FRAME_BYTES.saturating_sub(self.pending.len());
            let (now, rest) = wal.split_at_checked(room).unwrap_or((wal, &[]));
            self.pending.extend_from_slice(now);
            wal = rest;
            if self.pending.len() == FRAME_BYTES {
                self.assembly
                    .compress(&mut self.compressor, &self.pending)?;
                self.pending.clear();
            }
        }
        Ok(())
    }

    /// Reserves memory for this many stored bytes, if they are known. Growing piece by piece would
    /// copy them.
    pub fn reserve(&mut self, stored_bytes: usize) {
        self.assembly.object.reserve(stored_bytes);
    }

    /// Appends a frame that was compressed elsewhere: the next [`FRAME_BYTES`] of the range, or the
    /// rest of it.
    ///
    /// # Errors
    /// [`SealedError::Length`] when the frame contains another number of bytes than expected.
    pub fn push_frame(&mut self, frame: &EncodedFrame) -> Result<(), SealedError> {
        if !self.pending.is_empty() {
            return Err(SealedError::Length {
                expected: FRAME_BYTES as u64,
                found: self.pending.len() as u64,
            });
        }
        self.assembly.append(frame)
    }

    /// Completes the object. `proven` is the time at which the source was last seen to have no WAL
    /// beyond the range.
    ///
    /// # Errors
    /// [`SealedError::Length`] when less WAL was pushed than the header announces.
    pub fn finish(
        self,
        summary: &SegmentSummary,
        proven: Option<PgTimestamp>,
    ) -> Result<Vec<u8>, SealedError> {
        self.finish_reusing(summary, proven)
            .map(|(object, _)| object)
    }

    /// As [`SealedWriter::finish`], and returns the compressor.
    ///
    /// # Errors
    /// [`SealedError::Length`] when less WAL was pushed than the header announces.
    pub fn finish_reusing(
        mut self,
        summary: &SegmentSummary,
        proven: Option<PgTimestamp>,
    ) -> Result<(Vec<u8>, FrameCompressor), SealedError> {
        if !self.pending.is_empty() {
            self.assembly
                .compress(&mut self.compressor, &self.pending)?;
        }
        Ok((self.assembly.finish(summary, proven)?, self.compressor))
    }
}

/// Seals WAL that is completely in memory.
///
/// # Errors
/// [`SealedError::Range`] or [`SealedError::Length`] when `header` does not describe `wal`.
pub fn seal(
    compressor: &mut FrameCompressor,
    header: SealedHeader,
    wal: &[u8],
    summary: &SegmentSummary,
    proven: Option<PgTimestamp>,
) -> Result<Vec<u8>, SealedError> {
    let mut assembly = Assembly::new(header)?;
    assembly.check_room(0, wal.len())?;
    for frame in wal.chunks(FRAME_BYTES) {
        assembly.compress(compressor, frame)?;
    }
    assembly.finish(summary, proven)
}

/// The object so far.
#[derive(Debug)]
struct Assembly {
    header: SealedHeader,
    encoded_header: Vec<u8>,
    object: Vec<u8>,
    entries: Vec<FrameEntry>,
    raw_bytes: u64,
}

impl Assembly {
    fn new(header: SealedHeader) -> Result<Self, SealedError> {
        header.check_range()?;
        let encoded_header = header.encode(FRAME_BYTES);
        Ok(Self {
            header,
            object: encoded_header.clone(),
            encoded_header,
            entries: Vec::new(),
            raw_bytes: 0,
        })
    }

    fn check_room(&self, pending: usize, more: usize) -> Result<(), SealedError> {
        let found = [self.raw_bytes, pending as u64, more as u64]
            .into_iter()
            .fold(0, u64::saturating_add);
        let expected = self.header.raw_bytes();
        if found <= expected {
            Ok(())
        } else {
            Err(SealedError::Length { expected, found })
        }
    }

    fn compress(
        &mut self,
        compressor: &mut FrameCompressor,
        raw: &[u8],
    ) -> Result<(), SealedError> {
        let before = self.object.len();
        let (stored_crc, raw_crc) = compressor.append(raw, &mut self.object)?;
        let stored_bytes = self.object.len().saturating_sub(before);
        self.note(raw.len(), stored_bytes, stored_crc, raw_crc)
    }

    fn append(&mut self, frame: &EncodedFrame) -> Result<(), SealedError> {
        self.object.extend_from_slice(&frame.stored);
        self.note(
            frame.raw_bytes,
            frame.stored.len(),
            frame.stored_crc,
            frame.raw_crc,
        )
    }

    fn note(
        &mut self,
        raw_bytes: usize,
        stored_bytes: usize,
        stored_crc: u32,
        raw_crc: u32,
    ) -> Result<(), SealedError> {
        let left = self.header.raw_bytes().saturating_sub(self.raw_bytes);
        let expected = left.min(FRAME_BYTES as u64);
        if raw_bytes as u64 != expected {
            let found = raw_bytes as u64;
            return Err(SealedError::Length { expected, found });
        }
        self.raw_bytes = self.raw_bytes.saturating_add(expected);
        self.entries.push(FrameEntry {
            stored_bytes: u32::try_from(stored_bytes).expect("BUG: a frame of 4 GiB"),
            stored_crc,
            raw_crc,
        });
        Ok(())
    }

    fn finish(
        mut self,
        summary: &SegmentSummary,
        proven: Option<PgTimestamp>,
    ) -> Result<Vec<u8>, SealedError> {
        let expected = self.header.raw_bytes();
        if self.raw_bytes != expected {
            return Err(SealedError::Length {
                expected,
                found: self.raw_bytes,
            });
        }
        let summary = encode_summary(&self.header, summary)?;
        let footer = encode_footer(&self.encoded_header, proven, &self.entries, summary.len());
        if self.object.len() as u64 > u64::from(u32::MAX) {
            return Err(SealedError::Malformed {
                part: SealedPart::Footer,
                problem: "the object is larger than 4 GiB",
            });
        }
        self.object
            .reserve_exact(summary.len().saturating_add(footer.len()));
        self.object.extend_from_slice(&summary);
        self.object.extend_from_slice(&footer);
        Ok(self.object)
    }
}
