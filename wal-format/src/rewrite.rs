//! Changes one record of WAL in place: the creation of a tablespace gets another directory, or
//! none.
//!
//! The replay of `XLOG_TBLSPC_CREATE` links to the directory that the record names (`tblspc_redo`
//! in `tablespace.c`), so a copy on its parent's host would write into the parent's files. The
//! record keeps its length: the new directory is padded with zero bytes, which end a C string, and
//! the CRC-32C is computed again. A directory that is longer than the old one does not fit. Then
//! the record becomes `XLOG_NOOP` (`xlog_redo` in `xlog.c`), and the link has to be created before
//! the replay.

use serde::{Deserialize, Serialize};

use crate::{
    Lsn, PgVersion, SegmentSize,
    lsn::PAGE_SIZE,
    page::PageHeader,
    record::{RECORD_HEADER_BYTES, RecordHeader, ResourceManager, WalRecord},
};

/// `XLOG_NOOP` (`pg_control.h`).
const NOOP: u8 = 0x20;
/// The bits of `xl_info` that belong to the resource manager.
const RMGR_INFO: u8 = 0xF0;
/// Offsets of `xl_info`, `xl_rmid` and `xl_crc` in a record.
const INFO_AT: usize = 16;
const RMID_AT: usize = 17;
const CRC_AT: usize = 20;
/// The length of `xl_tblspc_create_rec` before the path.
const OID_BYTES: usize = 4;
/// The maximum length of a record that creates a tablespace: headers, the OID and `MAXPGPATH`.
const RECORD_BYTES_MAX: usize = 4096;

/// Bytes of WAL that are delivered to PostgreSQL instead of the archived bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalChange {
    /// The position of the first changed byte.
    pub lsn: Lsn,
    /// The archived bytes, in hexadecimal.
    pub old: String,
    /// The new bytes, in hexadecimal. There are as many as in `old`.
    pub new: String,
}

/// The replacement for the record of a tablespace's creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewCreation<'a> {
    /// The creation of the same tablespace in this directory.
    In(&'a str),
    /// No creation: the record becomes `XLOG_NOOP`.
    PassedOver,
}

/// The reason why a record is not changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RewriteError {
    /// The WAL ends before the record does.
    #[error("the WAL ends inside the record")]
    CutOff,
    /// The bytes are not a valid record of a tablespace's creation.
    #[error("it is not the record of a tablespace's creation")]
    NotACreation,
    /// The new directory has more bytes than the old one.
    #[error("the new directory may have {room} bytes at the most")]
    TooLong {
        /// The length of the old directory.
        room: usize,
    },
}

impl WalChange {
    /// Returns the old and the new bytes, or `None` if they are not hexadecimal or differ in
    /// length.
    #[must_use]
    pub fn bytes(&self) -> Option<(Vec<u8>, Vec<u8>)> {
        let old = hex::decode(&self.old).ok()?;
        let new = hex::decode(&self.new).ok()?;
        (old.len() == new.len()).then_some((old, new))
    }
}

/// Changes the record that starts at `lsn`. `wal` begins at `lsn`, contains the page headers, and
/// continues after the record.
///
/// # Errors
/// [`RewriteError`]. Nothing is changed then.
pub fn change_creation(
    version: PgVersion,
    segment_size: SegmentSize,
    lsn: Lsn,
    wal: &[u8],
    creation: NewCreation<'_>,
) -> Result<Vec<WalChange>, RewriteError> {
    let (mut record, places) = gather(segment_size, lsn, wal)?;
    let main_data = main_data_of_creation(version, lsn, &record)?;
    match creation {
        NewCreation::In(directory) => {
            let path = record
                .get_mut(main_data.saturating_add(OID_BYTES)..)
                .unwrap_or_default();
            let room = path.len().saturating_sub(1);
            if directory.len() > room {
                return Err(RewriteError::TooLong { room });
            }
            path.fill(0);
            for (byte, new) in path.iter_mut().zip(directory.bytes()) {
                *byte = new;
            }
        }
        NewCreation::PassedOver => {
            if let Some(info) = record.get_mut(INFO_AT) {
                *info = (*info & !RMGR_INFO) | NOOP;
            }
            if let Some(rmid) = record.get_mut(RMID_AT) {
                *rmid = ResourceManager::XLOG.0;
            }
        }
    }
    let crc = crc(&record).ok_or(RewriteError::NotACreation)?;
    for (byte, new) in record.iter_mut().skip(CRC_AT).zip(crc.to_le_bytes()) {
        *byte = new;
    }
    let changed = |(at, start, length): (Lsn, usize, usize)| {
        let offset = usize::try_from(at.bytes_since(lsn)).ok()?;
        let old = wal.get(offset..offset.checked_add(length)?)?;
        let new = record.get(start..start.checked_add(length)?)?;
        (old != new).then(|| WalChange {
            lsn: at,
            old: hex::encode(old),
            new: hex::encode(new),
        })
    };
    Ok(places.into_iter().filter_map(changed).collect())
}

/// The parts of a record, one for each page: the position in the WAL, the offset in the record and
/// the length.
type Places = Vec<(Lsn, usize, usize)>;

/// Assembles a record from its pages.
fn gather(
    segment_size: SegmentSize,
    lsn: Lsn,
    wal: &[u8],
) -> Result<(Vec<u8>, Places), RewriteError> {
    let total = wal.first_chunk::<4>().copied().map(u32::from_le_bytes);
    let total = total.ok_or(RewriteError::CutOff)? as usize;
    if !(RECORD_HEADER_BYTES..=RECORD_BYTES_MAX).contains(&total) {
        return Err(RewriteError::NotACreation);
    }
    let (mut record, mut places) = (Vec::with_capacity(total), Places::new());
    let mut at = lsn;
    while record.len() < total {
        if at.page_offset() == 0 {
            at = at.add(PageHeader::bytes_at(at, segment_size) as u64);
        }
        let page_end = at.align_down(PAGE_SIZE).add(PAGE_SIZE);
        let in_page = usize::try_from(page_end.bytes_since(at)).unwrap_or(usize::MAX);
        let length = in_page.min(total.saturating_sub(record.len()));
        let offset = usize::try_from(at.bytes_since(lsn)).unwrap_or(usize::MAX);
        let piece = wal.get(offset..offset.saturating_add(length));
        places.push((at, record.len(), length));
        record.extend_from_slice(piece.ok_or(RewriteError::CutOff)?);
        at = at.add(length as u64);
    }
    Ok((record, places))
}

/// Returns the offset of the main data, if the record creates a tablespace and its CRC is correct.
fn main_data_of_creation(
    version: PgVersion,
    lsn: Lsn,
    record: &[u8],
) -> Result<usize, RewriteError> {
    let not = RewriteError::NotACreation;
    let (head, body) = record
        .split_first_chunk::<RECORD_HEADER_BYTES>()
        .ok_or(not)?;
    let header = RecordHeader::parse(head);
    let is_creation =
        header.resource_manager == ResourceManager::TABLESPACE && header.info & RMGR_INFO == 0;
    if !is_creation || crc(record) != Some(header.crc) {
        return Err(not);
    }
    let mut parsed = WalRecord::new(version, lsn, lsn, header, body);
    parsed.read_structure().map_err(|_| not)?;
    let main_data = parsed.main_data();
    // The main data is the OID and a path with its terminating zero byte.
    if main_data.len() <= OID_BYTES || main_data.last() != Some(&0) {
        return Err(not);
    }
    Ok(record.len().saturating_sub(main_data.len()))
}

/// Computes `xl_crc` of a record, which covers the body and then the header up to the CRC
/// (`XLogRecordAssemble` in `xloginsert.c`).
fn crc(record: &[u8]) -> Option<u32> {
    let body = crc32c::crc32c(record.get(RECORD_HEADER_BYTES..)?);
    Some(crc32c::crc32c_append(body, record.get(..CRC_AT)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{SegmentSummary, SystemIdentifier, WalEvent, WalIdentity, WalIndexer};

    const START: Lsn = Lsn(0x100_0000);

    fn identity() -> WalIdentity {
        WalIdentity {
            version: PgVersion::V17,
            system_identifier: SystemIdentifier(7),
            segment_size: SegmentSize::new(1 << 20).expect("a size"),
        }
    }

    /// Returns the start of a record that creates a tablespace, and the WAL from there on: `before`
    /// bytes up to the end of the page, then one more page.
    fn wal(before: usize, location: &str) -> (Lsn, Vec<u8>) {
        let mut main_data = 16_400_u32.to_le_bytes().to_vec();
        main_data.extend(location.bytes());
        main_data.push(0);
        let mut body = vec![255, u8::try_from(main_data.len()).expect("it is short")];
        body.extend(main_data);
        let total = RECORD_HEADER_BYTES + body.len();
        let mut record = u32::try_from(total).expect("small").to_le_bytes().to_vec();
        record.extend(741_u32.to_le_bytes());
        record.extend(START.add(40).0.to_le_bytes());
        record.extend([0x00, 5, 0, 0, 0, 0, 0, 0]);
        record.extend(body);
        let sum = crc(&record).expect("it has a header");
        record[CRC_AT..CRC_AT + 4].copy_from_slice(&sum.to_le_bytes());

        let lsn = START.add((8192 - before) as u64);
        let now = before.min(total);
        let header = |info: u16, address: Lsn, left: usize| {
            let mut page = 0xD116_u16.to_le_bytes().to_vec();
            page.extend(info.to_le_bytes());
            page.extend(1_u32.to_le_bytes());
            page.extend(address.0.to_le_bytes());
            page.extend(u32::try_from(left).expect("small").to_le_bytes());
            page.extend([0; 4]);
            page
        };
        let mut bytes = record[..now].to_vec();
        bytes.resize(before, 0);
        bytes.extend(header(u16::from(now < total), START.add(8192), total - now));
        bytes.extend(&record[now..]);
        bytes.resize(before + 8192, 0);
        (lsn, bytes)
    }

    /// Applies the changes, decodes the record and returns its summary.
    fn decoded(lsn: Lsn, wal: &[u8], changes: &[WalChange]) -> SegmentSummary {
        let mut wal = wal.to_vec();
        for change in changes {
            let (old, new) = change.bytes().expect("they are bytes");
            let at = usize::try_from(change.lsn.bytes_since(lsn)).expect("small");
            assert_eq!(wal[at..at + old.len()], old);
            wal[at..at + old.len()].copy_from_slice(&new);
        }
        // A decoder starts at a page, so move the record to the front of one.
        let (record, _) = gather(identity().segment_size, lsn, &wal).expect("a record");
        let mut page = Vec::new();
        page.extend(0xD116_u16.to_le_bytes());
        page.extend(0_u16.to_le_bytes());
        page.extend(1_u32.to_le_bytes());
        page.extend(START.add(16_384).0.to_le_bytes());
        page.extend([0; 8]);
        page.extend(record);
        page.resize(page.len().next_multiple_of(8), 0);
        let mut indexer = WalIndexer::new(identity(), START.add(16_384), None);
        indexer.push(&page).expect("it is valid WAL");
        indexer.take_summary()
    }

    #[test]
    fn a_creation_gets_another_directory_wherever_the_page_ends() {
        let location = "/srv/parent/fast";
        for before in [8, 24, 32, 40, 48, 64, 200] {
            let (lsn, wal) = wal(before, location);
            for directory in ["/srv/copy", "/srv/parent/slow", "/x"] {
                let size = identity().segment_size;
                let creation = NewCreation::In(directory);
                let changes = change_creation(PgVersion::V17, size, lsn, &wal, creation);
                let summary = decoded(lsn, &wal, &changes.expect("it fits"));
                let expected = WalEvent::TablespaceCreate {
                    oid: 16_400,
                    location: directory.to_owned(),
                };
                assert_eq!(summary.events.len(), 1);
                assert_eq!(summary.events[0].1, expected);
            }
        }
    }

    #[test]
    fn a_longer_directory_is_refused_and_the_creation_passed_over_instead() {
        let (lsn, wal) = wal(40, "/srv/a");
        let size = identity().segment_size;
        let longer = NewCreation::In("/srv/bc");
        let refused = change_creation(PgVersion::V17, size, lsn, &wal, longer);
        assert_eq!(refused, Err(RewriteError::TooLong { room: 6 }));
        let changes = change_creation(PgVersion::V17, size, lsn, &wal, NewCreation::PassedOver);
        let summary = decoded(lsn, &wal, &changes.expect("it is changed"));
        assert_eq!((summary.record_count, summary.events.len()), (1, 0));
    }

    #[test]
    fn what_is_not_the_record_of_a_creation_is_not_changed() {
        let (lsn, wal) = wal(40, "/srv/a");
        let size = identity().segment_size;
        let change =
            |wal: &[u8]| change_creation(PgVersion::V17, size, lsn, wal, NewCreation::In("/x"));
        // The record is 37 bytes long; padding follows.
        for at in 0..37 {
            let mut flipped = wal.clone();
            flipped[at] ^= 4;
            assert!(change(&flipped).is_err(), "byte {at}");
        }
        for length in [0, 3, 30, 36] {
            assert!(change(&wal[..length]).is_err(), "{length} bytes");
        }
    }
}
