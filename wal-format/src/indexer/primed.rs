//! [`WalIndexer::primed`]: an indexer that knows where the record began that continues into a
//! segment.
//!
//! A record belongs to the segment in which it ends, under the LSN where it starts. To find that
//! start, decoding begins in an earlier segment: the previous one, or an earlier one if a single
//! record fills whole segments.

use super::WalIndexer;
use crate::{SegmentNo, WalIdentity};

/// A record is shorter than 1 GiB (`XLogRecordMaxSize` in `xlogrecord.h`), so its start is at most
/// this far back.
const RECORD_BYTES_MAX: u64 = 1 << 30;

impl WalIndexer {
    /// Returns an indexer at the start of `segment`, primed from the preceding segments that `read`
    /// returns. Without them, the indexer skips the rest of a record that began before the segment,
    /// since its start is not in the archive.
    ///
    /// # Errors
    /// The errors of `read`.
    pub fn primed<E>(
        identity: &WalIdentity,
        segment: SegmentNo,
        mut read: impl FnMut(SegmentNo) -> Result<Option<Vec<u8>>, E>,
    ) -> Result<Self, E> {
        let size = identity.segment_size;
        let start_lsn = segment.start_lsn(size);
        let back_max = RECORD_BYTES_MAX.div_ceil(size.bytes()).saturating_add(1);
        let mut first = segment;
        for _ in 0..back_max {
            let Some(previous) = first.previous() else {
                break;
            };
            match read(previous)? {
                Some(bytes) if bytes.len() == size.len() => first = previous,
                _ => break,
            }
            let mut indexer = Self::new(*identity, first.start_lsn(size), None);
            let mut known = false;
            let mut sound = true;
            let mut next = first;
            while next < segment && sound {
                let Some(bytes) = read(next)? else { break };
                sound = indexer.push(&bytes).is_ok();
                let summary = indexer.take_summary();
                known |= summary.record_count > 0 || summary.open_record_lsn.is_some();
                next = next.next();
            }
            if !sound {
                break;
            }
            if known && indexer.position() == start_lsn {
                return Ok(indexer);
            }
        }
        Ok(Self::new(*identity, start_lsn, None))
    }
}
