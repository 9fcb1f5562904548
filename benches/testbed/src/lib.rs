//! The test harness: temporary PostgreSQL servers, our own programs, and a ledger that remembers
//! acknowledged transfers outside of PostgreSQL. The demo, the end-to-end tests and the benchmarks
//! use it.

pub mod bucket_proxy;
pub mod cluster;
pub mod encrypted_job;
pub mod fault_proxy;
pub mod host_loss;
#[cfg(test)]
mod imports;
pub mod ledger;
pub mod main_job;
pub mod moto;
pub mod object_store;
pub mod place;
pub mod ports;
pub mod programs;
pub mod restored;
pub mod tools;
pub mod truth;
pub mod usage;
pub mod waldump;
pub mod workload;
