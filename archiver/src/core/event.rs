//! The [`Event`]s that the driver reports to the core.

use std::time::Duration;

use wal_format::{Branch, Lsn, SegmentNo};

use super::{pace::PaceSettings, positions::Coverage};

/// An event that the driver reports to the core.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The stages have started, with no work in progress.
    Started(PaceSettings),
    /// A branch is about to be taken up: the caller queries what the repository holds, while
    /// segments are still being stored.
    TakingUp,
    /// A branch is taken up: its spool is open.
    TakenUp {
        /// The branch that is taken up.
        branch: Branch,
        /// The end of the branch's WAL that is durable on this host.
        durable_lsn: Lsn,
        /// The ranges of the branch that the repository holds.
        stored: Coverage,
    },
    /// The repository was read before the stages started.
    RepositoryRead,
    /// The repository was found to lack WAL that it held.
    Lacking {
        /// The branch of the WAL.
        branch: Branch,
        /// The first missing byte, and the first byte after the missing WAL.
        range: (Lsn, Lsn),
    },
    /// A base backup is listed that begins after a hole in what the repository holds of a branch.
    BackupListed {
        /// The branch of the backup.
        branch: Branch,
        /// The ranges that the repository holds, from the backup on.
        stored: Coverage,
    },
    /// A stream of the branch begins. WAL that it sends up to the end of the stored WAL is compared
    /// first.
    StreamBegun {
        /// The first byte of the stream.
        start_lsn: Lsn,
    },
    /// The connection has ended. Nothing is reported until another stream has been compared.
    StreamEnded,
    /// WAL was compared and written.
    Written {
        /// The LSN of the stream's next byte.
        streamed_lsn: Lsn,
        /// The end of the WAL in the files.
        written_lsn: Lsn,
        /// The server's flush LSN at this message.
        server_lsn: Lsn,
        /// The number of new bytes in the files.
        bytes: u64,
    },
    /// The last byte of the open segment was written, and the next segment is open.
    Completed,
    /// All received WAL was written.
    GroupTaken {
        /// True if the flusher is idle.
        flusher_idle: bool,
    },
    /// A point in time at which a tail may be cut.
    Tick {
        /// The time of the monotonic clock, since the driver started.
        now: Duration,
        /// True if a tail is due regardless of its size.
        due: bool,
    },
    /// The open segment was fsynced.
    Synced {
        /// The start of the segment.
        segment_start: Lsn,
        /// The end of the fsynced WAL.
        end_lsn: Lsn,
    },
    /// A complete segment is durable under its final name, or was found so at the start.
    Finished {
        /// The branch of the segment.
        branch: Branch,
        /// The complete segment.
        segment: SegmentNo,
        /// The end of the segment. `None` if it was found at the start.
        end_lsn: Option<Lsn>,
    },
    /// A sealing worker is idle.
    SealerFree,
    /// A sealed segment was stored and verified.
    Sealed {
        /// The branch of the segment.
        branch: Branch,
        /// The sealed segment.
        segment: SegmentNo,
        /// The first byte of the stored WAL, and the first byte after it.
        range: (Lsn, Lsn),
        /// The segment with the start of the record that is incomplete at the end of this one.
        /// `None` if there is none.
        open_record_in: Option<SegmentNo>,
    },
    /// A sealed segment's file has left the spool.
    Removed {
        /// The branch of the segment.
        branch: Branch,
        /// The removed segment.
        segment: SegmentNo,
    },
    /// An attempt to seal a segment failed.
    SealFailed {
        /// The branch of the segment.
        branch: Branch,
        /// The segment, which is still unsealed.
        segment: SegmentNo,
    },
    /// A tail was passed to the store.
    TailCut {
        /// The branch of the tail.
        branch: Branch,
        /// The first byte of the tail, and the first byte after it.
        range: (Lsn, Lsn),
        /// The time of the monotonic clock, since the driver started.
        now: Duration,
    },
    /// A tail was stored and verified.
    TailStored {
        /// The branch of the tail.
        branch: Branch,
        /// The first byte of the tail, and the first byte after it.
        range: (Lsn, Lsn),
    },
    /// A tail is no longer needed, since its segment is sealed.
    TailSuperseded,
}
