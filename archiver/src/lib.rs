//! Streams WAL from a primary into the repository; takes base backups.
//!
//! Modules in reading order: [`pipeline`] (start here: WAL on its way), the [`core`](mod@core) that
//! decides, the [`spool`] it is written to first, [`replication`] (PostgreSQL's protocol),
//! [`base_backup`], the [`daemon`] whose supervisor keeps a cluster archived, and the reports about
//! it: [`status`], [`dashboard`]. The [`walsender`] streams it on to standbys. [`cli`] is the
//! outside.

pub mod base_backup;
mod blocking;
pub mod cli;
pub mod core;
pub mod daemon;
pub mod error;
pub mod import;
mod jitter;
mod observe;
pub mod pipeline;
pub mod primary;
pub mod spool;
pub mod upkeep;
mod verify;
pub mod walsender;
