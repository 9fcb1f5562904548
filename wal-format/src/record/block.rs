//! Block references: the block that a record changes, its image and its data
//! (`XLogRecordBlockHeader`).
//!
//! Version 15 renumbered the bits of `bimg_info`. Everything else is the same from 13 to 18.

use std::fmt;

use crate::{PgVersion, RelationFile, fields::Fields};

/// `BLCKSZ`. Tidemark reads WAL of servers with 8 KiB blocks.
const BLOCK_BYTES: u16 = 8192;
/// `XLR_MAX_BLOCK_ID`.
const BLOCK_ID_MAX: u8 = 32;

const FORK_MASK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_REL: u8 = 0x80;

const IMAGE_HAS_HOLE: u8 = 0x01;

/// A fork of a relation (`ForkNumber` in `relpath.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fork(pub u8);

impl Fork {
    /// The relation itself.
    pub const MAIN: Self = Self(0);
    /// The free space map.
    pub const FREE_SPACE_MAP: Self = Self(1);
    /// The visibility map.
    pub const VISIBILITY_MAP: Self = Self(2);
    /// The fork from which an unlogged relation is recreated after a crash.
    pub const INIT: Self = Self(3);
}

/// Prints the fork's name as `pg_waldump` does.
impl fmt::Display for Fork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MAIN => f.write_str("main"),
            Self::FREE_SPACE_MAP => f.write_str("fsm"),
            Self::VISIBILITY_MAP => f.write_str("vm"),
            Self::INIT => f.write_str("init"),
            Self(other) => write!(f, "fork {other}"),
        }
    }
}

/// The compression of a page image (`wal_compression`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageCompression {
    /// Not compressed.
    None,
    /// PostgreSQL's own method.
    Pglz,
    /// A raw LZ4 block (15+).
    Lz4,
    /// One zstd frame (15+).
    Zstd,
}

/// A full page image, without the unused space in the middle of the page (the hole).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockImage {
    /// Its length in the record.
    pub bytes: u16,
    /// The offset of the hole.
    pub hole_offset: u16,
    /// The length of the hole. 0 if there is none.
    pub hole_bytes: u16,
    /// The compression of the rest.
    pub compression: ImageCompression,
    /// `BKPIMAGE_APPLY`: redo restores the image. Otherwise it serves `wal_consistency_checking`.
    pub apply: bool,
}

/// A block that a record changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockReference<'a> {
    /// The number by which redo refers to it.
    pub id: u8,
    /// The relation.
    pub relation: RelationFile,
    /// The relation's fork.
    pub fork: Fork,
    /// The block's number in the fork.
    pub block: u32,
    /// True if redo initialises the page.
    pub will_init: bool,
    /// The page image.
    pub image: Option<BlockImage>,
    /// The image's bytes. Empty if they are outside of the record's window.
    pub image_bytes: &'a [u8],
    /// The resource manager's data. Empty if it is outside of the record's window.
    pub data: &'a [u8],
}

/// A block header as stored in the record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    id: u8,
    flags: u8,
    data_bytes: u16,
    image: Option<BlockImage>,
    /// `None` for the relation of the previous block.
    relation: Option<RelationFile>,
    block: u32,
}

impl Header {
    /// Parses the bytes after `id`. Returns `None` if they are truncated or contradict themselves.
    #[inline]
    pub(super) fn read(version: PgVersion, id: u8, fields: &mut Fields<'_>) -> Option<Self> {
        if id > BLOCK_ID_MAX {
            return None;
        }
        let flags = fields.u8()?;
        let data_bytes = fields.u16()?;
        if (flags & HAS_DATA != 0) != (data_bytes > 0) {
            return None;
        }
        let image = if flags & HAS_IMAGE != 0 {
            Some(BlockImage::read(version, fields)?)
        } else {
            None
        };
        let relation = if flags & SAME_REL == 0 {
            Some(RelationFile {
                tablespace: fields.u32()?,
                database: fields.u32()?,
                relation: fields.u32()?,
            })
        } else {
            None
        };
        Some(Self {
            id,
            flags,
            data_bytes,
            image,
            relation,
            block: fields.u32()?,
        })
    }

    pub(super) fn data_and_image_bytes(&self) -> usize {
        let image = self.image.map_or(0, |image| usize::from(image.bytes));
        usize::from(self.data_bytes).saturating_add(image)
    }
}

impl BlockImage {
    fn read(version: PgVersion, fields: &mut Fields<'_>) -> Option<Self> {
        let bytes = fields.u16()?;
        let hole_offset = fields.u16()?;
        let info = fields.u8()?;
        let (apply, compression) = if version >= PgVersion::V15 {
            let compression = match info & 0x1C {
                0 => ImageCompression::None,
                0x04 => ImageCompression::Pglz,
                0x08 => ImageCompression::Lz4,
                0x10 => ImageCompression::Zstd,
                _ => return None,
            };
            (info & 0x02 != 0, compression)
        } else if info & 0x02 != 0 {
            (info & 0x04 != 0, ImageCompression::Pglz)
        } else {
            (info & 0x04 != 0, ImageCompression::None)
        };
        let compressed = compression != ImageCompression::None;
        let has_hole = info & IMAGE_HAS_HOLE != 0;
        let hole_bytes = match (compressed, has_hole) {
            (true, true) => fields.u16()?,
            (true, false) => 0,
            (false, _) => BLOCK_BYTES.checked_sub(bytes)?,
        };
        let sound = if has_hole {
            hole_offset > 0 && hole_bytes > 0 && bytes < BLOCK_BYTES
        } else {
            hole_offset == 0 && hole_bytes == 0 && compressed == (bytes < BLOCK_BYTES)
        };
        sound.then_some(Self {
            bytes,
            hole_offset,
            hole_bytes,
            compression,
            apply,
        })
    }
}

/// Conditions between consecutive block headers.
#[derive(Debug, Default)]
pub(super) struct Order {
    last: Option<u8>,
}

impl Order {
    /// Checks that the numbers ascend, and that the first header names its relation.
    pub(super) fn check(&mut self, header: &Header) -> Option<()> {
        let sound = match self.last {
            Some(last) => header.id > last,
            None => header.relation.is_some(),
        };
        self.last = Some(header.id);
        sound.then_some(())
    }
}

/// The block references of a record.
#[derive(Clone, Debug)]
pub struct BlockReferences<'a> {
    version: PgVersion,
    headers: Fields<'a>,
    data: &'a [u8],
    relation: RelationFile,
}

impl<'a> BlockReferences<'a> {
    /// Creates the iterator for a body whose structure was checked and whose headers take `headers`
    /// bytes.
    pub(super) fn new(version: PgVersion, body: &'a [u8], headers: usize) -> Self {
        let (headers, data) = body.split_at_checked(headers).unwrap_or((body, &[]));
        let relation = RelationFile {
            tablespace: 0,
            database: 0,
            relation: 0,
        };
        Self {
            version,
            headers: Fields(headers),
            data,
            relation,
        }
    }

    fn take(&mut self, bytes: usize) -> &'a [u8] {
        match self.data.split_at_checked(bytes) {
            Some((now, rest)) => {
                self.data = rest;
                now
            }
            None => {
                self.data = &[];
                &[]
            }
        }
    }
}

impl<'a> Iterator for BlockReferences<'a> {
    type Item = BlockReference<'a>;

    fn next(&mut self) -> Option<BlockReference<'a>> {
        let id = loop {
            match self.headers.u8()? {
                super::MAIN_DATA_SHORT | super::MAIN_DATA_LONG => return None,
                super::ORIGIN => self.headers.skip(2)?,
                super::TOPLEVEL_XID => self.headers.skip(4)?,
                id => break id,
            }
        };
        let header = Header::read(self.version, id, &mut self.headers)?;
        self.relation = header.relation.unwrap_or(self.relation);
        let image_bytes = self.take(header.image.map_or(0, |image| usize::from(image.bytes)));
        let data = self.take(usize::from(header.data_bytes));
        Some(BlockReference {
            id,
            relation: self.relation,
            fork: Fork(header.flags & FORK_MASK),
            block: header.block,
            will_init: header.flags & WILL_INIT != 0,
            image: header.image,
            image_bytes,
            data,
        })
    }
}
