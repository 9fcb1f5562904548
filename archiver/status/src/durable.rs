//! [`DurableWal`]: how far the WAL of a cluster is durable, as the archiver's core answers it.

use std::fmt;

use repository::PathPart;
use wal_format::Lsn;

/// The durable WAL of a cluster, and its part on one path of timelines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DurableWal {
    /// The end of the WAL that is durable on this host, on the branch that is archived.
    pub flushed: Lsn,
    /// The end of the WAL on the path that is durable on this host. `None` if none of it is held.
    pub flushed_on_path: Option<Lsn>,
    /// The end of the contiguous WAL that the repository holds, on the branch that is archived.
    pub remote: Lsn,
    /// The end of the WAL on the path that the repository holds. `None` if it holds none of it.
    pub remote_on_path: Option<Lsn>,
    /// The number of bytes on this host that wait for the repository.
    pub queued_bytes: u64,
    /// The part of `queued_bytes` that is on timelines which are not on the path.
    pub orphaned_bytes: u64,
}

/// Knows how far the WAL is durable.
pub trait DurablePositions: fmt::Debug + Send + Sync {
    /// Returns the durable WAL now, and its part on `path` (timelines, oldest first).
    fn durable(&self, path: &[PathPart]) -> DurableWal;
}
