//! Streams WAL from a primary into the repository; takes base backups.
//!
//! Modules in reading order: [`pipeline`] (start here: WAL on its way), the [`core`](mod@core) that
//! decides, the [`spool`] it is written to first, [`replication`] (PostgreSQL's protocol),
//! [`base_backup`], the [`supervisor`] that keeps a cluster archived, and the reports about it:
//! [`status`], [`dashboard`]. The [`walsender`] streams it on to standbys.
//! [`cli`] is the outside.

pub mod base_backup;
mod blocking;
pub mod cli;
mod conninfo;
pub mod core;
pub mod daemon;
mod descriptors;
pub mod error;
pub mod expire;
pub mod import;
mod locks;
pub mod notify;
mod outcomes;
pub mod pipeline;
pub mod push;
pub mod spool;
pub mod standby_slots;
pub mod supervisor;
pub mod synchronous;
mod verify;
pub mod walsender;
