//! The small binaries that PostgreSQL starts for every segment: `wal-archiver push` and
//! `pitr-restore wal-fetch`, for the case that another process has already done the work. The full
//! binary in the same directory does everything else ([`whole`]).
//!
//! A program that links RocksDB takes several times as long to start as this one takes to answer.
//! Invariant: nothing here depends on the catalog. A test of each program checks this.

pub mod ahead;
pub mod fetch;
pub mod message;
pub mod push;
pub mod whole;
