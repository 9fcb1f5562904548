//! The number of rows that each transaction inserted, updated and deleted, counted from the WAL
//! record by record.

use std::collections::HashMap;

use repository::WalRange;
use wal_format::{
    DecodeErrorKind, Lsn, RecordHeader, RecordSink, RelationFile, ResourceManager, WalDecoder,
    WalRecord,
    record::{BlockReference, Fork, ImageCompression},
    transaction_end,
};

use super::read::Named;
use crate::{
    Error, Result,
    heap::{PAGE_BYTES, Row, rows},
    inventory::Archive,
    plan::PathPart,
};

const HEAP2: ResourceManager = ResourceManager(9);
const HEAP: ResourceManager = ResourceManager(10);
/// `FirstNormalObjectId`: relations with smaller numbers are catalogs that were never rewritten.
const FIRST_NORMAL: u32 = 16_384;
/// The bytes of a heap record that are decoded: enough for its blocks and the image of one page.
const HEAP_WINDOW_BYTES: usize = 10 << 10;

/// Rows of one relation that a transaction changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RowCounts {
    /// Inserted rows.
    pub inserted: u64,
    /// Updated rows.
    pub updated: u64,
    /// Deleted rows.
    pub deleted: u64,
}

/// The rows counted so far.
#[derive(Debug)]
pub(super) struct Changes<'a> {
    named: &'a mut [Named],
    rows: HashMap<u32, HashMap<RelationFile, RowCounts>>,
    /// The top-level transaction of each subtransaction, from the commit records.
    parents: HashMap<u32, u32>,
    /// Only records that start in this range count.
    from: Lsn,
    to: Lsn,
}

impl<'a> Changes<'a> {
    pub(super) fn new(named: &'a mut [Named]) -> Self {
        Self {
            named,
            rows: HashMap::new(),
            parents: HashMap::new(),
            from: Lsn::ZERO,
            to: Lsn::MAX,
        }
    }

    /// Counts the changes in the ranges of one part of the path.
    pub(super) fn count(
        &mut self,
        archive: &Archive,
        part: &PathPart,
        ranges: &[WalRange],
    ) -> Result<()> {
        (self.from, self.to) = (part.from, part.to);
        let mut decoder: Option<WalDecoder> = None;
        for range in ranges {
            // After a gap, decoding starts again.
            let current = decoder
                .take()
                .filter(|decoder| decoder.position() >= range.start_lsn);
            let mut current = current
                .unwrap_or_else(|| WalDecoder::new(archive.wal_identity(), range.start_lsn, None));
            let wal = archive.wal(range)?;
            let known = current.position().bytes_since(range.start_lsn);
            let known = usize::try_from(known).unwrap_or(usize::MAX);
            if let Some(fresh) = wal.get(known..) {
                current.push(fresh, self).map_err(|error| Error::Wal {
                    lsn: error.lsn,
                    problem: error.to_string(),
                })?;
            }
            decoder = Some(current);
        }
        Ok(())
    }

    /// Returns the rows by transaction. Rows of subtransactions count for their top-level
    /// transaction.
    pub(super) fn by_transaction(self) -> HashMap<u32, HashMap<RelationFile, RowCounts>> {
        let mut all: HashMap<u32, HashMap<RelationFile, RowCounts>> = HashMap::new();
        for (xid, relations) in self.rows {
            let top = self.parents.get(&xid).copied().unwrap_or(xid);
            let sums = all.entry(top).or_default();
            for (file, counts) in relations {
                let sum = sums.entry(file).or_default();
                sum.inserted += counts.inserted;
                sum.updated += counts.updated;
                sum.deleted += counts.deleted;
            }
        }
        all
    }

    fn heap(&mut self, record: &WalRecord<'_>) {
        let Some(block) = record.blocks().next() else {
            return;
        };
        if block.fork != Fork::MAIN {
            return;
        }
        let operation = record.header.info & 0x70;
        let is_insert = record.header.resource_manager == HEAP && operation == 0;
        for named in self.named.iter_mut() {
            // The backup itself has the names of the time before it.
            if record.lsn < named.from || record.lsn > named.last {
                continue;
            }
            let Some(database) = named.names.is_class(block.relation) else {
                continue;
            };
            // The first change of a page after a checkpoint contains the whole page instead of the
            // row.
            if let Some(page) = page(&block) {
                rows(&page).for_each(|row| named.names.learn(database, row));
            } else if let Some(row) = Row::of_record(block.data).filter(|_| is_insert) {
                named.names.learn(database, row);
            }
        }
        if block.relation.relation < FIRST_NORMAL {
            return;
        }
        let counts = self.rows.entry(record.header.xid).or_default();
        let counts = counts.entry(block.relation).or_default();
        match (record.header.resource_manager, operation) {
            (HEAP, 0x00) => counts.inserted += 1,
            (HEAP, 0x10) => counts.deleted += 1,
            (HEAP, 0x20 | 0x40) => counts.updated += 1,
            // `xl_heap_multi_insert.ntuples`
            (HEAP2, 0x50) => {
                let count = record.main_data().get(2..).and_then(<[u8]>::first_chunk);
                counts.inserted += count.map_or(0, |count| u64::from(u16::from_le_bytes(*count)));
            }
            _ => {}
        }
    }

    /// Learns the subtransactions of a commit.
    fn commit(&mut self, record: &WalRecord<'_>) {
        let mut subtransactions = Vec::new();
        let Some((end, _)) = transaction_end(record, &mut |xid| subtransactions.push(xid)) else {
            return;
        };
        if end.kind.is_commit() {
            let parents = subtransactions.into_iter().map(|xid| (xid, end.xid));
            self.parents.extend(parents);
        }
    }
}

/// Returns a page image with its hole filled. `None` if there is no image, or if it is compressed
/// with pglz or LZ4.
fn page(block: &BlockReference<'_>) -> Option<Vec<u8>> {
    let image = block.image?;
    let hole = usize::from(image.hole_bytes);
    let whole = PAGE_BYTES.checked_sub(hole)?;
    let mut page = match image.compression {
        ImageCompression::None => block.image_bytes.to_vec(),
        ImageCompression::Zstd => zstd::bulk::decompress(block.image_bytes, whole).ok()?,
        ImageCompression::Lz4 | ImageCompression::Pglz => return None,
    };
    if page.len() != whole {
        return None;
    }
    let rest = page.split_off(usize::from(image.hole_offset).min(whole));
    page.resize(page.len() + hole, 0);
    page.extend_from_slice(&rest);
    Some(page)
}

impl RecordSink for Changes<'_> {
    fn window(&mut self, header: &RecordHeader) -> usize {
        match header.resource_manager {
            HEAP | HEAP2 => HEAP_WINDOW_BYTES,
            ResourceManager::TRANSACTION => header.body_bytes(),
            _ => 0,
        }
    }

    fn record(&mut self, record: &WalRecord<'_>) -> std::result::Result<(), DecodeErrorKind> {
        if record.lsn < self.from || record.lsn >= self.to {
            return Ok(());
        }
        match record.header.resource_manager {
            HEAP | HEAP2 => self.heap(record),
            ResourceManager::TRANSACTION => self.commit(record),
            _ => {}
        }
        Ok(())
    }
}
