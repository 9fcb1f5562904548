//! [`ProvedCompressor`]: compresses a frame, decompresses it again and compares the result with its
//! WAL, while both are in the processor's cache.
//!
//! If an object made of such frames reads back from a store byte for byte, it is proved to contain
//! its WAL. Decompressing the object after reading it back would repeat this work with data that is
//! no longer in the cache.

use super::{
    container::{SealedError, SealedPart, check_crc},
    frame::{EncodedFrame, FrameCompressor, FrameDecompressor},
};

/// Compresses frames and verifies each of them.
#[derive(Debug)]
pub struct ProvedCompressor {
    compressor: FrameCompressor,
    decompressor: FrameDecompressor,
    again: Vec<u8>,
}

impl ProvedCompressor {
    /// Creates a compressor with zstd's `level`. Levels 1 to 4 are tuned to WAL.
    ///
    /// # Errors
    /// [`SealedError::Compress`] or [`SealedError::Decompress`] when zstd has no memory.
    pub fn new(level: i32) -> Result<Self, SealedError> {
        Ok(Self {
            compressor: FrameCompressor::new(level)?,
            decompressor: FrameDecompressor::new()?,
            again: Vec::new(),
        })
    }

    /// Compresses the WAL of frame `number` and verifies that it decompresses to the same bytes.
    ///
    /// # Errors
    /// Any [`SealedError`] about the frame if the bytes differ. Then this machine computes
    /// incorrectly.
    pub fn compress(&mut self, number: u32, raw: &[u8]) -> Result<EncodedFrame, SealedError> {
        let frame = self.compressor.compress(raw)?;
        self.prove(number, &frame, raw)?;
        Ok(frame)
    }

    fn prove(&mut self, number: u32, frame: &EncodedFrame, raw: &[u8]) -> Result<(), SealedError> {
        let part = SealedPart::Frame(number);
        check_crc(part, frame.stored_crc, &frame.stored)?;
        self.decompressor
            .decompress(part, &frame.stored, raw.len(), &mut self.again)?;
        if self.again == raw {
            return Ok(());
        }
        Err(SealedError::Malformed {
            part,
            problem: "it does not decompress to what it was made of; check this machine's memory",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_come_out_again_is_refused() {
        let wal: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
        let mut compressor = ProvedCompressor::new(1).expect("zstd has memory");
        let frame = compressor.compress(3, &wal).expect("it comes out");
        compressor.prove(3, &frame, &wal).expect("and once more");
        // Simulates a bit that flips between reading and compressing.
        let mut other = wal.clone();
        if let Some(byte) = other.get_mut(7) {
            *byte ^= 1;
        }
        assert!(compressor.prove(3, &frame, &other).is_err());
        let mut broken = frame.clone();
        if let Some(byte) = broken.stored.get_mut(100) {
            *byte ^= 1;
        }
        assert!(compressor.prove(3, &broken, &wal).is_err());
    }
}
