//! PostgreSQL's replication protocol: [`ReplicationClient`] and the WAL stream.
//!
//! Modules in reading order: [`conninfo`] (address and role), `connect` (hosts, sockets, startup),
//! `tls`, `authenticate`, `connection` (framing), `client` (commands), `stream` (WAL in, status
//! out).
//! Invariant: a status update is built from a [`crate::flushed_lsn::FlushedLsn`]. The server's own
//! positions are never reported back as ours.

mod authenticate;
mod base_backup;
mod client;
mod connect;
mod connection;
pub mod conninfo;
mod error;
mod stream;
mod tls;

pub use base_backup::{BackupMessage, BackupTablespace, BaseBackupOptions, BaseBackupStream};
pub use client::{
    ConnectionMode, ReplicationClient, ReplicationStart, ServerVersion, SlotCreation, SlotInfo,
    SystemIdentity,
};
pub use conninfo::ConnInfo;
pub use error::Error;
pub use stream::{NextTimeline, StatusSender, StatusUpdate, StreamMessage, WalReceiver};

/// The result type of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests;
