//! Creates a decoder at the start of a pushed segment that knows where the record began that
//! continues into it.
//!
//! The previous segment's footer contains the start of that record, so only the end of that segment
//! is decoded. If the segment is not archived yet, because several pushes run at the same time, its
//! file next to the pushed one is decoded.

use wal_format::{
    Branch, ObjectKey, SealedReader, SegmentName, SegmentNo, WalIdentity, WalIndexer,
    lsn::PAGE_SIZE,
};

use super::{Pusher, WalFile};
use crate::error::{Error, Result};

impl Pusher<'_> {
    pub(super) fn indexer(
        &self,
        file: &WalFile,
        identity: &WalIdentity,
        branch: Branch,
        segment: SegmentNo,
    ) -> Result<WalIndexer> {
        let size = identity.segment_size;
        let key = |segment| {
            let name = SegmentName::new(branch.timeline, segment, size);
            ObjectKey::Segment(identity.system_identifier, branch, name)
        };
        if let Some(previous) = segment.previous()
            && let Some(indexer) = self.indexer_from_end(&key(previous), identity)?
        {
            return Ok(indexer);
        }
        WalIndexer::primed(identity, segment, |earlier| {
            if let Some(object) = self.stored(&key(earlier))? {
                let mut wal = Vec::new();
                SealedReader::open(&object)
                    .and_then(|reader| reader.read_all(&mut wal))
                    .map_err(damaged(&key(earlier)))?;
                return Ok(Some(wal));
            }
            let name = SegmentName::new(branch.timeline, earlier, size);
            let beside = file.directory().join(name.to_string());
            // A recycled file has the name of a past or future segment. The decoder detects it by
            // its page addresses.
            Ok(WalFile::open(&beside).and_then(|file| file.read()).ok())
        })
    }

    /// Decodes the end of the previous segment, from the page on which the record begins that
    /// continues after it. Returns `None` if that record begins in an earlier segment, or if the
    /// object is missing or damaged. The caller then decodes whole segments.
    fn indexer_from_end(
        &self,
        key: &ObjectKey,
        identity: &WalIdentity,
    ) -> Result<Option<WalIndexer>> {
        let Some(there) = self.repository.head(key)? else {
            return Ok(None);
        };
        let footer = match self.repository.footer(key, there.size) {
            Err(repository::Error::Damaged { .. }) => return Ok(None),
            footer => footer?,
        };
        let summary = footer.summary();
        let Some(from) = summary.open_record_lsn.or(summary.last_record_lsn) else {
            return Ok(None);
        };
        if from < footer.header().start_lsn {
            return Ok(None);
        }
        let page = from.align_down(PAGE_SIZE);
        let wal = match self.repository.wal_from(key, &footer, page) {
            Err(repository::Error::Damaged { .. }) => return Ok(None),
            wal => wal?,
        };
        let mut indexer = WalIndexer::new(*identity, page, None);
        if indexer.push(&wal).is_err() {
            return Ok(None);
        }
        let end = indexer.take_summary();
        let agrees = end.open_record_lsn == summary.open_record_lsn
            && (summary.open_record_lsn.is_some()
                || end.last_record_lsn == summary.last_record_lsn);
        Ok(agrees.then_some(indexer))
    }
}

/// Converts the error of an object that is not a valid container.
pub(super) fn damaged(key: &ObjectKey) -> impl Fn(wal_format::sealed::SealedError) -> Error {
    let object = key.to_string();
    move |source| Error::Sealed {
        object: object.clone(),
        source,
    }
}
