//! [`SegmentSummary`]: the facts about a range of WAL that a restore needs.
//!
//! A record belongs to the range in which it *ends*: only there is it complete and its CRC proved.
//! Summaries of adjacent ranges [merge](SegmentSummary::merge) into the summary of both.

mod codec;
mod facts;

pub use codec::DecodeSummaryError;
pub use facts::{
    CheckpointKind, DROPPED_RELATIONS_MAX, RelationFile, SegmentSummary, TransactionEnd,
    TransactionEndKind, WalEvent,
};
