//! Streams WAL from a primary into the repository; takes base backups.

pub mod flushed_lsn;
pub mod http;
pub mod instruments;
pub mod report;
pub mod rpo;
