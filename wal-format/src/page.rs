//! Page headers. Every 8 KiB of WAL begin with one, and the first header of a segment is longer.
//!
//! A header contains the page's address, so old content of a recycled segment is never mistaken for
//! new WAL.

use crate::{
    Lsn, PgVersion, SegmentSize, SystemIdentifier, TimelineId, WalIdentity,
    error::{DecodeError, DecodeErrorKind},
    fields::Fields,
    lsn::PAGE_SIZE,
};

/// `SizeOfXLogShortPHD`.
pub const SHORT_HEADER_BYTES: usize = 24;
/// `SizeOfXLogLongPHD`.
pub const LONG_HEADER_BYTES: usize = 40;

/// `xlp_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFlags(pub u16);

impl PageFlags {
    /// `XLP_FIRST_IS_CONTRECORD`: the page begins inside a record.
    pub const FIRST_IS_CONTRECORD: Self = Self(1);
    /// `XLP_LONG_HEADER`: the header is the long one.
    pub const LONG_HEADER: Self = Self(2);
    /// `XLP_BKP_REMOVABLE`: not used here.
    pub const BKP_REMOVABLE: Self = Self(4);
    /// `XLP_FIRST_IS_OVERWRITE_CONTRECORD`: the record that would continue here is void.
    pub const FIRST_IS_OVERWRITE_CONTRECORD: Self = Self(8);
    /// `XLP_ALL_FLAGS`.
    const ALL: u16 = 0xF;

    /// Returns true if `flag` is set.
    #[must_use]
    pub fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }
}

/// A page header (`XLogPageHeaderData`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// `xlp_magic`, which identifies the version.
    pub magic: u16,
    /// `xlp_info`.
    pub flags: PageFlags,
    /// `xlp_tli`. 0 is not a timeline and is refused.
    pub timeline: u32,
    /// `xlp_pageaddr`: the page's address.
    pub address: Lsn,
    /// `xlp_rem_len`: the remaining bytes of the record that continues on this page and possibly on
    /// later ones.
    pub remaining: u32,
    /// The additional fields of the first page of a segment.
    pub long: Option<LongPageHeader>,
}

/// The rest of the first page's header (`XLogLongPageHeaderData`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongPageHeader {
    /// `xlp_sysid`.
    pub system_identifier: u64,
    /// `xlp_seg_size`.
    pub segment_bytes: u32,
    /// `xlp_xlog_blcksz`.
    pub page_bytes: u32,
}

impl PageHeader {
    /// Returns the length of the header of the page at `page`.
    #[must_use]
    pub fn bytes_at(page: Lsn, segment_size: SegmentSize) -> usize {
        if segment_size.offset_of(page) == 0 {
            LONG_HEADER_BYTES
        } else {
            SHORT_HEADER_BYTES
        }
    }

    /// Parses a header; a long one if there are enough bytes for it. Returns `None` if there are
    /// too few for a short one.
    #[must_use]
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let header = Self {
            magic: fields.u16()?,
            flags: PageFlags(fields.u16()?),
            timeline: fields.u32()?,
            address: Lsn(fields.u64()?),
            remaining: fields.u32()?,
            long: None,
        };
        fields.skip(4)?;
        let mut long = || {
            Some(LongPageHeader {
                system_identifier: fields.u64()?,
                segment_bytes: fields.u32()?,
                page_bytes: fields.u32()?,
            })
        };
        Some(Self {
            long: long(),
            ..header
        })
    }

    /// Returns the origin of a segment that begins with this header, or `None` if it is not a long
    /// header of a known version.
    #[must_use]
    pub fn identity(&self) -> Option<WalIdentity> {
        let long = self.long?;
        if !self.flags.has(PageFlags::LONG_HEADER) {
            return None;
        }
        Some(WalIdentity {
            version: PgVersion::from_page_magic(self.magic)?,
            system_identifier: SystemIdentifier(long.system_identifier),
            segment_size: SegmentSize::new(u64::from(long.segment_bytes)).ok()?,
        })
    }

    /// Performs the checks that do not depend on preceding pages (`XLogReaderValidatePageHeader`).
    ///
    /// # Errors
    /// [`DecodeError`] with the page's address.
    pub fn check(&self, identity: &WalIdentity, page: Lsn) -> Result<(), DecodeError> {
        let fail = |kind| Err(DecodeError { lsn: page, kind });
        let (expected, found) = (identity.version.page_magic(), self.magic);
        if found != expected {
            return fail(DecodeErrorKind::PageMagic { expected, found });
        }
        let continues = self.flags.has(PageFlags::FIRST_IS_CONTRECORD);
        let overwrites = self.flags.has(PageFlags::FIRST_IS_OVERWRITE_CONTRECORD);
        if self.flags.0 & !PageFlags::ALL != 0
            || self.flags.has(PageFlags::LONG_HEADER) != self.long.is_some()
            || (continues && (overwrites || self.remaining == 0))
        {
            let found = self.flags.0;
            return fail(DecodeErrorKind::PageFlags { found });
        }
        if self.address != page {
            let found = self.address;
            return fail(DecodeErrorKind::PageAddress { found });
        }
        if TimelineId::new(self.timeline).is_none() {
            return fail(DecodeErrorKind::PageTimeline {
                latest: 1,
                found: self.timeline,
            });
        }
        if let Some(long) = self.long {
            let found = long.system_identifier;
            if found != identity.system_identifier.0 {
                return fail(DecodeErrorKind::SystemIdentifier { found });
            }
            if u64::from(long.segment_bytes) != identity.segment_size.bytes()
                || u64::from(long.page_bytes) != PAGE_SIZE
            {
                return fail(DecodeErrorKind::Sizes {
                    segment_bytes: long.segment_bytes,
                    page_bytes: long.page_bytes,
                });
            }
        }
        if !continues && self.remaining != 0 {
            return fail(DecodeErrorKind::Continuation {
                expected: 0,
                found: self.remaining,
            });
        }
        Ok(())
    }
}
