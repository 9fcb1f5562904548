//! End-to-end tests of both programs together: the main job, buckets, encryption, faults of a
//! store, and everything that the tests of a single crate cannot check.
//!
//! All tests are one program, so that RocksDB is linked once and tests of different files run
//! concurrently. `TIDEMARK_LONG=1` uses the full counts.

mod backup_files;
mod bad_bucket;
mod credentials;
mod decoder;
mod encrypted_bucket;
mod encryption;
mod exchanged_bucket;
mod fencing;
mod matrix;
mod object_store;
mod quick;
mod requests;
mod several;
mod truth;
mod write_once_bucket;
