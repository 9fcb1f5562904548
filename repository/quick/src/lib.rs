//! What PostgreSQL starts for every segment: `wal-archiver push` and `pitr-restore wal-fetch`, as long as another process has
//! done the work already. Everything else is done by the whole program beside it ([`whole`]).
//!
//! A program with RocksDB in it needs several times as long to start as this one to answer. Invariant: nothing here depends
//! on the catalog; a test of each program holds it to that.

pub mod ahead;
pub mod fetch;
pub mod message;
pub mod push;
pub mod whole;
