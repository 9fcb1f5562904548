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

/// Returns true if `TIDEMARK_LONG` is set: tests then use their full counts and every version.
/// A test that makes sense only then is `#[ignore = "long: make test-long"]` instead.
#[must_use]
pub fn is_long() -> bool {
    std::env::var_os("TIDEMARK_LONG").is_some()
}
