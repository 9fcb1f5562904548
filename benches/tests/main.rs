//! End-to-end tests of both programs together: the main job, buckets, encryption, faults of a
//! store, and what one test crate cannot see alone.
//!
//! One program, so that RocksDB is linked once and tests of different files run beside each other.
//! `TIDEMARK_LONG=1` takes the full counts.

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
