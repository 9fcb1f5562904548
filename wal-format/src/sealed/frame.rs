//! A zstd frame: compress, check, decompress. Frames do not depend on each other, so a caller may
//! compress the frames of a segment on several threads and pass them to the writer in order.
//!
//! Invariant: a frame decompresses to exactly the length that the header implies, or the result is
//! an error. It never decompresses to more.

use zstd::zstd_safe::{CParameter, Strategy};

use super::container::{SealedError, SealedPart, check_crc};

/// Compression parameters that are set in addition to the level. WAL consists of 8-aligned fields,
/// so matches of 5 bytes pay off. Its matches are near, so tables that fit into the processor's
/// first cache are faster than zstd's larger ones and compress as well. [`super::DEFAULT_LEVEL`]
/// has the measurements.
fn tuning(level: i32) -> &'static [CParameter] {
    match level {
        1 => &[
            CParameter::Strategy(Strategy::ZSTD_fast),
            CParameter::HashLog(14),
            CParameter::MinMatch(5),
            CParameter::TargetLength(0),
        ],
        2..=4 => &[
            CParameter::Strategy(Strategy::ZSTD_dfast),
            CParameter::HashLog(14),
            CParameter::ChainLog(13),
            CParameter::MinMatch(5),
            CParameter::TargetLength(0),
        ],
        _ => &[],
    }
}

/// The entry of a frame in the seek index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameEntry {
    /// Compressed length.
    pub stored_bytes: u32,
    /// CRC-32 of the compressed bytes.
    pub stored_crc: u32,
    /// CRC-32 of the WAL in the frame.
    pub raw_crc: u32,
}

/// A compressed frame, ready for the writer.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// The zstd frame.
    pub stored: Vec<u8>,
    /// The number of bytes of WAL in it.
    pub raw_bytes: usize,
    /// CRC-32 of the compressed bytes.
    pub stored_crc: u32,
    /// CRC-32 of the WAL in the frame.
    pub raw_crc: u32,
}

/// Compresses frames. Keeps zstd's context from one frame to the next.
pub struct FrameCompressor {
    zstd: zstd::bulk::Compressor<'static>,
    /// A buffer for the longest possible result. A new allocation for each frame would be cleared
    /// by the kernel each time. Only the part that a result occupies is ever touched.
    scratch: Vec<u8>,
}

impl std::fmt::Debug for FrameCompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameCompressor")
    }
}

impl FrameCompressor {
    /// Creates a compressor with zstd's `level`. Levels 1 to 4 are tuned to WAL.
    ///
    /// # Errors
    /// [`SealedError::Compress`] when zstd has no memory or does not know the level.
    pub fn new(level: i32) -> Result<Self, SealedError> {
        let configure = || {
            let mut zstd = zstd::bulk::Compressor::new(level)?;
            // With it, stock zstd detects damage too.
            zstd.set_parameter(CParameter::ChecksumFlag(true))?;
            for parameter in tuning(level) {
                zstd.set_parameter(*parameter)?;
            }
            Ok(zstd)
        };
        let zstd = configure().map_err(|source| SealedError::Compress {
            part: SealedPart::Frame(0),
            source,
        })?;
        Ok(Self {
            zstd,
            scratch: Vec::new(),
        })
    }

    /// Compresses one frame's WAL.
    ///
    /// # Errors
    /// [`SealedError::Compress`] when zstd has no memory.
    pub fn compress(&mut self, raw: &[u8]) -> Result<EncodedFrame, SealedError> {
        let mut stored = Vec::new();
        let (stored_crc, raw_crc) = self.append(raw, &mut stored)?;
        Ok(EncodedFrame {
            stored,
            raw_bytes: raw.len(),
            stored_crc,
            raw_crc,
        })
    }

    /// Compresses and appends to `out`. Returns the CRC-32 of the appended bytes and of `raw`.
    pub(super) fn append(
        &mut self,
        raw: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(u32, u32), SealedError> {
        let fail = |source| SealedError::Compress {
            part: SealedPart::Frame(0),
            source,
        };
        let bound = zstd::zstd_safe::compress_bound(raw.len());
        self.scratch.clear();
        self.scratch.reserve_exact(bound);
        self.zstd
            .compress_to_buffer(raw, &mut self.scratch)
            .map_err(fail)?;
        out.extend_from_slice(&self.scratch);
        Ok((crc32fast::hash(&self.scratch), crc32fast::hash(raw)))
    }
}

/// Checks and decompresses frames. Keeps zstd's context from one frame to the next.
pub struct FrameDecompressor {
    zstd: zstd::bulk::Decompressor<'static>,
    /// A copy of the zstd frame without its content checksum.
    unsummed: Vec<u8>,
}

impl std::fmt::Debug for FrameDecompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FrameDecompressor")
    }
}

impl FrameDecompressor {
    /// Creates a decompressor.
    ///
    /// # Errors
    /// [`SealedError::Decompress`] when zstd has no memory.
    pub fn new() -> Result<Self, SealedError> {
        let zstd = zstd::bulk::Decompressor::new().map_err(|_| SealedError::Decompress {
            part: SealedPart::Frame(0),
            expected: 0,
        })?;
        Ok(Self {
            zstd,
            unsummed: Vec::new(),
        })
    }

    /// Checks frame `number` and appends its `raw_bytes` of WAL to `out`. After an error `out` is
    /// unchanged.
    ///
    /// # Errors
    /// [`SealedError::Checksum`] or [`SealedError::Decompress`] when the frame is damaged.
    pub fn append(
        &mut self,
        number: u32,
        entry: FrameEntry,
        stored: &[u8],
        raw_bytes: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), SealedError> {
        let part = SealedPart::Frame(number);
        check_crc(part, entry.stored_crc, stored)?;
        if out.is_empty() {
            return self
                .decompress(part, stored, raw_bytes, out)
                .and_then(|()| check_crc(part, entry.raw_crc, out))
                .inspect_err(|_| out.clear());
        }
        let before = out.len();
        out.resize(before.saturating_add(raw_bytes), 0);
        let result = self.fill(
            part,
            entry,
            stored,
            out.get_mut(before..).unwrap_or_default(),
        );
        if result.is_err() {
            out.truncate(before);
        }
        result
    }

    /// Decompresses into `out`, which is empty and need not be cleared. Its capacity bounds what
    /// zstd may write.
    pub(super) fn decompress(
        &mut self,
        part: SealedPart,
        stored: &[u8],
        raw_bytes: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), SealedError> {
        out.clear();
        out.reserve_exact(raw_bytes);
        match self
            .zstd
            .decompress_to_buffer(without_sum(stored, &mut self.unsummed), out)
        {
            Ok(written) if written == raw_bytes => Ok(()),
            _ => Err(SealedError::Decompress {
                part,
                expected: raw_bytes,
            }),
        }
    }

    fn fill(
        &mut self,
        part: SealedPart,
        entry: FrameEntry,
        stored: &[u8],
        raw: &mut [u8],
    ) -> Result<(), SealedError> {
        // The buffer's length bounds what zstd may write.
        match self
            .zstd
            .decompress_to_buffer(without_sum(stored, &mut self.unsummed), raw)
        {
            Ok(written) if written == raw.len() => check_crc(part, entry.raw_crc, raw),
            _ => Err(SealedError::Decompress {
                part,
                expected: raw.len(),
            }),
        }
    }
}

/// Copies the zstd frame `stored` into `unsummed` without its content checksum (RFC 8878, 3.1.1).
/// That checksum is for stock zstd. Ours is checked instead, because each pass over the
/// decompressed bytes costs a tenth of the decompression.
fn without_sum<'a>(stored: &'a [u8], unsummed: &'a mut Vec<u8>) -> &'a [u8] {
    /// The offset after the magic number.
    const DESCRIPTOR: usize = 4;
    const SUM_FLAG: u8 = 1 << 2;
    const SUM_BYTES: usize = 4;
    let content = stored.len().saturating_sub(SUM_BYTES);
    let (Some(content), Some(descriptor)) = (stored.get(..content), stored.get(DESCRIPTOR)) else {
        return stored;
    };
    if !stored.starts_with(&zstd::zstd_safe::MAGICNUMBER.to_le_bytes())
        || descriptor & SUM_FLAG == 0
    {
        return stored;
    }
    unsummed.clear();
    unsummed.extend_from_slice(content);
    if let Some(descriptor) = unsummed.get_mut(DESCRIPTOR) {
        *descriptor &= !SUM_FLAG;
    }
    unsummed
}
