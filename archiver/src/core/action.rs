//! The [`Action`]s that the core returns to the driver.

use wal_format::{Branch, SegmentNo};

/// An action for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Pass a tail to the store, if there is one. Tails of an abandoned branch come before those of
    /// the open segment.
    CutTail,
    /// Let the flusher fsync the open segment, concurrently with the writer.
    HandOver,
    /// Remove a segment's file from the spool.
    Remove(Branch, SegmentNo),
    /// Seal a segment.
    Seal(Branch, SegmentNo),
    /// Fsync the open segment now.
    Sync,
}

/// Deliberate mistakes that the simulation has to detect.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Written WAL is reported as flushed.
    AcknowledgeBeforeFsync,
    /// An abandoned branch no longer limits the report.
    ForgetLeftBranch,
    /// A tail counts when it is sent, not when it has been read back.
    ReportUnverified,
    /// A position is reported to a server before the server has shown that its WAL is the same.
    SayBeforeCompared,
    /// A segment is never sealed.
    SkipSegment,
    /// WAL after a hole in the store counts.
    TailBeyondHole,
}
