//! [`Command`]: the requests to the spool thread.

use bytes::Bytes;
use tokio::sync::oneshot;
use wal_format::{Branch, Lsn, PgTimestamp};

use crate::error::Result;

/// A request to the spool thread.
#[derive(Debug)]
pub enum Command {
    /// Takes up a branch: opens its spool at the end of the archived WAL.
    TakeUp {
        /// The branch to take up.
        branch: Branch,
        /// The branch's history file. `None` for timeline 1.
        history: Option<Bytes>,
        /// The LSN at which to begin if nothing of the branch is archived.
        start_lsn: Lsn,
        /// Receives the positions at which the stream can begin.
        reply: oneshot::Sender<Result<TakenUp>>,
    },
    /// Begins a stream of the branch.
    Begin {
        /// The first byte of the stream.
        start_lsn: Lsn,
        /// Receives the outcome.
        reply: oneshot::Sender<Result<()>>,
    },
    /// Writes WAL that arrived.
    Data(Received),
    /// The remote flush interval has passed.
    Tick,
    /// Makes all received WAL durable here, cuts a tail, and answers.
    Drain {
        /// Receives the answer, even after a failure.
        reply: oneshot::Sender<()>,
    },
}

/// WAL that arrived in one message.
#[derive(Debug)]
pub struct Received {
    /// The first byte of the WAL.
    pub start_lsn: Lsn,
    /// The server's flush LSN when it sent the message.
    pub wal_end: Lsn,
    /// The server's clock when it sent the message.
    pub send_time: PgTimestamp,
    /// The bytes of the WAL.
    pub data: Bytes,
}

/// The positions of a branch that was taken up.
#[derive(Clone, Copy, Debug)]
pub struct TakenUp {
    /// The start of the open segment, where the stream resumes.
    pub resume_lsn: Lsn,
    /// The end of the durable WAL.
    pub durable_lsn: Lsn,
    /// The LSN at which the stream should begin so that a part of it can be compared. It is before
    /// `resume_lsn` if the open segment is empty.
    pub compare_lsn: Lsn,
}
