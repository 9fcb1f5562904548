//! [`WalIndexer`]: accepts WAL bytes as they arrive, checks every page and record, and returns a
//! [`SegmentSummary`].
//!
//! It is the [`WalDecoder`] with a sink that keeps the facts a restore needs.

mod primed;

use crate::{
    Lsn, SegmentSummary,
    decoder::{RecordSink, WalDecoder, WalIdentity},
    error::{DecodeError, DecodeErrorKind},
    record::{RecordHeader, WalRecord},
    rmgr,
};

/// A streaming decoder and summary builder.
#[derive(Debug)]
pub struct WalIndexer {
    decoder: WalDecoder,
    summary: SummaryBuilder,
}

#[derive(Debug, Default)]
struct SummaryBuilder(SegmentSummary);

impl WalIndexer {
    /// Creates an indexer that starts at `start_lsn`, the start of a page. `previous` is the start
    /// of the previous record, if known.
    #[must_use]
    pub fn new(identity: WalIdentity, start_lsn: Lsn, previous: Option<Lsn>) -> Self {
        Self {
            decoder: WalDecoder::new(identity, start_lsn, previous),
            summary: SummaryBuilder::default(),
        }
    }

    /// The end of the pushed bytes.
    #[must_use]
    pub fn position(&self) -> Lsn {
        self.decoder.position()
    }

    /// The end of the last complete valid record, aligned to 8. The start position before the first
    /// record.
    #[must_use]
    pub fn valid_end_lsn(&self) -> Lsn {
        self.decoder.valid_end_lsn()
    }

    /// The end of the last complete valid record without padding: see
    /// [`WalDecoder::checked_end_lsn`].
    #[must_use]
    pub fn checked_end_lsn(&self) -> Lsn {
        self.decoder.checked_end_lsn()
    }

    /// Returns the summary of the records completed since the last call, or since the start.
    pub fn take_summary(&mut self) -> SegmentSummary {
        let mut summary = std::mem::take(&mut self.summary.0);
        summary.open_record_lsn = self.decoder.open_record_lsn();
        summary
    }

    /// Decodes the next bytes.
    ///
    /// # Errors
    /// [`DecodeError`] at the first invalid page or record. Nothing is decoded after an error.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        self.decoder.push(bytes, &mut self.summary)
    }
}

impl RecordSink for SummaryBuilder {
    fn window(&mut self, header: &RecordHeader) -> usize {
        rmgr::window(header)
    }

    fn record(&mut self, record: &WalRecord<'_>) -> Result<(), DecodeErrorKind> {
        let summary = &mut self.0;
        if rmgr::is_of_interest(&record.header) {
            rmgr::read(record, summary).ok_or(DecodeErrorKind::Body)?;
        }
        summary.record_count = summary.record_count.saturating_add(1);
        summary.first_record_lsn.get_or_insert(record.lsn);
        summary.last_record_lsn = Some(record.lsn);
        summary.last_record_end_lsn = Some(record.end_lsn);
        Ok(())
    }
}
