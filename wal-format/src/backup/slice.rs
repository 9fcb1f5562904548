//! A slice of a backup: its bytes are checked and decompressed, and split into files.
//!
//! Invariant: no more memory is allocated than [`SLICE_BYTES_MAX`],
//! whatever the object announces.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    layout::BackupArchive,
    tar::{BLOCK_BYTES, TarError, TarHeader, TarKind},
};

/// The number of raw bytes after which a slice ends, at the next position where a slice can end.
pub const SLICE_BYTES: u64 = 16 << 20;

/// The maximum raw bytes in a slice by any writer, and so the memory that a reader must be able to
/// allocate for each thread.
pub const SLICE_BYTES_MAX: u64 = 64 << 20;

/// A slice of an archive: one zstd frame, stored as one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupSlice {
    /// The archive.
    pub archive: BackupArchive,
    /// Its number in the archive, from 1.
    pub number: u32,
    /// The number of bytes of the tar stream in it.
    pub raw_bytes: u64,
    /// The object's length.
    pub stored_bytes: u64,
    /// SHA-256 of the object, in hexadecimal.
    pub sha256: String,
    /// The file in whose data the slice begins. `None` if the slice begins at a tar entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub continues: Option<ContinuedFile>,
}

/// A file whose data continues from one slice to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContinuedFile {
    /// Its path in the archive.
    pub path: String,
    /// The offset in the file at which the slice continues: a multiple of 512.
    pub offset: u64,
    /// The size of the whole file.
    pub size: u64,
}

/// The reason why a slice cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// It does not decompress to the bytes that were recorded.
    #[error("it does not decompress to the {expected} bytes that were recorded")]
    Decompress {
        /// The recorded number of bytes.
        expected: u64,
    },
    /// It is not the object that was stored.
    #[error("its SHA-256 is not the one that was recorded")]
    Sum,
    /// Its content is not a tar stream as PostgreSQL writes it.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// It announces more bytes than any writer puts into a slice.
    #[error("it announces {announced} bytes; a slice holds {SLICE_BYTES_MAX} at the most")]
    TooLarge {
        /// The announced number of bytes.
        announced: u64,
    },
}

/// A part of a slice, in the order of the tar stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlicePart<'a> {
    /// A directory. The empty path is the archive's root.
    Directory(String),
    /// A file, or the part of it that is in the slice.
    File {
        /// Its path below the archive's root.
        path: String,
        /// The offset in the file at which `content` begins.
        offset: u64,
        /// The size of the whole file.
        size: u64,
        /// Permission bits.
        mode: u32,
        /// The bytes.
        content: &'a [u8],
    },
    /// A symbolic link. A restore creates its own links and follows none of these.
    Link(String),
}

impl BackupSlice {
    pub(super) fn is_of_allowed_size(&self) -> bool {
        let stored_max = SLICE_BYTES_MAX.saturating_add(1 << 20);
        self.raw_bytes <= SLICE_BYTES_MAX && self.stored_bytes <= stored_max
    }

    /// Returns true if `stored` is the object that was recorded.
    #[must_use]
    pub fn is_stored_as(&self, stored: &[u8]) -> bool {
        hex::encode(Sha256::digest(stored)) == self.sha256
    }

    /// Checks the object and returns its part of the tar stream.
    ///
    /// # Errors
    /// [`SliceError`] when it is not the object that was recorded, or does not have the recorded
    /// length.
    pub fn open(&self, stored: &[u8]) -> Result<Vec<u8>, SliceError> {
        if !self.is_of_allowed_size() {
            let announced = self.raw_bytes.max(self.stored_bytes);
            return Err(SliceError::TooLarge { announced });
        }
        if !self.is_stored_as(stored) {
            return Err(SliceError::Sum);
        }
        let expected = self.raw_bytes;
        let wrong = || SliceError::Decompress { expected };
        // The zstd frame also contains its decompressed length. Check it before memory is
        // allocated.
        let announced = zstd::zstd_safe::get_frame_content_size(stored).map_err(|_| wrong())?;
        if announced.is_some_and(|announced| announced != expected) {
            return Err(wrong());
        }
        let length = usize::try_from(expected).map_err(|_| wrong())?;
        let mut raw = Vec::with_capacity(length);
        // The capacity bounds what zstd may write.
        let written = zstd::bulk::Decompressor::new()
            .and_then(|mut zstd| zstd.decompress_to_buffer(stored, &mut raw))
            .map_err(|_| wrong())?;
        if written == length {
            Ok(raw)
        } else {
            Err(wrong())
        }
    }

    /// The name that `backup_manifest` gives to a file of this slice's archive.
    #[must_use]
    pub fn manifest_name(&self, path: &str) -> String {
        match self.archive {
            BackupArchive::Base => path.to_owned(),
            BackupArchive::Tablespace(oid) => format!("pg_tblspc/{oid}/{path}"),
        }
    }

    /// Calls `each` with every part of `raw`, which [`BackupSlice::open`] returned.
    ///
    /// # Errors
    /// [`SliceError::Tar`], as an `E`, and the errors of `each`.
    pub fn for_each_part<E: From<SliceError>>(
        &self,
        raw: &[u8],
        each: &mut dyn FnMut(SlicePart<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = raw;
        if let Some(file) = &self.continues {
            let left = file.size.saturating_sub(file.offset);
            each(SlicePart::File {
                path: file.path.clone(),
                offset: file.offset,
                size: file.size,
                // A slice does not record the mode of the file that it continues. Only the files of
                // relations are longer than a slice, and this is the most that PostgreSQL gives
                // them (`pg_file_create_mode`).
                mode: 0o640,
                content: take(&mut rest, left),
            })?;
        }
        while let Some((block, after)) = rest.split_first_chunk::<BLOCK_BYTES>() {
            rest = after;
            let Some(entry) = TarHeader::parse(block).map_err(SliceError::from)? else {
                continue;
            };
            match entry.kind {
                TarKind::Directory => each(SlicePart::Directory(entry.path))?,
                TarKind::Symlink(_) => each(SlicePart::Link(entry.path))?,
                TarKind::File => each(SlicePart::File {
                    path: entry.path,
                    offset: 0,
                    size: entry.size,
                    mode: entry.mode,
                    content: take(&mut rest, entry.size),
                })?,
            }
        }
        Ok(())
    }
}

/// Returns as many of `length` bytes as the slice has, and skips the padding after them.
fn take<'a>(rest: &mut &'a [u8], length: u64) -> &'a [u8] {
    let wanted = usize::try_from(length).unwrap_or(usize::MAX);
    let (content, after) = rest.split_at(wanted.min(rest.len()));
    let padding = wanted
        .div_ceil(BLOCK_BYTES)
        .saturating_mul(BLOCK_BYTES)
        .saturating_sub(wanted);
    *rest = after.get(padding..).unwrap_or_default();
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(stored: &[u8], raw_bytes: u64) -> BackupSlice {
        BackupSlice {
            archive: BackupArchive::Base,
            number: 1,
            raw_bytes,
            stored_bytes: stored.len() as u64,
            sha256: hex::encode(Sha256::digest(stored)),
            continues: None,
        }
    }

    #[test]
    fn a_slice_is_what_was_recorded_or_refused() {
        let raw = vec![0; 3 << 20];
        let stored = zstd::bulk::compress(&raw, 1).expect("it compresses");
        assert_eq!(slice(&stored, 3 << 20).open(&stored), Ok(raw));
        for length in [0, 1, (3 << 20) - 1, (3 << 20) + 1] {
            let error = slice(&stored, length)
                .open(&stored)
                .expect_err("another length");
            assert_eq!(error, SliceError::Decompress { expected: length });
        }
        let mut flipped = stored.clone();
        flipped[20] ^= 1;
        assert_eq!(slice(&stored, 3 << 20).open(&flipped), Err(SliceError::Sum));
        let announced = 42 << 30;
        assert_eq!(
            slice(&stored, announced).open(&stored),
            Err(SliceError::TooLarge { announced })
        );
    }

    /// The frame does not contain its length, and decompresses to more than was recorded.
    #[test]
    fn a_frame_that_holds_more_than_was_recorded_is_not_decompressed() {
        let raw = vec![7_u8; 40 << 20];
        let stored = zstd::stream::encode_all(raw.as_slice(), 1).expect("it compresses");
        let found = zstd::zstd_safe::get_frame_content_size(&stored);
        assert_eq!(found.ok().flatten(), None, "the frame names no length");
        let error = slice(&stored, 1 << 20).open(&stored).expect_err("too much");
        assert_eq!(error, SliceError::Decompress { expected: 1 << 20 });
    }
}
