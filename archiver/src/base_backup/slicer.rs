//! Cuts tar streams into slices, and computes the checksum of every file.
//!
//! A slice ends between two entries, or inside a file at a multiple of 512 bytes. In the second
//! case the next slice states the position at which the file continues. The slices of an archive in
//! order are its tar stream, byte for byte.

use std::collections::{BTreeMap, VecDeque};

use sha2::{Digest, Sha256};
use wal_format::{
    ContinuedFile,
    backup::SLICE_BYTES,
    layout::BackupArchive,
    tar::{BLOCK_BYTES, TarHeader},
};

use super::error::malformed;
use crate::error::Result;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RawSlice {
    pub(super) archive: BackupArchive,
    /// The number of the slice, from 1 in each archive.
    pub(super) number: u32,
    pub(super) continues: Option<ContinuedFile>,
    pub(super) raw: Vec<u8>,
}

/// The size in bytes and the SHA-256 of a received file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ReceivedFile {
    pub(super) size: u64,
    pub(super) sha256: String,
}

/// The file that is being received.
#[derive(Debug)]
struct Open {
    path: String,
    size: u64,
    got: u64,
    padding: u64,
    sum: Sha256,
}

#[derive(Debug)]
pub(super) struct Slicer {
    slice_bytes: u64,
    archive: Option<BackupArchive>,
    number: u32,
    raw: Vec<u8>,
    continues: Option<ContinuedFile>,
    header: Vec<u8>,
    open: Option<Open>,
    files: BTreeMap<String, ReceivedFile>,
    label: Vec<u8>,
    map: Option<Vec<u8>>,
    ready: VecDeque<RawSlice>,
}

impl Default for Slicer {
    fn default() -> Self {
        Self::with_slice_bytes(SLICE_BYTES)
    }
}

impl Slicer {
    pub(super) fn with_slice_bytes(slice_bytes: u64) -> Self {
        Self {
            slice_bytes,
            archive: None,
            number: 0,
            raw: Vec::new(),
            continues: None,
            header: Vec::with_capacity(BLOCK_BYTES),
            open: None,
            files: BTreeMap::new(),
            label: Vec::new(),
            map: None,
            ready: VecDeque::new(),
        }
    }

    /// Begins an archive. The previous one is complete.
    pub(super) fn begin(&mut self, archive: BackupArchive) -> Result<()> {
        self.finish()?;
        self.archive = Some(archive);
        self.number = 0;
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<()> {
        if self.open.is_some() || !self.header.is_empty() {
            return Err(malformed("a tar archive ends inside an entry").into());
        }
        if !self.raw.is_empty() {
            self.cut(None);
        }
        self.archive = None;
        Ok(())
    }

    /// Returns the next complete slice.
    pub(super) fn ready(&mut self) -> Option<RawSlice> {
        self.ready.pop_front()
    }

    /// The received files, by their path in the data directory.
    pub(super) fn files(&self) -> &BTreeMap<String, ReceivedFile> {
        &self.files
    }

    pub(super) fn backup_label(&self) -> &[u8] {
        &self.label
    }

    /// The content of `tablespace_map`. `None` if the backup has no such file.
    pub(super) fn tablespace_map(&self) -> Option<&[u8]> {
        self.map.as_deref()
    }

    /// Processes the next bytes of the archive.
    pub(super) fn push(&mut self, mut bytes: &[u8]) -> Result<()> {
        if self.archive.is_none() {
            return Err(malformed("data came outside of an archive").into());
        }
        while !bytes.is_empty() {
            bytes = match self.open.take() {
                Some(open) => self.content(open, bytes),
                None => self.head(bytes)?,
            };
        }
        Ok(())
    }

    fn head<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8]> {
        if self.header.is_empty() && self.raw.len() as u64 >= self.slice_bytes {
            self.cut(None);
        }
        let wanted = BLOCK_BYTES - self.header.len();
        let (now, rest) = bytes.split_at(wanted.min(bytes.len()));
        self.header.extend_from_slice(now);
        let Ok(block) = <&[u8; BLOCK_BYTES]>::try_from(self.header.as_slice()) else {
            return Ok(rest);
        };
        let entry = TarHeader::parse(block).map_err(|error| malformed(error.to_string()))?;
        self.raw.extend_from_slice(&self.header);
        self.header.clear();
        if let Some(entry) = entry
            && entry.kind == wal_format::tar::TarKind::File
        {
            let padding = entry.padded_size() - entry.size;
            if self.archive == Some(BackupArchive::Base) && entry.path == "tablespace_map" {
                // From PostgreSQL 14 on, the file exists even without tablespaces, and is then
                // empty.
                self.map.get_or_insert_default();
            }
            let open = Open {
                path: entry.path,
                size: entry.size,
                got: 0,
                padding,
                sum: Sha256::new(),
            };
            self.keep_or_close(open);
        }
        Ok(rest)
    }

    fn content<'a>(&mut self, mut open: Open, bytes: &'a [u8]) -> &'a [u8] {
        let left = open.size - open.got;
        if left == 0 {
            let (now, rest) = bytes.split_at(index(open.padding).min(bytes.len()));
            self.raw.extend_from_slice(now);
            open.padding -= now.len() as u64;
            self.keep_or_close(open);
            return rest;
        }
        if self.raw.len() as u64 >= self.slice_bytes
            && open.got > 0
            && open.got.is_multiple_of(BLOCK_BYTES as u64)
        {
            let (path, offset, size) = (open.path.clone(), open.got, open.size);
            self.cut(Some(ContinuedFile { path, offset, size }));
        }
        // Up to the end of the slice, which in a file is at a multiple of 512 bytes of its content.
        let room = self
            .slice_bytes
            .saturating_sub(self.raw.len() as u64)
            .max(1);
        let until = (open.got + room).next_multiple_of(BLOCK_BYTES as u64) - open.got;
        let (now, rest) = bytes.split_at(index(left.min(until)).min(bytes.len()));
        self.raw.extend_from_slice(now);
        open.sum.update(now);
        open.got += now.len() as u64;
        if self.archive == Some(BackupArchive::Base) {
            match open.path.as_str() {
                "backup_label" => self.label.extend_from_slice(now),
                "tablespace_map" => self.map.get_or_insert_default().extend_from_slice(now),
                _ => {}
            }
        }
        self.keep_or_close(open);
        rest
    }

    fn keep_or_close(&mut self, open: Open) {
        if open.got < open.size || open.padding > 0 {
            self.open = Some(open);
            return;
        }
        let path = match self.archive {
            Some(BackupArchive::Tablespace(oid)) => format!("pg_tblspc/{oid}/{}", open.path),
            _ => open.path,
        };
        let sha256 = hex::encode(open.sum.finalize());
        self.files.insert(
            path,
            ReceivedFile {
                size: open.size,
                sha256,
            },
        );
    }

    fn cut(&mut self, next: Option<ContinuedFile>) {
        let Some(archive) = self.archive else { return };
        self.number += 1;
        let raw = std::mem::take(&mut self.raw);
        let continues = std::mem::replace(&mut self.continues, next);
        self.ready.push_back(RawSlice {
            archive,
            number: self.number,
            continues,
            raw,
        });
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(name: &str, content: &[u8]) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000600");
        block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        block[156] = b'0';
        block[148..156].copy_from_slice(b"        ");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block.extend_from_slice(content);
        block.resize(block.len().next_multiple_of(BLOCK_BYTES), 0);
        block
    }

    proptest! {
        /// For all sizes and pieces, the slices together are the stream, and each slice states
        /// correctly where it continues.
        #[test]
        fn slices_are_the_stream(
            sizes in prop::collection::vec(0usize..5000, 1..12),
            pieces in prop::collection::vec(1usize..3000, 1..40),
            slice_bytes in 512u64..4096,
        ) {
            let mut stream = Vec::new();
            let mut at = BTreeMap::new();
            for (number, size) in sizes.iter().enumerate() {
                let content: Vec<u8> = (0..*size).map(|byte| u8::try_from((byte * 7 + number) % 251).expect("below 251")).collect();
                at.insert(format!("file{number}"), (stream.len() + BLOCK_BYTES, content.clone()));
                stream.extend(entry(&format!("file{number}"), &content));
            }
            stream.extend([0; 1024]);
            let mut slicer = Slicer::with_slice_bytes(slice_bytes);
            slicer.begin(BackupArchive::Base).expect("it begins");
            let mut rest = &stream[..];
            for piece in pieces.iter().cycle() {
                let (now, after) = rest.split_at((*piece).min(rest.len()));
                slicer.push(now).expect("it is a tar stream");
                rest = after;
                if rest.is_empty() {
                    break;
                }
            }
            slicer.finish().expect("it is complete");
            let mut whole = Vec::new();
            let mut number = 0;
            while let Some(slice) = slicer.ready() {
                number += 1;
                prop_assert_eq!(slice.number, number);
                prop_assert!(slice.raw.len() as u64 <= slice_bytes + 1024);
                if let Some(file) = &slice.continues {
                    let (start, content) = &at[&file.path];
                    prop_assert_eq!(whole.len(), start + index(file.offset));
                    prop_assert_eq!(file.size, content.len() as u64);
                    prop_assert!(file.offset > 0 && file.offset < file.size && file.offset % 512 == 0);
                }
                whole.extend_from_slice(&slice.raw);
            }
            prop_assert_eq!(whole, stream);
            for (name, (_, content)) in at {
                let expected = hex::encode(Sha256::digest(&content));
                prop_assert_eq!(&slicer.files()[&name].sha256, &expected);
            }
        }
    }

    #[test]
    fn a_truncated_archive_is_no_archive() {
        let mut slicer = Slicer::default();
        assert!(slicer.push(b"x").is_err(), "no archive has begun");
        slicer.begin(BackupArchive::Base).expect("it begins");
        slicer
            .push(&entry("a", &[1; 1000])[..1200])
            .expect("it is the beginning of one");
        assert!(slicer.finish().is_err());
    }
}
