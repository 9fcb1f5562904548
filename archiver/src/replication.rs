//! PostgreSQL's replication protocol: [`ReplicationClient`] and the stream of WAL.
//!
//! Modules in reading order: [`conninfo`] (where and who), `connect` (hosts, sockets, startup), `tls`, `authenticate`,
//! `connection` (framing), `client` (commands), `stream` (WAL in, status out). Invariant: a status is built from a [`crate::flushed_lsn::FlushedLsn`]; what the server
//! says of its own positions is never sent back as ours.

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

/// This module's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod tests;
