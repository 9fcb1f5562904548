//! PostgreSQL's replication protocol: [`ReplicationClient`] and the WAL stream.
//!
//! Modules in reading order: [`conninfo`] (address and role), `connect` (hosts, sockets, startup),
//! `tls`, `authenticate`, `connection` (framing), `client` (commands), `stream` (WAL in, status
//! out).
//! Invariant: a status update is built from a [`FlushedLsn`]. The server's own
//! positions are never reported back as ours.

mod authenticate;
mod base_backup;
mod client;
mod connect;
mod connection;
pub mod conninfo;
mod error;
mod flushed_lsn;
mod stream;
mod tls;
mod tls_error;

pub use base_backup::{BackupMessage, BackupTablespace, BaseBackupOptions, BaseBackupStream};
pub use client::{
    ReplicationClient, ReplicationStart, ServerVersion, SlotCreation, SlotInfo, SystemIdentity,
};
pub use conninfo::{ConnInfo, ConnectionMode};
pub use error::Error;
pub use flushed_lsn::FlushedLsn;
pub use stream::{NextTimeline, StatusSender, StatusUpdate, StreamMessage, WalReceiver};

/// The result type of this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests;
