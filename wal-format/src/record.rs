//! A WAL record: its header, and the parts of its body: block references, page images and main
//! data.
//!
//! The body contains first all headers, then all data in the same order. Its structure is therefore
//! checked from the first [`STRUCTURE_BYTES`], however long it is. Nothing here allocates memory.

mod block;

pub use block::{BlockImage, BlockReference, BlockReferences, Fork, ImageCompression};

use crate::{Lsn, PgVersion, error::DecodeErrorKind, fields::Fields};

/// `SizeOfXLogRecord`.
pub const RECORD_HEADER_BYTES: usize = 24;
/// The part of a record's body that is kept for interpretation unless the sink requests another.
/// A larger buffer is released after its record.
pub const WINDOW_BYTES: usize = 256 << 10;

/// `XLogRecordMaxSize` (16 and later). Records of older versions do not reach it either.
pub const RECORD_BYTES_MAX: u32 = 1020 << 20;
/// The maximum length of the headers in a body: 33 block headers of 27 bytes, and three other
/// items.
pub const STRUCTURE_BYTES: usize = 1024;

/// `RM_MAX_BUILTIN_ID`, the same from 13 to 18.
const BUILTIN_MAX: u8 = 21;
/// `RM_MIN_CUSTOM_ID` (15+).
const CUSTOM_MIN: u8 = 128;
/// Names of the built-in resource managers, as `pg_waldump` prints them.
const NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

/// A resource manager (`RmgrId`; the built-in ones are numbered in `rmgrlist.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ResourceManager(pub u8);

impl ResourceManager {
    /// Checkpoints, switches, restore points.
    pub const XLOG: Self = Self(0);
    /// Commits, aborts, prepared transactions.
    pub const TRANSACTION: Self = Self(1);
    /// Creation and removal of tablespaces.
    pub const TABLESPACE: Self = Self(5);

    /// Returns true if WAL of `version` contains records of this resource manager.
    #[must_use]
    pub fn exists_in(self, version: PgVersion) -> bool {
        self.0 <= BUILTIN_MAX || (self.0 >= CUSTOM_MIN && version >= PgVersion::V15)
    }

    /// Returns the name of a built-in resource manager, as `pg_waldump` prints it. `None` for any
    /// other.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        NAMES.get(usize::from(self.0)).copied()
    }
}

/// A record's header (`XLogRecord` in `xlogrecord.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    /// `xl_tot_len`: header and body.
    pub total: u32,
    /// `xl_xid`.
    pub xid: u32,
    /// `xl_prev`: the start of the previous record.
    pub previous: Lsn,
    /// `xl_info`. The upper four bits belong to the resource manager.
    pub info: u8,
    /// `xl_rmid`.
    pub resource_manager: ResourceManager,
    /// `xl_crc`.
    pub crc: u32,
}

impl RecordHeader {
    /// Parses a header.
    #[must_use]
    pub fn parse(bytes: &[u8; RECORD_HEADER_BYTES]) -> Self {
        // One load per field, since the compiler knows the lengths of the slices.
        let [
            t0,
            t1,
            t2,
            t3,
            x0,
            x1,
            x2,
            x3,
            p0,
            p1,
            p2,
            p3,
            p4,
            p5,
            p6,
            p7,
            info,
            rmid,
            _,
            _,
            c0,
            c1,
            c2,
            c3,
        ] = *bytes;
        Self {
            total: u32::from_le_bytes([t0, t1, t2, t3]),
            xid: u32::from_le_bytes([x0, x1, x2, x3]),
            previous: Lsn(u64::from_le_bytes([p0, p1, p2, p3, p4, p5, p6, p7])),
            info,
            resource_manager: ResourceManager(rmid),
            crc: u32::from_le_bytes([c0, c1, c2, c3]),
        }
    }

    /// The length of the body.
    #[must_use]
    pub fn body_bytes(&self) -> usize {
        (self.total as usize).saturating_sub(RECORD_HEADER_BYTES)
    }

    /// Checks a length (`xl_tot_len`), which is read before the rest of its header.
    pub(crate) fn check_total(found: u32) -> Result<(), DecodeErrorKind> {
        if (found as usize) < RECORD_HEADER_BYTES || found > RECORD_BYTES_MAX {
            return Err(DecodeErrorKind::RecordLength { found });
        }
        Ok(())
    }

    /// Checks the other fields (`ValidXLogRecordHeader`). `previous` is the start of the previous
    /// record, if known.
    pub(crate) fn check(
        &self,
        version: PgVersion,
        lsn: Lsn,
        previous: Option<Lsn>,
    ) -> Result<(), DecodeErrorKind> {
        let found = self.previous;
        let (sound, expected) = match previous {
            Some(expected) => (found == expected, expected),
            None => (found < lsn, lsn),
        };
        if !sound {
            return Err(DecodeErrorKind::Previous { expected, found });
        }
        if !self.resource_manager.exists_in(version) {
            let found = self.resource_manager.0;
            return Err(DecodeErrorKind::ResourceManager { found });
        }
        Ok(())
    }
}

/// A complete record that passed its checks.
#[derive(Clone, Copy, Debug)]
pub struct WalRecord<'a> {
    /// The major version, which determines layouts.
    pub version: PgVersion,
    /// The start LSN.
    pub lsn: Lsn,
    /// The end LSN, aligned to 8, as PostgreSQL reports it: the end of a page is not moved past the
    /// next page's header, and a switch ends with its segment.
    pub end_lsn: Lsn,
    /// Its header.
    pub header: RecordHeader,
    /// The front of the body: all of it, or as much as was requested.
    pub body: &'a [u8],
    layout: Layout,
}

/// The offsets of the parts of a body.
#[derive(Clone, Copy, Debug, Default)]
struct Layout {
    /// The end of the headers, where the first block's data begins.
    headers: usize,
    /// The start of the main data.
    main_data: usize,
    origin: Option<u16>,
    toplevel_xid: Option<u32>,
}

impl<'a> WalRecord<'a> {
    /// Creates a record whose structure has not been read.
    pub(crate) fn new(
        version: PgVersion,
        lsn: Lsn,
        end_lsn: Lsn,
        header: RecordHeader,
        body: &'a [u8],
    ) -> Self {
        Self {
            version,
            lsn,
            end_lsn,
            header,
            body,
            layout: Layout::default(),
        }
    }

    /// Checks the structure of the body (`DecodeXLogRecord`). `body` must contain
    /// [`STRUCTURE_BYTES`] of it, or all.
    pub(crate) fn read_structure(&mut self) -> Result<(), DecodeErrorKind> {
        self.layout
            .read(self.version, self.header.body_bytes(), self.body)
            .ok_or(DecodeErrorKind::Body)
    }

    /// Returns true if [`body`](Self::body) is complete.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.body.len() == self.header.body_bytes()
    }

    /// The main data, as far as [`body`](Self::body) contains it.
    #[must_use]
    pub fn main_data(&self) -> &'a [u8] {
        self.body.get(self.layout.main_data..).unwrap_or_default()
    }

    /// The blocks that the record changes, in order.
    #[must_use]
    pub fn blocks(&self) -> BlockReferences<'a> {
        BlockReferences::new(self.version, self.body, self.layout.headers)
    }

    /// The replication origin.
    #[must_use]
    pub fn origin(&self) -> Option<u16> {
        self.layout.origin
    }

    /// The top-level transaction, which the first record of a subtransaction contains with
    /// `wal_level = logical` (14 and later).
    #[must_use]
    pub fn toplevel_xid(&self) -> Option<u32> {
        self.layout.toplevel_xid
    }
}

/// `XLR_BLOCK_ID_DATA_SHORT` and the following IDs.
const MAIN_DATA_SHORT: u8 = 255;
const MAIN_DATA_LONG: u8 = 254;
const ORIGIN: u8 = 253;
const TOPLEVEL_XID: u8 = 252;

impl Layout {
    /// The loop of `DecodeXLogRecord`, with its cross-checks.
    fn read(&mut self, version: PgVersion, body_bytes: usize, body: &[u8]) -> Option<()> {
        let mut fields = Fields(body);
        let mut blocks = block::Order::default();
        let mut data = 0_usize;
        let mut main_data = 0_usize;
        // The bytes left of the whole body, even if `body` contains less of it.
        let left = |fields: &Fields<'_>| {
            let read = body.len().saturating_sub(fields.0.len());
            body_bytes.saturating_sub(read)
        };
        while left(&fields) > data {
            match fields.u8()? {
                MAIN_DATA_SHORT => {
                    main_data = usize::from(fields.u8()?);
                    data = data.saturating_add(main_data);
                    break;
                }
                MAIN_DATA_LONG => {
                    main_data = fields.u32()? as usize;
                    data = data.saturating_add(main_data);
                    break;
                }
                ORIGIN => self.origin = Some(fields.u16()?),
                TOPLEVEL_XID if version >= PgVersion::V14 => {
                    self.toplevel_xid = Some(fields.u32()?);
                }
                id => {
                    let header = block::Header::read(version, id, &mut fields)?;
                    blocks.check(&header)?;
                    data = data.saturating_add(header.data_and_image_bytes());
                }
            }
        }
        let left = left(&fields);
        if left != data {
            return None;
        }
        self.headers = body_bytes.saturating_sub(left);
        self.main_data = body_bytes.saturating_sub(main_data);
        Some(())
    }
}

#[cfg(test)]
mod tests;
