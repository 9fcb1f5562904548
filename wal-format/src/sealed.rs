//! Our container for a range of WAL: a sealed segment, or a tail range of a segment that is still
//! open.
//!
//! ```text
//! header (skippable) | zstd frame | zstd frame | … | summary (skippable) |
//!     footer (skippable): seek index, trailer
//! ```
//!
//! Stock `zstd -d` skips header, summary and footer and returns exactly the WAL. A CRC-32 covers
//! every byte. A range GET of the object's end gives the header's content, the summary and the
//! index without the WAL itself. `FORMAT.md` describes the bytes.
//! Invariant: [`SealedReader::open`] and [`SealedReader::read_all`] together detect any damage, and
//! decompress no more than the header announces.

mod container;
mod footer;
mod frame;
mod header;
mod proved;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

pub use container::{
    DEFAULT_LEVEL, FORMAT_VERSION, FRAME_BYTES, FRAME_BYTES_MAX, SealedError, SealedPart,
};
pub use footer::{FOOTER_LEN_HINT, FooterFromTail, SealedFooter};
pub use frame::{EncodedFrame, FrameCompressor, FrameDecompressor, FrameEntry};
pub use header::SealedHeader;
pub use proved::ProvedCompressor;
pub use reader::{Frames, SealedReader};
pub use writer::{SealedWriter, seal};
